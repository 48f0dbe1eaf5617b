//! A device that is mounted already, at a second place.
//!
//! The kernel's own filesystems let a device be mounted more than once, and all mounts are of
//! the same filesystem. FUSE does not, so the second mount is a clone of the first.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use uext_fuse::mount_table;

use crate::mount_options::MountRequest;

/// Mounts the filesystem on `source` at `dir` too when uext has it mounted; `None` when it
/// has not.
pub(crate) fn mount_again(
    source: &Path,
    dir: &Path,
    request: &MountRequest,
) -> Option<Result<(), String>> {
    let is_device = std::fs::metadata(source).ok()?.file_type().is_block_device();
    if !is_device || !nix::unistd::geteuid().is_root() {
        return None;
    }
    let mut mounts = mount_table::mounts().ok()?;
    mounts.retain(|mount| {
        mount.fstype == "fuseblk.uext"
            && mount.root == Path::new("/")
            && Path::new(&mount.source).canonicalize().is_ok_and(|path| path == source)
    });
    let first = mounts.first()?;
    if first.read_only != request.ext4.read_only {
        let how = if first.read_only { "read-only" } else { "read-write" };
        let (source, at) = (source.display(), first.mount_point.display());
        return Some(Err(format!("{source}: mounted {how} on {at} already")));
    }
    let again = |mount| uext_fuse::mount_again(mount, dir, request.fuse.attributes);
    let mut mounted = again(first);
    // Some may be marked unbindable, or covered, where another mount of the filesystem is not.
    for mount in &mounts[1..] {
        if mounted.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::InvalidInput) {
            mounted = again(mount);
        }
    }
    Some(mounted.map_err(|error| format!("{}: {error}", dir.display())))
}
