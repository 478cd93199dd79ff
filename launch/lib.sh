# shellcheck shell=bash
# Shared by the scripts in this folder, which source it. Defines functions and variables, does nothing by itself.
#
# A script calls, in this order: set_up; choose_model "$@"; choose_network WORKERS; open_run; start_services;
# check_machine; start_frontend and start_worker for each process; wait_until_listed; supervise. Whatever it started ends
# with it.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=${VENV:-$ROOT/.venv}
DEMO_MODEL=$ROOT/launch/demo_model

START_TIMEOUT_S=${START_TIMEOUT_S:-900} # loading and, on a GPU, compiling a large model takes minutes
STOP_TIMEOUT_S=${STOP_TIMEOUT_S:-60}
LAST_LINES=25

NAMES=() PIDS=() # of what was started, in that order

say() { printf '%s: %s\n' "${0##*/}" "$*"; }
die() { printf "${0##*/}: %s\n" "$@" >&2; exit 1; }

choose_device() { # cpu or cuda, into $device
    case ${DEVICE:-auto} in
        cpu | cuda) device=$DEVICE ;;
        auto) if nvidia-smi -L >/dev/null 2>&1; then device=cuda; else device=cpu; fi ;;
        *) die "DEVICE=$DEVICE is not one of auto, cpu, cuda" ;;
    esac
}

set_up() {
    choose_device
    "$ROOT/launch/setup.sh" || exit 1
    [ -x "$VENV/bin/python" ] || die "VENV=$VENV has no bin/python"
}

flag_value() { # flag_value --name "$@": the value of a flag among the arguments, empty if it is not there
    local flag=$1 value='' name
    shift
    while [ $# -gt 0 ]; do
        name=${1%%=*}
        if [ "${name//_/-}" = "$flag" ]; then # vLLM takes both spellings
            case $1 in *=*) value=${1#*=} ;; *) value=${2-} ;; esac
        fi
        shift
    done
    printf '%s' "$value"
}

ranks_of() { # ranks_of FLAGS: how many ranks an engine with these flags has
    local tp pp
    tp=$(flag_value --tensor-parallel-size "$@") pp=$(flag_value --pipeline-parallel-size "$@")
    tp=${tp:-$(flag_value -tp "$@")} pp=${pp:-$(flag_value -pp "$@")}
    [[ $tp =~ ^[1-9][0-9]*$ ]] || tp=1 # vLLM says what is wrong with anything else
    [[ $pp =~ ^[1-9][0-9]*$ ]] || pp=1
    printf '%s' $((tp * pp))
}

# MODEL, SERVED_NAME and MODEL_FLAGS, from the environment, the worker's flags ("$@") and the machine.
choose_model() {
    local given
    given=$(flag_value --model "$@")
    MODEL=${given:-${MODEL:-}}
    if [ -z "$MODEL" ]; then
        if [ "$device" = cuda ]; then MODEL=Qwen/Qwen3-0.6B; else MODEL=$DEMO_MODEL; fi
    fi
    SERVED_NAME=$(flag_value --served-model-name "$@")
    SERVED_NAME=${SERVED_NAME%%[, ]*} # the others are aliases
    MODEL_FLAGS=(--model "$MODEL")
    if [ "$device" = cpu ]; then
        # vLLM would take half of the memory.
        if [ "$MODEL" = "$DEMO_MODEL" ]; then kv_gib=1; else kv_gib=4; fi
        export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-$kv_gib}
    fi
    if [ "$MODEL" = "$DEMO_MODEL" ]; then
        [ -n "$SERVED_NAME" ] || MODEL_FLAGS+=(--served-model-name demo)
        SERVED_NAME=${SERVED_NAME:-demo}
        # The smallest block of vLLM's CPU platform: the model's prompts are short.
        [ -n "$(flag_value --block-size "$@")" ] || MODEL_FLAGS+=(--block-size 32)
    fi
    SERVED_NAME=${SERVED_NAME:-$MODEL}
    [ ! -d "$MODEL" ] || export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # nothing to ask the hub for
    export MODEL
}

# With file discovery the worker does this itself; with etcd it can't know that all of it is on this machine.
stay_on_loopback() {
    export DYN_SYSTEM_HOST=${DYN_SYSTEM_HOST:-127.0.0.1} DYN_TCP_RPC_HOST=${DYN_TCP_RPC_HOST:-127.0.0.1}
    export DYN_TCP_RESPONSE_STREAM_HOST=${DYN_TCP_RESPONSE_STREAM_HOST:-lo} DYN_EVENT_PLANE_HOST=${DYN_EVENT_PLANE_HOST:-127.0.0.1}
    export VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1} VLLM_NIXL_SIDE_CHANNEL_HOST=${VLLM_NIXL_SIDE_CHANNEL_HOST:-127.0.0.1}
}

