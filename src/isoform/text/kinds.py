"""The kinds of tokenizer that isoform trains: their options, and how each is learned from texts.

| kind      | tokens                                       | special tokens unless `special` says otherwise    |
|-----------|----------------------------------------------|---------------------------------------------------|
| char      | characters                                   | <pad> <unk> <bos> <eos> <mask>                    |
| word      | what stands between white space; `<` and `>` | <pad> <unk> <bos> <eos>                           |
| bpe       | byte-level pair encoding (GPT-2)             | <pad> <bos> <eos> <mask>; nothing is unknown      |
| wordpiece | words and pieces of words (BERT)             | [PAD] [UNK] [CLS] [SEP] [MASK]                    |

Each default follows the models that use the kind. Special tokens come first in the vocabulary, in the order given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from isoform.registry import Options, register
from isoform.text.tokenizers import TextTokenizer, sentinel

Role = Literal["pad", "unk", "bos", "eos", "mask", "sep", "cls"]
MAX_ALPHABET = 1000
BLOCK_CHARACTERS = 1_000_000
# The trainer of merges takes time with the square of a word's length: a word of a million characters would take hours,
# the same characters in pieces of this length take seconds. No word of a language comes near it.
LONGEST_WORD_CHARACTERS = 500


class TokenizerOptions(Options):
    """What every kind has."""

    vocab_size: int = Field(8192, gt=0)
    # at most so many tokens, special ones included
    min_frequency: int = Field(1, ge=1)
    # a token must stand so often in the training texts
    lowercase: bool = False
    special: tuple[Role, ...] = ()
    # roles that get a special token, in the order of their ids
    sentinels: int = Field(0, ge=0)
    # special tokens <extra_id_0> ... that stand for cut-out spans, after the others; t5-spans needs some, T5 has 100

    @field_validator("special")
    @classmethod
    def _once(cls, value: tuple[Role, ...]) -> tuple[Role, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a role is named twice; name it once")
        return value


def _angle_tokens(options: TokenizerOptions) -> dict[str, str]:
    return {role: f"<{role}>" for role in options.special} | _sentinels(options)


def _sentinels(options: TokenizerOptions) -> dict[str, str]:
    return {sentinel(number): sentinel(number) for number in range(options.sentinels)}


def _with_special(backend: Backend, special: dict[str, str]) -> TextTokenizer:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    return TextTokenizer(backend, special)


@register("tokenizer", "char")
class Char:
    """One token a character, sorted by code point; any other character is unknown."""

    class Config(TokenizerOptions):
        special: tuple[Role, ...] = ("pad", "unk", "bos", "eos", "mask")

        @field_validator("special")
        @classmethod
        def _unknown(cls, value: tuple[Role, ...]) -> tuple[Role, ...]:
            return _with_unknown(value)

    @staticmethod
    def train(config: Config, texts: Iterable[str]) -> TextTokenizer:
        """The characters of the texts, the most frequent ones where there are too many."""
        special = _angle_tokens(config)
        normalizer = normalizers.Lowercase() if config.lowercase else None
        counts: Counter[str] = Counter()
        for character, count in _character_counts(texts).items():
            for lower in normalizer.normalize_str(character) if normalizer else character:
                counts[lower] += count
        frequent = _most_frequent(counts, config.vocab_size - len(special), config.min_frequency)
        vocab = {token: index for index, token in enumerate([*special.values(), *sorted(frequent)])}
        backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token=special["unk"]))
        if normalizer:
            backend.normalizer = normalizer
        backend.decoder = decoders.Fuse()
        return _with_special(backend, special)


@register("tokenizer", "word")
class Word:
    """One token a word, the most frequent first; punctuation stays with its word unless `keep` removes it."""

    class Config(TokenizerOptions):
        special: tuple[Role, ...] = ("pad", "unk", "bos", "eos")
        lowercase: bool = True
        keep: str | None = None
        # characters and ranges that are kept, such as `a-z0-9.,!?`, all others being removed; white space always
        # parts words; null: all are kept

        @field_validator("special")
        @classmethod
        def _unknown(cls, value: tuple[Role, ...]) -> tuple[Role, ...]:
            return _with_unknown(value)

    @staticmethod
    def train(config: Config, texts: Iterable[str]) -> TextTokenizer:
        special = _angle_tokens(config)
        backend = Backend(models.WordLevel(vocab={}, unk_token=special["unk"]))
        steps: list[Any] = [normalizers.Lowercase()] if config.lowercase else []
        if config.keep is not None:
            steps.append(normalizers.Replace(Regex(rf"[^\s{_escaped(config.keep)}]"), ""))
        if steps:
            backend.normalizer = normalizers.Sequence(steps)
        # `<` and `>` are words of their own, so that no word of a text can spell a special token.
        angle = pre_tokenizers.Split(Regex("[<>]"), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), angle])
        trainer = trainers.WordLevelTrainer(
            vocab_size=config.vocab_size,
            min_frequency=config.min_frequency,
            special_tokens=list(special.values()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return _with_special(backend, special)


@register("tokenizer", "bpe")
class Bpe:
    """Byte-level pair encoding: any text comes back as it was; nothing is unknown.

    Source: Radford et al. 2019, section 2.2; the pattern that parts words is GPT-2's.
    """

    class Config(TokenizerOptions):
        special: tuple[Role, ...] = ("pad", "bos", "eos", "mask")
        min_frequency: int = Field(2, ge=1)

    @staticmethod
    def train(config: Config, texts: Iterable[str]) -> TextTokenizer:
        special = _angle_tokens(config)
        backend = Backend(models.BPE())
        if config.lowercase:
            backend.normalizer = normalizers.Lowercase()
        parting = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = _with_short_words(parting)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            min_frequency=config.min_frequency,
            special_tokens=list(special.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.pre_tokenizer = parting
        return _with_special(backend, special)


@register("tokenizer", "wordpiece")
class WordPiece:
    """Words, and pieces of words marked `##` where they go on; spaces are not kept.

    Source: Devlin et al. 2019; normalizer, pre-tokenizer and decoder are BERT's.
    """

    class Config(TokenizerOptions):
        special: tuple[Role, ...] = ("pad", "unk", "cls", "sep", "mask")
        min_frequency: int = Field(2, ge=1)
        lowercase: bool = True
        # also removes accents, as BERT's uncased models do

        @field_validator("special")
        @classmethod
        def _unknown(cls, value: tuple[Role, ...]) -> tuple[Role, ...]:
            return _with_unknown(value)

    @staticmethod
    def train(config: Config, texts: Iterable[str]) -> TextTokenizer:
        special: dict[str, str] = {role: f"[{role.upper()}]" for role in config.special} | _sentinels(config)
        backend = Backend(models.WordPiece(unk_token=special["unk"]))
        backend.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
        parting = pre_tokenizers.BertPreTokenizer()
        backend.pre_tokenizer = _with_short_words(parting)
        words: Counter[str] = Counter()
        for text in texts:
            words.update(text.split())
        alphabet = _alphabet(words, backend)
        # The trainer numbers the pieces `##a` in the order of a hash table, which differs from process to process and
        # decides ties between merges. Named beforehand as special tokens they have their numbers.
        pieces = [f"##{character}" for character in alphabet]
        trainer = trainers.WordPieceTrainer(
            vocab_size=config.vocab_size,
            min_frequency=config.min_frequency,
            special_tokens=[*special.values(), *pieces],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        backend.train_from_iterator(_repeated(words), trainer)
        vocab = backend.get_vocab(with_added_tokens=False)
        trained = Backend(models.WordPiece(vocab=vocab, unk_token=special["unk"]))
        trained.normalizer, trained.pre_tokenizer = backend.normalizer, parting
        trained.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        return _with_special(trained, special)


def _with_short_words(parting: Any) -> Any:
    """The pre-tokenizer with over-long words cut: for training only, encoding takes any length in linear time."""
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_WORD_CHARACTERS}}}"), behavior="isolated")
    return pre_tokenizers.Sequence([parting, pieces])


def _character_counts(texts: Iterable[str]) -> dict[str, int]:
    """How often each character stands in the texts, a block of texts at a time."""
    totals = np.zeros(0x110000, dtype=np.int64)
    block: list[str] = []
    size = 0

    def flush() -> None:
        codes = np.frombuffer("".join(block).encode("utf-32-le"), dtype=np.uint32)
        if len(codes):
            found = np.bincount(codes)
            totals[: len(found)] += found
        block.clear()

    for text in texts:
        block.append(text)
        size += len(text)
        if size > BLOCK_CHARACTERS:
            flush()
            size = 0
    flush()
    return {chr(code): int(totals[code]) for code in np.flatnonzero(totals).tolist()}


def _with_unknown(value: tuple[Role, ...]) -> tuple[Role, ...]:
    if "unk" not in value:
        raise ValueError("`unk` is missing; without it unseen text has no token")
    return value


def _most_frequent(counts: Counter[str], number: int, min_frequency: int) -> list[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [token for token, count in ranked[: max(number, 0)] if count >= min_frequency]


def _escaped(keep: str) -> str:
    """The characters of a class with their special meaning taken, ranges between letters or digits kept."""
    parts = re.findall(r"[^\W_]-[^\W_]|.", keep, flags=re.DOTALL)
    return "".join(part if len(part) == 3 else re.escape(part) for part in parts)


def _alphabet(words: Counter[str], backend: Backend) -> list[str]:
    """The characters of the words as the tokenizer sees them, sorted; the most frequent ones where there are many."""
    raw: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            raw[character] += count
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for plain in backend.normalizer.normalize_str(character):
            if not plain.isspace():
                counts[plain] += count
    return sorted(_most_frequent(counts, MAX_ALPHABET, 1))


def _repeated(words: Counter[str]) -> Iterator[str]:
    """Every word as often as it stood in the texts, in a fixed order, a few at a time."""
    for word, count in sorted(words.items()):
        for start in range(0, count, 1000):
            yield " ".join([word] * min(1000, count - start))
