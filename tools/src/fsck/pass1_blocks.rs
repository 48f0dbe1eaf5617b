//! Pass 1, blocks: what an inode maps, who claims which block, and whether
//! sizes agree.
//!
//! Invariants: a block that maps others is followed once on the whole
//! filesystem, and blocks claimed more than once have a budget; together they
//! bound the work by the size of the device, whatever the maps say.

use std::collections::HashSet;

use uext_ondisk::features::RoCompat;
use uext_ondisk::inode::{InodeFlags, InodeRef};

use super::context::{Context, DirBlockRef};
use super::problem::{At, Code};
use super::walk::{Event, Flow, Volume, walk};

/// Resize inode: its blocks are marked with the descriptors they are kept for.
const RESIZE_INO: u32 = 7;
/// The bad block list: what it names is not a file's data.
const BAD_INO: u32 = 1;

/// Claims over all inodes.
pub struct Claims {
    /// Blocks claimed more than once that may still be counted.
    budget: u64,
    /// The budget is used up and that was reported.
    exhausted: bool,
}

impl Claims {
    /// For a filesystem of `blocks` blocks.
    pub fn new(blocks: u64) -> Self {
        Self { budget: blocks.saturating_add(1 << 12), exhausted: false }
    }
}

/// What the walk over one inode's blocks found.
#[derive(Debug, Default)]
pub struct BlockCount {
    /// Clusters, those that map others and an attribute block included.
    pub clusters: u64,
    /// The block after the last block of the file.
    pub end: u64,
    /// The block after the last written block of the file.
    pub written_end: u64,
    /// The directory's blocks have gaps.
    pub holes: bool,
    /// The last cluster met, and which cluster of the file it is.
    last: Option<(u64, u64)>,
    /// Map blocks of the resize inode, which no claim keeps from being followed twice.
    followed: HashSet<u64>,
}

/// Walks an inode's map and claims its blocks.
pub fn claim_blocks(
    ctx: &mut Context<'_, '_>,
    claims: &mut Claims,
    ino: u32,
    inode: InodeRef<'_>,
) -> BlockCount {
    let volume = Volume::new(ctx.dev, &ctx.sb);
    let extents = ctx.sb.features().extents();
    let mut count = BlockCount::default();
    walk(volume, ino, inode, extents, &mut |event| match event {
        Event::Bad(code, at) => {
            ctx.problem(code, at);
            Flow::Skip
        }
        Event::Map { block, level } => claim_map(ctx, claims, &mut count, ino, block, level),
        Event::Run { logical, block, len, unwritten } => {
            let run = Run { logical, block, len, unwritten };
            claim_run(ctx, claims, &mut count, ino, inode, run);
            Flow::Skip
        }
    });
    count
}

#[derive(Clone, Copy)]
struct Run {
    logical: u64,
    block: u64,
    len: u64,
    unwritten: bool,
}

fn claim_map(
    ctx: &mut Context<'_, '_>,
    claims: &mut Claims,
    count: &mut BlockCount,
    ino: u32,
    block: u64,
    level: u8,
) -> Flow {
    count.clusters += 1;
    if ino == RESIZE_INO {
        // Its single indirect blocks are the reserved ones, marked already.
        if level == 2 {
            claim_one(ctx, claims, ino, block);
        }
        let follow = level <= 2 && count.followed.insert(block);
        return if follow { Flow::Follow } else { Flow::Skip };
    }
    let place = At::ino(ino).blk(block);
    if ctx.metadata.contains(block) {
        ctx.problem(Code::MetadataCollision, place);
        return Flow::Skip;
    }
    if claim_one(ctx, claims, ino, block) {
        ctx.problem(Code::MapBlockShared, place);
        return Flow::Skip;
    }
    count.last = None;
    Flow::Follow
}

/// Marks a block's cluster used; whether it was already, which is reported.
pub fn claim_one(ctx: &mut Context<'_, '_>, claims: &mut Claims, ino: u32, block: u64) -> bool {
    if !ctx.used.insert(ctx.cluster(block)) {
        return false;
    }
    if ctx.sb.features().ro_compat.contains(RoCompat::SHARED_BLOCKS) {
        return false;
    }
    if claims.budget == 0 {
        if !claims.exhausted {
            claims.exhausted = true;
            ctx.problem(Code::TooManyDuplicates, At::ino(ino));
        }
        return true;
    }
    claims.budget -= 1;
    ctx.problem(Code::DuplicateBlock, At::ino(ino).blk(block));
    true
}

fn claim_run(
    ctx: &mut Context<'_, '_>,
    claims: &mut Claims,
    count: &mut BlockCount,
    ino: u32,
    inode: InodeRef<'_>,
    run: Run,
) {
    if claims.exhausted || ino == BAD_INO {
        return;
    }
    if !check_limits(ctx, ino, inode, run) {
        return;
    }
    if inode.is_dir() {
        add_dir_blocks(ctx, count, ino, run);
    }
    claim_clusters(ctx, claims, count, ino, run);
    count.end = count.end.max(run.logical + run.len);
    if !run.unwritten {
        count.written_end = count.written_end.max(run.logical + run.len);
    }
}

/// Whether a run lies where its inode's type can have blocks.
fn check_limits(ctx: &mut Context<'_, '_>, ino: u32, inode: InodeRef<'_>, run: Run) -> bool {
    let last = run.logical + run.len - 1;
    let place = At::ino(ino).blk(run.block).num(last);
    if inode.is_dir() {
        let most = 1u64 << (31 - ctx.sb.block_size_bits());
        let wide = ctx.sb.features().large_dir() || inode.raw_size() >> 32 != 0;
        if last > u64::from(u32::MAX) || (last >= most && !wide) {
            ctx.problem(Code::TooBig, place);
            return false;
        }
    } else if !inode.is_regular() && last > 0 && !is_reserved(ctx, ino) {
        ctx.problem(Code::TooBig, place);
        return false;
    }
    true
}

