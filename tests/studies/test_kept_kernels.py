"""A study keeps the kernels that it was begun with, and does not go on without them."""

from __future__ import annotations

import pytest

from isoform.config import study_config
from isoform.errors import ConfigError
from isoform.layers import choice, kernels
from isoform.storage import read_json, write_json
from isoform.studies.layout import Layout
from isoform.studies.study import _record


def record(values, folder):
    return _record(folder, study_config(values), "", lambda line: None)


@pytest.fixture(autouse=True)
def switch_as_it_was():
    before = kernels.switched_on()
    yield
    kernels.switch(before)


def test_they_are_recorded_and_kept(values, tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    first = record(values, tmp_path / "study")
    assert first["kernels"]["native"] == choice.available()
    monkeypatch.setattr(choice, "_native", lambda precision, device: pytest.fail("chosen again"))
    assert record(values, tmp_path / "study")["kernels"] == first["kernels"]


def test_without_them_it_is_refused_in_one_line(values, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    folder.mkdir()
    kept = record(values, folder)
    write_json(folder / "manifest.json", {**kept, "kernels": {**kept["kernels"], "native": choice.TILES}})
    monkeypatch.setenv("ISOFORM_NATIVE", "0")
    with pytest.raises(ConfigError, match=r"begun with C.. kernels .* start anew with another --out") as caught:
        record(values, folder)
    assert "\n" not in str(caught.value)
    assert read_json(folder / "manifest.json")["kernels"]["native"] == choice.TILES


def test_stages_of_other_kernels_are_not_shared(values):
    chains = [
        Layout(study_config(values), [0], "fp32", "sources", kind).chain("scratch", 0) for kind in ("plain", "tiles")
    ]
    assert chains[0][-1].key != chains[1][-1].key
