#!/usr/bin/env bash
# link.sh NVCC DIR TARGETS [OBJECTS]: compiles main.cu and other.cu for TARGETS (90a, or a list with ;),
# links them to DIR/link, and runs that where there is a GPU. Takes OBJECTS/main.TARGETS.o for main.cu,
# where compile/everything.sh has made it: it has all kernels. other.cu has few.
set -euo pipefail
nvcc=$1 dir=$2 targets=${3:-90a} main=${4:-}/main.${3:-90a}.o
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$dir"
flags=(-std=c++14 "-I$here/../.." -DLINK_ONE_VARIANT)
for t in ${targets//;/ }; do
    t=${t%-real}
    flags+=(-gencode "arch=compute_$t,code=sm_$t")
done
if [ ! -e "$main" ]; then main=$here/main.cu; fi
"$nvcc" "${flags[@]}" "$main" "$here/other.cu" -o "$dir/link"
status=0
"$dir/link" || status=$?
if [ $status -eq 77 ]; then echo "compiled and linked; no GPU, so not run"; exit 0; fi
exit $status
