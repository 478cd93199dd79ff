"""Real vLLM engines with our connector, and ways to look into them."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "launch" / "demo_model"
BLOCK, CHUNK = 32, 64
# What a GPU wants is set from outside: ENGINE_DTYPE=bfloat16 ENGINE_GRAPHS=1.
DTYPE, EAGER = os.environ.get("ENGINE_DTYPE", "float32"), "ENGINE_GRAPHS" not in os.environ

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to look into workers: `spy` and `differing_pages` run there
    VLLM_LOGGING_LEVEL="WARNING",
)


def transfer_config(**extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "LMCacheConnectorV1",
        "kv_role": "kv_both",
        "kv_connector_module_path": "lmcache_ext.integration.vllm",
        "kv_connector_extra_config": {"lmcache.chunk_size": CHUNK, "lmcache.max_local_cpu_size": 0.25, **extra},
    }


@contextlib.contextmanager
def llm(connector: dict[str, Any] | None, threads: str = "0-1", **options: Any) -> Iterator[Any]:
    """An engine; `connector`: a KVTransferConfig's fields."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = threads
    made = LLM(
        **{
            "model": str(MODEL), "dtype": DTYPE, "block_size": BLOCK, "max_model_len": 2048, "seed": 0,
            "enforce_eager": EAGER, "disable_log_stats": False, "max_num_batched_tokens": 2048, **options,
        },
        kv_transfer_config=KVTransferConfig(**connector) if connector else None,
    )  # fmt: skip
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()


def ask(engine: Any, prompts: list[list[int]], max_tokens: int = 3, **options: Any) -> list[Any]:
    """Answers, greedy unless told, as vLLM's RequestOutputs, in the order of the prompts."""
    from vllm import SamplingParams

    params = SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **options})
    return list(engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False))


def counter(name: str) -> float:
    """A counter's or gauge's value in this process' Prometheus registry; `name` with its prefix, without `_total`."""
    from prometheus_client import REGISTRY

    found = [family for family in REGISTRY.collect() if family.name == name]
    assert found, f"no metric {name}"
    return sum(s.value for family in found for s in family.samples if s.name in (name, f"{name}_total"))


def forget_gpu(engine: Any, **options: Any) -> None:
    """Empty vLLM's own prefix cache. It refuses while blocks are in use, and a store that just began uses some."""
    deadline = time.monotonic() + 10
    while not engine.reset_prefix_cache(**options):
        assert time.monotonic() < deadline, "blocks are still in use"
        time.sleep(0.05)


def pools() -> list[mmap.mmap]:
    """The host pools of the workers below this process, writable."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError, psutil.Error):
            for fd in Path(f"/proc/{child.pid}/fd").iterdir():
                if "memfd:lmcache_ext-" in str(fd.readlink()):
                    found[fd.stat().st_ino] = fd
    maps = []
    for path in found.values():
        with path.open("r+b") as file:
            maps.append(mmap.mmap(file.fileno(), 0))
    return maps


def flip_all() -> None:
    """Turn over the sign and the mantissa of every value in every pool, as bf16 or fp32: wrong, and still finite."""
    import numpy as np

    for pool in pools():
        view = np.frombuffer(pool, dtype=np.uint16)
        view ^= 0x807F


def spy(worker: Any) -> int:
    """Runs in a worker: keep all plans from now on, by id."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    transfer = get_kv_transfer_group()._impl._worker._transfer
    transfer.seen = {}
    submit = type(transfer).submit

    def keep(plans: Any, after: Any) -> None:
        plans = list(plans)
        transfer.seen.update({plan.id: plan for plan in plans})
        submit(transfer, plans, after)

    transfer.submit = keep
    return os.getpid()


def differing_pages(worker: Any) -> dict[str, tuple[int, int]]:
    """Runs in a worker: {way: (pages compared, pages that differ)} between KV memory and pool, for plans since last
    asked. Sound while nothing has reused the blocks."""
    import numpy as np
    import torch
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    side = get_kv_transfer_group()._impl._worker
    transfer, counts = side._transfer, {"store": (0, 0), "load": (0, 0)}
    pages, pool = transfer._pages, side._pool
    for plan in transfer.seen.values():
        for block, row in zip(plan.blocks, plan.rows, strict=True):
            host = pool.row(int(row))
            for layer, tensor in enumerate(pages.keep):
                start = int(pages.offset[layer])
                page = tensor[int(block)]
                in_memory = page.permute(sorted(range(page.dim()), key=lambda d: -page.stride(d)))
                page = in_memory.contiguous().view(torch.uint8).cpu().numpy().ravel()
                same = np.array_equal(page, host[start : start + int(pages.size[layer])])
                compared, differ = counts[plan.way.value]
                counts[plan.way.value] = (compared + 1, differ + (not same))
    transfer.seen.clear()
    return counts
