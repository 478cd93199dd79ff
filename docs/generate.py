"""Writes what the code knows better than a person: `reference.md`, and the tables in `migration.md`.

python docs/generate.py            # after a change of settings or metrics; tests/docs says when
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from lmcache_ext.config import EngineConfig, settings
from lmcache_ext.config.names import ALIASES, KNOWN_UPSTREAM, NOT_SETTINGS
from lmcache_ext.metrics import CATALOGUE
from lmcache_ext.policies import POLICIES

HERE = Path(__file__).parent

# All settings of LMCache 0.5.6's in-process engine; below, its defaults where ours differ.
UPSTREAM = KNOWN_UPSTREAM | frozenset(
    """
    chunk_size local_cpu max_local_cpu_size cache_policy save_decode_cache save_unfull_chunk min_retrieve_tokens
    enable_blending local_disk max_local_disk_size local_disk_path_sharding remote_url remote_serde
    remote_storage_plugins gds_path gds_path_sharding gds_buffer_size use_gds gds_backend extra_config
    blocking_timeout_secs enable_pd pd_role pd_peer_host pd_peer_init_port pd_peer_alloc_port pd_peer_query_port
    pd_proxy_host pd_proxy_port pd_buffer_size pd_buffer_device enable_p2p p2p_host p2p_init_ports p2p_lookup_ports
    storage_plugins
    """.split()  # noqa: SIM905 - a table of words
)
DEFAULTS: dict[str, object] = {"max_local_cpu_size": 5.0, "save_unfull_chunk": False}
# Its counters (without _total), gauges and histograms, as far as anybody builds dashboards on them.
UPSTREAM_METRICS = """
    num_retrieve_requests num_store_requests num_lookup_requests num_requested_tokens num_hit_tokens num_stored_tokens
    num_lookup_tokens num_lookup_hits num_vllm_hit_tokens num_prompt_tokens num_remote_read_requests
    num_remote_read_bytes num_remote_write_requests num_remote_write_bytes local_cpu_evict_count
    local_cpu_evict_keys_count local_cpu_evict_failed_count forced_unpin_count lookup_0_hit_requests
    num_slow_retrieval_by_time num_slow_retrieval_by_speed put_failed_count get_blocking_failed_count
    retrieve_hit_rate lookup_hit_rate local_cache_usage remote_cache_usage local_storage_usage
    active_memory_objs_count pinned_memory_objs_count local_cpu_hot_cache_count local_cpu_keys_in_request_count
    remote_put_task_num kv_msg_queue_size remote_ping_latency remote_ping_errors remote_ping_successes
    remote_ping_error_code lmcache_is_healthy pin_monitor_pinned_objects_count periodic_threads_total_count
    periodic_threads_running_count periodic_threads_active_count time_to_retrieve time_to_store time_to_lookup
    retrieve_process_tokens_time retrieve_broadcast_time retrieve_to_gpu_time store_process_tokens_time
    store_from_gpu_time store_put_time retrieve_speed store_speed remote_time_to_get remote_time_to_put
    remote_time_to_get_sync remote_backend_batched_get_blocking_time p2p_time_to_transfer p2p_transfer_speed
    request_cache_hit_rate request_cache_lifespan
    """.split()  # noqa: SIM905 - a table of words


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def explanations() -> dict[str, str]:
    """The string below each field of EngineConfig, which Python itself throws away."""
    (tree,) = ast.parse(inspect.getsource(settings.EngineConfig)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def kind(field: FieldInfo) -> str:
    """Its type, and the bounds on it."""
    text = re.sub(r"typing\.|NoneType|<class '(\w+)'>", r"\1", str(field.annotation)).strip()
    bounds = [f"{sign} {getattr(part, name)}" for part in field.metadata for sign, name in SIGNS if hasattr(part, name)]
    inner = re.findall(r"(Gt|Ge|Lt|Le)\(\w+=([\d.]+)\)", text)
    bounds += [f"{SHORT[name]} {value}" for name, value in inner]
    text = re.sub(r"Annotated\[(\w+),.*\]", r"\1", text).replace("Optional[", "").replace("]", "").split(" | ")[0]
    return ", ".join([text.replace("Literal[", ""), *bounds])


SIGNS = ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le"))
SHORT = {"Gt": ">", "Ge": "≥", "Lt": "<", "Le": "≤"}


def setting_rows() -> Iterator[tuple[str, ...]]:
    """One row a setting."""
    told = explanations()
    for name, field in EngineConfig.model_fields.items():
        allowed = ", ".join(POLICIES) if name == "cache_policy" else kind(field)
        also = ", ".join(f"`{alias}`" for alias, ours in ALIASES.items() if ours == name)
        yield f"`{name}`", f"`LMCACHE_{name.upper()}`", allowed, f"`{field.default}`", told.get(name, ""), also


def reference() -> str:
    """The whole of reference.md."""
    head = ("YAML", "environment", "allowed", "default", "meaning", "also called")
    metrics = ((f"`lmcache:{m.name}`", m.kind, m.help) for m in CATALOGUE.values())
    return f"""# Reference

