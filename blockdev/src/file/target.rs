//! The open file behind a [`FileDevice`](super::FileDevice) and the system calls on it.
//!
//! [`Target::run`] does a whole bio in the calling thread, flushes included, and
//! allocates nothing once the thread's iovec array has grown: it is the sync
//! engine's worker and everybody's way to wait.
//!
//! Invariants:
//! - A short read or write is resumed; a read that gives nothing inside the
//!   device's capacity means the file shrank and is an error.
//! - A flush that failed through the page cache stays failed: the kernel reports a
//!   lost page once and then calls it clean, so a later success would be a lie.
//!
//! Locks: none.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

use crate::aligned::AlignedBuf;
use crate::bio::{Bio, BioFlags, BioOp, BioVec};
use crate::limits::QueueLimits;
use crate::status::{BlkResult, BlkStatus};

/// Bytes of the zeroes that are written where the file can't make them itself.
const ZEROES_BYTES: u64 = 256 << 10;

/// Times in a row a system call may answer `EAGAIN` before it counts as an error.
pub(super) const MAX_AGAIN: u32 = 1000;

/// What kind of file carries the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file.
    Image,
    /// A block special file.
    Block,
}

/// An open file and what it can do.
pub(super) struct Target {
    pub(super) file: File,
    pub(super) kind: Kind,
    pub(super) direct: bool,
    pub(super) limits: QueueLimits,
    /// No hole punching: known after the first refusal.
    /// WHY-RELAXED: who sees it late asks the kernel once more and is refused again.
    no_discard: AtomicBool,
    /// No zero range: known after the first refusal.
    /// WHY-RELAXED: as `no_discard`.
    no_zero_range: AtomicBool,
    /// A flush failed and its data may be lost (buffered files only).
    /// WHY-RELAXED: it only ever becomes true, before the failed flush's bio completes; a
    /// flush that must fail because of it is submitted after that, by whoever was told.
    flush_lost: AtomicBool,
}

thread_local! {
    /// The iovecs of the bio this thread is doing, kept so that waiting allocates nothing.
    static IOVECS: RefCell<Vec<libc::iovec>> = const { RefCell::new(Vec::new()) };
}

