//! The system calls of Linux AIO, which libc doesn't wrap: `io_setup`, `io_submit`,
//! `io_cancel`, `io_getevents`, `io_destroy`.
//!
//! Invariants: an [`AioContext`] lives as long as its number; its completions are
//! taken by one thread at a time ([`AioContext::completions`]).
//!
//! Locks: none.

use std::cell::UnsafeCell;
use std::io;
use std::os::fd::RawFd;
use std::ptr;

use super::aio_ring::{AioRing, IoEvent};
use super::flight::Flight;
use crate::bio::{BioFlags, BioOp};

/// `IOCB_CMD_PREAD`.
const CMD_PREAD: u16 = 0;
/// `IOCB_CMD_PWRITE`.
const CMD_PWRITE: u16 = 1;
/// `IOCB_CMD_PREADV`.
const CMD_PREADV: u16 = 7;
/// `IOCB_CMD_PWRITEV`.
const CMD_PWRITEV: u16 = 8;
/// Events one `io_getevents` takes.
const EVENTS: usize = 32;

/// A request (`struct iocb`). The kernel copies it at submission.
#[repr(transparent)]
pub(super) struct Iocb(libc::iocb);

// SAFETY: a request holds numbers; the memory it names is its flight's.
unsafe impl Send for Iocb {}

impl Iocb {
    /// A place for a request.
    pub(super) fn empty() -> Self {
        // SAFETY: all fields are integers.
        Self(unsafe { std::mem::zeroed() })
    }

    /// The request for what is left of a flight.
    pub(super) fn new(flight: &Flight, fd: RawFd, data: u64) -> Self {
        let mut iocb = Self::empty();
        let raw = &mut iocb.0;
        let iovecs = flight.iovecs();
        let write = flight.bio().is_some_and(|bio| bio.op() == BioOp::Write);
        let fua = flight.bio().is_some_and(|bio| bio.flags().contains(BioFlags::FUA));
        raw.aio_data = data;
        raw.aio_rw_flags = if write && fua { libc::RWF_DSYNC } else { 0 };
        raw.aio_fildes = fd.cast_unsigned();
        // One piece, the usual case, needs no array for the kernel to copy.
        if let [iovec] = iovecs {
            raw.aio_lio_opcode = if write { CMD_PWRITE } else { CMD_PREAD };
            raw.aio_buf = iovec.iov_base.expose_provenance() as u64;
            raw.aio_nbytes = iovec.iov_len as u64;
        } else {
            raw.aio_lio_opcode = if write { CMD_PWRITEV } else { CMD_PREADV };
            raw.aio_buf = iovecs.as_ptr().expose_provenance() as u64;
            raw.aio_nbytes = iovecs.len() as u64;
        }
        raw.aio_offset = flight.offset().cast_signed();
        iocb
    }

    /// A read of no bytes: it completes at once.
    pub(super) fn nothing(fd: RawFd, data: u64) -> Self {
        let mut iocb = Self::empty();
        iocb.0.aio_data = data;
        iocb.0.aio_fildes = fd.cast_unsigned();
        iocb.0.aio_lio_opcode = CMD_PREAD;
        iocb
    }

    /// Adds `nowait` (`RWF_NOWAIT` or nothing) to the request's flags.
    pub(super) fn set_nowait(&mut self, nowait: i32) {
        self.0.aio_rw_flags = (self.0.aio_rw_flags & !libc::RWF_NOWAIT) | nowait;
    }
}

/// A queue of the kernel's (`aio_context_t`).
pub(super) struct AioContext {
    id: u64,
    /// The ring where user space may read it. [who takes completions]
    ring: UnsafeCell<Option<AioRing>>,
}

// SAFETY: submission is the kernel's to order; `ring` is reached only through
// `completions`, whose caller is alone.
unsafe impl Sync for AioContext {}

