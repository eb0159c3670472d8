#!/usr/bin/env bash
# includes.sh ROOT: for each station the headers that it includes, directly or through others: the
# table of README's section "Copy what you need".
#   includes.sh ROOT write             puts it into README.md
#   includes.sh ROOT check DIR CXX     README.md must have it; and each station compiles from a folder
#                                      that has its row and moe/host/, nothing else
set -euo pipefail
cd "$1"
kind=${2:-print}

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

stations=$(LC_ALL=C ls moe/*.cuh | grep -v '^moe/moe\.cuh$')
rows=
for header in $stations; do
    seen=" "
    closure "$header"
    rows="$rows| \`${header#moe/}\` | \`$(words $seen)\` |"$'\n'
done

# README.md with the rows of that section replaced by these
replaced() {
    ROWS=$rows awk '/^## / { inside = /^## Copy what you need/; put = 0 }
                    inside && /^\| `/ { if (!put) printf "%s", ENVIRON["ROWS"]; put = 1; next }
                    { print }' README.md
}

case $kind in
print) printf '%s' "$rows" ;;
write) new=$(replaced) && printf '%s\n' "$new" > README.md ;;
check)
    dir=$3 compiler=$4
    if ! diff README.md <(replaced); then
        echo "FAILED: README.md (<) is not what the includes say (>): run tests/readme/includes.sh . write"
        exit 1
    fi
    for header in $stations; do
        list=$(grep -F "| \`${header#moe/}\` | \`" README.md | grep base/ | cut -d'`' -f4)
        rm -rf "$dir"
        mkdir -p "$dir/moe"
        (cd moe && eval "cp -r --parents $list host $dir/moe")
        echo "#include \"$header\"" > "$dir/alone.cpp"
        "$compiler" -std=c++14 -fsyntax-only "-I$dir" "$dir/alone.cpp"
        echo "$header: $(find "$dir/moe" -type f -not -path '*/host/*' | wc -l) files"
    done ;;
*) echo "includes.sh: no such kind: $kind" >&2; exit 2 ;;
esac