impl Target {
    pub(super) fn new(file: File, kind: Kind, direct: bool, limits: QueueLimits) -> Self {
        Self {
            file,
            kind,
            direct,
            limits,
            no_discard: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            flush_lost: AtomicBool::new(false),
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Takes the memory that this thread will need for bios, before the first.
    pub(super) fn prepare_thread(&self) {
        IOVECS.with_borrow_mut(|iovecs| iovecs.reserve(self.limits.max_segments.into()));
    }

    /// Does a bio that [`QueueLimits::check`] let pass, in the calling thread:
    /// flush before, the operation, durability after.
    pub(super) fn run(&self, bio: &Bio) -> BlkResult<()> {
        match bio.op() {
            BioOp::Flush => self.flush(),
            BioOp::Read => self.read_write(bio, 0),
            BioOp::Write => self.write(bio),
            BioOp::Discard => self.discard(bio.sector().byte_offset(), bio.len()),
            BioOp::WriteZeroes => self.write_zeroes(bio.sector().byte_offset(), bio.len()),
        }
    }

    fn write(&self, bio: &Bio) -> BlkResult<()> {
        if bio.flags().contains(BioFlags::PREFLUSH) {
            self.flush()?;
        }
        if !bio.flags().contains(BioFlags::FUA) {
            return self.read_write(bio, 0);
        }
        // One call that is durable by itself beats write and flush; many of them don't.
        let one_call = bio.vecs().len() <= usize::from(self.limits.max_segments);
        if one_call && !self.flush_lost() {
            return self.note_flush(self.read_write(bio, libc::RWF_DSYNC));
        }
        self.read_write(bio, 0)?;
        self.flush()
    }

    /// Makes everything written before durable.
    pub(super) fn flush(&self) -> BlkResult<()> {
        if self.flush_lost() {
            return Err(BlkStatus::IoErr);
        }
        // SAFETY: the descriptor is open as long as self lives.
        let result = retry(|| unsafe { libc::fdatasync(self.fd()) as isize }).map(drop);
        self.note_flush(result)
    }

    /// Remembers a failed flush where the kernel would forget it.
    pub(super) fn note_flush(&self, result: BlkResult<()>) -> BlkResult<()> {
        if result.is_err() && !self.direct {
            log::error!("flush of a buffered image failed; no later flush can be trusted");
            // WHY-RELAXED: it only ever becomes true, and who must see it is
            // ordered behind this bio's completion.
            self.flush_lost.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Whether an earlier flush failed for good.
    pub(super) fn flush_lost(&self) -> bool {
        // WHY-RELAXED: see `note_flush`.
        self.flush_lost.load(Ordering::Relaxed)
    }

    /// Writes a slice that [`QueueLimits::check_write`] let pass, in the calling thread.
    pub(super) fn write_slice(&self, offset: u64, data: &[u8]) -> BlkResult<()> {
        // The kernel only reads a write's memory.
        let base = data.as_ptr().cast_mut().cast();
        let mut iovec = [libc::iovec { iov_base: base, iov_len: data.len() }];
        self.transfer(BioOp::Write, &mut iovec, offset, 0)
    }

    /// Reads or writes all of the bio's memory, resuming what comes short.
    fn read_write(&self, bio: &Bio, rwf: i32) -> BlkResult<()> {
        IOVECS.with_borrow_mut(|iovecs| {
            let offset = bio.sector().byte_offset();
            let per_call = usize::from(self.limits.max_segments);
            let mut done = 0;
            for vecs in bio.vecs().chunks(per_call) {
                iovecs.clear();
                gather(iovecs, vecs);
                let bytes = vecs.iter().map(|vec| u64::from(vec.len)).sum::<u64>();
                self.transfer(bio.op(), iovecs, offset + done, rwf)?;
                done += bytes;
            }
            Ok(())
        })
    }

    /// Moves all of `iovecs`, at `offset`.
    fn transfer(
        &self,
        op: BioOp,
        iovecs: &mut [libc::iovec],
        mut offset: u64,
        rwf: i32,
    ) -> BlkResult<()> {
        let mut first = 0;
        while first < iovecs.len() {
            let (ptr, len) = (iovecs[first..].as_ptr(), iovecs.len() - first);
            // At most IOV_MAX of them, and offsets stay below the file's size.
            let (count, at) = (len as i32, offset as i64);
            let moved = retry(|| {
                if op == BioOp::Read {
                    // SAFETY: the iovecs describe memory that the bio keeps alive and
                    // that the I/O rule gives to this read alone.
                    unsafe { libc::preadv2(self.fd(), ptr, count, at, rwf) }
                } else {
                    // SAFETY: as above, or of a slice that is borrowed until this returns; nobody
                    // changes the memory of a write.
                    unsafe { libc::pwritev2(self.fd(), ptr, count, at, rwf) }
                }
            })?;
            if moved == 0 {
                log::error!("{op:?} at byte {offset} moved nothing: the file has shrunk");
                return Err(BlkStatus::IoErr);
            }
            offset += moved as u64;
            first += advance(&mut iovecs[first..], moved);
        }
        Ok(())
    }

    /// Gives the range's storage back; the contents are unknown afterwards.
    fn discard(&self, offset: u64, bytes: u64) -> BlkResult<()> {
        // WHY-RELAXED: a hint; the worst is one more refused call.
        if bytes == 0 {
            return Ok(());
        }
        if self.no_discard.load(Ordering::Relaxed) {
            return Err(BlkStatus::NotSupp);
        }
        let result = match self.kind {
            Kind::Image => self.fallocate(
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                bytes,
            ),
            Kind::Block => self.range_ioctl(BLKDISCARD, offset, bytes),
        };
        if result == Err(BlkStatus::NotSupp) {
            // WHY-RELAXED: as above.
            self.no_discard.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Makes the range read as zeroes, by writing them where there is no better way.
    fn write_zeroes(&self, offset: u64, bytes: u64) -> BlkResult<()> {
        if bytes == 0 {
            return Ok(());
        }
        // WHY-RELAXED: a hint; the worst is one more refused call.
        if !self.no_zero_range.load(Ordering::Relaxed) {
            let result = match self.kind {
                Kind::Image => self.fallocate(
                    libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
                    offset,
                    bytes,
                ),
                Kind::Block => self.range_ioctl(BLKZEROOUT, offset, bytes),
            };
            if result != Err(BlkStatus::NotSupp) {
                return result;
            }
            // WHY-RELAXED: as above.
            self.no_zero_range.store(true, Ordering::Relaxed);
        }
        let zeroes: Arc<AlignedBuf> =
            Arc::new(AlignedBuf::new(ZEROES_BYTES.min(bytes).try_into().unwrap_or(0)));
        let mut done = 0;
        while done < bytes {
            // Both are at most ZEROES_BYTES.
            let len = (bytes - done).min(ZEROES_BYTES) as u32;
            let mut iovecs = [iovec_of(&BioVec::part(zeroes.clone(), 0, len))];
            self.transfer(BioOp::Write, &mut iovecs, offset + done, 0)?;
            done += u64::from(len);
        }
        Ok(())
    }

    /// Whether the range begins or ends in a hole of an image file, or in an extent that was
    /// reserved and never written. To look for a hole in between may take long.
    pub(super) fn is_sparse(&self, offset: u64, bytes: u64) -> bool {
        let is_hole = |at: u64| match lseek64(&self.file, at as i64, Whence::SeekData) {
            Ok(data) => data as u64 > at,
            // There is no data any more.
            Err(error) => error == Errno::ENXIO,
        };
        let last = offset.saturating_add(bytes.saturating_sub(1));
        self.kind == Kind::Image && (is_hole(offset) || is_hole(last))
    }

    fn fallocate(&self, mode: i32, offset: u64, bytes: u64) -> BlkResult<()> {
        let (offset, bytes) = (offset as i64, bytes as i64);
        // SAFETY: the descriptor is open as long as self lives.
        retry(|| unsafe { libc::fallocate(self.fd(), mode, offset, bytes) as isize }).map(drop)
    }

    fn range_ioctl(&self, request: libc::Ioctl, offset: u64, bytes: u64) -> BlkResult<()> {
        let range = [offset, bytes];
        // SAFETY: the request reads two u64 from the pointer, which outlives the call.
        retry(|| unsafe { libc::ioctl(self.fd(), request, range.as_ptr()) as isize }).map(drop)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Closing isn't enough: a child that another thread is just starting has a
        // copy of the descriptor for a moment, and the lock would live in it.
        // SAFETY: the descriptor is open until the file's own drop.
        unsafe { libc::flock(self.fd(), libc::LOCK_UN) };
    }
}

/// `_IO(0x12, 119)`, not in libc.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// `_IO(0x12, 127)`, not in libc.
const BLKZEROOUT: libc::Ioctl = 0x127f;

/// The kernel's view of a bvec.
fn iovec_of(vec: &BioVec) -> libc::iovec {
    libc::iovec { iov_base: vec.as_ptr().cast(), iov_len: vec.len as usize }
}

/// The kernel's view of bvecs, appended; memory that lies side by side is one piece.
pub(super) fn gather(iovecs: &mut Vec<libc::iovec>, vecs: &[BioVec]) {
    for vec in vecs {
        let iovec = iovec_of(vec);
        match iovecs.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == iovec.iov_base => {
                last.iov_len += iovec.iov_len;
            }
            _ => iovecs.push(iovec),
        }
    }
}

/// Takes `moved` bytes off the front; returns how many iovecs are finished.
pub(super) fn advance(iovecs: &mut [libc::iovec], mut moved: usize) -> usize {
    for (n, iovec) in iovecs.iter_mut().enumerate() {
        if moved < iovec.iov_len {
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(moved);
            iovec.iov_len -= moved;
            return n;
        }
        moved -= iovec.iov_len;
    }
    iovecs.len()
}

/// Repeats a system call that was interrupted; its result or the status of its errno.
fn retry(mut call: impl FnMut() -> isize) -> BlkResult<usize> {
    let mut again = 0;
    loop {
        let result = call();
        if let Ok(result) = usize::try_from(result) {
            return Ok(result);
        }
        match io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) {
            libc::EINTR => {}
            libc::EAGAIN if again < MAX_AGAIN => {
                again += 1;
                std::thread::yield_now();
            }
            errno => {
                log::warn!("I/O failed: {}", io::Error::from_raw_os_error(errno));
                return Err(BlkStatus::from_errno(errno));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Sector;

    fn target(direct: bool) -> Target {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(4096).expect("room for it");
        Target::new(file, Kind::Image, direct, QueueLimits::new(Sector(8)))
    }

    fn fua_write() -> Bio {
        let mut bio = Bio::new(BioOp::Write, BioFlags::FUA, Sector(0));
        bio.add_vec(BioVec::whole(Arc::new(AlignedBuf::new(512))));
        bio
    }

    /// The kernel reports a page it could not write once, and then calls it clean:
    /// the second fsync succeeds over lost data.
    #[test]
    fn a_flush_lost_in_the_page_cache_stays_lost() {
        let target = target(false);
        assert_eq!(target.run(&Bio::flush()), Ok(()));

        assert_eq!(target.note_flush(Err(BlkStatus::NoSpc)), Err(BlkStatus::NoSpc));

        assert_eq!(target.run(&Bio::flush()), Err(BlkStatus::IoErr));
        assert_eq!(target.run(&fua_write()), Err(BlkStatus::IoErr));
    }

    #[test]
    fn a_flush_that_failed_past_the_page_cache_may_be_tried_again() {
        let target = target(true);
        assert_eq!(target.note_flush(Err(BlkStatus::IoErr)), Err(BlkStatus::IoErr));
        assert_eq!(target.run(&Bio::flush()), Ok(()));
        assert_eq!(target.run(&fua_write()), Ok(()));
    }

    #[test]
    fn advance_stops_inside_an_iovec() {
        let mut data = [0u8; 30];
        let base = data.as_mut_ptr();
        let part = |at: usize| libc::iovec { iov_base: base.wrapping_add(at).cast(), iov_len: 10 };
        let mut iovecs = [part(0), part(10), part(20)];

        assert_eq!(advance(&mut iovecs, 13), 1);
        assert_eq!((iovecs[1].iov_base.addr(), iovecs[1].iov_len), (base.addr() + 13, 7));
        assert_eq!(advance(&mut iovecs[1..], 7), 1);
        assert_eq!(advance(&mut iovecs[2..], 10), 1);
    }

    #[test]
    fn memory_side_by_side_is_one_piece_and_keeps_its_order() {
        let buf: Arc<AlignedBuf> = Arc::new(AlignedBuf::new(8192));
        let part = |offset, len| BioVec::part(buf.clone(), offset, len);
        let vecs = [part(0, 512), part(512, 1024), part(4096, 512), part(3584, 512), part(4096, 8)];
        let mut iovecs = Vec::new();
        gather(&mut iovecs, &vecs);
        let start = buf.as_ptr().addr();
        let pieces = iovecs.iter().map(|iovec| (iovec.iov_base.addr() - start, iovec.iov_len));
        assert_eq!(pieces.collect::<Vec<_>>(), [(0, 1536), (4096, 512), (3584, 520)]);
    }
}
