"""A name → class table, filled by decorator: `@POLICIES.register("LRU")`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Names are matched without case; `kind` is what messages call an entry."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: enter the decorated object under `name`. Raises ValueError on a second entry."""

        def enter(entry: T) -> T:
            if self._entries.setdefault(name.upper(), entry) is not entry:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            return entry

        return enter

    def get(self, name: str) -> T:
        """The entry under `name`. Raises KeyError that lists the known names."""
        try:
            return self._entries[name.upper()]
        except KeyError:
            raise KeyError(f"no {self.kind} {name!r}; known: {', '.join(self)}") from None

    def __contains__(self, name: str) -> bool:
        return name.upper() in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
