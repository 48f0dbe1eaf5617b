//! Looking through the journal: what is checked is the filesystem as its replay would leave it,
//! without anything being written.
//!
//! A log that cannot be looked through is said to be so, and the disk is checked as it is. A log
//! that is damaged counts as an error, and shows what a repair would bring home of it.

use std::collections::HashSet;

use uext_blockdev::BlockDevice;
use uext_jbd2::recovery::ReplayView;
use uext_jbd2::{JournalLocation, JournalMap, JournalRun, Recovery};
use uext_ondisk::features::{Compat, Incompat, RoCompat};
use uext_ondisk::group_desc::GroupDesc;
use uext_ondisk::inode::{Inode, InodeRef};
use uext_ondisk::superblock::{
    JournalDevice, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, State, Superblock,
};
use uext_ondisk::{FsBlock, InodeNumber, orphan_file};

use super::context::Reporter;
use super::pass0;
use super::problem::{At, Code};
use super::walk::{Volume, collect_runs};

/// The device behind its journal; `None` when there is nothing in it, or it cannot be read.
pub fn look_through<'a>(
    dev: &'a dyn BlockDevice,
    external: Option<&'a dyn BlockDevice>,
    report: &mut Reporter<'_>,
) -> Option<ReplayView<'a>> {
    let primary = superblock(dev);
    let damage = primary.as_ref().err().cloned();
    let whole = damage.is_none();
    let sb = primary.ok().or_else(|| pass0::backups(dev).next().map(|(_, sb)| sb))?;
    let features = sb.features();
    let flagged = features.incompat.contains(Incompat::RECOVER);
    if !features.compat.contains(Compat::HAS_JOURNAL) || (whole && !flagged) {
        return None;
    }
    match view(dev, external, &sb, flagged, report) {
        Ok(view) => {
            // A log that has the superblock whole hides that a mount by others would fail.
            let mended = view.as_ref().is_some_and(|view| superblock(view).is_ok());
            if let Some(text) = damage.filter(|_| mended) {
                report.problem(Code::SuperInJournal, At::fs().text(text));
            }
            view
        }
        Err(text) => {
            report.problem(Code::JournalNotReplayed, At::fs().text(text));
            None
        }
    }
}

fn superblock(dev: &dyn BlockDevice) -> Result<Superblock, String> {
    let bytes = dev.read_at(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE).map_err(|e| e.to_string())?;
    Superblock::parse(&bytes).map_err(|error| error.to_string())
}

fn view<'a>(
    dev: &'a dyn BlockDevice,
    external: Option<&'a dyn BlockDevice>,
    sb: &Superblock,
    flagged: bool,
    report: &mut Reporter<'_>,
) -> Result<Option<ReplayView<'a>>, String> {
    let inum = sb.raw().s_journal_inum.get();
    let (journal, map) = match external {
        _ if inum != 0 => (dev, own_map(dev, sb, inum)?),
        Some(journal) => (journal, external_map(journal, sb)?),
        None => return Err("it is on another device: name that with -j".into()),
    };
    let location = JournalLocation { device: journal, map: &map, block_size: sb.block_size() };
    let recovery = Recovery::open(location, dev).map_err(|error| error.to_string())?;
    if !flagged && !recovery.needs_recovery() {
        return Ok(None);
    }
    let plan = recovery.plan().map_err(|error| error.to_string())?;
    if let Some(damage) = plan.damage() {
        report.problem(Code::JournalDamaged, At::fs().text(damage.to_string()));
    }
    let found = plan.report();
    if found.was_dirty {
        report.say(&format!(
            "The journal holds {} transactions and {} fast commits; this is the filesystem as \
             their replay would leave it.",
            found.transactions, found.fast_commits
        ));
    }
    let mut view = plan.view_of(dev, journal);
    mark_recovered(&mut view, sb.block_size(), found.errno)?;
    Ok(Some(view))
}

/// The superblock as a mount would rewrite it after the replay.
fn mark_recovered(view: &mut ReplayView<'_>, block_size: u32, errno: i32) -> Result<(), String> {
    let size = u64::from(block_size);
    let home = SUPERBLOCK_OFFSET / size;
    let device: &dyn BlockDevice = view;
    let mut block = device.read_at(home * size, block_size as usize).map_err(|e| e.to_string())?;
    // Inside a block.
    let at = (SUPERBLOCK_OFFSET % size) as usize;
    // What is wrong with it the check says.
    let Ok(mut sb) = Superblock::parse(&block[at..at + SUPERBLOCK_SIZE]) else { return Ok(()) };
    sb.set_needs_recovery(false);
    if errno != 0 {
        let state = sb.state() | State::ERROR;
        sb.set_state(state);
    }
    block[at..at + SUPERBLOCK_SIZE].copy_from_slice(sb.sealed_bytes());
    view.overwrite(FsBlock(home), block);
    Ok(())
}

