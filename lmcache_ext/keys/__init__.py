"""Names for chunks: a 32-byte digest per chunk, chained so that a key stands for its whole prefix."""

from lmcache_ext.keys.chain import Chain, ExtraOf
from lmcache_ext.keys.namespace import SCHEMA, Namespace, fresh

__all__ = ["SCHEMA", "Chain", "ExtraOf", "Namespace", "fresh"]
