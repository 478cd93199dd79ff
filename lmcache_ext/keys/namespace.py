"""The root of every chain: what must be equal for two engines' bytes to be interchangeable."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from blake3 import blake3

SCHEMA = 1
"""Version of keys and of the slot layout. Raise it when either changes: old entries then never match."""


@dataclass(frozen=True)
class Namespace:
    """Everything that gives KV bytes their meaning, short of the tokens. Two engines share chunks only if all agree."""

    model: str
    revision: str
    weights: str  # digest of the model's configuration: quantization, rope scaling, sizes
    dtype: str
    kv_dtype: str
    layout: str  # order and strides of the KV tensors, as registered
    backend: str  # attention backend: it decides the order of bytes inside a page
    page_geometry: str  # bytes of one block of each layer, per rank
    block_size: int  # tokens
    chunk_size: int  # tokens
    parallel: str  # TP and PP shape, and how a chunk is split over ranks
    kv_format: str  # the engine's own KV format version
    epoch: int = 0  # of prefill and decode that hand over: raised by a cache reset, on both sides

    def root(self) -> bytes:
        """32 bytes that start every chain of this namespace."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True)
        return blake3(text.encode()).digest()


def fresh(root: bytes) -> bytes:
    """A root that no other engine has, and that nothing else leads to: 32 bytes."""
    return blake3(root + os.urandom(16)).digest()
