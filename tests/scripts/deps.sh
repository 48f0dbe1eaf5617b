#!/bin/sh
# Installs what the tests and the demo need beside Rust, or lists what is missing.
# Exit status 0 when everything is there; 0 with a list when it cannot install:
# the tests that need a missing piece say so and are skipped.
set -eu

missing=
need() { # command, package
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
# mkfs.ext4 and its kin live in /usr/sbin, which an ordinary user's PATH may lack.
PATH="$PATH:/usr/sbin:/sbin"
need fusermount3 fuse3
need e2fsck e2fsprogs
need getfattr attr
need getfacl acl
need rsync rsync
need xfs_io xfsprogs
need python3 python3
need setcap libcap2-bin
need sqlite3 sqlite3
need bzip2 bzip2
need git git
need strace strace
need qemu-nbd qemu-utils
need nbdkit nbdkit

[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing:$missing"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 -- a list of packages
    apt-get install -y -q $missing >/dev/null 2>&1 ||
        { apt-get update -q >/dev/null 2>&1 && apt-get install -y -q $missing >/dev/null; }
else
    echo "missing packages (install them as root: apt install$missing);" >&2
    echo "what needs them is skipped" >&2
fi
