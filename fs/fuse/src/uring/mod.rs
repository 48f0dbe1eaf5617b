//! FUSE over io_uring: one ring and one pinned thread per CPU.
//!
//! The kernel puts a request into the queue of the CPU it was made on, and the
//! thread pinned there answers it: no other CPU has to wake up, which is what costs.
//! A thread submits its replies and waits for requests with one system call.
//!
//! - FORGET, INTERRUPT and notifications stay on `/dev/fuse`, where one thread reads
//!   them ([`crate::devfuse::Served::lazily`]), FORGETs some time after they have come.
//! - What may wait goes to a [`pool`], since the ring's thread is the only one that can
//!   take the requests of its CPU.
//! - The kernel sends requests this way once every possible CPU's queue has an entry.
//!   Until then they wait; when a REGISTER is refused before that they go to
//!   `/dev/fuse` for good. So rings are made before `INIT` is answered
//!   ([`Rings::prepare`]), and one queue gets its entries last ([`Phase`]).
//!
//! Invariants: an entry is with the kernel, with its ring's thread, in the pool or in
//! `Shared::done`. A thread ends when the kernel has given up all of its entries, or
//! was told to stop and has all that the pool had.
//!
//! Locks: `Shared::done` and the pool's state, leaves; neither is held over a request.

mod entry;
mod pool;
mod ring;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;
use uext_sync::Mutex;
use zerocopy::FromBytes;

use crate::PAGE_SIZE;
use crate::abi::{Fattr, Opcode, SetattrIn, WriteIn};
use crate::dispatch::Dispatcher;
use crate::request::write_flags;
use crate::session::{AbortOnPanic, Config, Control};
use crate::sys;
use entry::Entry;
use pool::{Job, Pool};
use ring::{Event, Ring};
use uext_vfs::WriteFlags;

/// Requests a CPU can have open.
const DEPTH: usize = 8;
/// Bytes for the payloads of all rings; with many CPUs each gets fewer entries.
const PAYLOAD_BUDGET: usize = 32 << 20;
/// From here on a write is carried to the disk by its request, which then waits for it.
const LARGE_WRITE: u32 = 128 << 10;
/// Where the kernel says whether it offers this transport.
pub(crate) const ENABLE: &str = "/sys/module/fuse/parameters/enable_uring";

/// Whether the kernel offers this transport.
pub(crate) fn is_enabled() -> bool {
    std::fs::read_to_string(ENABLE).is_ok_and(|text| text.starts_with('Y'))
}

/// Has the kernel offer this transport, to every mount of the machine that asks.
pub(crate) fn enable() -> io::Result<()> {
    std::fs::write(ENABLE, "Y")
}

/// What a ring's thread shares with the pool.
struct Shared {
    dispatcher: Arc<Dispatcher>,
    /// Wakes the ring's thread.
    eventfd: EventFd,
    /// Entries with their replies.
    done: Mutex<Vec<Entry>>,
}

impl Shared {
    fn give_back(&self, entry: Entry) {
        let first = {
            let mut done = self.done.lock();
            done.push(entry);
            done.len() == 1
        };
        if first && let Err(errno) = self.eventfd.write(1) {
            log::error!("eventfd: {errno}: a reply is late");
        }
    }
}

/// What the threads are told.
enum Word {
    /// Offer these entries to the kernel.
    Register(Phase),
    Serve,
}

/// Entries, in the order in which they are offered.
///
/// The kernel sends all requests to the rings as soon as every queue has an entry, even
/// if others were refused, and there is no way back. So one queue gets none until it is
/// known that all others' were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Those of all queues but this one.
    Others(u16),
    /// The first of this queue, with which requests begin to come.
    First(u16),
    /// The rest of this queue, without which it is just shorter.
    Rest(u16),
}

impl Phase {
    fn has(self, entry: &Entry, first: Option<usize>) -> bool {
        match self {
            Self::Others(last) => entry.qid != last,
            Self::First(last) => entry.qid == last && Some(entry.index) == first,
            Self::Rest(last) => entry.qid == last && Some(entry.index) != first,
        }
    }
}

