"""Ids, round trips, and agreement with `transformers.AutoTokenizer`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isoform.errors import ConfigError, DataError
from isoform.registry import component, names
from isoform.text import kinds
from isoform.text import tokenizers as module
from isoform.text.tokenizers import TextTokenizer, load_tokenizer, train_tokenizer

KINDS = ("char", "word", "bpe", "wordpiece")
TEXTS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps!\n",
    "Zoë naïvely ate crème brûlée in Kraków, then left.",
    "A tab\there,  two spaces, and\n\na blank line.",
    "the theme of the thesis: other mothers gather together",
]
ODD = [
    "",
    " ",
    "\n",
    " leading and trailing ",
    "unknown ☃ snow 漢字 and 🙂",
    "CAPS İstanbul ΣΊΣΥΦΟΣ",
    "\r\n windows \r\n",
    "combining e\u0301 and nbsp\u00a0here",
    "<pad> <unk> <eos> <mask> [PAD] [UNK] [MASK] <|endoftext|>",
    "glued<pad>words[MASK]",
]


def trained(kind: str, **options: object) -> TextTokenizer:
    _, config = component("tokenizer", {"kind": kind, "vocab_size": 400, **options}, "text.tokenizer")
    return train_tokenizer(kind, config, iter(TEXTS * 3))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, TextTokenizer]:
    return {kind: trained(kind) for kind in KINDS}


def test_every_kind_is_registered() -> None:
    assert set(KINDS) <= set(names("tokenizer"))


@pytest.mark.parametrize("options", [{}, {"lowercase": True}, {"lowercase": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_ids(kind: str, options: dict[str, object], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = trained(kind, **options)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS + ODD:
        ids = ours.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids, skip_special=False), text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
    for role, index in ours.special_ids.items():
        assert getattr(theirs, f"{role}_token_id") == index
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_comes_back(kind: str, tokenizers: dict[str, TextTokenizer], tmp_path: Path) -> None:
    before = tokenizers[kind]
    before.save(tmp_path)
    after = load_tokenizer(tmp_path)
    assert after.kind == before.kind == kind
    assert after.fingerprint() == before.fingerprint()
    assert after.special_ids == before.special_ids
    alone = load_tokenizer(tmp_path / "tokenizer.json")
    assert [alone.encode(text).tolist() for text in ODD] == [before.encode(text).tolist() for text in ODD]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_looks_like_a_special_token_is_plain_text(kind: str, tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers[kind]
    unknown = {tokenizer.special_ids["unk"]} if "unk" in tokenizer.special_ids else set()
    for token in tokenizer.special.values():
        for text in (token, f"a {token} b", f"a{token}b", token * 3):
            found = set(tokenizer.encode(text).tolist()) & set(tokenizer.special_ids.values())
            assert found <= unknown, (token, text)


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_adds_nothing_and_is_int32(kind: str, tokenizers: dict[str, TextTokenizer]) -> None:
    ids = tokenizers[kind].encode(TEXTS[0])
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert not set(ids.tolist()) & set(tokenizers[kind].special_ids.values())
    assert tokenizers[kind].encode("").shape == (0,)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_byte_level_round_trip(text: str, tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["bpe"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=60))
def test_byte_level_round_trip_of_any_bytes(data: bytes) -> None:
    tokenizer = _BPE
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.text(alphabet="aé <>pdunk漢\n", max_size=40))
def test_the_character_table_agrees_with_the_library(text: str) -> None:
    expected = _CHAR.backend.encode(text, add_special_tokens=False).ids
    assert _CHAR.encode(text).tolist() == expected


_BPE = trained("bpe")
_CHAR = trained("char", lowercase=True)


@settings(max_examples=20, deadline=None)
@given(words=st.lists(st.sampled_from(["the", "theme", " ", "  ", "\n", "dog.", "Zoë", "a", "<pad>"]), max_size=60))
def test_long_texts_are_cut_where_it_does_not_show(words: list[str]) -> None:
    text = " ".join(words)
    for kind in ("word", "bpe", "wordpiece"):
        tokenizer = _LONG[kind]
        whole = tokenizer.backend.encode(text, add_special_tokens=False).ids
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PIECE_CHARACTERS", 10)
            assert tokenizer._cuttable
            assert tokenizer.encode(text).tolist() == whole
            assert tokenizer.encode_many([text, "a dog"])[0].tolist() == whole


_LONG = {kind: trained(kind) for kind in ("word", "bpe", "wordpiece")}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_in_every_process(kind: str, tokenizers: dict[str, TextTokenizer]) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from test_tokenizers import trained; print(trained(sys.argv[2]).fingerprint())"
    )
    if kind != "wordpiece":
        assert trained(kind).fingerprint() == tokenizers[kind].fingerprint()
        return
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent), kind], capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    }
    assert found == {tokenizers[kind].fingerprint()}


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_word_of_a_million_characters_is_learnt_from(kind: str, tmp_path: Path) -> None:
    """The library's trainers take hours for it: the time goes with the square of the longest word."""
    from transformers import AutoTokenizer

    word = "w" * 1_000_000
    _, config = component("tokenizer", {"kind": kind, "vocab_size": 400}, "text.tokenizer")
    tokenizer = train_tokenizer(kind, config, [*TEXTS, word])
    ids = tokenizer.encode(word)
    if kind == "bpe":
        assert tokenizer.decode(ids) == word
        assert len(ids) <= len(word) / 100, "runs of the letter were learnt"
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(word, add_special_tokens=False)["input_ids"] == ids.tolist()


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_words_of_ordinary_length_are_learnt_from_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(kind)
    monkeypatch.setattr(kinds, "LONGEST_WORD_CHARACTERS", 50_000)
    assert trained(kind).fingerprint() == expected.fingerprint()
    described = json.loads(expected.backend.to_str())["pre_tokenizer"]
    assert described["type"] in {"ByteLevel", "BertPreTokenizer"}, "the cut is no part of the tokenizer"


