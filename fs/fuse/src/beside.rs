//! The one worker beside its only client, on the same CPU.
//!
//! A request wakes the worker and its answer wakes the client. The scheduler puts who is woken on
//! an idle CPU, and to wake that one takes longer than most requests, on a virtual machine above
//! all. But a CPU counts as idle that runs only threads of `SCHED_IDLE`. So the worker that is
//! alone goes to the CPU of its client and becomes such a thread: it runs when the client waits
//! for it, and the client stays where it is when it has its answer. No other CPU takes part.
//!
//! Whoever else wants that CPU keeps such a thread from running. So the worker is one only
//! while it is [`Alone`] and one thread asks, and not on a busy machine; and those who rest take it
//! out when it has taken no request for a moment, so that what it holds up goes on.
//!
//! Locks: none; who sits beside whom is part of [`Alone`]'s state.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::{Pid, gettid};

use crate::alone::Alone;
use crate::sys;

/// Requests of one client in a row before the worker goes to it, and between two looks at where
/// it is.
const EVERY: u32 = 64;
/// Who sleeps more often than this between two looks may have lost its client.
const SLEEPS: i64 = EVERY as i64 / 4;
/// Where the CPU of a thread stands in its `stat`, behind the name.
const STAT_PROCESSOR: usize = 36;

/// What a thread was before it sat down.
#[derive(Clone)]
pub(crate) struct Seat {
    thread: Pid,
    policy: i32,
    cpus: CpuSet,
}

impl Seat {
    /// Of the calling thread, if it may sit down and stand up again.
    fn of_this_thread() -> Option<Self> {
        let policy = sys::scheduling_policy(gettid()).ok()?;
        if !matches!(policy, libc::SCHED_OTHER | libc::SCHED_BATCH) {
            return None;
        }
        // Without the right to come back a thread must not go.
        let comes_back = move || {
            let set = |policy| sys::set_scheduling_policy(gettid(), policy);
            set(libc::SCHED_IDLE).and_then(|()| set(policy)).is_ok()
        };
        let may = std::thread::Builder::new().spawn(comes_back).ok()?.join().unwrap_or(false);
        let cpus = sched_getaffinity(Pid::from_raw(0)).ok()?;
        may.then(|| Self { thread: gettid(), policy, cpus })
    }

    /// The thread, which calls this, goes to a CPU.
    fn go(&self, cpu: usize) -> bool {
        let mut only = CpuSet::new();
        only.set(cpu).and_then(|()| sched_setaffinity(self.thread, &only)).is_ok()
    }

    /// From now on the thread runs only where nobody else wants to; whether that could be done.
    pub fn sit(&self) -> bool {
        sys::set_scheduling_policy(self.thread, libc::SCHED_IDLE).is_ok()
    }

    /// The thread is what it was.
    fn give_back(&self) {
        self.restore(self.thread);
    }

    /// It is, and so are threads that it has started meanwhile, or the kernel for it: they are
    /// born as what it is. Other mounts of the process may lose their seat by it, no more.
    pub fn give_back_all(&self) {
        self.give_back();
        let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return };
        let names = tasks.flatten().map(|task| task.file_name());
        for thread in names.filter_map(|name| name.to_str()?.parse().ok()).map(Pid::from_raw) {
            if sys::scheduling_policy(thread).is_ok_and(|policy| policy == libc::SCHED_IDLE) {
                self.restore(thread);
            }
        }
    }

    fn restore(&self, thread: Pid) {
        let policy = sys::set_scheduling_policy(thread, self.policy);
        let cpus = sched_setaffinity(thread, &self.cpus).map_err(Into::into);
        if let Err(error) = policy.and(cpus) {
            log::debug!("scheduling of thread {thread}: {error}");
        }
    }
}

/// Where a client is.
struct Client {
    /// `/proc/TID/stat`.
    stat: File,
    cpu: usize,
    /// Voluntary switches of the worker at the last look.
    slept: i64,
}

impl Client {
    fn find(thread: u32) -> Option<Self> {
        let stat = File::open(format!("/proc/{thread}/stat")).ok()?;
        let cpu = cpu_of(&stat)?;
        Some(Self { stat, cpu, slept: voluntary_switches() })
    }
}

