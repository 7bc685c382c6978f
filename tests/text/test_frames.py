"""What a tokenizer.json lays around texts, read and written. Oracle: `tokenizers`' and transformers' own encoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from isoform.registry import build_options, lookup
from isoform.text.frames import Frame
from isoform.text.tokenizers import TextTokenizer, load_tokenizer, train_tokenizer

TEXTS = ("the old sea", "a red boat on it")


def made(kind: str, special: list[str]) -> TextTokenizer:
    options = build_options(lookup("tokenizer", kind), {"special": special, "vocab_size": 300}, "text.tokenizer")
    return train_tokenizer(kind, options, [*TEXTS] * 20)


POST = {
    "bert": lambda sep, cls: processors.BertProcessing(sep, cls),
    "roberta": lambda sep, cls: processors.RobertaProcessing(sep, cls),
    "xlnet": lambda sep, cls: processors.TemplateProcessing(
        single=["$A:0", f"{sep[0]}:0", f"{cls[0]}:2"],
        pair=["$A:0", f"{sep[0]}:0", "$B:1", f"{sep[0]}:1", f"{cls[0]}:2"],
        special_tokens=[sep, cls],
    ),
    "llama": lambda sep, cls: processors.TemplateProcessing(
        single=[cls[0], "$A"], pair=[cls[0], "$A", f"{cls[0]}:1", "$B:1"], special_tokens=[cls]
    ),
}


@pytest.mark.parametrize("form", POST)
def test_the_frame_of_a_file_is_followed(form: str) -> None:
    tokenizer = made("wordpiece", ["pad", "unk", "cls", "sep"])
    sep, cls = ((tokenizer.special[role], tokenizer.special_ids[role]) for role in ("sep", "cls"))
    tokenizer.backend.post_processor = POST[form](sep, cls)
    assert tokenizer.frame is not None
    for texts in (TEXTS[:1], TEXTS):
        ids, segments = tokenizer.frame.around([tokenizer.encode(text) for text in texts])
        theirs = tokenizer.backend.encode(*texts)
        assert ids.tolist() == theirs.ids and segments.tolist() == theirs.type_ids
        assert tokenizer.frame.num_added(len(texts)) == sum(theirs.special_tokens_mask)


def test_a_file_that_adds_nothing_has_no_frame() -> None:
    tokenizer = made("bpe", ["pad", "bos", "eos"])
    assert tokenizer.frame is None
    tokenizer.backend.post_processor = processors.ByteLevel(trim_offsets=False)
    assert TextTokenizer(tokenizer.backend, tokenizer.special).frame is None


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece"])
def test_a_frame_that_is_given_is_what_transformers_adds(kind: str, tmp_path: Path) -> None:
    tokenizer = made(kind, ["pad", "unk", "bos", "eos"])
    frame = Frame.of_edges((tokenizer.special_ids["bos"],), (tokenizer.special_ids["eos"],))
    framed = tokenizer.framed(frame)
    framed.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for texts in (TEXTS[:1], TEXTS):
        ids, segments = frame.around([tokenizer.encode(text) for text in texts])
        said = theirs(*texts, return_token_type_ids=True)
        assert said["input_ids"] == ids.tolist() and said["token_type_ids"] == segments.tolist()
    again = load_tokenizer(tmp_path)
    assert again.frame == frame and again.framed(frame) is again
    assert again.fingerprint() == tokenizer.fingerprint(), "ids of a text are the same"
    assert np.array_equal(again.encode(TEXTS[0]), tokenizer.encode(TEXTS[0])) and tokenizer.frame is None


def test_a_frame_of_nothing_takes_away_what_the_file_added(tmp_path: Path) -> None:
    tokenizer = made("wordpiece", ["pad", "unk", "cls", "sep"])
    sep, cls = ((tokenizer.special[role], tokenizer.special_ids[role]) for role in ("sep", "cls"))
    tokenizer.backend.post_processor = POST["bert"](sep, cls)
    tokenizer.framed(Frame.of_edges((), ())).save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0]).tolist()
    assert load_tokenizer(tmp_path).frame is None