fn is_reserved(ctx: &Context<'_, '_>, ino: u32) -> bool {
    ino < ctx.sb.first_ino().0
}

fn add_dir_blocks(ctx: &mut Context<'_, '_>, count: &mut BlockCount, ino: u32, run: Run) {
    if run.unwritten {
        ctx.problem(Code::UnwrittenDir, At::ino(ino).num(run.logical));
    }
    if run.logical > count.end {
        let place = At::ino(ino).num(count.end).num2(run.logical - 1);
        ctx.problem(Code::DirHoleExtent, place);
        count.holes = true;
    }
    for at in 0..run.len {
        // In range by `check_limits`.
        let Ok(logical) = u32::try_from(run.logical + at) else { break };
        ctx.dir_blocks.push(DirBlockRef { ino, logical, block: run.block + at });
    }
}

fn claim_clusters(
    ctx: &mut Context<'_, '_>,
    claims: &mut Claims,
    count: &mut BlockCount,
    ino: u32,
    run: Run,
) {
    if ino == RESIZE_INO {
        count.clusters += run.len;
        return;
    }
    let bits = ctx.sb.cluster_ratio_bits();
    if bits == 0 {
        count.clusters += run.len;
        for at in 0..run.len {
            claim_one(ctx, claims, ino, run.block + at);
            if claims.exhausted {
                return;
            }
        }
        return;
    }
    let mask = (1u64 << bits) - 1;
    if run.logical & mask != run.block & mask {
        let place = At::ino(ino).blk(run.block).num(run.logical);
        ctx.problem(Code::MisalignedCluster, place);
    }
    let (first, last) = (run.block >> bits, (run.block + run.len - 1) >> bits);
    let logical_cluster = run.logical >> bits;
    // A cluster the run before began is this inode's already.
    let skip = count.last == Some((first, logical_cluster));
    for cluster in first + u64::from(skip)..=last {
        count.clusters += 1;
        claim_one(ctx, claims, ino, cluster << bits);
    }
    count.last = Some((last, (run.logical + run.len - 1) >> bits));
}

/// Checks `i_size` and `i_blocks` against what was counted.
pub fn check_sizes(ctx: &mut Context<'_, '_>, ino: u32, inode: InodeRef<'_>, count: &BlockCount) {
    // What an orphan has past its size goes with it.
    if !ctx.orphans.contains(&ino) {
        check_size(ctx, ino, inode, count);
    }
    let features = ctx.sb.features();
    let block_size = u64::from(ctx.sb.block_size());
    let huge = features.huge_file() && inode.flags().contains(InodeFlags::HUGE_FILE);
    let unit = if huge { 1 } else { block_size / 512 };
    let counted = count.clusters.saturating_mul(unit) << ctx.sb.cluster_ratio_bits();
    let raw = inode.raw();
    let high = if features.huge_file() { u64::from(raw.l_i_blocks_high.get()) << 32 } else { 0 };
    let stored = high | u64::from(raw.i_blocks_lo.get());
    if stored != counted && !is_hurd(ctx) {
        ctx.problem(Code::BadBlocks, At::ino(ino).num(stored).num2(counted));
    }
    let mapped = !inode.flags().intersects(InodeFlags::EXTENTS | InodeFlags::INLINE_DATA);
    let file = inode.is_regular() || inode.is_dir();
    if features.bigalloc() && mapped && file && stored > 0 && !is_reserved(ctx, ino) {
        ctx.problem(Code::BigallocMap, At::ino(ino));
    }
}

/// Whether the Hurd made the filesystem, which uses some fields otherwise.
pub fn is_hurd(ctx: &Context<'_, '_>) -> bool {
    ctx.sb.raw().s_creator_os.get() == 1
}

fn check_size(ctx: &mut Context<'_, '_>, ino: u32, inode: InodeRef<'_>, count: &BlockCount) {
    let size = inode.raw_size();
    let block_size = u64::from(ctx.sb.block_size());
    let features = ctx.sb.features();
    let flags = inode.flags();
    let bad = if inode.is_dir() {
        let blocks = size / block_size;
        let spare = count.end.saturating_sub(blocks);
        !flags.contains(InodeFlags::INLINE_DATA)
            && (!size.is_multiple_of(block_size)
                || blocks > count.end
                || spare > u64::from(ctx.sb.raw().s_prealloc_dir_blocks))
    } else if inode.is_symlink() {
        false
    } else {
        let extents = features.extents() && flags.contains(InodeFlags::EXTENTS);
        let written = count.written_end.saturating_sub(1).saturating_mul(block_size);
        let past = size < written && !flags.contains(InodeFlags::VERITY);
        past || size > max_size(ctx.sb.block_size_bits(), extents)
    };
    if bad {
        ctx.problem(Code::BadSize, At::ino(ino).num(size).num2(count.end));
    }
    if inode.is_regular() && size >= 1 << 31 {
        ctx.large_files += 1;
    }
}

/// The largest size a map can reach, bytes.
fn max_size(bits: u32, extents: bool) -> u64 {
    if extents {
        return (1u64 << (32 + bits)) - 1;
    }
    let per_block = 1u64 << (bits - 2);
    let blocks = 12 + per_block + per_block.pow(2) + per_block.pow(3);
    blocks.saturating_mul(1 << bits)
}
