"""What is counted, under upstream's names, and a recorder that hands over what is new since the last time."""

from lmcache_ext.metrics.catalogue import CATALOGUE, Metric
from lmcache_ext.metrics.recorder import Delta, Recorder, merge
from lmcache_ext.metrics.smoothing import smoothed

__all__ = ["CATALOGUE", "Delta", "Metric", "Recorder", "merge", "smoothed"]
