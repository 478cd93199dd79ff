"""Mutated frames never crash or hang the server, and the fuzzer that says so finds what is planted."""

from __future__ import annotations

import contextlib
import threading

import pytest

from lmcache_ext.server.directory import SharedDirectory
from lmcache_ext.server.service import Service
from tests.server import fuzz
from tests.server.fuzz import Fault, Fuzzer
from tests.server.helpers import Local, Server

FRAMES = 20_000


def test_mutated_frames_do_no_harm(tmp_path):
    with Server(tmp_path) as server:
        fuzzer = Fuzzer(server, seed=1)
        with contextlib.closing(fuzzer.raw):
            fuzzer.run(FRAMES)
        assert server.stop() == 0
    assert sum(fuzzer.seen.values()) == FRAMES
    wanted = {"malformed", "version", "session", "group", "ticket", "late", "refused",
              "Welcome", "Joined", "Found", "Leased", "Prepared", "Done", "Share", "Figures"}  # fmt: skip
    assert wanted <= fuzzer.seen.keys()


def _raise(monkeypatch, end):
    monkeypatch.setattr(Service, "_touch", lambda self, session, ask: self.groups[ask.keys])


def _hang(monkeypatch, end):
    monkeypatch.setattr(Service, "_error", lambda self, kind, message: end.wait(20))


def _leak(monkeypatch, end):
    give_back = Service._give_back

    def forget(self, session, number):
        return give_back(self, session, number) if not session.tickets[number].writes else session.tickets.pop(number)

    monkeypatch.setattr(Service, "_give_back", forget)


def _break(monkeypatch, end):
    release = SharedDirectory.release
    monkeypatch.setattr(SharedDirectory, "release", lambda self, chunks: release(self, list(chunks)[:1]))


@pytest.mark.parametrize(
    ("plant", "found"),
    [(_raise, "internal error"), (_hang, "no answer"), (_leak, "internal error|leases are left"), (_break, "leases")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_found(monkeypatch, plant, found):
    monkeypatch.setattr(fuzz, "_PATIENCE", 0.5)
    end = threading.Event()
    plant(monkeypatch, end)
    with Local() as server:
        fuzzer = Fuzzer(server, seed=1)
        with contextlib.closing(fuzzer.raw), pytest.raises(Fault, match=found):
            fuzzer.run(FRAMES)
        end.set()
