"""Blocks that a failed load left with wrong bytes.

vLLM computes such a request again, in the same blocks, and meanwhile leaves them in its prefix cache: those that were
to be loaded, and those that the failing step computed from them. If the request is aborted or preempted before it has
computed them again, whoever finds them, or shares them already, would read wrong KV. So they leave the prefix cache at
once; and if the request goes too early, those that somebody shares are reported as invalid once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class _Bad:
    """What a request has yet to compute again."""

    first: int  # index of its first bad block
    blocks: list[int]  # from there on
    computed: int = 0  # tokens that are right once the step under way has run


class Spoilt:
    """All of one engine. Scheduler's thread."""

    def __init__(self, block_size: int) -> None:
        self._bs = block_size
        self._pool: Any = None  # vLLM's BlockPool
        self._open: dict[str, _Bad] = {}  # by request

    def bind(self, pool: Any) -> None:
        """Called once, before the first request."""
        self._pool = pool

    def failed(self, request_id: str | None, table: Sequence[int], bad: int) -> None:
        """A load into a request's block table failed from block `bad` on: nobody finds these any more.

        Args:
            request_id: who computes them again; None: the request is gone.
        """
        if self._pool is None or bad not in table:
            return
        first = list(table).index(bad)
        blocks = [block for block in table[first:] if block]  # 0 is the null block
        self._pool.evict_blocks(set(blocks))
        if request_id is not None:
            self._open[request_id] = _Bad(first, blocks)

    def follow(self, output: Any) -> None:
        """A step begins, which `output`, a SchedulerOutput, describes."""
        if not self._open:
            return
        cached = output.scheduled_cached_reqs
        done = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        done |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for request_id, bad in list(self._open.items()):
            if request_id in done:
                bad.computed = done[request_id] + output.num_scheduled_tokens[request_id]
                if not self._left(bad, bad.computed):
                    del self._open[request_id]

    def preempted(self, request_id: str) -> list[int]:
        """The request has lost its blocks. Returns those that are still wrong and that others share."""
        bad = self._open.get(request_id)
        return self._gone(request_id, bad.computed if bad else 0, holders=0)

    def finished(self, request_id: str, computed: int) -> list[int]:
        """As `preempted`. The request has so many tokens computed, and still holds its blocks."""
        return self._gone(request_id, computed, holders=1)

    def _gone(self, request_id: str, computed: int, holders: int) -> list[int]:
        bad = self._open.pop(request_id, None)
        wrong = self._left(bad, computed) if bad else []
        return [block for block in wrong if self._pool.blocks[block].ref_cnt > holders]

    def _left(self, bad: _Bad, computed: int) -> list[int]:
        return bad.blocks[max(0, computed // self._bs - bad.first) :]
