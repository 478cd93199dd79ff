"""``python -m dynamo_lmcache.proxy``."""

import sys

from dynamo_lmcache.proxy.main import main

if __name__ == "__main__":
    sys.exit(main())
