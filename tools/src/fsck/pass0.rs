//! Pass 0: the superblock, the group descriptors and where metadata lies.
//!
//! When the primary superblock or its descriptors cannot be used, a backup is
//! tried. After this pass block and inode counts are known to fit the device,
//! so the maps of later passes may be sized by them.

use uext_blockdev::BlockDevice;
use uext_ondisk::error::CorruptKind;
use uext_ondisk::features::{Features, Incompat, RoCompat};
use uext_ondisk::geometry::backup_places;
use uext_ondisk::group_desc::{GroupDesc, GroupFlags};
use uext_ondisk::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};
use uext_ondisk::{FsBlock, GroupNumber};

use super::Options;
use super::context::{BitSet, Reporter, Step, Stop, group_base};
use super::problem::{At, Code};

/// How many backups of each block size are tried.
const BACKUPS_PER_SIZE: usize = 6;

/// What pass 0 found.
pub struct Opened {
    /// The superblock in use.
    pub sb: Superblock,
    /// All descriptors.
    pub descs: Vec<u8>,
    /// Groups whose inode table cannot be used.
    pub bad_tables: Vec<bool>,
}

/// Finds a superblock and descriptors that can be used.
///
/// # Errors
/// When there are none, or they ask for what this program cannot check.
pub fn open(dev: &dyn BlockDevice, options: &Options, report: &mut Reporter<'_>) -> Step<Opened> {
    let (sb, backup_block) = find_superblock(dev, options, report)?;
    check_features(&sb, report)?;
    check_fields(dev, &sb, report)?;
    let mut opened = Opened { descs: Vec::new(), bad_tables: Vec::new(), sb };
    opened.descs = match read_descs(dev, &opened.sb, backup_block) {
        Some(descs) => descs,
        None => vec![0; descs_len(&opened.sb)],
    };
    if backup_block.is_some() {
        forget_uninit(&opened.sb, &mut opened.descs);
    } else if options.superblock.is_none() {
        use_backup_if_needed(dev, &mut opened, report);
    }
    opened.bad_tables = check_places(&opened, report);
    check_descs(&opened, report);
    Ok(opened)
}

fn read_super(dev: &dyn BlockDevice, offset: u64) -> Result<Superblock, (CorruptKind, String)> {
    let bytes = dev
        .read_at(offset, SUPERBLOCK_SIZE)
        .map_err(|status| (CorruptKind::Truncated, status.to_string()))?;
    Superblock::parse(&bytes).map_err(|error| (error.kind, error.detail))
}

/// The superblock, and its block when it is a backup.
fn find_superblock(
    dev: &dyn BlockDevice,
    options: &Options,
    report: &mut Reporter<'_>,
) -> Step<(Superblock, Option<u64>)> {
    if let Some(block) = options.superblock {
        let sizes = match options.block_size {
            Some(size) => vec![size],
            None => (10..=16).map(|bits| 1 << bits).collect(),
        };
        for size in sizes {
            let sb = read_super(dev, block.saturating_mul(size.into()));
            if let Ok(sb) = sb
                && sb.block_size() == size
            {
                return Ok((sb, Some(block)));
            }
        }
        report.problem(Code::SuperNoBackup, At::fs());
        return Err(Stop);
    }
    let (kind, detail) = match read_super(dev, SUPERBLOCK_OFFSET) {
        Ok(sb) => return Ok((sb, None)),
        Err(error) => error,
    };
    report.problem(Code::SuperUnusable, At::fs().text(detail));
    if kind == CorruptKind::Unsupported {
        report.problem(Code::SuperNoBackup, At::fs());
        return Err(Stop);
    }
    if let Some((block, sb)) = backups(dev).next() {
        report.problem(Code::SuperFromBackup, At::fs().blk(block));
        return Ok((sb, Some(block)));
    }
    report.problem(Code::SuperNoBackup, At::fs());
    Err(Stop)
}

