"""Names to classes: what a config calls `kind: rope` is a class registered under ("position", "rope").

A component brings its own options: a pydantic class `Config` on the registered class, a subclass of `Options`.
Registering is the only step that an addition needs: the modules of the room are imported on the first lookup.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from isoform.errors import ConfigError

T = TypeVar("T")

# The room where the classes of each category live; its modules are imported on the first lookup.
ROOMS = {
    "norm": "isoform.layers",
    "position": "isoform.layers",
    "feedforward": "isoform.layers",
    "model": "isoform.models",
    "adapter": "isoform.models",
    "tokenizer": "isoform.text",
    "objective": "isoform.objectives",
    "metric": "isoform.evaluation",
    "optimizer": "isoform.training",
    "schedule": "isoform.training",
    "tracker": "isoform.training",
}

_classes: dict[tuple[str, str], type[Any]] = {}
_loaded: set[str] = set()


@dataclass
class Reads:
    """Which fields of configs were looked at, and which components' options were built, while this was recording.

    fields: (class, field); built: (place in the config, options).
    """

    fields: set[tuple[type, str]] = field(default_factory=set)
    built: list[tuple[str, BaseModel]] = field(default_factory=list)

    def unread(self, config: BaseModel) -> list[str]:
        """Fields of the run's config that were given another value than their default and that nobody read."""
        components = [(place, options) for place, options in self.built if _root(place) in type(config).model_fields]
        return sorted({name for place, part in [("", config), *components] for name in self._unread(place, part)})

    def _unread(self, place: str, part: BaseModel) -> Iterator[str]:
        for name, info in type(part).model_fields.items():
            value = part.__dict__[name]
            path = f"{place}.{name}" if place else name
            if isinstance(value, BaseModel):
                yield from self._unread(path, value)
            elif value != info.get_default(call_default_factory=True) and (type(part), name) not in self.fields:
                yield path


_reads: Reads | None = None


def _root(place: str) -> str:
    return place.partition(".")[0]


@contextmanager
def recording(reads: Reads | None) -> Iterator[None]:
    """Notes in `reads` every look at a field of a config, in all threads; None: notes nothing, as at other times."""
    global _reads
    before, _reads = _reads, reads
    try:
        yield
    finally:
        _reads = before


def note_read(self: BaseModel, name: str) -> Any:
    """The `__getattribute__` of configs: what it is without recording, and a note."""
    if _reads is not None and not name.startswith("_"):
        _reads.fields.add((type(self), name))
    return object.__getattribute__(self, name)


class Options(BaseModel):
    """The options of one component: unknown keys are errors, values are checked, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    if not TYPE_CHECKING:
        __getattribute__ = note_read


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
        close = nearest(name, known)
        raise ConfigError(f"{field}: {name!r} is not a known {category}{close}; known: {', '.join(known)}")
    return _classes[category, name]


def build_options(cls: type[Any], options: dict[str, Any], where: str) -> Any:
    """The component's `Config` from plain values, with errors that name `where.field`."""
    try:
        with recording(None):  # that validators look at a field does not mean that it is used
            built = cls.Config(**options)
    except ValidationError as error:
        raise ConfigError(explain(error, where, cls.Config)) from None
    if _reads is not None:
        _reads.built.append((where, built))
    return built


def component(category: str, options: dict[str, Any], where: str) -> tuple[type[Any], Any]:
    """The class and its options for a section such as `{kind: rope, base: 10000}`."""
    if "kind" not in options:
        given = f" beside {', '.join(map(repr, options))}" if options else ""
        close = next(
            filter(None, (f"; did you mean `kind` by {key!r}?" for key in options if nearest(key, ["kind"]))), ""
        )
        raise ConfigError(f"{where}: `kind` is missing{given}{close}; known kinds: {', '.join(names(category))}")
    cls = lookup(category, str(options["kind"]), f"{where}.kind")
    return cls, build_options(cls, {key: value for key, value in options.items() if key != "kind"}, where)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """The first mistake of a pydantic error as one line: the field, what was given, what was expected."""
    # An unknown key explains a missing one better than the other way round.
    first = min(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
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
    # What is said of a section as a whole names the field itself; the section written out would bury it.
    given = "" if first["type"] == "missing" or isinstance(first["input"], dict) else f" given {first['input']!r}:"
    return f"{field + ':' if field else ''}{given} {message[0].lower()}{message[1:]}{tail}".strip()


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
