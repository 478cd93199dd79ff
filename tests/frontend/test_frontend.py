"""The frontend wrapper: settings before Dynamo's import, flags passed on."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from unittest import mock

import pytest

from dynamo_lmcache.frontend.main import main


@pytest.mark.parametrize(
    ("variables", "argv", "expected"),
    [
        ({}, [], ("file", None, None)),
        ({"DYN_DISCOVERY_BACKEND": "etcd"}, [], ("etcd", "nats", "nats")),
        ({}, ["--discovery-backend", "etcd"], ("etcd", "nats", "nats")),
        ({"DYN_DISCOVERY_BACKEND": "etcd", "DYN_REQUEST_PLANE": "tcp"}, [], ("etcd", "tcp", "nats")),
    ],
)
def test_settings_are_there_when_dynamo_starts(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    argv: list[str],
    expected: tuple[str | None, ...],
) -> None:
    names = ("DYN_DISCOVERY_BACKEND", "DYN_REQUEST_PLANE", "DYN_EVENT_PLANE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")} | variables
    seen: list[tuple[str | None, ...]] = []
    flags: list[list[str]] = []

    def started() -> None:
        asyncio.run(dynamo.frontend.main.graceful_shutdown(mock.Mock()))  # as on SIGTERM
        seen.append(tuple(os.environ.get(name) for name in names))
        flags.append(sys.argv[1:])

    import dynamo.frontend.main

    monkeypatch.setattr(dynamo.frontend.main, "main", started)
    monkeypatch.setattr(dynamo.frontend.main, "graceful_shutdown", dynamo.frontend.main.graceful_shutdown)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "argv", ["frontend"])
    main(argv)
    assert seen == [expected] and flags == [argv]


@pytest.mark.parametrize(("backend", "status"), [("etcd", 1), ("file", None)])
def test_a_lost_lease_is_a_failure(monkeypatch: pytest.MonkeyPatch, backend: str, status: int | None) -> None:
    import dynamo.frontend.main

    monkeypatch.setattr(dynamo.frontend.main, "main", lambda: None)
    monkeypatch.setattr(dynamo.frontend.main, "graceful_shutdown", None)
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", backend)
    monkeypatch.setattr(sys, "argv", ["frontend"])
    if status is None:
        main([])
        return
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == status


def test_importing_the_wrapper_does_not_import_vllm() -> None:
    code = (
        "import sys, dynamo_lmcache.frontend.main; sys.exit('vllm' in sys.modules or 'dynamo.frontend' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