/// One thread of [`Rings`].
struct RingThread {
    tell: Sender<Word>,
    thread: JoinHandle<io::Result<()>>,
}

/// Rings that the kernel doesn't know yet. Dropping them ends their threads.
pub(crate) struct Rings {
    threads: Vec<RingThread>,
    said: Receiver<io::Result<()>>,
    pool: Arc<Pool>,
    /// The queue that gets its entries last.
    last: u16,
}

/// What a live transport consists of.
pub(crate) struct Live {
    /// The rings' threads.
    pub(crate) threads: Vec<JoinHandle<io::Result<()>>>,
    pool: Arc<Pool>,
}

impl Live {
    /// Ends the pool, when no ring's thread is left.
    pub(crate) fn close(&self) {
        self.pool.close();
    }
}

impl Rings {
    /// Makes a ring for each CPU, before the kernel is told of any.
    ///
    /// # Errors
    /// When the kernel doesn't offer the transport, or a ring or thread is not to be had.
    pub(crate) fn prepare(
        device: &Arc<File>,
        dispatcher: &Arc<Dispatcher>,
        control: &Arc<Control>,
        config: &Config,
    ) -> io::Result<Self> {
        if !is_enabled() {
            return Err(io::Error::other("the kernel does not offer it (enable_uring is N)"));
        }
        let queues = possible_cpus()?;
        let cpus = usable_cpus(queues)?;
        let payload = config.max_write().max(PAGE_SIZE);
        let depth = (PAYLOAD_BUDGET / payload / queues).clamp(1, DEPTH);
        let pool = Pool::new(queues * depth)?;
        let (say, said) = channel();
        // A queue's number is a CPU's, of which there are at most 4096.
        let mut rings = Self { threads: Vec::new(), said, pool, last: cpus[0] as u16 };
        for (n, cpu) in cpus.iter().enumerate() {
            // Queues of CPUs that can't be used here are folded into those that can.
            let qids = (0..queues).filter(|qid| match cpus.iter().position(|c| c == qid) {
                Some(own) => own == n,
                None => qid % cpus.len() == n,
            });
            let entries = qids.flat_map(|qid| std::iter::repeat_n(qid as u16, depth));
            let eventfd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
            let (tell, told) = channel();
            let ring = RingWorker {
                cpu: *cpu,
                entries: entries
                    .enumerate()
                    .map(|(index, qid)| Some(Entry::new(index, qid, payload)))
                    .collect(),
                device: device.clone(),
                shared: Arc::new(Shared {
                    dispatcher: dispatcher.clone(),
                    eventfd,
                    done: Mutex::default(),
                }),
                pool: rings.pool.clone(),
                control: control.clone(),
                blocks_on_change: config.sync || config.dirsync,
                say: say.clone(),
                told,
            };
            let name = format!("fuse-ring-{cpu}");
            let thread = std::thread::Builder::new().name(name).spawn(move || ring.run())?;
            rings.threads.push(RingThread { tell, thread });
        }
        rings.hear_all()?;
        Ok(rings)
    }

    /// Offers all entries to the kernel, which has agreed to the transport in `INIT`.
    ///
    /// # Errors
    /// When it refuses one: requests then go to `/dev/fuse`.
    pub(crate) fn go_live(mut self) -> io::Result<Live> {
        // Some queue: that of the first thread's first entry.
        let last = self.last;
        for phase in [Phase::Others(last), Phase::First(last)] {
            self.tell_all(|| Word::Register(phase));
            self.hear_all()?;
        }
        self.tell_all(|| Word::Register(Phase::Rest(last)));
        if let Err(error) = self.hear_all() {
            log::warn!("the queue of CPU {last} is shorter than it should be: {error}");
        }
        self.tell_all(|| Word::Serve);
        let threads = self.threads.drain(..).map(|ring| ring.thread).collect();
        Ok(Live { threads, pool: self.pool.clone() })
    }

    fn tell_all(&self, word: impl Fn() -> Word) {
        for ring in &self.threads {
            // A thread that has ended has said why, or will be joined.
            let _ = ring.tell.send(word());
        }
    }

