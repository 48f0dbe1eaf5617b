#!/bin/bash
# Shows that each model can fail: plants a defect in a copy of the sources, runs the
# model that must find it, and prints the table. `model-mutants.sh [WORD]`: only those
# whose line has the word. `model-mutants.sh --plantable`: only whether each can still be
# planted, which takes no time.
#
# A line: tool | crate | test | file | sed's substitution | what is wrong
set -u
cd "$(dirname "$0")/../.." || exit 1
only=${1:-} run=true
if [ "$only" = --plantable ]; then only='' run=false; fi
work=$(mktemp -d "${TMPDIR:-/tmp}/uext-mutants.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
target=$PWD/${CARGO_TARGET_DIR:-target}/models
git ls-files --cached --others --exclude-standard | tar -c -T - 2>/dev/null | tar -x -C "$work"
caught=0 missed=0

try() {
    local tool=$1 crate=$2 test=$3 file=$4 edit=$5 what=$6 result
    cp "$work/$file" "$work/saved"
    sed -i "$edit" "$work/$file"
    if cmp -s "$work/saved" "$work/$file"; then
        result="NOT PLANTED"
    elif ! $run; then
        result=planted
    elif ! (cd "$work" && CARGO_TARGET_DIR="$target/$tool" RUSTFLAGS="--cfg $tool" \
        cargo test -q --locked -p "$crate" --lib --no-run) >"$work/log" 2>&1; then
        result="NOT BUILT"
        tail -20 "$work/log" >&2
    else
        (cd "$work" && UEXT_MODEL_FACTOR=${UEXT_MODEL_FACTOR:-4} UEXT_MODEL_DIR=$work RUST_BACKTRACE=0 \
            CARGO_TARGET_DIR="$target/$tool" RUSTFLAGS="--cfg $tool" \
            timeout 300 cargo test -q --locked -p "$crate" --lib "$test") >"$work/log" 2>&1
        case $? in
        0) result=MISSED ;;
        124) result="TIMED OUT" ;;
        *) result=caught ;;
        esac
    fi
    cp "$work/saved" "$work/$file"
    # Newer than the mutant's, or the next build would keep it.
    touch "$work/$file"
    case $result in caught | planted) caught=$((caught + 1)) ;; *) missed=$((missed + 1)) ;; esac
    if $run || [ "$result" != planted ]; then
        printf '%-12s %-8s %-15s %-28s %s\n' "$result" "$tool" "$crate" "$test" "$what"
    fi
}

while IFS='|' read -r tool crate test file edit what; do
    [ -n "$tool" ] && [ "${tool:0:1}" != "#" ] || continue
    [[ "$tool $crate $test $what" == *"$only"* ]] || continue
    try "$tool" "$crate" "$test" "$file" "$edit" "$what"
