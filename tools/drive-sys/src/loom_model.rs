//! What loom checks of the futex modules: run by `tests/scripts/models.sh`, or
//! `RUSTFLAGS="--cfg loom" cargo test -p uext-drive-sys --lib loom` (own target directory).

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use crate::mutex::{OWNER_DIED, RobustMutex, WAITERS};
use crate::{Barrier, Gate};

loom::thread_local! {
    static ID: std::cell::Cell<u32> = std::cell::Cell::new(0);
}

/// A thread's number in the model: given by the test, since loom gives none.
pub(crate) fn thread_id() -> u32 {
    ID.with(|id| {
        let known = id.get();
        assert_ne!(known, 0, "the test names its threads");
        known
    })
}

fn be(id: u32) {
    ID.with(|own| own.set(id));
}

/// What a mutex guards; loom fails when two reach it at once, or one sees old contents.
struct Guarded {
    mutex: RobustMutex,
    value: UnsafeCell<u32>,
}

// SAFETY: loom watches each access of the cell and fails on a race, which is the test.
unsafe impl Sync for Guarded {}
// SAFETY: as above.
unsafe impl Send for Guarded {}

impl Guarded {
    fn new() -> Arc<Self> {
        Arc::new(Self { mutex: RobustMutex::new(), value: UnsafeCell::new(0) })
    }

    fn add(&self) -> bool {
        let locked = self.mutex.lock();
        // SAFETY: loom fails when somebody else reaches it meanwhile.
        self.value.with_mut(|value| unsafe { *value += 1 });
        locked.recovered()
    }

    fn value(&self) -> u32 {
        let _locked = self.mutex.lock();
        // SAFETY: as above.
        self.value.with(|value| unsafe { *value })
    }

    /// Takes the mutex and ends, as the kernel sees it: `handle_futex_death`.
    fn die_with_it(&self) {
        std::mem::forget(self.mutex.lock());
        let word = &self.mutex.word;
        loop {
            let current = word.load_relaxed();
            if word.replace(current, (current & WAITERS) | OWNER_DIED) {
                if current & WAITERS != 0 {
                    word.wake(1);
                }
                return;
            }
        }
    }
}

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    let more = std::env::var("UEXT_MODEL_FACTOR").is_ok_and(|factor| factor != "1");
    builder.preemption_bound = Some(preemptions + usize::from(more));
    builder.check(model);
}

/// A lost wake-up shows as a thread that never ends: loom calls it a deadlock.
#[test]
fn loom_three_threads_take_turns_and_none_sleeps_for_ever() {
    check(2, || {
        let guarded = Guarded::new();
        let threads: Vec<_> = (2..4)
            .map(|id| {
                let guarded = guarded.clone();
                thread::spawn(move || {
                    be(id);
                    guarded.add();
                })
            })
            .collect();
        be(1);
        guarded.add();
        threads.into_iter().for_each(|thread| thread.join().expect("it ends"));
        assert_eq!(guarded.value(), 3);
    });
}

#[test]
fn loom_two_threads_hand_over_again_and_again() {
    check(3, || {
        let guarded = Guarded::new();
        let other = guarded.clone();
        let thread = thread::spawn(move || {
            be(2);
            other.add();
            other.add();
        });
        be(1);
        guarded.add();
        guarded.add();
        thread.join().expect("it ends");
        assert_eq!(guarded.value(), 4);
    });
}

#[test]
fn loom_one_recovers_what_a_dead_owner_held_and_all_go_on() {
    check(2, || {
        let guarded = Guarded::new();
        let dying = guarded.clone();
        let dead = thread::spawn(move || {
            be(2);
            dying.die_with_it();
        });
        let other = guarded.clone();
        let thread = thread::spawn(move || {
            be(3);
            other.add()
        });
        be(1);
        let mine = guarded.add();
        let theirs = thread.join().expect("it ends");
        dead.join().expect("it ends");
        let late = guarded.mutex.lock().recovered();
        // Exactly one owner after it is told, whoever that is.
        assert_eq!(u32::from(mine) + u32::from(theirs) + u32::from(late), 1);
    });
}

#[test]
fn loom_who_passes_a_gate_sees_what_was_written_before_it_opened() {
    check(3, || {
        let state = Arc::new((Gate::new(), Guarded::new()));
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let state = state.clone();
                thread::spawn(move || {
                    state.0.pass();
                    // SAFETY: loom fails when it is still being written.
                    state.1.value.with(|value| unsafe { *value })
                })
            })
            .collect();
        // SAFETY: loom fails when somebody reads it already.
        state.1.value.with_mut(|value| unsafe { *value = 7 });
        state.0.open();
        waiters.into_iter().for_each(|waiter| assert_eq!(waiter.join().expect("through"), 7));
    });
}

#[test]
fn loom_a_barrier_ends_its_round_with_the_last_arrival_or_departure() {
    check(2, || {
        let barrier = Arc::new(Barrier::new());
        barrier.set_needed(3);
        let arriving = barrier.clone();
        let one = thread::spawn(move || arriving.arrive(|| false));
        let leaving = barrier.clone();
        let gone = thread::spawn(move || leaving.leave());
        let mine = barrier.arrive(|| false);
        let theirs = one.join().expect("through");
        gone.join().expect("gone");
        assert!(!(mine && theirs), "two were last");
    });
}
