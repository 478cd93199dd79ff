"""A seeded fuzzer for the server's wire: mutated frames at a running server, and what must hold all the same.

    python -m tests.server.fuzz --frames 100000 --seed 1

Every frame is answered exactly once, in time, never with an internal error; afterwards the server's invariants hold,
and it holds nothing for a session that said goodbye.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from lmcache_ext.server import protocol as p
from lmcache_ext.server.owners import this_process
from tests.server.helpers import Local, Raw, Server, spec, until

_WINDOW = 200  # frames that are under way at once
_PATIENCE = 5.0  # seconds
_RENEW = 600  # frames of one session
KEYS = [bytes([i]) * 32 for i in range(12)]
ODD = [None, True, -1, 0, 1, 255, 1 << 31, (1 << 62) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), 0.0, -1.5, 1e308,
       float("inf"), float("nan"), "", "x" * 300, "\x00", b"", b"\xff" * 16, bytes(31), bytes(32), bytes(33),
       [], [[]], [None] * 100, {}, {"a": 1}, [[[[[[1]]]]]]]  # fmt: skip


class Fault(Exception):
    """The server did what it must not."""


class Fuzzer:
    """Frames from a seed, the same each time but for the sessions' tokens."""

    def __init__(self, server: Server | Local, seed: int) -> None:
        self.server, self.dice = server, random.Random(seed)
        self.raw = Raw(server.address)
        self.seen: Counter[str] = Counter()
        self._tickets = itertools.count(1)
        self._recent: deque[int] = deque(maxlen=20)
        self.renew()

    def renew(self) -> None:
        self.raw._numbers = itertools.count(1)
        self.session = self.raw.hello("fuzz")
        self.groups = [self.raw.join(self.session, spec("fuzz")), self.raw.join(self.session, spec("fuzz2", (4096,)))]
        self.raw.ask(p.Prepare(self.session, self.groups[0], 1 << 40, b"".join(KEYS[:8])))
        self.raw.ask(p.Complete(self.session, 1 << 40, True))

    # -- what is said -----------------------------------------------------------------------------------------------

    def request(self) -> p.Request:
        """A valid request, of any kind but goodbye."""
        dice, session = self.dice, self.session
        group = dice.choice([*self.groups * 3, 0, 7])
        start = dice.randrange(len(KEYS))
        keys = b"".join(KEYS[start : start + dice.randrange(6)])
        self._recent.append(next(self._tickets))
        ticket, old = self._recent[-1], dice.choice(self._recent)
        salt = dice.choice([b"", b"s" * 16])
        ask = p.Ask(str(dice.randrange(9)), keys, dice.randrange(40), salt, dice.choice([0.0, 0.01]),
                    dice.choice([0, ticket]))  # fmt: skip
        return dice.choice([
            lambda: p.Hello("fuzz", [dice.choice([this_process(), p.Process(1, 1)])]),
            lambda: p.Adopt(session, [dice.choice([this_process(), p.Process(3, 3)])]),
            lambda: p.Join(session, dice.choice(KEYS), "m", dice.choices([1, 4096, 9000], k=dice.randrange(1, 4)), 16),
            lambda: p.Lookup(session, group, [ask] * dice.randrange(3)),
            lambda: p.Lease(session, group, dice.choice([ticket, ticket, old]), keys),
            lambda: p.Release(session, [old, old + 1], [ask.id]),
            lambda: p.Prepare(session, group, ticket, keys, dice.randrange(40), salt),
            lambda: p.Complete(session, old, dice.random() < 0.7, dice.choice([[], [1]])),
            lambda: p.Drop(session, group, keys[:32]),
            lambda: p.Touch(session, group, keys),
            lambda: p.Clear(session, dice.choice([group] + [99] * 9)),
            lambda: p.Quota(session, b"s" * 16, dice.choice([None, -1, 0, 9000, 1 << 40])),
            lambda: p.Stats(session),
            lambda: p.Departures(session, group, dice.choice([0, 5, 1 << 61])),
            lambda: p.Ping(session),
        ])()  # fmt: skip

    def frames(self) -> list[bytes]:
        """The frames of a request, spoilt in one or two ways, or not at all."""
        deadline = self.dice.choice([0.0] * 8 + [time.monotonic() + 60, 0.001])
        frames = p.pack_request(next(self.raw._numbers), self.request(), deadline)
        for _ in range(self.dice.choice([0, 0, 0, 1, 1, 2])):
            frames = self.dice.choice(MUTATIONS)(self.dice, frames)
        return frames

    # -- what must hold ---------------------------------------------------------------------------------------------

    def run(self, frames: int) -> None:
        """Raises Fault with the first thing that is wrong."""
        sent = 0
        while sent < frames:
            window = [self.frames() for _ in range(min(_WINDOW, frames - sent))]
            for some in window:
                self.raw.send(some)
            for _ in window:
                self._take()
            sent += len(window)
            if self.raw.receive(0) is not None:
                raise Fault("there was one answer more than there were requests")
            if sent % _RENEW < _WINDOW:
                self._part()
                self.renew()
        self._part()
        self._rest()

    def _take(self) -> None:
        try:
            answer = self.raw.receive(_PATIENCE)
        except ValueError as error:
            raise Fault(f"an answer that is none: {error}") from None
        if answer is None:
            raise Fault(f"no answer within {_PATIENCE} s")
        kind = answer[1].kind if isinstance(answer[1], p.Error) else type(answer[1]).__name__
        self.seen[kind] += 1
        if kind == "internal":
            raise Fault(f"an internal error: {answer[1].message}")

    def _part(self) -> None:
        reply = self.raw.ask(p.Bye(self.session), number=(1 << 64) - 1)
        if isinstance(reply, p.Error) and reply.kind not in ("session", "stale"):
            raise Fault(f"no goodbye: {reply}")

    def _rest(self) -> None:
        """What must be so in the end."""
        try:
            if not until(lambda: self.server.state()[1] == 0, _PATIENCE):
                raise Fault(f"{self.server.state()[1]} leases are left")
            faults = self.server.state()[0]
        except (OSError, TimeoutError) as error:
            raise Fault(f"the server has ended: {error}") from None
        if faults:
            raise Fault(f"broken invariants: {faults}")


