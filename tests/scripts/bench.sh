#!/bin/sh
# Compares uext with kernel ext4, fuse2fs and, where it is built, the filesystem in memory of
# fs/fuse/examples: bench.sh UEXT [--readme] [arguments of bench.py].
# The report is printed and goes to target/bench.md; figures and a picture go to bench.json and
# bench.svg there. With --readme the picture of a run without failures becomes the README's.
set -eu
uext=$1
shift
here=$(dirname "$0")
readme=
if [ "${1-}" = --readme ]; then
    readme=$here/../bench/ratios.svg
    shift
fi
missing=
for tool in fio:fio fuse2fs:fuse2fs sqlite3:sqlite3 mkfs.ext4:e2fsprogs; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${tool%%:*}" >/dev/null || missing="$missing ${tool##*:}"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing:$missing"
        # shellcheck disable=SC2086 -- a list of packages
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q $missing >/dev/null
    else
        echo "missing packages:$missing" >&2
        exit 1
    fi
fi
export PYTHONDONTWRITEBYTECODE=1
out=$(dirname "$(dirname "$uext")")
null=$out/release/examples/nullfs
[ ! -x "$null" ] || set -- --null "$null" "$@"
python3 "$here/../bench/bench.py" --uext "$uext" --json "$out/bench.json" --svg "$out/bench.svg" \
    --report "$out/bench.md" "$@"
[ -z "$readme" ] || cp "$out/bench.svg" "$readme"
