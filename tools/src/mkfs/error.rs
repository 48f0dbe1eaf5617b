//! Why a filesystem was not made. Every message is one line.

use std::path::PathBuf;

use thiserror::Error;
use uext_blockdev::BlkStatus;
use uext_blockdev::file::OpenError;
use uext_ondisk::Corrupt;

/// Why a filesystem was not made.
#[derive(Debug, Error)]
pub enum MkfsError {
    /// An option or a combination of options makes no sense.
    #[error("{0}")]
    Usage(String),
    /// An option mke2fs knows and this program does not.
    #[error("{0} is not supported by uext mkfs")]
    Unsupported(String),
    /// The target is in use or holds something; the message says what to do.
    #[error("{0}")]
    Refused(String),
    /// The filesystem has no room for its own metadata.
    #[error("too small for a filesystem: {0}")]
    TooSmall(String),
    /// The device could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A file could not be made or measured.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The device failed.
    #[error("{what}: {status}")]
    Device {
        /// What was being done.
        what: &'static str,
        /// How the bio failed.
        status: BlkStatus,
    },
    /// The plan is no valid filesystem: a defect of this program, found before writing.
    #[error("refusing to write an invalid filesystem: {0}")]
    Invalid(#[from] Corrupt),
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, MkfsError>;

/// A usage error.
pub(super) fn usage(message: impl Into<String>) -> MkfsError {
    MkfsError::Usage(message.into())
}
