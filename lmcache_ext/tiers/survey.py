"""Makes the index agree with the medium: in the background at the start and after an outage, at once for `check`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lmcache_ext.tiers.index import Index
from lmcache_ext.tiers.medium import Medium
from lmcache_ext.tiers.objects import Objects

logger = logging.getLogger("lmcache_ext.tiers")

_SLICE = 128  # objects between two pauses: about a millisecond
_PAUSE = 0.001  # seconds; lets others have the interpreter


class Survey:
    """Thread-safe. `start` and `check` may be called at any time; one scan runs at once.

    Args:
        ended: called in the scan's thread when it ended, with what went wrong or None.
        closing: set when the tier closes; a scan stops then.
    """

    def __init__(
        self,
        medium: Medium,
        index: Index,
        objects: Objects,
        ended: Callable[[Exception | None], None],
        closing: threading.Event,
    ) -> None:
        self._medium = medium
        self._index = index
        self._objects = objects
        self._ended = ended
        self._closing = closing
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None  # guarded by _lock
        self.complete = False  # once a whole scan has succeeded

    def start(self) -> None:
        """Scan in the background, unless a scan runs, or the index would not keep what it finds."""
        with self._lock:
            if self._index.keeps and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._run, name="tier-scan", daemon=True)
                self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait for the scan under way, at most `timeout` seconds. Whether none runs."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def _run(self) -> None:
        fault: Exception | None = None
        try:
            if self.complete:
                self.reconcile(fix=True, sweep=True)
            else:
                self._first()
        except Exception as error:
            fault = error
        if not self._closing.is_set():
            self._ended(fault)

    def _first(self) -> None:
        self._index.begin_scan()
        for i, found in enumerate(self._medium.scan(sweep=True, faults=[]), 1):
            self._objects.enter(found.key, found.nbytes, found.when)
            if i % _SLICE == 0 and self._closing.wait(timeout=_PAUSE):
                return
        self._index.settle()
        self._objects.trim()
        self.complete = True

    def reconcile(self, fix: bool, sweep: bool) -> list[str]:
        """Compare index and medium; every difference as a sentence. With `fix`, the index follows the medium."""
        faults: list[str] = []
        before = self._index.ready()
        seen = set()
        for i, found in enumerate(self._medium.scan(sweep, faults), 1):
            seen.add(found.key)
            size = self._medium.footprint(found.nbytes)
            if found.key in before and before[found.key] != size:
                faults.append(f"{_name(found.key)} takes {size} bytes, {before[found.key]} are counted")
                if fix:
                    self._objects.discard(found.key)
            elif found.key not in before and not self._index.knows(found.key):
                if not self._medium.shared:
                    faults.append(f"{_name(found.key)} is not in the index")
                if fix:
                    self._objects.enter(found.key, found.nbytes, found.when)
            if i % _SLICE == 0 and self._closing.wait(timeout=_PAUSE):
                return faults
        for key in before.keys() - seen:
            if self._index.knows(key) and self._medium.size(key) is None:
                faults.append(f"{_name(key)} is in the index only")
                if fix:
                    self._objects.discard(key)
        if fix:
            self._objects.trim()
            stuck = self._objects.retry()
        else:
            stuck = self._index.stuck()
        return faults + [f"{_name(key)} could not be removed" for key in stuck]


def _name(key: bytes) -> str:
    return f"object {key.hex()[:16]}"
