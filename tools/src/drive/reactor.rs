//! The coordinator's event loop: one epoll, edge-triggered, with a second one inside it.
//!
//! The outer epoll has what must be heard at once: signals, the two timers, the wake-up. The
//! clients' sockets and processes are in the inner one, which is a single file to the outer.
//! However many clients there are, a Ctrl-C is found at the next look, and a loop costs what
//! happened and not how many there are.
//!
//! Edge-triggered: every event is drained. Of the inner epoll a batch is taken at a time, and
//! [`Reactor`] remembers that there may be more.
//!
//! Locks: none; one thread.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Events taken from the inner epoll at a time.
const BATCH: usize = 64;

/// Something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// SIGINT or SIGTERM.
    Interrupted,
    /// The interval is over.
    Tick,
    /// The time is over.
    Deadline,
    /// A client wrote to the wake-up.
    Wake,
    /// A client's socket has something.
    Socket(usize),
    /// A client's process has ended.
    Exit(usize),
}

const SIGNALS: u64 = 0;
const TICK: u64 = 1;
const DEADLINE: u64 = 2;
const WAKE: u64 = 3;
const CLIENTS: u64 = 4;

/// The loop's files.
pub struct Reactor {
    outer: OwnedFd,
    clients: OwnedFd,
    signals: SignalFd,
    tick: OwnedFd,
    deadline: OwnedFd,
    wake: OwnedFd,
    /// The inner epoll may have more than was taken.
    more: bool,
}

fn add(epoll: &OwnedFd, file: impl AsFd, data: u64) -> io::Result<()> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    Ok(epoll::add(epoll, file, epoll::EventData::new_u64(data), flags)?)
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: i64::from(time.subsec_nanos()) }
}

impl Reactor {
    /// Blocks SIGINT and SIGTERM, which come as events from here on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGINT);
        mask.add(Signal::SIGTERM);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let timer = || {
            timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
            )
        };
        let reactor = Self {
            outer: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            clients: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            signals,
            tick: timer()?,
            deadline: timer()?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            more: false,
        };
        add(&reactor.outer, &reactor.signals, SIGNALS)?;
        add(&reactor.outer, &reactor.tick, TICK)?;
        add(&reactor.outer, &reactor.deadline, DEADLINE)?;
        add(&reactor.outer, &reactor.wake, WAKE)?;
        add(&reactor.outer, &reactor.clients, CLIENTS)?;
        Ok(reactor)
    }

    /// What clients wake the loop with.
    pub fn wake(&self) -> &OwnedFd {
        &self.wake
    }

    /// Watches a client.
    ///
    /// # Errors
    /// The kernel's.
    pub fn watch(&self, client: usize, socket: &OwnedFd, process: &OwnedFd) -> io::Result<()> {
        add(&self.clients, socket, client as u64 * 2)?;
        add(&self.clients, process, client as u64 * 2 + 1)
    }

    /// Ticks from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tick_every(&self, interval: Duration) -> io::Result<()> {
        let time = Itimerspec { it_interval: timespec(interval), it_value: timespec(interval) };
        timerfd_settime(&self.tick, TimerfdTimerFlags::empty(), &time)?;
        Ok(())
    }

    /// One deadline, in place of the last.
    ///
    /// # Errors
    /// The kernel's.
    pub fn deadline_in(&self, time: Duration) -> io::Result<()> {
        // Zero would mean never.
        let value = timespec(time.max(Duration::from_nanos(1)));
        let time = Itimerspec { it_interval: timespec(Duration::ZERO), it_value: value };
        timerfd_settime(&self.deadline, TimerfdTimerFlags::empty(), &time)?;
        Ok(())
    }

    /// Waits for events.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        events.clear();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut list = Vec::with_capacity(8);
        let limit = self.more.then_some(&now);
        match epoll::wait(&self.outer, rustix::buffer::spare_capacity(&mut list), limit) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            result => result?,
        };
        for event in &list {
            match event.data.u64() {
                SIGNALS => {
                    while self.signals.read_signal()?.is_some() {
                        events.push(Event::Interrupted);
                    }
                }
                TICK if drain(&self.tick) => events.push(Event::Tick),
                DEADLINE if drain(&self.deadline) => events.push(Event::Deadline),
                WAKE if drain(&self.wake) => events.push(Event::Wake),
                CLIENTS => self.more = true,
                _ => {}
            }
        }
        if self.more {
            let mut list = Vec::with_capacity(BATCH);
            let space = rustix::buffer::spare_capacity(&mut list);
            match epoll::wait(&self.clients, space, Some(&now)) {
                Err(rustix::io::Errno::INTR) => return Ok(()),
                result => result?,
            };
            self.more = list.len() == BATCH;
            events.extend(list.iter().map(|event| {
                let data = event.data.u64();
                // It was a usize.
                let client = (data / 2) as usize;
                if data.is_multiple_of(2) { Event::Socket(client) } else { Event::Exit(client) }
            }));
        }
        Ok(())
    }
}

/// Takes a timer's or eventfd's count; whether there was one.
fn drain(file: &OwnedFd) -> bool {
    let mut count = [0; 8];
    let mut any = false;
    while rustix::io::read(file, &mut count).is_ok() {
        any = true;
    }
    any
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three hundred sockets have something, and a timer behind them all is heard first.
    #[test]
    fn control_events_come_before_a_crowd_of_clients_and_none_is_lost() {
        const CROWD: usize = 300;
        let mut reactor = Reactor::new().expect("a loop");
        let pairs: Vec<_> =
            (0..CROWD).map(|_| std::os::unix::net::UnixStream::pair().expect("a pair")).collect();
        for (client, (ours, theirs)) in pairs.iter().enumerate() {
            let socket = OwnedFd::from(ours.try_clone().expect("a socket"));
            // The other end stands in for the process: it never has anything.
            let process = OwnedFd::from(theirs.try_clone().expect("a socket"));
            reactor.watch(client, &socket, &process).expect("watched");
            rustix::io::write(theirs, b"x").expect("written");
        }
        reactor.deadline_in(Duration::ZERO).expect("set");
        std::thread::sleep(Duration::from_millis(5));
        let (mut events, mut seen) = (Vec::new(), vec![false; CROWD]);
        reactor.wait(&mut events).expect("events");
        assert_eq!(events.first(), Some(&Event::Deadline));
        while seen.contains(&false) {
            for event in &events {
                if let Event::Socket(client) = event {
                    seen[*client] = true;
                }
            }
            reactor.wake_for_test();
            reactor.wait(&mut events).expect("events");
        }
    }

    impl Reactor {
        /// So that a loop that lost an event fails and does not hang.
        fn wake_for_test(&self) {
            rustix::io::write(&self.wake, &1u64.to_le_bytes()).expect("written");
        }
    }
}
