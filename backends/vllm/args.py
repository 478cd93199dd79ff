"""The worker's command line: vLLM's engine flags, Dynamo's flags, and ours, to one ``WorkerConfig``."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup, DynamoRuntimeConfig
from dynamo.common.configuration.utils import split_served_model_names
from dynamo.vllm.backend_args import DynamoVllmArgGroup
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from dynamo_lmcache.vllm import flags, transfer
from dynamo_lmcache.vllm.settings import SettingError, parse_switch
from dynamo_lmcache.vllm.transfer import Role

logger = logging.getLogger(__name__)

_COMPONENTS = {Role.AGGREGATED: "backend", Role.DECODE: "backend", Role.PREFILL: "prefill"}
_ROLES = {"agg": Role.AGGREGATED, "pd": Role.AGGREGATED, "prefill": Role.PREFILL, "decode": Role.DECODE}


@dataclass(frozen=True)
class WorkerConfig:
    """Everything a worker was told, validated. ``engine_args`` already holds the KV connector."""

    model: str
    served_name: str
    aliases: tuple[str, ...]
    role: Role
    namespace: str
    component: str
    endpoint: str
    runtime: DynamoRuntimeConfig
    engine_args: AsyncEngineArgs
    router_config: Any
    lmcache: bool
    publish_kv_events: bool
    publish_load: bool
    warmup: bool | None
    drain_timeout_s: float

    def endpoint_path(self, name: str | None = None) -> str:
        """Return ``namespace.component.name``; the generate endpoint's without ``name``."""
        return f"{self.namespace}.{self.component}.{name or self.endpoint}"

    @property
    def transfer_config(self) -> dict[str, Any]:
        """The KV connector's configuration as keyword arguments; empty without a connector."""
        config = self.engine_args.kv_transfer_config
        if config is None:
            return {}
        return {"kv_connector": config.kv_connector, "kv_connector_extra_config": config.kv_connector_extra_config}


def parse_args(argv: list[str]) -> WorkerConfig:
    """Parse and check a worker's command line and the environment variables behind it.

    Raises:
        SettingError: for a refused flag or a bad value, with what to do instead.
        SystemExit: from argparse, for unknown flags and ``--help``.
    """
    lmcache = parse_switch("ENABLE_LMCACHE", os.environ.get("ENABLE_LMCACHE"), default=False)
    parser, vllm_parser, dynamo_flags = _build_parsers()
    known, rest = parser.parse_known_args(argv)
    flags.check_unknown(dynamo_flags, argv)
    flags.check_refused({flag: getattr(known, dest) for flag, dest in dynamo_flags.items() if hasattr(known, dest)})
    flags.check_connector(known.connector)
    _check_migration_limit(known.migration_limit)
    router_config, rest = _parse_router(rest)
    runtime = DynamoRuntimeConfig.from_cli_args(known)
    runtime.validate()
    if (limit := getattr(runtime, "engine_request_limit", None)) is not None:
        os.environ["DYN_ENGINE_REQUEST_LIMIT"] = str(limit)  # which is what Dynamo's runtime reads
    role = resolve_role(known.disaggregation_mode, prefill=known.is_prefill_worker, decode=known.is_decode_worker)
    vllm_args = vllm_parser.parse_args(rest)
    model = vllm_args.model
    engine_args = _engine_args(vllm_args)
    _set_connector(engine_args, role, lmcache=lmcache, argv=argv)
    return _assemble(known, runtime, engine_args, model=model, role=role, lmcache=lmcache, router_config=router_config)


def _engine_args(vllm_args: argparse.Namespace) -> AsyncEngineArgs:
    try:
        return AsyncEngineArgs.from_cli_args(vllm_args)
    except OSError as error:  # with HF_HUB_OFFLINE the model is looked up right here
        raise SettingError(
            f"--model {vllm_args.model!r} is neither a directory nor a model that can be fetched from here: {error}"
        ) from error


