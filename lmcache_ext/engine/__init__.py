"""The control plane: which chunk is where, and in which state."""

from lmcache_ext.engine.below import Below, Want
from lmcache_ext.engine.directory import Chunk, Directory, Listener, Outcome, State
from lmcache_ext.engine.level import Level
from lmcache_ext.engine.levels import open_levels
from lmcache_ext.engine.locked import LockedDirectory
from lmcache_ext.engine.lower import Lower
from lmcache_ext.engine.shelf import Shelf
from lmcache_ext.engine.slots import Slots

__all__ = [
    "Below",
    "Chunk",
    "Directory",
    "Level",
    "Listener",
    "LockedDirectory",
    "Lower",
    "Outcome",
    "Shelf",
    "Slots",
    "State",
    "Want",
    "open_levels",
]
