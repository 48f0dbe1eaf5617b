//! Pass 5: bitmaps and counts against what the passes before found.
//!
//! A group without an initialised bitmap stands for one that marks only its own
//! metadata. Counts are compared with the bitmaps on disk, as e2fsck does, so a
//! wrong bit is reported once.

use uext_ondisk::GroupNumber;
use uext_ondisk::bitmap;
use uext_ondisk::group_desc::GroupFlags;

use super::context::{BitSet, Context, InodeState};
use super::problem::{At, Code};

/// Differences named in one message.
const NAMED: usize = 8;

/// Checks bitmaps, padding, checksums and counts.
pub fn run(ctx: &mut Context<'_, '_>) {
    let groups = ctx.sb.groups_count();
    let (mut free_blocks, mut free_inodes) = (0u64, 0u64);
    let foreign = metadata_of_uninit_groups(ctx);
    for group in 0..groups {
        ctx.progress.step(5, group.into(), groups.into());
        free_blocks += u64::from(check_block_map(ctx, group, &foreign));
        free_inodes += u64::from(check_inode_map(ctx, group));
    }
    let free_blocks = free_blocks << ctx.sb.cluster_ratio_bits();
    let stored = ctx.sb.free_blocks_count();
    if stored != free_blocks {
        ctx.problem(Code::FreeBlocks, At::fs().num(stored).num2(free_blocks));
    }
    let stored = u64::from(ctx.sb.free_inodes_count());
    if stored != free_inodes {
        ctx.problem(Code::FreeInodes, At::fs().num(stored).num2(free_inodes));
    }
}

/// Metadata of groups without a bitmap, which may lie in any group.
fn metadata_of_uninit_groups(ctx: &Context<'_, '_>) -> BitSet {
    let mut blocks = BitSet::new(ctx.sb.blocks_count());
    for group in 0..ctx.sb.groups_count() {
        if !honest_flags(ctx, group).contains(GroupFlags::BLOCK_UNINIT) {
            continue;
        }
        let desc = ctx.desc(group);
        let table = desc.inode_table().0;
        let table_end = table.saturating_add(ctx.sb.inode_table_blocks().into());
        let maps = [desc.block_bitmap().0, desc.inode_bitmap().0];
        for block in ctx.group_base(group).chain(maps).chain(table..table_end) {
            blocks.insert(block);
        }
    }
    blocks
}

/// A group's flags, unless its checksum says that they cannot be trusted.
fn honest_flags(ctx: &Context<'_, '_>, group: u32) -> GroupFlags {
    let desc = ctx.desc(group);
    match desc.verify(ctx.sb.desc_checksum(), GroupNumber(group)) {
        Ok(()) => ctx.group_flags(group),
        Err(_) => GroupFlags::empty(),
    }
}

/// Checks a group's block bitmap; its free clusters by that bitmap.
fn check_block_map(ctx: &mut Context<'_, '_>, group: u32, foreign: &BitSet) -> u32 {
    let uninit = honest_flags(ctx, group).contains(GroupFlags::BLOCK_UNINIT);
    let bits = ctx.sb.clusters_in_group(GroupNumber(group));
    let place = ctx.desc(group).block_bitmap().0;
    let mut map = vec![0; ctx.block_size()];
    if !uninit {
        match ctx.read_block(place) {
            Some(bytes) => map = bytes,
            None => ctx.problem(Code::ReadMap, At::group(group).blk(place)),
        }
        check_block_padding(ctx, group, &map, bits);
    }
    mark_foreign(ctx, group, foreign, &mut map);
    let first = ctx.cluster(ctx.sb.group_first_block(GroupNumber(group)).0);
    let differences: Vec<(u32, bool)> =
        differing(&map, bits, |bit| ctx.used.contains(first + u64::from(bit)));
    let name = |bit: u32| (first + u64::from(bit)) << ctx.sb.cluster_ratio_bits();
    if let Some(text) = describe(&differences, name) {
        ctx.problem(Code::BlockMapDiff, At::group(group).text(text));
    }
    let free = bits - bitmap::count_set(&map, bits);
    let stored = ctx.desc(group).free_blocks_count();
    if stored != free {
        ctx.problem(Code::FreeBlocksGroup, At::group(group).num(stored).num2(free));
    }
    free
}

