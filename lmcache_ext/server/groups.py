"""All groups of a server, by their numbers."""

from __future__ import annotations

from collections.abc import Collection

from lmcache_ext.server import protocol as p
from lmcache_ext.server.directory import SharedDirectory
from lmcache_ext.server.memory import Group
from lmcache_ext.server.state import Refused

_MOST = 256


class Groups(dict[int, Group]):
    """Args:
    directory: of their chunks.
    extent_bytes: that a chunk may have at most.
    """

    def __init__(self, directory: SharedDirectory, extent_bytes: int) -> None:
        super().__init__()
        self._directory, self._extent_bytes = directory, extent_bytes

    def join(self, join: p.Join, used: Collection[int]) -> Group:
        """The group that a session asks for.

        Args:
            used: numbers of groups that some session is in.

        Raises:
            Refused: there are too many, its chunks are too large, or it is known with other sizes.
        """
        group = next((each for each in self.values() if each.root == join.root), None)
        if group is None:
            return self._add(join, used)
        if (group.parts, group.tokens) != (tuple(join.parts), join.tokens):
            raise Refused("group", "this root is known with other sizes of its chunks")
        return group

    def _add(self, join: p.Join, used: Collection[int]) -> Group:
        if len(self) >= _MOST:
            self._make_room(used)
        if len(self) >= _MOST:
            raise Refused("refused", f"there are {len(self)} groups, as many as can be")
        group = Group(max(self, default=0) + 1, join.root, join.model, tuple(join.parts), join.tokens)
        if group.slot_bytes > self._extent_bytes:
            raise Refused(
                "refused",
                f"a chunk takes {group.slot_bytes} bytes and an extent has {self._extent_bytes}: "
                "give the server more memory (--l1-size-gb), or a smaller --chunk-size",
            )
        self[group.number] = group
        return group

    def _make_room(self, used: Collection[int]) -> None:
        """Of those that nobody is in: drop the ones without chunks, or else the oldest with all that it has."""
        idle = [group for number, group in self.items() if number not in used]
        if all(group.used for group in idle):
            for group in idle:
                self._directory.forget(group)
                if not group.used:  # else somebody still reads or writes
                    break
        for group in idle:
            if not group.used:
                del self[group.number]
