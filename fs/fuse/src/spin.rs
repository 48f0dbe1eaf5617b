//! Looking for the next request for a moment, before sleeping until it comes.
//!
//! A program that works through files sends its next request some microseconds after an answer.
//! A worker that sleeps meanwhile lets its CPU halt, and waking a CPU takes several times as long
//! as what is then done, on a virtual machine above all. So a worker that has served a request
//! looks for another without blocking, for as long as [`Spin`] says.
//!
//! It gives way. One worker of a mount looks, and only while there are no more threads that
//! want to run than CPUs: where none is idle there is nothing to gain, and who yields to
//! somebody else is late for the next request. Between two looks it yields all the same; when that
//! takes long, somebody new has work for the CPU and the worker goes to sleep. After looks in
//! vain it looks less often, down to once in [`RAREST`] requests.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// A yield that takes longer has let somebody else run.
const BUSY: Duration = Duration::from_micros(20);
/// Requests between two looks when nothing is ever found.
const RAREST: u32 = 64;
/// How long it is believed how many want to run.
const BELIEVED: Duration = Duration::from_millis(10);

/// How long a worker looks, and when.
pub(crate) struct Spin {
    limit: Duration,
    /// See [`BUSY`].
    busy: Duration,
    machine: Machine,
    luck: Luck,
}

/// What else the machine does.
struct Machine {
    /// `/proc/loadavg`; without it nobody looks.
    load: Option<File>,
    cpus: usize,
    /// When it was last asked, and whether it had a CPU to spare.
    asked: Option<Instant>,
    spare: bool,
}

impl Machine {
    fn has_spare_cpu(&mut self, now: Instant) -> bool {
        if self.asked.is_none_or(|asked| now - asked > BELIEVED) {
            self.asked = Some(now);
            let mut text = [0; 64];
            let len = self.load.as_ref().and_then(|file| file.read_at(&mut text, 0).ok());
            // Who asks is one of them.
            let runnable = len.and_then(|len| runnable(&text[..len]));
            self.spare = runnable.is_some_and(|runnable| runnable <= self.cpus);
        }
        self.spare
    }
}

/// How many threads want to run, of the text of `/proc/loadavg`.
fn runnable(text: &[u8]) -> Option<usize> {
    let field = std::str::from_utf8(text).ok()?.split(' ').nth(3)?;
    field.split_once('/')?.0.parse().ok()
}

/// What came of a look.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look<T> {
    /// Something, which had been there before the look or came during it.
    Found { found: T, waited: bool },
    /// Nothing, or it was not the time for another look.
    InVain,
    /// No CPU is to spare.
    Busy,
}

/// What looks have been worth.
#[derive(Default)]
struct Luck {
    /// Requests to serve before the next look.
    skip: u32,
    /// The same after the next look, when it is in vain.
    penalty: u32,
}

impl Spin {
    /// Looks for `limit`.
    pub fn new(limit: Duration) -> Self {
        let load = File::open("/proc/loadavg").ok();
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
        let machine = Machine { load, cpus, asked: None, spare: false };
        Self { limit, busy: BUSY, machine, luck: Luck::default() }
    }

    /// Whether the machine has a CPU that nobody wants.
    pub fn has_spare_cpu(&mut self) -> bool {
        self.machine.has_spare_cpu(Instant::now())
    }

    /// Calls `look` until it finds something, time is up, or the CPU is wanted.
    pub fn until<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Look<T> {
        if self.luck.skip > 0 {
            self.luck.skip -= 1;
            return Look::InVain;
        }
        let begin = Instant::now();
        if !self.machine.has_spare_cpu(begin) {
            return Look::Busy;
        }
        let mut last = begin;
        let mut waited = true;
        let found = loop {
            if let Some(found) = look() {
                break Look::Found { found, waited };
            }
            waited = false;
            std::thread::yield_now();
            let now = Instant::now();
            if now - begin >= self.limit || now - last > self.busy {
                break Look::InVain;
            }
            last = now;
        };
        self.luck.learn(matches!(found, Look::Found { .. }));
        found
    }
}

impl Luck {
    fn learn(&mut self, found: bool) {
        self.penalty = if found { 0 } else { (self.penalty * 2 + 1).min(RAREST - 1) };
        self.skip = self.penalty;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// On a machine that has CPUs to spare, or not.
    fn spin(limit: Duration, spare: bool) -> Spin {
        // Far enough ahead that it is not asked again.
        let asked = Some(Instant::now() + Duration::from_secs(3600));
        let machine = Machine { load: None, cpus: 1, asked, spare };
        // However long a test that shares its CPU is held up.
        let busy = Duration::from_secs(3600);
        Spin { limit, busy, machine, luck: Luck::default() }
    }

    /// Serves `requests`; how many looks there were.
    fn looks(spin: &mut Spin, requests: usize, found: bool) -> usize {
        let mut looks = 0;
        for _ in 0..requests {
            let mut looked = false;
            spin.until(|| {
                looked = true;
                found.then_some(())
            });
            looks += usize::from(looked);
        }
        looks
    }

    #[test]
    fn looks_in_vain_become_rare_and_one_that_finds_ends_that() {
        let mut spin = spin(Duration::from_micros(1), true);
        let in_vain = looks(&mut spin, 6400, false);
        assert!((100..=110).contains(&in_vain), "{in_vain} looks");
        let rare = looks(&mut spin, 64, true);
        assert!(rare >= 1, "the next look found something");
        assert_eq!(looks(&mut spin, 100, true), 100);
    }

    #[test]
    fn what_comes_during_a_look_has_not_waited() {
        let mut spin = spin(Duration::from_secs(60), true);
        let mut looks = 0;
        let found = spin.until(|| {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(found, Look::Found { found: 3, waited: false });
    }

    #[test]
    fn time_ends_a_look() {
        let mut spin = spin(Duration::from_millis(2), true);
        let begin = Instant::now();
        assert_eq!(spin.until(|| None::<()>), Look::InVain);
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn nobody_looks_where_no_cpu_is_idle() {
        let mut spin = spin(Duration::from_secs(1), false);
        assert_eq!(looks(&mut spin, 1000, true), 0);
    }

    #[test]
    fn the_number_of_runnable_threads_is_read() {
        assert_eq!(runnable(b"0.20 0.18 0.12 3/80 11206\n"), Some(3));
        assert_eq!(runnable(b"0.20 0.18"), None);
        let text = std::fs::read("/proc/loadavg").unwrap();
        assert!(runnable(&text).unwrap() >= 1, "at least who reads it");
    }
}
