"""Environment defaults that the worker and the frontend must agree on.

Nothing here overrides a variable that is set. Imports are light ones: the frontend
imports this module and must not pay for vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

from lmcache_ext.ports import free_port

Environment = MutableMapping[str, str]

_ON = frozenset({"1", "true", "yes", "on"})
_OFF = frozenset({"0", "false", "no", "off"})

# One machine: everything that listens or connects stays on loopback. DYN_TCP_RESPONSE_STREAM_HOST
# takes the name of an interface, not an address.
_LOOPBACK = {
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
    "DYN_EVENT_PLANE_HOST": "127.0.0.1",
    "DYN_SYSTEM_HOST": "127.0.0.1",
}
_WORKER_LOOPBACK = {
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
}
_MAX_SYSTEM_PORT = 2**15 - 1  # a signed 16-bit number in Dynamo; -1 turns it off
_SINGLE_MACHINE_BACKENDS = frozenset({"file", "mem"})
_DISTRIBUTED_PLANES = {"DYN_REQUEST_PLANE": "nats", "DYN_EVENT_PLANE": "nats"}

RUNTIME_ENDED = (
    "Dynamo's runtime has ended by itself. With etcd it does when it can't renew its lease of ETCD_LEASE_TTL seconds "
    "(10): etcd was away for too long, or came back without its data. Start this process again"
)


class SettingError(ValueError):
    """A setting has a value that cannot be used; the message names both and says what would do."""


def parse_switch(name: str, value: str | None, default: bool) -> bool:
    """Read an on/off variable.

    Args:
        name: the variable's name, for the message.
        value: its text, or None when it is not set. An empty text counts as not set.
        default: the answer when it is not set.

    Raises:
        SettingError: if the text is neither on nor off.
    """
    text = (value or "").strip().lower()
    if not text:
        return default
    if text in _ON:
        return True
    if text in _OFF:
        return False
    raise SettingError(f"{name}={value!r} is neither on nor off: use one of 1/true/yes/on or 0/false/no/off")


def apply_discovery_defaults(env: Environment, *, backend: str | None = None) -> None:
    """Choose discovery and planes, in place.

    Files on one machine with TCP requests when nothing is said. ``etcd`` brings NATS for requests
    and events, because Dynamo alone would leave requests on TCP and events on ZMQ.

    Args:
        env: the environment to complete.
        backend: ``--discovery-backend`` when given on the command line; it wins over the variable.
    """
    chosen = backend or env.get("DYN_DISCOVERY_BACKEND") or "file"
    env["DYN_DISCOVERY_BACKEND"] = chosen
    if chosen == "etcd":
        _fill(env, _DISTRIBUTED_PLANES)
    if chosen in _SINGLE_MACHINE_BACKENDS:
        _fill(env, _LOOPBACK)


def apply_worker_defaults(env: Environment, *, backend: str | None = None) -> None:
    """Complete the environment of a worker and of the vLLM processes that it spawns, in place.

    Raises:
        SettingError: for a system port that Dynamo cannot take.
    """
    _check_system_port(env.get("DYN_SYSTEM_PORT"))
    apply_discovery_defaults(env, backend=backend)
    if env["DYN_DISCOVERY_BACKEND"] in _SINGLE_MACHINE_BACKENDS:
        _fill(env, _WORKER_LOOPBACK)
    # vLLM forks by default; after the Rust runtime has started threads a fork would deadlock.
    _fill(env, {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1"})
    # Without the canary /health says ready for as long as the endpoint is registered.
    _fill(env, {"DYN_HEALTH_CHECK_ENABLED": "true"})


def apply_nixl_defaults(env: Environment, *, on_cpu: bool, own_address: Callable[[], str]) -> None:
    """Complete the environment of a worker whose connectors include NIXL, in place.

    A free side-channel port, so that two workers share a machine, and on the CPU platform a
    progress thread that sleeps (see ``nixl_cpu``) and transfers that stay on loopback if vLLM does.

    Args:
        own_address: where other machines reach this one. It is what workers elsewhere are told,
            unless the environment says otherwise: vLLM alone would tell them "localhost".

    Raises:
        SettingError: nobody knows that address.
    """
    if not env.get("VLLM_NIXL_SIDE_CHANNEL_HOST"):
        env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = address = own_address()
        if address == "0.0.0.0":
            raise SettingError(
                "VLLM_NIXL_SIDE_CHANNEL_HOST is not set, and this machine's own address can't be found out: set it to "
                "the one by which workers on other machines reach this one"
            )
    if "VLLM_NIXL_SIDE_CHANNEL_PORT" not in env:
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
    if on_cpu:
        _fill(env, {"LMCACHE_NIXL_SLEEP_US": "1000"})
        if env.get("VLLM_NIXL_SIDE_CHANNEL_HOST") == "127.0.0.1":
            _fill(env, {"UCX_NET_DEVICES": "lo"})


def backend_from_argv(argv: list[str]) -> str | None:
    """Return the value of ``--discovery-backend`` in ``argv``, or None.

    It is needed before the parsers exist, because they take their defaults from the environment.
    """
    for index, word in enumerate(argv):
        if word == "--discovery-backend" and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith("--discovery-backend="):
            return word.partition("=")[2]
    return None


def _check_system_port(text: str | None) -> None:
    if not text:
        return
    try:
        port = int(text)
    except ValueError:
        port = _MAX_SYSTEM_PORT + 1
    if port > _MAX_SYSTEM_PORT:
        raise SettingError(
            f"DYN_SYSTEM_PORT={text!r} must be a port up to {_MAX_SYSTEM_PORT}, which is all that Dynamo reads"
        )


def _fill(env: Environment, defaults: dict[str, str]) -> None:
    for name, value in defaults.items():
        env.setdefault(name, value)
