//! An io_uring that carries FUSE requests: the commands REGISTER and
//! COMMIT_AND_FETCH of `/dev/fuse` (`include/uapi/linux/fuse.h`).
//!
//! Invariants:
//! - An entry the kernel has stays in [`Ring::with_kernel`], and with it its memory,
//!   until its completion has been seen.
//! - The entries outlive the io_uring: [`Ring`] borrows both, and who makes them makes
//!   the entries first.
//!
//! Locks: none; a ring belongs to the thread that made it.

use std::io;
use std::os::fd::RawFd;

use io_uring::{CompletionQueue, IoUring, SubmissionQueue, Submitter};
use io_uring::{cqueue, opcode, squeue, types};

use super::entry::Entry;

/// `FUSE_IO_URING_CMD_REGISTER`.
const CMD_REGISTER: u32 = 1;
/// `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`.
const CMD_COMMIT_AND_FETCH: u32 = 2;
/// The FUSE device in the ring's table of files.
const DEVICE: types::Fixed = types::Fixed(0);
/// User data of the read of the eventfd.
const WAKE: u64 = u64::MAX;

/// An io_uring with entries of 128 bytes.
pub(super) type Uring = IoUring<squeue::Entry128, cqueue::Entry>;

/// Makes an io_uring for `entries` entries and a wake-up. The calling thread is the
/// only one that may use it.
///
/// # Errors
/// Those of io_uring_setup(2): the kernel has none, or not for us.
pub(super) fn make(entries: usize) -> io::Result<Uring> {
    let size = u32::try_from(entries + 1).map_err(io::Error::other)?.next_power_of_two();
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .dontfork()
        .build(size)
}

/// What came out of a ring.
pub(super) enum Event {
    /// Somebody signalled the eventfd.
    Woken,
    /// A request.
    Request(Entry),
    /// The kernel gives the entry up, with an errno.
    Gone(i32),
}

/// A ring in use.
pub(super) struct Ring<'r> {
    submitter: Submitter<'r>,
    sq: SubmissionQueue<'r, squeue::Entry128>,
    cq: CompletionQueue<'r, cqueue::Entry>,
    /// Entries the kernel has, by their index.
    with_kernel: &'r mut [Option<Entry>],
    /// Each queue and its first entry.
    firsts: Vec<(u16, usize)>,
    #[cfg(test)]
    refused: Option<usize>,
    eventfd: RawFd,
    /// Where the eventfd's count goes, which nobody reads.
    count: &'r mut u64,
}

impl<'r> Ring<'r> {
    /// Puts `device` into the ring's table of files and registers the ring itself.
    /// `eventfd` must stay open as long as the ring.
    ///
    /// # Errors
    /// Those of io_uring_register(2).
    pub(super) fn new(
        uring: &'r mut Uring,
        entries: &'r mut [Option<Entry>],
        count: &'r mut u64,
        device: RawFd,
        eventfd: RawFd,
    ) -> io::Result<Self> {
        let (mut submitter, sq, cq) = uring.split();
        submitter.register_files(&[device])?;
        if let Err(error) = submitter.register_ring_fd() {
            log::debug!("the ring's descriptor is not registered: {error}");
        }
        let mut firsts: Vec<(u16, usize)> = Vec::new();
        for entry in entries.iter().flatten() {
            if firsts.last().is_none_or(|(qid, _)| *qid != entry.qid) {
                firsts.push((entry.qid, entry.index));
            }
        }
        Ok(Self {
            firsts,
            submitter,
            sq,
            cq,
            with_kernel: entries,
            #[cfg(test)]
            refused: None,
            eventfd,
            count,
        })
    }

    /// Offers those of the entries to the kernel that `which` says. A refusal comes as
    /// [`Event::Gone`] at once.
    ///
    /// # Errors
    /// Those of io_uring_enter(2).
    pub(super) fn register(&mut self, which: impl Fn(&Entry) -> bool) -> io::Result<()> {
        let iovec = |memory: &mut [u8]| libc::iovec {
            iov_base: memory.as_mut_ptr().cast(),
            iov_len: memory.len(),
        };
        let chosen = self.with_kernel.iter_mut().flatten().filter(|entry| which(entry));
        let mut offers: Vec<(usize, u16, [libc::iovec; 2])> =
            chosen.map(|entry| (entry.index, entry.qid, entry.memory().map(iovec))).collect();
        if offers.is_empty() {
            return Ok(());
        }
        for (index, qid, iovecs) in &mut offers {
            #[cfg(test)]
            if self.refused == Some(*index) {
                iovecs[1].iov_len = 4096;
            }
            let at = iovecs.as_ptr().expose_provenance() as u64;
            self.push(&command(CMD_REGISTER, *qid, 0, Some(at), *index));
        }
        self.sq.sync();
        // The kernel reads the iovecs here, and not later.
        self.submitter.submit()?;
        self.cq.sync();
        Ok(())
    }

