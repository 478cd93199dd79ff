"""A sender and a receiver in processes of their own, with slots in GPUs' memory."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lmcache_ext.engine.directory import Directory
from lmcache_ext.pd import (
    DirectoryStore,
    Ended,
    Geometry,
    Memory,
    Receiver,
    ReceiverOptions,
    Sender,
    SenderOptions,
    Target,
)
from lmcache_ext.pd.gpu_sums import GpuSums
from lmcache_ext.policies import POLICIES
from lmcache_ext.transfer.pool import Shape
from tests.pd.peers import CHUNK, content

SHAPE = Shape(24, 16, 128 << 10)  # slots of 2 MiB
DEADLINE_S = 60


class Slots:
    """Of one GPU."""

    def __init__(self, gpu: int) -> None:
        torch.cuda.set_device(gpu)
        self.store = torch.zeros(SHAPE.slots, SHAPE.slot_bytes, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        self.memory = Memory.on_gpu(self.store.data_ptr(), SHAPE, gpu)
        self.sums = GpuSums(self.memory)
        self.geometry = Geometry.of(SHAPE, CHUNK, "in GPU memory")


def receive(pipe: Any, gpu: int) -> None:
    """Until told to end: says which of these keys' bytes are right."""
    slots = Slots(gpu)
    directory, lock = Directory(POLICIES.get("LRU")()), threading.Lock()
    directory.grow(SHAPE.slots)
    receiver = Receiver(slots.memory, slots.sums, slots.geometry, DirectoryStore(directory, lock), ReceiverOptions())
    pipe.send(Target("127.0.0.1", receiver.init_port, receiver.alloc_port))
    while (asked := pipe.recv()) is not None:
        right = []
        with lock:
            for chunk in directory.chunks():
                nbytes = slots.geometry.nbytes(chunk.tokens)
                came = slots.store[chunk.slot, :nbytes].cpu().numpy()
                if chunk.key in asked and np.array_equal(came, content(chunk.key, nbytes)):
                    right.append(chunk.key)
        pipe.send((right, dict(receiver.counts)))
    os._exit(0)  # NIXL's libraries may crash in their destructors


def send(pipe: Any, gpu: int, target: Target, keys: list[bytes], last: int, spoils: bool) -> None:
    """Hand one request over; `spoils`: a byte of its third chunk changes once its sum was taken."""
    slots = Slots(gpu)

    def take(asked: Any) -> Any:
        totals = list(slots.sums(asked))
        if spoils and 2 in dict(asked):
            slots.store[2, 77] ^= 1
            torch.cuda.synchronize()
        return totals

    sender = Sender(slots.memory, take, slots.geometry, SenderOptions())
    sender.begin("r", target, keys, last)
    for i, key in enumerate(keys):
        nbytes = slots.geometry.nbytes(last if i + 1 == len(keys) else CHUNK)
        slots.store[i, :nbytes] = torch.from_numpy(content(key, nbytes)).cuda()
        torch.cuda.synchronize()
        sender.ready("r", target, i, i)
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if ended := [event for event in sender.poll() if isinstance(event, Ended)]:
            pipe.send(ended[0].outcome.value)
            break
        time.sleep(0.01)
    sender.close(10)
    os._exit(0)


def handed_over(keys: list[bytes], last: int, spoils: bool = False) -> tuple[str, list[bytes], dict[str, int]]:
    """(How it ended, keys that are there with the right bytes, the receiver's counts.)"""
    spawn = multiprocessing.get_context("spawn")
    here, theirs = spawn.Pipe()
    receiver = spawn.Process(target=receive, args=(theirs, torch.cuda.device_count() - 1))
    receiver.start()
    assert here.poll(DEADLINE_S)
    target = here.recv()
    mine, its = spawn.Pipe()
    sender = spawn.Process(target=send, args=(its, 0, replace(target), keys, last, spoils))
    sender.start()
    assert mine.poll(DEADLINE_S)
    outcome = mine.recv()
    here.send(set(keys))
    assert here.poll(DEADLINE_S)
    right, counts = here.recv()
    here.send(None)
    for process in (sender, receiver):
        process.join(20)
        process.kill()
    return outcome, right, counts
