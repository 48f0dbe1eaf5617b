//! FITRIM: telling the device which blocks are free.
//!
//! A run is claimed while it is discarded, so nobody writes to it meanwhile. Blocks freed by
//! a transaction that has not committed are not free here, so what a crash brings back is
//! never discarded.

use uext_blockdev::{Bio, BioOp};
use uext_ondisk::{FsBlock, GroupNumber, bitmap};
use uext_vfs::Errno;

use crate::balloc::Claim;
use crate::error::Result;
use crate::fs::Ext4;

/// Most blocks that are claimed at once.
const MOST: u32 = 8192;

impl Ext4 {
    /// Discards free runs of at least `minlen` bytes within a range of bytes; how many bytes
    /// that were.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the device cannot, `EINVAL` as the kernel's ext4.
    pub(crate) fn trim(&self, start: u64, len: u64, minlen: u64) -> Result<u64> {
        self.check_writable()?;
        if self.buffers.device().limits().max_discard_bytes == 0 {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let block_size = u64::from(self.block_size());
        let per_group = u64::from(self.sb.clusters_per_group());
        let (first, minlen) = (start / block_size, minlen.div_ceil(block_size).max(1));
        if minlen > per_group || first >= self.sb.blocks_count() || len < block_size {
            return Err(Errno::EINVAL.into());
        }
        let end = first.saturating_add(len / block_size).min(self.sb.blocks_count());
        let first = first.max(self.sb.first_data_block().0);
        let mut trimmed = 0;
        for group in self.sb.groups() {
            let base = self.sb.group_first_block(group).0;
            let stop = base + u64::from(self.sb.clusters_in_group(group));
            let (from, to) = (first.max(base), end.min(stop));
            if from < to {
                // Both lie in the group.
                let (from, to) = ((from - base) as u32, (to - base) as u32);
                trimmed += self.trim_group(group, from, to, minlen)?;
            }
        }
        Ok(trimmed * block_size)
    }

    fn trim_group(&self, group: GroupNumber, from: u32, to: u32, minlen: u64) -> Result<u64> {
        let base = self.sb.group_first_block(group);
        let (mut at, mut trimmed) = (from, 0);
        while at < to {
            let Some((start, len)) = self.next_free_run(group, at, to)? else { break };
            at = start + len;
            if u64::from(len) < minlen {
                continue;
            }
            let mut piece = start;
            while piece < at {
                let len = (at - piece).min(MOST);
                if let Some(claim) = self.claim_run(group, piece, len)? {
                    self.discard(base + u64::from(piece), len)?;
                    drop(claim);
                    trimmed += u64::from(len);
                }
                piece += len;
            }
        }
        Ok(trimmed)
    }

    fn discard(&self, start: FsBlock, len: u32) -> Result<()> {
        let bytes = u64::from(len) * u64::from(self.block_size());
        let bio = Bio::range(BioOp::Discard, self.sector_of(start), bytes);
        for bio in self.buffers.device().submit_bios_wait(vec![bio]) {
            bio.status()?;
        }
        Ok(())
    }

    /// The next free run of a group within `at..to`.
    fn next_free_run(&self, group: GroupNumber, at: u32, to: u32) -> Result<Option<(u32, u32)>> {
        self.trim_loaded_maps()?;
        let mut state = self.group(group)?.state.lock();
        if state.bad || state.free_blocks == 0 {
            return Ok(None);
        }
        let Some(map) = self.claimed_map(group, &mut state)? else { return Ok(None) };
        Ok(bitmap::next_zero_run(map, at, to).map(|run| (run.start, run.len)))
    }

    /// Claims a run that was free a moment ago; `None` when it is not any more, or is promised
    /// to data that waits for its place.
    fn claim_run(&self, group: GroupNumber, start: u32, len: u32) -> Result<Option<Claim>> {
        let fs = self.this()?;
        let mut state = self.group(group)?.state.lock();
        let Some(map) = self.claimed_map(group, &mut state)? else { return Ok(None) };
        if !bitmap::is_range_clear(map, start, len) {
            return Ok(None);
        }
        {
            let mut space = self.space.lock();
            if space.free.saturating_sub(space.reserved) < u64::from(len) {
                return Ok(None);
            }
            space.free -= u64::from(len);
        }
        bitmap::set_range(map, start, len);
        state.free_blocks -= len;
        let start = self.sb.group_first_block(group) + u64::from(start);
        Ok(Some(Claim { fs, start, len }))
    }
}
