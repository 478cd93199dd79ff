"""Hand-overs from GPU memory to GPU memory: between two GPUs where there are two."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU here", allow_module_level=True)
pytest.importorskip("nixl", reason="NIXL comes with the locked packages")

from lmcache_ext.pd import Memory  # noqa: E402 - needs a GPU
from lmcache_ext.pd.gpu_sums import GpuSums  # noqa: E402 - needs a GPU
from tests.pd.gpu_peers import handed_over  # noqa: E402 - needs a GPU
from tests.pd.peers import CHUNK, keys  # noqa: E402 - needs a GPU
from tests.pd.test_gpu_sums import reference  # noqa: E402 - needs a GPU


def test_every_byte_arrives_and_the_tail_too() -> None:
    names = keys("gpu", 20)
    outcome, right, counts = handed_over(names, last=100)
    assert outcome == "stored" and set(right) == set(names), (outcome, len(right), counts)


def test_bytes_that_changed_on_the_way_are_never_seen() -> None:
    names = keys("spoilt", 6)
    outcome, right, counts = handed_over(names, last=CHUNK, spoils=True)
    assert outcome == "corrupt" and names[2] not in right, (outcome, len(right), counts)


@pytest.mark.parametrize("nbytes", [8, 4096, 3 << 20, (32 << 20) + 8])
def test_a_sum_is_the_references(nbytes: int) -> None:
    words = np.random.default_rng(nbytes).integers(0, 1 << 64, nbytes // 8 + 16, dtype=np.uint64)
    store = torch.from_numpy(words.view(np.int64)).cuda()
    torch.cuda.synchronize()
    take = GpuSums(Memory(store.data_ptr(), 8 * len(words), 64, "cuda", 0))

    split = nbytes // 16 * 8
    runs = [((0, nbytes),), ((0, split), (split, nbytes - split)), ((0, 8),)] * 30  # more than are summed at once
    totals = [[int(each) for each in np.frombuffer(one, np.uint64)] for one in take([(1, each) for each in runs])]
    whole, first = reference(words[8 : 8 + nbytes // 8]), reference(words[8:9])
    assert totals == [whole, whole, first] * 30
