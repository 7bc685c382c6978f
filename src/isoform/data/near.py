"""Near duplicates: documents that share most of their words in the same order, found without comparing all pairs.

A document is the set S of its word 3-shingles (lower case, punctuation dropped). Its sketch is the k smallest hashes
of S, all of S where there are fewer: a MinHash of one permutation, exact for short documents. Where a share p of the
words is unchanged, about p^3 of the shingles are, so that

    p = D^(1/3),   D = 2 |A n B| / (|A| + |B|)

with A and B the sketches, cut at the smaller of their largest hashes. Two documents are near duplicates where p is at
least the threshold and they share `MIN_SHARED` shingles. A shingle that more than `FORMULA_DOCUMENTS` documents have
is a formula ("in which country is"), evidence of nothing, and is left out of both sets.

Source: Broder 1997, "On the resemblance and containment of documents", section 3 (bottom-k sketches).
Differs: the estimate is turned into a share of words; formulas are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from isoform.contracts import Ints
from isoform.data.blocks import blocks
from isoform.data.identity import Hashes

SHINGLE_WORDS = 3
SKETCH_HASHES = 128
MIN_SHARED = 4
FORMULA_DOCUMENTS = 20
MAX_WORDS_REMEMBERED = 500_000
# Scripts that do not part words are taken character by character.
UNPARTED = re.compile(r"([\u3040-\u30ff\u3400-\u9fff])")
PUNCTUATION = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Sketches:
    """Sketches of N documents: `hashes (s,)` sorted within each document, `owners (s,)`, distinct shingles `(N,)`."""

    hashes: Hashes
    owners: Ints
    sizes: Ints

    def __len__(self) -> int:
        return len(self.sizes)

    def of(self, document: int) -> Hashes:
        """The hashes of one document."""
        start, end = np.searchsorted(self.owners, [document, document + 1])
        return self.hashes[start:end]


@dataclass(frozen=True)
class Pair:
    """Two documents by number, and the estimated share of words that they have in common."""

    first: int
    second: int
    similarity: float


class _WordHashes(dict[str, int]):
    """Word -> 64-bit hash, remembered for words that come again."""

    def __missing__(self, word: str) -> int:
        if len(self) > MAX_WORDS_REMEMBERED:
            self.clear()
        plain = PUNCTUATION.sub("", word)
        value = int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")
        self[word] = value
        return value


_words = _WordHashes()


def _mixed(values: Hashes) -> Hashes:
    """The finishing step of SplitMix64: every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _parted(text: str) -> list[str]:
    return (text if text.isascii() else UNPARTED.sub(r" \1 ", text)).split()


def sketch_block(texts: list[str]) -> Sketches:
    """Sketches of some texts at once."""
    words = [_parted(text.lower()) for text in texts]
    counts = np.array([len(some) for some in words], dtype=np.int64)
    known = map(_words.__getitem__, chain.from_iterable(words))
    hashed = np.fromiter(known, dtype=np.uint64, count=int(counts.sum()))
    owners = np.repeat(np.arange(len(texts)), counts)
    shingles, at = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    if len(hashed) >= SHINGLE_WORDS:
        within = owners[:-2] == owners[2:]
        shingles = _mixed(_mixed(_mixed(hashed[:-2]) + hashed[1:-1]) + hashed[2:])[within]
        at = owners[:-2][within]
    order = np.argsort(shingles)
    order = order[np.argsort(at[order].astype(np.uint32), kind="stable")]
    shingles, at = shingles[order], at[order]
    fresh = np.ones(len(at), dtype=bool)
    fresh[1:] = (shingles[1:] != shingles[:-1]) | (at[1:] != at[:-1])
    shingles, at = shingles[fresh], at[fresh]
    sizes = np.bincount(at, minlength=len(texts)).astype(np.int64)
    rank = np.arange(len(at)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    kept = rank < SKETCH_HASHES
    return Sketches(shingles[kept], at[kept], sizes)


def sketch(texts: Iterable[str]) -> Sketches:
    """Sketches of any number of texts: up to 2 KB a document."""
    parts, start = [], 0
    for block in blocks(texts):
        part = sketch_block(block)
        parts.append(Sketches(part.hashes, part.owners + start, part.sizes))
        start += len(part)
    if not parts:
        return Sketches(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    return Sketches(
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.owners for part in parts]),
        np.concatenate([part.sizes for part in parts]),
    )


