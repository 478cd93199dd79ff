"""The product keeps the rules, and each rule catches what it forbids."""

from __future__ import annotations

import pytest

from tests.static import rules
from tests.static.rules import Source

RULES = [rules.wrong_arrows, rules.unsafe, rules.endless_waits, rules.too_long]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_product_keeps_the_rule(rule):
    complaints = [complaint for source in rules.product() for complaint in rule(source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_all_product_folders_are_looked_at():
    assert {source.path.split("/")[0] for source in rules.product()} == set(rules.PRODUCT)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("lmcache_ext/engine/directory.py", "import vllm"),
        ("lmcache_ext/engine/directory.py", "from vllm.config import VllmConfig"),
        ("lmcache_ext/transfer/cpu.py", "import vllm"),
        ("lmcache_ext/integration/vllm/plugin.py", "import dynamo"),
        ("lmcache_ext/engine/directory.py", "import torch"),
        ("lmcache_ext/keys/chain.py", "import torch"),
        ("lmcache_ext/keys/chain.py", "from lmcache_ext.engine import Directory"),
        ("lmcache_ext/keys/chain.py", "from ..engine import Directory"),
        ("lmcache_ext/keys/__init__.py", "from ..engine import Directory"),
        ("lmcache_ext/engine/directory.py", "from lmcache_ext.cli import main"),
        ("lmcache_ext/engine/directory.py", "import lmcache_ext.integration.vllm.adapter"),
        ("lmcache_ext/server/main.py", "from lmcache_ext import integration"),
        ("lmcache_ext/integration/vllm/plugin.py", "import dynamo_lmcache.vllm"),
        ("backends/vllm/main.py", "import backends.vllm.args"),
        ("backends/vllm/main.py", "from tests.helpers import x"),
        ("components/frontend/main.py", "import components"),
    ],
)
def test_an_import_against_the_arrows_is_caught(path, line):
    assert list(rules.wrong_arrows(Source(path, line)))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("lmcache_ext/integration/vllm/plugin.py", "import vllm"),
        ("lmcache_ext/integration/vllm/plugin.py", "from lmcache_ext.engine import Directory"),
        ("lmcache_ext/transfer/cpu.py", "import torch"),
        ("lmcache_ext/engine/directory.py", "from lmcache_ext.keys import Key"),
        ("lmcache_ext/engine/directory.py", "from . import slots"),
        ("lmcache_ext/cli/main.py", "from lmcache_ext import __version__"),
        ("backends/vllm/main.py", "import dynamo, vllm, lmcache_ext.engine"),
        ("components/frontend/main.py", "from dynamo_lmcache.vllm.settings import x"),
    ],
)
def test_an_import_along_the_arrows_passes(path, line):
    assert not list(rules.wrong_arrows(Source(path, line)))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import multiprocessing, dill",
        "eval('1')",
        "exec('x = 1')",
        "try:\n    pass\nexcept:\n    pass",
        "print('x')",
    ],
)
def test_unsafe_code_is_caught(text):
    assert list(rules.unsafe(Source("lmcache_ext/engine/x.py", text)))


def test_the_cli_may_print():
    assert not list(rules.unsafe(Source("lmcache_ext/cli/x.py", "print('x')")))


@pytest.mark.parametrize(
    "call",
    [
        "thread.join()",
        "event.wait()",
        "event.wait(None)",
        "event.wait(timeout=None)",
        "queue.get()",
        "future.result()",
        "lock.acquire()",
        "process.communicate()",
        "subprocess.run(['x'])",
        "subprocess.run(['x'], timeout=None)",
        "await event.wait()",
        "event.wait()  # no deadline:",
    ],
)
def test_a_wait_without_a_deadline_is_caught(call):
    assert list(rules.endless_waits(_in_function(call)))


@pytest.mark.parametrize(
    "call",
    [
        "thread.join(5)",
        "thread.join(timeout=5)",
        "', '.join(names)",
        "queue.get(timeout=1)",
        "queue.get(block=False)",
        "settings.get('x')",
        "lock.acquire(blocking=False)",
        "subprocess.run(['x'], timeout=5)",
        "await asyncio.wait_for(event.wait(), 5)",
        "await event.wait()  # no deadline: the process's own life",
    ],
)
def test_a_wait_with_a_deadline_passes(call):
    assert not list(rules.endless_waits(_in_function(call)))


def test_long_files_and_functions_are_caught():
    long_file = Source("lmcache_ext/x.py", "x = 1\n" * 401)
    body = "    x = 1\n" * 50
    assert list(rules.too_long(long_file))
    assert list(rules.too_long(Source("lmcache_ext/x.py", f"def f():\n{body}")))
    assert not list(rules.too_long(Source("lmcache_ext/x.py", f"def f():  # long: a table\n{body}")))


def _in_function(call: str) -> Source:
    return Source("lmcache_ext/engine/x.py", f"async def f():\n    {call}\n")
