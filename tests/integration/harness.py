"""vLLM's real Scheduler and our real connector, around a model whose KV says what it stands for.

The KV of token p in layer l of head h is a digest of (tokens[:p+1], salt, LoRA, l, h). So before every forward each
page that vLLM believes to be computed can be checked, byte by byte, against what it must hold: a wrong page is found in
the step that would have read it, whatever brought it about. Sampling is a digest of the tokens, too.

Runs on vLLM 0.26.0 to 0.32.0; what it is put through stands in `scenarios.py`.
"""

from __future__ import annotations

import copy
import inspect
import os
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTHONHASHSEED", "0")  # vLLM up to 0.28 draws a random root for its block hashes without it

import numpy as np
import torch
from blake3 import blake3
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from lmcache_ext.integration.vllm import LMCacheConnectorV1

BLOCK = 32
LAYERS = 2
WIDTH = 8  # bytes of a token's KV in a layer and head
MODEL = Path(__file__).parent / "tiny_model"
EOS = 2


@dataclass
class Setup:
    """What a scenario wants."""

    blocks: int = 64
    chunk: int = 64
    slots: int = 64
    ranks: int = 1
    heads: int = 1  # of KV, on each rank
    caching: bool = True
    budget: int = 256  # tokens a step
    seqs: int = 8
    multi: bool = False  # inside MultiConnector, beside a connector that does nothing
    role: str = "kv_both"
    extra: dict[str, Any] = field(default_factory=dict)
    events: bool = False
    max_len: int = 1024
    mla: bool = False  # every rank holds the same bytes
    connector: str = "LMCacheConnectorV1"
    step_seconds: float = 0.0  # that a step takes at least


def _accepted(cls: Any, **values: Any) -> dict[str, Any]:
    names = set(inspect.signature(cls).parameters)
    return {name: value for name, value in values.items() if name in names}


def vllm_config(setup: Setup) -> VllmConfig:
    """As vLLM's own entry points build it."""
    extra = {"lmcache.chunk_size": setup.chunk, "lmcache.max_local_cpu_size": _pool_gb(setup), **setup.extra}
    ours = {
        "kv_connector": setup.connector,
        "kv_role": setup.role,
        "kv_connector_module_path": "lmcache_ext.integration.vllm",
        "kv_connector_extra_config": extra,
    }
    if setup.multi:
        idle = {"kv_connector": "IdleConnector", "kv_role": "kv_both"}
        idle["kv_connector_module_path"] = "tests.integration.idle_connector"
        ktc = KVTransferConfig(
            kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config={"connectors": [ours, idle]}
        )
    else:
        ktc = KVTransferConfig(**ours)
    extra_args: dict[str, Any] = {}
    if setup.events:
        from vllm.config import KVEventsConfig

        extra_args["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    args = EngineArgs(
        model=str(MODEL),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        block_size=BLOCK,
        max_model_len=setup.max_len,
        max_num_batched_tokens=setup.budget,
        max_num_seqs=setup.seqs,
        enable_prefix_caching=setup.caching,
        enforce_eager=True,
        tensor_parallel_size=setup.ranks,
        hf_overrides={"num_key_value_heads": setup.heads * (1 if setup.mla else setup.ranks)},
        kv_transfer_config=ktc,
        **extra_args,
    )
    config = args.create_engine_config()
    config.cache_config.num_gpu_blocks = setup.blocks
    return config


def _pool_gb(setup: Setup) -> float:
    return (setup.slots + 0.5) * (setup.chunk // BLOCK) * LAYERS * setup.heads * BLOCK * WIDTH / (1 << 30)


def kv_cache_config(setup: Setup) -> KVCacheConfig:
    """One group of full attention layers."""
    cls = MLAAttentionSpec if setup.mla else FullAttentionSpec
    spec = cls(
        **_accepted(
            cls, block_size=BLOCK, num_kv_heads=setup.heads, dtype=torch.int8,
            head_size=WIDTH if setup.mla else WIDTH // 2,
        )
    )  # fmt: skip
    names = [f"layer{i}" for i in range(LAYERS)]
    return KVCacheConfig(
        **_accepted(
            KVCacheConfig, num_blocks=setup.blocks, kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(names, spec)], kv_cache_layout="LBHNC",
        )
    )  # fmt: skip


