#!/usr/bin/env bash
# Serve one model with prefill and decode apart and several workers of each behind Dynamo's KV router: a prompt goes to
# the prefill worker that holds most of its prefix, on the GPU or in the cache's host memory. Ctrl-C stops all.
#
#   launch/disagg_router.sh [flags of the workers]
#
#   MODEL            folder, or name on the Hugging Face hub (default: Qwen/Qwen3-0.6B with a GPU, else launch/demo_model)
#   HTTP_PORT        of the OpenAI API (default 8000); HTTP_HOST: its address (default 127.0.0.1)
#   PREFILL_WORKERS, DECODE_WORKERS  how many (default 2 and 1)
#   ENABLE_LMCACHE   0: the prefill workers have no cache (default 1)
#   DECODE_ENABLE_LMCACHE  1: the decode workers carry a cache of their own, too (default 0)
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

prefill_cache=${ENABLE_LMCACHE:-1} decode_cache=${DECODE_ENABLE_LMCACHE:-0}
prefills=${PREFILL_WORKERS:-2} decodes=${DECODE_WORKERS:-1}
export ENABLE_LMCACHE=$prefill_cache
set_up
choose_model "$@"
[[ $prefills =~ ^[1-9][0-9]*$ && $decodes =~ ^[1-9][0-9]*$ ]] ||
    die "PREFILL_WORKERS=$prefills, DECODE_WORKERS=$decodes: both must be 1 or more"
choose_network $((prefills + decodes))
open_run
start_services
check_machine
# shellcheck disable=SC2086 # several flags
start_frontend --router-mode kv $HOST_HITS ${ROUTER_FLAGS:-}
export ENABLE_LMCACHE=$decode_cache
for ((i = 0; i < decodes; i++)); do
    start_worker "decode$i" "$i" --is-decode-worker "$@"
    wait_until_serving "decode$i" # one after the other: each start needs the whole machine for a while
done
export ENABLE_LMCACHE=$prefill_cache
for ((; i < WORKERS; i++)); do
    start_worker "prefill$((i - decodes))" "$i" --is-prefill-worker "$@"
    wait_until_serving "prefill$((i - decodes))"
done
wait_until_listed
show_example
say "Ctrl-C stops it"
supervise
