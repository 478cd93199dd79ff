"""Every policy once more, in lists that are searched: slow, and close to the text of its paper."""

from __future__ import annotations

from typing import Protocol


class Reference(Protocol):
    """What an `EvictionPolicy` does, said plainly."""

    def insert(self, key: bytes) -> None: ...

    def touch(self, key: bytes) -> None: ...

    def remove(self, key: bytes) -> None: ...

    def victims(self) -> list[bytes]: ...


class LRU:
    def __init__(self) -> None:
        self.stamps: dict[bytes, int] = {}
        self.clock = 0

    def insert(self, key: bytes) -> None:
        self.clock += 1
        self.stamps[key] = self.clock

    def touch(self, key: bytes) -> None:
        self.insert(key)

    def remove(self, key: bytes) -> None:
        del self.stamps[key]

    def victims(self) -> list[bytes]:
        return sorted(self.stamps, key=lambda key: self.stamps[key])


class FIFO(LRU):
    def touch(self, key: bytes) -> None:
        pass


class MRU:
    """Touches count in reverse, pass by pass. A pass ends with any other call, and where a key comes again."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.touched: list[bytes] = []

    def end_pass(self) -> None:
        for key in reversed(self.touched):
            self.keys.remove(key)
            self.keys.append(key)
        self.touched = []

    def insert(self, key: bytes) -> None:
        self.end_pass()
        self.keys.append(key)

    def touch(self, key: bytes) -> None:
        if key in self.touched:
            self.end_pass()
        self.touched.append(key)

    def remove(self, key: bytes) -> None:
        self.end_pass()
        self.keys.remove(key)

    def victims(self) -> list[bytes]:
        self.end_pass()
        return self.keys[::-1]


class LFU:
    """LFU with dynamic aging: rank = uses + age at the last use; the age is the least rank when a victim was named."""

    def __init__(self) -> None:
        self.ranks: dict[bytes, tuple[int, int]] = {}  # rank, when it was set
        self.uses: dict[bytes, int] = {}
        self.age = self.clock = 0

    def insert(self, key: bytes) -> None:
        self.uses[key] = 0
        self.touch(key)

    def touch(self, key: bytes) -> None:
        self.clock += 1
        self.uses[key] += 1
        self.ranks[key] = self.age + self.uses[key], self.clock

    def remove(self, key: bytes) -> None:
        del self.uses[key], self.ranks[key]

    def victims(self) -> list[bytes]:
        if self.ranks:
            self.age = min(rank for rank, _ in self.ranks.values())
        return sorted(self.ranks, key=lambda key: self.ranks[key])


class ARC:
    """T1, T2, B1, B2 and p as in the paper, least recent first."""

    def __init__(self) -> None:
        self.t1: list[bytes] = []
        self.t2: list[bytes] = []
        self.b1: list[bytes] = []
        self.b2: list[bytes] = []
        self.fresh: set[bytes] = set()  # in t1, not touched yet
        self.p = 0.0
        self.c = 0

    def insert(self, key: bytes) -> None:
        if key in self.b1:
            self.p = min(self.c, self.p + max(1, len(self.b2) / len(self.b1)))
            self.b1.remove(key)
            self.t2.append(key)
        elif key in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))
            self.b2.remove(key)
            self.t2.append(key)
        else:
            self.t1.append(key)
            self.fresh.add(key)
        self.c = max(self.c, len(self.t1) + len(self.t2))
        self.bound()

    def touch(self, key: bytes) -> None:
        if key in self.t2:
            self.t2.remove(key)
            self.t2.append(key)
            return
        self.t1.remove(key)
        (self.t1 if key in self.fresh else self.t2).append(key)
        self.fresh.discard(key)

    def remove(self, key: bytes) -> None:
        self.fresh.discard(key)
        inside, ghosts = (self.t1, self.b1) if key in self.t1 else (self.t2, self.b2)
        inside.remove(key)
        ghosts.append(key)
        self.bound()

    def bound(self) -> None:
        self.b1 = self.b1[max(0, len(self.t1) + len(self.b1) - self.c) :]
        self.b2 = self.b2[max(0, len(self.t1 + self.t2 + self.b1 + self.b2) - 2 * self.c) :]

    def victims(self) -> list[bytes]:
        return self.t1 + self.t2 if len(self.t1) > self.p else self.t2 + self.t1


class S3FIFO:
    """S, M and G as in the paper, first in first; [key, uses]."""

    def __init__(self) -> None:
        self.s: list[list] = []
        self.m: list[list] = []
        self.g: list[bytes] = []
        self.size = 0

    def insert(self, key: bytes) -> None:
        (self.m if key in self.g else self.s).append([key, 0])
        self.g = [ghost for ghost in self.g if ghost != key]
        self.size = max(self.size, len(self.s + self.m))

    def touch(self, key: bytes) -> None:
        for entry in self.s + self.m:
            if entry[0] == key:
                entry[1] = min(entry[1] + 1, 3)

    def remove(self, key: bytes) -> None:
        if key in [k for k, _ in self.s]:
            self.g.append(key)
            self.g = self.g[max(0, len(self.g) - (self.size - self.size // 10)) :]
        self.s = [entry for entry in self.s if entry[0] != key]
        self.m = [entry for entry in self.m if entry[0] != key]

    def victims(self) -> list[bytes]:
        while self.s and (len(self.s) >= self.size / 10 or not self.m):
            if self.s[0][1] < 2:
                return [key for key, _ in self.s + self.m]
            self.m.append([self.s.pop(0)[0], 0])
        while self.m and self.m[0][1]:
            key, uses = self.m.pop(0)
            self.m.append([key, uses - 1])
        return [key for key, _ in self.m + self.s]


REFERENCES: dict[str, type[Reference]] = {
    "ARC": ARC,
    "FIFO": FIFO,
    "LFU": LFU,
    "LRU": LRU,
    "MRU": MRU,
    "S3-FIFO": S3FIFO,
}
