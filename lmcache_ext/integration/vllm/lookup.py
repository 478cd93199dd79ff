"""How far a request's chain of chunks is ready."""

from __future__ import annotations

import time

from lmcache_ext.config import EngineConfig
from lmcache_ext.engine import Directory
from lmcache_ext.integration.vllm.requests import Match, Tracker
from lmcache_ext.metrics import Recorder


class Finder:
    """Looks requests up in the directory, and counts what it found.

    Args:
        skip_last: tokens at a prompt's end that are never looked up.
    """

    def __init__(
        self, directory: Directory, recorder: Recorder, config: EngineConfig, block_size: int, skip_last: int
    ) -> None:
        self._directory = directory
        self._recorder = recorder
        self._config = config
        self._bs = block_size
        self._chunk = config.chunk_size
        self._skip_last = skip_last

    def find(self, tracker: Tracker, local: int) -> Match:
        """What is ready of a request of which vLLM has `local` tokens itself. Remembered until something changes."""
        request, known = tracker.request, tracker.match
        now = (self._directory.version, request.num_tokens, local)
        if known is not None and (known.version, known.num_tokens, known.local) == now:
            return known
        began = time.perf_counter()
        end, keys = self._prefix(tracker, local)
        if self._config.max_tokens_per_load:
            end = min(end, local + self._config.max_tokens_per_load // self._bs * self._bs)
        last = -(-end // self._chunk) - local // self._chunk
        match = tracker.match = Match(*now, end=end, keys=keys[:last])
        self._recorder.sample("time_to_lookup", time.perf_counter() - began)
        self._count(tracker, match)
        return match

    def _prefix(self, tracker: Tracker, local: int) -> tuple[int, list[bytes]]:
        """(tokens that can be had, keys of the chunks from the one that holds token `local`)."""
        request, size = tracker.request, self._chunk
        total = request.num_tokens
        limit = min(total - 1, total - self._skip_last) // self._bs * self._bs  # one token is left to compute
        tokens = request.all_token_ids
        keys = tracker.chain.extend(tokens, total)
        first = local // size
        keys = keys[first:]
        ready = self._directory.match(keys)
        keys = keys[:ready]
        end = (first + ready) * size
        if end < limit and self._config.stores_partial:
            longest = min(total, end + size - 1) // self._bs * self._bs
            for stop in range(longest, end, -self._bs):
                key = tracker.chain.partial(tokens, stop)
                if self._directory.ready(key) is not None:
                    keys.append(key)
                    tracker.tail = (key, stop)
                    end = stop
                    break
        return max(min(end, limit), local), keys

    def _count(self, tracker: Tracker, match: Match) -> None:
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