# Ports and discovery, for $1 workers: their system ports are DYN_SYSTEM_PORT and those that follow it. That everything
# else stays on loopback is in backends/vllm/settings.py, for all who start it.
choose_network() {
    WORKERS=$1
    [[ $WORKERS =~ ^[1-9][0-9]*$ ]] || die "$WORKERS workers: the number of workers must be 1 or more"
    export HTTP_HOST=${HTTP_HOST:-127.0.0.1} HTTP_PORT=${HTTP_PORT:-8000} DYN_SYSTEM_PORT=${DYN_SYSTEM_PORT:-8081}
    export DYN_DISCOVERY_BACKEND=${DYN_DISCOVERY_BACKEND:-file}
    [ "$DYN_DISCOVERY_BACKEND" != mem ] || die "DYN_DISCOVERY_BACKEND=mem is known within one process only: use file or etcd"
    if [ "$DYN_DISCOVERY_BACKEND" = etcd ]; then
        # Else Dynamo sends requests by TCP and events by ZMQ.
        export DYN_REQUEST_PLANE=${DYN_REQUEST_PLANE:-nats} DYN_EVENT_PLANE=${DYN_EVENT_PLANE:-nats}
        export ETCD_ENDPOINTS=${ETCD_ENDPOINTS:-http://127.0.0.1:2379} NATS_SERVER=${NATS_SERVER:-nats://127.0.0.1:4222}
        case $ETCD_ENDPOINTS in *127.0.0.1* | *localhost*) stay_on_loopback ;; esac
    fi
    # One frontend, on this machine: it knows at once that a worker leaves.
    export DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS=${DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS:-1}
}

# For a KV router. Dynamo counts a hit in host memory as 0.75 of one on the GPU, and prefill like decode: then a worker
# with one request more is passed over though it holds the prefix (docs/dynamo.md).
HOST_HITS="--router-host-cache-hit-weight 0.95 --router-prefill-load-scale 2"

# Without a KV router nobody listens to events and load, and Dynamo's ZMQ publishers would listen on all interfaces.
publish_nothing() {
    [ "$DYN_DISCOVERY_BACKEND" = file ] || return 0
    export DYN_VLLM_PUBLISH_KV_EVENTS=${DYN_VLLM_PUBLISH_KV_EVENTS:-0} DYN_VLLM_PUBLISH_LOAD=${DYN_VLLM_PUBLISH_LOAD:-0}
}

listens() { # listens URL DEFAULT_PORT: whether something accepts connections there
    local address=${1#*://} host port
    host=${address%%:*} port=${address##*:}
    [ "$port" != "$address" ] || port=$2
    (exec 3<>"/dev/tcp/$host/${port%%/*}") 2>/dev/null
}

start_service() { # start_service NAME DEBIAN_PACKAGE VARIABLE URL PORT COMMAND...: unless it runs already
    local name=$1 package=$2 variable=$3 url=$4 port=$5
    shift 5
    ! listens "$url" "$port" || return 0
    case $url in *127.0.0.1:"$port" | *localhost:"$port") ;; *) return 0 ;; esac # somebody else's: doctor complains
    command -v "$1" >/dev/null || { say "$name is not installed (Debian's $package), and nothing answers at $variable=$url"; return 0; }
    start "$name" "$@"
    START_TIMEOUT_S=20 wait_for "$name at $url" listens "$url" "$port"
}

# With DYN_DISCOVERY_BACKEND=etcd: etcd and NATS on loopback, where they are installed and do not run yet.
start_services() {
    [ "$DYN_DISCOVERY_BACKEND" = etcd ] || return 0
    start_service etcd etcd-server ETCD_ENDPOINTS "${ETCD_ENDPOINTS%%,*}" 2379 \
        etcd --data-dir "$RUN_DIR/etcd" --listen-client-urls http://127.0.0.1:2379 \
        --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:0
    if [ "$DYN_REQUEST_PLANE" = nats ] || [ "$DYN_EVENT_PLANE" = nats ]; then
        start_service nats nats-server NATS_SERVER "$NATS_SERVER" 4222 \
            nats-server --addr 127.0.0.1 --port 4222 --jetstream --store_dir "$RUN_DIR/nats"
    fi
}

check_machine() {
    local more=() i
    for ((i = 1; i < WORKERS; i++)); do more+=(--port $((DYN_SYSTEM_PORT + i))); done
    "$VENV/bin/lmcache-ext" doctor --quiet "${more[@]}" && return
    stop_all
    rm -rf "$RUN_DIR"
    die "not started: see the lines marked fail" "all checks: $VENV/bin/lmcache-ext doctor"
}

