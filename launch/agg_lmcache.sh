#!/usr/bin/env bash
# Serve one model with the KV cache on: a Dynamo frontend and one vLLM worker, on this machine. Ctrl-C stops both.
#
#   launch/agg_lmcache.sh [flags of the worker]
#
#   MODEL            folder, or name on the Hugging Face hub (default: Qwen/Qwen3-0.6B with a GPU, else launch/demo_model)
#   HTTP_PORT        of the OpenAI API (default 8000); HTTP_HOST: its address (default 127.0.0.1)
#   ENABLE_LMCACHE   0 serves without the cache (default 1)
#   LMCACHE_*        settings of the cache; README.md has the table
#   DYN_SYSTEM_PORT  of the worker's health and metrics (default 8081)
#   DYN_DISCOVERY_BACKEND  file (default: one machine, nothing to start) or etcd (then NATS carries requests and events;
#                    both are started on loopback where they are installed and do not run)
#   VENV, DEVICE     see launch/setup.sh
#   LOG_DIR          where the logs go (default: a temporary folder, removed on Ctrl-C)
#
# The worker's flags: .venv/bin/python -m dynamo_lmcache.vllm --help
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1-} in -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac

export ENABLE_LMCACHE=${ENABLE_LMCACHE:-1}
set_up
choose_model "$@"
choose_network 1
publish_nothing
open_run
start_services
check_machine
start_frontend --router-mode round-robin
start_worker worker 0 "$@"
wait_until_listed
show_example
say "Ctrl-C stops it"
supervise
