//! A client: a process that runs its threads and tells the coordinator about them.
//!
//! It is started with the control socket as its standard input. The first packet is the
//! plan, and brings the table, the control memory and the wake-up. It ends when its threads
//! have ended, or with its coordinator.
//!
//! Locks: none.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use uext_sync::atomic::{AtomicUsize, Ordering};

use super::control::{Control, Number};
use super::files::Context;
use super::ledger::Ledger;
use super::message::{self, Hello, Message};
use super::worker::Worker;

/// Findings that a client tells; what is more is only counted.
const MESSAGES: usize = 200;
/// A thread's stack, bytes.
const STACK: usize = 512 << 10;

/// Runs the client; its exit code.
pub fn main() -> i32 {
    match run() {
        Ok(()) => 0,
        Err(problem) => {
            eprintln!("uext drive: a client: {problem}");
            1
        }
    }
}

/// A thread that panics ends the process: the others would wait for it for ever.
fn end_on_panic() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        std::process::abort();
    }));
}

fn run() -> Result<(), String> {
    end_on_panic();
    // Without its coordinator it is of no use, and nobody would stop it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| error.to_string())?;
    // Each of many threads has some files open.
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    // Less is enough for most.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
    let socket = io::stdin();
    let hello = message::receive::<Hello>(&socket).map_err(|error| error.to_string())?;
    let (Hello { plan, client }, files) = hello.ok_or("no plan")?;
    let [table, control, wake]: [OwnedFd; 3] =
        files.try_into().map_err(|_| "files are missing".to_owned())?;
    let ledger = Ledger::map(&table, &plan).map_err(|error| error.to_string())?;
    let control = Control::map(&control).map_err(|error| error.to_string())?;
    // WHY-RELAXED: only the count matters.
    let sent = AtomicUsize::new(0);
    let report = |message: &Message| {
        // That a thread has ended is always told, once each: the run ends by it.
        let must = matches!(message, Message::Failed(_));
        // WHY-RELAXED: as above.
        if must || sent.fetch_add(1, Ordering::Relaxed) < MESSAGES {
            // A coordinator that is gone takes this process with it.
            let _ = message::send(socket.as_fd(), message, &[]);
        }
    };
    let context =
        Context { plan: &plan, control: &control, ledger: &ledger, report: &report, client };
    let ready = std::sync::Barrier::new(plan.threads + 1);
    std::thread::scope(|scope| -> Result<(), String> {
        for thread in 0..plan.threads {
            let number = client * plan.threads + thread;
            let (context, ready, wake) = (&context, &ready, &wake);
            let body = move || work(*context, number, ready, wake);
            let builder = std::thread::Builder::new().stack_size(STACK);
            // Who waits at the barrier would wait for ever.
            if let Err(error) = builder.spawn_scoped(scope, body) {
                eprintln!("uext drive: a thread: {error}");
                std::process::exit(1);
            }
        }
        ready.wait();
        message::send(socket.as_fd(), &Message::Ready, &[]).map_err(|error| error.to_string())
    })?;
    message::send(socket.as_fd(), &Message::Done, &[]).map_err(|error| error.to_string())
}

fn work(context: Context<'_>, number: usize, ready: &std::sync::Barrier, wake: &OwnedFd) {
    let prepared = Worker::prepare(context, number);
    ready.wait();
    match prepared {
        Ok(worker) => worker.run(number),
        Err(failure) => {
            context.control.count_error(failure.errno);
            (context.report)(&Message::Failed(failure));
            context.control.barrier().leave();
        }
    }
    // The last of all wakes the coordinator, which need not ask every client.
    if context.control.add(Number::Running, u64::MAX) == 1 {
        let _ = rustix::io::write(wake, &1u64.to_le_bytes());
    }
}
