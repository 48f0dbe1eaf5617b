#!/bin/bash
# The concurrency models: loom's, which try every interleaving of a few threads, and
# shuttle's, which schedule whole subsystems at random. UEXT_MODEL_FACTOR=n: n times
# as many schedules, and one preemption more for loom; UEXT_MODEL_SEED and
# UEXT_MODEL_REPLAY run a failure again (see fs/sync/src/explore.rs).
set -eu
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}/models

run() {
    local tool=$1
    shift
    CARGO_TARGET_DIR=$target/$tool RUSTFLAGS="--cfg $tool" \
        "${CARGO:-cargo}" test -q --locked --lib "$@"
}

run loom -p uext-blockdev -p uext-pagecache -p uext-drive-sys loom
run shuttle -p uext-pagecache -p uext-jbd2 model
# The defects that `make models` plants follow the code, or it would show nothing.
tests/scripts/model-mutants.sh --plantable
