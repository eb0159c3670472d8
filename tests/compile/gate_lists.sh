#!/usr/bin/env bash
# gate_lists.sh DIR COMPILER: compiles gate.cuh in DIR with MOE_GATE_LIST and MOE_GATE_RULES_LIST
# predefined: entries that the kernels cannot do are refused by name, others compile.
set -euo pipefail
dir=$1 compiler=$2
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$dir"
cd "$dir"
status=0

# try WANT LIST ENTRY...: WANT is fine or refused
try()
{
    local want=$1 list=$2 got=fine
    shift 2
    printf '%s\n' "#define $list(X) $*" '#include "moe/gate.cuh"' > list.cpp
    if ! "$compiler" -std=c++14 -DMOE_BACKEND=host "-I$root" -Wall -Wextra -Werror -fsyntax-only \
        list.cpp > log 2>&1; then
        got=broken
        if grep -q "$list: an entry that" log; then got=refused; fi
    fi
    if [ "$got" != "$want" ]; then
        echo "gate_lists.sh: $list(X) $* is $got, not $want"
        cat log
        status=1
    fi
}

try fine MOE_GATE_LIST 'X(8, 8, 1, 8)' 'X(32, 8, 4, 8)' 'X(60, 16, 2, 32)' 'X(256, 2, 32, 8)' \
    'X(1000, 32, 32, 32)'
try fine MOE_GATE_LIST
try refused MOE_GATE_LIST 'X(512, 10, 32, 16)' # choices: no power of two
try refused MOE_GATE_LIST 'X(1024, 64, 32, 32)' # more than 32
try refused MOE_GATE_LIST 'X(1024, 4, 32, 32)'  # fewer than a quarter of a lane's logits
try refused MOE_GATE_LIST 'X(64, 32, 2, 32)'    # more than 8 lanes finish
try refused MOE_GATE_LIST 'X(64, 8, 3, 32)'     # lanes: no power of two
try refused MOE_GATE_LIST 'X(1024, 8, 64, 16)'  # more than a warp
try refused MOE_GATE_LIST 'X(100, 8, 4, 25)'    # logits a lane: no power of two
try refused MOE_GATE_LIST 'X(32, 8, 8, 4)'      # fewer than are read at once
try refused MOE_GATE_LIST 'X(256, 16, 4, 64)'   # more than 32
try refused MOE_GATE_LIST 'X(129, 8, 4, 32)'    # experts: more than all lanes have
try refused MOE_GATE_LIST 'X(0, 8, 4, 32)'
try refused MOE_GATE_LIST 'X(64, 8, 4, 16)' 'X(512, 10, 32, 16)' # not the first alone
try fine MOE_GATE_RULES_LIST 'X(32, 8, 4, 8, 96)' 'X(256, 2, 32, 8, 1024)' 'X(1024, 32, 32, 32, 32)'
try refused MOE_GATE_RULES_LIST 'X(512, 10, 32, 16, 256)'
try refused MOE_GATE_RULES_LIST 'X(8, 8, 1, 8, 256)' # sums of probabilities: a logit a lane of a warp
try refused MOE_GATE_RULES_LIST 'X(128, 8, 8, 16, 100)' # threads: no whole warps
try refused MOE_GATE_RULES_LIST 'X(128, 8, 8, 16, 2048)'
try refused MOE_GATE_RULES_LIST 'X(128, 8, 8, 16, 0)'
exit $status
