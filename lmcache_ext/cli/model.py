"""Doctor's look at MODEL: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from lmcache_ext.cli.finding import Finding, fail, ok, warn

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_TIMEOUT_S = 5
TRUE = frozenset({"1", "true", "yes", "on"})


def check_model(env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether MODEL can be found; silent when it is not set."""
    name = env.get("MODEL", "")
    if not name:
        return
    folder = Path(name).expanduser()
    if folder.is_dir():
        yield _folder(folder)
    elif folder.is_file():
        yield ok("model", f"{folder}, {folder.stat().st_size / 2**20:.1f} MiB")
    elif "://" in name or ":" in name:  # an object store, or a quantization's name behind the model's
        yield warn("model", f"MODEL={name} is looked up by vLLM alone", "vLLM says at its start whether it is there")
    elif name.startswith(("/", ".", "~")) or not HUB_NAME.fullmatch(name):
        yield fail("model", f"MODEL={name}: there is no such folder", "give a folder with config.json, or ORG/NAME")
    else:
        yield _hub(name, env)


def weight_bytes(env: Mapping[str, str]) -> int:
    """Bytes of the weights of a MODEL that is a folder; 0 for one that is not here."""
    name = env.get("MODEL", "")
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        return 0
    return sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern))


def _folder(folder: Path) -> Finding:
    if not (folder / "config.json").is_file():
        return fail("model", f"{folder} has no config.json", "give the folder that holds config.json and the weights")
    size = weight_bytes({"MODEL": str(folder)})
    if not size:
        text = f"{folder} has no weights ({', '.join(WEIGHTS)})"
        return warn("model", text, "complete the download; only --load-format dummy starts without them")
    return ok("model", f"{folder}, {size / 2**20:.1f} MiB of weights")


def _hub(name: str, env: Mapping[str, str]) -> Finding:
    if _cached(name, env):
        return ok("model", f"{name}, in the hub's cache on this machine")
    if env.get("HF_HUB_OFFLINE", "").lower() in TRUE:
        text = f"{name} is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set"
        return fail("model", text, "download it first, or set MODEL to a folder")
    endpoint = env.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        request = urllib.request.Request(f"{endpoint}/{name}/resolve/main/config.json", method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return ok("model", f"{name}, to be downloaded from {endpoint} at the first start")
    except urllib.error.HTTPError as error:
        return _refused(name, endpoint, error.code)
    except OSError as error:
        text = f"{name} is neither a folder nor in the hub's cache, and {endpoint} can't be reached: {error}"
        return fail("model", text, "set MODEL to a folder that holds the model")


def _refused(name: str, endpoint: str, status: int) -> Finding:
    if status in (401, 403):
        return warn("model", f"{endpoint} answers {status} for {name}", "check the name; a gated model needs HF_TOKEN")
    return fail("model", f"{endpoint} answers {status} for {name}", "check the name, or set MODEL to a folder")


def _cached(name: str, env: Mapping[str, str]) -> bool:
    home = Path(env.get("HF_HOME") or Path(env.get("HOME", "~")) / ".cache" / "huggingface")
    hub = Path(env.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return any((hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json"))
