//! Finding the superblock, also when the primary one cannot be read.
//!
//! The disk may have written one sector of the primary superblock and not the
//! other. Its fields are then all good, see [`Superblock::parse_torn`]; a backup
//! that agrees shows it, or without backups the group descriptors, whose checksums
//! depend on what the superblock says. Anything else wrong with it is damage, and
//! refused with the place of a backup that could be used.
//!
//! Invariants: nothing is written here but by [`mend`], and that only to a device
//! that may be written; at most a few backups of each block size are read.

use uext_blockdev::mutant;
use uext_blockdev::{BioFlags, BlockDevice};
use uext_jbd2::RecoveryReport;
use uext_ondisk::error::CorruptKind;
use uext_ondisk::features::{Compat, RoCompat};
use uext_ondisk::geometry::backup_places;
use uext_ondisk::group_desc::GroupDesc;
use uext_ondisk::superblock::{
    JournalDevice, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, State, Superblock,
};
use uext_ondisk::{Corrupt, GroupNumber};

use crate::error::{Error, Result};
use crate::gate::MountError;
use crate::options::MountOptions;

/// Backups tried of each block size.
const BACKUPS_PER_SIZE: usize = 6;

/// Where the superblock in use comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The primary superblock, whole.
    Primary,
    /// The primary superblock, torn.
    Torn,
    /// A backup: what changes while the filesystem is in use is not known.
    Backup,
}

/// A superblock and where it comes from.
#[derive(Debug)]
pub(crate) struct Found {
    pub sb: Superblock,
    pub origin: Origin,
}

/// Finds the superblock to mount by.
///
/// # Errors
/// A refusal that says what was found and where a backup lies.
pub(crate) fn find(
    dev: &dyn BlockDevice,
    options: &MountOptions,
) -> std::result::Result<Found, MountError> {
    let found = match options.sb_block {
        // The primary superblock lies at 1 KiB.
        Some(kib) if kib > 1 => from_backup(dev, kib, options.read_only)?,
        _ => from_primary(dev)?,
    };
    let need = found.sb.blocks_count().saturating_mul(u64::from(found.sb.block_size()));
    if need > dev.size() {
        return Err(MountError::Truncated { have: dev.size(), need });
    }
    Ok(found)
}

fn read(dev: &dyn BlockDevice, offset: u64) -> std::result::Result<Vec<u8>, MountError> {
    let need = offset.saturating_add(SUPERBLOCK_SIZE as u64);
    if need > dev.size() {
        return Err(MountError::Truncated { have: dev.size(), need });
    }
    dev.read_at(offset, SUPERBLOCK_SIZE).map_err(|status| Error::from(status).into())
}

/// Reads and checks the primary superblock.
pub(crate) fn read_primary(dev: &dyn BlockDevice) -> std::result::Result<Superblock, MountError> {
    Superblock::parse(&read(dev, SUPERBLOCK_OFFSET)?).map_err(|corrupt| refusal(dev, corrupt))
}

fn from_primary(dev: &dyn BlockDevice) -> std::result::Result<Found, MountError> {
    let bytes = read(dev, SUPERBLOCK_OFFSET)?;
    let corrupt = match Superblock::parse(&bytes) {
        Ok(sb) => return Ok(Found { sb, origin: Origin::Primary }),
        Err(corrupt) => corrupt,
    };
    if JournalDevice::parse(&bytes).is_ok() {
        return Err(MountError::Options(
            "this is an external journal, no filesystem: mount the filesystem that uses it, with \
             `-o journal_path=` and this device",
        ));
    }
    let torn = Superblock::parse_torn(&bytes).filter(|_| !mutant!("torn-superblock-refused"));
    match torn.filter(|torn| is_confirmed(dev, torn)) {
        Some(sb) => Ok(Found { sb, origin: Origin::Torn }),
        None => Err(refusal(dev, corrupt)),
    }
}

fn from_backup(
    dev: &dyn BlockDevice,
    kib: u64,
    read_only: bool,
) -> std::result::Result<Found, MountError> {
    let offset = kib.saturating_mul(1024);
    let mut sb = Superblock::parse(&read(dev, offset)?).map_err(|corrupt| match corrupt.kind {
        CorruptKind::Magic => MountError::NoSuperblock { corrupt, hint: String::new() },
        _ => MountError::BadSuperblock { corrupt, hint: String::new() },
    })?;
    let primary = read(dev, SUPERBLOCK_OFFSET)?;
    let (whole, torn) = (Superblock::parse(&primary).ok(), Superblock::parse_torn(&primary));
    if let Some(primary) = whole {
        match primary.differs_from(&sb) {
            None => return Ok(Found { sb: primary, origin: Origin::Primary }),
            Some(field) if !read_only => {
                return Err(MountError::ReadOnlyOnly(format!(
                    "the primary superblock is sound and not of the same filesystem ({field})"
                )));
            }
            Some(_) => {}
        }
    }
    if let Some(torn) = torn.filter(|torn| torn.differs_from(&sb).is_none()) {
        return Ok(Found { sb: torn, origin: Origin::Torn });
    }
    // Its list of orphans is long gone: a check must look for them.
    sb.set_last_orphan(None);
    sb.set_orphan_present(sb.orphan_file_inum().is_some());
    let state = sb.state() - State::VALID;
    sb.set_state(state);
    sb.raw_mut().s_block_group_nr = 0.into();
    Ok(Found { sb, origin: Origin::Backup })
}

