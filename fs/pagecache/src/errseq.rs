//! Write errors that every open file learns of once (`errseq_t`).
//!
//! A writeback error belongs to nobody in particular: it is recorded here, and each
//! open file keeps a mark of the last error it has reported. An error nobody has
//! seen yet is reported to the next one who samples, even when it opened later.

use uext_sync::atomic::{AtomicU32, AtomicU64, Ordering};

use thiserror::Error;
use uext_blockdev::BlkStatus;

/// Why writeback failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[repr(u8)]
pub enum WritebackError {
    /// The device failed.
    #[error("input/output error")]
    Io = 1,
    /// No space, behind the device or (after a failed reservation) in the filesystem.
    #[error("no space left")]
    NoSpace = 2,
    /// The filesystem or the device became read-only, a journal abort for example.
    #[error("read-only")]
    ReadOnly = 3,
    /// The filesystem's metadata is corrupt.
    #[error("filesystem is corrupt")]
    Corrupt = 4,
    /// The quota is exhausted.
    #[error("quota exceeded")]
    Quota = 5,
}

impl WritebackError {
    /// The errno a system call reports for it.
    pub fn errno(self) -> i32 {
        match self {
            Self::Io => libc::EIO,
            Self::NoSpace => libc::ENOSPC,
            Self::ReadOnly => libc::EROFS,
            Self::Corrupt => libc::EUCLEAN,
            Self::Quota => libc::EDQUOT,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => None,
            2 => Some(Self::NoSpace),
            3 => Some(Self::ReadOnly),
            4 => Some(Self::Corrupt),
            5 => Some(Self::Quota),
            _ => Some(Self::Io),
        }
    }
}

impl From<BlkStatus> for WritebackError {
    fn from(status: BlkStatus) -> Self {
        match status {
            BlkStatus::NoSpc => Self::NoSpace,
            BlkStatus::ReadOnly => Self::ReadOnly,
            BlkStatus::IoErr | BlkStatus::NotSupp | BlkStatus::Invalid | BlkStatus::Gone => {
                Self::Io
            }
        }
    }
}

/// Low bits: the error's code.
const CODE: u32 = 0xff;
/// Somebody has sampled this value.
const SEEN: u32 = 0x100;
/// One more error, when the last one was seen.
const STEP: u32 = 0x200;

/// The last error and how many there were.
#[derive(Debug, Default)]
pub struct ErrSeq {
    /// PAIRS-WITH: itself: a reporter's acquire sees what came before the release of `set`,
    /// such as the page that is dirty again.
    word: AtomicU32,
    /// All errors: the word counts an error only after the last one was seen.
    ///
    /// PAIRS-WITH: `word`, in `set` and `since_count`:
    /// ```text
    /// CPU 0: set                     CPU 1: since_count
    /// word = error                   n = load-acquire(count)
    /// add-release(count, 1)          if n changed: load(word)
    /// ```
    /// Forbidden: CPU 1 sees the new count and no error in the word. Checked by
    /// `loom_errseq_who_sees_the_count_sees_the_error`.
    count: AtomicU64,
}

/// What an open file has seen of an [`ErrSeq`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrSeqMark(u32);

impl ErrSeq {
    /// Records an error.
    pub fn set(&self, error: WritebackError) {
        // The closure always gives a value.
        let _ = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
            let count = old & !(CODE | SEEN);
            let count = if old & SEEN == 0 { count } else { count.wrapping_add(STEP) };
            Some(count | error as u32)
        });
        self.count.fetch_add(1, Ordering::Release);
    }

    /// A mark for a new open file: it will be told of errors nobody has seen yet.
    pub fn sample(&self) -> ErrSeqMark {
        let now = self.word.load(Ordering::Acquire);
        ErrSeqMark(if now & SEEN == 0 { 0 } else { now })
    }

    /// How many errors there were.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// The last error, when there were more than `count`.
    pub(crate) fn since_count(&self, count: u64) -> Result<(), WritebackError> {
        if self.count() == count {
            return Ok(());
        }
        let code = self.word.load(Ordering::Acquire) & CODE;
        WritebackError::from_code(code).map_or(Ok(()), Err)
    }

    /// The error since `since`, without reporting it.
    ///
    /// # Errors
    /// The last error, when there was one since the mark.
    pub fn check(&self, since: ErrSeqMark) -> Result<(), WritebackError> {
        let now = self.word.load(Ordering::Acquire);
        if now | SEEN == since.0 | SEEN {
            return Ok(());
        }
        WritebackError::from_code(now & CODE).map_or(Ok(()), Err)
    }

    /// Reports the error since `since` once: the mark moves to now.
    ///
    /// # Errors
    /// The last error, when there was one since the mark.
    pub fn check_and_advance(&self, since: &mut ErrSeqMark) -> Result<(), WritebackError> {
        if self.word.load(Ordering::Acquire) == since.0 {
            return Ok(());
        }
        let now = self.word.fetch_or(SEEN, Ordering::AcqRel) | SEEN;
        let known = since.0 | SEEN == now;
        *since = ErrSeqMark(now);
        if known {
            return Ok(());
        }
        WritebackError::from_code(now & CODE).map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_open_file_is_told_once() {
        let seq = ErrSeq::default();
        let mut a = seq.sample();
        let mut b = seq.sample();
        assert_eq!(seq.check_and_advance(&mut a), Ok(()));

        seq.set(WritebackError::NoSpace);

        assert_eq!(seq.check_and_advance(&mut a), Err(WritebackError::NoSpace));
        assert_eq!(seq.check_and_advance(&mut a), Ok(()));
        assert_eq!(seq.check_and_advance(&mut b), Err(WritebackError::NoSpace));
        assert_eq!(seq.check_and_advance(&mut b), Ok(()));
    }

    #[test]
    fn an_unseen_error_is_told_to_who_opens_later_and_a_seen_one_is_not() {
        let seq = ErrSeq::default();
        seq.set(WritebackError::Io);
        let mut late = seq.sample();
        assert_eq!(seq.check_and_advance(&mut late), Err(WritebackError::Io));
        let mut later = seq.sample();
        assert_eq!(seq.check_and_advance(&mut later), Ok(()));
    }

    #[test]
    fn an_error_after_one_nobody_has_seen_is_counted() {
        let seq = ErrSeq::default();
        seq.set(WritebackError::Io);
        let before = seq.count();
        assert_eq!(seq.since_count(before), Ok(()));
        seq.set(WritebackError::Io);
        assert_eq!(seq.since_count(before), Err(WritebackError::Io));
    }

    #[test]
    fn the_same_error_again_is_a_new_error() {
        let seq = ErrSeq::default();
        let mut mark = seq.sample();
        seq.set(WritebackError::Io);
        assert_eq!(seq.check_and_advance(&mut mark), Err(WritebackError::Io));
        seq.set(WritebackError::Io);
        assert_eq!(seq.check(mark), Err(WritebackError::Io));
        assert_eq!(seq.check_and_advance(&mut mark), Err(WritebackError::Io));
        assert_eq!(seq.check(mark), Ok(()));
    }
}
