#!/usr/bin/env bash
# Sets up the environment if needed and runs all tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
