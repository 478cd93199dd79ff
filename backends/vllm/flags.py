"""Dynamo's own flags for a vLLM worker: each one supported, or refused by name with the reason.

``docs/flags.md`` is this table in prose, and a test compares both with the installed Dynamo.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_lmcache.vllm.settings import SettingError

_MULTIMODAL = "this worker serves text models; multimodal requests are answered with 400"
_POOLING = "this worker generates; embedding and classification models have no KV worth keeping"
_BENCHMARK = "Dynamo's self-benchmark replaces vLLM's scheduler; measure with benchmarks/ instead"
_GENERATED_MEDIA = "this worker generates text only"


@dataclass(frozen=True)
class Refused:
    """A flag we refuse when it is given a value other than ``default``."""

    default: Any
    reason: str


SUPPORTED: frozenset[str] = frozenset(
    (
        "--namespace",
        "--endpoint",
        "--discovery-backend",
        "--request-plane",
        "--response-plane",
        "--event-plane",
        "--connector",
        "--dyn-tool-call-parser",
        "--dyn-reasoning-parser",
        "--dyn-default-thinking-mode",
        "--exclude-tools-when-tool-choice-none",
        "--dyn-structural-tag",
        "--dyn-enable-structural-tag",
        "--dyn-structural-tag-scope",
        "--dyn-structural-tag-schema",
        "--custom-jinja-template",
        "--endpoint-types",
        "--health-check-payload",
        "--engine-request-limit",
        "--kv-state-endpoint",
        "--tcp-tls-cert-path",
        "--tcp-tls-key-path",
        "--tcp-tls-ca-cert-path",
        "--tcp-tls-insecure",
        "--tcp-tls-server-name",
        "--tcp-tls-handshake-timeout",
        "--tcp-tls-client-cert-path",
        "--tcp-tls-client-key-path",
        "--tcp-tls-client-ca-cert-path",
        "--nats-tls-ca-cert-path",
        "--nats-tls-insecure",
        "--nats-tls-client-cert-path",
        "--nats-tls-client-key-path",
        "--version",
        "--disaggregation-mode",
    )
)

REFUSED: Mapping[str, Refused] = {
    "--fpm-trace": Refused(False, "forward-pass traces come from Dynamo's own scheduler class"),
    "--dump-config-to": Refused(None, "the resolved configuration is logged at start instead"),
    "--use-vllm-tokenizer": Refused(False, "requests reach this worker as token ids"),
    "--enable-rl": Refused(False, "weight updates would leave cached KV of the old weights behind"),
    "--headless": Refused(False, "engines that span several machines are not supported"),
    "--realtime": Refused(False, "the realtime protocol is not supported"),
    "--model-express-url": Refused(None, "Dynamo itself ignores it; vLLM's ModelExpress plugin has its own settings"),
    "--gms-shadow-mode": Refused(False, "a shadow engine has no KV cache to connect to at start"),
    "--route-to-encoder": Refused(False, _MULTIMODAL),
    "--enable-multimodal": Refused(False, _MULTIMODAL),
    "--mm-prompt-template": Refused("USER: <image>\n<prompt> ASSISTANT:", _MULTIMODAL),
    "--frontend-decoding": Refused(False, _MULTIMODAL),
    "--custom-encoder-class": Refused(None, _MULTIMODAL),
    "--embedding-transfer-mode": Refused("nixl-write", _MULTIMODAL),
    "--multimodal-embedding-cache-capacity-gb": Refused(0, _MULTIMODAL),
    "--multimodal-embedding-cache-publisher": Refused(False, _MULTIMODAL),
    "--embedding-worker": Refused(False, _POOLING),
    "--embedding-frontend-tokenization": Refused(False, _POOLING),
    "--embedding-worker-processes": Refused(1, _POOLING),
    "--classify-worker": Refused(False, _POOLING),
    "--output-modalities": Refused(["text"], _GENERATED_MEDIA),
    "--media-output-fs-url": Refused("file:///tmp/dynamo_media", _GENERATED_MEDIA),
    "--media-output-http-url": Refused(None, _GENERATED_MEDIA),
    "--benchmark-mode": Refused(None, _BENCHMARK),
    "--benchmark-points-file": Refused(None, _BENCHMARK),
    "--prefill-max-new-token-samples": Refused(64, _BENCHMARK),
    "--prefill-max-kv-read-token-samples": Refused(16, _BENCHMARK),
    "--decode-max-kv-read-token-samples": Refused(128, _BENCHMARK),
    "--decode-max-batch-size-samples": Refused(128, _BENCHMARK),
    "--prefix-max-batch-size-samples": Refused(3, _BENCHMARK),
    "--benchmark-prefill-granularity": Refused(None, _BENCHMARK),
    "--benchmark-prefill-kv-read-granularity": Refused(None, _BENCHMARK),
    "--benchmark-prefill-batch-granularity": Refused(None, _BENCHMARK),
    "--benchmark-decode-length-granularity": Refused(None, _BENCHMARK),
    "--benchmark-decode-batch-granularity": Refused(None, _BENCHMARK),
    "--benchmark-randomize-kda-state": Refused(False, _BENCHMARK),
    "--benchmark-hybrid-live-state": Refused(False, _BENCHMARK),
    "--benchmark-warmup-iterations": Refused(5, _BENCHMARK),
    "--benchmark-output-path": Refused("/tmp/benchmark_results.json", _BENCHMARK),
    "--benchmark-collect-imbalanced": Refused(False, _BENCHMARK),
    "--benchmark-timeout": Refused(900, _BENCHMARK),
    "--benchmark-max-batch-size": Refused(None, _BENCHMARK),
}

# What `--connector NAME` of older Dynamo releases means today.
LEGACY_CONNECTORS: Mapping[str, dict[str, str]] = {
    "lmcache": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
    "nixl": {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
}


def check_refused(values: Mapping[str, Any]) -> None:
    """Refuse the first flag of ``REFUSED`` that was given, on the command line or as a variable.

    Args:
        values: flag to parsed value, for the flags that the installed Dynamo has.

    Raises:
        SettingError: naming the flag, its value and the reason.
    """
    for flag, value in values.items():
        refused = REFUSED.get(flag)
        if refused is not None and value != refused.default:
            raise SettingError(f"{flag} {value!r} (or its DYN_ variable) is refused: {refused.reason}")


def check_unknown(flags: Iterable[str], argv: Iterable[str]) -> None:
    """Refuse flags that a newer Dynamo has and this table does not know.

    Raises:
        SettingError: naming the flag.
    """
    given = {word.partition("=")[0] for word in argv}
    for flag in flags:
        if flag not in SUPPORTED and flag not in REFUSED and flag in given:
            raise SettingError(f"{flag} is refused: the installed Dynamo has it, and this worker does not know it yet")


def check_connector(names: Iterable[str]) -> None:
    """Answer the legacy ``--connector`` with the form that replaced it.

    Raises:
        SettingError: whenever any name is given.
    """
    wanted = [name.strip().lower() for name in names if name.strip()]
    if not wanted:
        return
    instead = "leave it out, and set ENABLE_LMCACHE=0"
    if wanted == ["lmcache"]:
        instead = "set ENABLE_LMCACHE=1, or give " + _transfer_json([LEGACY_CONNECTORS["lmcache"]])
    elif set(wanted) == {"lmcache", "nixl"}:
        instead = "set ENABLE_LMCACHE=1 and --disaggregation-mode prefill or decode"
    elif wanted == ["nixl"]:
        instead = "set ENABLE_LMCACHE=0, or give " + _transfer_json([LEGACY_CONNECTORS["nixl"]])
    elif not set(wanted) <= {"none", "null"}:
        instead = "give --kv-transfer-config with the connector's own name"
    raise SettingError(f"--connector {' '.join(wanted)} (or DYN_CONNECTOR) is no longer a flag: {instead}")


def _transfer_json(connectors: list[dict[str, str]]) -> str:
    fields = ", ".join(f'"{key}": "{value}"' for key, value in connectors[0].items())
    return f"--kv-transfer-config '{{{fields}}}'"
