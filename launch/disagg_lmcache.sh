#!/usr/bin/env bash
# Serve one model with prefill and decode apart: a Dynamo frontend, a decode worker, and a prefill worker that carries the
# KV cache and hands what it computed or loaded to the decode worker over NIXL. Ctrl-C stops all.
#
#   launch/disagg_lmcache.sh [flags of the workers]
#
#   MODEL            folder, or name on the Hugging Face hub (default: Qwen/Qwen3-0.6B with a GPU, else launch/demo_model)
#   HTTP_PORT        of the OpenAI API (default 8000); HTTP_HOST: its address (default 127.0.0.1)
#   ENABLE_LMCACHE   0: the prefill worker has no cache either (default 1)
#   DECODE_ENABLE_LMCACHE  1: the decode worker carries a cache of its own, too (default 0)
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
export ENABLE_LMCACHE=$prefill_cache
set_up
choose_model "$@"
choose_network 2
publish_nothing
open_run
start_services
check_machine
start_frontend --router-mode round-robin
export ENABLE_LMCACHE=$decode_cache
start_worker decode 0 --is-decode-worker "$@"
wait_until_serving decode
export ENABLE_LMCACHE=$prefill_cache
start_worker prefill 1 --is-prefill-worker "$@"
wait_until_listed
show_example
say "Ctrl-C stops it"
supervise
