#!/usr/bin/env bash
# Serve one model with prefill and decode apart, on plain `vllm serve`: a Mooncake master, a cache server over Mooncake Store, a
# proxy, a prefiller and a decoder, all on this machine. What the prefiller computes is in the server's memory when the
# decoder begins. LMCache's page "Disaggregated Serving with Mooncake Store [MP]" as one script. Ctrl-C stops all.
#
#   launch/disagg_mp_mooncake.sh [MODEL] [flags of both vllm serve]
#
#   MODEL                folder, or name on the Hugging Face hub (default: Qwen/Qwen3-4B with a GPU, else launch/demo_model)
#   HTTP_PORT            of the OpenAI API, which is the proxy's (default 8000); HTTP_HOST: its address (default 127.0.0.1)
#   PREFILL_PORT, DECODE_PORT, TELEMETRY_PORT, SERVER_PORT, SERVER_HTTP_PORT, MASTER_PORT, MASTER_METRICS_PORT
#                        of the others (default 8100, 8200, 5768, 5555, 8080, 50051, 9003); all on loopback
#   L2                   below the server's memory: mooncake (default), none, or the JSON of another --l2-adapter
#   L1_SIZE_GB           the server's memory (default: 32 with a GPU, else 1)
#   LOCAL_HOSTNAME, MOONCAKE_PROTOCOL, RDMA_DEVICES  how Mooncake moves bytes (default 127.0.0.1, tcp, none); rdma with
#                        the names of the devices where there are any
#   MOONCAKE_SEGMENT_SIZE, MOONCAKE_BUFFER_SIZE      bytes that the server gives to the store's pool, and for its
#                        transfers (default: 30 GiB and 1 GiB with a GPU, else 512 and 64 MiB)
#   PREFILL_FLAGS, DECODE_FLAGS, PROXY_FLAGS  more flags of one of them
#   LMCACHE_*            settings of the engines' side; README.md has the table
#   VENV, DEVICE         see launch/setup.sh
#   LOG_DIR              where the logs go (default: a temporary folder, removed on Ctrl-C)
#
# Each engine gets cores or a GPU of its own; where there is only one GPU, half of it. Mooncake's client in the cache server
# listens on all interfaces, whatever it is told; all else stays on loopback.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1-} in -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac

if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    MODEL=$1
    shift
fi

PORTS=(HTTP_PORT PREFILL_PORT DECODE_PORT TELEMETRY_PORT SERVER_PORT SERVER_HTTP_PORT)
HTTP_HOST=${HTTP_HOST:-127.0.0.1} HTTP_PORT=${HTTP_PORT:-8000}
PREFILL_PORT=${PREFILL_PORT:-8100} DECODE_PORT=${DECODE_PORT:-8200} TELEMETRY_PORT=${TELEMETRY_PORT:-5768}
SERVER_PORT=${SERVER_PORT:-5555} SERVER_HTTP_PORT=${SERVER_HTTP_PORT:-8080}
MASTER_PORT=${MASTER_PORT:-50051} MASTER_METRICS_PORT=${MASTER_METRICS_PORT:-9003}
L2=${L2:-mooncake}
LOCAL_HOSTNAME=${LOCAL_HOSTNAME:-127.0.0.1} MOONCAKE_PROTOCOL=${MOONCAKE_PROTOCOL:-tcp} RDMA_DEVICES=${RDMA_DEVICES:-}
WORKERS=2 DYN_DISCOVERY_BACKEND=none # there is no Dynamo here

choose_sizes() {
    local gib=$((1 << 30)) mib=$((1 << 20))
    if [ "$device" = cuda ]; then
        L1_SIZE_GB=${L1_SIZE_GB:-32}
        MOONCAKE_SEGMENT_SIZE=${MOONCAKE_SEGMENT_SIZE:-$((30 * gib))} MOONCAKE_BUFFER_SIZE=${MOONCAKE_BUFFER_SIZE:-$gib}
    else
        L1_SIZE_GB=${L1_SIZE_GB:-1}
        MOONCAKE_SEGMENT_SIZE=${MOONCAKE_SEGMENT_SIZE:-$((512 * mib))} MOONCAKE_BUFFER_SIZE=${MOONCAKE_BUFFER_SIZE:-$((64 * mib))}
    fi
}

