//! The mutex between processes: handed over millions of times, held by owners that are
//! killed, and taken without a system call.
//!
//! The other process is this program again, at the test `peer`, with a role and the shared
//! memory's path in its environment. `UEXT_HANDOVERS=n` sets how many handovers there are.

#![cfg(not(any(loom, shuttle)))]

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uext_drive_sys::{Gate, Locked, Mapping, RobustMutex};

/// Mutexes of the ring in which two processes follow each other.
const RING: usize = 3;
/// Without progress for so long, a wake-up was lost.
const LONG: Duration = Duration::from_secs(60);

struct Shared {
    mapping: Mapping,
    fd: Option<OwnedFd>,
}

impl Shared {
    fn new() -> Self {
        let (mapping, fd) = Mapping::anonymous("test", 4096).expect("memory");
        Self { mapping, fd: Some(fd) }
    }

    fn of_environment() -> Self {
        let path = std::env::var("UEXT_PEER_MEMORY").expect("the memory's path");
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path);
        Self { mapping: Mapping::whole(&file.expect("the memory")).expect("mapped"), fd: None }
    }

    fn gate(&self) -> &Gate {
        &self.mapping.slice(0, 1)[0]
    }

    fn numbers(&self) -> &[AtomicU64] {
        self.mapping.slice(64, 16)
    }

    fn mutexes(&self) -> &[RobustMutex] {
        self.mapping.slice(1024, RING)
    }

    /// This program as a peer.
    fn peer(&self, role: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        let fd = self.fd.as_ref().expect("made here").as_raw_fd();
        command
            .args(["peer", "--exact", "--nocapture"])
            .env("UEXT_PEER_ROLE", role)
            .env("UEXT_PEER_MEMORY", format!("/proc/{}/fd/{fd}", std::process::id()))
            .stdout(Stdio::null());
        command
    }
}

fn handovers() -> u64 {
    std::env::var("UEXT_HANDOVERS").map_or(200_000, |n| n.parse().expect("a number"))
}

/// A process that is ended with the test.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Goes around the ring, holding one mutex while it waits for the next. Two that do so, one
/// behind the other, can't overtake: each mutex goes from one to the other and back.
fn follow<'a>(shared: &'a Shared, me: u64, steps: u64, mut held: Locked<'a>) {
    for step in 1..=steps {
        // Process 1 begins one place ahead.
        let index = ((step + me) % RING as u64) as usize;
        let next = shared.mutexes()[index].lock_trusting_wakeups();
        assert!(!next.recovered());
        // Only the mutex orders this: who had it last was the other.
        let last = &shared.numbers()[4 + index];
        let before = last.load(Ordering::Relaxed);
        assert!(before == 0 || before % 2 != me, "not a handover: {before}");
        last.store(step * 2 + me, Ordering::Relaxed);
        held = next;
        shared.numbers()[me as usize].store(step, Ordering::Relaxed);
    }
    drop(held);
}

/// The other process. Without a role it shows that one it doesn't know is refused.
#[test]
fn peer() {
    let Ok(role) = std::env::var("UEXT_PEER_ROLE") else {
        let mut unknown = Shared::new().peer("unknown");
        assert!(!unknown.stderr(Stdio::null()).status().expect("it runs").success());
        return;
    };
    let shared = Shared::of_environment();
    match role.as_str() {
        "follow" => {
            let first = shared.mutexes()[1].lock_trusting_wakeups();
            shared.numbers()[5].store(1, Ordering::Relaxed);
            shared.gate().open();
            follow(&shared, 1, handovers() / 2, first);
        }
        "hold" => {
            let _held = shared.mutexes()[0].lock();
            shared.gate().open();
            std::thread::sleep(LONG);
        }
        "work" => loop {
            work(&shared);
        },
        "alone" => alone(&shared),
        other => panic!("no role {other}"),
    }
}

#[test]
fn every_handover_between_two_processes_wakes_the_other() {
    let shared = Shared::new();
    let first = shared.mutexes()[0].lock();
    let mut other = Peer(shared.peer("follow").spawn().expect("a peer"));
    std::thread::scope(|scope| {
        let watched = scope.spawn(|| watch(&shared));
        shared.gate().pass();
        follow(&shared, 0, handovers() / 2, first);
        assert!(other.0.wait().expect("it ends").success());
        watched.join().expect("watched");
    });
    let steps: u64 = (0..2).map(|n| shared.numbers()[n].load(Ordering::Relaxed)).sum();
    assert_eq!(steps, handovers() / 2 * 2);
}

/// Ends the test when nobody gets on.
fn watch(shared: &Shared) {
    let steps = || (0..2).map(|n| shared.numbers()[n].load(Ordering::Relaxed)).sum::<u64>();
    let (mut last, mut since) = (0, Instant::now());
    while steps() < handovers() / 2 * 2 {
        std::thread::sleep(Duration::from_millis(20));
        if steps() != last {
            (last, since) = (steps(), Instant::now());
        } else if since.elapsed() > LONG {
            eprintln!("no handover after {last}: a wake-up was lost");
            std::process::abort();
        }
    }
}

