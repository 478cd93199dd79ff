"""Our events as vLLM's, so that they travel in the engine's one stream."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.request import Request

from lmcache_ext.events import Announcement, Event, EventLog, Noted, Tier

Note = Callable[[Request, int, int], object]
"""note(request, start, end): what the directory keeps beside the chunk of these tokens."""

_STORED_FIELDS = frozenset(BlockStored.__struct_fields__)


def announcement(request: Request, first: int, last: int, block_size: int) -> Announcement | None:
    """What to say of blocks [first, last) of `request`; None if there are none, or vLLM has no hashes for them."""
    hashes = request.block_hashes
    if len(hashes) < last or first == last:
        return None
    lora = request.lora_request
    return Announcement(
        block_hashes=tuple(bytes(h) for h in hashes[first:last]),
        parent_hash=bytes(hashes[first - 1]) if first else None,
        token_ids=array("i", request.all_token_ids[first * block_size : last * block_size]),
        block_size=block_size,
        lora_id=lora.lora_int_id if lora else None,
        lora_name=lora.lora_name if lora else None,
        salt=request.cache_salt,
    )


def announced(block_size: int) -> Note:
    """Chunks are announced to routers."""
    return lambda request, start, end: announcement(request, start // block_size, end // block_size, block_size)


def unnoted(request: Request, start: int, end: int) -> object:
    """Nobody wants to know."""
    return None


class Source(Protocol):
    """What knows of which chunks routers were told."""

    def chunks(self) -> Sequence[Noted]:
        """All of them."""


class Stream:
    """What to say of chunks in host memory and on disks, and all of it once more after vLLM has said that its cache is
    empty."""

    def __init__(self) -> None:
        self.memory, self.disk = EventLog(Tier.CPU), EventLog(Tier.DISK)
        self._pool: Any = None  # vLLM's BlockPool
        self._table: Any = None  # its hash table: another one after a reset

    def bind(self, pool: Any) -> None:
        """Called once, before the first request."""
        self._pool, self._table = pool, getattr(pool, "cached_block_hash_to_block", None)

    def take(self, memory: Source, disk: Source | None) -> list[Any]:
        """vLLM's events since the last call."""
        table = getattr(self._pool, "cached_block_hash_to_block", None)
        if table is not self._table:
            self._table = table
            for log, source in ((self.memory, memory), (self.disk, disk)):
                log.take()
                log.announce(source.chunks() if source else ())
        return [announce(event) for event in [*self.memory.take(), *self.disk.take()]]


def announce(event: Event) -> Any:
    """A vLLM BlockStored or BlockRemoved."""
    what = event.what
    hashes = [maybe_convert_block_hash(h) for h in what.block_hashes]
    if not event.stored:
        return BlockRemoved(block_hashes=hashes, medium=event.tier.value)
    fields: dict[str, Any] = {
        "block_hashes": hashes,
        "parent_block_hash": maybe_convert_block_hash(what.parent_hash) if what.parent_hash else None,
        "token_ids": list(what.token_ids),
        "block_size": what.block_size,
        "lora_id": what.lora_id,
        "medium": event.tier.value,
        "lora_name": what.lora_name,
        "extra_keys": _extra_keys(what),
    }
    return BlockStored(**{name: value for name, value in fields.items() if name in _STORED_FIELDS})


def _extra_keys(what: Announcement) -> list[tuple[Any, ...] | None] | None:
    """One entry a block, as vLLM has them: the LoRA name in each, the salt in a prompt's first block."""
    head = tuple(x for x in (what.lora_name,) if x)
    keys: list[tuple[Any, ...] | None] = [head or None for _ in what.block_hashes]
    if what.salt and what.parent_hash is None:
        keys[0] = (*head, what.salt)
    return keys if any(keys) else None
