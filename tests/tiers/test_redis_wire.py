"""What a server may answer that is no answer: by a server that does."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lmcache_ext.tiers import Outcome, Runner
from lmcache_ext.tiers.header import BLOCK
from lmcache_ext.tiers.redis_link import Site
from lmcache_ext.tiers.redis_tier import Redis
from tests.tiers.helpers import WHOLE, blank, key, load, over

PIECE = len(b"$9000\r\n") + BLOCK  # sent at once: a reader of the header alone finds nothing behind it, yet


class Liar:
    """Takes commands, and answers each GET with the next of `answers`; None: not at all."""

    def __init__(self, *answers: bytes | None, pace: float = 0.0) -> None:
        self.answers = list(answers)
        self.pace = pace
        self.ending = threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.settimeout(0.02)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while not self.ending.is_set():
            with contextlib.suppress(OSError), self.socket.accept()[0] as link:
                while said := self._heard(link):
                    self._answer(link, said)

    def _heard(self, link: socket.socket) -> bytes:
        link.settimeout(0.02)
        while not self.ending.is_set():
            with contextlib.suppress(TimeoutError):
                return link.recv(65536)
        return b""

    def _answer(self, link: socket.socket, said: bytes) -> None:
        if b"GET\r\n" not in said:
            link.sendall(b"+OK\r\n" * said.count(b"*"))
            return
        answer = self.answers.pop(0)
        if answer is not None:
            for at in range(0, len(answer), PIECE):
                link.sendall(answer[at : at + PIECE])
                self.ending.wait(timeout=self.pace)
            if not answer.endswith(b"\r\n"):
                link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.ending.set()
        self.thread.join(10)
        self.socket.close()


@pytest.fixture
def lied_to() -> Iterator[Callable[..., Runner]]:
    """Opens a tier, with one connection, over a server that gives these answers."""
    made: list[tuple[Runner, Liar]] = []

    def one(*answers: bytes | None, pace: float = 0.0) -> Runner:
        liar = Liar(*answers, pace=pace)
        site = Site("server", (liar.socket.getsockname(),), timeout=0.3)
        made.append((over(Redis(site), threads=1, faults=100), liar))
        return made[-1][0]

    yield one
    for tier, liar in made:
        liar.close()
        assert tier.close(10)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="nothing: half open"),
        pytest.param(b"", id="closed"),
        pytest.param(b"$204", id="half a length"),
        pytest.param(b"$20480\r\n" + bytes(9000), id="half a value"),
        pytest.param(b"$20480\r\n" + bytes(20480), id="no end"),
        pytest.param(b":5\r\n", id="a number"),
        pytest.param(b"$x\r\n", id="no length"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n", id="http"),
        pytest.param(b"x" * 10_000, id="no line"),
        pytest.param(b"-LOADING Redis is loading the dataset in memory\r\n", id="an error"),
    ],
)
def test_no_answer_that_is_not_one_is_taken_for_one(lied_to: Callable[..., Runner], answer: bytes | None) -> None:
    tier = lied_to(answer, b"$-1\r\n")
    began = time.monotonic()
    assert load(tier, 1) is Outcome.FAILED and time.monotonic() - began < 10
    assert load(tier, 1) is Outcome.MISS, "by a connection in order"


def test_an_answer_that_trickles_ends_in_time(lied_to: Callable[..., Runner]) -> None:
    tier = lied_to(b"$%d\r\n" % WHOLE + bytes(WHOLE) + b"\r\n", pace=0.2)  # each piece in time, all three not
    began = time.monotonic()
    assert load(tier, 1) is Outcome.FAILED and time.monotonic() - began < 1


def test_the_rest_of_a_value_of_another_length_is_not_taken_for_the_next_reply(lied_to: Callable[..., Runner]) -> None:
    medium = lied_to(b"$9000\r\n" + bytes(9000) + b"\r\n", b"$3\r\nabc\r\n", b"$-1\r\n", pace=0.03).medium
    header, parts = blank(BLOCK)[0], blank()
    assert medium.read(key(1), header, parts) == 9000
    assert medium.read(key(1), header, parts) == 3 and header[:3] == b"abc"
    with pytest.raises(FileNotFoundError):
        medium.read(key(1), header, parts)
