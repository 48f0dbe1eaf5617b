//! Keeping idle CPUs ready while requests come in quick succession.
//!
//! A FUSE request wakes a worker, and its reply wakes the program that waits. Whichever
//! of the two ran last has left its CPU idle, and a CPU that has halted takes tens of
//! microseconds to come back on a virtual machine: more than most requests take. The
//! kernel's PM QoS limits that, for as long as a descriptor of `/dev/cpu_dma_latency`
//! holds a value (Documentation/power/pm_qos_interface). So a mount that is asked often
//! holds one, and lets go when it is asked less.
//!
//! Where the idle driver is haltpoll (a virtual machine) the value is 0: CPUs poll
//! instead of halting. Elsewhere it is [`SHALLOW`], which leaves the first idle state and
//! excludes those that take long to leave. The kernel takes the value back when the
//! descriptor closes, so also when the daemon is killed.
//!
//! Workers count ([`Awake::note`]); every [`SAMPLE`] requests one looks at the clock, and
//! once they come quickly it holds the value and wakes the keeper, a thread that looks
//! again every [`PERIOD`] and otherwise sleeps.
//!
//! Locks: `state`, a leaf but for the write to the device.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uext_sync::{Condvar, Mutex};
use zerocopy::IntoBytes;

/// Where a process says how quickly CPUs must wake.
const DEVICE: &str = "/dev/cpu_dma_latency";
/// What puts idle CPUs to sleep.
const IDLE_DRIVER: &str = "/sys/devices/system/cpu/cpuidle/current_driver";
/// `PM_QOS_CPU_LATENCY_DEFAULT_VALUE`, in microseconds: no wish.
const NO_LIMIT: i32 = 2_000_000_000;
/// Microseconds that an idle state may take to leave where not even one may be entered
/// on a virtual machine: the first state of today's processors takes 1 or 2.
const SHALLOW: u16 = 2;
/// Requests between two looks at the clock.
const SAMPLE: u64 = 16;
/// Requests that follow each other like this, on average, are worth it.
const QUICK: Duration = Duration::from_micros(400);
/// How often the keeper looks whether they still come.
const PERIOD: Duration = Duration::from_millis(10);
/// Fewer requests in a period end it: those of half the speed that begins it.
const LEAST: u64 = (PERIOD.as_micros() / QUICK.as_micros() / 2) as u64;

/// How quickly idle CPUs must wake while a mount is busy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuLatency {
    /// What suits the machine.
    #[default]
    Auto,
    /// As the machine has it.
    Off,
    /// Microseconds.
    Within(u16),
}

/// What a session's workers count for.
pub(crate) struct Awake {
    /// None where nothing can be done.
    keeper: Option<Keeper>,
}

struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Requests. WHY-RELAXED: a statistic.
    count: AtomicU64,
    /// Whether the device has the limit. WHY-RELAXED: changed under `state`; who looks without
    /// it and sees it late looks at the clock, or for a request, once more or once less.
    held: AtomicBool,
    state: Mutex<State>,
    change: Condvar,
}

struct State {
    device: File,
    limit: i32,
    closed: bool,
    /// When a worker last looked at the clock.
    sampled: Option<Instant>,
}

impl Awake {
    /// As `latency` says, where the machine has the interface and lets us.
    pub(crate) fn new(latency: CpuLatency) -> Self {
        let driver = || std::fs::read_to_string(IDLE_DRIVER).unwrap_or_default();
        let limit = match latency {
            CpuLatency::Off => return Self { keeper: None },
            CpuLatency::Within(micros) => micros,
            CpuLatency::Auto => match driver().trim() {
                "haltpoll" => 0,
                // Without a driver idle CPUs do what they do, whatever anybody holds.
                "" | "none" => return Self { keeper: None },
                _ => SHALLOW,
            },
        };
        let keeper = Keeper::start(Path::new(DEVICE), limit.into());
        match &keeper {
            Ok(_) => log::debug!("CPUs wake within {limit} us while requests come quickly"),
            Err(error) => log::debug!("idle CPUs are left alone: {DEVICE}: {error}"),
        }
        Self { keeper: keeper.ok() }
    }

    /// A request has come.
    pub(crate) fn note(&self) {
        let Some(Keeper { shared, .. }) = &self.keeper else { return };
        let count = shared.count.fetch_add(1, Ordering::Relaxed); // WHY-RELAXED: a statistic
        if count.is_multiple_of(SAMPLE) && !self.is_held() {
            shared.sample(Instant::now());
        }
    }

