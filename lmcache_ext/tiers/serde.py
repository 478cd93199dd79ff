"""What happens to a chunk's parts on their way to a medium and back: `serde=fp8,aesgcm`.

    parts ─▶ fp8: half the bytes, lossy ─▶ aesgcm: encrypted ─▶ coded parts and a stamp: what the medium holds

The header in front is that of the coded parts, so its sum proves the stored bytes before anything is done with them.
With a stage there is one part more, the last, of one block, so that nothing loses its alignment:

    offset  bytes  what
         0      8  magic b"LMCXCODE"
         8     56  the stages and what they depend on, e.g. b"fp8:bf16,aesgcm:<fingerprint of the secret>"
        64     64  for each stage, in their order: what it noted
       128         zeros

An object with other stages, or of another secret, is foreign. aesgcm is AES-256-GCM over all parts as one message, with
96 random bits as nonce; the object's key, the stages and the lengths are authenticated with it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.base import Outcome, Parts
from lmcache_ext.tiers.fp8 import Fp8, dtype_of
from lmcache_ext.tiers.header import BLOCK
from lmcache_ext.tiers.options import Options

_MAGIC = b"LMCXCODE"
_ABOUT = 64  # bytes that name the stages
_NOTE = 32  # bytes for each stage
_NONCE, _TAG, _SECRET = 12, 16, 32


class Stage(ABC):
    """One step. Thread-safe. The first of a chain may change lengths; those behind it work in place.

    `name` says all that a reader must have in common with the writer.
    """

    name: str

    def length(self, nbytes: int) -> int:
        """Bytes of a part of `nbytes` once it is coded."""
        return nbytes

    @abstractmethod
    def encode(self, about: bytes, source: Parts, target: Parts) -> bytes:
        """Fill `target`, which may be `source` if lengths stay. Returns a note of at most 32 bytes for `decode`.

        Args:
            about: what the object is; has to be the same in `decode`.
        """

    @abstractmethod
    def decode(self, about: bytes, note: bytes, source: Parts, target: Parts) -> bool:
        """Fill `target` with what `encode` was given. False: it is not what `encode` has made."""


class HalfBytes(Stage):
    """`fp8`: see fp8.py."""

    def __init__(self, options: Options) -> None:
        dtype = dtype_of(options.serde_dtype)
        if dtype is None:
            raise ConfigError("serde_dtype", options.serde_dtype, "fp8 needs KV of bf16 or fp16, and to be told which")
        self.name = f"fp8:{dtype}"
        self._fp8 = Fp8(dtype)

    def length(self, nbytes: int) -> int:
        return self._fp8.length(nbytes)

    def encode(self, about: bytes, source: Parts, target: Parts) -> bytes:
        for part, coded in zip(source, target, strict=True):
            self._fp8.encode(part, coded)
        return b""

    def decode(self, about: bytes, note: bytes, source: Parts, target: Parts) -> bool:
        for coded, part in zip(source, target, strict=True):
            self._fp8.decode(coded, part)
        return True


class Sealed(Stage):
    """`aesgcm`: nobody without the secret reads it, or makes or changes it unnoticed."""

    def __init__(self, options: Options) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        secret = _secret(options.serde_key_file)
        self.name = f"aesgcm:{hashlib.blake2b(secret, digest_size=8, person=b'lmcx fingerprint').hexdigest()}"
        self._seal: Callable[[bytes], Any] = lambda nonce: Cipher(algorithms.AES(secret), modes.GCM(nonce)).encryptor()
        self._open: Callable[[bytes, bytes], Any] = lambda nonce, tag: Cipher(
            algorithms.AES(secret), modes.GCM(nonce, tag)
        ).decryptor()

    def encode(self, about: bytes, source: Parts, target: Parts) -> bytes:
        nonce = os.urandom(_NONCE)
        work = self._seal(nonce)
        work.authenticate_additional_data(about)
        for part, coded in zip(source, target, strict=True):
            work.update_into(part, coded)
        work.finalize()
        return nonce + bytes(work.tag)

    def decode(self, about: bytes, note: bytes, source: Parts, target: Parts) -> bool:
        from cryptography.exceptions import InvalidTag

        work = self._open(note[:_NONCE], note[_NONCE : _NONCE + _TAG])
        work.authenticate_additional_data(about)
        for coded, part in zip(source, target, strict=True):
            work.update_into(coded, part)
        try:
            work.finalize()
        except InvalidTag:
            return False
        return True


STAGES: dict[str, Callable[[Options], Stage]] = {"fp8": HalfBytes, "aesgcm": Sealed}
"""In the order in which they can follow each other."""


class Serde:
    """A chain of stages; none: parts stay as they are. Thread-safe; each thread has memory of its own to code into,
    as large as its largest chunk.
    """

    def __init__(self, stages: Sequence[Stage] = ()) -> None:
        self._stages = tuple(stages)
        self._about = _MAGIC + ",".join(stage.name for stage in stages).encode().ljust(_ABOUT - len(_MAGIC), b"\0")
        self._local = threading.local()

    @classmethod
    def of(cls, options: Options) -> Serde:
        """What `options` ask for. Raises ConfigError."""
        names = [name.strip() for name in options.serde.split(",")]
        names = [name for name in names if name and name != "naive"]
        if names != [name for name in STAGES if name in names]:
            raise ConfigError("serde", options.serde, f"must be naive, or some of {','.join(STAGES)} in this order")
        try:
            return cls([STAGES[name](options) for name in names])
        except ImportError as error:
            raise ConfigError("serde", options.serde, f"needs {error.name}: pip install {error.name}") from None

    def nbytes(self, parts: Parts) -> int:
        """Bytes that `encode` makes of parts of these lengths."""
        return sum(self._lengths(parts)) + (BLOCK if self._stages else 0)

    def _lengths(self, parts: Parts) -> list[int]:
        return [self._stages[0].length(part.nbytes) if self._stages else part.nbytes for part in parts]

    def encode(self, key: bytes, parts: Parts) -> Parts:
        """What to store, in memory of this thread that is valid until its next call."""
        if not self._stages:
            return parts
        *coded, stamp = self._scratch([*self._lengths(parts), BLOCK])
        about, source = self._bound(key, parts), parts
        stamp[:] = self._about.ljust(BLOCK, b"\0")
        for i, stage in enumerate(self._stages):
            note = stage.encode(about, source, coded)
            stamp[_ABOUT + i * _NOTE :][: len(note)] = note
            source = coded
        return [*coded, stamp]

    def room(self, parts: Parts) -> Parts:
        """Where to read what `decode` shall make `parts` of: the parts themselves if their lengths stay."""
        if not self._stages:
            return parts
        lengths = self._lengths(parts)
        if lengths == [part.nbytes for part in parts]:
            return [*parts, *self._scratch([BLOCK])]
        return self._scratch([*lengths, BLOCK])

    def decode(self, key: bytes, room: Parts, parts: Parts) -> Outcome:
        """Fill `parts` from `room`, whose sum was right."""
        if not self._stages:
            return Outcome.OK
        *coded, stamp = room
        if stamp[:_ABOUT] != self._about:
            return Outcome.FOREIGN
        about = self._bound(key, parts)
        for i in reversed(range(len(self._stages))):
            note = bytes(stamp[_ABOUT + i * _NOTE :][:_NOTE])
            if not self._stages[i].decode(about, note, coded, coded if i else parts):
                return Outcome.CORRUPT
        return Outcome.OK

    def _bound(self, key: bytes, parts: Parts) -> bytes:
        return key + self._about + struct.pack(f"<{len(parts)}Q", *(part.nbytes for part in parts))

    def _scratch(self, lengths: Sequence[int]) -> list[memoryview]:
        """Parts of these lengths, each from a memory page on."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + -(-length // BLOCK) * BLOCK)
        memory: memoryview | None = getattr(self._local, "memory", None)
        if memory is None or memory.nbytes < starts[-1]:
            memory = self._local.memory = memoryview(mmap.mmap(-1, starts[-1]))
        return [memory[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def _secret(file: str) -> bytes:
    """The 32 bytes that `file` names in hexadecimal digits. No message has them."""
    if not file:
        raise ConfigError(
            "serde_key_file", file, "aesgcm needs a file with 64 hexadecimal digits: openssl rand -hex 32"
        )
    try:
        secret = bytes.fromhex(Path(file).read_text().strip())
    except OSError as error:
        raise ConfigError("serde_key_file", file, f"can't be read: {error.strerror}") from None
    except ValueError:
        secret = b""
    if len(secret) != _SECRET:
        raise ConfigError("serde_key_file", file, "must hold 64 hexadecimal digits: openssl rand -hex 32") from None
    return secret
