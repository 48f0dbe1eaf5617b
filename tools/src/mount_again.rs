//! A device that is mounted already, at a second place.
//!
//! The kernel's own filesystems let a device be mounted more than once, and all mounts are of
//! the same filesystem. FUSE does not, so the second mount is a bind mount of the first.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use uext_fuse::{MountAttr, mount_table};

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
    let first = mount_table::mounts().ok()?.into_iter().find(|mount| {
        mount.fstype == "fuseblk.uext"
            && mount.root == Path::new("/")
            && Path::new(&mount.source).canonicalize().is_ok_and(|path| path == source)
    })?;
    if first.read_only != request.ext4.read_only {
        let how = if first.read_only { "read-only" } else { "read-write" };
        let (source, at) = (source.display(), first.mount_point.display());
        return Some(Err(format!("{source}: mounted {how} on {at} already")));
    }
    Some(bind(&first.mount_point, dir, request).map_err(|e| format!("{}: {e}", dir.display())))
}

fn bind(from: &Path, dir: &Path, request: &MountRequest) -> nix::Result<()> {
    let none: Option<&str> = None;
    mount(Some(from), dir, none, MsFlags::MS_BIND, none)?;
    // A bind mount begins with the flags of the first.
    let mut flags = MsFlags::empty();
    for (attribute, flag) in [
        (MountAttr::NODEV, MsFlags::MS_NODEV),
        (MountAttr::NOSUID, MsFlags::MS_NOSUID),
        (MountAttr::NOEXEC, MsFlags::MS_NOEXEC),
        (MountAttr::NOATIME, MsFlags::MS_NOATIME),
        (MountAttr::NODIRATIME, MsFlags::MS_NODIRATIME),
    ] {
        flags.set(flag, request.fuse.attributes.contains(attribute));
    }
    if !flags.is_empty() {
        mount(none, dir, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags, none)?;
    }
    Ok(())
}
