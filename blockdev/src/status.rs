//! How a bio ended.

use thiserror::Error;

/// The result of a bio and of every helper that waits for one.
pub type BlkResult<T> = Result<T, BlkStatus>;

/// Why a bio failed (`blk_status_t`). Small and `Copy`: it is stored per folio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BlkStatus {
    /// The device failed (`EIO`, and every errno without a better place).
    #[error("input/output error")]
    IoErr,
    /// No space behind the device (`ENOSPC`): a sparse image on a full disk.
    #[error("no space left behind the device")]
    NoSpc,
    /// The operation is not supported by the device (`EOPNOTSUPP`).
    #[error("operation not supported by the device")]
    NotSupp,
    /// The sector range lies past the end of the device, or is misaligned.
    #[error("sector range outside the device or misaligned")]
    Invalid,
    /// The device is read-only.
    #[error("device is read-only")]
    ReadOnly,
    /// The device went away (`ENODEV`, `ESHUTDOWN`, a lost connection).
    #[error("device is gone")]
    Gone,
}

impl BlkStatus {
    /// From a Linux errno, positive.
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpc,
            libc::EOPNOTSUPP => Self::NotSupp,
            libc::EINVAL => Self::Invalid,
            libc::EROFS | libc::EBADF => Self::ReadOnly,
            libc::ENODEV | libc::ENXIO | libc::ESHUTDOWN => Self::Gone,
            _ => Self::IoErr,
        }
    }

    /// The errno a system call would give for it.
    pub fn errno(self) -> i32 {
        match self {
            Self::IoErr | Self::Invalid => libc::EIO,
            Self::NoSpc => libc::ENOSPC,
            Self::NotSupp => libc::EOPNOTSUPP,
            Self::ReadOnly => libc::EROFS,
            Self::Gone => libc::ENODEV,
        }
    }
}
