"""Opens after repeated faults, and probes its way back."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("lmcache_ext.tiers")


class Breaker:
    """One direction of one tier. Thread-safe; no method blocks.

        CLOSED ──`limit` faults, no success between──▶ OPEN ──`cooldown` passed, `claim_probe`──▶ PROBING
        CLOSED ◀──probed(True)── PROBING ──probed(False)──▶ OPEN, with twice the cooldown

    After a probe that went well, the first fault opens it again, also with twice the cooldown: a probe is small, and
    may go well where real work does not. Only real work that succeeds brings the first cooldown and the limit back.

    Args:
        name: for the log, which gets one line for each change.
        limit: faults in a row.
        cooldown: seconds until the first probe.
        longest: seconds that a cooldown grows to.
    """

    def __init__(self, name: str, limit: int = 5, cooldown: float = 1.0, longest: float = 60.0) -> None:
        self._name = name
        self._limit = limit
        self._first = cooldown
        self._longest = longest
        self._lock = threading.Lock()
        self._faults = 0  # guarded by _lock, as all below
        self._cooldown = cooldown
        self._retry_at: float | None = None  # None: closed
        self._probing = False
        self.trips = 0

    @property
    def closed(self) -> bool:
        """Whether work may pass. Reads one field."""
        return self._retry_at is None

    def fault(self, now: float, what: str, at_once: bool = False) -> None:
        """Work failed. `now` is monotonic. `at_once`: no more of it is needed."""
        with self._lock:
            self._faults += 1
            if self._retry_at is not None or (self._faults < self._limit and not at_once):
                return
            self._retry_at = now + self._cooldown
            self.trips += 1
            text = "%s is switched off after %d faults in a row, the last one: %s; next try in %.1f s"
            logger.warning(text, self._name, self._faults, what, self._cooldown)

    def success(self) -> None:
        """Real work succeeded."""
        if self._faults:
            with self._lock:
                if self._retry_at is None:
                    self._faults = 0
                    self._cooldown = self._first

    def claim_probe(self, now: float) -> bool:
        """True for the one caller that shall probe now and call `probed` with how it went."""
        if self._retry_at is None or self._probing or now < self._retry_at:
            return False
        with self._lock:
            if self._retry_at is None or self._probing or now < self._retry_at:
                return False
            self._probing = True
            return True

    def probed(self, ok: bool, now: float) -> None:
        """The probe's end."""
        with self._lock:
            self._probing = False
            self._cooldown = min(self._longest, self._cooldown * 2)
            if not ok:
                self._retry_at = now + self._cooldown
                return
            self._retry_at = None
            self._faults = self._limit - 1
            logger.warning("%s works again", self._name)
