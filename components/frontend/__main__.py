"""``python -m dynamo_lmcache.frontend``."""

from dynamo_lmcache.frontend.main import main

if __name__ == "__main__":
    main()