check_ports() {
    local name
    declare -A taken=()
    for name in "${PORTS[@]}"; do
        [ -z "${taken[${!name}]:-}" ] || die "$name=${!name}: ${taken[${!name}]} has that port"
        taken[${!name}]=$name
        ! listens "127.0.0.1:${!name}" "" || die "$name=${!name}: something listens there already; set $name to another port"
    done
}

find_master() { # prints Mooncake's binary, or what is missing
    "$VENV/bin/python" -P -c 'import sys
from pathlib import Path
from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.mooncake_client import library
try:
    print(Path(library().__file__).with_name("mooncake_master"))
except ConfigError as error:
    print(error)
    sys.exit(1)'
}

# ADAPTER: the flags of the server for what is below its memory. MASTER: Mooncake's binary, if it is needed.
choose_l2() {
    ADAPTER=() MASTER=
    case $L2 in
        none) ;;
        mooncake)
            PORTS+=(MASTER_PORT MASTER_METRICS_PORT)
            MASTER=$(find_master) || die "L2=mooncake: $MASTER" "or go without: L2=none"
            ADAPTER=(--l2-adapter "{\"type\": \"mooncake_store\", \"local_hostname\": \"$LOCAL_HOSTNAME\",
                \"metadata_server\": \"P2PHANDSHAKE\", \"protocol\": \"$MOONCAKE_PROTOCOL\", \"rdma_devices\": \"$RDMA_DEVICES\",
                \"global_segment_size\": $MOONCAKE_SEGMENT_SIZE, \"local_buffer_size\": $MOONCAKE_BUFFER_SIZE,
                \"master_server_addr\": \"127.0.0.1:$MASTER_PORT\"}") ;;
        '{'*) ADAPTER=(--l2-adapter "$L2") ;;
        *) die "L2=$L2 is not one of mooncake, none, {\"type\": …}" ;;
    esac
}

get() { # get HOST:PORT PATH: the answer, with its head
    { exec 3<>"/dev/tcp/${1%:*}/${1##*:}" && printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$2" >&3 &&
        timeout 5 cat <&3; } 2>/dev/null
}

answers() { # answers HOST:PORT PATH: whether GET there says 200
    local answer
    answer=$(get "$@") && [[ $answer == "HTTP/1."?" 200 "* ]]
}

knows_all() { # knows_all HOST:PORT: whether the proxy there has found every engine; it looks once a second
    local answer
    answer=$(get "$1" /health) && [[ $answer == *'"status": "ok"'* ]]
}

start_master() {
    [ -n "$MASTER" ] || return 0
    start master "$MASTER" -v=1 --rpc_address=127.0.0.1 --rpc_port="$MASTER_PORT" \
        --metrics_host=127.0.0.1 --metrics_port="$MASTER_METRICS_PORT"
    wait_for "Mooncake's master" listens "127.0.0.1:$MASTER_PORT" ""
}

start_server() {
    start server "$VENV/bin/lmcache-ext" server --host 127.0.0.1 --port "$SERVER_PORT" \
        --http-host 127.0.0.1 --http-port "$SERVER_HTTP_PORT" --l1-size-gb "$L1_SIZE_GB" --eviction-policy LRU \
        --no-l1-use-lazy ${ADAPTER[@]+"${ADAPTER[@]}"}
    wait_for "the cache server" answers "127.0.0.1:$SERVER_HTTP_PORT" /healthcheck
}

start_proxy() {
    # shellcheck disable=SC2086 # several flags
    start proxy "$VENV/bin/python" -P -m dynamo_lmcache.proxy --host "$HTTP_HOST" --port "$HTTP_PORT" \
        --prefiller-host 127.0.0.1 --prefiller-port "$PREFILL_PORT" --decoder-host 127.0.0.1 --decoder-port "$DECODE_PORT" \
        --telemetry-host 127.0.0.1 --telemetry-port "$TELEMETRY_PORT" ${PROXY_FLAGS:-}
}

