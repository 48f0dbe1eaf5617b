#!/bin/sh
# Runs the tests of mounts with every mount over FUSE over io_uring: test-uring.sh CARGO.
# The kernel offers that to the whole system by one parameter, which is set for the run
# and restored; mounts that don't ask for rings don't notice.
set -eu
cargo=$1
parameter=/sys/module/fuse/parameters/enable_uring
[ "$(id -u)" = 0 ] && [ -w "$parameter" ] || {
    echo "SKIPPED: needs root and a kernel with FUSE over io_uring" >&2
    exit 0
}
if [ -z "${UEXT_TEST_URING_LOCKED:-}" ]; then
    # One at a time, and not while a test of one mount sets the parameter itself.
    UEXT_TEST_URING_LOCKED=1 exec flock "$parameter" "$0" "$@"
fi
before=$(cat "$parameter")
restore() { echo "$before" >"$parameter"; }
trap restore EXIT
trap 'exit 130' INT TERM
echo Y >"$parameter"
export UEXT_TEST_TRANSPORT=uring
"$cargo" test --locked -p uext-fuse --test mount
"$cargo" test --locked -p uext-tools --test mount
"$cargo" test --locked -p uext-tests --test programs
