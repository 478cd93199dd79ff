"""What a sender writes into a receiver's slots: all of a chunk or, between different TP sizes, some of its heads."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lmcache_ext.pd.shards import Page, Pieces, Rank, chunk_pieces, pairs
from lmcache_ext.pd.wire import Geometry

Runs = Sequence[tuple[int, int]]
"""Offset and bytes of what is looked at in a slot, in the order in which it is looked at."""

MOST_RANKS = 4096
_MOST_LAYERS = 4096


class Misfit(ValueError):
    """The two geometries have nothing to give to each other; says why."""


class Plan:
    """Between one rank of a prefill engine and one of a decode engine. Its owner's thread only.

    Args:
        sender, receiver: their geometries.

    Raises:
        Misfit: bytes would be taken for something that they are not, or the sender has nothing for this receiver.
    """

    def __init__(self, sender: Geometry, receiver: Geometry) -> None:
        self.sender, self.receiver = sender, receiver
        self.whole = sender.ranks == receiver.ranks
        common = ("chunk_tokens", "rows", "layout", "pages")
        differ = [name for name in common if getattr(sender, name) != getattr(receiver, name)]
        if self.whole and sender.row_bytes != receiver.row_bytes:
            differ.append("row_bytes")
        if differ:
            raise Misfit(f"{', '.join(differ)} differ: the sender's are {sender}, the receiver's {receiver}")
        if not self.whole and not sender.pages:
            raise Misfit(f"{sender.ranks} ranks here, {receiver.ranks} there, and pages that can't be cut")
        for side in (sender, receiver):
            _check(side)
        writers = writers_of(sender, receiver.ranks)
        if (sender.rank, receiver.rank) not in writers:
            raise Misfit(f"rank {sender.rank} of {sender.ranks} has nothing for {receiver.rank} of {receiver.ranks}")
        self.writer, self.writers = writers.index((sender.rank, receiver.rank)), len(writers)
        self._pieces: dict[int, Pieces] = {}
        self._runs: dict[tuple[int, bool], Runs] = {}

    def pieces(self, tokens: int) -> Pieces:
        """What to copy of a chunk of `tokens` tokens. [n, 3] offset at the sender, at the receiver, bytes."""
        rows = self._rows(tokens)
        if rows not in self._pieces:
            ends = Rank(self.sender.rank, self.sender.ranks), Rank(self.receiver.rank, self.receiver.ranks)
            self._pieces[rows] = chunk_pieces(_pages(self.sender), rows, *ends)
        return self._pieces[rows]

    def runs(self, tokens: int, at_receiver: bool) -> Runs:
        """The same, in one of the two slots: a sum over them is the same at both ends."""
        if self.whole:
            return ((0, self.sender.nbytes(tokens)),)
        name = (self._rows(tokens), at_receiver)
        if name not in self._runs:
            self._runs[name] = [(int(row[int(at_receiver)]), int(row[2])) for row in self.pieces(tokens)]
        return self._runs[name]

    def _rows(self, tokens: int) -> int:
        return self.sender.nbytes(tokens) // self.sender.row_bytes


def writers_of(sender: Geometry, receivers: int) -> list[tuple[int, int]]:
    """All (sender's rank, receiver's rank) that have something for each other, of a request's hand-over.

    Raises:
        Misfit: the model's heads can't be divided so.
    """
    if sender.ranks == receivers:
        return [(rank, rank) for rank in range(receivers)]
    heads = max((page.heads for page in _pages(sender)), default=0)
    try:
        return pairs(heads, sender.ranks, receivers)
    except ValueError as error:
        raise Misfit(str(error)) from None


def at(sender: Geometry, rank: int, ranks: int) -> Geometry:
    """The geometry that a receiver must have, of another rank of another number of ranks."""
    size = sum(page.nbytes(ranks) for page in _pages(sender)) if ranks != sender.ranks else sender.row_bytes
    return msgspec.structs.replace(sender, rank=rank, ranks=ranks, row_bytes=size)


def _pages(geometry: Geometry) -> list[Page]:
    return [Page(*each) for layers, *each in geometry.pages for _ in range(layers)]


def _check(side: Geometry) -> None:
    """Numbers come from outside."""
    sane = 0 <= side.rank < side.ranks <= MOST_RANKS and side.chunk_tokens > 0 < side.rows and side.row_bytes > 0
    sane = sane and all(min(page) >= 0 for page in side.pages) and sum(page[0] for page in side.pages) <= _MOST_LAYERS
    if not sane:
        raise Misfit(f"{side} makes no sense")
    if side.pages and sum(page.nbytes(side.ranks) for page in _pages(side)) != side.row_bytes:
        raise Misfit(f"the pages of {side} are not its row")
