"""What asks a server for the chunks of requests that wait, in the place of tiers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lmcache_ext.engine import Want
from lmcache_ext.server.mirror import Held, Mirror, Note


class Seeker:
    """Brings what the server has for requests that wait. A want has a `Note`."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror, self._client = mirror, mirror.client
        self._numbers = itertools.count(1)
        self._looks: dict[str, tuple[str, Sequence[Want]]] = {}  # by request: the look-up's name, what is wanted
        self._held: dict[str, Held] = {}  # by request

    def knows(self, request_id: str) -> bool:
        """Whether a look-up for this request is under way."""
        return request_id in self._looks

    def fetch(self, request_id: str, wants: Sequence[Want], patience: float) -> bool:
        """Whether the server, or its tiers, are still at it. `patience`: seconds that its tiers may take."""
        mirror = self._mirror
        if mirror.usable is None:
            self.release(request_id)
            return False
        if request_id not in self._looks:
            self.release(request_id)
            self._looks[request_id] = (f"{request_id[-200:]}#{next(self._numbers)}", wants)
        name, wants = self._looks[request_id]
        tokens = self._client.spec(mirror.root).tokens
        last = wants[-1].tokens if wants[-1].tokens < tokens else 0
        note = wants[-1].note
        salt = note.salt if isinstance(note, Note) else b""
        keys = [want.key for want in wants]
        hit = self._client.lookup(name, mirror.root, keys, last=last, salt=salt, wait=patience)
        if hit is None:
            return True
        del self._looks[request_id]
        if hit.lease and hit.lease.attachment is mirror.usable:
            self._held[request_id] = mirror.found(hit.lease, wants[: hit.ready])
            self._client.keep(name)
        else:
            self._client.forget(name)
        return False

    def brought(self, request_id: str) -> int:
        """Chunks that are held for this request."""
        held = self._held.get(request_id)
        return len(held.chunks) if held else 0

    def release(self, request_id: str) -> None:
        """The request has its load, or is gone."""
        if (look := self._looks.pop(request_id, None)) is not None:
            self._client.forget(look[0])
        if (held := self._held.pop(request_id, None)) is not None:
            self._mirror.leave(held)
