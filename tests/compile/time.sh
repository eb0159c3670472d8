#!/usr/bin/env bash
# time.sh DIR NVCC: how long files take, optimised, for one target: one that includes every station's
# forward pass, one that includes all that trains on one GPU, and the first with trimmed lists. --split-compile
# lets nvcc's stages use all cores, where it has the option. Machines differ, so the test prints the
# figures. The limits are a quarter and more above those of two cores.
set -euo pipefail
dir=$1 nvcc=$2
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$dir"
cd "$dir"
echo '#include "moe/moe.cuh"' > forward.cu
printf '#include "moe/%s.cuh"\n' layer_backward combine_backward balance_loss > training.cu
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
# within FILE SECONDS: compiles; processor time or the time that passed must be at most so long
within() {
    local best
    compile "$1" "${split[@]}"
    best=$((ms < cpu ? ms : cpu))
    if [ $best -gt $(($2 * 1000)) ]; then
        echo "FAILED: $1 takes more than $2 s"
        exit 1
    fi
}
help=$("$nvcc" --help)
split=()
if [[ $help == *--split-compile\ * ]]; then split=(--split-compile=0 -Xptxas=--split-compile=0); fi
compile trimmed.cu "${split[@]}"
trimmed=$cpu
within forward.cu 90
plain=$cpu
if [ $trimmed -ge $plain ]; then echo "FAILED: trimming the lists saves nothing"; exit 1; fi
within training.cu 120
