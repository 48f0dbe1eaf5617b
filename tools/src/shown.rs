//! Showing in `/proc/mounts` that an error has made a mount read-only.
//!
//! The kernel's superblock of the mount is its own; remounting it tells everybody, and
//! refuses writes before they reach the daemon. It is refused while a file is open for
//! writing, so it is tried again for a while, and needs a privilege, without which the
//! mount stays as it looks. Either way the filesystem itself refuses every change.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::MsFlags;

use crate::remount::current_flags;

/// How often, and how many times, it is tried while files are open for writing.
const RETRY: Duration = Duration::from_millis(500);
const ATTEMPTS: u32 = 120;

/// Begins to remount, in a thread of its own: the caller may hold locks that the kernel's
/// questions to the daemon need.
pub(crate) fn show_read_only(dir: PathBuf) {
    let remount = move || {
        for _ in 0..ATTEMPTS {
            match try_remount(&dir) {
                Ok(()) => return,
                Err(Errno::EBUSY) => std::thread::sleep(RETRY),
                Err(errno) => {
                    log::info!("{}: not shown as read-only: {errno}", dir.display());
                    return;
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("remount".into()).spawn(remount) {
        log::info!("the mount is not shown as read-only: {error}");
    }
}

fn try_remount(dir: &Path) -> Result<(), Errno> {
    let flags = current_flags(dir)? | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    nix::mount::mount(None::<&str>, dir, None::<&str>, flags, None::<&str>)
}
