//! The coordinator: starts the clients, lets them run, counts, and ends them.
//!
//! ```text
//!   Preparing --all are ready--> Running --time, steps, error, signal--> Stopping --all ended--> end
//! ```
//!
//! Everything it does is in answer to an event of the [`Reactor`]. A client that dies is
//! noticed by its pidfd; what it held is recovered by whoever wants it next, or here.
//!
//! Locks: takes mutexes of the control memory only to recover them, and holds none.

use std::io::{self, IsTerminal as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags};

use super::control::{Control, Number};
use super::message::{self, Failure, Finding, Hello, Message};
use super::plan::Plan;
use super::reactor::{Event, Reactor};
use super::stats::Totals;

/// How long clients may take to end when they are told to.
const GRACE: Duration = Duration::from_secs(60);
/// How long those may take that were killed: who is not gone then hangs in the kernel.
const LAST_GRACE: Duration = Duration::from_secs(10);
/// Findings and failures that are kept in full.
const KEPT: usize = 1000;

/// What a run came to.
#[derive(Debug)]
pub struct Run {
    /// Figures.
    pub totals: Totals,
    /// How long the clients worked.
    pub took: Duration,
    /// How long they prepared.
    pub prepared: Duration,
    /// Steps of the workload.
    pub steps: u64,
    /// Blocks read and found right.
    pub verified: u64,
    /// What is wrong with the data: how much, and the first of it.
    pub findings: (u64, Vec<Finding>),
    /// Errors by number.
    pub errors: Vec<(i32, u64)>,
    /// Calls that failed, the first ones.
    pub failures: Vec<Failure>,
    /// Clients that did not end by themselves, and how.
    pub killed: Vec<(usize, String)>,
    /// Clients, of these, that a kill did not end: what they wait for in the kernel hangs.
    pub stuck: usize,
    /// Mutexes taken over from the dead.
    pub recovered: u64,
    /// Ended by a signal.
    pub interrupted: bool,
    /// The coordinator's processor time while the clients worked.
    pub own_cpu: Duration,
    /// Most memory of the coordinator, KiB.
    pub own_memory: i64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Preparing,
    Running,
    Stopping,
}

struct Client {
    process: Child,
    socket: OwnedFd,
    // Watched by the reactor.
    _pidfd: OwnedFd,
    ready: bool,
    done: bool,
    ended: bool,
}

struct Coordinator<'a> {
    plan: &'a Plan,
    control: &'a Control,
    reactor: Reactor,
    clients: Vec<Client>,
    state: State,
    interval: Duration,
    time: Option<Duration>,
    began: Instant,
    started: Option<Instant>,
    ended: Option<Instant>,
    cpu_at_start: Duration,
    kills: bool,
    progress: ProgressBar,
    run: Run,
}

/// Runs a plan.
///
/// # Errors
/// One line: nothing was run.
pub fn run(
    plan: &Plan,
    table: &OwnedFd,
    time: Option<Duration>,
    quiet: bool,
) -> Result<Run, String> {
    let fail = |error: io::Error| error.to_string();
    more_files();
    let (control, control_fd) = Control::create().map_err(fail)?;
    control.add(Number::Running, plan.workers() as u64);
    control.barrier().set_needed(plan.workers());
    let reactor = Reactor::new().map_err(fail)?;
    let run = Run {
        totals: Totals::default(),
        took: Duration::ZERO,
        prepared: Duration::ZERO,
        steps: 0,
        verified: 0,
        findings: (0, Vec::new()),
        errors: Vec::new(),
        failures: Vec::new(),
        killed: Vec::new(),
        stuck: 0,
        recovered: 0,
        interrupted: false,
        own_cpu: Duration::ZERO,
        own_memory: 0,
    };
    let mut coordinator = Coordinator {
        plan,
        control: &control,
        reactor,
        clients: Vec::with_capacity(plan.clients),
        state: State::Preparing,
        // Enough points for a picture, and not so many that counting them costs.
        interval: time.map_or(Duration::from_secs(1), |time| {
            (time / 120).clamp(Duration::from_millis(250), Duration::from_secs(5))
        }),
        time,
        began: Instant::now(),
        started: None,
        ended: None,
        cpu_at_start: Duration::ZERO,
        kills: false,
        progress: progress(time, plan.ops, quiet),
        run,
    };
    let result = coordinator.spawn_all(table, &control_fd).and_then(|()| coordinator.events());
    if let Err(problem) = result {
        coordinator.kill_processes();
        return Err(problem);
    }
    coordinator.progress.finish_and_clear();
    Ok(coordinator.finish())
}