def resolve_role(mode: str | None, *, prefill: bool, decode: bool) -> Role:
    """Combine ``--disaggregation-mode`` with its two aliases.

    Raises:
        SettingError: if they contradict each other, or for the encode role.
    """
    if mode is not None and mode not in _ROLES:
        raise SettingError(
            f"--disaggregation-mode {mode} is refused: this worker serves text; use agg, prefill or decode"
        )
    wanted = {_ROLES[mode]} if mode is not None else set()
    if prefill:
        wanted.add(Role.PREFILL)
    if decode:
        wanted.add(Role.DECODE)
    if len(wanted) > 1:
        raise SettingError(
            f"--disaggregation-mode {mode}, --is-prefill-worker={prefill} and --is-decode-worker={decode} contradict "
            "each other: give one of them"
        )
    return wanted.pop() if wanted else Role.AGGREGATED


def _build_parsers() -> tuple[argparse.ArgumentParser, FlexibleArgumentParser, dict[str, str]]:
    """Return our parser, vLLM's, and Dynamo's flags as flag to destination."""
    parser = argparse.ArgumentParser(
        prog="python -m dynamo_lmcache.vllm",
        description="Dynamo worker for vLLM that carries the LMCache-compatible KV cache",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    # Also the annotations of Dynamo's classes make these the flags of the installed release.
    DynamoRuntimeArgGroup().add_arguments(parser)
    DynamoVllmArgGroup().add_arguments(parser)
    dynamo_flags = {
        option: action.dest
        for action in parser._actions
        for option in action.option_strings[:1]
        if option not in ("-h", "--help")
    }
    _add_own_arguments(parser)
    vllm_parser = FlexibleArgumentParser(add_help=False)
    AsyncEngineArgs.add_cli_args(vllm_parser, async_args_only=False)
    # Shown by --help, parsed by vLLM's parser.
    engine_group = parser.add_argument_group("vLLM engine options")
    engine_group._group_actions.extend(action for action in vllm_parser._actions if action.option_strings)
    return parser, vllm_parser, dynamo_flags


def _add_own_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Worker options")
    group.add_argument("--is-prefill-worker", action="store_true", help="same as --disaggregation-mode prefill")
    group.add_argument("--is-decode-worker", action="store_true", help="same as --disaggregation-mode decode")
    group.add_argument(
        "--migration-limit",
        type=int,
        default=None,
        help="a frontend flag since Dynamo 1.0: refused here with that answer",
    )
    group.add_argument(
        "--publish-kv-events",
        action=argparse.BooleanOptionalAction,
        default=parse_switch("DYN_VLLM_PUBLISH_KV_EVENTS", os.environ.get("DYN_VLLM_PUBLISH_KV_EVENTS"), default=True),
        help="tell KV-aware routers which blocks this worker holds (env DYN_VLLM_PUBLISH_KV_EVENTS, default on)",
    )
    group.add_argument(
        "--publish-load",
        action=argparse.BooleanOptionalAction,
        default=parse_switch("DYN_VLLM_PUBLISH_LOAD", os.environ.get("DYN_VLLM_PUBLISH_LOAD"), default=True),
        help="tell routers how many blocks are in use and when a first token is out (env DYN_VLLM_PUBLISH_LOAD,\n"
        "default on)",
    )
    group.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=_optional_switch("DYN_VLLM_WARMUP"),
        help="sample once with every kind of option before the worker is listed, so that no user waits for\n"
        "lazy compilation (env DYN_VLLM_WARMUP, default: on the CPU platform only)",
    )
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=_seconds("DYN_VLLM_DRAIN_TIMEOUT_S", default=30.0),
        help="seconds that SIGTERM leaves to requests in flight (env DYN_VLLM_DRAIN_TIMEOUT_S, default 30)",
    )


def _optional_switch(name: str) -> bool | None:
    value = os.environ.get(name)
    return parse_switch(name, value, default=False) if value else None


def _seconds(name: str, *, default: float) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise SettingError(f"{name}={text!r} must be a number of seconds") from None


def _check_migration_limit(limit: int | None) -> None:
    if limit:
        raise SettingError(
            f"--migration-limit {limit} belongs to the frontend in this release of Dynamo: "
            f"python -m dynamo_lmcache.frontend --migration-limit {limit} (or DYN_MIGRATION_LIMIT={limit} there)"
        )