def test_words_as_in_a_kept_alphabet() -> None:
    tokenizer = trained("word", keep="a-z0-9.,!?", min_frequency=1)
    assert tokenizer.decode(tokenizer.encode("The *quick* DOG\nsleeps!")) == "the quick dog sleeps!"
    assert list(tokenizer.special_ids) == ["pad", "unk", "bos", "eos"]
    assert list(tokenizer.special_ids.values()) == [0, 1, 2, 3]
    special = trained("word", keep="a^]-", min_frequency=1)
    assert special.decode(special.encode("b[a]b")) == ""
    assert special.count_unknown(special.encode("b[a]b ^-")) == 2


def test_limits_of_the_vocabulary() -> None:
    small = trained("char", vocab_size=10)
    assert small.vocab_size == 10
    assert small.count_unknown(small.encode("qzxj etaoin")) > 0
    assert trained("word", vocab_size=12).vocab_size == 12
    rare = trained("char", min_frequency=6)
    assert rare.count_unknown(rare.encode("ë")) == 1
    assert small.count_unknown(np.array([], dtype=np.int32)) == 0


def test_token_widths_add_up_to_the_bytes() -> None:
    for kind in ("char", "bpe"):
        tokenizer = trained(kind)
        for text in TEXTS:
            assert tokenizer.token_widths[tokenizer.encode(text)].sum() == len(text.encode())


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        component("tokenizer", {"kind": "bpe", "vocab_sise": 5}, "text.tokenizer")
    with pytest.raises(ConfigError, match="unk"):
        component("tokenizer", {"kind": "char", "special": ["pad"]}, "text.tokenizer")
    with pytest.raises(DataError, match="empty"):
        train_tokenizer("char", component("tokenizer", {"kind": "char"}, "t")[1], iter([]))


def test_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_truncation_and_padding_of_a_foreign_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = trained("wordpiece")
    tokenizer.backend.enable_truncation(3)
    tokenizer.backend.enable_padding(length=50)
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("the quick brown fox jumps")) not in (3, 50)


@pytest.mark.parametrize(
    ("pattern", "fine"),
    [
        (r"(a+)+", False),
        (r"(?:a|b)*c", False),
        (r"((a?))+", False),
        (r"(x{2,}){9}", False),
        (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", True),
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+",
            True,
        ),
        (r"[(a+)+]+", True),
        (r"\(a+\)+", True),
    ],
)
def test_patterns_that_can_run_for_ever_are_refused(pattern: str, fine: bool, tmp_path: Path) -> None:
    tokenizer = trained("wordpiece")
    described = json.loads(tokenizer.backend.to_str())
    described["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    if fine:
        load_tokenizer(tmp_path)
    else:
        with pytest.raises(DataError, match="pattern"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["char", "word", "bpe", "wordpiece"])
def test_sentinels_are_special_tokens_in_order(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    options = {"kind": kind, "sentinels": 12, "vocab_size": 400}
    _, config = component("tokenizer", options, "text.tokenizer")
    tokenizer = train_tokenizer(kind, config, ["a text with <extra_id_0> in it", "and another"] * 3)
    ids = tokenizer.sentinel_ids
    assert len(ids) == 12
    assert [tokenizer.decode([index], skip_special=False) for index in ids] == [f"<extra_id_{i}>" for i in range(12)]
    assert not set(tokenizer.encode("a text with <extra_id_0> in it").tolist()) & set(ids)
    assert tokenizer.decode([*ids]) == ""
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.sentinel_ids == ids
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids("<extra_id_3>") == ids[3]
    plain = train_tokenizer(kind, component("tokenizer", {"kind": kind}, "t")[1], ["a text"] * 3)
    assert plain.sentinel_ids == ()
