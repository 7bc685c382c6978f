"""Tokenizers: characters, words, byte-level BPE, WordPiece, and whatever else a tokenizer.json holds.

All of them are one class around `tokenizers.Tokenizer`, saved as tokenizer.json + tokenizer_config.json, which
`transformers.AutoTokenizer` loads with equal ids. Encoding adds no special token, and a text that spells one
(`<pad>`) is plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer as Backend

from isoform import storage
from isoform.errors import DataError
from isoform.registry import lookup
from isoform.text.frames import Frame, own_frame, processor
from isoform.text.patterns import refuse_slow_patterns

if TYPE_CHECKING:
    from isoform.contracts import IntArray, Ints

ROLES = ("pad", "unk", "bos", "eos", "mask", "sep", "cls")
# Encoding builds about 150 bytes for each byte of text, so longer texts are encoded piece by piece.
PIECE_CHARACTERS = 250_000
MAX_FILE_BYTES = 200_000_000
CHAT_TEMPLATE = "chat_template.jinja"
# Pre-tokenizers that end a word at a space, and normalizers that look at one character at a time: with these the
# ids of a text are those of its pieces, if it is cut before a space that stands between letters.
_CUTTABLE_PRE_TOKENIZERS = {"ByteLevel", "BertPreTokenizer", "WhitespaceSplit", "Split"}
_CUTTABLE_NORMALIZERS = {"Lowercase", "Replace", "BertNormalizer"}


class TextTokenizer:
    """Text to ids and back, whatever the kind; implements `contracts.Tokenizer`.

    special: role (`pad`, `unk`, `bos`, `eos`, `mask`, `sep`, `cls`) -> the token that plays it.
    chat_template: how a conversation is written down for the model (Jinja, see `text.chat`), if it knows one.
    """

    def __init__(self, backend: Backend, special: Mapping[str, str], chat_template: str | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.special = {role: special[role] for role in ROLES if role in special}
        self.chat_template = chat_template

    # ------------------------------------------------------------------------------------------------------- what it is

    @cached_property
    def _description(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(self.backend.to_str())
        return described

    @cached_property
    def kind(self) -> str:
        """`char`, `word`, `bpe`, `wordpiece`, or the name of the model in the file."""
        model = self._description["model"]
        name = str(model.get("type") or ("BPE" if "merges" in model else "WordPiece"))
        if name == "BPE" and not model["merges"] and self._description["pre_tokenizer"] is None:
            return "char"
        return {"BPE": "bpe", "WordLevel": "word", "WordPiece": "wordpiece"}.get(name, name.lower())

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included: the rows that an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> Mapping[str, int]:
        """Role -> id of the special tokens that there are."""
        vocab = self.backend.get_vocab(with_added_tokens=True)
        return {role: vocab[token] for role, token in self.special.items()}

    @cached_property
    def first_ids(self) -> list[int]:
        """Ids that a foreign model reads before every text; our own objectives place theirs themselves."""
        return [index for index in self.backend.encode("").ids if index == self.special_ids.get("bos")]

    @cached_property
    def frame(self) -> Frame | None:
        """What the file lays around a text that is read whole; None where it adds nothing."""
        return own_frame(self.backend)

    def framed(self, frame: Frame) -> TextTokenizer:
        """The same tokenizer, whose file lays `frame` around texts for whoever reads it by other means."""
        if frame == self.frame or (self.frame is None and not frame.num_added(1)):
            return self
        backend = Backend.from_str(self.backend.to_str())
        backend.post_processor = processor(backend, frame)
        return TextTokenizer(backend, self.special, self.chat_template)

    @cached_property
    def sentinel_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens `<extra_id_0>`, `<extra_id_1>` and so on, as far as they go."""
        vocab = self.backend.get_vocab(with_added_tokens=True)
        return tuple(vocab[token] for token in takewhile(vocab.__contains__, map(sentinel, count())))

    def fingerprint(self) -> str:
        """A hash of everything that decides ids; what stands around a text is the objective's."""
        return storage.fingerprint([{**self._description, "post_processor": None}, self.special])

    # ------------------------------------------------------------------------------------------------------ text to ids

    def encode(self, text: str) -> IntArray:
        """Ids `(t,)` of the text alone: no special token is added, and text that looks like one is plain text."""
        if self._characters is not None:
            return self._encode_characters(text)
        if len(text) <= PIECE_CHARACTERS or not self._cuttable:
            return np.array(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        pieces = [np.array(self._ids(piece), dtype=np.int32) for piece in _pieces(text)]
        return np.concatenate(pieces)

    def encode_many(self, texts: list[str]) -> list[IntArray]:
        """`encode` of every text, on all cores."""
        if self._characters is not None or any(len(text) > PIECE_CHARACTERS for text in texts):
            return [self.encode(text) for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    @cached_property
    def _cuttable(self) -> bool:
        pre_tokenizer = self._description["pre_tokenizer"] or {"type": "none"}
        normalizer = self._description["normalizer"]
        parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
        steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
        return (
            all(part["type"] in _CUTTABLE_PRE_TOKENIZERS for part in parts)
            and parts[0]["type"] != "Split"
            and all(part.get("use_regex", True) and not part.get("add_prefix_space") for part in parts)
            and all(step["type"] in _CUTTABLE_NORMALIZERS for step in steps)
        )

    @cached_property
    def _characters(self) -> IntArray | None:
        """Code point -> id `(0x110000,)` of a character tokenizer, or None: a table is 50 times as fast."""
        if self.kind != "char" or "unk" not in self.special_ids:
            return None
        table = np.full(0x110000, self.special_ids["unk"], dtype=np.int32)
        for token, index in self.backend.get_vocab(with_added_tokens=False).items():
            if len(token) == 1:
                table[ord(token)] = index
        return table

    def _encode_characters(self, text: str) -> IntArray:
        assert self._characters is not None
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        return self._characters[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]

    def count_unknown(self, ids: IntArray) -> int:
        """How many of the ids are the unknown token."""
        unknown = self.special_ids.get("unk")
        return 0 if unknown is None else int(np.count_nonzero(ids == unknown))

    # ------------------------------------------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of the ids; special tokens are left out, or spelled."""
        text: str = self.backend.decode([int(index) for index in ids], skip_special_tokens=skip_special)
        return text

    def encode_bytes(self, data: bytes) -> IntArray:
        """Ids `(t,)` of any bytes; byte-level tokenizers only. What is not UTF-8 becomes one token a byte."""
        ids: list[int] = []
        rest = data
        while rest:
            try:
                ids += self.encode(rest.decode("utf-8")).tolist()
                break
            except UnicodeDecodeError as error:
                ids += self.encode(rest[: error.start].decode("utf-8")).tolist()
                ids += [self._bytes[byte] for byte in rest[error.start : error.end]]
                rest = rest[error.end :]
        return np.array(ids, dtype=np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids of a byte-level tokenizer; special tokens are left out."""
        value = {character: byte for byte, character in byte_characters().items()}
        special = {*self.special_ids.values(), *self.sentinel_ids}
        tokens = (self.backend.id_to_token(int(index)) or "" for index in ids if int(index) not in special)
        return bytes(value[character] for token in tokens for character in token)

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """Byte -> id of the token that is this byte alone."""
        vocab = self.backend.get_vocab(with_added_tokens=False)
        return {byte: vocab[character] for byte, character in byte_characters().items()}

    @cached_property
    def token_widths(self) -> Ints:
        """UTF-8 bytes that each id stands for `(v,)`, special tokens none: exact for characters and byte-level BPE.

        For words and word pieces the spaces between them are shared out by whoever divides a text's bytes.
        """
        widths = np.zeros(self.vocab_size, dtype=np.int64)
        byte_level = self.kind == "bpe" and "ByteLevel" in json.dumps(self._description["decoder"])
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            widths[index] = len(token) if byte_level else len(token.removeprefix("##").encode())
        added = self.backend.get_added_tokens_decoder()
        widths[[index for index, token in added.items() if token.special]] = 0
        if "unk" in self.special_ids:
            widths[self.special_ids["unk"]] = 1
        return widths

    # ---------------------------------------------------------------------------------------------------------- on disk

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat template, as `transformers.AutoTokenizer` reads."""
        storage.write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True) + "\n")
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # A text that spells a special token is plain text there too; but a chat template spells them, and there
            # it is transformers that tells a rendered conversation from a text, or does not.
            "split_special_tokens": self.chat_template is None,
            **{f"{role}_token": token for role, token in self.special.items()},
        }
        storage.write_json(folder / "tokenizer_config.json", settings)
        if self.chat_template is not None:
            storage.write_text(folder / CHAT_TEMPLATE, self.chat_template)


