#!/usr/bin/env bash
# time.sh DIR NVCC: how long a file takes that includes everything, optimised, for one target; and one
# with trimmed lists. nvcc's stages follow one another unless --split-compile lets them use all cores:
# both are timed. With all gradients it takes 60 to 100 seconds; machines differ, so the test prints
# the figures and fails from 180 on.
set -euo pipefail
dir=$1 nvcc=$2 most=180
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$dir"
cd "$dir"
echo '#include "moe/moe.cuh"' > all.cu
cat > trimmed.cu << 'END'
/* bf16 weights as checkpoints have them, one gate; what is not stamped runs by the general version,
   or is refused. */
#define MOE_GATE_LIST(X) X(128, 8, 4, 32)
#define MOE_GATE_RULES_LIST(X)
#define MOE_GEMM_VARIANT_LIST(X, ...) X(bf16_kk, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)
#define MOE_BLOCK_SPARSE_DTYPE_LIST(X) X(bf16, MOE_BF16)
#include "moe/moe.cuh"
END

# compile FILE [OPTION...]: sets ms, the time that passed, and cpu, processor time
TIMEFORMAT='%3U %3S %3R'
compile() {
    local user system real
    { time "$nvcc" -O3 -std=c++14 "-I$root" -gencode arch=compute_90a,code=sm_90a "${@:2}" -c "$1" \
        -o time.o 2>&3; } 3>&2 2> took
    read -r user system real < took
    ms=$((10#${real/./})) cpu=$((10#${user/./} + 10#${system/./}))
    echo "$*: $real s, $((cpu / 1000)).$((cpu % 1000 / 100)) s of processor time"
}
compile trimmed.cu
trimmed=$cpu
compile all.cu
all=$cpu best=$cpu
help=$("$nvcc" --help)
if [[ $help == *--split-compile\ * ]]; then
    compile all.cu --split-compile=0 -Xptxas=--split-compile=0
    if [ $ms -lt $best ]; then best=$ms; fi
fi
echo "best: $((best / 1000)).$((best % 1000 / 100)) s"
if [ $trimmed -ge $all ]; then echo "FAILED: trimming the lists saves nothing"; exit 1; fi
if [ $best -gt $((most * 1000)) ]; then
    echo "FAILED: moe/moe.cuh takes more than $most s"
    exit 1
fi
