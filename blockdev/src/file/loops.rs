//! Whether an image is mounted through a loop device, which no lock on the file tells.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Whether somebody has mounted (or otherwise claimed) a loop device over the image; for a
/// reader, one that can write.
///
/// A mount by uext does not count: that one holds a lock on the image for as long as its
/// daemon lives, and a mount whose daemon was killed must not keep the image from being
/// mounted again.
pub(super) fn in_use(image: &Metadata, read_only: bool) -> bool {
    let Ok(entries) = fs::read_dir("/sys/block") else { return false };
    entries.filter_map(Result::ok).any(|entry| {
        let sys = entry.path();
        backs(&sys, image) && !(read_only && is_read_only(&sys)) && is_claimed(&sys)
    })
}

/// Whether this is a loop device over the image, by whatever name.
fn backs(sys: &Path, image: &Metadata) -> bool {
    let Ok(text) = fs::read_to_string(sys.join("loop/backing_file")) else { return false };
    fs::metadata(text.trim_end_matches('\n'))
        .is_ok_and(|meta| (meta.dev(), meta.ino()) == (image.dev(), image.ino()))
}

fn is_read_only(sys: &Path) -> bool {
    fs::read_to_string(sys.join("ro")).is_ok_and(|text| text.trim() == "1")
}

fn is_claimed(sys: &Path) -> bool {
    if let Some(fstype) = mounted_as(sys) {
        return !fstype.starts_with("fuseblk.uext");
    }
    // Not in our mount namespace, perhaps in another, or below a device mapper.
    let node = Path::new("/dev").join(sys.file_name().unwrap_or_default());
    File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(node)
        .is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// The type of the filesystem that is mounted from the device.
fn mounted_as(sys: &Path) -> Option<String> {
    let number = fs::read_to_string(sys.join("dev")).ok()?;
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = table.lines().find(|line| line.split(' ').nth(2) == Some(number.trim()))?;
    let (_, after) = line.split_once(" - ")?;
    after.split(' ').next().map(str::to_owned)
}