/// Sets the superblock's counts to those of the groups, as every mount does: while a filesystem
/// is mounted nobody keeps the superblock's.
pub fn count_free(opened: &mut pass0::Opened) {
    let (mut blocks, mut inodes) = (0u64, 0u32);
    for bytes in opened.descs.chunks_exact(opened.sb.desc_size().into()) {
        let Ok(desc) = GroupDesc::new(bytes) else { continue };
        blocks = blocks.saturating_add(desc.free_blocks_count().into());
        inodes = inodes.saturating_add(desc.free_inodes_count());
    }
    opened.sb.set_free_blocks_count(blocks << opened.sb.cluster_ratio_bits());
    opened.sb.set_free_inodes_count(inodes);
}

/// Bytes of an inode, before any descriptor was checked.
fn read_inode(dev: &dyn BlockDevice, sb: &Superblock, ino: u32) -> Result<Vec<u8>, String> {
    let outside = || format!("inode {ino} is outside the filesystem");
    let location = sb.inode_location(InodeNumber(ino)).ok_or_else(outside)?;
    let (table, offset) = sb.descriptor_at(location.group);
    let size = u64::from(sb.block_size());
    let at = sb.descriptor_block(table).0.checked_mul(size).ok_or_else(outside)?;
    let read = |at: u64, len: usize| dev.read_at(at, len).map_err(|status| status.to_string());
    let bytes = read(at + u64::from(offset), usize::from(sb.desc_size()))?;
    let desc = GroupDesc::new(&bytes[..]).map_err(|error| error.to_string())?;
    let block = desc.inode_table().0.checked_add(location.table_block.into());
    let at = block.and_then(|block| block.checked_mul(size)).ok_or_else(outside)?;
    read(at.saturating_add(location.offset.into()), usize::from(sb.inode_size()))
}

/// The blocks of an inode's file: first block of the file, of the filesystem, and how many.
fn runs(
    dev: &dyn BlockDevice,
    sb: &Superblock,
    ino: u32,
    inode: InodeRef<'_>,
) -> Result<Vec<(u64, u64, u64)>, String> {
    collect_runs(Volume::new(dev, sb), ino, inode, sb.features().extents())
        .ok_or_else(|| format!("the block map of inode {ino} is damaged"))
}

/// Where a journal inside the filesystem lies.
fn own_map(dev: &dyn BlockDevice, sb: &Superblock, inum: u32) -> Result<JournalMap, String> {
    let bytes = read_inode(dev, sb, inum)?;
    let inode = Inode::new(&bytes[..]).map_err(|error| error.to_string())?;
    let blocks = inode.raw_size() / u64::from(sb.block_size());
    let mut found = Vec::new();
    for (logical, physical, count) in runs(dev, sb, inum, inode)? {
        let count = count.min(blocks.saturating_sub(logical));
        if let (Ok(logical), Ok(count)) = (u32::try_from(logical), u32::try_from(count)) {
            found.push(JournalRun { logical, physical, count });
        }
    }
    JournalMap::from_runs(found).map_err(|error| error.to_string())
}

/// Where the log of an external journal lies.
fn external_map(journal: &dyn BlockDevice, sb: &Superblock) -> Result<JournalMap, String> {
    let bytes = journal.read_at(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE).map_err(|e| e.to_string())?;
    let own = JournalDevice::parse(&bytes).map_err(|error| error.to_string())?;
    if own.uuid != sb.journal_uuid() {
        return Err(format!("the device of -j is journal {}, not {}", own.uuid, sb.journal_uuid()));
    }
    JournalMap::external(own.superblock(), own.blocks_count).map_err(|error| error.to_string())
}

/// The inodes that the next mount deletes or truncates: those on the orphan list, and those in
/// the orphan file. What cannot be followed is left out, and shows as whatever it is then.
pub fn orphans(dev: &dyn BlockDevice, sb: &Superblock) -> HashSet<u32> {
    let mut orphans = HashSet::new();
    // As with the kernel: where errors were found before, the list is not believed.
    if sb.state().contains(State::ERROR) {
        return orphans;
    }
    let mut next = sb.last_orphan().map_or(0, |ino| ino.0);
    while next != 0 && next <= sb.inodes_count() && orphans.insert(next) {
        let Ok(bytes) = read_inode(dev, sb, next) else { break };
        next = Inode::new(&bytes[..]).map_or(0, |inode| inode.dtime());
    }
    let file = sb.orphan_file_inum().map(|ino| ino.0);
    if sb.features().ro_compat.contains(RoCompat::ORPHAN_PRESENT)
        && let Some(file) = file
    {
        orphans.extend(in_orphan_file(dev, sb, file).unwrap_or_default());
    }
    orphans
}

fn in_orphan_file(dev: &dyn BlockDevice, sb: &Superblock, file: u32) -> Result<Vec<u32>, String> {
    let bytes = read_inode(dev, sb, file)?;
    let inode = Inode::new(&bytes[..]).map_err(|error| error.to_string())?;
    let size = sb.block_size() as usize;
    let mut found = Vec::new();
    for (_, start, count) in runs(dev, sb, file, inode)? {
        for block in start..start.saturating_add(count) {
            let at = block.checked_mul(size as u64).ok_or("a block outside the device")?;
            let bytes = dev.read_at(at, size).map_err(|status| status.to_string())?;
            let slots = orphan_file::orphans(&bytes).map_err(|error| error.to_string())?;
            found.extend(slots.map(|(_, ino)| ino.0).filter(|&ino| ino <= sb.inodes_count()));
        }
    }
    Ok(found)
}
