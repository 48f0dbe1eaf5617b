//! What a program tells the filesystem behind a mount, by ioctls on its root.

use std::fs::File;
use std::io;

use uext_vfs::{IOC_REFUSAL, IOC_REMOUNT, RemountFlags};

use crate::sys;

/// Says what the mount is, or will be; `root` is the mount's root directory. With `READ_ONLY`
/// the image is clean when it returns.
///
/// # Errors
/// The filesystem's own: it may refuse to be written.
pub fn remount(root: &File, flags: RemountFlags) -> io::Result<()> {
    sys::send_word(root, IOC_REMOUNT, flags.bits())
}

/// Why the last remount was refused, in one line; `None` where that is not known.
pub fn refusal(root: &File) -> Option<String> {
    sys::receive_text(root, IOC_REFUSAL).ok().filter(|text| !text.is_empty())
}
