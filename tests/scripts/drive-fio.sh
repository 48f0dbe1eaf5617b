#!/bin/sh
# Compares uext drive with fio on one mount: drive-fio.sh UEXT [arguments of drive_fio.py].
set -eu
uext=$1
shift
here=$(dirname "$0")
if ! command -v fio >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing: fio"
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q fio >/dev/null
    else
        echo "missing package: fio" >&2
        exit 1
    fi
fi
export PYTHONDONTWRITEBYTECODE=1
exec python3 "$here/../bench/drive_fio.py" --uext "$uext" "$@"
