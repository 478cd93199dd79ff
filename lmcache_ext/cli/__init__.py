"""The `lmcache-ext` command. The only place where printing is allowed."""
