from __future__ import annotations

import pytest

from isoform.errors import DataError
from isoform.evaluation.predictions import read_predictions, writing

ROW = {"id": "a", "split": "dev", "input": "q", "gold": "x", "prediction": "y", "stats": {"correct": 0.0, "nats": 1.5}}


def test_round_trip_and_choice_of_split(tmp_path) -> None:
    rows = [ROW, {**ROW, "id": "b", "split": "test", "gold": 'é\n,"'}]
    with writing(tmp_path / "predictions.jsonl") as write:
        for row in rows:
            write(row)
    assert read_predictions(tmp_path / "predictions.jsonl") == rows == read_predictions(tmp_path)
    assert read_predictions(tmp_path, "test") == rows[1:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id,gold,prediction\n1,a,a\n2,a,b\n", [1.0, 0.0]),
        ('\ufeffid,label,prediction,x\n1,"a, b","a, b",\n', [1.0]),
        ("id,correct\n1,True\n2,0\n3,0.25\n4,no\n", [1.0, 0.0, 0.25, 0.0]),
        ("id,correct,gold,prediction\n1,0,a,a\n", [0.0]),
    ],
)
def test_files_of_other_tools(tmp_path, text, expected) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(text, encoding="utf-8")
    rows = read_predictions(path)
    assert [row["stats"]["correct"] for row in rows] == expected
    assert all(row["stats"]["examples"] == 1 and set(row) == set(ROW) for row in rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"columns none given, `id` is missing"),
        ("Id,correct\n1,1\n", r"columns Id, correct given, `id` is missing \(is it 'Id'\?\)"),
        ("id,gold\n1,a\n", r"`correct`, or `prediction` with `gold` is expected"),
        ("id,prediction\n1,a\n", r"`gold` or `label` is expected"),
        ("id,correct\n1,2\n", r":2: column `correct` has '2'"),
        ("id,correct\n1,\n", r":2: column `correct` has ''"),
        ("id,gold,prediction\n1,a\n", r":2: another number of columns"),
        ("id,gold,prediction\n1,a,b,c\n", r":2: another number of columns"),
        ("id,correct\n1,1\n1,0\n", r"id '1' stands there twice"),
        ('id,gold,prediction\n1,a,"b\n', r"not readable as UTF-8 CSV"),
    ],
)
def test_mistakes_name_file_line_and_column(tmp_path, text, message) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"predictions\.csv.*" + message):
        read_predictions(path)


def test_what_is_not_there_or_not_text(tmp_path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_predictions(tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"neither predictions\.jsonl nor"):
        read_predictions(tmp_path)
    (tmp_path / "predictions.csv").write_bytes(b"id,correct\n\xff,1\n")
    with pytest.raises(DataError, match="not readable as UTF-8"):
        read_predictions(tmp_path)
    (tmp_path / "predictions.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"jsonl:1: an object with `id` and `stats`"):
        read_predictions(tmp_path)