def near_pairs(sketches: Sketches, threshold: float) -> list[Pair]:
    """The near duplicates among the documents, best first; identical ones have similarity 1."""
    order = np.argsort(sketches.hashes, kind="stable")
    hashes, owners = sketches.hashes[order], sketches.owners[order]
    unique, counts = np.unique(hashes, return_counts=True)
    formulas = unique[counts > FORMULA_DOCUMENTS]
    useful = np.repeat((counts > 1) & (counts <= FORMULA_DOCUMENTS), counts)
    hashes, owners = hashes[useful], owners[useful]
    together = []
    for distance in range(1, FORMULA_DOCUMENTS):
        same = np.flatnonzero(hashes[distance:] == hashes[:-distance])
        if not len(same):
            break
        together.append(owners[same] * len(sketches) + owners[same + distance])
    if not together:
        return []
    codes, shared = np.unique(np.concatenate(together), return_counts=True)
    codes = codes[shared >= MIN_SHARED]
    return compared(sketches, codes // len(sketches), sketches, codes % len(sketches), formulas, threshold)


def compared(
    left: Sketches, firsts: Ints, right: Sketches, seconds: Ints, formulas: Hashes, threshold: float
) -> list[Pair]:
    """The pairs (first of `left`, second of `right`) that are near duplicates, best first."""
    least = threshold**3 / (2 - threshold**3)
    small = np.minimum(left.sizes[firsts], right.sizes[seconds])
    large = np.maximum(left.sizes[firsts], right.sizes[seconds])
    possible = small >= 0.8 * least * large
    found = []
    for first, second in zip(firsts[possible].tolist(), seconds[possible].tolist(), strict=True):
        similarity = _similarity(left, first, right, second, formulas)
        if similarity >= threshold:
            found.append(Pair(first, second, similarity))
    return sorted(found, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _similarity(left: Sketches, first: int, right: Sketches, second: int, formulas: Hashes) -> float:
    """Estimated share of words in common, 0 where too few shingles are shared to tell."""
    a, b = left.of(first), right.of(second)
    limits = [some[-1] for some, size in ((a, left.sizes[first]), (b, right.sizes[second])) if size > SKETCH_HASHES]
    if limits:
        a, b = a[a <= min(limits)], b[b <= min(limits)]
    a, b = _without(a, formulas), _without(b, formulas)
    shared = len(np.intersect1d(a, b, assume_unique=True))
    if shared < MIN_SHARED:
        return 0.0
    return float((2 * shared / (len(a) + len(b))) ** (1 / SHINGLE_WORDS))


def _without(hashes: Hashes, formulas: Hashes) -> Hashes:
    if not len(formulas):
        return hashes
    places = np.minimum(np.searchsorted(formulas, hashes), len(formulas) - 1)
    others: Hashes = hashes[formulas[places] != hashes]
    return others


class Finder:
    """Near duplicates between a few documents that are held and any number that stream past."""

    def __init__(self, held: Sketches, threshold: float) -> None:
        self._held = held
        self._threshold = threshold
        order = np.argsort(held.hashes, kind="stable")
        self._unique, self._starts, counts = np.unique(held.hashes[order], return_index=True, return_counts=True)
        self._owners = held.owners[order]
        self._counts = counts.astype(np.int64)
        # In how many documents each held shingle stands: the held ones, then those that stream past.
        self._documents = counts.astype(np.int64)
        self._passed = 0
        self._matches: list[tuple[Ints, Ints]] = []
        self._kept: list[Sketches] = []

    def see(self, texts: list[str]) -> None:
        """Lets some documents pass; they are numbered in their order."""
        block = sketch_block(texts)
        if len(self._unique) and len(block.hashes):
            places = np.minimum(np.searchsorted(self._unique, block.hashes), len(self._unique) - 1)
            hit = self._unique[places] == block.hashes
            hit &= self._documents[places] <= FORMULA_DOCUMENTS
            np.add.at(self._documents, places[hit], 1)
            owners, places = block.owners[hit], places[hit]
            enough = np.bincount(owners, minlength=len(texts)) >= MIN_SHARED
            kept = enough[owners]
            self._matches.append((owners[kept] + self._passed, places[kept]))
            ours = enough[block.owners]
            self._kept.append(Sketches(block.hashes[ours], block.owners[ours] + self._passed, block.sizes))
        else:
            self._kept.append(Sketches(block.hashes[:0], block.owners[:0], block.sizes))
        self._passed += len(texts)

    def pairs(self) -> list[Pair]:
        """(passed, held) near duplicates, best first."""
        if not self._matches:
            return []
        formulas = self._unique[self._documents > FORMULA_DOCUMENTS]
        passed = np.concatenate([owners for owners, _ in self._matches])
        places = np.concatenate([place for _, place in self._matches])
        useful = self._documents[places] <= FORMULA_DOCUMENTS
        passed, places = passed[useful], places[useful]
        counts = self._counts[places]
        rank = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        held = self._owners[np.repeat(self._starts[places], counts) + rank]
        codes, shared = np.unique(np.repeat(passed, counts) * len(self._held) + held, return_counts=True)
        codes = codes[shared >= MIN_SHARED]
        streamed = Sketches(
            np.concatenate([part.hashes for part in self._kept]),
            np.concatenate([part.owners for part in self._kept]),
            np.concatenate([part.sizes for part in self._kept]),
        )
        num = len(self._held)
        return compared(streamed, codes // num, self._held, codes % num, formulas, self._threshold)
