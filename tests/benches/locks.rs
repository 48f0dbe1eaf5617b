//! The mutex of `uext drive` beside pthread's process-shared ones, plain and robust: alone,
//! and wanted by two threads. `cargo bench -p uext-tests --bench locks`.

#![allow(missing_docs, reason = "criterion's macro makes a public function")]

use std::cell::UnsafeCell;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use uext_drive_sys::RobustMutex;

trait Lock: Sync {
    fn with(&self, f: &mut dyn FnMut());
}

impl Lock for RobustMutex {
    fn with(&self, f: &mut dyn FnMut()) {
        let _locked = self.lock();
        f();
    }
}

struct Pthread(Box<UnsafeCell<libc::pthread_mutex_t>>);

// SAFETY: that is what a mutex is for.
unsafe impl Sync for Pthread {}

impl Pthread {
    fn new(robust: bool) -> Self {
        // SAFETY: attributes and mutex are initialised before use and stay in place.
        unsafe {
            let mut attributes: libc::pthread_mutexattr_t = std::mem::zeroed();
            assert_eq!(libc::pthread_mutexattr_init(&raw mut attributes), 0);
            let shared = libc::PTHREAD_PROCESS_SHARED;
            assert_eq!(libc::pthread_mutexattr_setpshared(&raw mut attributes, shared), 0);
            if robust {
                let robust = libc::PTHREAD_MUTEX_ROBUST;
                assert_eq!(libc::pthread_mutexattr_setrobust(&raw mut attributes, robust), 0);
            }
            let mutex = Box::new(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));
            assert_eq!(libc::pthread_mutex_init(mutex.get(), &raw const attributes), 0);
            Self(mutex)
        }
    }
}

impl Lock for Pthread {
    fn with(&self, f: &mut dyn FnMut()) {
        // SAFETY: initialised; unlocked by who locked it.
        unsafe {
            assert_eq!(libc::pthread_mutex_lock(self.0.get()), 0);
            f();
            assert_eq!(libc::pthread_mutex_unlock(self.0.get()), 0);
        }
    }
}

/// Runs what is given while another thread wants the lock too, or alone.
fn beside(lock: &dyn Lock, contended: bool, run: impl FnOnce()) {
    let stop = AtomicBool::new(!contended);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                lock.with(&mut || n = black_box(n + 1));
            }
        });
        run();
        stop.store(true, Ordering::Relaxed);
    });
}

fn locks(criterion: &mut Criterion) {
    for contended in [false, true] {
        let name = if contended { "lock, two threads" } else { "lock, alone" };
        let mut group = criterion.benchmark_group(name);
        // A thread that has taken one of ours has put its list in the place of libc's: that
        // matters to pthread's robust ones only at a death, and nobody dies here.
        let kinds: [(&str, Box<dyn Lock>); 3] = [
            ("pthread", Box::new(Pthread::new(false))),
            ("pthread robust", Box::new(Pthread::new(true))),
            ("uext", Box::new(RobustMutex::new())),
        ];
        for (kind, lock) in &kinds {
            group.bench_function(BenchmarkId::from_parameter(kind), |bencher| {
                beside(lock.as_ref(), contended, || {
                    let mut n = 0u64;
                    bencher.iter(|| lock.with(&mut || n = black_box(n + 1)));
                });
            });
        }
    }
}

criterion_group!(benches, locks);
criterion_main!(benches);