def _parse_router(rest: list[str]) -> tuple[Any, list[str]]:
    """Take the router flags that Dynamo 1.6 lets a worker advertise out of ``rest``."""
    try:
        from dynamo.common.configuration.groups.router_args import build_router_config, parse_worker_router_config
    except ImportError:  # Dynamo 1.4: only the frontend chooses
        return None, rest
    advertised, remainder = parse_worker_router_config(rest)
    return build_router_config(advertised), remainder


def _set_connector(engine_args: AsyncEngineArgs, role: Role, *, lmcache: bool, argv: list[str]) -> None:
    """Put the connector of ``role`` into ``engine_args``, unless the user gave one."""
    given = engine_args.kv_transfer_config
    if given is not None:
        named = {"kv_connector": given.kv_connector, "kv_connector_extra_config": given.kv_connector_extra_config}
        says_policy = any("kv_load_failure_policy" in word for word in (*argv, *_config_files(argv)))
        if transfer.uses(named, transfer.OURS) and not says_policy:
            given.kv_load_failure_policy = "recompute"
        logger.info("--kv-transfer-config is given and wins over ENABLE_LMCACHE and the role")
        return
    if getattr(engine_args, "kv_offloading_size", None):
        if role is not Role.AGGREGATED:
            raise SettingError(
                f"--kv-offloading-size leaves no place for NIXL, which a {role.value} worker needs: "
                "give --kv-transfer-config with a MultiConnector instead"
            )
        logger.info("--kv-offloading-size is given and wins over ENABLE_LMCACHE: vLLM makes its own connector of it")
        return
    config = transfer.connector_config(role, lmcache=lmcache)
    engine_args.kv_transfer_config = None if config is None else KVTransferConfig(**config)


def _config_files(argv: list[str]) -> list[str]:
    """What stands in the files that vLLM's ``--config`` names; it has read them by now."""
    names = [after for word, after in itertools.pairwise(argv) if word == "--config"]
    return [Path(name).read_text() for name in names if Path(name).is_file()]


def _assemble(
    known: argparse.Namespace,
    runtime: DynamoRuntimeConfig,
    engine_args: AsyncEngineArgs,
    *,
    model: str,
    role: Role,
    lmcache: bool,
    router_config: Any,
) -> WorkerConfig:
    if known.drain_timeout < 0:
        raise SettingError(f"--drain-timeout {known.drain_timeout} must not be negative")
    names = split_served_model_names(engine_args.served_model_name) or [model]
    namespace, component, endpoint = _address(runtime, role)
    runtime.custom_jinja_template = _template(runtime.custom_jinja_template)
    engine_args.served_model_name = names
    engine_args.enable_log_requests = False
    if engine_args.enable_prefix_caching is None:
        engine_args.enable_prefix_caching = True
    return WorkerConfig(
        model=model,
        served_name=names[0],
        aliases=tuple(names[1:]),
        role=role,
        namespace=namespace,
        component=component,
        endpoint=endpoint,
        runtime=runtime,
        engine_args=engine_args,
        router_config=router_config,
        lmcache=lmcache,
        publish_kv_events=known.publish_kv_events,
        publish_load=known.publish_load,
        warmup=known.warmup,
        drain_timeout_s=known.drain_timeout,
    )


def _address(runtime: DynamoRuntimeConfig, role: Role) -> tuple[str, str, str]:
    if runtime.endpoint is None:
        return runtime.namespace, _COMPONENTS[role], "generate"
    parts = runtime.endpoint.removeprefix("dyn://").split(".")
    if len(parts) != 3 or not all(parts):
        raise SettingError(
            f"--endpoint {runtime.endpoint!r} must read namespace.component.endpoint, with or without dyn://"
        )
    return parts[0], parts[1], parts[2]


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    expanded = Path(os.path.expandvars(path)).expanduser()
    if not expanded.is_file():
        raise SettingError(f"--custom-jinja-template {path!r} is not a file")
    return str(expanded)
