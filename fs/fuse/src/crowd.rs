//! Whether many clients wait for one worker, on a machine where no other would be of use.
//!
//! On few CPUs the clients of a busy mount take what a second worker would run on: both then
//! do little before they make way. One worker that never sleeps serves a crowd best,
//! though requests wait for it. But who waits for the disk, or for a commit, holds up all
//! the others: so a crowd is only one while its requests are served without sleeping, of which
//! samples are taken.

use crate::beside::voluntary_switches;

/// Most CPUs that one worker and its clients keep busy.
const FEW_CPUS: usize = 2;
/// How many clients are many.
const MANY: u32 = 8;
/// Requests after which it is judged anew.
const WINDOW: u32 = 256;
/// One request of so many is looked at more closely; clients in turns don't fall in step with it.
const SAMPLE: u32 = 7;
/// Most samples of a window that may have slept: one of 16.
const SLEEPERS: u32 = WINDOW / SAMPLE / 16;

/// What is known of the clients. The default is a machine with CPUs for more workers.
#[derive(Default)]
pub(crate) struct Crowd {
    few_cpus: bool,
    /// Requests of this window, and a bit for each client, some of which share one.
    count: u32,
    clients: u64,
    /// What the last window says: many clients, and that none of them slept.
    many: bool,
    crowd: bool,
    /// Voluntary switches of this thread when the sample began that is being served.
    sample: Option<i64>,
    samples: u32,
    slept: u32,
}

impl Crowd {
    /// On this machine.
    pub fn new() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self { few_cpus: cpus <= FEW_CPUS, ..Self::default() }
    }

    #[cfg(test)]
    pub fn that_is_there() -> Self {
        Self { few_cpus: true, crowd: true, ..Self::default() }
    }

    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.crowd
    }

    /// A request of thread `client` is about to be served.
    pub fn took(&mut self, client: u32) {
        if !self.few_cpus {
            return;
        }
        self.clients |= 1 << (client % u64::BITS);
        self.count += 1;
        if self.many && self.count.is_multiple_of(SAMPLE) {
            self.sample = Some(voluntary_switches());
        }
    }

    /// It was served.
    pub fn served(&mut self) {
        if let Some(before) = self.sample.take() {
            self.samples += 1;
            self.slept += u32::from(voluntary_switches() > before);
        }
        if self.count >= WINDOW {
            let sampled = self.samples >= WINDOW / SAMPLE / 2;
            self.many = self.clients.count_ones() >= MANY;
            self.crowd = self.many && sampled && self.slept <= SLEEPERS;
            (self.count, self.clients, self.samples, self.slept) = (0, 0, 0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn on_few_cpus() -> Crowd {
        Crowd { few_cpus: true, ..Crowd::default() }
    }

    /// Serves requests of so many clients in turns, each `serve` given the request's number.
    fn windows(crowd: &mut Crowd, windows: u32, clients: u32, serve: impl Fn(u32)) {
        for request in 0..windows * WINDOW {
            crowd.took(1000 + request % clients);
            serve(request);
            crowd.served();
        }
    }

    #[test]
    fn many_clients_are_a_crowd_once_samples_were_taken() {
        let mut crowd = on_few_cpus();
        windows(&mut crowd, 1, 16, |_| {});
        assert!(!crowd.is_there(), "nothing is known of how they are served");
        windows(&mut crowd, 1, 16, |_| {});
        assert!(crowd.is_there());
        windows(&mut crowd, 1, MANY - 1, |_| {});
        assert!(!crowd.is_there());
    }

    #[test]
    fn requests_that_sleep_are_no_crowd() {
        let mut crowd = on_few_cpus();
        windows(&mut crowd, 3, 16, |_| {});
        assert!(crowd.is_there());
        let sleeps = |request: u32| {
            if request.is_multiple_of(4) {
                std::thread::sleep(Duration::from_micros(1));
            }
        };
        windows(&mut crowd, 1, 16, sleeps);
        assert!(!crowd.is_there());
        windows(&mut crowd, 1, 16, |_| {});
        assert!(crowd.is_there(), "they don't any more");
    }

    #[test]
    fn there_is_none_where_more_workers_can_run() {
        let mut crowd = Crowd::default();
        windows(&mut crowd, 3, 16, |_| {});
        assert!(!crowd.is_there());
    }
}
