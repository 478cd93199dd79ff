"""What sender and receiver say to each other: msgpack, each message a map with its "type", and behind it its sum.

Names and fields are upstream's where upstream has the same thing (LMCache 0.5: `AllocRequest`, `AllocResponse`,
`CancelNotif`, `ProxyNotif`, `NixlInitRequest`, `NixlInitResponse`); what upstream lacks is added, what we do not need
is left out. An upstream peer is refused at the handshake: it sends descriptors as pickles, and chunks without sums.

    init port   sender ─NixlInitRequest──▶ receiver    once for each session; DEALER to ROUTER, an empty frame before
                       ◀─NixlInitResponse, or Refusal
    alloc port  sender ─AllocRequest─────▶ receiver    once for each request; DEALER to ROUTER
                       ◀────AllocResponse─
                       ─ChunksWritten────▶             after each transfer
                       ◀──────ChunksTaken─             what was proved by its sum, and what was not
                       ─CancelNotif──────▶             no more will come
                       ◀────Ping, Refusal─
                       ─Pong, Bye────────▶
    proxy       sender ─ProxyNotif───────▶ proxy       PUSH to PULL, one frame

All of it is input from outside: `decode_…` return None for what is malformed, and both sides check every number.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import xxhash

from lmcache_ext.transfer.pool import Shape

VERSION = 2
SESSION_BYTES = 16
KEY_BYTES = 32
MAX_ID = 512  # characters of a request's id
MAX_MESSAGE = 16 * 1024 * 1024  # bytes; keys of 400,000 chunks
MAX_META = 1024 * 1024  # bytes of an agent's metadata


class Identity(msgspec.Struct, frozen=True):
    """A process: of which boot of which machine, seen from which pid namespace. Start is in clock ticks since boot."""

    boot: str
    space: int
    pid: int
    start: int


class Geometry(msgspec.Struct, frozen=True):
    """How one rank's chunks lie in its slots, and which part of the model's they are.

    Args:
        chunk_tokens: tokens of a full chunk.
        rows: blocks of a slot.
        row_bytes: bytes of one block of all layers on this rank.
        layout: what else must be equal for bytes to be interchangeable; compared as it is.
        rank, ranks: which of the engine's pools this is, of how many.
        pages: [layers, outer, heads, head_bytes] of the whole model's pages, as `shards.Page`; empty: they can't be
            cut, and both engines need equally many ranks.
    """

    chunk_tokens: int
    rows: int
    row_bytes: int
    layout: str = ""
    rank: int = 0
    ranks: int = 1
    pages: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def slot_bytes(self) -> int:
        """Bytes of a full chunk."""
        return self.rows * self.row_bytes

    def nbytes(self, tokens: int) -> int:
        """Bytes of a chunk of `tokens` tokens: whole rows."""
        return -(-tokens * self.rows // self.chunk_tokens) * self.row_bytes

    @classmethod
    def of(cls, shape: Shape, chunk_tokens: int, layout: str = "", **part: Any) -> Geometry:
        """Of a pool's slots. `part`: rank, ranks and pages."""
        return cls(chunk_tokens, shape.blocks_per_slot, shape.row_bytes, layout, **part)


class NixlInitRequest(msgspec.Struct, tag=True, frozen=True):
    """A sender asks for a session. It is only ever written to, never read from, so its own metadata is not needed."""

    version: int
    identity: Identity
    geometry: Geometry


class NixlInitResponse(msgspec.Struct, tag=True, frozen=True):
    """A session, and where the slots lie."""

    version: int
    session: bytes
    geometry: Geometry
    remote_meta_bytes: bytes
    identity: Identity
    base: int  # address of slot 0
    slots: int
    device: str
    device_id: int


