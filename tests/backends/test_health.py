"""The probe, and the end of a worker whose engine has died."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from dynamo.health_check import HEALTH_CHECK_KEY

from dynamo_lmcache.vllm import health
from dynamo_lmcache.vllm.sampling import build_prompt, build_sampling


def engine(bos: int | None) -> Any:
    return SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(bos_token_id=bos))


@pytest.mark.parametrize(("bos", "token"), [(5, 5), (None, 0)])
def test_the_probe_generates_one_token(monkeypatch: pytest.MonkeyPatch, bos: int | None, token: int) -> None:
    monkeypatch.delenv("DYN_HEALTH_CHECK_PAYLOAD", raising=False)
    probe = health.probe_payload(engine(bos))
    assert probe[HEALTH_CHECK_KEY] is True
    assert build_prompt(probe)["prompt_token_ids"] == [token]
    params = build_sampling(probe, {}, max_model_len=10)
    assert (params.max_tokens, params.temperature, params.ignore_eos) == (1, 0.0, True)


def test_the_probe_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_HEALTH_CHECK_PAYLOAD", "")
    probe = health.probe_payload(engine(1), json.dumps({"token_ids": [9]}))
    assert probe == {"token_ids": [9], HEALTH_CHECK_KEY: True}


class Ended(Exception):
    """Stands for the end of the process."""


async def test_a_dead_engine_ends_the_worker_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []

    def leave(status: int) -> None:
        statuses.append(status)
        raise Ended

    monkeypatch.setattr(health, "leave", leave)
    monkeypatch.setattr(health.threading, "Timer", lambda *args, **kwargs: SimpleNamespace(start=lambda: None))
    dead: Any = SimpleNamespace(errored=True)
    watchdog = health.Watchdog(dead, SimpleNamespace(shutdown=lambda: None))
    with pytest.raises(Ended):
        await asyncio.wait_for(watchdog.run(), timeout=5)
    assert statuses == [1]


async def test_an_engine_that_was_told_to_end_has_not_died() -> None:
    dead: Any = SimpleNamespace(errored=True)
    watchdog = health.Watchdog(dead, SimpleNamespace())
    watchdog.expect_end()
    watchdog.engine_died("it was stopped")
    await asyncio.wait_for(watchdog.run(), timeout=5)
