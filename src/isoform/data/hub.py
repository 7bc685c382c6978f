"""Datasets of the Hugging Face hub, through the optional package `datasets`, at a pinned revision."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from isoform.data.readers import Row
from isoform.errors import DataError

SPEC = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+|[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<config>[\w.-]+))?(?:#(?P<split>[\w.-]+))?"
)


@dataclass(frozen=True)
class HubTable:
    """Rows of one split; `revision` is the commit that was resolved, and with it the content."""

    name: str
    repository: str
    revision: str
    config: str | None
    split: str | None

    def rows(self) -> Iterator[Row]:
        """The rows; classes by their names, not by the numbers under which the hub keeps them."""
        import datasets

        features = self._dataset.features.items()
        names = {key: feature.names for key, feature in features if isinstance(feature, datasets.ClassLabel)}
        for number, row in enumerate(self._dataset, start=1):
            known = {key: each[row[key]] for key, each in names.items() if row[key] is not None and row[key] >= 0}
            yield number, {**row, **known}

    def digest(self) -> str:
        return f"hf {self.repository} {self.revision} {self.config} {self.split}"

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        try:
            found = datasets.load_dataset(self.repository, self.config, revision=self.revision)
        except Exception as error:  # the package raises many kinds, for the network, the name and the files
            raise DataError(f"{self.name}: cannot be read: {_first_line(error)}") from None
        if self.split is None and len(found) == 1:
            return next(iter(found.values()))
        split = self.split or "train"
        if split not in found:
            raise DataError(f"{self.name}: no split {split!r}; add one of {', '.join(f'#{name}' for name in found)}")
        return found[split]


def open_table(spec: str) -> HubTable:
    """The table of `hf:owner/name[@revision][:config][#split]`, its revision resolved to a commit.

    Raises: DataError where the package is missing, the hub is out of reach, or the name is not of this form.
    """
    match = SPEC.fullmatch(spec)
    if match is None:
        raise DataError(f"{spec}: hf:owner/name[@revision][:config][#split] is expected")
    try:
        import datasets  # noqa: F401 - only to know that it is there
        from huggingface_hub import HfApi
    except ImportError:
        raise DataError(f"{spec}: the package `datasets` is missing; pip install 'isoform[hf]'") from None
    try:
        revision = HfApi().dataset_info(match["name"], revision=match["revision"]).sha
    except Exception as error:  # offline, unknown, private, gated: the message says which
        raise DataError(f"{spec}: the hub does not give it: {_first_line(error)}") from None
    return HubTable(spec, match["name"], str(revision), match["config"], match["split"])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
