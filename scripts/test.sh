#!/usr/bin/env bash
# Sets up the environment if needed and runs all tests, as many files at a time as there are
# processors; arguments go to pytest (-n 0 for one process, as --pdb needs).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test
cd "$ROOT"
parallel=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then # HISPEC_VENV=none may lack it
    # In order of collection: the long ones first, so that no worker is left with one at the end.
    parallel=(-n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder)
fi
exec "$PYTHON" -m pytest "${parallel[@]}" "$@"