Written by `python docs/generate.py` from the code. [settings.md](settings.md) explains the settings,
[metrics.md](metrics.md) the metrics. In vLLM's `kv_connector_extra_config` a setting is `lmcache.` and its name.
`None`: the value is chosen at start, or follows from another setting.

## Settings

{table(head, setting_rows())}

Variables with the same prefix that are no settings of the engine, and not warned about:
{", ".join(f"`LMCACHE_{name.upper()}`" for name in sorted(NOT_SETTINGS))}.

## Metrics

{table(("name", "kind", "meaning"), metrics)}
"""


def verdicts() -> dict[str, tuple[str, str]]:
    """Each of upstream's settings and aliases → (what becomes of it, a note)."""
    fields, found = EngineConfig.model_fields, {}
    for name in sorted(UPSTREAM | ALIASES.keys()):
        target = ALIASES.get(name, name)
        if target not in fields:
            found[name] = ("no effect", "")
        elif target != name:
            found[name] = (f"renamed: `{target}`", "both names work, as in LMCache")
        elif name == "enable_blending":
            found[name] = ("refused if true", "CacheBlend does not exist here")
        elif name in DEFAULTS:
            found[name] = ("same", f"default {DEFAULTS[name]} there; here see [settings](settings.md)")
        else:
            default = fields[name].default
            found[name] = ("same", "" if default is None else f"default {default}")
    return found


def names(words: Iterable[str], prefix: str = "") -> str:
    """Words in code type, a comma apart."""
    return ", ".join(f"`{prefix}{word}`" for word in words)


def blocks() -> dict[str, str]:
    """The generated parts of migration.md, by the name in their markers."""
    found = verdicts()
    rows = ((f"`LMCACHE_{name.upper()}`", *told) for name, told in found.items() if told[0] != "no effect")
    idle = names(f"LMCACHE_{name.upper()}" for name, told in found.items() if told[0] == "no effect")
    ours = names(f"LMCACHE_{name.upper()}" for name in EngineConfig.model_fields if name not in UPSTREAM)
    same, absent = ([n for n in UPSTREAM_METRICS if (n in CATALOGUE) is there] for there in (True, False))
    return {
        "settings": table(("LMCache 0.5.6", "here", ""), rows)
        + f"\n\n**No effect, and a warning that says so:** {idle}.\n\n**Only here:** {ours}.",
        "metrics": f"**Same:** {names(same)}.\n\n**Absent:** {names(absent)}.\n\n"
        f"**Only here:** {names(n for n in CATALOGUE if n not in UPSTREAM_METRICS)}.",
    }


def fill(text: str) -> str:
    """`text` with what stands between each pair of markers replaced."""
    for name, body in blocks().items():
        start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{body}\n{end}{rest.split(end)[1]}"
    return text


def files() -> dict[Path, str]:
    """Each file and what it should hold."""
    migration = HERE / "migration.md"
    return {HERE / "reference.md": reference(), migration: fill(migration.read_text())}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
