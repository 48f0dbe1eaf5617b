#!/bin/bash
# pjdfstest (crates.io) as root on uext and on the kernel's ext4 in the same run, which
# must say the same of every test.
#   pjdfstest.sh UEXT [PATTERN...]
# PJDFSTEST names the program; else cargo installs it under the target directory.
set -eu
uext=$(realpath "$1")
shift
PATH="$PATH:/usr/sbin:/sbin"
[ "$(id -u)" = 0 ] || { echo "pjdfstest.sh: needs root"; exit 2; }
if [ -z "${PJDFSTEST:-}" ]; then
    tools=$(dirname "$uext")/../tools
    [ -x "$tools/bin/pjdfstest" ] ||
        cargo install -q pjdfstest --root "$tools" --target-dir "$tools/target"
    PJDFSTEST=$tools/bin/pjdfstest
fi
PJDFSTEST=$(realpath "$PJDFSTEST")
work=$(mktemp -d /var/tmp/uext-pjdfstest-XXXXXX)
cleanup() {
    for dir in "$work/mnt" "$work/other"; do
        ! mountpoint -q "$dir" || umount "$dir" || umount -l "$dir"
    done
    rm -rf "$work"
}
chmod 755 "$work"
trap cleanup EXIT
trap 'exit 130' INT TERM
mkdir "$work/mnt" "$work/other"
cat >"$work/config" <<CONFIG
[features]
posix_fallocate = {}
utimensat = {}
utime_now = {}
rename_ctime = {}
[settings]
naptime = 0.01
# What needs a remount fails everywhere: the program itself keeps the mount busy.
allow_remount = false
expected_failures = []
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
CONFIG
for side in kernel uext; do
    for name in mnt other; do
        truncate -s 512M "$work/$name.img"
        mke2fs -q -F -t ext4 "$work/$name.img"
        if [ $side = kernel ]; then
            mount -o loop "$work/$name.img" "$work/$name"
        else
            "$uext" mount "$work/$name.img" "$work/$name"
        fi
    done
    "$PJDFSTEST" -c "$work/config" -p "$work/mnt" -s "$work/other" "$@" >"$work/raw" 2>&1 || true
    sed -e 's/\x1b\[[0-9;]*m//g' "$work/raw" >"$work/$side"
    umount "$work/mnt" "$work/other"
    for name in mnt other; do e2fsck -fn "$work/$name.img" >/dev/null 2>&1; done
    echo "$side: $(grep '^Summary' "$work/$side" || tail -3 "$work/$side")"
    # Of FUSE libc does not know the most links, so pathconf(3) tells none, and the test is skipped.
    grep -v -e '^Summary' -e '^link::link_count_max' -e 'LINK_MAX' "$work/$side" >"$work/$side.cut"
done
diff -u "$work/kernel.cut" "$work/uext.cut" && echo "the same result"