class AllocRequest(msgspec.Struct, tag=True, frozen=True):
    """Slots for all chunks of a request, in their order; only the last may be partial.

    `number` names the request within the session, and is never used again: a `req_id` may be, and late answers to its
    first use must not be taken for answers to the second.
    """

    session: bytes
    number: int
    req_id: str
    keys: list[bytes]
    last_chunk_toks: int
    wait_s: float  # how long the sender waits for an answer


class AllocResponse(msgspec.Struct, tag=True, frozen=True):
    """One slot for each key, or -1 for each; what is there already needs no bytes."""

    session: bytes
    number: int
    remote_indexes: list[int]
    already_sent_indexes: list[int]


class ChunksWritten(msgspec.Struct, tag=True, frozen=True):
    """The bytes of these chunks have arrived, says NIXL; their sums were taken before they left."""

    session: bytes
    number: int
    indexes: list[int]
    sums: list[bytes]


class ChunksTaken(msgspec.Struct, tag=True, frozen=True):
    """Which chunks are visible now, and which were not what their sum says."""

    session: bytes
    number: int
    good: list[int]
    bad: list[int]


class CancelNotif(msgspec.Struct, tag=True, frozen=True):
    """No more chunks of this request are wanted. `quiet`: nothing of it is in flight any more, either."""

    session: bytes
    number: int
    req_id: str
    quiet: bool


class Ping(msgspec.Struct, tag=True, frozen=True):
    """The receiver asks whether a session is alive."""

    session: bytes


class Pong(msgspec.Struct, tag=True, frozen=True):
    """It is."""

    session: bytes


class Bye(msgspec.Struct, tag=True, frozen=True):
    """It is not: the sender has cut its connection and writes nothing any more."""

    session: bytes


class Refusal(msgspec.Struct, tag=True, frozen=True):
    """Why not: `session` (unknown, ask for one), `request` (unknown, given up or malformed), `geometry`, `version`,
    `busy`."""

    reason: str
    text: str = ""
    session: bytes = b""
    number: int = -1


class ProxyNotif(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """One rank has handed over all of `req_id`, or has given up (`status`)."""

    req_id: str
    rank: int | None = None
    status: str | None = None


FromSender = AllocRequest | ChunksWritten | CancelNotif | Pong | Bye
FromReceiver = AllocResponse | ChunksTaken | Ping | Refusal
Answer = NixlInitResponse | Refusal
T = TypeVar("T")

_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)
_encoder = msgspec.msgpack.Encoder()
_asked = msgspec.msgpack.Decoder(NixlInitRequest)
_answered = msgspec.msgpack.Decoder(Answer)
_from_sender = msgspec.msgpack.Decoder(FromSender)
_from_receiver = msgspec.msgpack.Decoder(FromReceiver)


def encode(message: msgspec.Struct) -> bytes:
    """One message as one frame, as the proxy takes it."""
    return _encoder.encode(message)


def sealed(message: msgspec.Struct) -> list[bytes]:
    """One message as two frames: itself, and its sum. A slot's number that was changed on its way would have us write
    over other chunks, and TCP's own sum has 16 bits."""
    frame = _encoder.encode(message)
    return [frame, xxhash.xxh3_64_digest(frame)]


def _decode(decoder: msgspec.msgpack.Decoder[T], frames: list[bytes]) -> T | None:
    if len(frames) != 2 or xxhash.xxh3_64_digest(frames[0]) != frames[1]:
        return None
    try:
        return decoder.decode(frames[0])
    except _UNREADABLE:
        return None


def decode_init(frames: list[bytes]) -> NixlInitRequest | None:
    """What a sender says on the init port."""
    return _decode(_asked, frames)


def decode_answer(frames: list[bytes]) -> Answer | None:
    """What a receiver answers there."""
    return _decode(_answered, frames)


def decode_from_sender(frames: list[bytes]) -> FromSender | None:
    """What a sender says on the alloc port."""
    return _decode(_from_sender, frames)


def decode_from_receiver(frames: list[bytes]) -> FromReceiver | None:
    """What a receiver says there."""
    return _decode(_from_receiver, frames)