/// Whether a backup or the group descriptors agree with a torn superblock.
fn is_confirmed(dev: &dyn BlockDevice, torn: &Superblock) -> bool {
    match backups(dev, Some(torn)).next() {
        Some((_, backup)) => torn.differs_from(&backup).is_none(),
        None => descriptors(dev, torn, |_| {}).is_ok(),
    }
}

/// Backups that can be read, each with its place in bytes: those where `like` puts them, then
/// those where they lie by default.
fn backups<'a>(
    dev: &'a dyn BlockDevice,
    like: Option<&'a Superblock>,
) -> impl Iterator<Item = (u64, Superblock)> + 'a {
    let placed = like.into_iter().flat_map(|sb| {
        let groups = sb.backup_groups().take(BACKUPS_PER_SIZE);
        groups.map(|group| (sb.group_first_block(group).0 << sb.block_size_bits(), group))
    });
    let default = backup_places(dev.size(), BACKUPS_PER_SIZE);
    let default = default.into_iter().map(|place| (place.byte_offset, place.group));
    placed.chain(default).filter_map(|(offset, group)| {
        let sb = Superblock::parse(&dev.read_at(offset, SUPERBLOCK_SIZE).ok()?).ok()?;
        // Not some file's contents: it must lie where it says it does.
        let placed = group.0 < sb.groups_count()
            && sb.group_first_block(group).0 << sb.block_size_bits() == offset;
        placed.then_some((offset, sb))
    })
}

/// Says what is wrong with the primary superblock and where a backup lies.
fn refusal(dev: &dyn BlockDevice, corrupt: Corrupt) -> MountError {
    let hint = backups(dev, None).next().map_or_else(String::new, |(offset, sb)| {
        let block = offset >> sb.block_size_bits();
        format!("; a backup is there: try `-o ro,sb={}` or `e2fsck -b {block}`", offset / 1024)
    });
    match corrupt.kind {
        CorruptKind::Magic => MountError::NoSuperblock { corrupt, hint },
        _ => MountError::BadSuperblock { corrupt, hint },
    }
}

/// Reads and checks every group descriptor.
fn descriptors(
    dev: &dyn BlockDevice,
    sb: &Superblock,
    mut look: impl FnMut(&GroupDesc<&[u8]>),
) -> Result<()> {
    let size = usize::from(sb.desc_size());
    for n in 0..sb.gdt_blocks() {
        let at = sb.descriptor_block(n).0 << sb.block_size_bits();
        let bytes = dev.read_at(at, sb.block_size() as usize)?;
        let first = n * sb.descs_per_block();
        let groups = (first..sb.groups_count()).zip(bytes.chunks_exact(size));
        for (group, bytes) in groups.take(sb.descs_per_block() as usize) {
            let desc = GroupDesc::new(bytes)?;
            desc.verify(sb.desc_checksum(), GroupNumber(group))?;
            desc.check(sb, GroupNumber(group))?;
            look(&desc);
        }
    }
    Ok(())
}

/// After a replay, or the lack of one: writes the primary superblock, mended and without the
/// mark of a journal that was replayed. Says what was wrong with it.
///
/// With `orphans_next` the mark stays while the superblock says `orphan_present`: who looks at it
/// after a cut in between must see a filesystem that was in use, whose orphan file may be empty.
///
/// # Errors
/// The device's, or what is damaged.
pub(crate) fn mend(
    dev: &dyn BlockDevice,
    found: &Found,
    report: Option<&RecoveryReport>,
    orphans_next: bool,
) -> std::result::Result<Option<&'static str>, MountError> {
    let replayed = Superblock::parse(&read(dev, SUPERBLOCK_OFFSET)?)
        .ok()
        .filter(|sb| found.origin == Origin::Primary || sb.differs_from(&found.sb).is_none());
    let (mut sb, mended) = match (replayed, found.origin) {
        (Some(sb), Origin::Primary) => (sb, None),
        (None, Origin::Primary) => (read_primary(dev)?, None),
        (Some(sb), _) => (sb, Some("the superblock was damaged; the journal had it whole")),
        (None, Origin::Torn) => {
            let sb = counted(dev, &found.sb)?;
            (sb, Some("the superblock was half written; it is whole again"))
        }
        (None, Origin::Backup) => {
            let sb = counted(dev, &found.sb)?;
            (sb, Some("the superblock comes from a backup: run e2fsck after this mount"))
        }
    };
    if let Some(report) = report {
        let present = sb.features().ro_compat.contains(RoCompat::ORPHAN_PRESENT);
        sb.set_needs_recovery(orphans_next && present);
        if report.errno != 0 {
            // The journal was aborted: the kernel's ext4 and fsck both keep this as an error.
            let state = sb.state() | State::ERROR;
            sb.set_state(state);
        }
    } else if !sb.features().compat.contains(Compat::HAS_JOURNAL) {
        sb.set_needs_recovery(false);
    }
    let flags = BioFlags::FUA | BioFlags::META;
    dev.write_at(SUPERBLOCK_OFFSET, sb.sealed_bytes(), flags).map_err(Error::from)?;
    Ok(mended)
}

/// A superblock with the counts of the group descriptors.
fn counted(dev: &dyn BlockDevice, sb: &Superblock) -> Result<Superblock> {
    let (mut blocks, mut inodes) = (0u64, 0u32);
    descriptors(dev, sb, |desc| {
        blocks = blocks.saturating_add(desc.free_blocks_count().into());
        inodes = inodes.saturating_add(desc.free_inodes_count());
    })?;
    let mut sb = sb.clone();
    sb.set_free_blocks_count(blocks << sb.cluster_ratio_bits());
    sb.set_free_inodes_count(inodes);
    Ok(sb)
}