    /// Whether CPUs are being kept awake.
    pub(crate) fn is_held(&self) -> bool {
        self.keeper.as_ref().is_some_and(|keeper| keeper.shared.is_held())
    }
}

impl Keeper {
    fn start(device: &Path, limit: i32) -> io::Result<Self> {
        let device = OpenOptions::new().write(true).open(device)?;
        let state = State { device, limit, closed: false, sampled: None };
        let shared = Arc::new(Shared {
            count: AtomicU64::new(0),
            held: AtomicBool::new(false),
            state: Mutex::new(state),
            change: Condvar::new(),
        });
        let keeper = shared.clone();
        let name = "fuse-awake".to_owned();
        let thread = std::thread::Builder::new().name(name).spawn(move || keeper.keep())?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.change.notify_all();
        if let Some(thread) = self.thread.take() {
            // Nothing in it panics; there would be nothing to be done either.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed) // WHY-RELAXED: see there
    }

    /// Holds the limit when the last [`SAMPLE`] requests came quickly.
    fn sample(&self, now: Instant) {
        let Some(mut state) = self.state.try_lock() else { return };
        let last = state.sampled.replace(now);
        let quick = last.is_some_and(|last| now - last <= QUICK * SAMPLE as u32);
        if quick && !self.is_held() && !state.closed {
            self.set(&mut state, true);
            self.change.notify_all();
        }
    }

    /// The keeper's life.
    fn keep(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            if !self.is_held() {
                self.change.wait(&mut state);
                continue;
            }
            let before = self.count.load(Ordering::Relaxed); // WHY-RELAXED: a statistic
            let _ = self.change.wait_for(&mut state, PERIOD);
            let requests = self.count.load(Ordering::Relaxed) - before; // WHY-RELAXED: a statistic
            if requests < LEAST {
                self.set(&mut state, false);
            }
        }
        if self.is_held() {
            self.set(&mut state, false);
        }
    }

    fn set(&self, state: &mut State, held: bool) {
        let limit = if held { state.limit } else { NO_LIMIT };
        if let Err(error) = state.device.write_all(limit.as_bytes()) {
            log::debug!("{DEVICE}: {error}");
        }
        state.sampled = None;
        self.held.store(held, Ordering::Relaxed); // WHY-RELAXED: see there
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    /// An `Awake` whose device is a file, which keeps all that was written.
    fn awake(file: &tempfile::NamedTempFile, limit: i32) -> Awake {
        Awake { keeper: Some(Keeper::start(file.path(), limit).unwrap()) }
    }

    /// What was written.
    fn limits(file: &tempfile::NamedTempFile) -> Vec<i32> {
        let bytes = std::fs::read(file.path()).unwrap();
        bytes.chunks(4).map(|chunk| i32::read_from_bytes(chunk).unwrap()).collect()
    }

    fn wait_until(what: impl Fn() -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(20);
        while !what() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        what()
    }

    #[test]
    fn quick_requests_hold_the_limit_and_their_end_lifts_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let awake = awake(&file, 7);
        let held = wait_until(|| {
            (0..SAMPLE).for_each(|_| awake.note());
            limits(&file).first() == Some(&7)
        });
        assert!(held, "{:?}", limits(&file));
        assert!(wait_until(|| !awake.is_held()), "nobody asks any more");
        assert_eq!(limits(&file).last(), Some(&NO_LIMIT));
    }

    #[test]
    fn slow_requests_hold_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let awake = awake(&file, 0);
        for _ in 0..3 * SAMPLE {
            awake.note();
            std::thread::sleep(2 * QUICK);
        }
        drop(awake);
        assert_eq!(limits(&file), []);
    }

    #[test]
    fn the_end_of_a_session_lifts_the_limit() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let awake = awake(&file, 0);
        let shared = awake.keeper.as_ref().unwrap().shared.clone();
        shared.sample(Instant::now());
        shared.sample(Instant::now());
        assert!(awake.is_held());
        drop(awake);
        assert_eq!(limits(&file), [0, NO_LIMIT]);
    }

    #[test]
    fn without_the_interface_nothing_is_held() {
        assert!(Keeper::start(Path::new("/nonexistent"), 0).is_err());
        let awake = Awake { keeper: None };
        (0..1000).for_each(|_| awake.note());
        assert!(!awake.is_held());
        assert!(Awake::new(CpuLatency::Off).keeper.is_none());
    }
}
