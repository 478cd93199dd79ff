"""What the scheduler side remembers of one request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3
from vllm.v1.request import Request

from lmcache_ext.keys import Chain
from lmcache_ext.tracing import NO_TRACE, Trace

TAG_PREFIX = "lmcache.tag."
SKIP_SAVE = "lmcache.skip_save"
REPORT_HITS = "lmcache.report_hits"  # asked with True, answered with a dictionary
MAX_STORE_FAILURES = 3


@dataclass
class Match:
    """What the last look-up found, valid while the directory's version and the request's length stay the same."""

    version: int
    num_tokens: int
    local: int  # tokens that vLLM had itself
    end: int  # tokens that can be had in all, a multiple of the block size
    keys: list[bytes]  # of the chunks that cover [local, end)
    ready: int  # of these tokens, how many are in memory; behind them a tier still brings the rest


@dataclass
class Tracker:
    """One live request. `blocks` mirrors the worker's block table: index i holds tokens [i*bs, (i+1)*bs)."""

    request: Request
    chain: Chain
    may_load: bool
    may_store: bool
    blocks: list[int] = field(default_factory=list)
    match: Match | None = None
    wants_async: bool = False  # what the last promise said
    planned: int = 0  # chunks [0, planned) need no store any more
    tail_planned: bool = False  # nor does the prompt's partial chunk
    tail: tuple[bytes, int] | None = None  # key and end of the partial chunk that a fuller one will replace
    store_failures: int = 0
    done: bool = False  # nothing is left to store before the request ends
    fetched: bool = False  # tiers were asked for it, and are not asked again
    counted: bool = False  # its look-up is in the metrics
    local: int = 0  # tokens that vLLM had itself at the last look-up
    trace: Trace = NO_TRACE
    hits: tuple[int, int] | None = None  # tokens of the first prefill that vLLM had itself, and that we loaded

    @property
    def id(self) -> str:
        """vLLM's internal request id."""
        return str(self.request.request_id)

    def prompt_end(self, step: int) -> int:
        """Where what is stored of its prompt ends, in whole `step` tokens."""
        return int(self.request.num_prompt_tokens) // step * step

    def hit_report(self) -> dict[str, Any] | None:
        """What the answer says of hits, if the request asked for it."""
        params = self.request.kv_transfer_params or {}
        if params.get(REPORT_HITS) is not True or self.hits is None:
            return None
        return {REPORT_HITS: dict(zip(("gpu_cache", "host_memory"), self.hits, strict=True))}

    def loaded_only(self, tokens: int) -> None:
        """Its load failed beyond so many tokens."""
        if self.hits is not None:
            self.hits = (self.hits[0], min(self.hits[1], tokens))

    def store_failed(self) -> None:
        """Try its chunks again on a later step, a few times."""
        self.store_failures += 1
        if self.store_failures >= MAX_STORE_FAILURES:
            self.may_store = False
        self.store_again()

    def store_again(self) -> None:
        """Go over all of its chunks once more: those that are there are passed by."""
        self.planned, self.tail_planned, self.done = 0, False, not self.may_store

    def retire(self) -> None:
        """No part in caching from now on."""
        self.may_load = self.may_store = False
        self.done = True


def track(request: Request, root: bytes, chunk_size: int) -> Tracker:
    """A tracker for a request that was just added; decides whether it takes part in caching at all."""
    params = request.kv_transfer_params or {}
    plain = (
        request.prompt_token_ids is not None
        and getattr(request, "prompt_embeds", None) is None
        and not getattr(request, "resumable", False)
    )
    reads = plain and not request.skip_reading_prefix_cache and not params.get("do_remote_prefill")
    chain = Chain(_request_root(request, params, root), chunk_size, lambda start, end: _media(request, start, end))
    return Tracker(request, chain, may_load=reads, may_store=plain and not params.get(SKIP_SAVE))


def _request_root(request: Request, params: dict[str, Any], root: bytes) -> bytes:
    """The chain's root: the engine's, or one of its own for a salt, a LoRA adapter or tags."""
    facts: dict[str, Any] = {}
    if request.cache_salt:
        facts["salt"] = request.cache_salt
    if request.lora_request is not None:
        facts["lora"] = _adapter(request.lora_request)
    tags = {key: str(value) for key, value in params.items() if key.startswith(TAG_PREFIX)}
    if tags:
        facts["tags"] = tags
    return blake3(root + json.dumps(facts, sort_keys=True).encode()).digest() if facts else root


def _adapter(lora: Any) -> list[str]:
    """Name, path and the age of its files: an adapter replaced in place is another adapter."""
    stamps = []
    folder = Path(lora.lora_path)
    for path in sorted(folder.glob("adapter_*")) if folder.is_dir() else []:
        stat = path.stat()
        stamps.append(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}")
    return [str(lora.lora_name), str(lora.lora_path), *stamps]


def _media(request: Request, start: int, end: int) -> bytes:
    """Which images or sounds lie in [start, end), and where: their placeholder tokens are all alike."""
    if not request.mm_features:
        return b""
    parts = []
    for feature in request.mm_features:
        offset, length = feature.mm_position.offset, feature.mm_position.length
        if offset < end and offset + length > start:
            parts.append([str(feature.modality), str(feature.identifier), offset - start, length])
    return json.dumps(parts).encode() if parts else b""


def follow_blocks(output: Any, trackers: Mapping[str, Tracker]) -> dict[str, int]:
    """Keep block tables up to date; {request that may still store: tokens computed once this step has run}."""
    computed: dict[str, int] = {}
    scheduled = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        if (tracker := trackers.get(new.req_id)) is not None:
            tracker.blocks = list(new.block_ids[0])
            computed[new.req_id] = new.num_computed_tokens + scheduled[new.req_id]
    cached = output.scheduled_cached_reqs
    resumed = cached.resumed_req_ids
    for req_id, blocks, done in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
        tracker = trackers.get(req_id)
        if tracker is None:
            continue
        if req_id in resumed:
            tracker.blocks = list(blocks[0]) if blocks else []
        elif blocks:
            tracker.blocks.extend(blocks[0])
        if not tracker.done:
            computed[req_id] = done + scheduled[req_id]
    return computed
