"""Dynamo's flags: the table, the installed release and the documentation say the same."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup
from dynamo.vllm.backend_args import DynamoVllmArgGroup

from dynamo_lmcache.vllm import flags
from dynamo_lmcache.vllm.settings import SettingError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, argparse.Action]:
    """The installed dynamo.vllm's flags, with the defaults they have in an empty environment."""
    for name in list(os.environ):
        if name.startswith(("DYN_", "MODEL_EXPRESS_")):
            monkeypatch.delenv(name)
    parser = argparse.ArgumentParser(add_help=False)
    for group in (DynamoRuntimeArgGroup(), DynamoVllmArgGroup()):
        group.add_arguments(parser)
    return {action.option_strings[0]: action for action in parser._actions}


def test_every_installed_flag_is_supported_or_refused(installed: dict[str, argparse.Action]) -> None:
    known = flags.SUPPORTED | flags.REFUSED.keys()
    assert installed.keys() - known == set()
    assert not flags.SUPPORTED & flags.REFUSED.keys()


def test_refused_defaults_are_those_of_the_installed_flags(installed: dict[str, argparse.Action]) -> None:
    wrong = {
        flag: action.default
        for flag, action in installed.items()
        if flag in flags.REFUSED and action.default != flags.REFUSED[flag].default
    }
    assert wrong == {}


def test_every_flag_is_in_the_document() -> None:
    text = DOCUMENT.read_text()
    missing = [flag for flag in sorted(flags.SUPPORTED | flags.REFUSED.keys()) if f"`{flag}`" not in text]
    assert missing == []


def test_every_reason_is_in_the_document() -> None:
    text = DOCUMENT.read_text()
    assert [entry.reason for entry in flags.REFUSED.values() if entry.reason not in text] == []


def test_refusal_names_flag_value_and_reason() -> None:
    with pytest.raises(SettingError, match=r"--embedding-worker True.*generates"):
        flags.check_refused({"--namespace": "x", "--embedding-worker": True})


def test_defaults_are_not_refused() -> None:
    flags.check_refused({flag: entry.default for flag, entry in flags.REFUSED.items()})


def test_a_flag_of_a_newer_dynamo_is_refused_only_when_given() -> None:
    flags.check_unknown(["--shiny"], ["--model", "m"])
    with pytest.raises(SettingError, match="--shiny"):
        flags.check_unknown(["--shiny"], ["--shiny=1"])


@pytest.mark.parametrize(
    ("names", "answer"),
    [
        (["lmcache"], 'ENABLE_LMCACHE=1.*"LMCacheConnectorV1", "kv_role": "kv_both"'),
        (["nixl"], 'ENABLE_LMCACHE=0.*"NixlConnector"'),
        (["lmcache", "nixl"], "--disaggregation-mode prefill or decode"),
        (["none"], "leave it out"),
        (["kvbm"], "--kv-transfer-config"),
    ],
)
def test_legacy_connector_answers_with_the_new_form(names: list[str], answer: str) -> None:
    with pytest.raises(SettingError, match=answer):
        flags.check_connector(names)


def test_no_connector_no_answer() -> None:
    flags.check_connector([])
