//! The edge where errors become errno.
//!
//! A filesystem keeps its own error type and converts it here, at its
//! [`FileSystem`](crate::FileSystem) implementation, after logging what a
//! number cannot say.

use std::fmt;

/// The result of every [`FileSystem`](crate::FileSystem) method.
pub type Result<T> = std::result::Result<T, Errno>;

/// A Linux errno, positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident)*) => {
        impl Errno {
            $(#[doc = concat!("`", stringify!($name), "`")] pub const $name: Self = Self(libc::$name);)*

            /// Its name, such as `ENOENT`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                    _ => "errno",
                }
            }
        }
    };
}

errnos! {
    EPERM ENOENT EINTR EIO ENXIO E2BIG EBADF EAGAIN ENOMEM EACCES EFAULT EBUSY EEXIST EXDEV ENODEV
    ENOTDIR EISDIR EINVAL EMFILE ENOTTY EFBIG ENOSPC EROFS EMLINK ERANGE ENAMETOOLONG ENOSYS
    ENOTEMPTY ELOOP ENODATA EOVERFLOW EOPNOTSUPP ESTALE EUCLEAN EBADMSG EDQUOT
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name(), self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::error::Error for Errno {}