Mutation = Callable[[random.Random, list[bytes]], list[bytes]]


def flip(dice: random.Random, frames: list[bytes]) -> list[bytes]:
    """Some bits."""
    body = bytearray(frames[-1])
    for _ in range(dice.randrange(1, 4) if body else 0):
        body[dice.randrange(len(body))] ^= 1 << dice.randrange(8)
    return [*frames[:-1], bytes(body)]


def cut(dice: random.Random, frames: list[bytes]) -> list[bytes]:
    """The end is missing."""
    return [*frames[:-1], frames[-1][: dice.randrange(len(frames[-1]) + 1)]]


def double(dice: random.Random, frames: list[bytes]) -> list[bytes]:
    """A piece comes twice."""
    body = frames[-1]
    start = dice.randrange(len(body) + 1)
    return [*frames[:-1], body[:start] + body[start - 20 if start > 20 else 0 :]]


def noise(dice: random.Random, frames: list[bytes]) -> list[bytes]:
    """Anything."""
    return [frames[0], dice.randbytes(dice.randrange(200))]


def header(dice: random.Random, frames: list[bytes]) -> list[bytes]:
    """A bit of the header, but not of the number's upper part: that would end the session's part in this."""
    head = bytearray(frames[0])
    if len(head) == p.REQUEST.size:
        head[dice.choice([0, 1, 2, 3, 4, *range(12, 20)])] ^= 1 << dice.randrange(8)
    return [bytes(head), *frames[1:]]


def count(dice: random.Random, frames: list[bytes]) -> list[bytes]:
    """More frames, or fewer."""
    return dice.choice([frames[:1], frames[1:] or frames, [*frames, b"more"], [b"", *frames], [b""], frames * 3])


def odd(dice: random.Random, frames: list[bytes]) -> list[bytes]:
    """One value of the message is another, of any type."""
    try:
        message = msgspec.msgpack.decode(frames[-1])
    except (ValueError, RecursionError):
        return frames
    within = message
    while isinstance(within, list) and within:
        i = dice.randrange(len(within))
        if isinstance(within[i], list) and within[i] and dice.random() < 0.7:
            within = within[i]
            continue
        within[i] = dice.choice(ODD)
        break
    return [*frames[:-1], msgspec.msgpack.encode(message)]


def nest(dice: random.Random, frames: list[bytes]) -> list[bytes]:
    """One element more: an array in an array in an array."""
    body = frames[-1]
    if not body or not 0x90 <= body[0] < 0x9F:
        return frames
    return [*frames[:-1], bytes([body[0] + 1]) + body[1:] + b"\x91" * dice.randrange(20_000) + b"\x00"]


MUTATIONS: list[Mutation] = [flip, flip, cut, double, noise, header, count, odd, odd, odd, nest]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as server:
        fuzzer, began = Fuzzer(server, args.seed), time.monotonic()
        try:
            fuzzer.run(args.frames)
        except Fault as fault:
            sys.stdout.write(f"seed {args.seed}: {fault}\n")
            return 1
        seconds = time.monotonic() - began
        sys.stdout.write(f"{args.frames} frames in {seconds:.1f} s, no fault; {dict(fuzzer.seen.most_common())}\n")
        return 0


if __name__ == "__main__":
    sys.exit(main())
