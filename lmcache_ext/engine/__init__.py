"""The control plane: which chunk is where, and in which state."""

from lmcache_ext.engine.directory import Chunk, Directory, Listener, Outcome, State

__all__ = ["Chunk", "Directory", "Listener", "Outcome", "State"]