impl AioContext {
    /// A queue for `depth` requests.
    ///
    /// # Errors
    /// `EAGAIN` when the system's `aio-max-nr` is used up.
    pub(super) fn new(depth: u32) -> io::Result<Self> {
        let mut id = 0u64;
        // SAFETY: the kernel writes one number to the pointer, which outlives the call.
        check(unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut id) })?;
        // SAFETY: the number is io_setup's; the drop below destroys it after the ring.
        let ring = unsafe { AioRing::of_context(id) };
        if ring.is_none() {
            log::debug!("no readable completion ring: using io_getevents");
        }
        Ok(Self { id, ring: UnsafeCell::new(ring) })
    }

    /// Submits the requests of `indices`; how many of them, from the front, were taken.
    ///
    /// # Errors
    /// Why the first one was not: `EAGAIN` without a place, `EINVAL`, `EOPNOTSUPP`.
    ///
    /// # Safety
    /// The memory of the requests stays valid, and theirs alone as the bio's I/O rule
    /// has it, until their completions have been taken; the iovecs until this returns.
    pub(super) unsafe fn submit(&self, iocbs: &mut [Iocb], indices: &[u32]) -> io::Result<usize> {
        /// Requests in one call.
        const MAX: usize = 128;
        let mut list = [ptr::null_mut::<Iocb>(); MAX];
        let count = indices.len().min(MAX);
        let base = iocbs.as_mut_ptr();
        for (place, index) in list.iter_mut().zip(indices) {
            assert!((*index as usize) < iocbs.len(), "a request outside the array");
            // SAFETY: the index was checked.
            *place = unsafe { base.add(*index as usize) };
        }
        // SAFETY: `count` pointers to iocbs, which outlive the call; the rest is the
        // caller's word.
        check(unsafe { libc::syscall(libc::SYS_io_submit, self.id, count, list.as_mut_ptr()) })
    }

    /// Asks the kernel to call a request off. Advice only: whatever the answer, the
    /// request is over when its completion has come.
    ///
    /// # Errors
    /// `EINVAL` for everything that can't be cancelled, reads and writes of disks above
    /// all; `EINPROGRESS` when it can.
    pub(super) fn cancel(&self, iocb: &Iocb) -> io::Result<()> {
        let mut event = IoEvent::default();
        // SAFETY: both pointers outlive the call; the kernel looks the iocb's address up.
        let result = unsafe {
            let iocb = ptr::from_ref(iocb);
            libc::syscall(libc::SYS_io_cancel, self.id, iocb, &raw mut event)
        };
        check(result).map(drop)
    }

    /// The completions.
    ///
    /// # Safety
    /// The caller is the only one who takes from this context while the value lives.
    pub(super) unsafe fn completions(&self) -> Completions<'_> {
        // SAFETY: the caller is alone, so no other reference to the ring lives.
        let ring = unsafe { (*self.ring.get()).as_mut() };
        Completions { id: self.id, ring, events: [IoEvent::default(); EVENTS], left: 0..0 }
    }
}

impl Drop for AioContext {
    fn drop(&mut self) {
        *self.ring.get_mut() = None;
        // SAFETY: nothing uses the number afterwards. The kernel waits for what is in
        // flight, of which there is nothing.
        if let Err(error) = check(unsafe { libc::syscall(libc::SYS_io_destroy, self.id) }) {
            log::error!("io_destroy: {error}");
        }
    }
}

/// Takes completions of a context.
pub(super) struct Completions<'a> {
    id: u64,
    ring: Option<&'a mut AioRing>,
    /// What `io_getevents` gave and was not taken yet.
    events: [IoEvent; EVENTS],
    left: std::ops::Range<usize>,
}

impl Completions<'_> {
    /// The next one that is there.
    pub(super) fn next(&mut self) -> Option<IoEvent> {
        if self.left.is_empty() {
            if let Some(ring) = &mut self.ring {
                return ring.pop();
            }
            self.get_events(0);
        }
        self.left.next().map(|n| self.events[n])
    }

    /// Sleeps until there are `want` (at most as many as one call takes).
    pub(super) fn wait(&mut self, want: usize) {
        if self.left.is_empty() {
            self.get_events(want.clamp(1, EVENTS));
        }
    }

    fn get_events(&mut self, want: usize) {
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = if want == 0 { &raw const zero } else { ptr::null() };
        // SAFETY: the kernel writes at most EVENTS events to the array, which outlives
        // the call, and reads the timeout.
        let result = check(unsafe {
            let events = self.events.as_mut_ptr();
            libc::syscall(libc::SYS_io_getevents, self.id, want, EVENTS, events, timeout)
        });
        self.left = match result {
            Ok(count) => 0..count,
            Err(error) => {
                if error.raw_os_error() != Some(libc::EINTR) {
                    log::warn!("io_getevents: {error}; trying again");
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                0..0
            }
        };
    }
}

