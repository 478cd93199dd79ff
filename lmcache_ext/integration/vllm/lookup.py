"""How far a request's chain of chunks is ready."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence

from lmcache_ext.config import EngineConfig
from lmcache_ext.engine import Directory, Want
from lmcache_ext.integration.vllm.events import Note
from lmcache_ext.integration.vllm.requests import Match, Tracker
from lmcache_ext.metrics import Recorder
from lmcache_ext.tracing import NO_SPAN

_NEVER = -1  # a version that no directory has


class Finder:
    """Looks requests up in the directory, and counts what it found.

    Args:
        skip_last: tokens at a prompt's end that are never looked up.
        note: what the directory keeps beside a chunk.
    """

    def __init__(
        self, directory: Directory, recorder: Recorder, config: EngineConfig, block_size: int, skip_last: int,
        note: Note,
    ) -> None:  # fmt: skip
        self._directory = directory
        self._recorder = recorder
        self._config = config
        self._bs, self._step = block_size, config.tail_step(block_size)
        self._chunk = config.chunk_size
        self._skip_last = skip_last
        self._note = note

    def find(self, tracker: Tracker, local: int) -> Match:
        """What is ready of a request of which vLLM has `local` tokens itself. Remembered until something changes."""
        request, known = tracker.request, tracker.match
        now = (self._directory.version, request.num_tokens, local)
        if known is not None and (known.version, known.num_tokens, known.local) == now:
            return known
        began = time.perf_counter()
        span = NO_SPAN if tracker.counted else tracker.trace.begin("lmcache.lookup", tokens=request.num_tokens)
        end, keys = self._prefix(tracker, local)
        end = min(end, self._most(local))
        last = -(-end // self._chunk) - local // self._chunk
        match = tracker.match = Match(*now, end=end, keys=keys[:last], ready=end)
        self._recorder.sample("time_to_lookup", time.perf_counter() - began)
        span.end(gpu=local, found=match.end)
        return match

    def _most(self, local: int) -> int:
        """Where a load behind `local` tokens ends at the latest."""
        most = self._config.max_tokens_per_load
        return local + most // self._bs * self._bs if most else sys.maxsize

    def with_coming(self, tracker: Tracker, match: Match, coming: Sequence[Want]) -> Match:
        """What was found, and what follows it in `coming`, which a tier still brings. Holds for this moment only."""
        behind = list(itertools.dropwhile(lambda want: self._directory.ready(want.key) is not None, coming))
        if not behind or not self._follows(tracker, match.ready, behind[0]):
            return match  # something between the two has left memory since the tier was asked
        end = match.ready + sum(want.tokens for want in behind)
        end = min(end, self._limit(match.num_tokens), self._most(match.local))
        if end <= match.ready:
            return match
        count = -(-(end - match.ready) // self._chunk)
        keys = [*match.keys, *(want.key for want in behind[:count])]
        tracker.match = Match(_NEVER, match.num_tokens, match.local, end, keys, match.ready)
        return tracker.match

    def _follows(self, tracker: Tracker, start: int, want: Want) -> bool:
        """Whether `want` is the chunk of the request's tokens from `start` on."""
        tokens = tracker.request.all_token_ids
        if start % self._chunk or start + want.tokens > len(tokens):
            return False
        if want.tokens < self._chunk:
            return tracker.chain.partial(tokens, start + want.tokens) == want.key
        return tracker.chain.extend(tokens, start + want.tokens)[start // self._chunk] == want.key

    def beyond(self, tracker: Tracker, match: Match) -> list[Want]:
        """The chunks that would follow what was found, the prompt's tail included."""
        request, size = tracker.request, self._chunk
        limit, tokens = self._limit(request.num_tokens), request.all_token_ids
        if match.end >= limit:
            return []
        keys = tracker.chain.extend(tokens, request.num_tokens)
        spans = [(i * size, (i + 1) * size, keys[i]) for i in range(match.end // size, len(keys)) if i * size < limit]
        full = len(keys) * size
        if full < limit and self._config.stores_partial:
            stop = request.num_tokens // self._step * self._step
            spans.append((full, stop, tracker.chain.partial(tokens, stop)))
        return [Want(key, end - start, self._note(request, start, end)) for start, end, key in spans]

    def _limit(self, total: int) -> int:
        """Tokens of so many that may be found: one at least is left to compute."""
        return min(total - 1, total - self._skip_last) // self._step * self._step

    def _prefix(self, tracker: Tracker, local: int) -> tuple[int, list[bytes]]:
        """(tokens that can be had, keys of the chunks from the one that holds token `local`)."""
        request, size = tracker.request, self._chunk
        total = request.num_tokens
        limit = self._limit(total)
        tokens = request.all_token_ids
        keys = tracker.chain.extend(tokens, total)
        first = local // size
        keys = keys[first:]
        ready = self._directory.match(keys)
        keys = keys[:ready]
        end = (first + ready) * size
        if end < limit and self._config.stores_partial:
            for stop, key in tracker.chain.tails(tokens, min(total, end + size - 1), self._step):
                if self._directory.ready(key) is not None:
                    keys.append(key)
                    tracker.tail = (key, stop)
                    end = stop
                    break
        return max(min(end, limit), local), keys

    def count(self, tracker: Tracker, match: Match) -> None:
        """This is what came of the request's look-up, whatever brought it."""
        if tracker.counted:
            return
        tracker.counted = True
        self._recorder.count("num_lookup_requests")
        self._recorder.count("num_lookup_tokens", match.num_tokens)
        self._recorder.count("num_prompt_tokens", tracker.request.num_prompt_tokens)
        self._recorder.count("num_lookup_hits", match.end)
        self._recorder.count("num_vllm_hit_tokens", match.local)
        if not match.end:
            self._recorder.count("lookup_0_hit_requests")
