"""Upstream's setting names: aliases that resolve to ours, and keys that we know of but do not have."""

from __future__ import annotations

ALIASES: dict[str, str] = {
    "enable_nixl": "enable_pd",
    "enable_xpyd": "enable_pd",
    "nixl_role": "pd_role",
    "nixl_peer_host": "pd_peer_host",
    "nixl_peer_init_port": "pd_peer_init_port",
    "nixl_peer_alloc_port": "pd_peer_alloc_port",
    "nixl_proxy_host": "pd_proxy_host",
    "nixl_proxy_port": "pd_proxy_port",
    "nixl_buffer_size": "pd_buffer_size",
    "nixl_buffer_device": "pd_buffer_device",
    "controller_url": "controller_pull_url",
    "external_backends": "storage_plugins",
    "plugin_locations": "runtime_plugin_locations",
}

# Read by the process around the engine, not by the engine: no warning when they appear in the environment.
NOT_SETTINGS = frozenset(
    {"config_file", "runtime_dir", "disable_plugin", "track_usage", "log_level", "request_telemetry_type",
     "request_telemetry_endpoint", "nixl_sleep_us", "worker_pid"}
)  # fmt: skip

# Settings of upstream's that change what is cached or where. Ignoring one silently would surprise; each gets a warning.
KNOWN_UPSTREAM = frozenset(
    """
    local_disk_path_sharding remote_storage_plugins use_layerwise blocking_timeout_secs enable_async_loading
    enable_scheduler_bypass_lookup lookup_server_worker_ids external_lookup_client blend_check_layers
    blend_recompute_ratios blend_thresholds blend_min_tokens blend_special_str enable_controller lmcache_instance_id
    controller_pull_url controller_reply_url lmcache_worker_ports lmcache_worker_heartbeat_time enable_p2p p2p_host
    p2p_init_ports p2p_lookup_ports pd_peer_query_port pd_backend_mode pd_shutdown_timeout_sec
    pd_condition_poll_interval_sec pd_max_prefill_len pd_bidirectional gds_path_sharding gds_buffer_size use_gds
    gds_backend maru_path maru_pool_size internal_api_server_enabled internal_api_server_host
    internal_api_server_port_start internal_api_server_include_index_list internal_api_server_socket_path_prefix
    pin_timeout_sec pin_check_interval_sec enable_kv_events use_gpu_connector_v3 py_enable_gc priority_limit
    hit_miss_ratio enable_lazy_memory_allocator enable_chunk_statistics enable_hidden_state_cache remote_config_url
    storage_plugins runtime_plugin_locations run_script_api_enabled script_allowed_imports extra_config
    pre_caching_hash_algorithm reserve_local_cpu_size local_cpu_use_hugepages numa_mode
    """.split()  # noqa: SIM905 - a table of words
)
