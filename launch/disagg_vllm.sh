#!/usr/bin/env bash
# Serve one model with prefill and decode apart by plain `vllm serve`, without Dynamo: prefillers hand the prompt's KV to
# decoders over NIXL, and a proxy that speaks OpenAI's API sends each request to both. Ctrl-C stops what it started.
#
#   launch/disagg_vllm.sh all       [MODEL] [flags of vllm serve]     everything, on this machine
#   launch/disagg_vllm.sh prefiller [MODEL] [flags of vllm serve]     one of the three, each in a terminal or on a host
#   launch/disagg_vllm.sh decoder   [MODEL] [flags of vllm serve]     of its own
#   launch/disagg_vllm.sh proxy     [MODEL] [flags of the proxy]
#
#   MODEL            folder, or name on the Hugging Face hub (default: Qwen/Qwen3-0.6B with a GPU, else launch/demo_model)
#   HTTP_PORT        of the proxy's OpenAI API (default 9100); HTTP_HOST: its address (default 127.0.0.1)
#   PREFILL_HOST, PREFILL_PORT    where prefillers listen (default 127.0.0.1, 7100)
#   DECODE_HOST, DECODE_PORT      where decoders listen (default 127.0.0.1, 7200)
#   INIT_PORT, ALLOC_PORT         a decoder's ports for prefillers, one a rank (default 7300, 7400 and those that follow)
#   PROXY_HOST, PROXY_PORT        where prefillers tell the proxy that KV has arrived (default 127.0.0.1, 7500)
#   PREFILLERS, DECODERS          how many `all` starts, and `proxy` expects, on ports in a row (default 1, 1)
#   BUFFER_GB        memory of each rank for the hand-over (default 2)
#   BUFFER_DEVICE    cpu, or cuda: from GPU to GPU, with one rank on both sides (default cpu; docs/pd.md)
#   PREFILL_CONFIG_FILE, DECODE_CONFIG_FILE   instead: LMCACHE_CONFIG_FILE of the prefillers, of the decoders
#   LMCACHE_*        further settings of the cache: docs/settings.md, docs/pd.md
#   VENV, DEVICE     see launch/setup.sh
#   LOG_DIR          where the logs go (default: a temporary folder, removed on Ctrl-C)
#
# With `all` each engine gets cores or a GPU of its own; where there are fewer GPUs than engines, a part of one.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

case ${1-} in
    all | prefiller | decoder | proxy) part=$1 ;;
    -h | --help) usage; exit ;;
    *) usage >&2; exit 2 ;;
esac
shift
case ${1--} in -*) ;; *) MODEL=$1; shift ;; esac

PREFILL_HOST=${PREFILL_HOST:-127.0.0.1} PREFILL_PORT=${PREFILL_PORT:-7100}
DECODE_HOST=${DECODE_HOST:-127.0.0.1} DECODE_PORT=${DECODE_PORT:-7200}
INIT_PORT=${INIT_PORT:-7300} ALLOC_PORT=${ALLOC_PORT:-7400}
PROXY_HOST=${PROXY_HOST:-127.0.0.1} PROXY_PORT=${PROXY_PORT:-7500}
PREFILLERS=${PREFILLERS:-1} DECODERS=${DECODERS:-1}
WORKERS=1 DYN_DISCOVERY_BACKEND=none # Dynamo takes no part
case $part in
    all) WORKERS=$((PREFILLERS + DECODERS)) ;;
    prefiller) HTTP_HOST=$PREFILL_HOST HTTP_PORT=$PREFILL_PORT ;;
    decoder) HTTP_HOST=$DECODE_HOST HTTP_PORT=$DECODE_PORT ;;
esac
HTTP_HOST=${HTTP_HOST:-127.0.0.1} HTTP_PORT=${HTTP_PORT:-9100}
if [ "$part" = proxy ]; then ranks=1; else ranks=$(ranks_of "$@"); fi
# UCX listens at all devices otherwise. What a part alone is told of the others' hosts says nothing of its own.
case $part in prefiller) own_host=$PREFILL_HOST ;; *) own_host=$DECODE_HOST ;; esac
case $own_host in 127.* | localhost) export UCX_NET_DEVICES=${UCX_NET_DEVICES:-lo} ;; esac

ports_of() { # ports_of FIRST DECODER: of its ranks, a comma apart
    seq -s, $(($1 + $2 * ranks)) $(($1 + $2 * ranks + ranks - 1))
}

all_ports_of() { # all_ports_of FIRST: of all decoders, a semicolon apart
    local i ports=()
    for ((i = 0; i < DECODERS; i++)); do ports+=("$(ports_of "$1" "$i")"); done
    (IFS=';'; printf %s "${ports[*]}")
}

check_free() { # check_free PORT...: nobody listens there
    local port
    for port in "$@"; do
        ! listens "127.0.0.1:$port" "$port" || { rm -rf "$RUN_DIR"; die "something listens at port $port already"; }
    done
}

write_config() { # write_config NAME LINE...: a file of settings for one engine
    local file=$RUN_DIR/$1.yaml
    shift
    printf '%s\n' "local_cpu: False" "enable_pd: True" "transfer_channel: nixl" \
        "pd_buffer_size: $((${BUFFER_GB:-2} << 30))" "pd_buffer_device: ${BUFFER_DEVICE:-cpu}" "$@" >"$file"
    printf %s "$file"
}

