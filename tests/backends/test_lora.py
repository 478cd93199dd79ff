"""Adapters: loaded, published, named by requests, unloaded when idle."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dynamo_lmcache.vllm.errors import RequestError
from dynamo_lmcache.vllm.lora import Adapters
from tests.backends.fakes import FakeEngine


class Discovery:
    """Remembers what is published."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.broken = False

    async def publish(self, name: str, adapter_id: int) -> None:
        if self.broken:
            raise OSError("discovery is down")
        self.names.append(name)

    async def withdraw(self, name: str) -> None:
        self.names.remove(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


def make(engine: FakeEngine, discovery: Discovery, *, enabled: bool = True) -> Adapters:
    fake: Any = engine
    return Adapters(fake, base_names=("base",), enabled=enabled, publish=discovery.publish, withdraw=discovery.withdraw)


async def ask(answers: Any) -> dict[str, Any]:
    (answer,) = [answer async for answer in answers]
    assert isinstance(answer, dict)
    return answer


def load(folder: Path, name: str = "a") -> dict[str, Any]:
    return {"lora_name": name, "source": {"uri": f"file://{folder}"}}


async def test_load_use_unload(folder: Path) -> None:
    engine, discovery = FakeEngine(), Discovery()
    adapters = make(engine, discovery)
    answer = await ask(adapters.load(load(folder)))
    assert answer["status"] == "success" and engine.loras == [answer["lora_id"]] and discovery.names == ["a"]
    adapter = adapters.resolve("a")
    assert adapter is not None and adapter.lora_path == str(folder)
    assert (await ask(adapters.list()))["loras"] == {"a": answer["lora_id"]}
    assert (await ask(adapters.unload({"lora_name": "a"})))["status"] == "success"
    assert engine.loras == [] and discovery.names == []


async def test_loading_twice_loads_once(folder: Path) -> None:
    engine = FakeEngine()
    adapters = make(engine, Discovery())
    first, second = [await ask(adapters.load(load(folder))) for _ in range(2)]
    assert first == second and len(engine.loras) == 1


async def test_an_unload_waits_for_the_last_request(folder: Path) -> None:
    engine = FakeEngine()
    adapters = make(engine, Discovery())
    await ask(adapters.load(load(folder)))
    async with adapters.using(adapters.resolve("a")):
        unloading = asyncio.ensure_future(ask(adapters.unload({"lora_name": "a"})))
        await asyncio.sleep(0.05)
        assert len(engine.loras) == 1 and not unloading.done()
        with pytest.raises(RequestError):  # new requests no longer find it
            adapters.resolve("a")
    assert (await asyncio.wait_for(unloading, timeout=5))["status"] == "success"
    assert engine.loras == []


async def test_an_adapter_that_cannot_be_published_is_not_kept(folder: Path) -> None:
    engine, discovery = FakeEngine(), Discovery()
    discovery.broken = True
    adapters = make(engine, discovery)
    answer = await ask(adapters.load(load(folder)))
    assert answer == {"status": "error", "message": "discovery is down"} and engine.loras == []


@pytest.mark.parametrize(
    "body", [None, {}, {"lora_name": "a"}, {"lora_name": "a", "source": {"uri": "file:///nowhere"}}]
)
async def test_bad_loads_are_answered(body: Any) -> None:
    assert (await ask(make(FakeEngine(), Discovery()).load(body)))["status"] == "error"


async def test_names() -> None:
    adapters = make(FakeEngine(), Discovery())
    assert adapters.resolve(None) is None and adapters.resolve("base") is None
    with pytest.raises(RequestError) as caught:
        adapters.resolve("other")
    assert caught.value.status == 404
    assert make(FakeEngine(), Discovery(), enabled=False).resolve("other") is None
    assert (await ask(adapters.unload({"lora_name": "other"})))["status"] == "error"
