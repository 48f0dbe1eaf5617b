//! What can go wrong with a journal.

use std::fmt;

use thiserror::Error;
use uext_blockdev::BlkStatus;
use uext_ondisk::Corrupt;

use crate::tid::Tid;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, JournalError>;

/// What was being done to a device when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoWhat {
    /// A block of the journal was read; the number counts within the journal.
    ReadLog,
    /// A block of the journal was written; the number counts within the journal.
    WriteLog,
    /// A block of the filesystem was read.
    ReadFs,
    /// A block of the filesystem was written.
    WriteFs,
    /// A device was flushed.
    Flush,
}

impl fmt::Display for IoWhat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadLog => "reading journal block",
            Self::WriteLog => "writing journal block",
            Self::ReadFs => "reading filesystem block",
            Self::WriteFs => "writing filesystem block",
            Self::Flush => "flushing the device, block",
        })
    }
}

/// Why a journal cannot do what was asked. Cloned into every later refusal once it aborted one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum JournalError {
    /// The device failed.
    #[error("{what} {block}: {status}")]
    Io {
        /// What was done.
        what: IoWhat,
        /// Where; 0 for a flush.
        block: u64,
        /// How it failed.
        status: BlkStatus,
    },
    /// The journal's bytes make no sense.
    #[error("{0}")]
    Corrupt(#[from] Corrupt),
    /// A committed transaction cannot be replayed whole: its commit block is damaged.
    #[error("journal transaction {0} is damaged")]
    DamagedTransaction(Tid),
    /// The journal uses something this program cannot do; what, and what to do about it.
    #[error("{0}")]
    Unsupported(String),
    /// The journal was aborted before; nothing is written any more.
    #[error("the journal was aborted: {0}")]
    Aborted(Box<JournalError>),
    /// The filesystem was shut down on request. Not an error of the image: it is not noted.
    #[error("shut down on request")]
    Shutdown,
    /// An abort asked for by the filesystem, with the errno it gave.
    #[error("aborted by the filesystem (errno {0})")]
    Filesystem(i32),
    /// A handle asks for more than a transaction may hold.
    #[error("{asked} credits asked for, a transaction of this journal holds {most}")]
    TooManyCredits {
        /// Blocks asked for.
        asked: u32,
        /// Most blocks of a transaction.
        most: u32,
    },
    /// The handle changed more blocks than it has credits for.
    #[error("the handle has no credits left (block {block})")]
    NoCredits {
        /// The block that was to be changed.
        block: u64,
    },
    /// The journal was closed.
    #[error("the journal is closed")]
    Closed,
}

impl JournalError {
    pub(crate) fn io(what: IoWhat, block: u64, status: BlkStatus) -> Self {
        Self::Io { what, block, status }
    }

    /// The error later calls get once this one aborted the journal.
    pub(crate) fn as_aborted(&self) -> Self {
        match self {
            Self::Aborted(_) => self.clone(),
            other => Self::Aborted(Box::new(other.clone())),
        }
    }

    /// The errno `s_errno` keeps for it, positive.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { status, .. } => status.errno(),
            Self::Corrupt(corrupt) if corrupt.kind == uext_ondisk::error::CorruptKind::Checksum => {
                74 // EBADMSG
            }
            Self::Corrupt(_) | Self::DamagedTransaction(_) => 117, // EUCLEAN
            Self::Unsupported(_) => 95,                            // EOPNOTSUPP
            Self::Shutdown => 5,                                   // EIO
            Self::Aborted(_) | Self::Closed => 30,                 // EROFS
            Self::Filesystem(errno) => *errno,
            Self::TooManyCredits { .. } | Self::NoCredits { .. } => 28, // ENOSPC
        }
    }
}
