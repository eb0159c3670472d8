#!/usr/bin/env bash
# includes.sh ROOT: for each station the headers that it includes, directly or through others: the
# table of docs/copying.md's section "Files of each station".
#   includes.sh ROOT write             puts it into docs/copying.md
#   includes.sh ROOT check DIR CXX     docs/copying.md must have it; each station compiles from a
#                                      folder that has its row and moe/host/, nothing else; and so
#                                      does combine from what the commands of README.md and
#                                      docs/copying.md copy, as they are printed
set -euo pipefail
cd "$1"
kind=${2:-print} page=docs/copying.md

# closure FILE: adds FILE and all that it includes to `seen`, but for the CPU backend
closure() {
    local file=$1 to
    case $seen in *" $file "*) return ;; esac
    seen="$seen$file "
    while read -r to; do
        to=$(realpath -m --relative-to=. "$(dirname "$file")/$to")
        if [ ! -e "$to" ]; then echo "includes.sh: $file includes $to, which is nowhere" >&2; exit 1; fi
        case $to in moe/host/*) ;; *) closure "$to" ;; esac
    done < <(sed -n 's/^ *# *include *"\(.*\)".*/\1/p' "$file")
}

# words FILE...: files without a folder, then one folder after another: gate.cuh base/{a.h,b.h}
words() {
    printf '%s\n' "$@" | sed 's#^moe/##' | LC_ALL=C sort | awk '
        !/\// { top = top " " $0; next }
        { dir = $0; sub(/[^\/]*$/, "", dir); name = substr($0, length(dir) + 1)
          if (!(dir in files)) order[++n] = dir
          files[dir] = files[dir] (files[dir] == "" ? "" : ",") name; count[dir]++ }
        END { for (i = 1; i <= n; ++i) { d = order[i]
                  top = top " " d (count[d] > 1 ? "{" files[d] "}" : files[d]) }
              print substr(top, 2) }'
}

stations=$(LC_ALL=C ls moe/*.cuh | grep -vE '^moe/(moe|preload)\.cuh$')
stations="$stations moe/gemm/grouped_gradient.cuh moe/gemm/k_grouped.cuh" # not part of a station above
stations="$stations moe/ep/barrier.cuh moe/ep/dispatch.cuh moe/ep/combine.cuh moe/ep/layer.cuh"
stations="$stations moe/ep/layer_backward.cuh"
rows=
for header in $stations; do
    seen=" "
    closure "$header"
    rows="$rows| \`${header#moe/}\` | \`$(words $seen)\` |"$'\n'
done

# docs/copying.md with the rows of that section replaced by these
replaced() {
    ROWS=$rows awk '/^## / { inside = /^## Files of each station/; put = 0 }
                    inside && /^\| `/ { if (!put) printf "%s", ENVIRON["ROWS"]; put = 1; next }
                    { print }' $page
}

# copies PAGE DIR: runs the code block of PAGE that begins with mkdir -p /path/to/app/moe, with DIR as
# /path/to/app
copies() {
    local block
    block=$(awk '/^```/ { inside = !inside; at = 0; mine = 0; next }
                 inside && ++at == 1 && index($0, "mkdir -p /path/to/app/moe ") == 1 { mine = 1 }
                 inside && mine' "$1")
    if [ -z "$block" ]; then echo "FAILED: $1 has no command that copies combine"; exit 1; fi
    bash -euo pipefail -c "${block//\/path\/to\/app/$2}"
}

# alone DIR HEADER CXX: HEADER compiles in DIR, which has nothing else
alone() {
    echo "#include \"$2\"" > "$1/alone.cpp"
    "$3" -std=c++14 -fsyntax-only "-I$1" "$1/alone.cpp"
    echo "$2: $(find "$1/moe" -type f -not -path '*/host/*' | wc -l) files"
}

case $kind in
print) printf '%s' "$rows" ;;
write) new=$(replaced) && printf '%s\n' "$new" > $page ;;
check)
    dir=$3 compiler=$4
    if ! diff $page <(replaced); then
        echo "FAILED: $page (<) is not what the includes say (>): run tests/readme/includes.sh . write"
        exit 1
    fi
    for text in README.md $page; do
        rm -rf "$dir"
        mkdir -p "$dir"
        copies "$text" "$dir"
        alone "$dir" moe/combine.cuh "$compiler"
        row=$(grep -F '| `combine.cuh` | `' $page | cut -d'`' -f4)
        if ! diff <(cd "$dir/moe" && find . -type f -not -path './host/*' | LC_ALL=C sort) \
                  <(cd moe && eval "find $row" | sed 's#^#./#' | LC_ALL=C sort); then
            echo "FAILED: $text (<) does not copy the files of combine (>)"
            exit 1
        fi
    done
    for header in $stations; do
        list=$(grep -F "| \`${header#moe/}\` | \`" $page | grep base/ | cut -d'`' -f4)
        rm -rf "$dir"
        mkdir -p "$dir/moe"
        (cd moe && eval "cp -r --parents $list host $dir/moe")
        alone "$dir" "$header" "$compiler"
    done ;;
*) echo "includes.sh: no such kind: $kind" >&2; exit 2 ;;
esac