    /// The first entry of a queue.
    pub(super) fn first_of(&self, qid: u16) -> Option<usize> {
        self.firsts.iter().find(|(queue, _)| *queue == qid).map(|(_, index)| *index)
    }

    /// Has an entry claim less memory than the kernel asks for, so that it is refused.
    #[cfg(test)]
    pub(super) fn plant_refusal(&mut self, index: usize) {
        self.refused = Some(index);
    }

    /// Gives a reply to the kernel, and the entry for the next request.
    pub(super) fn commit(&mut self, entry: Entry) {
        let index = entry.index;
        let command = command(CMD_COMMIT_AND_FETCH, entry.qid, entry.commit_id(), None, index);
        self.with_kernel[index] = Some(entry);
        self.push(&command);
    }

    /// Whether there are events that were not taken yet.
    pub(super) fn has_more(&mut self) -> bool {
        self.cq.sync();
        !self.cq.is_empty()
    }

    /// Submits what was pushed; what isn't taken now is with the next wait.
    pub(super) fn submit(&mut self) {
        self.sq.sync();
        if let Err(error) = self.submitter.submit() {
            log::debug!("io_uring_enter: {error}");
        }
        self.sq.sync();
    }

    /// Submits what was pushed and waits for at least one event.
    ///
    /// # Errors
    /// `EINTR`, and those of io_uring_enter(2) that mean that the ring is broken.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.sq.sync();
        let result = self.submitter.submit_and_wait(1);
        self.sq.sync();
        self.cq.sync();
        match result {
            Ok(_) => Ok(()),
            // Busy: completions must be taken first, which the caller does now.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The next event that is there.
    pub(super) fn next_event(&mut self) -> Option<Event> {
        let cqe = self.cq.next()?;
        self.cq.sync();
        if cqe.user_data() == WAKE {
            self.watch();
            return Some(Event::Woken);
        }
        // The index came from `push`.
        let entry = self.with_kernel[cqe.user_data() as usize].take()?;
        Some(match cqe.result() {
            0.. => Event::Request(entry),
            errno => Event::Gone(-errno),
        })
    }

    /// Reads the eventfd, once; each time it was signalled the next read follows.
    pub(super) fn watch(&mut self) {
        let count = std::ptr::from_mut(self.count).cast();
        let read = opcode::Read::new(types::Fd(self.eventfd), count, 8).build().user_data(WAKE);
        self.push(&read.into());
    }

    fn push(&mut self, command: &squeue::Entry128) {
        // SAFETY: an entry's memory lies in `with_kernel`, the count in what self
        // borrows; both outlive the io_uring, which the makers of all see to. Iovecs
        // are read at submission, and `register` submits before they go.
        let pushed = unsafe { self.sq.push(command) };
        // One command for each entry at a time, and one for the eventfd.
        assert!(pushed.is_ok(), "the ring has a place for each entry");
    }
}

impl Drop for Ring<'_> {
    fn drop(&mut self) {
        // The kernel tears a ring down later, and until then the connection would live.
        if let Err(error) = self.submitter.unregister_files() {
            log::debug!("unregistering the device: {error}");
        }
    }
}

/// A command for the FUSE device.
fn command(
    op: u32,
    qid: u16,
    commit_id: u64,
    iovecs: Option<u64>,
    index: usize,
) -> squeue::Entry128 {
    // `struct fuse_uring_cmd_req`: flags, commit_id, qid.
    let mut bytes = [0; 80];
    bytes[8..16].copy_from_slice(zerocopy::IntoBytes::as_bytes(&commit_id));
    bytes[16..18].copy_from_slice(zerocopy::IntoBytes::as_bytes(&qid));
    let command = opcode::UringCmd80::new(DEVICE, op).cmd(bytes).addr(iovecs).build();
    let mut command = command.user_data(index as u64);
    if iovecs.is_some() {
        // SAFETY: the entry is 128 bytes in the kernel's layout, whose `len`, a u32 at
        // offset 24, the builder has no name for.
        unsafe { (&raw mut command).cast::<u32>().add(6).write(2) };
    }
    command
}
