//! Which device the journal lies on, and where there: inside the filesystem, or an
//! external journal.
//!
//! An external journal is found by `journal_path=`, by its UUID below /dev/disk, or by
//! the device number in the superblock. Whichever it is, it must be a journal, with
//! the UUID that the filesystem names, and the filesystem must be its only user: a
//! journal of something else is never replayed or written.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uext_blockdev::BlockDevice;
use uext_blockdev::file::{FileDevice, OpenOptions};
use uext_jbd2::JournalMap;
use uext_ondisk::Corrupt;
use uext_ondisk::jbd2::RawJournalSuperblock;
use uext_ondisk::superblock::{JournalDevice, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};
use zerocopy::FromBytes;

use crate::error::{Error, Result};
use crate::gate::MountError;
use crate::journal_inode::journal_map;
use crate::options::MountOptions;

/// Where a journal lies.
pub(crate) struct JournalPlace {
    /// The device of an external one; `None` when it is the filesystem's.
    pub external: Option<Arc<dyn BlockDevice>>,
    pub map: JournalMap,
}

impl JournalPlace {
    /// Finds the journal of a filesystem that has one.
    ///
    /// # Errors
    /// `Options` when an external journal is not found or another's; what is damaged.
    pub fn find(
        dev: &dyn BlockDevice,
        sb: &Superblock,
        options: &MountOptions,
        read_only: bool,
    ) -> std::result::Result<Self, MountError> {
        if let Some(ino) = sb.journal_inum() {
            return Ok(Self { external: None, map: journal_map(dev, sb, ino)? });
        }
        let refused =
            |why: String| MountError::ExternalJournal { uuid: sb.journal_uuid().to_string(), why };
        let path = match &options.journal_path {
            Some(path) => path.clone(),
            None => usual_path(sb).ok_or_else(|| refused("is not there".into()))?,
        };
        let open = OpenOptions { read_only, ..OpenOptions::default() };
        let device = FileDevice::open(&path, open).map_err(|error| refused(error.to_string()))?;
        let map = check(device.as_ref(), sb)
            .map_err(|error| refused(format!("is not {}: {error}", path.display())))?;
        Ok(Self { external: Some(device), map })
    }
}

/// Where an external journal usually is.
fn usual_path(sb: &Superblock) -> Option<PathBuf> {
    let by_uuid = Path::new("/dev/disk/by-uuid").join(sb.journal_uuid().to_string());
    // As the kernel keeps device numbers in 32 bits.
    let number = sb.journal_dev();
    let (major, minor) = match number {
        0..=0xFFFF => (number >> 8, number & 0xFF),
        _ => ((number & 0xF_FF00) >> 8, (number & 0xFF) | (number >> 12 & 0xF_FF00)),
    };
    let by_number = (number != 0).then(|| PathBuf::from(format!("/dev/block/{major}:{minor}")));
    [Some(by_uuid), by_number].into_iter().flatten().find(|path| path.exists())
}

/// Checks that the device is the journal of this filesystem and of no other.
fn check(device: &dyn BlockDevice, sb: &Superblock) -> Result<JournalMap> {
    let bad = |text: String| Error::from(Corrupt::value("external journal", text));
    if device.size() < SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE as u64 {
        return Err(bad(format!("{} bytes", device.size())));
    }
    let own = JournalDevice::parse(&device.read_at(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE)?)?;
    if own.uuid != sb.journal_uuid() {
        return Err(bad(format!("its UUID is {}", own.uuid)));
    }
    if own.block_size != sb.block_size() {
        return Err(bad(format!("blocks of {} bytes", own.block_size)));
    }
    if u64::from(own.blocks_count) * u64::from(own.block_size) > device.size() {
        return Err(bad(format!("{} blocks in {} bytes", own.blocks_count, device.size())));
    }
    let map = JournalMap::external(own.superblock(), own.blocks_count)?;
    let at = u64::from(own.superblock()) * u64::from(own.block_size);
    let bytes = device.read_at(at, own.block_size as usize)?;
    let (journal, _) = RawJournalSuperblock::ref_from_prefix(&bytes)
        .map_err(|_| bad("its superblock is cut off".into()))?;
    let users = journal.s_nr_users.get();
    if users != 1 || journal.s_users.first() != Some(sb.uuid().as_bytes()) {
        return Err(bad(format!("{users} filesystems use it, and not only {}", sb.uuid())));
    }
    Ok(map)
}