open_run() { # a private folder for logs and file discovery; from here on, leaving the script stops what it started
    RUN_DIR=$(mktemp -d "${TMPDIR:-/tmp}/lmcache-ext.XXXXXX")
    LOG_DIR=${LOG_DIR:-$RUN_DIR}
    mkdir -p "$LOG_DIR"
    if [ "$DYN_DISCOVERY_BACKEND" = file ] && [ -z "${DYN_FILE_KV:-}" ]; then
        export DYN_FILE_KV=$RUN_DIR/discovery
        mkdir "$DYN_FILE_KV"
    fi
    trap 'stop_all; rm -rf "$RUN_DIR"; say stopped; exit 130' INT
    trap 'stop_all; rm -rf "$RUN_DIR"; say stopped; exit 143' TERM HUP
}

# Each process gets a session of its own, so that Ctrl-C reaches only this script, which then stops the processes in
# order, and so that all descendants can be found by their process group. If the script is killed, they are, too.
start() { # start NAME COMMAND...
    local name=$1
    shift
    say "starting $name (log: $LOG_DIR/$name.log)"
    setpriv --pdeathsig TERM setsid "$@" >"$LOG_DIR/$name.log" 2>&1 </dev/null &
    NAMES+=("$name") PIDS+=($!)
}

# -P: the current folder may hold modules with the names of others.
# The system port is the worker's: without it the frontend opens none.
start_frontend() { # start_frontend FLAGS...
    start frontend env -u DYN_SYSTEM_PORT \
        "$VENV/bin/python" -P -m dynamo_lmcache.frontend --http-host "$HTTP_HOST" --http-port "$HTTP_PORT" "$@"
}