#[test]
fn a_killed_owners_mutex_goes_to_one_of_those_who_wait_and_then_to_all() {
    let shared = Shared::new();
    let mut owner = Peer(shared.peer("hold").spawn().expect("a peer"));
    assert!(shared.gate().pass_within(LONG), "the owner has it");
    assert!(shared.mutexes()[0].try_lock().is_none());
    std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| shared.mutexes()[0].lock_trusting_wakeups().recovered()))
            .collect();
        std::thread::sleep(Duration::from_millis(50));
        owner.0.kill().expect("killed");
        let told = waiters.into_iter().map(|w| w.join().expect("it has it"));
        assert_eq!(told.filter(|recovered| *recovered).count(), 1);
    });
    assert!(!shared.mutexes()[0].lock().recovered());
}

#[test]
fn a_thread_that_ends_with_the_mutex_is_a_dead_owner_too() {
    let shared = Shared::new();
    std::thread::scope(|scope| {
        scope.spawn(|| std::mem::forget(shared.mutexes()[1].lock()));
    });
    // The scope waits for the closure, not for the thread's last breath.
    let start = Instant::now();
    while !shared.mutexes()[1].is_orphaned() {
        assert!(start.elapsed() < LONG, "nobody recovered it");
        std::thread::yield_now();
    }
    assert!(shared.mutexes()[1].lock().recovered());
}

#[test]
fn a_wait_has_its_limit() {
    let mutex = RobustMutex::new();
    let held = mutex.lock();
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(mutex.lock_for(Duration::from_millis(20)).is_none()));
    });
    drop(held);
    assert!(mutex.lock_for(Duration::ZERO).is_some());
}

/// Two numbers that are equal whenever nobody has the mutex, but after a death.
fn work(shared: &Shared) {
    let locked = shared.mutexes()[2].lock();
    let (a, b) = (&shared.numbers()[8], &shared.numbers()[9]);
    let (left, right) = (a.load(Ordering::Relaxed), b.load(Ordering::Relaxed));
    if left != right {
        assert!(locked.recovered(), "{left} and {right}, and the last owner did not die");
        b.store(left, Ordering::Relaxed);
        shared.numbers()[10].fetch_add(1, Ordering::Relaxed);
    }
    a.store(left + 1, Ordering::Relaxed);
    std::hint::black_box(&shared.mapping);
    b.store(left + 1, Ordering::Relaxed);
}

#[test]
fn killing_workers_at_any_moment_leaves_the_others_working() {
    const KILLS: usize = 60;
    let shared = Shared::new();
    let seed = std::process::id();
    eprintln!("kills at moments by seed {seed}");
    let spawn = || Peer(shared.peer("work").stderr(Stdio::inherit()).spawn().expect("a peer"));
    let mut peers: Vec<Peer> = (0..3).map(|_| spawn()).collect();
    let done = || shared.numbers()[8].load(Ordering::Relaxed);
    for kill in 0..KILLS {
        let before = done();
        let start = Instant::now();
        while done() < before + 100 {
            assert!(start.elapsed() < LONG, "nobody works after {kill} kills");
            work(&shared);
        }
        std::thread::sleep(Duration::from_micros(u64::from(seed) * (kill as u64 + 1) * 7 % 3000));
        let victim = kill % peers.len();
        assert!(peers[victim].0.try_wait().expect("looked").is_none(), "a worker failed");
        peers[victim] = spawn();
    }
    drop(peers);
    let locked = shared.mutexes()[2].lock();
    let (a, b) = (done(), shared.numbers()[9].load(Ordering::Relaxed));
    assert!(a == b || locked.recovered());
}

/// What nobody else wants, a hundred thousand times, between two lines that a tracer sees.
fn alone(shared: &Shared) {
    shared.gate().open();
    drop(shared.mutexes()[0].lock());
    let marker = |text: &str| {
        use std::io::Write as _;
        std::io::stderr().write_all(text.as_bytes()).expect("written");
    };
    marker("uncontended begins\n");
    for _ in 0..100_000 {
        let one = shared.mutexes()[0].lock();
        let two = shared.mutexes()[1].try_lock();
        drop(one);
        drop(two);
        shared.gate().pass();
    }
    marker("uncontended ends\n");
}

#[test]
fn an_uncontended_lock_makes_no_system_call() {
    let strace = Command::new("strace").arg("-V").stdout(Stdio::null()).status();
    if strace.is_err() {
        use std::io::Write as _;
        let why = "SKIPPED an_uncontended_lock_makes_no_system_call: needs strace";
        let _ = writeln!(std::io::stderr(), "{why}");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let trace = dir.path().join("trace");
    let shared = Shared::new();
    let peer = shared.peer("alone");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-o"]).arg(&trace).arg(peer.get_program()).args(peer.get_args());
    peer.get_envs().for_each(|(name, value)| {
        strace.env(name, value.expect("set"));
    });
    let output = strace.output().expect("strace runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let trace = std::fs::read_to_string(trace).expect("a trace");
    let lines: Vec<&str> = trace.lines().collect();
    let at = |text: &str| lines.iter().position(|line| line.contains(text)).expect("traced");
    let (begin, end) = (at("uncontended begins"), at("uncontended ends"));
    let thread = lines[begin].split(' ').next().expect("a thread");
    let between: Vec<_> =
        lines[begin + 1..end].iter().filter(|line| line.starts_with(thread)).collect();
    assert!(between.is_empty(), "200,000 locks made {} system calls: {between:?}", between.len());
}