/// Backups of the superblock that can be used, each with its block.
pub fn backups(dev: &dyn BlockDevice) -> impl Iterator<Item = (u64, Superblock)> {
    let places = backup_places(dev.size(), BACKUPS_PER_SIZE).into_iter();
    places.filter_map(|place| {
        let sb = read_super(dev, place.byte_offset).ok()?;
        let block = place.byte_offset / u64::from(place.block_size);
        let fits = sb.block_size() == place.block_size && place.group.0 < sb.groups_count();
        (fits && sb.group_first_block(place.group) == FsBlock(block)).then_some((block, sb))
    })
}

/// Refuses what nobody here can judge.
fn check_features(sb: &Superblock, report: &mut Reporter<'_>) -> Step<()> {
    let known = Features::from_bits(0x1E3F, 0x3_E7D6, 0x1_F77B);
    let unknown = sb.features().without(known);
    match unknown.names().first() {
        None => Ok(()),
        Some(name) => {
            report.problem(Code::Feature, At::fs().text(name.clone()));
            Err(Stop)
        }
    }
}

/// Fields the parser leaves open, and the sizes later passes allocate by.
fn check_fields(dev: &dyn BlockDevice, sb: &Superblock, report: &mut Reporter<'_>) -> Step<()> {
    let raw = sb.raw();
    let mut bad = None;
    if sb.reserved_blocks_count() > sb.blocks_count() / 2 {
        bad = Some(format!("{} reserved blocks", sb.reserved_blocks_count()));
    }
    if sb.reserved_gdt_blocks() > sb.block_size() / 4 {
        bad = Some(format!("{} reserved descriptor blocks", sb.reserved_gdt_blocks()));
    }
    let first_ino = sb.first_ino().0;
    if !(11..=sb.inodes_count()).contains(&first_ino) {
        bad = Some(format!("first inode {first_ino}"));
    }
    let groups = u64::from(sb.groups_count());
    if groups * u64::from(sb.inodes_per_group()) != u64::from(sb.inodes_count()) {
        bad = Some(format!("{} inodes in {groups} groups", sb.inodes_count()));
    }
    if let Some(text) = bad {
        report.problem(Code::SuperField, At::fs().text(text));
        return Err(Stop);
    }
    let device_blocks = dev.size() / u64::from(sb.block_size());
    if sb.blocks_count() > device_blocks {
        report.problem(Code::SizeWrong, At::fs().num(sb.blocks_count()).num2(device_blocks));
        return Err(Stop);
    }
    if u64::from(sb.inodes_count()) * u64::from(sb.inode_size()) > dev.size() {
        report.problem(Code::TablesTooLarge, At::fs().num(sb.inodes_count()));
        return Err(Stop);
    }
    if sb.inode_size() > 128 {
        let most = sb.inode_size() - 128;
        let fields = [
            ("s_min_extra_isize", raw.s_min_extra_isize.get()),
            ("s_want_extra_isize", raw.s_want_extra_isize.get()),
        ];
        for (name, value) in fields {
            if value != 0 && (value < 4 || value > most || value % 4 != 0) {
                report.problem(Code::ExtraIsize, At::fs().text(name).num(value));
            }
        }
    }
    check_feature_pairs(sb, report);
    Ok(())
}

fn check_feature_pairs(sb: &Superblock, report: &mut Reporter<'_>) {
    let features = sb.features();
    if features.metadata_csum() && features.ro_compat.contains(RoCompat::GDT_CSUM) {
        report.problem(Code::BothCsums, At::fs());
    }
    if !features.metadata_csum() && features.incompat.contains(Incompat::CSUM_SEED) {
        report.problem(Code::SeedWithoutCsum, At::fs());
    }
    if features.bit64() && !features.extents() {
        report.problem(Code::WideWithoutExtents, At::fs());
    }
    if features.meta_bg() && sb.first_meta_bg() > sb.gdt_blocks() {
        let at = At::fs().num(sb.first_meta_bg()).num2(sb.gdt_blocks());
        report.problem(Code::FirstMetaBg, at);
    }
}

fn descs_len(sb: &Superblock) -> usize {
    sb.groups_count() as usize * usize::from(sb.desc_size())
}

