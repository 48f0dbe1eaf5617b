//! Where the journal of a filesystem lies: the mapping of its inode, read before
//! anything else of the filesystem can be trusted.
//!
//! Invariants: reads only, straight from the device; the walk visits each mapping
//! block at most once, bounded by the blocks the journal's size allows.

use uext_blockdev::BlockDevice;
use uext_jbd2::{JournalMap, JournalRun};
use uext_ondisk::extent::{ExtentNode, NodeLimits};
use uext_ondisk::group_desc::GroupDesc;
use uext_ondisk::indirect::{Pointers, indirect_spans};
use uext_ondisk::inode::{Inode as RawView, InodeFlags};
use uext_ondisk::superblock::Superblock;
use uext_ondisk::{Corrupt, FsBlock, InodeNumber};

use crate::error::Result;

/// Reads the journal inode's mapping.
///
/// # Errors
/// `Corrupt` when the inode is no regular file or its mapping makes no sense.
pub(crate) fn journal_map(
    dev: &dyn BlockDevice,
    sb: &Superblock,
    ino: InodeNumber,
) -> Result<JournalMap> {
    let raw = read_raw_inode(dev, sb, ino)?;
    let inode = RawView::new(&raw[..])?;
    inode.verify(sb, ino)?;
    if !inode.is_regular() || inode.links_count() == 0 {
        return Err(Corrupt::value("journal inode", "is not a file in use").in_inode(ino).into());
    }
    let size = inode.size(sb.features());
    let blocks = u32::try_from(size / u64::from(sb.block_size()))
        .map_err(|_| Corrupt::value("journal inode", format!("size {size}")).in_inode(ino))?;
    let mut walk = Walk {
        dev,
        sb,
        seed: inode.csum_seed(sb.csum_seed(), ino),
        runs: Vec::new(),
        budget: blocks,
    };
    if inode.flags().contains(InodeFlags::EXTENTS) {
        walk.extents(inode.i_block(), &NodeLimits::root(sb), None)?;
    } else {
        walk.block_map(inode.i_block())?;
    }
    for run in &walk.runs {
        if !sb.is_fs_range(FsBlock(run.physical), u64::from(run.count)) {
            let corrupt = Corrupt::value("journal inode", "is mapped outside the filesystem");
            return Err(corrupt.in_inode(ino).in_block(FsBlock(run.physical)).into());
        }
    }
    walk.runs.retain(|run| run.logical < blocks);
    for run in &mut walk.runs {
        run.count = run.count.min(blocks - run.logical);
    }
    Ok(JournalMap::from_runs(walk.runs)?)
}

fn read_raw_inode(dev: &dyn BlockDevice, sb: &Superblock, ino: InodeNumber) -> Result<Vec<u8>> {
    let location = sb
        .inode_location(sb.check_inode(ino)?)
        .ok_or_else(|| Corrupt::value("inode number", ino.to_string()))?;
    let (table, offset) = sb.descriptor_at(location.group);
    let block_size = u64::from(sb.block_size());
    let at = sb.descriptor_block(table).0 * block_size + u64::from(offset);
    let bytes = dev.read_at(at, usize::from(sb.desc_size()))?;
    let desc = GroupDesc::new(&bytes[..])?;
    desc.verify(sb.desc_checksum(), location.group)?;
    desc.check(sb, location.group)?;
    let block = desc.inode_table().0 + u64::from(location.table_block);
    let at = block * block_size + u64::from(location.offset);
    Ok(dev.read_at(at, usize::from(sb.inode_size()))?)
}

struct Walk<'a> {
    dev: &'a dyn BlockDevice,
    sb: &'a Superblock,
    seed: u32,
    runs: Vec<JournalRun>,
    /// Mapping blocks that may still be read: more than the journal has blocks means a cycle.
    budget: u32,
}

impl Walk<'_> {
    fn read(&mut self, block: FsBlock) -> Result<Vec<u8>> {
        let left = self.budget.checked_sub(1);
        self.budget = left.ok_or_else(|| Corrupt::value("journal inode", "mapping is endless"))?;
        if !self.sb.is_fs_block(block) {
            return Err(Corrupt::value("journal inode", "mapping leaves the filesystem")
                .in_block(block)
                .into());
        }
        let size = self.sb.block_size();
        Ok(self.dev.read_at(block.0 * u64::from(size), size as usize)?)
    }

    fn extents(&mut self, bytes: &[u8], limits: &NodeLimits, block: Option<FsBlock>) -> Result<()> {
        let node = ExtentNode::checked(bytes, limits).map_err(|c| match block {
            Some(block) => c.in_block(block),
            None => c,
        })?;
        if node.is_leaf() {
            self.runs.extend(node.extents().map(|extent| JournalRun {
                logical: extent.logical.0,
                physical: extent.start.0,
                count: extent.len,
            }));
            return Ok(());
        }
        for (at, entry) in node.indexes().enumerate() {
            let child = self.read(entry.child)?;
            if self.sb.features().metadata_csum() {
                ExtentNode::new(&child[..])?
                    .verify(self.seed)
                    .map_err(|c| c.in_block(entry.child))?;
            }
            self.extents(&child, &limits.child(&node, at), Some(entry.child))?;
        }
        Ok(())
    }

    fn block_map(&mut self, i_block: &[u8; 60]) -> Result<()> {
        let root = Pointers::new(&i_block[..])?;
        for at in 0..12 {
            if let Some(block) = root.get(at) {
                self.push(u64::from(at as u32), block);
            }
        }
        for (level, (first, _)) in indirect_spans(self.sb.block_size()).into_iter().enumerate() {
            if let Some(block) = root.get(12 + level) {
                self.branch(block, level, first)?;
            }
        }
        Ok(())
    }

    fn branch(&mut self, block: FsBlock, level: usize, first: u64) -> Result<()> {
        let bytes = self.read(block)?;
        let pointers = Pointers::new(&bytes[..])?;
        let per_entry = (pointers.len() as u64).pow(level as u32);
        for (at, child) in pointers.iter() {
            let logical = first + at as u64 * per_entry;
            if level == 0 {
                self.push(logical, child);
            } else {
                self.branch(child, level - 1, logical)?;
            }
        }
        Ok(())
    }

    fn push(&mut self, logical: u64, physical: FsBlock) {
        let Ok(logical) = u32::try_from(logical) else { return };
        match self.runs.last_mut() {
            Some(run)
                if run.logical + run.count == logical
                    && run.physical + u64::from(run.count) == physical.0 =>
            {
                run.count += 1;
            }
            _ => self.runs.push(JournalRun { logical, physical: physical.0, count: 1 }),
        }
    }
}
