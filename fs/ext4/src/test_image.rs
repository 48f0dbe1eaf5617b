//! Fresh images in memory, for the tests inside the crate.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::sync::Arc;

use uext_blockdev::MemoryDevice;

/// An image of so many MiB, as `mke2fs` makes it with these arguments.
pub(crate) fn mke2fs(mib: u64, args: &[&str]) -> Arc<MemoryDevice> {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(mib << 20).unwrap();
    let made = Command::new("mke2fs").args(["-q", "-F"]).args(args).arg(file.path()).status();
    assert!(made.unwrap().success(), "mke2fs {args:?}");
    MemoryDevice::from_vec(std::fs::read(file.path()).unwrap())
}