/// The CPU of a thread, by its `stat`.
fn cpu_of(stat: &File) -> Option<usize> {
    let mut text = [0; 1024];
    let len = stat.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(text.get(..len)?).ok()?;
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(STAT_PROCESSOR)?.parse().ok()
}

/// How often the calling thread has slept.
pub(crate) fn voluntary_switches() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

/// What the one worker knows of its client.
pub(crate) struct Beside {
    /// `None`: it never sits down.
    seat: Option<Seat>,
    /// Who asked last, and how often in a row.
    last: u32,
    streak: u32,
    /// Beside whom it sits.
    client: Option<Client>,
}

impl Beside {
    /// Of the calling thread.
    pub fn new() -> Self {
        Self { seat: Seat::of_this_thread(), last: 0, streak: 0, client: None }
    }

    /// Whether the worker sits beside a client; then it need not look for requests.
    pub fn is_there(&self) -> bool {
        self.client.is_some()
    }

    /// A request of thread `client` was taken; `spare` tells whether a CPU is idle.
    pub fn took(&mut self, alone: &Alone, client: u32, spare: impl FnOnce() -> bool) {
        // What the kernel asks by itself is neither here nor there.
        if self.seat.is_none() || client == 0 {
            return;
        }
        if self.client.is_some() && !alone.is_beside() {
            // It was taken out.
            self.client = None;
            self.streak = 0;
        }
        if client != self.last {
            (self.last, self.streak) = (client, 0);
            self.leave(alone);
        }
        self.streak = self.streak.wrapping_add(1);
        if !self.streak.is_multiple_of(EVERY) {
            return;
        }
        if !spare() {
            self.leave(alone);
        } else if self.client.is_some() {
            self.follow(alone);
        } else if alone.all_rest() {
            self.join(alone, client);
        }
    }

    /// The worker is like any other.
    pub fn leave(&mut self, alone: &Alone) {
        if let (Some(_), Some(seat)) = (self.client.take(), &self.seat) {
            // By itself first: what follows takes a lock.
            seat.give_back();
            alone.stand();
        }
    }

    /// Goes to its client for the first time.
    fn join(&mut self, alone: &Alone, client: u32) {
        let (Some(seat), Some(client)) = (&self.seat, Client::find(client)) else { return };
        if seat.go(client.cpu) {
            alone.sit(seat);
        }
        if alone.is_beside() {
            self.client = Some(client);
        } else {
            seat.give_back();
        }
    }