fn check_block_padding(ctx: &mut Context<'_, '_>, group: u32, map: &[u8], bits: u32) {
    let all = u32::try_from(map.len() * 8).unwrap_or(u32::MAX);
    if bitmap::find_next_zero(map, bits, all).is_some() {
        ctx.problem(Code::BlockMapPadding, At::group(group));
    }
    if let Err(error) = ctx.desc(group).verify_block_bitmap(&ctx.sb, GroupNumber(group), map) {
        ctx.problem(Code::BlockMapCsum, At::group(group).text(error.to_string()));
    }
}

/// Sets the bits of the metadata that groups without a bitmap keep in this one.
fn mark_foreign(ctx: &Context<'_, '_>, group: u32, foreign: &BitSet, map: &mut [u8]) {
    let first = ctx.sb.group_first_block(GroupNumber(group)).0;
    let shift = ctx.sb.cluster_ratio_bits();
    for at in 0..ctx.sb.blocks_in_group(GroupNumber(group)) {
        if foreign.contains(first + u64::from(at)) {
            bitmap::set(map, at >> shift);
        }
    }
}

/// Bits that differ from what they should be, with that; compared by words.
fn differing(map: &[u8], bits: u32, should: impl Fn(u32) -> bool) -> Vec<(u32, bool)> {
    (0..bits)
        .map(|bit| (bit, should(bit)))
        .filter(|&(bit, should)| bitmap::test(map, bit) != should)
        .collect()
}

/// The first runs of differences, as `+used but free` and `-free but used` numbers.
fn describe(differences: &[(u32, bool)], name: impl Fn(u32) -> u64) -> Option<String> {
    use std::fmt::Write;
    let mut text = String::new();
    let mut rest = differences;
    for _ in 0..NAMED {
        let Some(&(first, should)) = rest.first() else { break };
        let same = |(at, entry): (u32, &(u32, bool))| *entry == (first + at, should);
        let len = (0..).zip(rest).take_while(|&pair| same(pair)).count();
        let last = rest[len - 1].0;
        let sign = if should { '+' } else { '-' };
        let _ = match len {
            1 => write!(text, " {sign}{}", name(first)),
            _ => write!(text, " {sign}({}--{})", name(first), name(last)),
        };
        rest = &rest[len..];
    }
    if !rest.is_empty() {
        let _ = write!(text, " and {} more", rest.len());
    }
    (!text.is_empty()).then(|| format!("differences:{text}"))
}

/// Checks a group's inode bitmap and directory count; its free inodes by that bitmap.
fn check_inode_map(ctx: &mut Context<'_, '_>, group: u32) -> u32 {
    let uninit = ctx.group_flags(group).contains(GroupFlags::INODE_UNINIT);
    let bits = ctx.sb.inodes_per_group();
    let place = ctx.desc(group).inode_bitmap().0;
    let mut map = vec![0; ctx.block_size()];
    if !uninit {
        match ctx.read_block(place) {
            Some(bytes) => map = bytes,
            None => ctx.problem(Code::ReadMap, At::group(group).blk(place)),
        }
        check_inode_padding(ctx, group, &map, bits);
    }
    let first = group * bits + 1;
    let differences = differing(&map, bits, |bit| ctx.inode(first + bit).is(InodeState::USED));
    if let Some(text) = describe(&differences, |bit| u64::from(first + bit)) {
        ctx.problem(Code::InodeMapDiff, At::group(group).text(text));
    }
    let free = bits - bitmap::count_set(&map, bits);
    let is_dir = |bit: u32| ctx.inode(first + bit).is(InodeState::DIR);
    let dirs = (0..bits).filter(|&bit| bitmap::test(&map, bit) && is_dir(bit)).count();
    let desc = ctx.desc(group);
    let (stored_free, stored_dirs) = (desc.free_inodes_count(), desc.used_dirs_count());
    if stored_free != free {
        ctx.problem(Code::FreeInodesGroup, At::group(group).num(stored_free).num2(free));
    }
    if u64::from(stored_dirs) != dirs as u64 {
        ctx.problem(Code::DirsGroup, At::group(group).num(stored_dirs).num2(dirs as u64));
    }
    free
}

fn check_inode_padding(ctx: &mut Context<'_, '_>, group: u32, map: &[u8], bits: u32) {
    let all = u32::try_from(map.len() * 8).unwrap_or(u32::MAX);
    if bitmap::find_next_zero(map, bits, all).is_some() {
        ctx.problem(Code::InodeMapPadding, At::group(group));
    }
    if let Err(error) = ctx.desc(group).verify_inode_bitmap(&ctx.sb, GroupNumber(group), map) {
        ctx.problem(Code::InodeMapCsum, At::group(group).text(error.to_string()));
    }
}
