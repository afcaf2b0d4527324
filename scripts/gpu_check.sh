#!/usr/bin/env bash
# Everything that only a GPU can tell, in stages of under ten minutes each: see scripts/gpu_check.py --help.
#
#   scripts/gpu_check.sh --stage tests|sanitize|ops|model [--fresh] [--limit seconds] [--out folder]
#
# Run it from an installed checkout (pip install --no-build-isolation --no-deps -e . works offline). A stage that is
# stopped, or runs out of time, goes on where it was when it is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
