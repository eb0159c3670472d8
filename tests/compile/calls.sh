#!/usr/bin/env bash
# calls.sh PTX: kernels call no function: what they are made of is inlined into them, so that the
# shapes and options which they pass are literals and the accumulators registers. everything.sh has
# made the PTX.
set -euo pipefail
kernels=$(grep -c '^\.visible \.entry\|^\.entry' "$1")
echo "$kernels kernels"
[ "$kernels" -gt 50 ]
if grep -nE '^[[:space:]]*(@!?%p[0-9]+[[:space:]]+)?call' "$1"; then
    echo "calls.sh: these functions are not inlined"
    exit 1
fi
