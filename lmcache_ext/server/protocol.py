"""What the shared cache server and its clients say to each other: all of it is in this file.

Transport: ZMQ, DEALER to ROUTER, over loopback. A request is two frames, header and body; a reply repeats the request's
number. Every request is answered exactly once, an unreadable one with `Error` and number 0. Bodies are msgpack arrays
whose first element names the message; elements that a reader does not know are left alone, so a newer minor version may
add some at the end. Both sides are on one host: CLOCK_MONOTONIC and process ids mean the same to both.

    request header, little-endian        reply header
    2  magic b"LX"                       2   magic b"LX"
    2  version, 1                        2   version, 1
    8  number                            8   number of the request
    8  deadline, ns of CLOCK_MONOTONIC   16  boot token of the server
       (0: none)

Numbers rise within a session. The server does nothing about a request that is older than one it has answered ("stale"),
or whose deadline has passed ("late"): whoever asked has given up. So whatever a client cancels stays cancelled.
Requests that give something back have no deadline.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Annotated, TypeAlias

import msgspec
from blake3 import blake3
from msgspec import Meta

VERSION = 1
MAX_WAIT = 3600.0  # seconds that a look-up may wait for tiers
MAGIC = b"LX"
REQUEST = struct.Struct("<2sHQQ")
REPLY = struct.Struct("<2sHQ16s")
KEY_BYTES = 32
MAX_KEYS = 4096  # in one request, all asks together
MAX_FRAME = 1 << 20  # bytes; ZMQ cuts the connection of whoever sends more

EXISTS, FULL, QUOTA = -1, -2, -3
"""Instead of an offset in `Prepared`: it is ready or being written; nothing may leave; the salt's share is used up."""

Key: TypeAlias = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Keys: TypeAlias = Annotated[bytes, Meta(max_length=KEY_BYTES * MAX_KEYS)]  # keys, one behind the other
Token: TypeAlias = Annotated[bytes, Meta(min_length=16, max_length=16)]
Salt: TypeAlias = Annotated[bytes, Meta(max_length=16)]  # `salt_digest`; b"": none
Number: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 62)]
Name: TypeAlias = Annotated[str, Meta(max_length=256)]
Size: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 40)]  # bytes
Tokens: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 20)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=MAX_WAIT)]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all."""


class Process(msgspec.Struct, frozen=True, array_like=True):
    """One process, for good: a pid alone may be somebody else's tomorrow."""

    pid: Annotated[int, Meta(ge=1, lt=1 << 31)]
    started: Number  # clock ticks after boot: field 22 of /proc/<pid>/stat


# -- requests ---------------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """Begin a session → Welcome."""

    name: Name
    processes: Annotated[list[Process], Meta(min_length=1, max_length=64)]  # all that may touch slots for this session


class Adopt(Message, frozen=True, tag="adopt"):
    """More processes that touch slots for this session → Done. It is over only when all of them are dead."""

    session: Token
    processes: Annotated[list[Process], Meta(min_length=1, max_length=64)]


class Join(Message, frozen=True, tag="join"):
    """Name a group: one namespace and the sizes of its chunks → Joined. All who join a root must agree on the rest."""

    session: Token
    root: Key
    model: Name  # for people
    parts: Annotated[list[Size], Meta(min_length=1, max_length=128)]  # bytes of a full chunk, for each rank
    tokens: Annotated[int, Meta(ge=1, le=1 << 20)]  # of a full chunk


class Leave(Message, frozen=True, tag="leave"):
    """Be in this group no longer → Done. What is leased or reserved of it stays so."""

    session: Token
    group: Number


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """One chain of chunks, first chunk first."""

    id: Name  # of the caller's own; the same when it asks again
    keys: Keys
    last: Tokens = 0  # tokens of the last chunk; 0: a full one
    salt: Salt = b""
    wait: Seconds = 0.0  # how long tiers may take to bring what is missing; 0: host memory only
    ticket: Number = 0  # if not 0, what is ready is leased under this number


class Lookup(Message, frozen=True, tag="lookup"):
    """How much of each chain is ready? → Found, at once. Those that wait are asked again, a few ms later."""

    session: Token
    group: Number
    asks: Annotated[list[Ask], Meta(max_length=256)]


class Lease(Message, frozen=True, tag="lease"):
    """Hold these chunks until `Release` → Leased. All of them or none."""

    session: Token
    group: Number
    ticket: Number
    keys: Keys


class Release(Message, frozen=True, tag="release"):
    """Give back leases and reservations (which then count as failed), and asks that nobody waits for → Done."""

    session: Token
    tickets: Annotated[list[Number], Meta(max_length=4096)]
    asks: Annotated[list[Name], Meta(max_length=256)] = []


class Prepare(Message, frozen=True, tag="prepare"):
    """Reserve a slot for each chunk → Prepared. The client writes, then sends `Complete`."""

    session: Token
    group: Number
    ticket: Number
    keys: Keys
    last: Tokens = 0
    salt: Salt = b""


class Complete(Message, frozen=True, tag="complete"):
    """The slots of a reservation are written → Done, with how many chunks can be found by now."""

    session: Token
    ticket: Number
    success: bool
    failed: Annotated[list[Number], Meta(max_length=MAX_KEYS)] = []  # indices of keys that were not written


class Drop(Message, frozen=True, tag="drop"):
    """These must not be found again → Done, with how many were there."""

    session: Token
    group: Number
    keys: Keys


class Touch(Message, frozen=True, tag="touch"):
    """These were used; a chain's last chunk first → Done."""

    session: Token
    group: Number
    keys: Keys


class Clear(Message, frozen=True, tag="clear"):
    """Forget a group's chunks, also those being written → Done, with how many were ready. Group 0 is all groups."""

    session: Token
    group: Number