    /// Waits for one word of each thread.
    fn hear_all(&self) -> io::Result<()> {
        let words: Vec<_> = self.said.iter().take(self.threads.len()).collect();
        words.into_iter().collect()
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        let live = self.threads.is_empty();
        for RingThread { tell, thread } in self.threads.drain(..) {
            // Who waits for a word hears that there will be none.
            drop(tell);
            let _ = thread.join();
        }
        if !live {
            self.pool.close();
        }
    }
}

/// What a ring's thread has.
struct RingWorker {
    cpu: usize,
    entries: Box<[Option<Entry>]>,
    device: Arc<File>,
    shared: Arc<Shared>,
    pool: Arc<Pool>,
    control: Arc<Control>,
    blocks_on_change: bool,
    say: Sender<io::Result<()>>,
    told: Receiver<Word>,
}

impl RingWorker {
    /// The thread's life: makes the ring, registers when told, serves when told.
    fn run(mut self) -> io::Result<()> {
        let _guard = AbortOnPanic;
        sys::set_io_flusher();
        pin(self.cpu);
        // Entries and count are declared before the ring, so they outlive it.
        let mut entries = std::mem::take(&mut self.entries);
        let mut count = 0;
        let total = entries.len();
        let (device, eventfd) = (self.device.as_raw_fd(), self.shared.eventfd.as_raw_fd());
        let mut uring = match ring::make(total) {
            Ok(uring) => uring,
            Err(error) => return self.fail(error),
        };
        let mut ring = match Ring::new(&mut uring, &mut entries, &mut count, device, eventfd) {
            Ok(ring) => ring,
            Err(error) => return self.fail(error),
        };
        let _ = self.say.send(Ok(()));
        plant_failure(self.cpu, &mut ring);
        let mut served = Served { early: Vec::new(), gone: 0, total };
        loop {
            match self.told.recv() {
                Ok(Word::Register(phase)) => {
                    let result = served.register(&mut ring, phase);
                    let _ = self.say.send(result);
                }
                Ok(Word::Serve) => break,
                Err(_) => return Ok(()),
            }
        }
        ring.watch();
        let waiting = self.control.enter();
        let result = self.serve(&mut ring, &waiting, served);
        self.control.leave();
        if result.is_err() {
            // Nobody answers this CPU's requests any more.
            self.control.stop();
        }
        result
    }

    /// Says why the thread ends; the session goes on without rings.
    fn fail(&self, error: io::Error) -> io::Result<()> {
        let _ = self.say.send(Err(error));
        Ok(())
    }

