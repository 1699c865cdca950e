#!/bin/sh
# Check and measure this checkout on one GPU, in eight minutes at most:   tools/gpu_checks.sh OUT
# See python tools/gpu_checks.py --help. Set PYTHON to choose the interpreter.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd) || exit 2
[ -n "$PYTHON" ] || PYTHON=$root/.venv/bin/python
command -v "$PYTHON" >/dev/null || PYTHON=python3
exec "$PYTHON" "$root/tools/gpu_checks.py" "$@"
