"""Where engines meet the cache: one folder per engine."""