list_cores() { # the cores that may be used, into $cores
    local part
    cores=()
    for part in $(awk '/^Cpus_allowed_list/ { gsub(",", " ", $2); print $2 }' /proc/self/status); do # 0-3 8
        mapfile -t -O ${#cores[@]} cores < <(seq "${part%-*}" "${part#*-}")
    done
}

list_cards() { # the GPUs that may be used, as CUDA_VISIBLE_DEVICES names them, into $cards
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then IFS=, read -ra cards <<<"$CUDA_VISIBLE_DEVICES"; else
        mapfile -t cards < <(seq 0 $(($(nvidia-smi -L | wc -l) - 1))); fi
}

# The share of engine $1 (0 to WORKERS - 1) of the machine, on CPUs its cores, on GPUs cards of its own or, where there
# are fewer, a part of some: variables for its environment into $share, flags into $fit.
choose_share() { # choose_share INDEX FLAGS...
    local index=$1 ranks cores=() cards=() own=() i all first
    shift
    share=() fit=() ranks=$(ranks_of "$@") all=$((WORKERS * ranks))
    if [ "$WORKERS" = 1 ]; then
        :
    elif [ "$device" = cuda ]; then
        list_cards
        for ((i = index * ranks; i < (index + 1) * ranks; i++)); do own+=("${cards[i % ${#cards[@]}]}"); done
        share+=(CUDA_VISIBLE_DEVICES="$(IFS=,; printf %s "${own[*]}")")
        if [ "$all" -gt "${#cards[@]}" ] && [ -z "$(flag_value --gpu-memory-utilization "$@")" ]; then
            fit=(--gpu-memory-utilization "$(awk "BEGIN { printf \"%.2f\", 0.9 / int(($all + ${#cards[@]} - 1) / ${#cards[@]}) }")")
        fi
    elif [ -z "${VLLM_CPU_OMP_THREADS_BIND:-}" ]; then
        list_cores
        [ "$ranks" = 1 ] || [ "$all" -le ${#cores[@]} ] || return 0 # ranks wait for each other: they can't share a core
        for ((i = index * ranks; i < (index + 1) * ranks; i++)); do # a list for each rank
            first=$((i * ${#cores[@]} / all))
            own+=("$(IFS=,; printf %s "${cores[*]:first:((i + 1) * ${#cores[@]} / all > first ? (i + 1) * ${#cores[@]} / all - first : 1)}")")
        done
        share+=(VLLM_CPU_OMP_THREADS_BIND="$(IFS='|'; printf %s "${own[*]}")")
    fi
}

start_worker() { # start_worker NAME INDEX FLAGS...; INDEX from 0 to WORKERS - 1
    local name=$1 index=$2
    shift 2
    choose_share "$index" "$@"
    start "$name" env DYN_SYSTEM_PORT="$((DYN_SYSTEM_PORT + index))" "${share[@]}" \
        "$VENV/bin/python" -P -m dynamo_lmcache.vllm "${MODEL_FLAGS[@]}" "${fit[@]}" "$@"
}

# Its health check would say so, too, but 10 s later: that is how long Dynamo waits before it first asks.
wait_until_serving() { # wait_until_serving NAME: that worker says that it serves
    wait_for "$1" grep -qF "serving $SERVED_NAME at " "$LOG_DIR/$1.log"
}

group_alive() { kill -0 -- "-$1" 2>/dev/null; }

stop_one() { # stop_one PID: SIGTERM, then SIGKILL to what is left of its group
    local deadline=$((SECONDS + STOP_TIMEOUT_S))
    kill -TERM "$1" 2>/dev/null || true
    while kill -0 "$1" 2>/dev/null && [ "$SECONDS" -lt "$deadline" ] && [ -z "${hurry:-}" ]; do sleep 0.2; done
    deadline=$((SECONDS + 5))
    while group_alive "$1" && [ "$SECONDS" -lt "$deadline" ] && [ -z "${hurry:-}" ]; do sleep 0.2; done
    kill -KILL -- "-$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true # keeps the shell from telling that it was killed
}

stop_all() { # the last one first: workers before the frontend
    local i begin=$SECONDS
    hurry=
    trap '[ "$SECONDS" -le $((begin + 1)) ] || hurry=1' INT # a second Ctrl-C
    trap '' TERM HUP
    for ((i = ${#PIDS[@]} - 1; i >= 0; i--)); do
        say "stopping ${NAMES[i]}"
        stop_one "${PIDS[i]}"
    done
    wait
}

give_up() { # give_up INDEX MESSAGE...: show that process's last lines, stop everything, keep the logs
    local log=$LOG_DIR/${NAMES[$1]}.log
    shift
    {
        printf '%s\n' "---- the end of $log"
        tail -n "$LAST_LINES" "$log"
        printf '%s\n' ----
    } >&2
    stop_all
    die "$@" "the whole log: $log"
}

check_alive() {
    local i status
    for i in "${!PIDS[@]}"; do
        kill -0 "${PIDS[i]}" 2>/dev/null && continue
        status=0
        wait "${PIDS[i]}" || status=$?
        give_up "$i" "${NAMES[i]} ended by itself, with exit status $status"
    done
}

wait_for() { # wait_for WHAT COMMAND...: until the command succeeds, for at most START_TIMEOUT_S
    local what=$1 begin=$SECONDS next=$((SECONDS + 15))
    shift
    until "$@"; do
        check_alive
        [ $((SECONDS - begin)) -lt "$START_TIMEOUT_S" ] ||
            give_up $((${#PIDS[@]} - 1)) "$what is not ready after $START_TIMEOUT_S s (START_TIMEOUT_S)"
        if [ "$SECONDS" -ge "$next" ]; then
            say "waiting for $what, $((SECONDS - begin)) s so far"
            next=$((SECONDS + 15))
        fi
        sleep 0.5
    done
}

base_url() { if [ "$HTTP_HOST" = 0.0.0.0 ]; then echo "http://127.0.0.1:$HTTP_PORT"; else echo "http://$HTTP_HOST:$HTTP_PORT"; fi; }

is_listed() {
    "$VENV/bin/python" -I -S - "$(base_url)/v1/models" "$SERVED_NAME" 2>/dev/null <<'EOF'
import json, sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
listed = json.load(opener.open(sys.argv[1], timeout=5))["data"]
sys.exit(sys.argv[2] not in [model["id"] for model in listed])
EOF
}

wait_until_listed() {
    local begin=$SECONDS
    wait_for "$SERVED_NAME" is_listed
    say "$SERVED_NAME is listed after $((SECONDS - begin)) s"
}

supervise() { # until Ctrl-C, or until a process ends
    wait -n "${PIDS[@]}" || true
    check_alive
}

# A request that works as it stands in a shell, with a prompt longer than a chunk of 256 tokens.
show_example() {
    local prompt expect
    if [ "$MODEL" = "$DEMO_MODEL" ]; then
        { IFS= read -r prompt; read -r expect; } < <("$VENV/bin/python" "$ROOT/launch/example_prompt.py")
        expect="512, and the text of both \"$expect\""
    else
        prompt="'\"\$(printf 'The cache keeps what the model has read. %.0s' {1..64})\"'" # for the reader's shell
        expect="more than 0"
    fi
    say "ready; run this twice:"
    printf '\ncurl -s %s/v1/completions -H "Content-Type: application/json" -d %s\n\n' "$(base_url)" \
        "'{\"model\": \"$SERVED_NAME\", \"prompt\": \"$prompt\", \"max_tokens\": 3, \"temperature\": 0}'"
    say "the second answer's usage.prompt_tokens_details.cached_tokens should be $expect"
}
