#!/usr/bin/env bash
# package.sh ROOT DIR CMAKE HOW KERNELS [COMPILER]: configures, builds and runs the neighbouring
# project in DIR. HOW is find_package, FetchContent or add_subdirectory; KERNELS none (plain C), cpu or
# cuda, with the C, C++ or CUDA compiler. With HOW version: find_package must refuse a version that
# the installed one cannot stand for, and take those that it can.
set -euo pipefail
root=$1 dir=$2 cmake=$3 how=$4 kernels=$5 compiler=$6
here=$(cd "$(dirname "$0")" && pwd)
unset CC CXX CUDACC CMAKE_PREFIX_PATH CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH
rm -rf "$dir"
mkdir -p "$dir"
options=(-S "$here/neighbour" "-DHOW=$how" "-DKERNELS=$kernels" "-DMOE_ROOT=$root" --no-warn-unused-cli)
case $kernels in
none) options+=("-DCMAKE_C_COMPILER=$compiler") ;;
cpu) options+=("-DCMAKE_CXX_COMPILER=$compiler") ;;
cuda) options+=("-DCMAKE_CUDA_COMPILER=$compiler" -DCMAKE_CUDA_ARCHITECTURES=90a) ;;
esac

# Installed from a build that builds nothing; the headers must be there without the sources.
install() {
    "$cmake" -S "$root" -B "$dir/moe" -DMOE_BUILD_TESTS=OFF -DMOE_BUILD_SAMPLES=OFF \
        -DMOE_BUILD_BENCH=OFF > "$dir/install.log"
    "$cmake" --install "$dir/moe" --prefix "$dir/prefix" >> "$dir/install.log"
    (cd "$root" && find moe -name '*.h' -o -name '*.cuh' -o -name '*.inl') | sort > "$dir/want"
    (cd "$dir/prefix/include" && find . -type f | sed 's#^\./##') | sort > "$dir/got"
    diff "$dir/want" "$dir/got" || { echo "FAILED: not the same files are installed"; exit 1; }
    if grep -rqF "$root" "$dir/prefix"; then echo "FAILED: the package names its sources"; exit 1; fi
    mv "$dir/prefix" "$dir/moved" # it may stand anywhere
    options+=("-DCMAKE_PREFIX_PATH=$dir/moved")
}

if [ "$how" = version ]; then
    install
    options+=(-DHOW=find_package)
    number() { sed -n "s/^#define MOE_VERSION_$1 //p" "$root/moe/base/config.h"; }
    major=$(number MAJOR) minor=$(number MINOR) patch=$(number PATCH)
    for good in "$major.$minor" "$major.$minor.$patch"; do
        "$cmake" "${options[@]}" -B "$dir/$good" "-DVERSION=$good"
    done
    for bad in "$major.$((minor + 1))" "$major.$minor.$((patch + 1))" "$((major + 1)).0"; do
        if "$cmake" "${options[@]}" -B "$dir/$bad" "-DVERSION=$bad" > "$dir/log" 2>&1; then
            echo "FAILED: find_package(moe $bad) finds $major.$minor.$patch"
            exit 1
        fi
        grep -q 'considered but not accepted' "$dir/log" || { cat "$dir/log"; exit 1; }
        echo "refused: $bad"
    done
    exit 0
fi

if [ "$how" = find_package ]; then install; fi
"$cmake" "${options[@]}" -B "$dir/app"
"$cmake" --build "$dir/app"
"$dir/app/app"
"$cmake" --install "$dir/app" --prefix "$dir/theirs" > "$dir/theirs.log"
if [ "$how" != find_package ] && [ -e "$dir/theirs/include" ]; then
    echo "FAILED: the neighbour's install has the collection in it"
    exit 1
fi
