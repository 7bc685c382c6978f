"""What every test shares: one thread a process (bit-equality is claimed for one number of threads), a cache of its own.

Set before torch is imported; processes that tests start inherit it.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_session(tmp_path_factory):
    """No test reads or writes the cache of the person who runs it."""
    os.environ["ISOFORM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["ISOFORM_CACHE"]
