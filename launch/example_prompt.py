"""Print a prompt for the demo model, escaped for JSON, and on a second line its answer.

64 lines `key value` of 8 tokens each, then one of the keys: 512 tokens that a cache can keep, and 4 more.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "demo_model"))

import recall

CONTEXT_TOKENS = 512


def main() -> None:
    rng = random.Random(1)
    context = recall.make_context(rng, CONTEXT_TOKENS)
    query = recall.queries(context, rng, 1)[0]
    print(json.dumps(query.prompt)[1:-1])
    print(query.expected)


if __name__ == "__main__":
    main()
