//! A bio on its way through the kernel: its request, for io_uring or Linux AIO, and
//! what its completion means.
//!
//! Invariants: from the moment the request of a flight is submitted until its
//! completion has been seen the flight keeps its bio, and so the memory, and its
//! iovecs stay in place.

use io_uring::{opcode, squeue, types};

use super::target::{MAX_AGAIN, Target, advance, gather};
use crate::bio::{Bio, BioFlags, BioOp};
use crate::status::{BlkResult, BlkStatus};

/// The device's file in the ring's table of registered files.
const FILE: types::Fixed = types::Fixed(0);

/// A place for one bio in a ring; kept and used again.
pub(super) struct Flight {
    bio: Option<Bio>,
    iovecs: Vec<libc::iovec>,
    /// Iovecs that are finished.
    first: usize,
    offset: u64,
    again: u32,
}

// SAFETY: the pointers in the iovecs are into memory that the bio keeps alive, and
// `Bio` is Send; nothing of the flight is bound to a thread.
unsafe impl Send for Flight {}

/// What became of a flight with a completion.
pub(super) enum Landing {
    /// It is over.
    Done(Bio, BlkResult<()>),
    /// It came short or was interrupted: submit it again.
    Again,
}

impl Flight {
    /// An empty one, with room for the largest request: later ones allocate nothing.
    pub(super) fn new(target: &Target) -> Self {
        let iovecs = Vec::with_capacity(target.limits.max_segments.into());
        Self { bio: None, iovecs, first: 0, offset: 0, again: 0 }
    }

    /// Whether the ring is the way for the bio: plain reads and writes, FUA included.
    pub(super) fn can_do(bio: &Bio) -> bool {
        match bio.op() {
            BioOp::Read => true,
            BioOp::Write => !bio.flags().contains(BioFlags::PREFLUSH),
            BioOp::Flush | BioOp::Discard | BioOp::WriteZeroes => false,
        }
    }

    /// Takes a bio on board.
    pub(super) fn board(&mut self, bio: Bio) {
        self.iovecs.clear();
        gather(&mut self.iovecs, bio.vecs());
        self.first = 0;
        self.offset = bio.sector().byte_offset();
        self.again = 0;
        self.bio = Some(bio);
    }

    /// Takes the bio off again, as if it had never been submitted.
    pub(super) fn disembark(&mut self) -> Option<Bio> {
        self.bio.take()
    }

    /// The bio on board.
    pub(super) fn bio(&self) -> Option<&Bio> {
        self.bio.as_ref()
    }

    /// Where on the device the rest begins, bytes.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Memory that is left to do; stays in place until the completion.
    pub(super) fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs[self.first..]
    }

    /// The submission entry for what is left to do. It points into the flight, which
    /// must stay where it is until the completion.
    pub(super) fn entry(&self, user_data: u64) -> squeue::Entry {
        let Some(bio) = &self.bio else {
            return opcode::Nop::new().build().user_data(user_data);
        };
        let (read, offset) = (bio.op() == BioOp::Read, self.offset);
        let fua = bio.flags().contains(BioFlags::FUA);
        let rwf = if fua { libc::RWF_DSYNC } else { 0 };
        let entry = match self.iovecs() {
            // One piece, the usual case, needs no array for the kernel to copy. It is no longer
            // than the bio, and that than `max_bytes`, 32 bits.
            &[libc::iovec { iov_base, iov_len }] => {
                let (ptr, len) = (iov_base.cast::<u8>(), iov_len as u32);
                if read {
                    opcode::Read::new(FILE, ptr, len).offset(offset).build()
                } else {
                    opcode::Write::new(FILE, ptr, len).offset(offset).rw_flags(rwf).build()
                }
            }
            iovecs => {
                // At most `max_segments`.
                let (ptr, count) = (iovecs.as_ptr(), iovecs.len() as u32);
                if read {
                    opcode::Readv::new(FILE, ptr, count).offset(offset).build()
                } else {
                    opcode::Writev::new(FILE, ptr, count).offset(offset).rw_flags(rwf).build()
                }
            }
        };
        entry.user_data(user_data)
    }

    /// Judges a completion.
    pub(super) fn land(&mut self, result: i32, target: &Target) -> Landing {
        let status = match u32::try_from(result) {
            Ok(moved) => match self.moved(moved as usize) {
                None => return Landing::Again,
                Some(status) => status,
            },
            // A thread that exits has its queued requests cancelled; they are as good
            // as never submitted.
            Err(_) if self.try_again(-result) => return Landing::Again,
            Err(_) => {
                log::warn!("I/O failed: {}", std::io::Error::from_raw_os_error(-result));
                Err(BlkStatus::from_errno(-result))
            }
        };
        match self.bio.take() {
            Some(bio) if bio.op() == BioOp::Write && bio.flags().contains(BioFlags::FUA) => {
                let lost = target.flush_lost();
                let status = if lost { Err(BlkStatus::IoErr) } else { target.note_flush(status) };
                Landing::Done(bio, status)
            }
            Some(bio) => Landing::Done(bio, status),
            None => Landing::Again,
        }
    }

    /// Notes progress; the status when that was all.
    fn moved(&mut self, moved: usize) -> Option<BlkResult<()>> {
        if self.first == self.iovecs.len() {
            return Some(Ok(()));
        }
        if moved == 0 {
            log::error!("I/O at byte {} moved nothing: the file has shrunk", self.offset);
            return Some(Err(BlkStatus::IoErr));
        }
        self.again = 0;
        self.offset += moved as u64;
        self.first += advance(&mut self.iovecs[self.first..], moved);
        (self.first == self.iovecs.len()).then_some(Ok(()))
    }

    fn try_again(&mut self, errno: i32) -> bool {
        self.again += 1;
        matches!(errno, libc::EINTR | libc::EAGAIN | libc::ECANCELED) && self.again < MAX_AGAIN
    }
}