class Rank:
    """One worker: KV memory, a connector, and the order in which vLLM calls it."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig, rank: int, setup: Setup) -> None:
        self.rank = rank
        config = copy.copy(config)
        config.parallel_config = copy.copy(config.parallel_config)
        config.parallel_config.rank = rank
        self.kv = torch.zeros(LAYERS, setup.blocks, setup.heads, BLOCK, WIDTH, dtype=torch.int8)
        self.connector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, kv)
        self.connector.register_kv_caches({f"layer{i}": self.kv[i] for i in range(LAYERS)})
        self.bytes = self.kv.numpy().view(np.uint8)

    def begin(self, output: Any) -> None:
        self.connector.handle_preemptions(output.kv_connector_metadata)
        for source, target in getattr(output, "kv_cache_block_copies", None) or ():
            self.bytes[:, target] = self.bytes[:, source]
        self.connector.bind_connector_metadata(output.kv_connector_metadata)
        self.after = not getattr(output, "has_sync_kv_loads", True)
        if not self.after:
            self.connector.start_load_kv(None)

    def end(self, output: Any) -> KVConnectorOutput:
        connector, result = self.connector, KVConnectorOutput()
        if self.after:
            connector.start_load_kv(None)
        connector.wait_for_save()
        if hasattr(connector, "get_transfer_results"):
            done = connector.get_transfer_results(output.finished_req_ids)
            result.finished_recving = set(done.finished_recving)
        else:
            _, received = connector.get_finished(output.finished_req_ids)
            result.finished_recving = set(received or ())
        result.invalid_block_ids = connector.get_block_ids_with_load_errors()
        result.kv_connector_worker_meta = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        return result


class Engine:
    """Scheduler, ranks, and the loop between them."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.config = vllm_config(setup)
        kv = kv_cache_config(setup)
        self.ranks = [Rank(self.config, kv, rank, setup) for rank in range(setup.ranks)]
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = Scheduler(
            **_accepted(
                Scheduler.__init__, vllm_config=self.config, kv_cache_config=kv, block_size=BLOCK,
                structured_output_manager=StructuredOutputManager(self.config), log_stats=True,
            )
        )  # fmt: skip
        self._aggregate = KVOutputAggregator(setup.ranks)
        self._tables: dict[str, list[int]] = {}
        self._truth: dict[tuple[str, int], tuple[Any, np.ndarray, list[int]]] = {}
        self._next = 0
        self.outputs: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.told: dict[str, Any] = {}  # kv_transfer_params of the answer
        self.events: list[Any] = []
        self.steps = 0
        self.preemptions = 0
        self.wrong: list[str] = []

    # -- what tests say ----------------------------------------------------------------------------------------------

    @property
    def connector(self) -> LMCacheConnectorV1:
        """Ours, scheduler side."""
        top = self.scheduler.connector
        return top if isinstance(top, LMCacheConnectorV1) else top._connectors[0]

    @property
    def side(self) -> Any:
        """Our scheduler half."""
        return self.connector._impl.scheduler

    def total(self, name: str) -> int:
        """A counter's or gauge's value so far."""
        self.side.measure()
        return int(self.side.recorder.totals.get(name, 0))

    def add(self, tokens: list[int], max_tokens: int = 1, **options: Any) -> str:
        """Queue a request; returns its id."""
        self._next += 1
        request_id = f"r{self._next}"
        transfer = options.pop("kv_transfer_params", None)
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True,
            extra_args={"kv_transfer_params": transfer} if transfer else None,
        )  # fmt: skip
        if hasattr(params, "update_from_generation_config"):
            params.update_from_generation_config({}, EOS)
        given = _accepted(
            Request, request_id=request_id, prompt_token_ids=list(tokens), sampling_params=params, pooling_params=None,
            eos_token_id=EOS, block_hasher=self._hasher, **options,
        )  # fmt: skip
        self.scheduler.add_request(Request(**given))
        self.outputs[request_id] = []
        return request_id

    def abort(self, request_id: str) -> None:
        """As a client that hangs up."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def run(self, *request_ids: str, seconds: float = 30.0) -> None:
        """Step until these requests (none: all) are over. Fails if that takes too long."""
        deadline = time.monotonic() + seconds
        while self._alive(request_ids):
            assert time.monotonic() < deadline, f"still alive after {seconds} s: {list(self.scheduler.requests)}"
            self.step()

    def drain(self, seconds: float = 30.0) -> None:
        """Step until nothing is left to do, as the engine's busy loop does."""
        deadline = time.monotonic() + seconds
        while self.scheduler.has_requests():
            assert time.monotonic() < deadline, "the engine never came to rest"
            self.step()

    def ask(self, tokens: list[int], max_tokens: int = 1, **options: Any) -> tuple[list[int], int]:
        """(output, cached tokens) of one request, run to its end and until all is quiet."""
        request_id = self.add(tokens, max_tokens, **options)
        self.run(request_id)
        self.drain()
        return self.outputs[request_id], self.cached[request_id]

    def forget_gpu(self) -> None:
        """vLLM's own prefix cache is emptied; ours stays."""
        self.drain()
        assert self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        """Every invariant holds, and nothing is held any more."""
        self.drain()
        assert not self.wrong, self.wrong
        assert self.side.directory.check() == []
        assert self.side.directory.leases == 0
        assert self.side.pins.count == 0
        assert not self.side.flights.loading
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.setup.blocks - 1
        for rank in self.ranks:
            rank.connector.shutdown()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _alive(self, request_ids: tuple[str, ...]) -> bool:
        live = self.scheduler.requests
        return any(r in live and not live[r].is_finished() for r in (request_ids or tuple(live)))

    def step(self) -> None:
        """One engine step."""
        output = self.scheduler.schedule()
        time.sleep(self.setup.step_seconds)
        self.carry_out(output)

    def carry_out(self, output: Any) -> None:
        """What the workers do in the step that was scheduled, and what the scheduler makes of it."""
        self.steps += 1
        self.preemptions += len(output.preempted_req_ids or ())
        self._follow(output)
        self._require_same_tables(output)
        for rank in self.ranks:
            rank.begin(output)
        # What was aborted meanwhile is not looked at: nobody reads what the workers compute of it.
        live = self.scheduler.requests
        computed = {request_id: span for request_id, span in self._computed(output).items() if request_id in live}
        bad: dict[str, str] = {}
        for rank in self.ranks:
            for request_id, (done, count) in computed.items():
                wrong = self._check(rank, request_id, done)
                bad[request_id] = bad.get(request_id, "") or wrong
                self._forward(rank, request_id, done, count, garbage=bool(wrong))
        results = [rank.end(output) for rank in self.ranks]
        invalid = set().union(*(result.invalid_block_ids for result in results))
        for request_id, wrong in bad.items():
            if wrong and not invalid & set(self._tables[request_id]):
                self.wrong.append(f"step {self.steps}: {request_id} read {wrong}")
        runner = self._aggregate.aggregate([self._runner_output(output, r, computed) for r in results], 0)
        if self.setup.ranks == 1 and not computed and not any(vars(results[0]).values()):
            runner.kv_connector_output = None  # as vLLM's own worker says it where there is nothing to say
        for outputs in self.scheduler.update_from_output(output, runner).values():
            for one in outputs.outputs:
                self.outputs[one.request_id] += one.new_token_ids
                self.told[one.request_id] = one.kv_transfer_params or self.told.get(one.request_id)
        if not computed:
            time.sleep(0.0005)

    def _follow(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
            self.cached.setdefault(new.req_id, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self._tables[request_id] = list(blocks[0]) if blocks else []
            elif blocks:
                self._tables[request_id] += blocks[0]

    def _require_same_tables(self, output: Any) -> None:
        """The connector stores from the blocks that it believes a request to have."""
        for request_id in output.num_scheduled_tokens:
            tracker = self.side._trackers.get(request_id)
            if tracker is not None and tracker.blocks != self._tables[request_id]:
                self.wrong.append(f"step {self.steps}: {request_id} is believed to have other blocks than it has")

    def _computed(self, output: Any) -> dict[str, tuple[int, int]]:
        """request → (tokens that have KV, tokens to compute now), in the order in which vLLM scheduled them: a request
        may share blocks that an earlier one computes in the same step, layer by layer."""
        scheduled = output.num_scheduled_tokens
        result = dict.fromkeys(scheduled, (0, 0))
        for new in output.scheduled_new_reqs:
            result[new.req_id] = (new.num_computed_tokens, scheduled[new.req_id])
        cached = output.scheduled_cached_reqs
        for request_id, done in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            result[request_id] = (done, scheduled[request_id])
        return result

    def _expected(self, rank: int, request_id: str, end: int) -> np.ndarray:
        """[LAYERS, end, heads x WIDTH] what KV must say."""
        first = 0 if self.setup.mla else rank * self.setup.heads
        heads = range(first, first + self.setup.heads)
        return np.concatenate([self._expected_of(head, request_id, end) for head in heads], axis=2)

    def _expected_of(self, head: int, request_id: str, end: int) -> np.ndarray:
        request = self.scheduler.requests[request_id]
        if (request_id, head) not in self._truth:
            name = request.lora_request.lora_name if request.lora_request else ""
            state = blake3(f"{request.cache_salt}|{name}|{head}".encode())
            self._truth[request_id, head] = (state, np.empty((LAYERS, 4096, WIDTH), dtype=np.uint8), [])
        state, rows, seen = self._truth[request_id, head]
        for p in range(len(seen), end):
            seen.append(request.all_token_ids[p])
            state.update(seen[p].to_bytes(4, "little"))
            digest = np.frombuffer(state.digest(LAYERS * WIDTH), dtype=np.uint8)
            rows[:, p] = digest.reshape(LAYERS, WIDTH)
        return rows[:, :end]

    def _read(self, rank: Rank, request_id: str, end: int) -> np.ndarray:
        table = self._tables[request_id][: -(-end // BLOCK)]
        pages = rank.bytes[:, table].swapaxes(2, 3)  # [LAYERS, blocks, BLOCK, heads, WIDTH]
        return pages.reshape(LAYERS, len(table) * BLOCK, self.setup.heads * WIDTH)[:, :end]

    def _is_bad(self, rank: Rank, request_id: str, done: int) -> bool:
        return not np.array_equal(self._read(rank, request_id, done), self._expected(rank.rank, request_id, done))

    def _check(self, rank: Rank, request_id: str, done: int) -> str:
        if not self._is_bad(rank, request_id, done):
            return ""
        wrong = (self._read(rank, request_id, done) != self._expected(rank.rank, request_id, done)).any(axis=(0, 2))
        return f"{int(wrong.sum())} wrong tokens of {done} on rank {rank.rank}, the first at {int(wrong.argmax())}"

    def _forward(self, rank: Rank, request_id: str, done: int, count: int, garbage: bool) -> None:
        known = min(done + count, self.scheduler.requests[request_id].num_tokens)
        rows = self._expected(rank.rank, request_id, known)
        for p in range(done, known):
            block = self._tables[request_id][p // BLOCK]
            kv = rank.bytes[:, block, :, p % BLOCK]
            kv[:] = 0xEE if garbage else rows[:, p].reshape(kv.shape)

    def _runner_output(self, output: Any, kv: KVConnectorOutput, computed: dict[str, tuple[int, int]]) -> Any:
        ids = list(computed)
        sampled = []
        for request_id in ids:
            done, count = computed[request_id]
            request = self.scheduler.requests[request_id]
            last = done + count >= request.num_tokens
            sampled.append([self._sample(request)] if last else [])
        values = {
            "req_ids": ids, "req_id_to_index": {r: i for i, r in enumerate(ids)}, "sampled_token_ids": sampled,
            "logprobs": None, "prompt_logprobs_dict": {}, "pooler_output": [], "kv_connector_output": kv,
        }  # fmt: skip
        names = {f.name for f in fields(ModelRunnerOutput)}
        return ModelRunnerOutput(**{k: v for k, v in values.items() if k in names})

    @staticmethod
    def _sample(request: Request) -> int:
        digest = blake3(np.asarray(list(request.all_token_ids), dtype="<u4").tobytes()).digest()
        return 10 + digest[0] % 90


def prompt(seed: int, length: int) -> list[int]:
    """`length` token ids that no other seed has."""
    rng = np.random.default_rng(seed)
    return [int(t) for t in rng.integers(10, 100, length)]
