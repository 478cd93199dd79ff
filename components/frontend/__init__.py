"""``dynamo.frontend`` with the settings that fit our workers: ``python -m dynamo_lmcache.frontend``."""