class Departures(Message, frozen=True, tag="departures"):
    """Which of a group's chunks have left? → Departed. A server numbers what leaves, of all groups, from 1."""

    session: Token
    group: Number
    since: Number  # `Departed.at` of the last answer, 0 at first


class Quota(Message, frozen=True, tag="quota"):
    """Bound the bytes of a salt → Share. `limit`: bytes; -1 removes the bound; None only asks."""

    session: Token
    salt: Salt
    limit: Annotated[int, Meta(ge=-1, lt=1 << 62)] | None = None


class Stats(Message, frozen=True, tag="stats"):
    """→ Figures."""

    session: Token


class Ping(Message, frozen=True, tag="ping"):
    """I live → Done."""

    session: Token


class Bye(Message, frozen=True, tag="bye"):
    """Neither I nor my processes touch a slot from now on → Done. Ends the session and all that it holds."""

    session: Token


# fmt: off
Request: TypeAlias = (
    Hello | Adopt | Join | Lookup | Lease | Release | Prepare | Complete | Drop | Touch | Clear | Quota | Stats | Ping
    | Bye | Departures | Leave
)
# fmt: on

# -- replies ----------------------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag="welcome"):
    """The session's name, and where the segment is."""

    session: Token
    server: Process
    path: str  # open it read-write and map `size` bytes, shared
    size: int
    chunk_size: int  # tokens, that engines should use
    silence: float  # seconds without a word after which a session counts as silent
    extent: int = 0  # bytes: a slot lies in one extent, which begins at a multiple of it


class Joined(Message, frozen=True, tag="joined"):
    """Rank r's part of a chunk at offset o is the bytes [o + starts[r], o + starts[r] + parts[r])."""

    group: int
    slot_bytes: int
    starts: list[int]


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """Of one ask."""

    ready: int  # leading chunks
    waits: bool  # tiers are bringing more: ask again
    offsets: bytes = b""  # of the leased chunks in the segment, 8 bytes each


class Found(Message, frozen=True, tag="found"):
    """One answer for each ask."""

    answers: list[Answer]
    at: int = 0  # so many chunks had left the server


class Leased(Message, frozen=True, tag="leased"):
    """Where they are; b"" if not all are ready."""

    offsets: bytes


class Prepared(Message, frozen=True, tag="prepared"):
    """Where to write each, 8 bytes each, or EXISTS, FULL, QUOTA."""

    offsets: bytes


class Done(Message, frozen=True, tag="done"):
    """It is done; `count` says how often, where that makes sense."""

    count: int = 0
    at: int = 0  # of `Complete`: so many chunks had left the server before


class Departed(Message, frozen=True, tag="departed"):
    """Chunks that left and are not there again, of those that left after `since` and up to `at`."""

    keys: bytes  # one behind the other
    at: int
    more: bool  # ask on
    missed: bool  # too many left since then: of some it is not known any more


class Share(Message, frozen=True, tag="share"):
    """What a salt's chunks take and may take, bytes. -1: no bound."""

    used: int
    limit: int


class Figures(Message, frozen=True, tag="figures"):
    """The same as HTTP's /status, as JSON."""

    json: bytes


class Error(Message, frozen=True, tag="error"):
    """Nothing was done. `kind` is one of malformed, version, session, group, ticket, late, stale, refused, internal."""

    kind: str
    message: str


Reply: TypeAlias = Welcome | Joined | Found | Leased | Prepared | Done | Departed | Share | Figures | Error

# -- frames -----------------------------------------------------------------------------------------------------------

_encode = msgspec.msgpack.Encoder().encode
_decode_request: Callable[[bytes], Request] = msgspec.msgpack.Decoder(Request).decode
_decode_reply: Callable[[bytes], Reply] = msgspec.msgpack.Decoder(Reply).decode


def pack_request(number: int, request: Request, deadline: float = 0.0) -> list[bytes]:
    """The frames of a request. `deadline`: as `time.monotonic()` has it, 0: none."""
    return [REQUEST.pack(MAGIC, VERSION, number, int(deadline * 1e9)), _encode(request)]


def pack_reply(number: int, boot: bytes, reply: Reply) -> list[bytes]:
    """The frames of a reply."""
    return [REPLY.pack(MAGIC, VERSION, number, boot), _encode(reply)]


def unpack_request(body: bytes) -> Request:
    """Raises msgspec.MsgspecError, a ValueError."""
    return _decode_request(body)


def unpack_reply(frames: Sequence[bytes]) -> tuple[int, bytes, Reply]:
    """(number, boot token, reply). Raises ValueError."""
    if len(frames) != 2 or len(frames[0]) != REPLY.size:
        raise ValueError("not a reply of this protocol")
    magic, version, number, boot = REPLY.unpack(frames[0])
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"the server speaks version {version} of the protocol, this is {VERSION}")
    return number, boot, _decode_reply(frames[1])


def split_keys(keys: bytes) -> list[bytes]:
    """Raises ValueError unless `keys` is whole keys."""
    if len(keys) % KEY_BYTES:
        raise ValueError(f"{len(keys)} bytes are no whole number of keys of {KEY_BYTES}")
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def pack_offsets(offsets: Sequence[int]) -> bytes:
    """Signed, 8 bytes each, little-endian."""
    return struct.pack(f"<{len(offsets)}q", *offsets)


def unpack_offsets(packed: bytes) -> list[int]:
    """The inverse. Raises struct.error."""
    return list(struct.unpack(f"<{len(packed) // 8}q", packed))


def salt_digest(salt: str) -> bytes:
    """How a salt is named here: 16 bytes, b"" for none. The salt itself never leaves its engine."""
    return blake3(salt.encode()).digest(16) if salt else b""