done <<'EOF'
loom|uext-blockdev|mempool|blockdev/src/mempool.rs|s/if !state.waiters.is_empty() {/if false {/|try_take overtakes who waits
loom|uext-blockdev|mempool|blockdev/src/mempool.rs|s/            self.wake(&state);/            let _ = \&state;/|an element comes back and nobody is woken
loom|uext-blockdev|ring|blockdev/src/file/aio_ring.rs|/^mod loom_tests/,$s/self.tail.load(Ordering::Acquire)/self.tail.load(Ordering::Relaxed)/|the tail is loaded relaxed
loom|uext-blockdev|ring|blockdev/src/file/aio_ring.rs|/^mod loom_tests/,$s/self.head.store(head, Ordering::Release)/self.head.store(head, Ordering::Relaxed)/|the head is stored relaxed
loom|uext-pagecache|errseq|fs/pagecache/src/errseq.rs|s/fetch_add(1, Ordering::Release)/fetch_add(1, Ordering::Relaxed)/|the count is published before the error
loom|uext-pagecache|errseq|fs/pagecache/src/errseq.rs|s/let known = since.0 . SEEN == now;/let known = since.0 == 0 \&\& now != 0 \&\& self.count() == 1;/|the first error counts as known
shuttle|uext-pagecache|pages|fs/pagecache/src/address_space.rs|s/if folio.has(ALL_DIRTY . WRITEBACK) {/if folio.has(WRITEBACK) {/|reclaim does not look at the dirty bits
shuttle|uext-pagecache|pages|fs/pagecache/src/address_space.rs|s/if Arc::strong_count(folio) != 1 {/if false {/|reclaim does not look at the references
loom|uext-pagecache|truncate|fs/pagecache/src/address_space.rs|s/^            while folio.has(WRITEBACK) {/            while false {/|truncate does not wait for writeback
loom|uext-pagecache|during_writeback|fs/pagecache/src/address_space.rs|s/^        if folio.set(want) & ALL_DIRTY != 0 {/        if folio.set(want) != 0 {/|a page that had a flag gets no dirty tag
shuttle|uext-pagecache|pages|fs/pagecache/src/address_space.rs|s/^        self.written.notify_all();//|the end of a write wakes nobody
shuttle|uext-pagecache|pages|fs/pagecache/src/address_space.rs|s/^            while folio.has(WRITEBACK) {/            while false {/|truncate does not wait for writeback
shuttle|uext-pagecache|pages|fs/pagecache/src/address_space.rs|s/if self.tags.lock().given_up == given_up {/if given_up < u64::MAX {/|fsync does not see that a write was given up
shuttle|uext-pagecache|pages|fs/pagecache/src/address_space.rs|s/Err(Some(error)) => self.write_failed.*/Err(Some(_)) => {}/|a failed write leaves the page clean
shuttle|uext-pagecache|shared|fs/pagecache/src/rmap.rs|s/if let Some(at) = all/while let Some(at) = all/|all equal mappings go with one
shuttle|uext-pagecache|shared|fs/pagecache/src/frame.rs|s/        \*self.slot().rmap.lock() = Rmap::None;//|a freed frame keeps its mappings
shuttle|uext-pagecache|shared|fs/pagecache/src/address_space.rs|/^impl Drop for AddressSpace/,/^}/s/folio.frame().unmap(.*//|a file that goes keeps its mappings
shuttle|uext-pagecache|blocks|fs/pagecache/src/buffer.rs|s/^        while self.has(WRITEBACK) {/        while false {/|two writes of a block at once
shuttle|uext-pagecache|blocks|fs/pagecache/src/buffer.rs|s/!self.has(DIRTY . WRITEBACK)/!self.has(WRITEBACK)/|reclaim drops dirty blocks
shuttle|uext-pagecache|blocks|fs/pagecache/src/buffer.rs|s/^        self.dirty.written.notify_all();//|the end of a write wakes nobody
shuttle|uext-pagecache|blocks|fs/pagecache/src/buffer_cache.rs|/pub fn bread/,/^    }/s/        if !buffer.is_uptodate() {/        if true {/|two who read a block read over what one changed
shuttle|uext-jbd2|model|fs/jbd2/src/commit.rs|s/while state.running.as_ref().is_some_and(.tx. tx.handles > 0)/while false/|the commit does not wait for handles
shuttle|uext-jbd2|model|fs/jbd2/src/journal.rs|s/tx.handles == 0 && tx.state == TxState::Locked/false/|the last handle wakes nobody
shuttle|uext-jbd2|model|fs/jbd2/src/journal.rs|s/if tx.state != TxState::Running {/if false {/|handles join a locked transaction
shuttle|uext-jbd2|model|fs/jbd2/src/journal.rs|s/tx.outstanding -= credits;//|unused credits are not given back
shuttle|uext-jbd2|model|fs/jbd2/src/journal.rs|/pub fn abort(&self/,/^    }/s/self.changed.notify_all();//|an abort wakes nobody
shuttle|uext-jbd2|model|fs/jbd2/src/checkpoint.rs|/pub fn checkpoint_all/,/^    }/s/self.changed.notify_all();//|the end of a barrier wakes nobody
shuttle|uext-jbd2|model|fs/jbd2/src/commit.rs|s/if state.committing.is_some() {/if false {/|two commits at once
shuttle|uext-jbd2|model|fs/jbd2/src/handle.rs|s/head.frozen = Some(.*/head.frozen = None;/|contents of the committing transaction are not frozen
shuttle|uext-jbd2|model|fs/jbd2/src/commit.rs|s/writer.revokes(.*/let _ = \&mut writer;/|revoke records are not written
shuttle|uext-jbd2|model|fs/jbd2/src/commit.rs|s/drop(self.home_io.lock());//|a freed block may still be on its way home
shuttle|uext-jbd2|model|fs/jbd2/src/log.rs|/pub(crate) fn commit(mut self)/,/^    }/s/durably(preflush, fua)/durably(false, fua)/|the commit block overtakes its transaction
shuttle|uext-jbd2|model|fs/jbd2/src/log.rs|/fn write_superblock(/,/^    }/s/durably(preflush, true)/durably(false, true)/|the tail moves before blocks are home for certain
loom|uext-drive-sys|loom|tools/drive-sys/src/mutex.rs|s/            mine = tid . WAITERS;//|who has slept takes the mutex without the mark
loom|uext-drive-sys|loom|tools/drive-sys/src/mutex.rs|s/if old & WAITERS != 0 {/if false {/|giving the mutex up wakes nobody
loom|uext-drive-sys|loom|tools/drive-sys/src/word.rs|s/self.value.swap(value, Ordering::AcqRel)/self.value.swap(value, Ordering::Relaxed)/|giving the mutex up releases nothing
loom|uext-drive-sys|loom|tools/drive-sys/src/gate.rs|s/CLOSED if !self.word.replace(CLOSED, AWAITED) => continue,//|nobody marks that it waits at the gate
loom|uext-drive-sys|loom|tools/drive-sys/src/barrier.rs|s/let complete = .*/let complete = false;/|a departure does not end the round
EOF
if $run; then echo "$caught caught, $missed not"; fi
[ "$missed" = 0 ]