fn check(result: libc::c_long) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::aligned::AlignedBuf;
    use crate::bio::{Bio, BioVec};
    use crate::file::target::{Kind, Target};
    use crate::limits::QueueLimits;
    use crate::units::Sector;

    fn target() -> Target {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).expect("a temporary file");
        file.set_len(1 << 20).expect("room for it");
        Target::new(file, Kind::Image, false, QueueLimits::new(Sector(2048)))
    }

    fn flight(target: &Target, op: BioOp, sector: u64) -> Flight {
        let mut bio = Bio::new(op, BioFlags::empty(), Sector(sector));
        bio.add_vec(BioVec::whole(Arc::new(AlignedBuf::from_slice(&[7; 4096]))));
        let mut flight = Flight::new(target);
        flight.board(bio);
        flight
    }

    /// Runs eight writes, by the ring in user space or without it.
    fn run(context: &AioContext, target: &Target) {
        for round in 0..100 {
            let flights: Vec<_> =
                (0..8).map(|n| flight(target, BioOp::Write, n * 8 + round)).collect();
            let mut iocbs: Vec<_> = flights
                .iter()
                .enumerate()
                .map(|(n, flight)| Iocb::new(flight, target.fd(), n as u64))
                .collect();
            let mut indices = (0..8).collect::<Vec<u32>>();
            while !indices.is_empty() {
                // SAFETY: the flights live until all completions are taken below.
                let taken = unsafe { context.submit(&mut iocbs, &indices) }.expect("submitted");
                indices.drain(..taken);
            }
            let mut seen = [false; 8];
            // SAFETY: the test is the only reader.
            let mut events = unsafe { context.completions() };
            while seen.contains(&false) {
                let Some(event) = events.next() else {
                    events.wait(1);
                    continue;
                };
                assert_eq!(event.res, 4096);
                assert!(!std::mem::replace(&mut seen[event.data as usize], true), "once");
            }
            assert_eq!(events.next(), None);
        }
    }

    #[test]
    fn completions_come_through_the_ring_and_through_the_system_call() {
        let target = target();
        let mut context = AioContext::new(8).expect("a context");
        assert!(context.ring.get_mut().is_some(), "this kernel's ring is known");
        run(&context, &target);
        // A kernel with another kind of ring.
        *context.ring.get_mut() = None;
        run(&context, &target);
    }

    /// Whatever io_cancel says, the memory is the kernel's until the completion.
    #[test]
    fn a_cancelled_request_still_completes() {
        let target = target();
        let context = AioContext::new(1).expect("a context");
        let flight = flight(&target, BioOp::Read, 0);
        let mut iocbs = [Iocb::new(&flight, target.fd(), 5)];
        // SAFETY: the flight lives until its completion is taken below.
        assert_eq!(unsafe { context.submit(&mut iocbs, &[0]) }.expect("submitted"), 1);
        assert!(context.cancel(&iocbs[0]).is_err(), "reads of disks are not cancelled");
        // SAFETY: the test is the only reader.
        let mut events = unsafe { context.completions() };
        let event = loop {
            match events.next() {
                Some(event) => break event,
                None => events.wait(1),
            }
        };
        assert_eq!((event.data, event.res), (5, 4096));
    }

    #[test]
    fn a_request_the_kernel_refuses_is_told_at_submission() {
        let target = target();
        let context = AioContext::new(1).expect("a context");
        let flight = flight(&target, BioOp::Read, 0);
        let mut iocbs = [Iocb::new(&flight, -1, 0)];
        // SAFETY: nothing is submitted.
        let refused = unsafe { context.submit(&mut iocbs, &[0]) }.expect_err("no such file");
        assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
    }
}