def sentinel(number: int) -> str:
    """The special token that stands for the so-manieth cut-out span, as T5 spells it."""
    return f"<extra_id_{number}>"


def byte_characters() -> dict[int, str]:
    """Byte -> the printable character that stands for it in a byte-level vocabulary (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces, each but the first beginning with a space that follows and precedes an ASCII letter."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = start + PIECE_CHARACTERS
        while (cut := text.find(" ", cut)) >= 0 and not (
            text[cut - 1 : cut].isascii()
            and text[cut - 1 : cut].isalpha()
            and text[cut + 1 : cut + 2].isascii()
            and text[cut + 1 : cut + 2].isalpha()
        ):
            cut += 1
        if cut < 0:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


# ------------------------------------------------------------------------------------------------- making and loading


def train_tokenizer(kind: str, config: Any, texts: Iterable[str]) -> TextTokenizer:
    """A tokenizer of the registered kind, trained on the texts.

    config: the kind's `Config`. Equal texts give equal tokenizers, in any process.

    Raises: DataError where the texts are empty.
    """
    tokenizer: TextTokenizer = lookup("tokenizer", kind, "text.tokenizer.kind").train(config, texts)
    if tokenizer.vocab_size <= len(tokenizer.special) + len(tokenizer.sentinel_ids):
        raise DataError("text.tokenizer: nothing to learn from; the training texts are empty")
    return tokenizer


def load_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of a folder or of a tokenizer.json; roles come from the tokenizer_config.json beside it.

    Raises: DataError where the file is missing, is not a tokenizer, or holds a pattern that could run for ever.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path}: no tokenizer.json there; give the folder or the file of a tokenizer")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise DataError(
            f"{file}: {file.stat().st_size} bytes, a tokenizer.json of at most {MAX_FILE_BYTES} is expected"
        )
    try:
        text = file.read_text(encoding="utf-8")
        described = json.loads(text)
        refuse_slow_patterns(described, str(file))
        backend = Backend.from_str(text)
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file}: not a tokenizer.json: {error}") from None
    return TextTokenizer(backend, _roles(file.parent, backend), _chat_template(file.parent))


def _chat_template(folder: Path) -> str | None:
    """The template from a file of its own, or the default one in tokenizer_config.json."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    settings = storage.read_json(config) if config.is_file() else None
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(template, list):
        named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _roles(folder: Path, backend: Backend) -> dict[str, str]:
    """Role -> token, from the files beside tokenizer.json; a token that the vocabulary lacks has no role."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = storage.read_json(folder / name)
            settings |= found if isinstance(found, dict) else {}
    roles = {}
    for role in ROLES:
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and backend.token_to_id(token) is not None:
            roles[role] = token
    if not roles:
        roles = _guessed_roles(backend)
    return roles


def _guessed_roles(backend: Backend) -> dict[str, str]:
    """Roles by the names that special tokens usually have, where only tokenizer.json is there."""
    tokens = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    return {role: token for token in tokens for role in ROLES if token.strip("<>[]|").lower() == role}
