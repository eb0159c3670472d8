#!/usr/bin/env bash
# check.sh KIND FILE DIR COMPILER: compiles FILE, a path from the repository's root, in DIR.
#
#   c11 cxx14        a .h in plain C and in C++: pedantic, every warning is an error
#   host             a .cuh for the CPU backend with a C++ compiler, no CUDA header in reach
#   nvcc             a .cuh to machine code of sm_90a; stack and spills are errors, and so is wgmma
#                    that ptxas serialises. Of other targets everything.sh alone does so
#   nvcc-front       through the front end for sm_90a: is it well formed?
#   front-cxx17      so as C++17 with --use_fast_math
#   front-cxx20      so as C++20
#   front-ptx        to PTX of sm_75, sm_80, sm_90a and the newest target, for old toolkits
#   program          a whole .cu through the front end for sm_80, sm_90a and the newest
#   host-names       as host, but after names.h, a file full of everyday names and macros
#   front-names      so with nvcc, for sm_90a
#
# The front end alone is code=lto: it checks all that the language asks, and generates no machine code.
#
# Headers are included alone and twice. gemm/grouped.cuh, gemm/grouped_gradient.cuh and
# block_sparse.cuh are compiled with all their kernels, whatever includes them without: they are most of the work. router.cuh has those of
# grouped.cuh too: what stands beside a kernel in a file has moved its registers before.
set -euo pipefail
kind=$1 file=$2 dir=$3 compiler=$4
root=$(cd "$(dirname "$0")/../.." && pwd)
unset CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH
mkdir -p "$dir"
cd "$dir"

# write NAME LINE...: a source file
write() { local name=$1; shift; printf '%s\n' "$@" > "$name"; }
twice=("#include \"$file\"" "#include \"$file\"")
no_gemm='#define MOE_GEMM_VARIANT_LIST(X, ...)'
case $file in moe/gemm/grouped.cuh | moe/gemm/grouped_gradient.cuh | moe/router.cuh) no_gemm= ;; esac
no_block='#define MOE_BLOCK_SPARSE_DTYPE_LIST(X)'
if [ "$file" = moe/block_sparse.cuh ]; then no_block=; fi
strict=(-Wall -Wextra -Wshadow -Werror "-I$root" -fsyntax-only)
named=('#include "tests/compile/names.h"' "${twice[@]}" 'int use_names(void) { return names_sum(); }')

case $kind in
c11)
    write alone.c "${twice[@]}"
    exec "$compiler" -std=c11 -pedantic "${strict[@]}" alone.c ;;
cxx14)
    write alone.cpp "${twice[@]}"
    exec "$compiler" -std=c++14 "${strict[@]}" alone.cpp ;;
host)
    write alone.cpp "${twice[@]}"
    exec "$compiler" -std=c++14 -DMOE_BACKEND=host "${strict[@]}" alone.cpp ;;
host-names) # names of the headers' own shadow those of the file: that is no fault
    write alone.cpp "${named[@]}"
    exec "$compiler" -std=c++14 -DMOE_BACKEND=host "${strict[@]}" -Wno-shadow alone.cpp ;;
esac

# needs HEADER: exit 77, Skipped, where the compiler does not find HEADER
needs() { echo "#include <$1>" > needs.cu; "$compiler" -E needs.cu > /dev/null 2>&1 || exit 77; }
targets=90a std=c++14 flags=(-dc) code=lto
case $file in
moe/ep/nccl.cuh) needs nccl.h ;;
moe/ep/nccl_window.cuh) needs nccl_device.h; std=c++17 ;;
esac

newest=$("$compiler" --list-gpu-arch | sed 's/compute_//' | sort -n | tail -1)
write alone.cu "$no_gemm" "$no_block" "${twice[@]}"
case $kind in
nvcc) code=sm flags=(-c -Xptxas -warn-spills,-warn-lmem-usage,-Werror) ;;
nvcc-front) ;;
front-cxx17) std=c++17 flags+=(--use_fast_math) ;;
front-cxx20) std=c++20 ;;
front-ptx) targets="75 80 90a $newest" code=compute flags=(-c -G) ;;
front-names) write alone.cu "${named[@]}" ;;
program) targets="80 90a $newest"; write alone.cu "$no_gemm" "$no_block" "#include \"$file\"" ;;
*) echo "check.sh: no such kind: $kind" >&2; exit 2 ;;
esac
for t in $targets; do flags+=(-gencode "arch=compute_$t,code=${code}_$t"); done

status=0
"$compiler" -std=$std "-I$root" "${flags[@]}" -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror \
    alone.cu -o alone.o > log 2>&1 || status=$?
cat log
rm -f alone.o
if grep -qE '\(C75(0[5-9]|1[0-9])\)' log; then
    echo "check.sh: ptxas serialised wgmma instructions, see above"
    status=1
fi
exit $status
