"""Configs: mistakes are one line with the nearest name; numbers are numbers; sections merge as people expect."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.config import RunConfig, run_config, study_config, to_yaml
from isoform.errors import ConfigError
from isoform.reading import apply_settings, is_study, merge, read_config, recipe_names
from isoform.yaml12 import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3", 3),
        ("0.1", 0.1),
        ("1.", 1.0),
        ("true", True),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(f"a: {text}", "test")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["1e-4x", "v1.0", "e5", "1-2", "2026-11-22x"])
def test_what_only_looks_like_a_number_is_text(text):
    assert parse_yaml(f"a: {text}", "test")["a"] == text


def test_a_key_given_twice_is_refused_with_its_line():
    with pytest.raises(ConfigError, match="line 2: the key 'a' is given twice"):
        parse_yaml("a: 1\na: 2", "test")


BROKEN = [
    "a: [",
    "a: !!python/object:os.system x",
    "a: &x 1\nb: *x",
    "- 1\n a: 2",
    "a: {{ x }}",
    "{[1, 2]: b}",
    "? {a: b}\n: c",
    "a: 2024-13-45",
    "a: 0x_",
    "!!timestamp x",
    "\x00",
    "[" * 3000,
]


@pytest.mark.parametrize("text", BROKEN)
def test_hostile_or_broken_yaml_is_one_line(text):
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "file.yaml")
    assert "\n" not in str(error.value) and str(error.value).startswith("file.yaml")


@pytest.mark.parametrize("text", ["{{ x }}", "{% for message in messages %}", "[{a: b}: c]"])
def test_a_template_without_quotes_is_told_with_its_setting(text):
    with pytest.raises(ConfigError, match=r"^--set objective\.template: ?") as error:
        apply_settings({}, [f"objective.template={text}"])
    assert "\n" not in str(error.value)
    assert apply_settings({}, [f'objective.template="{text}"']) == {"objective": {"template": text}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "trian: unknown key (did you mean 'train'?)"),
        ({"train": {"learning_rat": 1}}, "train.learning_rat: unknown key (did you mean 'learning_rate'?)"),
        ({"data": {"splits": {"tset": 0.1}}}, "data.splits.tset: unknown key (did you mean 'test'?)"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate: given 'fast'"),
        ({"train": {"learning_rate": -1}}, "train.learning_rate: given -1: input should be greater than 0"),
        ({"train": {"max_steps": 1, "max_epochs": 1}}, "keep one"),
        ({"data": {"path": "a", "train": "b"}}, "`path` and `train` are both given"),
        ({"train": {"max_steps": 9, "max_epochs": 1}}, "`max_epochs` and `max_steps` are both given; keep one"),
        ({"train": {"batch_tokens": 9, "batch_sequences": 1}}, "`batch_sequences` and `batch_tokens` are both given"),
        ({"data": {"splits": {"train": 0.9, "dev": 0.2}}}, "at most 1 is expected"),
        ({"name": "../x"}, "name: given '../x'"),
    ],
)
def test_mistakes_name_the_field_what_was_given_and_what_was_expected(values, message):
    with pytest.raises(ConfigError) as error:
        run_config(values)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == 2


FIELDS = [
    f"{section}.{field}"
    for section in ("data", "text", "train", "evaluate")
    for field in RunConfig.model_fields[section].annotation.model_fields
]


@settings(max_examples=100, deadline=None)
@given(field=st.sampled_from(FIELDS), place=st.integers(0, 30), letter=st.sampled_from("xqz"))
def test_a_misspelt_field_is_refused_with_its_name(field, place, letter):
    section, name = field.split(".")
    wrong = name[: place % len(name)] + letter + name[place % len(name) :]
    with pytest.raises(ConfigError, match="unknown key") as error:
        run_config({section: {wrong: 1}})
    assert f"{section}.{wrong}" in str(error.value)


def test_settings_reach_a_run_and_the_base_of_a_study():
    assert apply_settings({}, ["train.learning_rate=1e-4"]) == {"train": {"learning_rate": 1e-4}}
    study = {"stages": {}, "arms": {}, "base": {"data": {"root": "a"}}}
    changed = apply_settings(study, ["data.root=b", "seeds=2", "stages.pretrain.train.max_steps=3"])
    assert changed["base"]["data"]["root"] == "b" and changed["seeds"] == 2
    assert changed["stages"]["pretrain"]["train"]["max_steps"] == 3
    with pytest.raises(ConfigError, match=r"field\.path=value"):
        apply_settings({}, ["train.learning_rate"])


def test_a_component_of_another_kind_replaces_the_old_one():
    base = {"train": {"optimizer": {"kind": "muon", "momentum": 0.9}, "clip_norm": 1.0}}
    merged = merge(base, {"train": {"optimizer": {"kind": "adamw"}}})
    assert merged == {"train": {"optimizer": {"kind": "adamw"}, "clip_norm": 1.0}}
    assert merge(base, {"train": {"optimizer": {"momentum": 0.5}}})["train"]["optimizer"]["kind"] == "muon"


def test_a_config_written_out_reads_back_as_itself():
    config = run_config({"train": {"learning_rate": 1e-4}, "model": {"family": "gpt2", "width": 8}})
    assert run_config(parse_yaml(to_yaml(config), "test")) == config


def test_extends_follows_recipes_and_files_and_refuses_circles(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: quickstart\nseeds: 2\n")
    assert read_config(tmp_path / "a.yaml")["seeds"] == 2
    (tmp_path / "less.yaml").write_text("extends: quickstart\narms: {pretrained-rope: null}\n")
    assert sorted(read_config(tmp_path / "less.yaml")["arms"]) == ["pretrained", "scratch"]
    (tmp_path / "typo.yaml").write_text("extends: quickstart\narms: {pretrained-rop: null}\n")
    with pytest.raises(ConfigError, match=r"arms\.pretrained-rop: None given"):
        study_config(read_config(tmp_path / "typo.yaml"))
    (tmp_path / "b.yaml").write_text("extends: b.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        read_config(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match=r"did you mean 'quickstart'"):
        read_config("quikstart")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid(name):
    values = read_config(name)
    study_config(values) if is_study(values) else run_config({key: v for key, v in values.items() if key != "about"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"a": {"stages": ["fintune"]}}}, "'fintune' is not a stage (did you mean 'finetune'?)"),
        ({"arms": {"a": {"stages": ["finetune"], "modle": {}}}}, "arms.a.modle: unknown key (did you mean 'model'?)"),
        ({"questions": [{"pair": ["a", "c"]}]}, "'c' is not an arm"),
        ({"compare": {"metirc": "x"}}, "compare.metirc: unknown key"),
    ],
)
def test_a_study_names_its_mistakes(change, message):
    values = {
        "stages": {"finetune": {}},
        "arms": {"a": {"stages": ["finetune"]}, "b": {"stages": ["finetune"]}},
        "compare": {"metric": "loss"},
    }
    with pytest.raises(ConfigError) as error:
        study_config({**values, **change})
    assert message in str(error.value)
