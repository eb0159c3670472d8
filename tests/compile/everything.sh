#!/usr/bin/env bash
# everything.sh DIR NVCC TARGET...: compiles a file that includes everything, tests/link/main.cu, to
# DIR/main.TARGET.o for each TARGET (75, 80, 90a, newest, ...): optimised, all kernels. Stack and spills
# are errors, and so is wgmma that ptxas serialises. The PTX stays in DIR/TARGET, for calls.sh.
set -euo pipefail
dir=$1 nvcc=$2
shift 2
root=$(cd "$(dirname "$0")/../.." && pwd)
for target in "$@"; do
    real=$target
    if [ "$target" = newest ]; then
        real=$("$nvcc" --list-gpu-arch | sed 's/compute_//' | sort -n | tail -1)
    fi
    rm -rf "$dir/$target" "$dir/main.$target.o"
    mkdir -p "$dir/$target"
    status=0
    "$nvcc" -O3 -std=c++14 "-I$root" -gencode "arch=compute_$real,code=sm_$real" \
        -Xptxas -warn-spills,-warn-lmem-usage,-Werror -Werror all-warnings \
        -Xcompiler -Wall,-Wextra,-Werror --keep --keep-dir "$dir/$target" \
        -c "$root/tests/link/main.cu" -o "$dir/main.$target.o" > "$dir/$target.log" 2>&1 || status=$?
    cat "$dir/$target.log"
    if grep -qE '\(C75(0[5-9]|1[0-9])\)' "$dir/$target.log"; then
        echo "everything.sh: ptxas serialised wgmma instructions, see above"
        exit 1
    fi
    [ $status -eq 0 ] || exit $status
    find "$dir/$target" -type f ! -name '*.ptx' -delete
    echo "sm_$real: $(stat -c %s "$dir/main.$target.o") bytes, $SECONDS s"
done
