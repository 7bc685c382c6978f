"""What every test shares: one thread a process (bit-equality is claimed for one number of threads), a cache of its own.

Set before torch is imported; processes that tests start inherit it.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The kernels where there is a compiler: no test depends on a measurement.
os.environ.setdefault("ISOFORM_NATIVE", "1")


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_session(tmp_path_factory):
    """No test reads or writes the cache of the person who runs it."""
    os.environ["ISOFORM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["ISOFORM_CACHE"]


@pytest.fixture(params=[(1, False), (1, True), (3, False), (3, True)], ids=lambda way: f"{way[0]}-{'tiles' * way[1]}")
def kernel_way(request, monkeypatch):
    """A number of threads, and products on tiles or in vectors."""
    import torch

    from isoform.layers import kernels

    threads, tiles = request.param
    library = kernels.loaded()
    if library is None or (tiles and not library.has_tiles):
        pytest.skip("not on this processor")
    monkeypatch.setattr(library, "has_tiles", tiles)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_batch():
    """Makes a ragged batch of random tokens with the given lengths."""
    import torch

    from isoform.contracts import Batch, Sequences
    from isoform.layers import ragged

    def make(lengths, *, vocab=61, dropout_key=None, seed=0):
        sequences = Sequences(lengths)
        generator = torch.Generator().manual_seed(seed)
        return Batch(
            tokens=torch.randint(0, vocab, (sequences.num_tokens,), generator=generator),
            positions=ragged.places(sequences, torch.device("cpu")),
            sequences=sequences,
            sample_keys=torch.arange(len(lengths)) * 7919 + 13,
            dropout_key=dropout_key,
        )

    return make
