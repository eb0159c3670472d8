#!/usr/bin/env bash
# cuda12.sh 12.0|12.4 DIR CC: fetches an old toolkit into DIR, once, and compiles every .cuh with it.
#
#   12.0   the oldest CUDA 12 whose compiler comes as a package, from PyPI: NVRTC, ptxas and headers,
#          without nvcc. Device code: every header alone for sm_90a, those with tensor cores and the
#          umbrella for sm_80 too, not optimised; moe/moe.cuh optimised and through ptxas, whose
#          warnings of spills are shown: this compiler may need more registers than later ones.
#   12.4   the oldest nvcc that comes as a package, from Debian, with headers from PyPI: host and
#          device code of moe/moe.cuh, which includes the others.
#
# Versions and hashes are pinned. Where they cannot be had: Skipped.
set -euo pipefail
version=$1 dir=$2 cc=$3
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
unset CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH LD_LIBRARY_PATH
mkdir -p "$dir"
cd "$dir"
skip() { echo "skipped: no CUDA $version: $*"; exit 77; }

# The wheels of cuda$version.txt, unpacked into wheels/.
fetch_wheels() {
    python3 -m pip --version > /dev/null 2>&1 || skip "no pip"
    if ! python3 -m pip install --disable-pip-version-check --no-cache-dir --no-deps --only-binary :all: \
        --require-hashes --platform manylinux2014_x86_64 --target wheels \
        -r "$here/cuda$version.txt" > pip.log 2>&1; then
        if grep -q 'DO NOT MATCH THE HASHES' pip.log; then cat pip.log; exit 1; fi
        skip "$(grep -m1 ERROR pip.log || tail -1 pip.log)"
    fi
}

# Debian's package with nvcc, from the next release of the mirror that this machine uses, put into the
# order in which nvcc looks for its parts: nvcc/.
fetch_nvcc() {
    local name=nvidia-cuda-toolkit want=12.4.131~12.4.1-2 mirror deb apt
    command -v apt-get dpkg-deb > /dev/null || skip "no apt-get"
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' |
        grep '/debian/*$' | grep -v security | sed -n 1p) || skip "no Debian mirror"
    mkdir -p apt/lists/partial apt/cache/archives/partial
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie non-free" > \
        apt/sources.list
    apt=(-o "Dir::Etc::sourcelist=$PWD/apt/sources.list" -o Dir::Etc::sourceparts=-
         -o "Dir::State::lists=$PWD/apt/lists" -o "Dir::Cache=$PWD/apt/cache")
    apt-get "${apt[@]}" update > apt.log 2>&1 || skip "$(tail -1 apt.log)"
    apt-get "${apt[@]}" download "$name=$want" > apt.log 2>&1 || skip "$(tail -1 apt.log)"
    deb=$(echo "$name"_*.deb)
    echo "cd5fe85aee38d108b315f408a688641478f2402622a10c677478eb7a6c4e5319  $deb" | sha256sum --check
    dpkg-deb -x "$deb" deb
    mkdir -p nvcc/bin nvcc/nvvm/bin nvcc/include
    mv deb/usr/lib/nvidia-cuda-toolkit/bin/{nvcc,crt} deb/usr/bin/{cudafe++,ptxas,fatbinary} nvcc/bin
    mv deb/usr/lib/nvidia-cuda-toolkit/bin/cicc nvcc/nvvm/bin
    cp -r wheels/nvidia/cuda_nvcc/nvvm/libdevice nvcc/nvvm
    cp -r wheels/nvidia/cuda_{runtime,nvcc}/include/. nvcc/include
    printf '%s\n' 'TOP = $(_HERE_)/..' 'CICC_PATH = $(TOP)/nvvm/bin' \
        'NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice' 'PATH += $(TOP)/nvvm/bin:$(_HERE_):' \
        'INCLUDES += "-I$(TOP)/include"' > nvcc/bin/nvcc.profile
    rm -rf deb apt "$deb"
}

