"""When a request's stores are done: it is over, and each of its stores has ended on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Request:
    open: int = 0  # stores under way
    over: bool = False
    ok: bool = True


class Stores:
    """Counts stores under way. One thread; holds requests only while one of their stores is under way.

    A store that ends badly before its request is over is not held against it, because it is tried again: `finished`
    says whether that worked. One that ends badly afterwards is.

    Args:
        report: report(request id, stored), called once for each request, within `ended` or `finished`.
    """

    def __init__(self, report: Callable[[str, bool], None]) -> None:
        self._report = report
        self._requests: dict[str, _Request] = {}
        self._of: dict[int, str] = {}  # store → request

    def __len__(self) -> int:
        return len(self._requests)

    def began(self, request_id: str, store: int) -> None:
        """A store of `request_id` is on its way; `store` is a number that no other has."""
        self._of[store] = request_id
        self._requests.setdefault(request_id, _Request()).open += 1

    def ended(self, store: int, ok: bool) -> None:
        """It is over: readers find what it wrote, or never will. What is not known, or was over before, is nothing."""
        request_id = self._of.pop(store, None)
        if request_id is None:
            return
        request = self._requests[request_id]
        request.open -= 1
        request.ok &= ok or not request.over
        if not request.open:
            del self._requests[request_id]
            if request.over:
                self._report(request_id, request.ok)

    def finished(self, request_id: str, ok: bool = True) -> None:
        """No further store of `request_id` will begin. `ok`: all that should be stored is, or is on its way."""
        request = self._requests.get(request_id)
        if request is None:
            self._report(request_id, ok)
            return
        request.over, request.ok = True, ok