# By its module, which is what `vllm serve` runs: the CPU wheel's own command does not start on some machines.
start_engine() { # start_engine NAME INDEX PORT VARIABLE=VALUE... -- FLAGS...
    local name=$1 index=$2 port=$3 variables=()
    shift 3
    while [ "$1" != -- ]; do variables+=("$1"); shift; done
    shift
    choose_share "$index" "$@"
    [ ${#fit[@]} -gt 0 ] || fit=(--gpu-memory-utilization 0.8)
    local connector="{\"kv_connector\": \"LMCacheMPConnector\", \"kv_role\": \"kv_both\", \"kv_connector_extra_config\":
        {\"lmcache.mp.host\": \"tcp://127.0.0.1\", \"lmcache.mp.port\": $SERVER_PORT}}"
    start "$name" env VLLM_NO_USAGE_STATS=1 VLLM_HOST_IP="${VLLM_HOST_IP:-127.0.0.1}" "${variables[@]}" "${share[@]}" \
        "$VENV/bin/python" -P -m vllm.entrypoints.openai.api_server "${MODEL_FLAGS[@]}" --host 127.0.0.1 --port "$port" \
        "${fit[@]}" --no-enable-log-requests --no-enable-prefix-caching \
        --enable-prompt-tokens-details --kv-transfer-config "$connector" "$@"
}

share_a_gpu() { # share_a_gpu FLAGS...: whether the engines do
    local cards=()
    [ "$device" = cuda ] || return 1
    list_cards
    [ $((WORKERS * $(ranks_of "$@"))) -gt ${#cards[@]} ]
}

start_engines() { # both at once, unless they share a GPU: vLLM measures how much of its memory is free
    # shellcheck disable=SC2086 # several flags
    start_engine prefiller 0 "$PREFILL_PORT" LMCACHE_REQUEST_TELEMETRY_TYPE=fastapi \
        LMCACHE_REQUEST_TELEMETRY_ENDPOINT="http://127.0.0.1:$TELEMETRY_PORT/api/v1/telemetry" -- "$@" ${PREFILL_FLAGS:-}
    # shellcheck disable=SC2086 # several flags
    ! share_a_gpu "$@" ${PREFILL_FLAGS:-} || wait_for "the prefiller" answers "127.0.0.1:$PREFILL_PORT" /health
    # shellcheck disable=SC2086
    start_engine decoder 1 "$DECODE_PORT" LMCACHE_REQUEST_TELEMETRY_TYPE=noop -- "$@" ${DECODE_FLAGS:-}
    wait_for "the prefiller" answers "127.0.0.1:$PREFILL_PORT" /health
    wait_for "the decoder" answers "127.0.0.1:$DECODE_PORT" /health
    local proxy; proxy=$(base_url)
    wait_for "the proxy" knows_all "${proxy#http://}"
}

show_requests() {
    if [ "$MODEL" = "$DEMO_MODEL" ]; then
        local prompt expect
        { IFS= read -r prompt; read -r expect; } < <("$VENV/bin/python" "$ROOT/launch/example_prompt.py")
        say "ready; run this twice:"
        printf '\ncurl -s %s/v1/completions -H "Content-Type: application/json" -d %s\n\n' "$(base_url)" \
            "'{\"model\": \"$SERVED_NAME\", \"prompt\": \"$prompt\", \"max_tokens\": 3, \"temperature\": 0}'"
        say "the decoder computes 4 of 516 tokens: usage.prompt_tokens_details.cached_tokens should be 512, and the text of both \"$expect\""
        say "or, of which this model understands nothing:"
    else
        say "ready:"
    fi
    printf '\ncurl -N %s/v1/chat/completions \\\n  -H "Content-Type: application/json" \\\n  -d %s\n\n' "$(base_url)" "'{
    \"model\": \"$SERVED_NAME\",
    \"messages\": [{\"role\": \"user\", \"content\": \"Explain how KV cache reuse helps long-context serving.\"}],
    \"max_tokens\": 128,
    \"temperature\": 0.7
  }'"
    say "the cache server's page: http://127.0.0.1:$SERVER_HTTP_PORT/"
}

choose_device
if [ -z "${MODEL:-}" ] && [ "$device" = cuda ]; then MODEL=Qwen/Qwen3-4B; fi
set_up
choose_model "$@"
choose_sizes
choose_l2
check_ports
open_run
start_master
start_server
start_proxy
start_engines "$@"
show_requests
say "Ctrl-C stops it"
supervise
