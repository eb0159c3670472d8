#!/bin/sh
# expect.sh CODE REGEX PROGRAM ARGUMENT...: the program must end with CODE and print a line that
# REGEX matches; where CODE is 2, that is one line on stderr and nothing on stdout. A program that
# ends with 77, for want of a device, is Skipped.
code=$1 regex=$2
shift 2
err=$(mktemp) || exit 1
trap 'rm -f "$err"' EXIT
out=$("$@" 2> "$err")
got=$?
printf '%s\n' "$out"
cat "$err"
[ $got -eq 77 ] && exit 77
fail() { echo "FAILED: $*"; exit 1; }
[ $got -eq "$code" ] || fail "exit code $got, expected $code"
if [ "$code" -eq 2 ]; then
    [ -z "$out" ] || fail "something on stdout"
    [ "$(wc -l < "$err")" -eq 1 ] || fail "not one line on stderr"
    out=$(cat "$err")
fi
printf '%s\n' "$out" | grep -qE -e "$regex" || fail "no line matches $regex"
