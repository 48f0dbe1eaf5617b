#!/bin/sh
# Compares uext with kernel ext4 and fuse2fs: bench.sh UEXT [arguments of bench.py].
# The report is printed; figures and a picture go to target/bench.json and .svg.
set -eu
uext=$1
shift
here=$(dirname "$0")
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
exec python3 "$here/../bench/bench.py" --uext "$uext" --json "$out/bench.json" --svg "$out/bench.svg" "$@"
