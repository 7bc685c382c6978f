"""Names to classes: what a config calls `kind: rope` is a class registered under ("position", "rope").

A component brings its own options: a pydantic class `Config` on the registered class, a subclass of `Options`.
Registering is the only step that an addition needs: the modules of the room are imported on the first lookup.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from isoform.errors import ConfigError

T = TypeVar("T")

# The room where the classes of each category live; its modules are imported on the first lookup.
ROOMS = {
    "norm": "isoform.layers",
    "position": "isoform.layers",
    "feedforward": "isoform.layers",
    "model": "isoform.models",
    "tokenizer": "isoform.text",
    "objective": "isoform.objectives",
    "metric": "isoform.evaluation",
    "optimizer": "isoform.training",
    "schedule": "isoform.training",
    "tracker": "isoform.training",
}

_classes: dict[tuple[str, str], type[Any]] = {}
_loaded: set[str] = set()


class Options(BaseModel):
    """The options of one component: unknown keys are errors, values are checked, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def register(category: str, name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: makes the class known as `name` in its category."""

    def add(cls: type[T]) -> type[T]:
        assert category in ROOMS, f"unknown category {category}"
        assert (category, name) not in _classes, f"{category} {name} is registered twice"
        _classes[category, name] = cls
        return cls

    return add


def names(category: str) -> list[str]:
    """Every registered name of the category, sorted."""
    _load(ROOMS[category])
    return sorted(name for kind, name in _classes if kind == category)


def lookup(category: str, name: str, where: str | None = None) -> type[Any]:
    """The class registered as `name`; `where` is the config field to name in the error.

    Raises: ConfigError with the known names and the nearest one.
    """
    known = names(category)
    if name not in known:
        field = where or category
        raise ConfigError(f"{field}: {name!r} is not a known {category}{nearest(name, known)}; known: {', '.join(known)}")
    return _classes[category, name]


def build_options(cls: type[Any], options: dict[str, Any], where: str) -> Any:
    """The component's `Config` from plain values, with errors that name `where.field`."""
    try:
        return cls.Config(**options)
    except ValidationError as error:
        raise ConfigError(explain(error, where, cls.Config)) from None


def component(category: str, options: dict[str, Any], where: str) -> tuple[type[Any], Any]:
    """The class and its options for a section such as `{kind: rope, base: 10000}`."""
    if "kind" not in options:
        raise ConfigError(f"{where}: `kind` is missing; known: {', '.join(names(category))}")
    cls = lookup(category, str(options["kind"]), f"{where}.kind")
    return cls, build_options(cls, {key: value for key, value in options.items() if key != "kind"}, where)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """The first mistake of a pydantic error as one line: the field, what was given, what was expected."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    field = ".".join([where, *path] if where else path)
    if first["type"] == "extra_forbidden":
        section = _section(model, path[:-1])
        known = [info.alias or key for key, info in section.model_fields.items()] if section else []
        hint = nearest(path[-1], known)
        return f"{field}: unknown key{hint}; known here: {', '.join(known)}"
    message = first["msg"].removeprefix("Value error, ")
    more = len(error.errors()) - 1
    tail = f" ({more} more mistake{'s' if more > 1 else ''} after this one)" if more else ""
    given = "" if first["type"] == "missing" else f" given {first['input']!r}:"
    return f"{field}:{given} {message[0].lower()}{message[1:]}{tail}"


def _section(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The pydantic class at a path of field names, or None where the path leaves typed sections."""
    current: type[BaseModel] | None = model
    for part in path:
        if current is None:
            return None
        info = next((f for key, f in current.model_fields.items() if part in (key, f.alias)), None)
        candidates = [] if info is None else [info.annotation, *getattr(info.annotation, "__args__", ())]
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return current


def _load(room: str) -> None:
    if room in _loaded:
        return
    _loaded.add(room)
    package = importlib.import_module(room)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{room}.{module.name}")
