"""Layouts: those that vLLM has are read, everything else is refused with the layout in the message."""

from __future__ import annotations

import pytest
import torch

from lmcache_ext.errors import LayoutError
from lmcache_ext.transfer import PageTable

B, H, N, C = 10, 2, 16, 8


def test_layers_of_one_allocation() -> None:
    store = torch.zeros(4, B, H, N, C, dtype=torch.bfloat16)
    pages = PageTable.of({f"l{i}": store[i] for i in range(4)}, B)
    assert pages.size.tolist() == [H * N * C * 2] * 4 == pages.stride.tolist()
    assert (pages.base - pages.base[0]).tolist() == [i * B * H * N * C * 2 for i in range(4)]
    assert pages.row_bytes == 4 * H * N * C * 2
    assert pages.offset.tolist() == [i * H * N * C * 2 for i in range(4)]


def test_heads_first_views_of_tokens_first_memory() -> None:
    memory = torch.zeros(B, N, H, C)
    assert PageTable.of({"l": memory.permute(0, 2, 1, 3)}, B).size.tolist() == [N * H * C * 4]


def test_block_outermost_memory() -> None:
    memory = torch.zeros(B, 3, H, N, C)
    pages = PageTable.of({f"l{i}": memory[:, i] for i in range(3)}, B)
    assert pages.stride.tolist() == [3 * H * N * C * 4] * 3
    assert pages.size.tolist() == [H * N * C * 4] * 3


def test_mla_without_heads() -> None:
    assert PageTable.of({"l": torch.zeros(B, N, 576)}, B).size.tolist() == [N * 576 * 4]


def test_several_kernel_blocks_to_a_block() -> None:
    pages = PageTable.of({"l": torch.zeros(B * 4, H, N, C)}, B)
    assert pages.size.tolist() == pages.stride.tolist() == [4 * H * N * C * 4]


def test_shared_layers_count_once() -> None:
    memory = torch.zeros(B, H, N, C)
    assert len(PageTable.of({"a": memory, "b": memory}, B).size) == 1


def test_pages_of_different_sizes() -> None:
    pages = PageTable.of({"a": torch.zeros(B, H, N, C), "b": torch.zeros(B, H, N, 2 * C)}, B)
    assert pages.offset.tolist() == [0, H * N * C * 4]


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(2, B, N, H, C), "does not count blocks"),  # keys and values first, as long ago
        (torch.zeros(H, B, N, C).permute(1, 0, 2, 3), "not one dense run"),  # heads outermost
        (torch.zeros(B), "does not count blocks"),
        (torch.zeros(B, 4, H, N, C)[:, :2].reshape(B, 2, H, N, C)[:, ::2].expand(B, 2, H, N, C), "not one dense run"),
        (torch.zeros(B * 2, 3, H, N, C)[:, 0], "not adjacent"),  # two kernel blocks, another layer between them
    ],
)
def test_unknown_layouts_are_refused(tensor: torch.Tensor, why: str) -> None:
    with pytest.raises(LayoutError, match=why) as refused:
        PageTable.of({"layer7": tensor}, B)
    assert "layer7" in str(refused.value) and str(tuple(tensor.shape)) in str(refused.value)


def test_no_tensors_are_refused() -> None:
    with pytest.raises(LayoutError, match="no KV cache tensors"):
        PageTable.of({}, B)


def test_layout_identity_follows_order_and_type() -> None:
    heads_first = PageTable.of({"l": torch.zeros(B, H, N, C)}, B).layout
    tokens_first = PageTable.of({"l": torch.zeros(B, N, H, C).permute(0, 2, 1, 3)}, B).layout
    other_type = PageTable.of({"l": torch.zeros(B, H, N, C, dtype=torch.int32)}, B).layout
    assert len({heads_first, tokens_first, other_type}) == 3
