"""Plans, results, and the contract of a data plane."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.int64]


class Way(enum.Enum):
    """Which way a plan's bytes go."""

    STORE = "store"  # KV memory → pool
    LOAD = "load"  # pool → KV memory


@dataclass(frozen=True)
class Plan:
    """Copies to run: block `blocks[i]` of every layer ⇄ row `rows[i]` of the pool.

    `blocks` and `rows` are int64 and equally long. Blocks are the engine's ids; a row is one block's bytes of all
    layers in the pool. Ids are unique within an engine's life.
    """

    id: int
    way: Way
    blocks: Blocks
    rows: Blocks


@dataclass(frozen=True)
class Result:
    """What became of a plan. On failure nothing is known about the bytes at its targets."""

    id: int
    way: Way
    ok: bool
    nbytes: int
    seconds: float  # from the start of the copy to its end
    error: str = ""


class Transfer(ABC):
    """Runs plans in the background, each way in order of submission, both ways at once.

    Called from the engine worker's main thread only. `submit`, `poll` and `cancel` never block. The pool's `grown` says
    from the start, and ever better, how many of its slots plans may name. Every submitted plan is
    reported by `poll` exactly once, whatever happens to it; until then its blocks and rows belong to the data plane. A
    load that has not begun `load_timeout` seconds after its submission fails instead of starting.
    """

    @abstractmethod
    def fence(self) -> object:
        """A mark in the engine's own work: what was issued so far comes before plans that are submitted with it."""

    @abstractmethod
    def submit(self, plans: Iterable[Plan], after: object) -> None:
        """Run `plans` once the work before the fence `after` is done."""

    @abstractmethod
    def join(self, ids: Collection[int]) -> None:
        """Let the engine's next work see the bytes of these loads. Blocks the host until they are on their way, where
        the device has no queue until they are there.

        A load that failed is reported by `poll` as any other.
        """

    def beat(self) -> None:  # noqa: B027 - most have nothing to do
        """The engine takes a step that needs the device: what is done beside it gives way for a while."""

    @property
    def stopped(self) -> bool:
        """Whether the pool has grown as far as it ever will."""
        return False

    @abstractmethod
    def poll(self) -> list[Result]:
        """Results since the last call."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether everything that was submitted was reported."""

    @abstractmethod
    def cancel(self, ids: Collection[int]) -> None:
        """Plans that have not begun need not run: they fail. The others run on."""

    @abstractmethod
    def close(self, timeout: float) -> None:
        """Stop after the plans under way, at most `timeout` seconds; the pool may be unmapped afterwards."""
