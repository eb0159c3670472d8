#!/usr/bin/env bash
# calls.sh DIR NVCC: kernels call no function: what they are made of is inlined into them, so that the
# shapes and options which they pass are literals and the accumulators registers.
set -euo pipefail
dir=$1 nvcc=$2
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$dir"
cd "$dir"
{
    echo '#include "moe/moe.cuh"'
    echo '#include "moe/gemm/k_grouped.cuh"'
} > calls.cu
"$nvcc" -O3 -std=c++14 "-I$root" -gencode arch=compute_90a,code=compute_90a -ptx calls.cu -o calls.ptx
kernels=$(grep -c '^\.visible \.entry\|^\.entry' calls.ptx)
echo "$kernels kernels"
[ "$kernels" -gt 50 ]
if grep -nE '^[[:space:]]*(@!?%p[0-9]+[[:space:]]+)?call' calls.ptx; then
    echo "calls.sh: these functions are not inlined"
    exit 1
fi
