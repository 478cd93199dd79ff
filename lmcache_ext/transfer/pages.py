"""Where the engine's KV pages lie: for each layer a base address, the distance of two blocks, the size of a page.

A page is one block of one layer, and one dense run of bytes. Copies treat it as opaque: CPU attention packs a head's
keys and values in an order of its own. What else we know, which bytes are which head's, is for hand-overs alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lmcache_ext.errors import LayoutError
from lmcache_ext.transfer.base import Blocks


class Cut(NamedTuple):
    """How the pages of adjacent layers are divided: each is `outer` runs of `heads` pieces of `head_bytes`."""

    layers: int
    outer: int
    heads: int  # on this rank; 0: unknown, or there are none
    head_bytes: int
    kind: str  # what else must be equal for pieces to be interchangeable


@dataclass(frozen=True)
class PageTable:
    """KV memory of one worker. `keep` holds the tensors, so that the addresses stay valid."""

    device: str  # "cpu" or "cuda"
    num_blocks: int
    base: Blocks  # [layers] address of block 0
    stride: Blocks  # [layers] bytes from one block to the next
    size: Blocks  # [layers] bytes of a page
    layout: str  # what must be equal for pages to be interchangeable
    keep: tuple[torch.Tensor, ...]
    cuts: tuple[Cut, ...] = ()  # what is known of which bytes are which head's

    @property
    def row_bytes(self) -> int:
        """Bytes of one block of all layers: a row of the pool."""
        return int(self.size.sum())

    @property
    def offset(self) -> Blocks:
        """[layers] where a layer's page begins within a row."""
        return np.concatenate(([0], np.cumsum(self.size)[:-1])).astype(np.int64)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], num_blocks: int) -> PageTable:
        """Read the layout off the tensors that the engine registered, in the order of their layers.

        Args:
            tensors: layer name → KV tensor, [num_blocks x r, ...] with r kernel blocks to each of the engine's blocks.
                Layers that share another's memory count once.
            num_blocks: the engine's number of blocks.

        Raises:
            LayoutError: a page is not one dense run of bytes, or the layers lie on different devices.
        """
        unique: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            unique.setdefault(tensor.data_ptr(), (name, tensor))
        if not unique:
            raise LayoutError("the engine registered no KV cache tensors")
        kept = tuple(tensor for _, tensor in unique.values())
        devices = {t.device.type for t in kept}
        if len(devices) > 1:
            raise LayoutError(f"KV cache tensors lie on several devices: {sorted(devices)}")
        pages = [_page(name, tensor, num_blocks) for name, tensor in unique.values()]
        return cls(
            device=devices.pop(),
            num_blocks=num_blocks,
            base=np.array([t.data_ptr() for t in kept], dtype=np.int64),
            stride=np.array([stride for stride, _ in pages], dtype=np.int64),
            size=np.array([size for _, size in pages], dtype=np.int64),
            layout=_layout_id(kept, pages),
            keep=kept,
            cuts=_cuts(kept, num_blocks),
        )


def _page(name: str, tensor: torch.Tensor, num_blocks: int) -> tuple[int, int]:
    """(bytes from block to block, bytes of a page) of one layer."""
    shape, strides, item = tuple(tensor.shape), tensor.stride(), tensor.element_size()
    where = f"layer {name}: shape {shape}, strides {strides}, dtype {tensor.dtype}, {num_blocks} blocks"
    if len(shape) < 2 or num_blocks < 1 or shape[0] % num_blocks:
        raise LayoutError(f"unknown KV layout, the first dimension does not count blocks ({where})")
    ratio = shape[0] // num_blocks
    inner = math.prod(shape[1:])
    reach = 1 + sum((n - 1) * s for n, s in zip(shape[1:], strides[1:], strict=True))
    if reach != inner or any(s <= 0 for s in strides):
        raise LayoutError(f"unknown KV layout, a block of a layer is not one dense run of bytes ({where})")
    if ratio > 1 and strides[0] != inner:
        raise LayoutError(f"unknown KV layout, kernel blocks of one block are not adjacent ({where})")
    if strides[0] < inner:
        raise LayoutError(f"unknown KV layout, blocks overlap ({where})")
    return strides[0] * ratio * item, inner * ratio * item


def _layout_id(tensors: tuple[torch.Tensor, ...], pages: list[tuple[int, int]]) -> str:
    """Inner shape and order of strides, dtype and page size of every layer, run-length encoded."""
    each = []
    for tensor, (_, size) in zip(tensors, pages, strict=True):
        order = sorted(range(1, tensor.dim()), key=lambda d: (-tensor.stride(d), d))
        each.append(f"{tuple(tensor.shape[1:])}/{order}/{tensor.dtype}/{size}")
    return ";".join(f"{len(list(run))}x{one}" for one, run in itertools.groupby(each))


def _cuts(tensors: tuple[torch.Tensor, ...], num_blocks: int) -> tuple[Cut, ...]:
    """Of the layers, in their order: vLLM's attention has [blocks, heads, block, keys and values], in any order."""
    each = itertools.groupby(_cut(tensor, tensor.shape[0] // num_blocks) for tensor in tensors)
    return tuple(cut._replace(layers=len(list(run))) for cut, run in each)


def _cut(tensor: torch.Tensor, ratio: int) -> Cut:
    order = sorted(range(1, tensor.dim()), key=lambda d: (-tensor.stride(d), d))
    sizes = [tensor.shape[d] for d in order]
    if tensor.dim() != 4:
        size = ratio * math.prod(sizes) * tensor.element_size()
        return Cut(1, 1, 0, size, f"{ratio}x{sizes}/{order}/{tensor.dtype}")
    at = order.index(1)
    kind = f"{ratio}x{[*sizes[:at], 'heads', *sizes[at + 1 :]]}/{order}/{tensor.dtype}"
    piece = math.prod(sizes[at + 1 :]) * tensor.element_size()
    return Cut(1, ratio * math.prod(sizes[:at]), sizes[at], piece, kind)
