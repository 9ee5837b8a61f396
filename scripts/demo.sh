#!/usr/bin/env bash
# Sets up the environment if needed, answers a prompt with SmolLM2-135M and the hispec hierarchy,
# and compares with plain decoding. Usage: demo.sh [PROMPT]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env
exec "$PYTHON" "$ROOT/scripts/demo.py" "$@"
