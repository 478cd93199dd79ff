"""What tiers say about their chunks: stored and removed, in order, with what a router needs to index them."""

from lmcache_ext.events.log import Announcement, Event, EventLog, Noted, Tier, Told

__all__ = ["Announcement", "Event", "EventLog", "Noted", "Tier", "Told"]