    fn serve(&self, ring: &mut Ring<'_>, waiting: &AtomicBool, served: Served) -> io::Result<()> {
        let Served { early, mut gone, total } = served;
        let mut scratch = Vec::new();
        let mut done = Vec::with_capacity(total);
        let mut in_pool = 0;
        for entry in early {
            in_pool += self.take(ring, entry, &mut scratch);
        }
        loop {
            waiting.store(true, Ordering::SeqCst); // PAIRS-WITH: session::Control::kick
            let stop = self.control.is_stopping();
            if stop && in_pool == 0 {
                waiting.store(false, Ordering::SeqCst); // PAIRS-WITH: session::Control::kick
                return Ok(());
            }
            let result = ring.wait();
            waiting.store(false, Ordering::SeqCst); // PAIRS-WITH: session::Control::kick
            match result {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
            while let Some(event) = ring.next_event() {
                match event {
                    Event::Woken => {}
                    Event::Gone(errno) => {
                        log::trace!("entry given up: errno {errno}");
                        gone += 1;
                    }
                    Event::Request(entry) => in_pool += self.take(ring, entry, &mut scratch),
                }
            }
            std::mem::swap(&mut done, &mut *self.shared.done.lock());
            in_pool -= done.len();
            for entry in done.drain(..) {
                ring.commit(entry);
            }
            if gone == total {
                return Ok(());
            }
        }
    }

    /// Serves a request here, or has the pool do it; how many went there.
    fn take(&self, ring: &mut Ring<'_>, mut entry: Entry, scratch: &mut Vec<u8>) -> usize {
        self.control.awake.note();
        if self.may_wait(&entry) {
            self.pool.hand(Job { entry, home: self.shared.clone() });
            return 1;
        }
        entry.serve(&self.shared.dispatcher, scratch);
        ring.commit(entry);
        if ring.has_more() {
            // Who asked first does not wait for the others, and an answer is not kept back
            // while what it says changes. The last reply goes with the wait.
            ring.submit();
        }
        0
    }

    /// Whether serving the request may wait for the disk longer than one block takes,
    /// or for a commit.
    fn may_wait(&self, entry: &Entry) -> bool {
        let header = entry.request_header();
        let Some(opcode) = Opcode::from_wire(header.opcode) else { return false };
        match opcode {
            Opcode::Read
            | Opcode::Fsync
            | Opcode::Fsyncdir
            | Opcode::Syncfs
            | Opcode::Destroy
            | Opcode::Fallocate
            | Opcode::Ioctl
            | Opcode::Readdir
            | Opcode::Readdirplus => true,
            Opcode::Write => {
                let args = WriteIn::read_from_prefix(entry.args());
                let Ok((args, _)) = args else { return false };
                let slow = WriteFlags::SYNC | WriteFlags::DSYNC | WriteFlags::DIRECT;
                let flags = write_flags(args.write_flags, args.flags.cast_signed());
                self.blocks_on_change || args.size >= LARGE_WRITE || flags.intersects(slow)
            }
            Opcode::Setattr => {
                let args = SetattrIn::read_from_prefix(entry.args());
                let truncates = |(args, _): (SetattrIn, _)| {
                    Fattr::from_bits_retain(args.valid).contains(Fattr::SIZE)
                };
                self.blocks_on_change || args.is_ok_and(truncates)
            }
            Opcode::Mknod
            | Opcode::Mkdir
            | Opcode::Symlink
            | Opcode::Link
            | Opcode::Unlink
            | Opcode::Rmdir
            | Opcode::Rename
            | Opcode::Rename2
            | Opcode::Create
            | Opcode::Tmpfile
            | Opcode::Setxattr
            | Opcode::Removexattr => self.blocks_on_change,
            _ => false,
        }
    }
}

/// What has become of a ring's entries before they are served.
struct Served {
    /// Requests that came while entries were still being offered.
    early: Vec<Entry>,
    /// Entries that the kernel doesn't have and will not get.
    gone: usize,
    total: usize,
}

impl Served {
    /// Offers entries; the first refusal is the error.
    fn register(&mut self, ring: &mut Ring<'_>, phase: Phase) -> io::Result<()> {
        let first = match phase {
            Phase::Others(last) | Phase::First(last) | Phase::Rest(last) => ring.first_of(last),
        };
        ring.register(|entry| phase.has(entry, first))?;
        let mut refused = None;
        while let Some(event) = ring.next_event() {
            match event {
                Event::Woken => {}
                Event::Request(entry) => self.early.push(entry),
                Event::Gone(errno) => {
                    self.gone += 1;
                    refused = refused.or(Some(io::Error::from_raw_os_error(errno)));
                }
            }
        }
        refused.map_or(Ok(()), Err)
    }
}

/// Has the calling thread run on one CPU.
fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(errno) = pinned {
        log::warn!("the ring of CPU {cpu} is not pinned: {errno}");
    }
}

/// How many CPUs there may ever be: the kernel has a queue for each.
fn possible_cpus() -> io::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let count = text.trim().split(',').try_fold(0, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        Some(sum + last.checked_sub(first)? + 1)
    });
    count.filter(|count| (1..=4096).contains(count)).ok_or_else(|| io::Error::other(text))
}

/// The CPUs this process may use.
fn usable_cpus(possible: usize) -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    let cpus: Vec<usize> = (0..possible).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect();
    if cpus.is_empty() { Ok(vec![0]) } else { Ok(cpus) }
}

#[cfg(not(test))]
fn plant_failure(_cpu: usize, _ring: &mut Ring<'_>) {}

#[cfg(test)]
use tests::plant_failure;

#[cfg(test)]
mod tests;
