"""Configs as plain values, before they are checked: recipes and files, `extends`, merging, and `--set`."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

from isoform.config import RunConfig, StudyConfig
from isoform.errors import ConfigError
from isoform.registry import nearest
from isoform.yaml12 import parse_yaml


def recipe_names() -> list[str]:
    """Names of the recipes that come with isoform."""
    folder = resources.files("isoform") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_config(name_or_path: str | Path) -> dict[str, Any]:
    """A recipe's or file's plain values, with `extends` followed. Raises: ConfigError."""
    return _read(str(name_or_path), ())


def _read(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        raise ConfigError(f"{' -> '.join([*seen, name])}: `extends` goes in a circle")
    path = Path(name)
    if path.suffix in {".yaml", ".yml", ".json"} or path.is_file():
        if not path.is_file():
            raise ConfigError(f"{name}: no such file")
        text, folder = path.read_text(encoding="utf-8"), str(path.parent.resolve())
    elif name in recipe_names():
        text, folder = (resources.files("isoform") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"), None
    else:
        known = recipe_names()
        raise ConfigError(f"{name}: neither a file nor a recipe{nearest(name, known)}; recipes: {', '.join(known)}")
    value: Any = parse_yaml(text, name)
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: {type(value).__name__} given, a mapping of sections is expected")
    if "extends" in value:
        parent = str(value.pop("extends"))
        nested = path.parent / parent
        inherited = _read(str(nested) if folder and nested.is_file() else parent, (*seen, name))
        value = _left_out(inherited, merge(inherited, dict(value)))
    if folder is not None:
        data = value.setdefault("base", {}) if "stages" in value else value
        data.setdefault("data", {})
        if isinstance(data["data"], dict) and data["data"].get("root") is None:
            data["data"]["root"] = folder
    values: dict[str, Any] = value
    return values


def _left_out(inherited: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    """Without the inherited arms for which `null` is given."""
    known = inherited.get("arms")
    if not isinstance(known, dict) or not isinstance(merged["arms"], dict):
        return merged
    arms = {name: arm for name, arm in merged["arms"].items() if arm is not None or name not in known}
    return {**merged, "arms": arms}


def is_study(values: dict[str, Any]) -> bool:
    return "arms" in values or "stages" in values


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, section by section; a component of another `kind` replaces the old one whole."""
    result = copy.deepcopy(base)
    for key, item in changes.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(item, dict) and not _other_kind(old, item):
            result[key] = merge(old, item)
        else:
            result[key] = copy.deepcopy(item)
    return result


def _other_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return any(key in new and new[key] != old.get(key) for key in ("kind", "family", "from"))


def apply_settings(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """`--set a.b=c` over a config; in a study, a run's sections are found under `base`. Raises: ConfigError."""
    result = copy.deepcopy(values)
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator or not path.strip():
            raise ConfigError(f"--set {setting}: `field.path=value` is expected")
        parts = path.strip().split(".")
        if is_study(result) and parts[0] in RunConfig.model_fields and parts[0] not in StudyConfig.model_fields:
            parts = ["base", *parts]
        value = parse_yaml(text, f"--set {path}") if text.strip() else None
        target = result
        for part in parts[:-1]:
            if not isinstance(target.get(part), dict):
                target[part] = {"kind": target[part]} if isinstance(target.get(part), str) else {}
            target = target[part]
        if parts[-1] == "from":
            target.clear()  # the shape of existing weights is fixed: what described another model is void
        target[parts[-1]] = value
    return result
