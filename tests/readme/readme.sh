#!/usr/bin/env bash
# readme.sh ROOT DIR commands|sample|host|nvcc [COMPILER [FILE NAME]]
# commands: README.md names the two commands, and CMakePresets.json has them.
# sample: the example of README.md is samples/00_minimal/main.cu.
# host, nvcc: takes the code block that follows the line <!-- example: NAME --> in FILE, else that of
# minimal in README.md, a whole file with main, compiles it as it stands and runs it; without a GPU
# nvcc's front end only reads it.
set -euo pipefail
root=$1 kind=$3 compiler=${4:-}
readme=$root/${5:-README.md} example=${6:-minimal}
dir=$2/$example-$kind

if [ "$kind" = commands ]; then
    for preset in sample test; do
        grep -qF "cmake --workflow --preset $preset" "$readme" ||
            { echo "README.md does not name: cmake --workflow --preset $preset"; exit 1; }
        (cd "$root" && cmake --list-presets=workflow) | grep -F "\"$preset\"" > /dev/null ||
            { echo "CMakePresets.json has no workflow: $preset"; exit 1; }
    done
    echo "README.md names both commands"
    exit 0
fi

mkdir -p "$dir"
cd "$dir"
awk -v mark="<!-- example: $example -->" 'index($0, mark) == 1 { marked = 1; next }
     marked == 1 { if ($0 ~ /^```(cuda|c|cpp|c\+\+)[ \t]*$/) { marked = 2; next } exit }
     marked == 2 { if ($0 ~ /^```/) exit; print }' "$readme" > example.cu
if [ ! -s example.cu ]; then
    echo "$readme has no code block right after the line <!-- example: $example -->"
    exit 1
fi
if [ "$kind" = sample ]; then
    diff example.cu "$root/samples/00_minimal/main.cu"
    exit 0
fi
if [ "$kind" = host ]; then
    "$compiler" -x c++ -std=c++14 -O2 -Wall -Wextra -Werror "-I$root" example.cu -o example
    exec ./example
fi
if nvidia-smi -L 2> /dev/null | grep GPU > /dev/null; then
    "$compiler" "-I$root" -arch=native example.cu -o example
    exec ./example
fi
"$compiler" "-I$root" -gencode arch=compute_90a,code=lto_90a -dc example.cu -o example.o
echo "compiled, front end alone; no GPU, so not run"
