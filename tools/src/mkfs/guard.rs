//! What keeps mkfs from destroying something: is the target in use, and what does it hold?

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use uext_blockdev::{BlkResult, BlockDevice};

/// A mark that other things leave at a fixed place.
struct Mark {
    name: &'static str,
    offset: u64,
    bytes: &'static [u8],
}

const MARKS: &[Mark] = &[
    Mark { name: "an ext2, ext3 or ext4 filesystem", offset: 1080, bytes: b"\x53\xEF" },
    Mark { name: "an XFS filesystem", offset: 0, bytes: b"XFSB" },
    Mark { name: "a Btrfs filesystem", offset: 0x1_0040, bytes: b"_BHRfS_M" },
    Mark { name: "an F2FS filesystem", offset: 1024, bytes: b"\x10\x20\xF5\xF2" },
    Mark {
        name: "a bcachefs filesystem",
        offset: 4120,
        bytes: b"\xc6\x85\x73\xf6\x66\xce\x90\xa9",
    },
    Mark { name: "a SquashFS filesystem", offset: 0, bytes: b"hsqs" },
    Mark { name: "an EROFS filesystem", offset: 1024, bytes: b"\xe2\xe1\xf5\xe0" },
    Mark { name: "an ISO 9660 filesystem", offset: 0x8001, bytes: b"CD001" },
    Mark { name: "an NTFS filesystem", offset: 3, bytes: b"NTFS    " },
    Mark { name: "an exFAT filesystem", offset: 3, bytes: b"EXFAT   " },
    Mark { name: "a FAT filesystem", offset: 54, bytes: b"FAT" },
    Mark { name: "a FAT filesystem", offset: 82, bytes: b"FAT32" },
    Mark { name: "an encrypted LUKS volume", offset: 0, bytes: b"LUKS\xba\xbe" },
    Mark { name: "an LVM physical volume", offset: 536, bytes: b"LVM2 001" },
    Mark { name: "a swap area", offset: 4086, bytes: b"SWAPSPACE2" },
    Mark { name: "a RAID member", offset: 4096, bytes: b"\xfc\x4e\x2b\xa9" },
    Mark { name: "a GPT partition table", offset: 512, bytes: b"EFI PART" },
    Mark { name: "a partition table or boot sector", offset: 510, bytes: b"\x55\xAA" },
];

/// What the device holds, `None` when nothing known.
///
/// # Errors
/// When it cannot be read.
pub fn contents(dev: &dyn BlockDevice) -> BlkResult<Option<&'static str>> {
    for mark in MARKS {
        if mark.offset + mark.bytes.len() as u64 > dev.size() {
            continue;
        }
        if dev.read_at(mark.offset, mark.bytes.len())? == mark.bytes {
            return Ok(Some(mark.name));
        }
    }
    Ok(None)
}

/// Why the target is in use, `None` when it is not as far as the kernel tells. The claim of an
/// exclusive open catches more for block devices; an image behind a loop device only this.
pub fn user_of(target: &Path) -> Option<String> {
    let meta = std::fs::metadata(target).ok()?;
    if meta.file_type().is_block_device() {
        return user_of_device(meta.rdev());
    }
    let path = std::fs::canonicalize(target).ok()?;
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps.lines().skip(1).any(|line| line.split(' ').next() == path.to_str()) {
        return Some("in use as swap".to_owned());
    }
    for entry in std::fs::read_dir("/sys/block").ok()?.flatten() {
        let backing = entry.path().join("loop/backing_file");
        let Ok(backing) = std::fs::read_to_string(backing) else { continue };
        let same = std::fs::metadata(backing.trim_end())
            .is_ok_and(|other| (other.dev(), other.ino()) == (meta.dev(), meta.ino()));
        if same {
            return Some(format!("in use by /dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    None
}

fn user_of_device(rdev: u64) -> Option<String> {
    let number = format!("{}:{}", libc::major(rdev), libc::minor(rdev));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(2);
        if fields.next() == Some(&number) {
            return Some(format!("mounted on {}", fields.nth(1).unwrap_or("?")));
        }
    }
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    let is_swap = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split(' ').next())
        .any(|path| std::fs::metadata(path).is_ok_and(|meta| meta.rdev() == rdev && rdev != 0));
    is_swap.then(|| "in use as swap".to_owned())
}
