"""Is what runs in this container well? Exit status 0 if it is, 1 with a line that says what is wrong.

    health.py [URL]

URL answers 200, and one that ends in /v1/models also lists a model; default: that of launch/agg_lmcache.sh's frontend.
Standard library only, for `python -I -S`, which starts at once.
"""

import json
import os
import sys
import urllib.request

TIMEOUT_S = 4


def problem(url: str) -> str:
    """What is wrong, or nothing."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            if url.endswith("/v1/models") and not json.load(answer)["data"]:
                return f"{url} lists no model"
    except (OSError, ValueError, KeyError) as error:
        return f"{url}: {error}"
    return ""


def main() -> int:
    """The exit status."""
    default = f"http://127.0.0.1:{os.environ.get('HTTP_PORT', '8000')}/v1/models"
    said = problem(sys.argv[1] if len(sys.argv) > 1 else default)
    if said:
        sys.stderr.write(said + "\n")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