start_engine() { # start_engine NAME INDEX PORT HOST ROLE CONFIG EXTRA FLAGS...: `vllm serve`
    local name=$1 index=$2 port=$3 host=$4 role=$5 config=$6 extra=$7 serve
    shift 7
    choose_share "$index" "$@"
    # By its module on CPUs: the CPU wheel's own command asks for a distribution of another name.
    if [ "$device" = cpu ]; then
        serve=("$VENV/bin/python" -P -m vllm.entrypoints.openai.api_server "${MODEL_FLAGS[@]}")
    else
        serve=("$VENV/bin/vllm" serve "$MODEL" "${MODEL_FLAGS[@]:2}")
    fi
    start "$name" env LMCACHE_CONFIG_FILE="$config" "${share[@]}" "${serve[@]}" --host "$host" --port "$port" \
        --enable-prompt-tokens-details --kv-transfer-config \
        "{\"kv_connector\": \"LMCacheConnectorV1\", \"kv_role\": \"$role\", \"kv_connector_extra_config\": $extra}" \
        "${fit[@]}" "$@"
}

start_prefiller() { # start_prefiller NUMBER INDEX FLAGS...
    local number=$1 index=$2 config
    shift 2
    config=${PREFILL_CONFIG_FILE:-$(write_config "prefiller$number" "pd_role: sender" \
        "pd_proxy_host: $PROXY_HOST" "pd_proxy_port: $PROXY_PORT")}
    start_engine "prefiller$number" "$index" $((PREFILL_PORT + number)) "$PREFILL_HOST" kv_producer "$config" \
        "{\"discard_partial_chunks\": false, \"lmcache_rpc_port\": \"producer$number\"}" "$@"
}

start_decoder() { # start_decoder NUMBER INDEX FLAGS...
    local number=$1 index=$2 config
    shift 2
    config=${DECODE_CONFIG_FILE:-$(write_config "decoder$number" "pd_role: receiver" "pd_peer_host: $DECODE_HOST" \
        "pd_peer_init_port: [$(ports_of "$INIT_PORT" "$number")]" \
        "pd_peer_alloc_port: [$(ports_of "$ALLOC_PORT" "$number")]")}
    start_engine "decoder$number" "$index" $((DECODE_PORT + number)) "$DECODE_HOST" kv_consumer "$config" \
        "{\"discard_partial_chunks\": false, \"skip_last_n_tokens\": 1, \"lmcache_rpc_port\": \"consumer$number\"}" "$@"
}

start_proxy() { # start_proxy FLAGS...
    start proxy "$VENV/bin/python" -P -m dynamo_lmcache.proxy --mode nixl --host "$HTTP_HOST" --port "$HTTP_PORT" \
        --prefiller-host "$PREFILL_HOST" --prefiller-port "$PREFILL_PORT" --num-prefillers "$PREFILLERS" \
        --decoder-host "$DECODE_HOST" --decoder-port "$DECODE_PORT" --num-decoders "$DECODERS" \
        --decoder-init-port "$(all_ports_of "$INIT_PORT")" --decoder-alloc-port "$(all_ports_of "$ALLOC_PORT")" \
        --proxy-host "$PROXY_HOST" --proxy-port "$PROXY_PORT" "$@"
}

wait_for_engine() { # wait_for_engine HOST PORT
    local HTTP_HOST=$1 HTTP_PORT=$2
    wait_until_listed
}

set_up
choose_model "$@"
open_run
case $part in
    prefiller)
        check_free "$PREFILL_PORT"
        start_prefiller 0 0 "$@"
        wait_until_listed
        ;;
    decoder)
        check_free "$DECODE_PORT" "$INIT_PORT" "$ALLOC_PORT"
        start_decoder 0 0 "$@"
        wait_until_listed
        ;;
    proxy)
        check_free "$HTTP_PORT" "$PROXY_PORT"
        start_proxy "$@"
        say "waiting for decoders at $DECODE_HOST:$DECODE_PORT"
        wait_until_listed
        show_example
        ;;
    all)
        for ((i = 0; i < PREFILLERS; i++)); do check_free $((PREFILL_PORT + i)); done
        for ((i = 0; i < DECODERS; i++)); do check_free $((DECODE_PORT + i)) $((INIT_PORT + i)) $((ALLOC_PORT + i)); done
        check_free "$HTTP_PORT" "$PROXY_PORT"
        for ((i = 0; i < DECODERS; i++)); do start_decoder "$i" "$i" "$@"; done
        for ((i = 0; i < PREFILLERS; i++)); do start_prefiller "$i" $((DECODERS + i)) "$@"; done
        for ((i = 0; i < DECODERS; i++)); do wait_for_engine "$DECODE_HOST" $((DECODE_PORT + i)); done
        for ((i = 0; i < PREFILLERS; i++)); do wait_for_engine "$PREFILL_HOST" $((PREFILL_PORT + i)); done
        start_proxy
        wait_until_listed
        show_example
        ;;
esac
say "Ctrl-C stops it"
supervise