    /// Goes where the client is now, if it has moved.
    fn follow(&mut self, alone: &Alone) {
        let (Some(seat), Some(client)) = (&self.seat, &mut self.client) else { return };
        let slept = voluntary_switches();
        let lost = slept - client.slept > SLEEPS;
        client.slept = slept;
        if !lost {
            return;
        }
        match cpu_of(&client.stat) {
            Some(cpu) if cpu == client.cpu => {}
            Some(cpu) if seat.go(cpu) => client.cpu = cpu,
            _ => self.leave(alone),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::alone::Lonely;
    use crate::crowd::Crowd;
    use std::sync::mpsc::channel;
    use std::sync::{Mutex, PoisonError};
    use std::time::{Duration, Instant};

    const NEVER: Duration = Duration::from_secs(3600);
    const RARELY: Duration = Duration::from_millis(200);
    const LONG: Duration = Duration::from_secs(30);

    /// Who gives back does so for all threads of the process.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    /// Policy and CPUs of the calling thread.
    fn scheduling() -> (i32, CpuSet) {
        let cpus = sched_getaffinity(Pid::from_raw(0)).unwrap();
        (sys::scheduling_policy(gettid()).unwrap(), cpus)
    }

    struct Ends<'a>(
        &'a Alone,
        #[expect(dead_code, reason = "the client waits for its end")] std::sync::mpsc::Sender<()>,
    );

    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.close();
        }
    }

    /// Calls `work` as the worker that sits beside a client while another rests.
    fn beside_a_client(alone: &Alone, work: impl FnOnce(&mut Beside, u32)) {
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut beside = Beside::new();
        if beside.seat.is_none() {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "SKIPPED: may not return from SCHED_IDLE");
            return;
        }
        let before = scheduling();
        let (tell, told) = channel();
        let (over, ends) = channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while tell.send(0).is_ok() && !alone.is_closed() {
                    alone.rest();
                    std::thread::sleep(Duration::from_micros(100));
                }
            });
            let send = tell.clone();
            scope.spawn(move || {
                send.send(gettid().as_raw().cast_unsigned()).unwrap();
                ends.recv().unwrap_err();
            });
            // Both threads end also when this fails.
            let _ended = Ends(alone, over);
            let client = told.iter().find(|&thread| thread > 0).unwrap();
            let (begin, mut lonely) = (Instant::now(), Lonely::among(Crowd::default()));
            while !beside.is_there() {
                assert!(begin.elapsed() < LONG, "it never went to its client");
                lonely.took(alone, client);
                lonely.found(alone, false);
                beside.took(alone, client, || true);
            }
            alone.seat_now();
            let (policy, cpus) = scheduling();
            let count = (0..CpuSet::count()).filter(|&cpu| cpus.is_set(cpu).unwrap()).count();
            // Unless that took too long.
            assert!((policy, count) == (libc::SCHED_IDLE, 1) || !alone.is_beside());
            work(&mut beside, client);
            assert!(scheduling() == before, "it is what it was");
            assert!(!alone.is_beside());
        });
    }

    #[test]
    fn it_leaves_when_somebody_else_asks() {
        let alone = Alone::guarded(1, NEVER);
        beside_a_client(&alone, |beside, client| {
            beside.took(&alone, 0, || true);
            assert!(beside.is_there(), "the kernel is nobody else");
            beside.took(&alone, client + 1, || true);
            assert!(!beside.is_there());
        });
    }

    #[test]
    fn it_leaves_a_busy_machine_and_a_client_that_ended() {
        let alone = Alone::guarded(1, NEVER);
        beside_a_client(&alone, |beside, client| {
            (0..EVERY).for_each(|_| beside.took(&alone, client, || false));
            assert!(!beside.is_there());
        });
        let alone = Alone::guarded(1, NEVER);
        beside_a_client(&alone, |beside, client| {
            // What the stat of a thread that is gone gives: nothing.
            beside.client.as_mut().unwrap().stat = File::open("/dev/null").unwrap();
            for _ in 0..EVERY {
                std::thread::sleep(Duration::from_micros(1));
                beside.took(&alone, client, || true);
            }
            assert!(!beside.is_there());
        });
    }

    #[test]
    fn threads_that_it_started_are_not_left_behind() {
        let alone = Alone::guarded(1, NEVER);
        let (ask, asked) = channel();
        let (answer, answered) = channel();
        let mut child = None;
        beside_a_client(&alone, |beside, client| {
            child = Some(std::thread::spawn(move || {
                while asked.recv().is_ok() {
                    answer.send(scheduling()).unwrap();
                }
            }));
            ask.send(()).unwrap();
            assert_eq!(answered.recv().unwrap().0, libc::SCHED_IDLE);
            beside.took(&alone, client + 1, || true);
            ask.send(()).unwrap();
            assert!(answered.recv().unwrap() == scheduling());
        });
        drop(ask);
        child.into_iter().for_each(|child| child.join().unwrap());
    }

    /// Else it would hold up whoever waits for what it has, for as long as its CPU is wanted.
    #[test]
    fn who_rests_takes_it_out_when_it_takes_no_request() {
        let alone = Alone::guarded(1, RARELY);
        beside_a_client(&alone, |beside, client| {
            let begin = Instant::now();
            while alone.is_beside() {
                assert!(begin.elapsed() < LONG, "it was left there");
                std::thread::sleep(Duration::from_millis(1));
            }
            beside.took(&alone, client, || true);
            assert!(!beside.is_there());
        });
    }

    #[test]
    fn the_cpu_of_a_thread_is_read() {
        let mut one = CpuSet::new();
        let here = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let cpu = (0..CpuSet::count()).rfind(|&cpu| here.is_set(cpu).unwrap()).unwrap();
        one.set(cpu).unwrap();
        std::thread::spawn(move || {
            sched_setaffinity(Pid::from_raw(0), &one).unwrap();
            let client = Client::find(gettid().as_raw().cast_unsigned()).unwrap();
            assert_eq!(client.cpu, cpu);
        })
        .join()
        .unwrap();
    }
}
