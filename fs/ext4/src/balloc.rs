//! Block allocation: claims in memory, then bitmaps under a handle.
//!
//! A block is allocated in two steps. A [`Claim`] takes it out of the in-memory
//! bitmap, so nobody else gets it; nothing on the disk knows. When the data is on
//! the disk, [`Ext4::mark_used`] sets the bitmap under the handle that maps the
//! block. Freeing goes the other way: the bitmap on the disk is cleared at once,
//! the in-memory one only when the freeing transaction has committed.
//!
//! Invariants:
//! - bits set on the disk are set in `GroupState::claimed`; the difference is claims
//!   and blocks freed by transactions that have not committed.
//! - `Space::free` is the sum of the groups' `free_blocks`; `Space::reserved` never
//!   exceeds it, so a claim that was reserved before is always found.
//!
//! Locks: group lock, then `Space`; never two group locks at once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uext_blockdev::mutant;
use uext_jbd2::{Handle, Tid, tid_geq};
use uext_ondisk::bitmap::{self, BitRun};
use uext_ondisk::features::Incompat;
use uext_ondisk::group_desc::{GroupDesc, GroupFlags};
use uext_ondisk::{Corrupt, FsBlock, GroupNumber};
use uext_sync::{Mutex, MutexGuard};
use uext_vfs::{Context, Errno};

use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::groups::{Desc, GroupState};

/// A handle's note: its allocations leave the reserved blocks alone.
const UNPRIVILEGED: u32 = 1;

/// A run of blocks that belongs to its holder in memory only; dropping it gives it back.
#[must_use]
pub(crate) struct Claim {
    pub fs: Arc<Ext4>,
    /// First block.
    pub start: FsBlock,
    /// Blocks.
    pub len: u32,
}

impl Claim {
    /// The first `len` blocks, and the rest.
    pub fn cut(mut self, len: u32) -> (Self, Self) {
        assert!(0 < len && len < self.len, "a cut inside the claim");
        let rest =
            Self { fs: self.fs.clone(), start: self.start + u64::from(len), len: self.len - len };
        self.len = len;
        (self, rest)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.len > 0 {
            self.fs.unclaim(self.start, self.len);
        }
    }
}

impl std::fmt::Debug for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Claim({} +{})", self.start, self.len)
    }
}

/// What a run of free blocks must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    /// As long as asked for, and beginning at a multiple of so many blocks.
    Aligned(u32),
    /// As long as asked for, as far as that makes a difference.
    Whole,
    /// Free.
    Any,
}

/// How long a full filesystem waits for files that are being deleted.
const DELETION_PATIENCE: Duration = Duration::from_secs(10);

/// Blocks that are more than any request takes, but for fallocate's.
const ROOMY: u64 = 16384;

/// Free space of the whole filesystem, in blocks.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// Blocks that may be claimed.
    pub free: u64,
    /// Of these, promised to delayed data and its mapping.
    pub reserved: u64,
    /// Freed by transactions that have not committed.
    pub pending: u64,
    /// Inodes that are being deleted, whose blocks become pending.
    pub deleting: u32,
    /// The runs behind `pending`, by transaction.
    freed: BTreeMap<Tid, Vec<(FsBlock, u32)>>,
}

impl Ext4 {
    /// Sums up the groups when the filesystem is mounted.
    pub(crate) fn initial_space(groups: &crate::groups::Groups) -> Mutex<Space> {
        let free = groups.list.iter().map(|g| u64::from(g.state.lock().free_blocks)).sum();
        Mutex::new(Space { free, ..Space::default() })
    }

    /// Promises `count` blocks to delayed data; root may use the reserved blocks.
    ///
    /// # Errors
    /// `ENOSPC`, after waiting for a commit when that can free blocks.
    pub(crate) fn reserve(&self, count: u64, privileged: bool) -> Result<()> {
        self.allocations.strike()?;
        let keep = if privileged { 0 } else { self.root_reserve() };
        self.reserve_beyond(keep + self.node_pool(), count)
    }