/// Two files for each client, and some.
fn more_files() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    // Where it is refused, starting clients says so.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
}

fn progress(time: Option<Duration>, ops: u64, quiet: bool) -> ProgressBar {
    if quiet || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let length = time.map_or(ops, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let style = "{elapsed_precise} [{bar:30}] {msg}";
    let bar = ProgressBar::new(length);
    bar.set_style(
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar.set_message("preparing");
    bar
}

fn own_cpu() -> Duration {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return Duration::ZERO };
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(micros.unsigned_abs())
}

impl Coordinator<'_> {
    fn spawn_all(&mut self, table: &OwnedFd, control: &OwnedFd) -> Result<(), String> {
        for number in 0..self.plan.clients {
            let client = self.spawn(number, table, control);
            let client = client.map_err(|error| format!("client {number}: {error}"))?;
            self.clients.push(client);
        }
        Ok(())
    }

    fn spawn(&self, number: usize, table: &OwnedFd, control: &OwnedFd) -> io::Result<Client> {
        let kind = (AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (ours, theirs) = rustix::net::socketpair(kind.0, kind.1, kind.2, None)?;
        let process = Command::new("/proc/self/exe")
            .args(["drive", "--client"])
            .stdin(theirs)
            // One that hangs would keep whoever reads the figures waiting for their end.
            .stdout(Stdio::null())
            // A Ctrl-C is for the coordinator.
            .process_group(0)
            .spawn()?;
        let pid = Pid::from_child(&process);
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let hello = Hello { plan: self.plan.clone(), client: number };
        message::send(&ours, &hello, &[table, control, self.reactor.wake()])?;
        self.reactor.watch(number, &ours, &pidfd)?;
        let (ready, done, ended) = (false, false, false);
        Ok(Client { process, socket: ours, _pidfd: pidfd, ready, done, ended })
    }

    fn events(&mut self) -> Result<(), String> {
        let mut events = Vec::new();
        while self.clients.iter().any(|client| !client.ended) {
            self.reactor.wait(&mut events).map_err(|error| error.to_string())?;
            for &event in &events {
                self.event(event).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    fn event(&mut self, event: Event) -> io::Result<()> {
        match event {
            Event::Interrupted if self.run.interrupted => self.kill_all()?,
            Event::Interrupted => {
                self.run.interrupted = true;
                self.stop()?;
            }
            Event::Tick => self.tick(),
            Event::Deadline if self.kills => self.give_up()?,
            Event::Deadline if self.state == State::Stopping => self.kill_all()?,
            Event::Deadline => self.stop()?,
            // The last worker has ended: this is when the run was over.
            Event::Wake => self.ended = self.ended.or(Some(Instant::now())),
            Event::Socket(number) => self.messages(number)?,
            Event::Exit(number) => self.exit(number)?,
        }
        Ok(())
    }

    fn messages(&mut self, number: usize) -> io::Result<()> {
        loop {
            match message::receive::<Message>(&self.clients[number].socket) {
                Ok(Some((message, _))) => self.message(number, message)?,
                // Its end is told by its pidfd.
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn message(&mut self, number: usize, message: Message) -> io::Result<()> {
        match message {
            Message::Ready => {
                self.clients[number].ready = true;
                self.start_when_ready()?;
            }
            Message::Done => self.clients[number].done = true,
            Message::Failed(failure) => {
                if self.run.failures.is_empty() {
                    let text = format!("uext drive: {failure}: the run ends");
                    self.progress.suspend(|| eprintln!("{text}"));
                }
                if self.run.failures.len() < KEPT {
                    self.run.failures.push(failure);
                }
                self.stop()?;
            }
            Message::Finding(finding) => {
                if self.run.findings.1.len() < KEPT {
                    self.run.findings.1.push(finding);
                }
            }
        }
        Ok(())
    }

    fn start_when_ready(&mut self) -> io::Result<()> {
        let waiting = self.clients.len() < self.plan.clients
            || self.clients.iter().any(|client| !client.ready && !client.ended);
        if self.state != State::Preparing || waiting {
            return Ok(());
        }
        self.state = State::Running;
        self.run.totals.skip(self.control.counts());
        self.run.prepared = self.began.elapsed();
        self.started = Some(Instant::now());
        self.cpu_at_start = own_cpu();
        self.progress.reset_elapsed();
        self.reactor.tick_every(self.interval)?;
        if let Some(time) = self.time {
            self.reactor.deadline_in(time)?;
        }
        self.control.start().open();
        Ok(())
    }

    /// Tells all to end.
    fn stop(&mut self) -> io::Result<()> {
        if self.state == State::Stopping {
            return Ok(());
        }
        self.state = State::Stopping;
        self.ended = self.ended.or(Some(Instant::now()));
        self.control.stop().open();
        // Who waits there goes on, and sees the other gate.
        self.control.start().open();
        self.reactor.deadline_in(GRACE)
    }

    fn exit(&mut self, number: usize) -> io::Result<()> {
        self.messages(number)?;
        let client = &mut self.clients[number];
        // A process that was waited for shows once more.
        if client.ended {
            return Ok(());
        }
        let Some(status) = client.process.try_wait()? else { return Ok(()) };
        client.ended = true;
        if client.done && status.success() {
            return Ok(());
        }
        for _ in 0..self.plan.threads {
            self.control.barrier().leave();
        }
        self.control.recover();
        let how = if self.kills { "did not end, and was killed".into() } else { how(status) };
        self.lost(number, how);
        // The others go on; but who has not begun can't be waited for.
        self.start_when_ready()
    }

    fn lost(&mut self, number: usize, how: String) {
        self.progress.suspend(|| eprintln!("uext drive: client {number} {how}"));
        self.run.killed.push((number, how));
    }

    /// Ends those who do not end by themselves.
    fn kill_all(&mut self) -> io::Result<()> {
        self.kills = true;
        self.kill_processes();
        self.reactor.deadline_in(LAST_GRACE)
    }

    /// Goes on without those who were killed and are still there.
    fn give_up(&mut self) -> io::Result<()> {
        for number in 0..self.clients.len() {
            // One whose end was not heard of has ended all the same.
            self.exit(number)?;
            if !self.clients[number].ended {
                self.clients[number].ended = true;
                self.run.stuck += 1;
                self.lost(number, "hangs in the kernel, and can't be killed".into());
            }
        }
        Ok(())
    }

    fn kill_processes(&mut self) {
        for client in self.clients.iter_mut().filter(|client| !client.ended) {
            // It may have ended by itself.
            let _ = client.process.kill();
        }
    }

    fn now(&self) -> Duration {
        let end = self.ended.unwrap_or_else(Instant::now);
        self.started.map_or(Duration::ZERO, |start| end.saturating_duration_since(start))
    }

    fn tick(&mut self) {
        if self.state != State::Running || self.ended.is_some() {
            return;
        }
        let now = self.now();
        self.run.totals.interval(self.control.counts(), now);
        let Some(last) = self.run.totals.intervals.last() else { return };
        let count: u64 = last.ops.iter().map(|op| op.count).sum();
        let bytes: u64 = last.ops.iter().map(|op| op.bytes).sum();
        let findings = self.control.get(Number::Findings);
        let wrong = if findings > 0 { format!(", {findings} WRONG") } else { String::new() };
        self.progress.set_message(format!(
            "{:.0} operations/s, {:.1} MB/s{wrong}",
            count as f64 / last.seconds,
            bytes as f64 / last.seconds / 1e6
        ));
        self.progress.set_position(match self.time {
            Some(_) => u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            None => self.control.get(Number::Steps),
        });
    }

    fn finish(mut self) -> Run {
        let took = self.now();
        if self.started.is_some() {
            self.run.own_cpu = own_cpu().saturating_sub(self.cpu_at_start);
            self.run.totals.interval(self.control.counts(), took);
        }
        self.control.recover();
        let get = |number| self.control.get(number);
        self.run.took = took;
        self.run.steps = get(Number::Steps);
        self.run.verified = get(Number::Verified);
        self.run.findings.0 = get(Number::Findings);
        self.run.recovered = get(Number::Recovered);
        self.run.errors = self.control.errors();
        self.run.own_memory = getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| usage.max_rss());
        self.run
    }
}

fn how(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(libc::SIGBUS), _) => {
            "was killed by SIGBUS: the filesystem could not provide or keep a mapped page".into()
        }
        (Some(signal), _) => {
            let name = nix::sys::signal::Signal::try_from(signal);
            format!("was killed by {}", name.map_or("a signal", |name| name.as_str()))
        }
        (None, code) => format!("ended with status {}", code.unwrap_or(-1)),
    }
}
