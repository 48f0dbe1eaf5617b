//! Pass 1, extended attributes: in the inode's body and in shared blocks.

use std::collections::HashMap;

use uext_ondisk::features::{Compat, Incompat};
use uext_ondisk::inode::InodeRef;
use uext_ondisk::xattr::{
    IBODY_HEADER, XattrArea, XattrEntry, XattrValue, entry_hash, entry_hash_signed,
};
use uext_ondisk::{FsBlock, InodeNumber};

use super::context::{Context, InodeState};
use super::pass1_blocks::{Claims, claim_one};
use super::problem::{At, Code};

/// An attribute block met before.
struct SharedBlock {
    /// `h_refcount`.
    stored: u64,
    /// Inodes that refer to it.
    seen: u64,
    /// Clusters of values in inodes, charged to each inode that refers to it.
    value_clusters: u64,
}

/// The attribute blocks of all inodes so far.
#[derive(Default)]
pub struct XattrBlocks {
    blocks: HashMap<u64, SharedBlock>,
}

impl XattrBlocks {
    /// Reports the blocks whose reference count is wrong.
    pub fn check_refcounts(&self, ctx: &mut Context<'_, '_>) {
        let mut wrong: Vec<_> =
            self.blocks.iter().filter(|(_, shared)| shared.stored != shared.seen).collect();
        wrong.sort_by_key(|(block, _)| **block);
        for (&block, shared) in wrong {
            let at = At::fs().blk(block).num(shared.stored).num2(shared.seen);
            ctx.problem(Code::XattrRefcount, at);
        }
    }
}

/// Checks an inode's attribute block; the clusters it adds to the inode.
pub fn check_block(
    ctx: &mut Context<'_, '_>,
    claims: &mut Claims,
    blocks: &mut XattrBlocks,
    ino: u32,
    inode: InodeRef<'_>,
) -> u64 {
    let number = inode.file_acl(ctx.sb.features()).0;
    if number == 0 {
        return 0;
    }
    let on = ctx.sb.features().compat.contains(Compat::EXT_ATTR);
    if !on || !ctx.is_fs_block(number) {
        let text = format!("attribute block {number} cannot be");
        let own = ino < ctx.sb.first_ino().0 && ino != InodeNumber::ROOT.0;
        let code = if own { Code::ReservedField } else { Code::BadField };
        ctx.problem(code, At::ino(ino).text(text));
        ctx.set_flag(ino, InodeState::BAD);
        return 0;
    }
    if let Some(shared) = blocks.blocks.get_mut(&number) {
        shared.seen += 1;
        return 1 + shared.value_clusters;
    }
    claim_one(ctx, claims, ino, number);
    let shared = read_block(ctx, ino, number);
    let clusters = 1 + shared.value_clusters;
    blocks.blocks.insert(number, shared);
    clusters
}

/// Validates an attribute block that is met for the first time.
fn read_block(ctx: &mut Context<'_, '_>, ino: u32, number: u64) -> SharedBlock {
    let mut shared = SharedBlock { stored: 1, seen: 1, value_clusters: 0 };
    let at = || At::ino(ino).blk(number);
    let Some(bytes) = ctx.read_block(number) else {
        ctx.problem(Code::ReadBlock, at());
        return shared;
    };
    let area = match XattrArea::block(&bytes).and_then(|area| area.check_overlap().map(|()| area)) {
        Ok(area) => area,
        Err(error) => {
            ctx.problem(Code::XattrBlockBad, at().text(error.detail));
            return shared;
        }
    };
    shared.stored = area.header().map_or(0, |header| header.h_refcount.get().into());
    for entry in area.entries() {
        if entry.index.0 == 0 {
            ctx.problem(Code::XattrBlockBad, at().text("an attribute without a prefix"));
        }
        shared.value_clusters += check_entry(ctx, ino, &entry, true);
    }
    if ctx.sb.features().metadata_csum()
        && let Err(error) = area.verify_checksum(ctx.sb.csum_seed(), FsBlock(number))
    {
        ctx.problem(Code::XattrCsum, at().text(error.detail));
    }
    shared
}

