"""What the engine raises, and only at its edges: start-up, configuration and the CLI.

    LMCacheError
    ├── ConfigError        a setting is wrong; names the setting, its value and what would do
    ├── LayoutError        the engine's KV memory is laid out in a way we do not know
    └── TransferError      a copy could not be carried out

On the hot path faults are values (a failed result becomes a miss), never exceptions.
"""

from __future__ import annotations


class LMCacheError(Exception):
    """Base of everything that `lmcache_ext` raises. `kind` is stable, for programs."""

    kind = "error"


class ConfigError(LMCacheError):
    """A setting was refused.

    Args:
        setting: the name as the user typed it, e.g. `LMCACHE_CHUNK_SIZE`.
        value: the value that was given.
        why: what is wrong with it, and what would do.
    """

    kind = "config"

    def __init__(self, setting: str, value: object, why: str) -> None:
        super().__init__(f"{setting}={value!r}: {why}")
        self.setting = setting
        self.value = value
        self.why = why


class LayoutError(LMCacheError):
    """The KV cache tensors do not have a layout that we can copy page by page."""

    kind = "layout"


class TransferError(LMCacheError):
    """A copy between the engine's KV memory and the host pool could not be carried out."""

    kind = "transfer"
