//! What goes wrong inside the filesystem, and the errno it becomes at the edge.

use thiserror::Error;
use uext_blockdev::BlkStatus;
use uext_jbd2::JournalError;
use uext_ondisk::Corrupt;
use uext_ondisk::error::CorruptKind;
use uext_vfs::Errno;

/// The result of everything in this crate below the `FileSystem` trait.
pub type Result<T> = std::result::Result<T, Error>;

/// An error with its cause.
#[derive(Debug, Error)]
pub enum Error {
    /// The image is damaged: logged with its place, shown as `EUCLEAN` or `EBADMSG`.
    #[error("{0}")]
    Corrupt(#[from] Corrupt),
    /// The device failed.
    #[error("{0}")]
    Blk(#[from] BlkStatus),
    /// The journal failed or was aborted: `EROFS`.
    #[error("{0}")]
    Journal(#[from] JournalError),
    /// An ordinary refusal.
    #[error("{0}")]
    Errno(Errno),
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl Error {
    /// The errno a system call shows.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Corrupt(c) if c.kind == CorruptKind::Checksum => Errno::EBADMSG,
            Self::Corrupt(_) => Errno::EUCLEAN,
            Self::Blk(status) => Errno(status.errno()),
            Self::Journal(JournalError::Shutdown) => Errno::EIO,
            Self::Journal(JournalError::Aborted(why)) if **why == JournalError::Shutdown => {
                Errno::EIO
            }
            Self::Journal(_) => Errno::EROFS,
            Self::Errno(errno) => *errno,
        }
    }

    /// Whether it is this errno.
    pub fn is(&self, errno: Errno) -> bool {
        self.errno() == errno
    }
}