/// Checks one attribute; the clusters of its value when that is an inode.
fn check_entry(
    ctx: &mut Context<'_, '_>,
    ino: u32,
    entry: &XattrEntry<'_>,
    must_hash: bool,
) -> u64 {
    match entry.value {
        XattrValue::Inline(value) => {
            // What lies in an inode was never shared, and may have no hash.
            let hash = entry_hash(entry.name, value);
            let known = hash == entry.hash
                || entry_hash_signed(entry.name, value) == entry.hash
                || (entry.hash == 0 && !must_hash);
            if !known {
                ctx.problem(Code::XattrHash, At::ino(ino).num(entry.hash).num2(hash));
            }
            0
        }
        XattrValue::Inode { inode, size } => check_value_inode(ctx, ino, inode.0, size),
    }
}

/// Checks the inode that holds a value; the clusters it charges to its owner.
fn check_value_inode(ctx: &mut Context<'_, '_>, ino: u32, value: u32, size: u32) -> u64 {
    let cluster = u64::from(ctx.sb.block_size()) << ctx.sb.cluster_ratio_bits();
    let place = At::ino(ino).num(value);
    if !ctx.sb.features().incompat.contains(Incompat::EA_INODE) {
        ctx.problem(Code::XattrValueFeature, place.clone());
    }
    let in_range = (ctx.sb.first_ino().0..=ctx.sb.inodes_count()).contains(&value);
    let bytes = if in_range { ctx.read_inode(value) } else { None };
    let sound = bytes.as_deref().and_then(|bytes| InodeRef::new(bytes).ok()).is_some_and(|inode| {
        let flag = inode.flags().contains(uext_ondisk::inode::InodeFlags::EA_INODE);
        flag && size != 0 && inode.raw_size() == u64::from(size)
    });
    if !sound {
        ctx.problem(Code::XattrValueInode, place);
    }
    ctx.set_flag(value, InodeState::EA_REFERENCED);
    u64::from(size).div_ceil(cluster)
}

/// Checks the attributes in an inode's body; the clusters of values in inodes.
pub fn check_body(ctx: &mut Context<'_, '_>, ino: u32, inode: InodeRef<'_>) -> u64 {
    let size = usize::from(ctx.sb.inode_size());
    if size <= 128 {
        return 0;
    }
    let extra = usize::from(inode.extra_isize());
    let most = size - 128;
    if extra != 0 && (extra < 4 || extra > most || !extra.is_multiple_of(4)) {
        ctx.problem(Code::InodeExtraIsize, At::ino(ino).num(extra as u64));
        return 0;
    }
    check_times(ctx, ino, inode);
    if extra >= most - IBODY_HEADER {
        return 0;
    }
    // With i_extra_isize 0 the attributes begin right after the first 128 bytes.
    let Some(bytes) = inode.bytes().get(128 + extra..) else { return 0 };
    let area = match XattrArea::ibody(bytes) {
        Ok(None) => return 0,
        Ok(Some(area)) => area.check_overlap().map(|()| area),
        Err(error) => Err(error),
    };
    match area {
        Ok(area) => {
            let entries: Vec<_> = area.entries().collect();
            entries.iter().map(|entry| check_entry(ctx, ino, entry, false)).sum()
        }
        Err(error) => {
            ctx.problem(Code::XattrInodeBad, At::ino(ino).text(error.detail));
            0
        }
    }
}

/// Warns of times that an old kernel stored before 1970 the wrong way.
fn check_times(ctx: &mut Context<'_, '_>, ino: u32, inode: InodeRef<'_>) {
    let Some(extra) = inode.raw_extra().filter(|extra| extra.i_extra_isize.get() >= 24) else {
        return;
    };
    let raw = inode.raw();
    let pairs = [
        (raw.i_atime, extra.i_atime_extra),
        (raw.i_ctime, extra.i_ctime_extra),
        (raw.i_mtime, extra.i_mtime_extra),
        (extra.i_crtime, extra.i_crtime_extra),
    ];
    if pairs.iter().any(|(time, extra)| time.get() >> 31 == 1 && extra.get() & 3 == 3) {
        ctx.problem(Code::TimeRange, At::ino(ino));
    }
}
