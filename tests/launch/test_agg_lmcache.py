"""README's first command, for real: it serves, its curl works, its second call hits, Ctrl-C leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.processes import running_with
from tests.launch.script import START_S, STOP_S, serving


@pytest.mark.engine
@pytest.mark.timeout(START_S + STOP_S + 60)
def test_it_serves_hits_and_stops(tmp_path: Path) -> None:
    # Without vLLM's own prefix cache, a hit can only be ours.
    with serving(tmp_path, "agg_lmcache.sh", "--no-enable-prefix-caching") as script:
        command, promised, text = script.promise()
        answers = [script.curl(command) for _ in range(2)]
        assert [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers] == [0, promised]
        assert [a["choices"][0]["text"] for a in answers] == [text] * 2
        assert running_with(script.marker)
        assert script.listeners() == set()
        script.interrupt()
