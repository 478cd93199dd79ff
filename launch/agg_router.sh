#!/usr/bin/env bash
# Serve one model from several workers behind Dynamo's KV router: each request goes to the worker that holds most of its
# prefix, on the GPU, in the cache's host memory, or on its disks. Ctrl-C stops all.
#
#   launch/agg_router.sh [flags of the workers]
#
#   MODEL            folder, or name on the Hugging Face hub (default: Qwen/Qwen3-0.6B with a GPU, else launch/demo_model)
#   HTTP_PORT        of the OpenAI API (default 8000); HTTP_HOST: its address (default 127.0.0.1)
#   WORKERS          how many (default 2)
#   ENABLE_LMCACHE   0 serves without the cache (default 1)
#   ROUTER_FLAGS     more flags of the frontend; a KV hit in host memory counts 0.95 of one on the GPU unless they say otherwise
#   LMCACHE_*        settings of the cache; README.md has the table
#   DYN_SYSTEM_PORT  of the first worker's health and metrics (default 8081); the others take the ports that follow
#   DYN_DISCOVERY_BACKEND  file (default: one machine, nothing to start) or etcd (then NATS carries requests and events;
#                    both are started on loopback where they are installed and do not run)
#   VENV, DEVICE     see launch/setup.sh
#   LOG_DIR          where the logs go (default: a temporary folder, removed on Ctrl-C)
#
# Each worker gets cores or a GPU of its own; where there are fewer GPUs than workers, a part of one.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1-} in -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac

export ENABLE_LMCACHE=${ENABLE_LMCACHE:-1}
set_up
choose_model "$@"
choose_network "${WORKERS:-2}"
open_run
start_services
check_machine
# shellcheck disable=SC2086 # several flags
start_frontend --router-mode kv $HOST_HITS ${ROUTER_FLAGS:-}
for ((i = 0; i < WORKERS; i++)); do
    start_worker "worker$i" "$i" "$@"
    wait_until_serving "worker$i" # one after the other: each start needs the whole machine for a while
done
wait_until_listed
show_example
say "Ctrl-C stops it"
supervise