/// Reads all descriptors: the primary ones, or those after a backup superblock.
fn read_descs(dev: &dyn BlockDevice, sb: &Superblock, backup: Option<u64>) -> Option<Vec<u8>> {
    let group = backup.and_then(|block| sb.group_of_block(FsBlock(block)));
    let per_block = sb.descs_per_block() as usize * usize::from(sb.desc_size());
    let mut descs = Vec::with_capacity(descs_len(sb));
    for n in 0..sb.gdt_blocks() {
        let primary = sb.descriptor_block(n);
        let block = match group {
            None | Some(GroupNumber(0)) => primary,
            Some(group) => backup_desc_block(sb, n, group).unwrap_or(primary),
        };
        let offset = block.0.checked_mul(sb.block_size().into())?;
        let bytes = dev.read_at(offset, sb.block_size() as usize).ok()?;
        let want = per_block.min(descs_len(sb) - descs.len());
        descs.extend_from_slice(&bytes[..want]);
    }
    Some(descs)
}

/// The copy of descriptor block `n` that belongs to a backup.
fn backup_desc_block(sb: &Superblock, n: u32, group: GroupNumber) -> Option<FsBlock> {
    sb.descriptor_backup_block(n, group).or_else(|| {
        let second = GroupNumber(n.saturating_mul(sb.descs_per_block()).saturating_add(1));
        sb.descriptor_backup_block(n, second)
    })
}

/// Backups do not follow what groups are initialised, so all count as such.
fn forget_uninit(sb: &Superblock, descs: &mut [u8]) {
    if !sb.features().group_desc_csum() {
        return;
    }
    for (number, bytes) in (0..).zip(descs.chunks_exact_mut(sb.desc_size().into())) {
        let Ok(mut desc) = GroupDesc::new(bytes) else { continue };
        let flags = desc.flags();
        desc.set_flags(flags.difference(GroupFlags::BLOCK_UNINIT | GroupFlags::INODE_UNINIT));
        desc.set_itable_unused(0);
        desc.seal(sb.desc_checksum(), GroupNumber(number));
    }
}

/// The first descriptor that puts metadata where it cannot be, or on other metadata.
fn misplaced(sb: &Superblock, descs: &[u8]) -> Option<(u32, String)> {
    let mut taken = BitSet::new(sb.blocks_count());
    for group in 0..sb.groups_count() {
        for block in group_base(sb, group) {
            taken.insert(block);
        }
    }
    for (number, bytes) in (0..).zip(descs.chunks_exact(sb.desc_size().into())) {
        let desc = GroupDesc::new(bytes).ok()?;
        let places = [
            ("block bitmap", desc.block_bitmap().0, 1),
            ("inode bitmap", desc.inode_bitmap().0, 1),
            ("inode table", desc.inode_table().0, u64::from(sb.inode_table_blocks())),
        ];
        for (what, start, count) in places {
            if !is_placed(sb, number, start, count) {
                return Some((number, format!("{what} at block {start}")));
            }
            for block in start..start + count {
                if taken.insert(block) {
                    return Some((number, format!("{what} at block {block}, which is taken")));
                }
            }
        }
    }
    None
}

/// Whether metadata may lie there: in the group, or with flex_bg anywhere.
fn is_placed(sb: &Superblock, group: u32, start: u64, count: u64) -> bool {
    let group = GroupNumber(group);
    let (first, end) = if sb.features().flex_bg() {
        (sb.first_data_block().0, sb.blocks_count())
    } else {
        let first = sb.group_first_block(group).0;
        (first, first + u64::from(sb.blocks_in_group(group)))
    };
    start >= first && start.checked_add(count).is_some_and(|last| last <= end)
}

