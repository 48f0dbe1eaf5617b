//! What a program tells the filesystem behind a mount, by ioctls on its root.

use std::fs::File;
use std::io;

use uext_vfs::IOC_REMOUNT;

use crate::sys;

/// Says that the mount is, or will be, read-only or not; `root` is the mount's root
/// directory. With `read_only` the image is clean when it returns.
///
/// # Errors
/// The filesystem's own: it may refuse to be written.
pub fn remount(root: &File, read_only: bool) -> io::Result<()> {
    sys::send_word(root, IOC_REMOUNT, u32::from(read_only))
}