if [ "$(uname -sm)" != "Linux x86_64" ]; then skip "the packages are for Linux on x86_64"; fi
if [ ! -e fetched ]; then
    rm -rf wheels nvcc deb apt ./*.deb
    fetch_wheels
    if [ "$version" = 12.4 ]; then fetch_nvcc; fi
    touch fetched
fi

if [ "$version" = 12.4 ]; then
    nvcc/bin/nvcc --version | tail -2
    bash "$here/check.sh" front-ptx moe/moe.cuh "$dir/moe" "$PWD/nvcc/bin/nvcc"
    exit 0
fi

# NVRTC has no C headers; host functions count as device functions, which no kernel calls.
nvrtc=wheels/nvidia/cuda_nvrtc include=wheels/nvidia/cuda_runtime/include
mkdir -p stub
: > stub/stddef.h
: > stub/string.h
: > stub/math.h
cat > stub/stdio.h << 'END' # and what string.h lacks
extern __device__ int snprintf(char*, size_t, const char*, ...);
extern __device__ int sscanf(const char*, const char*, ...);
extern __device__ int strcmp(const char*, const char*);
extern __device__ size_t strlen(const char*);
extern __device__ const char* strchr(const char*, int);
END
for bits in 8:char 16:short 32:int 64:long; do
    echo "typedef signed ${bits#*:} int${bits%:*}_t; typedef unsigned ${bits#*:} uint${bits%:*}_t;"
done > stub/stdint.h
cat >> stub/stdint.h << 'END'
typedef long intptr_t;
typedef unsigned long uintptr_t;
#define INT32_MIN (-2147483647 - 1)
#define INT32_MAX 2147483647
#define UINT32_MAX 4294967295u
#define INT64_MAX 9223372036854775807l
#define UINT64_MAX 18446744073709551615ul
#define SIZE_MAX UINT64_MAX
END
"$cc" -I$nvrtc/include "$here/nvrtc.c" $nvrtc/lib/libnvrtc.so.12 "-Wl,-rpath,$PWD/$nvrtc/lib" -o nvrtc
"$cc" -std=c11 -Wall -Werror -I$include -Iwheels/nvidia/cuda_nvcc/include -fsyntax-only -x c "$here/nvrtc.h"

# compile HEADER ARCHITECTURE [OPTION...]: to alone.ptx
compile() {
    local header=$1 arch=$2
    shift 2
    { if [[ $header != moe/gemm/grouped*.cuh ]] && [ $# -gt 0 ]; then
          echo '#define MOE_GEMM_VARIANT_LIST(X, ...)' # as check.sh does: most of the work
      fi
      echo "#include \"$header\""; } > alone.cu
    if ! ./nvrtc alone.cu alone.ptx "-arch=compute_$arch" -std=c++14 -default-device "-I$root" \
        "-I$here" -Istub -I$include -Iwheels/nvidia/cuda_nvcc/include -include=nvrtc.h "$@" \
        > log 2> noise; then
        echo "FAILED: $header for sm_$arch"
        cat log
        grep -v 'dbg location' noise | grep -m5 nvrtc || true
        exit 1
    fi
    cat log
}
count=0
for header in $(cd "$root" && find moe -name '*.cuh' | sort); do
    case $header in
    moe/ep/nccl*) continue ;; # NCCL is not part of the toolkit
    moe/moe.cuh | moe/gemm/*) compile "$header" 80 -G ;; # -G: quicker
    esac
    compile "$header" 90a -G
    count=$((count + 1))
done
echo "CUDA $version: $count headers"
compile moe/moe.cuh 90a
wheels/nvidia/cuda_nvcc/bin/ptxas -arch=sm_90a -warn-spills -warn-lmem-usage alone.ptx -o alone.cubin
echo "CUDA $version: moe/moe.cuh to machine code of sm_90a"
