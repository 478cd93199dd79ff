"""Hand-over of KV from a prefill engine to a decode engine, for plain `vllm serve`: docs/pd.md."""

from __future__ import annotations

from lmcache_ext.pd.agent import Agent, Memory
from lmcache_ext.pd.handover import Ended, Event, Outcome, Released, Target, Together
from lmcache_ext.pd.options import ReceiverOptions, SenderOptions
from lmcache_ext.pd.receiver import Receiver
from lmcache_ext.pd.sender import Sender
from lmcache_ext.pd.store import DirectoryStore, Place, Store, Ticket
from lmcache_ext.pd.wire import Geometry

__all__ = [
    "Agent",
    "DirectoryStore",
    "Ended",
    "Event",
    "Geometry",
    "Memory",
    "Outcome",
    "Place",
    "Receiver",
    "ReceiverOptions",
    "Released",
    "Sender",
    "SenderOptions",
    "Store",
    "Target",
    "Ticket",
    "Together",
]
