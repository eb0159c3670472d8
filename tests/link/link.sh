#!/usr/bin/env bash
# link.sh NVCC PROGRAM [ARCHITECTURE...]: compiles the two files, links them, and runs the program
# where there is a GPU. One GEMM variant, to save time.
set -euo pipefail
nvcc=$1 program=$2 targets=${3:-90a}
here=$(cd "$(dirname "$0")" && pwd)
flags=()
for t in ${targets//;/ }; do
    t=${t%-real}
    flags+=(-gencode "arch=compute_$t,code=sm_$t")
done
"$nvcc" -std=c++14 "-I$here/../.." "${flags[@]}" -DLINK_ONE_VARIANT --threads 2 \
    "$here/main.cu" "$here/other.cu" -o "$program"
status=0
"$program" || status=$?
if [ $status -eq 77 ]; then echo "compiled and linked; no GPU, so not run"; exit 0; fi
exit $status
