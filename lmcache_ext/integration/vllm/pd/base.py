"""What the scheduler side asks of a hand-over: the hooks, and an engine that takes no part in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmcache_ext.engine import Directory, Listener
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.integration.vllm.pd.spec import NAME
from lmcache_ext.integration.vllm.requests import Tracker
from lmcache_ext.metrics import Recorder
from lmcache_ext.policies import EvictionPolicy

logger = get_logger("pd")


class Apart:
    """Prefill and decode are one engine here: every hook does nothing.

    All hooks run in the scheduler's thread and within its step. None may block, and none may raise.
    """

    uses_pool = False  # whether host memory is needed though `local_cpu` is off
    _warned = False

    def directory(self, policy: EvictionPolicy, listener: Listener | None) -> Directory:
        """An empty directory of the kind that this part needs."""
        return Directory(policy, listener)

    def open(self, directory: Directory, root: bytes, grown: Callable[[], int]) -> None:
        """The scheduler side exists now.

        Args:
            root: of the engine's keys.
            grown: how many slots can be used by now; from any thread.

        Raises:
            ConfigError: a port is taken, or NIXL does not start.
        """

    def begin_turn(self) -> None:
        """The scheduler looks for what it will promise."""

    def end_turn(self) -> None:
        """What it promised is leased."""

    def admitted(self, tracker: Tracker) -> None:
        """A request got its blocks, and a lease on what it loads. May come more than once."""
        if not self._warned and NAME in (tracker.request.kv_transfer_params or ()):
            self._warned = True
            logger.warning("requests name a decode engine (%s), and enable_pd is off: nothing is handed over", NAME)

    def finished(self, tracker: Tracker, whole: bool) -> dict[str, Any]:
        """A request is over and its last store is planned; `whole`: it was not aborted. Returns what its answer's
        `kv_transfer_params` shall say."""
        return {}

    def poll(self) -> None:
        """At the end of each step, and whenever stores have ended."""

    def reset(self) -> None:
        """Everything that was computed so far must be forgotten."""

    def measure(self, recorder: Recorder) -> None:
        """Bring metrics up to date."""

    def close(self) -> None:
        """The engine ends."""
