"""`python -m tests.integration [NAME …]`: the connector's scenarios under whatever vLLM comes first on PYTHONPATH."""

from __future__ import annotations

import sys

import numpy as np

from tests.integration import ahead_scenarios, scenarios
from tests.integration.runner import run

ALL = {**scenarios.ALL, **ahead_scenarios.ALL}


if __name__ == "__main__":
    np.seterr(all="raise")
    sys.exit(run(ALL, sys.argv[1:]))
