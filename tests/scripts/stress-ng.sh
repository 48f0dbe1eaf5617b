#!/bin/bash
# stress-ng's filesystem stressors, one after the other, on uext: e2fsck must find nothing after
# each, and what fails must fail on the kernel's ext4 too, where it then runs as well.
#   stress-ng.sh UEXT [STRESSOR...]   SECONDS_EACH (30) says how long each runs.
set -u
PATH="$PATH:/usr/sbin:/sbin"
uext=$(realpath "${1:?usage: stress-ng.sh UEXT [STRESSOR...]}")
shift
[ "$(id -u)" = 0 ] || { echo "stress-ng: SKIPPED: needs root"; exit 0; }
command -v stress-ng >/dev/null || apt-get install -y -q stress-ng >/dev/null 2>&1
command -v stress-ng >/dev/null || { echo "stress-ng: SKIPPED: not installed"; exit 0; }
if [ $# -gt 0 ]; then
    stressors=("$@")
else
    read -ra stressors < <(stress-ng --class 'filesystem?' 2>&1 | sed -n 's/^class .*: //p')
fi
[ ${#stressors[@]} -gt 0 ] || { echo "stress-ng: names no stressors"; exit 1; }
work=$(mktemp -d /var/tmp/uext-stress-XXXXXX)
mkdir "$work/mnt"
# Somebody else may have the mount open for a while, such as a stressor beside that watches all.
unmount() { for _ in {1..60}; do umount "$work/mnt" 2>/dev/null && return; sleep 1; done; umount -l "$work/mnt"; }
cleanup() { mountpoint -q "$work/mnt" && unmount; rm -rf "$work"; }
trap cleanup EXIT
trap 'exit 130' INT TERM

# One stressor on one side: its exit status, or 99 for damage.
run() { # side, stressor
    local status
    rm -f "$work/img"
    truncate -s 2G "$work/img"
    mkfs.ext4 -q -F "$work/img"
    if [ "$1" = kernel ]; then
        mount -o loop "$work/img" "$work/mnt"
    else
        "$uext" mount "$work/img" "$work/mnt" --log-file "$work/log"
    fi || return 98
    timeout $((${SECONDS_EACH:-30} + 120)) stress-ng --"$2" 2 --timeout "${SECONDS_EACH:-30}" \
        --verify --temp-path "$work/mnt" >"$work/out.$1" 2>&1
    status=$?
    unmount
    if ! e2fsck -fn "$work/img" >"$work/fsck" 2>&1; then
        cat "$work/fsck"
        return 99
    fi
    if [ "$1" = uext ] && grep -q 'panicked at' "$work/log"; then return 97; fi
    return $status
}

bad=()
for stressor in "${stressors[@]}"; do
    run uext "$stressor"
    ours=$?
    if [ $ours = 0 ]; then
        echo "$stressor: ok"
        continue
    fi
    run kernel "$stressor"
    theirs=$?
    echo "$stressor: uext $ours, kernel $theirs"
    grep -E 'fail|error' "$work/out.uext" | head -5
    [ $ours = $theirs ] || bad+=("$stressor")
done
echo "${#stressors[@]} stressors, ${#bad[@]} fail on uext alone${bad[*]:+: ${bad[*]}}"
[ ${#bad[@]} = 0 ]
