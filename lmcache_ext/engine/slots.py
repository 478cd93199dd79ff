"""Which slots of the pool are free. Lowest number first, so that a chain tends to lie contiguously."""

from __future__ import annotations

import heapq


class Slots:
    """Slot numbers in [0, capacity). Freshly grown slots cost no memory here until they were used once."""

    def __init__(self) -> None:
        self.capacity = 0
        self._fresh = 0  # slots in [_fresh, capacity) were never taken
        self._freed: list[int] = []  # heap

    @property
    def free(self) -> int:
        """How many slots can be taken."""
        return len(self._freed) + self.capacity - self._fresh

    def grow(self, capacity: int) -> None:
        """The pool now has `capacity` slots; it never shrinks."""
        self.capacity = max(self.capacity, capacity)

    def take(self) -> int | None:
        """A free slot, or None."""
        if self._freed:
            return heapq.heappop(self._freed)
        if self._fresh < self.capacity:
            self._fresh += 1
            return self._fresh - 1
        return None

    def give(self, slot: int) -> None:
        """The slot is free again; nobody reads or writes it."""
        heapq.heappush(self._freed, slot)

    def taken(self) -> set[int]:
        """All slots in use: O(capacity), for `check` only."""
        return set(range(self._fresh)) - set(self._freed)
