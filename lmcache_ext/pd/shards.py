"""Which bytes of one rank's page belong where in another's, when prefill and decode have different TP sizes.

A page, one block of one layer, is `outer` runs of `heads` pieces of `head_bytes`, in this order:

    HND   [heads, block, keys and values]    outer = 1        head_bytes = block x 2 x head_dim x itemsize
    NHD   [block, heads, keys and values]    outer = block    head_bytes = 2 x head_dim x itemsize
    MLA   [block, latent]                    heads = 0: every rank has all of it; outer = 1, head_bytes = the page

A rank of `tp` has heads / tp of a model's KV heads; with fewer heads than ranks, a head lies on several ranks, and the
first of them sends it. All is arithmetic on offsets: nothing here touches memory. CPU attention's pages are HND, too:
it packs a head's bytes in an order of its own, but each head apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pieces = npt.NDArray[np.int64]
"""[n, 3] offset at the sender, offset at the receiver, bytes."""


@dataclass(frozen=True)
class Page:
    """One layer's page, of the whole model."""

    outer: int
    heads: int
    head_bytes: int

    def nbytes(self, tp: int) -> int:
        """Bytes of the page on one rank of `tp`."""
        return self.outer * max(1, self.heads // tp) * self.head_bytes


@dataclass(frozen=True)
class Rank:
    """Rank `rank` of `tp`."""

    rank: int
    tp: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.tp:
            raise ValueError(f"rank {self.rank} of {self.tp}")

    def heads(self, of: int) -> range:
        """Which of a model's KV heads it has. Raises ValueError if they can't be divided so."""
        if max(of, self.tp) % min(of, self.tp):
            raise ValueError(f"{of} KV heads can't be divided among {self.tp} ranks")
        count = max(1, of // self.tp)
        first = self.rank * of // self.tp
        return range(first, first + count)

    def sends(self, of: int) -> bool:
        """Whether it is the first rank that has its heads."""
        copies = max(1, self.tp // of) if of else self.tp
        return self.rank % copies == 0


def pairs(heads: int, senders: int, receivers: int) -> list[tuple[int, int]]:
    """All (sender, receiver) of so many ranks that have something for each other, of a model with `heads` KV heads.

    Raises:
        ValueError: they can't be divided so.
    """
    if not heads:
        return [(0, rank) for rank in range(receivers)]
    found = []
    for s, r in itertools.product(range(senders), range(receivers)):
        sender = Rank(s, senders)
        mine, theirs = sender.heads(heads), Rank(r, receivers).heads(heads)
        if sender.sends(heads) and max(mine.start, theirs.start) < min(mine.stop, theirs.stop):
            found.append((s, r))
    return found


def page_pieces(page: Page, sender: Rank, receiver: Rank) -> Pieces:
    """What `sender` writes into `receiver`'s page; no rows if it has nothing to send there. O(outer)."""
    if not sender.sends(page.heads):
        return np.empty((0, 3), np.int64)
    if not page.heads:
        return np.array([[0, 0, page.nbytes(1)]], np.int64)
    mine, theirs = sender.heads(page.heads), receiver.heads(page.heads)
    first, end = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
    if first >= end:
        return np.empty((0, 3), np.int64)
    run = np.arange(page.outer, dtype=np.int64)
    source = (run * len(mine) + first - mine.start) * page.head_bytes
    target = (run * len(theirs) + first - theirs.start) * page.head_bytes
    return _joined(np.stack([source, target, np.full_like(run, (end - first) * page.head_bytes)], axis=1))


def chunk_pieces(pages: Sequence[Page], rows: int, sender: Rank, receiver: Rank) -> Pieces:
    """What `sender` writes into `receiver`'s slot: `rows` rows, each the layers' `pages` one behind the other.

    Every byte of every receiver's slot is written once by all senders together.
    """
    parts, at_sender, at_receiver = [], 0, 0
    for page in pages:
        parts.append(page_pieces(page, sender, receiver) + np.array([at_sender, at_receiver, 0]))
        at_sender += page.nbytes(sender.tp)
        at_receiver += page.nbytes(receiver.tp)
    row = np.concatenate(parts) if parts else np.empty((0, 3), np.int64)
    step = np.array([at_sender, at_receiver, 0], np.int64)
    return _joined((row[None] + np.arange(rows, dtype=np.int64)[:, None, None] * step).reshape(-1, 3))


def _joined(pieces: Pieces) -> Pieces:
    """Neighbours on both sides as one."""
    if len(pieces) < 2:
        return pieces
    ends = pieces[:-1, :2] + pieces[:-1, 2:]
    starts = np.concatenate(([0], 1 + np.flatnonzero((ends != pieces[1:, :2]).any(axis=1))))
    joined: Pieces = pieces[starts]
    joined[:, 2] = np.add.reduceat(pieces[:, 2], starts)
    return joined