    /// Promises blocks for mapping nodes of data whose own place was allocated before: these
    /// may come from the pool, so that allocated space can always be written.
    ///
    /// # Errors
    /// As for [`Ext4::reserve`].
    pub(crate) fn reserve_nodes(&self, count: u64) -> Result<()> {
        self.reserve_beyond(0, count)
    }

    /// Blocks kept for mapping nodes (the kernel's `s_resv_clusters`): a fiftieth of the
    /// filesystem, at most 4096, where there are extents.
    pub(crate) fn node_pool(&self) -> u64 {
        let has_extents = self.sb.features().incompat.contains(Incompat::EXTENTS);
        if has_extents { (self.sb.blocks_count() / 50).min(4096) } else { 0 }
    }

    fn reserve_beyond(&self, keep: u64, count: u64) -> Result<()> {
        let begin = Instant::now();
        let mut commits = 0;
        loop {
            let (pending, deleting) = {
                let mut space = self.space.lock();
                if space.free.saturating_sub(space.reserved).saturating_sub(keep) >= count {
                    space.reserved += count;
                    return Ok(());
                }
                (space.pending > 0, space.deleting > 0)
            };
            // A file is deleted after its unlink has returned, when the kernel forgets it.
            if deleting && begin.elapsed() < DELETION_PATIENCE {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            if !pending || commits == 2 {
                break;
            }
            commits += 1;
            // Blocks freed a moment ago come back when their transaction has committed.
            self.journal.commit_all()?;
        }
        Err(Errno::ENOSPC.into())
    }

    /// Promises blocks that a dropped claim has just given back to the same user: cannot fail.
    pub(crate) fn reserve_again(&self, count: u64) {
        self.space.lock().reserved += count;
    }

    /// Gives back what [`Ext4::reserve`] promised.
    pub(crate) fn unreserve(&self, count: u64) {
        let mut space = self.space.lock();
        assert!(space.reserved >= count, "{count} blocks given back, {} reserved", space.reserved);
        space.reserved -= count;
    }

    /// Blocks kept for root and who the superblock names besides (`s_r_blocks_count`).
    pub(crate) fn root_reserve(&self) -> u64 {
        self.sb.reserved_blocks_count().min(self.sb.blocks_count())
    }

    /// Whether somebody may use these: root, `s_def_resuid`, and the group `s_def_resgid` unless
    /// that is root's. While no request for `count` blocks could come near them nobody is asked
    /// for who is not known.
    pub(crate) fn may_use_reserve(&self, ctx: &Context, count: u64) -> bool {
        if ctx.uid == Context::UNKNOWN {
            let keep = self.root_reserve() + self.node_pool() + count.max(ROOMY);
            let space = self.space.lock();
            if space.free.saturating_sub(space.reserved) > keep {
                return false;
            }
        }
        let who = ctx.known();
        let (user, group) = (self.sb.reserved_uid(), self.sb.reserved_gid());
        who.uid == 0 || who.uid == user || group != 0 && who.gid == group
    }

    /// Starts a handle for what somebody asked for: it leaves the reserved blocks alone when they
    /// are not his.
    ///
    /// # Errors
    /// As for [`Ext4::start`].
    pub(crate) fn start_for(&self, ctx: &Context, credits: u32) -> Result<Handle> {
        let handle = self.start(credits)?;
        handle.set_note(if self.may_use_reserve(ctx, 0) { 0 } else { UNPRIVILEGED });
        Ok(handle)
    }

    /// Takes a run of up to `count` free blocks near `goal`, in memory. The caller has
    /// reserved them and gives the reservation back as it takes claims.
    ///
    /// # Errors
    /// `ENOSPC` when nothing is free, or why a bitmap could not be read when nothing is free
    /// in the groups of the others.
    pub(crate) fn claim(&self, goal: FsBlock, count: u32) -> Result<Claim> {
        assert!(count > 0, "a claim of nothing");
        let fs = self.this()?;
        let (goal_group, goal_bit) = self
            .sb
            .group_and_bit(goal)
            .or_else(|| self.sb.group_and_bit(self.sb.first_data_block()))
            .ok_or_else(|| Corrupt::value("superblock", "no group holds the first data block"))?;
        // First, on a RAID, where whole stripes begin; then where the whole run fits, then
        // wherever anything is free.
        let mut unreadable = None;
        for fit in self.raid_fit(count).into_iter().chain([Fit::Whole, Fit::Any]) {
            for step in 0..self.groups_count() {
                self.trim_loaded_maps()?;
                let group = GroupNumber((goal_group.0 + step) % self.groups_count());
                let from = if step == 0 { goal_bit } else { 0 };
                match self.claim_in_group(group, from, count, fit) {
                    Ok(Some(run)) => {
                        let start = self.sb.group_first_block(group) + u64::from(run.start);
                        return Ok(Claim { fs, start, len: run.len });
                    }
                    Ok(None) => {}
                    // A bitmap that cannot be read now; other groups' can.
                    Err(error) => {
                        unreadable.get_or_insert(error);
                    }
                }
            }
        }
        Err(unreadable.unwrap_or_else(|| Errno::ENOSPC.into()))
    }

    /// How a run should lie on a RAID: one of whole stripes, or of whole chunks of one disk,
    /// begins where such a one does. The alignment is at most `count`, and that at most half
    /// a group, whatever the superblock says.
    fn raid_fit(&self, count: u32) -> Option<Fit> {
        let units = [self.sb.raid_stripe_width(), self.sb.raid_stride().into()];
        let fits = |unit: &u32| *unit > 1 && count.is_multiple_of(*unit);
        let align = units.into_iter().find(fits)?;
        (count <= self.blocks_per_group() / 2).then_some(Fit::Aligned(align))
    }

    fn claim_in_group(
        &self,
        group: GroupNumber,
        from: u32,
        count: u32,
        fit: Fit,
    ) -> Result<Option<BitRun>> {
        let mut state = self.group(group)?.state.lock();
        let enough = match fit {
            Fit::Aligned(_) => count,
            Fit::Whole => count.min(self.blocks_per_group() / 2),
            Fit::Any => 1,
        };
        // At the goal a shorter run will do.
        let longest = state.longest_run.filter(|_| from == 0).unwrap_or(u32::MAX);
        if state.bad || state.free_blocks.min(longest) < enough {
            return Ok(None);
        }
        let end = self.sb.clusters_in_group(group);
        if self.claimed_map(group, &mut state)?.is_none() {
            return Ok(None);
        }
        let GroupState { claimed: Some(map), first_free, free_blocks, .. } = &mut *state else {
            return Ok(None);
        };
        let found = match fit {
            Fit::Aligned(align) => {
                let first = self.sb.group_first_block(group).0 % u64::from(align);
                // Less than `align`.
                let place = (align, first as u32);
                find_aligned(map, from, end, count, place)
                    .or_else(|| find_aligned(map, 0, end, count, place))
            }
            Fit::Whole | Fit::Any => {
                *first_free = bitmap::find_next_zero(map, *first_free, end).unwrap_or(end);
                find_run(map, from, *first_free, end, count, fit == Fit::Whole)
            }
        };
        let Some(run) = found else { return Ok(None) };
        bitmap::set_range(map, run.start, run.len);
        if run.start == *first_free {
            *first_free = run.end();
        }
        *free_blocks -= run.len;
        self.space.lock().free -= u64::from(run.len);
        Ok(Some(run))
    }

    /// The in-memory bitmap, loaded when first needed; `None` when the group cannot be used.
    pub(crate) fn claimed_map<'s>(
        &self,
        group: GroupNumber,
        state: &'s mut MutexGuard<'_, GroupState>,
    ) -> Result<Option<&'s mut Box<[u8]>>> {
        if state.bad {
            return Ok(None);
        }
        if state.claimed.is_none() {
            let end = self.sb.clusters_in_group(group);
            match self.load_block_bitmap(group) {
                Ok(map) => {
                    let free = bitmap::count_zero(&map, end);
                    if free != state.free_blocks {
                        let detail = format!(
                            "{free} free blocks, the descriptor says {}",
                            state.free_blocks
                        );
                        let corrupt = Corrupt::value("block bitmap", detail).in_group(group);
                        self.condemn(state, corrupt.into());
                        return Ok(None);
                    }
                    state.claimed = Some(map.into_boxed_slice());
                    state.first_free = 0;
                    state.longest_run = None;
                    self.groups.loaded_maps.add(group);
                }
                Err(error @ Error::Corrupt(_)) => {
                    self.condemn(state, error);
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
        state.claimed_used = true;
        Ok(state.claimed.as_mut())
    }

    /// Takes a group whose bitmap is damaged out of use.
    fn condemn(&self, state: &mut MutexGuard<'_, GroupState>, error: Error) {
        self.space.lock().free -= u64::from(state.free_blocks);
        state.free_blocks = 0;
        state.bad = true;
        self.report(None, &error);
    }

    /// The group's block bitmap as the disk has it, or as an uninitialised group implies it.
    fn load_block_bitmap(&self, group: GroupNumber) -> Result<Vec<u8>> {
        let desc = self.desc(group)?;
        if self.is_block_uninit(&desc) {
            return Ok(self.implied_block_bitmap(group, &desc));
        }
        let buf = self.buffers.bread(desc.block_bitmap.0)?;
        let bytes = buf.read();
        if !buf.is_verified() {
            self.verify_block_bitmap(group, &desc, &bytes)?;
            buf.set_verified();
        }
        Ok(bytes.to_vec())
    }

    fn verify_block_bitmap(&self, group: GroupNumber, desc: &Desc, bytes: &[u8]) -> Result<()> {
        let full = self.desc_bytes(group)?;
        GroupDesc::new(&full[..])?
            .verify_block_bitmap(&self.sb, group, bytes)
            .map_err(|c| c.in_block(desc.block_bitmap))?;
        for (start, count) in self.own_metadata(group, desc) {
            if !bitmap::is_range_set(bytes, start, count) {
                let detail = format!("the group's own metadata at bit {start} is free");
                let corrupt = Corrupt::value("block bitmap", detail);
                return Err(corrupt.in_group(group).in_block(desc.block_bitmap).into());
            }
        }
        Ok(())
    }

    /// Whether the block bitmap on the disk has no meaning yet.
    pub(crate) fn is_block_uninit(&self, desc: &Desc) -> bool {
        self.has_group_checksums() && desc.flags.contains(GroupFlags::BLOCK_UNINIT)
    }

    /// Bits of a group's own bitmaps and inode table, as far as they lie in the group.
    fn own_metadata(&self, group: GroupNumber, desc: &Desc) -> Vec<(u32, u32)> {
        let table_blocks = self.sb.inode_table_blocks();
        [(desc.block_bitmap, 1), (desc.inode_bitmap, 1), (desc.inode_table, table_blocks)]
            .into_iter()
            .filter_map(|(start, count)| match self.sb.group_and_bit(start) {
                Some((g, bit)) if g == group => {
                    let end = self.sb.clusters_in_group(group);
                    Some((bit, count.min(end.saturating_sub(bit))))
                }
                _ => None,
            })
            .collect()
    }

    /// The bitmap of a group that was never used: its metadata is set, the rest free.
    fn implied_block_bitmap(&self, group: GroupNumber, desc: &Desc) -> Vec<u8> {
        let mut map = vec![0; self.block_size() as usize];
        bitmap::set_range(&mut map, 0, self.sb.base_meta_blocks(group));
        for (start, count) in self.own_metadata(group, desc) {
            bitmap::set_range(&mut map, start, count);
        }
        // Bits behind the group's last block stay set, as on the disk.
        let end = self.sb.clusters_in_group(group);
        bitmap::set_range(&mut map, end, self.block_size() * 8 - end);
        map
    }

    /// Gives claimed blocks back.
    fn unclaim(&self, start: FsBlock, len: u32) {
        let Some((group, bit)) = self.sb.group_and_bit(start) else { return };
        let Some(group) = self.groups.list.get(group.0 as usize) else { return };
        let mut state = group.state.lock();
        self.free_claimed(&mut state, bit, len);
    }

    /// Clears bits of the in-memory bitmap, where that is loaded.
    fn free_claimed(&self, state: &mut GroupState, bit: u32, len: u32) {
        if let Some(map) = state.claimed.as_mut() {
            bitmap::clear_range(map, bit, len);
            state.first_free = state.first_free.min(bit);
            state.free_blocks += len;
            self.space.lock().free += u64::from(len);
        }
    }

    /// Marks claimed blocks used on the disk, under a handle; they are the caller's from then on.
    pub(crate) fn mark_used(&self, handle: &Handle, mut claim: Claim) -> Result<(FsBlock, u32)> {
        let (start, len) = (claim.start, claim.len);
        let (group, bit) = self
            .sb
            .group_and_bit(start)
            .ok_or_else(|| Corrupt::value("claim", format!("block {start}")))?;
        let guard = self.group(group)?.state.lock();
        let mut desc = self.desc(group)?;
        if self.is_block_uninit(&desc) {
            self.init_block_bitmap(handle, group, &desc)?;
            desc = self.desc(group)?;
        }
        let buf = self.buffers.bread(desc.block_bitmap.0)?;
        let mut map = handle.write(&buf)?;
        if !bitmap::is_range_clear(&map, bit, len) {
            let detail = format!("blocks {start} +{len} are in use on the disk");
            return Err(Corrupt::value("block bitmap", detail).in_group(group).into());
        }
        bitmap::set_range(&mut map, bit, len);
        self.update_desc(handle, group, |d| {
            d.set_free_blocks_count(d.free_blocks_count().saturating_sub(len));
            if !mutant!("bitmap-checksum-stale") {
                d.seal_block_bitmap(&self.sb, &map);
            }
        })?;
        drop(map);
        drop(guard);
        claim.len = 0;
        Ok((start, len))
    }

    /// Writes the bitmap that an uninitialised group implies. The group lock is held.
    pub(crate) fn init_block_bitmap(
        &self,
        handle: &Handle,
        group: GroupNumber,
        desc: &Desc,
    ) -> Result<()> {
        let buf = self.buffers.getblk(desc.block_bitmap.0);
        let mut map = handle.create(&buf)?;
        map.copy_from_slice(&self.implied_block_bitmap(group, desc));
        buf.set_verified();
        let free = bitmap::count_zero(&map, self.sb.clusters_in_group(group));
        self.update_desc(handle, group, |d| {
            d.set_flags(d.flags() - GroupFlags::BLOCK_UNINIT);
            d.set_free_blocks_count(free);
            d.seal_block_bitmap(&self.sb, &map);
        })
    }

    /// Allocates one block of metadata at once.
    ///
    /// # Errors
    /// `ENOSPC`; nothing is changed then.
    pub(crate) fn new_meta_block(&self, handle: &Handle, goal: FsBlock) -> Result<FsBlock> {
        self.allocations.strike()?;
        let reserve = if handle.note() == UNPRIVILEGED { self.root_reserve() } else { 0 };
        self.new_block_beyond(self.node_pool() + reserve, handle, goal)
    }

    /// Allocates one block for a mapping node, from the pool when nothing else is left.
    ///
    /// # Errors
    /// `ENOSPC`; nothing is changed then.
    pub(crate) fn new_node_block(&self, handle: &Handle, goal: FsBlock) -> Result<FsBlock> {
        self.new_block_beyond(0, handle, goal)
    }

    fn new_block_beyond(&self, keep: u64, handle: &Handle, goal: FsBlock) -> Result<FsBlock> {
        {
            let mut space = self.space.lock();
            if space.free.saturating_sub(space.reserved) <= keep {
                return Err(Errno::ENOSPC.into());
            }
            space.reserved += 1;
        }
        let block = self.new_meta_block_reserved(handle, goal);
        self.unreserve(1);
        block
    }

    /// Allocates one block of metadata out of space that was reserved; the caller gives the
    /// reservation back.
    pub(crate) fn new_meta_block_reserved(
        &self,
        handle: &Handle,
        goal: FsBlock,
    ) -> Result<FsBlock> {
        let claim = self.claim(goal, 1)?;
        self.mark_used(handle, claim).map(|(start, _)| start)
    }

    /// Frees blocks under a handle. `meta`: their buffers are forgotten and revoked too.
    ///
    /// # Errors
    /// `Corrupt` when a block is outside the data area or already free; nothing is freed then
    /// in the group concerned.
    pub(crate) fn free_blocks(
        &self,
        handle: &Handle,
        start: FsBlock,
        count: u32,
        meta: bool,
    ) -> Result<()> {
        if !self.is_data_range(start, u64::from(count)) {
            let detail = format!("freeing {count} blocks outside the data area");
            return Err(Corrupt::value("block mapping", detail).in_block(start).into());
        }
        let (mut start, mut left) = (start, count);
        while left > 0 {
            let (group, bit) = self
                .sb
                .group_and_bit(start)
                .ok_or_else(|| Corrupt::value("block mapping", "outside the filesystem"))?;
            let here = left.min(self.sb.clusters_in_group(group) - bit);
            if meta {
                for block in 0..u64::from(here) {
                    handle.revoke(start.0 + block);
                }
            }
            self.free_in_group(handle, group, bit, here)?;
            start = start + u64::from(here);
            left -= here;
        }
        Ok(())
    }

    fn free_in_group(&self, handle: &Handle, group: GroupNumber, bit: u32, len: u32) -> Result<()> {
        self.trim_loaded_maps()?;
        let start = self.sb.group_first_block(group) + u64::from(bit);
        let mut state = self.group(group)?.state.lock();
        let desc = self.desc(group)?;
        // The in-memory bitmap is loaded first: later it would count the freed blocks as free.
        if self.claimed_map(group, &mut state)?.is_none() {
            return Err(Corrupt::value(
                "block bitmap",
                "is damaged, nothing is freed in the group",
            )
            .in_group(group)
            .into());
        }
        let buf = self.buffers.bread(desc.block_bitmap.0)?;
        let mut map = handle.write(&buf)?;
        if self.is_block_uninit(&desc) || !bitmap::is_range_set(&map, bit, len) {
            let detail = format!("blocks {start} +{len} are free already");
            return Err(Corrupt::value("block bitmap", detail).in_group(group).into());
        }
        bitmap::clear_range(&mut map, bit, len);
        self.update_desc(handle, group, |d| {
            d.set_free_blocks_count(d.free_blocks_count() + len);
            d.seal_block_bitmap(&self.sb, &map);
        })?;
        drop(map);
        if self.journal.has_journal() && !mutant!("freed-blocks-reused-early") {
            let mut space = self.space.lock();
            space.pending += u64::from(len);
            space.freed.entry(handle.tid()).or_default().push((start, len));
        } else {
            self.free_claimed(&mut state, bit, len);
        }
        Ok(())
    }

    /// A transaction has committed: what it freed may be used again.
    pub(crate) fn release_freed(&self, committed: Tid) {
        let runs: Vec<(FsBlock, u32)> = {
            let mut space = self.space.lock();
            let done: Vec<Tid> =
                space.freed.keys().copied().filter(|&tid| tid_geq(committed, tid)).collect();
            done.iter().filter_map(|tid| space.freed.remove(tid)).flatten().collect()
        };
        for (start, len) in runs {
            self.unclaim(start, len);
            self.space.lock().pending -= u64::from(len);
        }
    }

    /// Whether a run lies in the filesystem and touches no superblock, descriptor, bitmap or
    /// inode table.
    pub(crate) fn is_data_range(&self, start: FsBlock, count: u64) -> bool {
        count > 0 && self.sb.is_fs_range(start, count) && !self.system_zone.overlaps(start, count)
    }

    fn blocks_per_group(&self) -> u32 {
        self.sb.clusters_per_group()
    }
}

/// The first `count` zero bits in `from..end` that begin at a multiple of `align`, where the
/// map's first bit has the number `phase`.
fn find_aligned(
    map: &[u8],
    from: u32,
    end: u32,
    count: u32,
    (align, phase): (u32, u32),
) -> Option<BitRun> {
    bitmap::zero_runs(map, from, end).find_map(|run| {
        let start = (run.start + phase).next_multiple_of(align) - phase;
        let skipped = start - run.start;
        (run.len >= skipped && run.len - skipped >= count).then_some(BitRun { start, len: count })
    })
}

/// A run of at most `count` zero bits: at `from` when that is free, else the first one long
/// enough, else (unless `whole`) the longest. No bit below `first_free` is zero.
fn find_run(
    map: &[u8],
    from: u32,
    first_free: u32,
    end: u32,
    count: u32,
    whole: bool,
) -> Option<BitRun> {
    let trim = |run: BitRun| BitRun { start: run.start, len: run.len.min(count) };
    if let Some(run) = bitmap::next_zero_run(map, from, end.min(from.saturating_add(count)))
        && run.start == from
        && (!whole || run.len >= count.min(256))
    {
        return Some(trim(run));
    }
    let fits = bitmap::find_zero_run(map, from.max(first_free), end, count)
        .or_else(|| bitmap::find_zero_run(map, first_free, end, count));
    if fits.is_some() || whole {
        return fits;
    }
    bitmap::zero_runs(map, first_free, end).max_by_key(|run| run.len).map(trim)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// To know where nothing is free saves a search and changes none.
        #[test]
        fn a_run_is_where_it_is_said_to_be(
            bytes in proptest::collection::vec(prop_oneof![3 => Just(0xFF), 3 => Just(0), 1 => any::<u8>()], 64),
            full in 0usize..40, from in 0u32..512, count in 1u32..80, whole: bool,
        ) {
            let mut map = bytes;
            map[..full].fill(0xFF);
            let is_free = |run: BitRun| bitmap::is_range_clear(&map, run.start, run.len);
            let first_free = bitmap::find_next_zero(&map, 0, 512).unwrap_or(512);
            let run = find_run(&map, from, first_free, 512, count, whole);
            prop_assert_eq!(run, find_run(&map, from, 0, 512, count, whole));
            let starts = (from..512).chain(0..from);
            let first = starts.map(|start| BitRun { start, len: count })
                .find(|run| run.end() <= 512 && is_free(*run));
            let at_goal = bitmap::next_zero_run(&map, from, 512).filter(|run| run.start == from);
            let longest = || bitmap::zero_runs(&map, 0, 512).map(|run| run.len).max();
            match run {
                None => prop_assert!(first.is_none() && (whole || longest().is_none())),
                Some(run) if !whole && at_goal.is_some() => {
                    prop_assert!(run.start == from && at_goal.is_some_and(|goal| run.len == count.min(goal.len)));
                }
                Some(run) if first.is_some() => prop_assert_eq!(Some(run), first),
                Some(run) => {
                    prop_assert!(!whole && is_free(run));
                    prop_assert_eq!(Some(run.len), longest());
                }
            }
        }
    }
}
