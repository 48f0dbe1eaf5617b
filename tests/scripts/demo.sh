#!/bin/sh
# uext from one end to the other: an image is made, mounted, filled with a real
# tree, unmounted, and checked by uext and by e2fsck.
#   demo.sh UEXT DIR
set -eu
uext=$1
dir=$2
PATH="$PATH:/usr/sbin:/sbin"
img=$dir/demo.img
mnt=$dir/mnt

say() { printf '\n== %s\n' "$*"; }
cleanup() {
    mountpoint -q "$mnt" 2>/dev/null && "$uext" umount "$mnt"
    rm -rf "$dir"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

rm -rf "$dir"
mkdir -p "$mnt"

say "make an ext4 image of 512 MiB: uext mkfs -E root_owner $img 512M"
"$uext" mkfs -q -E root_owner "$img" 512M
say "mount it: uext mount $img $mnt"
"$uext" mount "$img" "$mnt"
df -h "$mnt" | sed 's/^/   /'
say "copy a real tree in: cp -a /usr/include $mnt/"
cp -a /usr/include "$mnt/"
files=$(find "$mnt" -type f | wc -l)
echo "   $files files"
say "compare it: diff -r --no-dereference /usr/include $mnt/include"
diff -r --no-dereference /usr/include "$mnt/include"
echo "   no difference"
say "unmount: uext umount $mnt"
"$uext" umount "$mnt"
say "check it with uext: uext fsck -n $img"
"$uext" fsck -n -f "$img"
if command -v e2fsck >/dev/null 2>&1; then
    say "check it with e2fsck: e2fsck -fn $img"
    e2fsck -fn "$img"
fi
say "done: $files files went through a mount; both checkers find the image clean"
