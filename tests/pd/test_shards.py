"""Cutting pages between ranks of different TP sizes, against numpy's own slicing; and such parts through NIXL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lmcache_ext.pd.shards import Page, Rank, chunk_pieces, page_pieces
from tests.pd.peers import ROWS, Parts, Peer

pytest.importorskip("nixl", reason="nixl is not installed")

BLOCK, DIM, ITEM = 4, 8, 2
HND = (2, BLOCK * DIM * ITEM)  # runs, bytes of a head in a run
NHD = (2 * BLOCK, DIM * ITEM)


def whole(pages: Sequence[Page], rows: int) -> list[list[np.ndarray]]:
    """[rows][layers] a model's pages as [outer, heads, head_bytes], every byte from a seed."""
    rng = np.random.default_rng(5)
    return [
        [rng.integers(0, 256, (p.outer, max(1, p.heads), p.head_bytes), np.uint8) for p in pages] for _ in range(rows)
    ]


def slot_of(model: list[list[np.ndarray]], pages: Sequence[Page], rank: Rank) -> np.ndarray:
    """What one rank has of it, as its slot."""
    parts = []
    for row in model:
        for page, full in zip(pages, row, strict=True):
            heads = rank.heads(page.heads) if page.heads else range(1)
            parts.append(full[:, heads.start : heads.stop].ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("layout", [HND, NHD])
@pytest.mark.parametrize(("senders", "receivers"), [(2, 1), (1, 2), (4, 2), (2, 4), (2, 2), (1, 1), (8, 1), (1, 8)])
def test_all_senders_together_fill_each_receivers_slot(layout, heads, senders, receivers):
    pages = [Page(layout[0], heads, layout[1]), Page(1, 0, 96), Page(layout[0], heads, layout[1] * 2)]
    model = whole(pages, rows=3)
    for r in range(receivers):
        receiver = Rank(r, receivers)
        wanted = slot_of(model, pages, receiver)
        got, written = np.zeros_like(wanted), np.zeros(len(wanted), int)
        for s in range(senders):
            sender = Rank(s, senders)
            source = slot_of(model, pages, sender)
            for a, b, n in chunk_pieces(pages, 3, sender, receiver):
                got[b : b + n] = source[a : a + n]
                written[b : b + n] += 1
        assert (written == 1).all(), "a byte that nobody writes, or two do"
        assert np.array_equal(got, wanted)


def test_equal_ranks_exchange_one_piece_and_strangers_nothing():
    pages = [Page(*NHD[:1], 8, NHD[1])] * 4
    same = chunk_pieces(pages, 16, Rank(1, 2), Rank(1, 2))
    assert same.tolist() == [[0, 0, 16 * 4 * pages[0].nbytes(2)]]
    assert len(chunk_pieces(pages, 16, Rank(0, 2), Rank(1, 2))) == 0


def test_a_head_on_several_ranks_is_sent_by_the_first():
    page = Page(2, 2, 16)
    assert [len(page_pieces(page, Rank(r, 4), Rank(0, 1))) > 0 for r in range(4)] == [True, False, True, False]


def test_hnd_needs_a_block_th_of_nhds_pieces():
    """What docs/pd.md says about layouts: 32 layers of 16 tokens, 8 heads of 128 elements, a chunk of 16 blocks."""
    count = {}
    for name, page in (("HND", Page(1, 8, 16 * 2 * 128 * 2)), ("NHD", Page(16, 8, 2 * 128 * 2))):
        count[name] = len(chunk_pieces([page] * 32, 16, Rank(0, 2), Rank(0, 1)))
    assert count == {"HND": 512, "NHD": 8192}


@pytest.mark.parametrize(("heads", "tp"), [(8, 3), (6, 4)])
def test_what_can_not_be_divided_is_refused(heads, tp):
    with pytest.raises(ValueError, match="can't be divided"):
        Rank(0, tp).heads(heads)
    with pytest.raises(ValueError, match="rank"):
        Rank(tp, tp)


def test_parts_of_two_ranks_meet_in_one_slot_through_nixl():
    pages = [Page(2, 8, 128)] * 4
    model = whole(pages, ROWS)
    sources = [slot_of(model, pages, Rank(s, 2)) for s in range(2)]
    cuts = [chunk_pieces(pages, ROWS, Rank(s, 2), Rank(0, 1)) for s in range(2)]
    wanted = slot_of(model, pages, Rank(0, 1))
    peer = Peer(Parts)
    assert np.array_equal(peer("meet", sources, cuts, len(wanted)), wanted)
    peer.close()
