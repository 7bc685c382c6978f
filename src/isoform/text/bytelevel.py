"""A byte-level BPE tokenizer from its tokens and merges, as container formats list them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from isoform.errors import DataError
from isoform.text.tokenizers import TextTokenizer, byte_characters

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name of a rule in llama.cpp -> the pattern that parts words before merging; None: GPT-2's own. transformers parts
# `smollm` by GPT-2's rule too, llama.cpp also parts digits from the white space before them.
SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "default": None,
    "smollm": None,
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "smaug-bpe": _LLAMA_3,
    "qwen2": _QWEN_2,
}


def byte_level(
    tokens: Sequence[str],
    merges: Sequence[str],
    *,
    split: str,
    special: Sequence[str],
    whole: Sequence[str],
    roles: Mapping[str, str],
    begins: bool = False,
) -> TextTokenizer:
    """The tokenizer whose token number i is `tokens[i]`.

    merges: `left right`, best first. split: a name of `SPLITS`. special, whole: tokens that no text is merged into, of
    which the special ones are left out of decoded text. roles: `bos`, `eos` ... -> token. begins: whether the model
    reads every text with `bos` before it.

    Raises: DataError where the lists contradict each other or the rule is not known.
    """
    if split not in SPLITS:
        raise DataError(f"words are parted by the rule {split!r}; known: {', '.join(SPLITS)}")
    spelling = byte_characters()
    alphabet = set(spelling.values())
    # Added tokens are looked for as they are written; any other in plain spelling is written as the bytes that it is.
    added = {*special, *whole}
    spelt = [
        token if token in added or set(token) <= alphabet else "".join(spelling[byte] for byte in token.encode("utf-8"))
        for token in tokens
    ]
    vocab = {token: index for index, token in enumerate(spelt)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(spelt) if vocab[token] != index)
        raise DataError(f"the token {twice!r} is listed twice")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        backend = Backend(models.BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokens and merges do not fit together: {error}") from None
    pattern = SPLITS[split]
    if pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        parts = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        bytes_of_parts = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([parts, bytes_of_parts])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in whole])
    if begins and "bos" in roles:
        begin = roles["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], special_tokens=[(begin, vocab[begin])]
        )
    return TextTokenizer(backend, roles)