/// Turns to a backup when the primary descriptors cannot be used and the backup's can.
fn use_backup_if_needed(dev: &dyn BlockDevice, opened: &mut Opened, report: &mut Reporter<'_>) {
    let Some((group, text)) = misplaced(&opened.sb, &opened.descs) else { return };
    report.problem(Code::DescUnusable, At::group(group).text(text));
    let groups: Vec<_> = opened.sb.backup_groups().take(BACKUPS_PER_SIZE).collect();
    for group in groups {
        let block = opened.sb.group_first_block(group).0;
        let Some(offset) = block.checked_mul(opened.sb.block_size().into()) else { continue };
        let Ok(sb) = read_super(dev, offset) else { continue };
        let same = sb.blocks_count() == opened.sb.blocks_count()
            && sb.inodes_count() == opened.sb.inodes_count()
            && sb.block_size() == opened.sb.block_size();
        let Some(descs) = read_descs(dev, &sb, Some(block)).filter(|_| same) else { continue };
        report.problem(Code::DescFromBackup, At::fs().blk(block));
        opened.sb = sb;
        opened.descs = descs;
        forget_uninit(&opened.sb, &mut opened.descs);
        return;
    }
}

/// Reports misplaced metadata; which inode tables cannot be used.
fn check_places(opened: &Opened, report: &mut Reporter<'_>) -> Vec<bool> {
    let sb = &opened.sb;
    let mut bad_tables = Vec::with_capacity(sb.groups_count() as usize);
    for (number, bytes) in (0..).zip(opened.descs.chunks_exact(sb.desc_size().into())) {
        let Ok(desc) = GroupDesc::new(bytes) else { continue };
        let (block_map, inode_map) = (desc.block_bitmap().0, desc.inode_bitmap().0);
        if !is_placed(sb, number, block_map, 1) {
            report.problem(Code::BlockBitmapPlace, At::group(number).blk(block_map));
        }
        if !is_placed(sb, number, inode_map, 1) {
            report.problem(Code::InodeBitmapPlace, At::group(number).blk(inode_map));
        }
        let table = desc.inode_table().0;
        let good = is_placed(sb, number, table, sb.inode_table_blocks().into());
        if !good {
            report.problem(Code::InodeTablePlace, At::group(number).blk(table));
        }
        bad_tables.push(!good);
    }
    bad_tables
}

/// Checksums, flags and counts of the descriptors.
fn check_descs(opened: &Opened, report: &mut Reporter<'_>) {
    let sb = &opened.sb;
    let has_csum = sb.features().group_desc_csum();
    for (number, bytes) in (0..).zip(opened.descs.chunks_exact(sb.desc_size().into())) {
        let Ok(desc) = GroupDesc::new(bytes) else { continue };
        let at = || At::group(number);
        let computed = desc.computed_checksum(sb.desc_checksum(), GroupNumber(number));
        if let Some(computed) = computed.filter(|&computed| computed != desc.checksum()) {
            report.problem(Code::DescCsum, at().num(desc.checksum()).num2(computed));
        }
        let uninit = GroupFlags::INODE_UNINIT | GroupFlags::BLOCK_UNINIT;
        if !has_csum && (desc.flags().intersects(uninit) || desc.itable_unused() != 0) {
            report.problem(Code::UninitWithoutCsum, at());
        }
        let last = number + 1 == sb.groups_count();
        if last && desc.flags().contains(GroupFlags::BLOCK_UNINIT) {
            report.problem(Code::LastGroupUninit, at());
        }
        let unused = desc.itable_unused();
        if has_csum && (unused > desc.free_inodes_count() || unused > sb.inodes_per_group()) {
            report.problem(Code::ItableUnused, at().num(unused));
        }
        let counts = [
            ("the free block count", desc.free_blocks_count(), sb.clusters_per_group()),
            ("the free inode count", desc.free_inodes_count(), sb.inodes_per_group()),
            ("the directory count", desc.used_dirs_count(), sb.inodes_per_group()),
        ];
        for (what, count, most) in counts {
            if count > most {
                report.problem(Code::DescCounts, at().text(what).num(count));
            }
        }
    }
    if sb.free_blocks_count() > sb.blocks_count() {
        let at = At::fs().text("the free block count").num(sb.free_blocks_count());
        report.problem(Code::SuperCounts, at);
    }
    if sb.free_inodes_count() > sb.inodes_count() {
        let at = At::fs().text("the free inode count").num(sb.free_inodes_count());
        report.problem(Code::SuperCounts, at);
    }
}
