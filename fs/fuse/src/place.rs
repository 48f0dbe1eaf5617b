//! Where a mount was put, and whether it still is there.
//!
//! A place is taken again as soon as a mount has left it, by a mount of the same device even,
//! while the daemon of the first has not ended yet. So a device number tells nothing; the mount's
//! unique number does, which Linux has given since 6.8.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::mount_table;

/// `STATX_MNT_ID_UNIQUE` of `linux/stat.h`.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// An attached mount.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub dir: PathBuf,
    /// The filesystem's device number, major and minor.
    pub device: (u32, u32),
    /// The number that no other mount has or will have; `None` where the kernel gives none.
    unique: Option<u64>,
}

impl Place {
    /// Of a mount that will be attached at `dir`.
    pub fn new(dir: &Path, device: (u32, u32), mount: impl AsFd) -> Self {
        let unique = unique_id(mount, Path::new(""), AtFlags::EMPTY_PATH);
        Self { dir: dir.to_owned(), device, unique }
    }

    /// Whether the mount is there, and nothing over it.
    pub fn is_taken(&self) -> bool {
        match self.unique {
            Some(_) => unique_id(CWD, &self.dir, AtFlags::NO_AUTOMOUNT) == self.unique,
            None => {
                matches!(mount_table::mount_at(&self.dir), Ok(Some(mount)) if mount.device == self.device)
            }
        }
    }

    /// Takes a dead mount (its connection aborted) out of the way.
    pub fn detach(&self) {
        if self.is_taken()
            && let Err(errno) = umount2(&self.dir, MntFlags::MNT_DETACH)
        {
            log::warn!("{}: umount: {errno}", self.dir.display());
        }
    }
}

/// Asks the kernel alone: the mount's daemon may be the caller, or gone.
fn unique_id(at: impl AsFd, path: &Path, flags: AtFlags) -> Option<u64> {
    let found = statx(at, path, flags | AtFlags::STATX_DONT_SYNC, MNT_ID_UNIQUE).ok()?;
    let given = StatxFlags::from_bits_retain(found.stx_mask).contains(MNT_ID_UNIQUE);
    given.then_some(found.stx_mnt_id)
}
