//! What the two kinds of block mapping need of the filesystem below them.
//!
//! The trees of `extents` and `indirect` are written against [`MapIo`]; [`FsMapIo`] is
//! the mounted filesystem, and tests put a map in memory in its place.
//!
//! Invariants: what changes blocks is called under `Inode::map`, exclusive, with a
//! handle; every block that is allocated or freed is counted in `i_blocks` here.

use std::cell::RefCell;

use smallvec::SmallVec;
use uext_jbd2::Handle;
use uext_ondisk::extent::{ExtentNode, NodeLimits};
use uext_ondisk::{Corrupt, FsBlock};
use uext_vfs::Errno;

use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;

/// Bytes of `i_block`.
pub(crate) const ROOT_SIZE: usize = uext_ondisk::inode::I_BLOCK_SIZE;

/// A copy of a mapping block, without an allocation for blocks of 4 KiB and less.
pub(crate) type NodeBytes = SmallVec<[u8; 4096]>;

/// Blocks of a file's mapping, and the allocator.
pub(crate) trait MapIo {
    /// Bytes per block.
    fn block_size(&self) -> u32;
    /// What a root's entries must agree with.
    fn limits(&self) -> NodeLimits;
    /// `i_block`.
    fn root(&self) -> [u8; ROOT_SIZE];
    /// Changes `i_block`; the caller's caller marks the inode dirty.
    fn set_root(&self, root: &[u8; ROOT_SIZE]);
    /// A mapping block, its checksum verified.
    fn read_node(&self, block: FsBlock) -> Result<NodeBytes>;
    /// Replaces a mapping block; the checksum is made here.
    fn write_node(&self, block: FsBlock, bytes: &mut [u8]) -> Result<()>;
    /// Gives a newly allocated mapping block its contents.
    fn create_node(&self, block: FsBlock, bytes: &mut [u8]) -> Result<()>;
    /// Allocates a mapping block.
    ///
    /// # Errors
    /// `ENOSPC`; nothing is changed then.
    fn alloc_node(&self, goal: FsBlock) -> Result<FsBlock>;
    /// Frees a mapping block.
    fn free_node(&self, block: FsBlock) -> Result<()>;
    /// Frees data blocks.
    fn free_data(&self, start: FsBlock, len: u32) -> Result<()>;
    /// Checks that a run may hold a file's data or mapping.
    fn check_run(&self, start: FsBlock, len: u32) -> Result<()>;
    /// The group of a block, for counting credits.
    fn group_of(&self, block: FsBlock) -> u32;
    /// Adds what is known of the place to a finding.
    fn place(&self, corrupt: Corrupt, block: Option<FsBlock>) -> Error;
}

/// How much a step of removal may touch, so that it fits its handle: groups of which bitmap
/// and descriptor change, and blocks, each of which is revoked.
#[derive(Clone)]
pub(crate) struct Budget {
    groups: Vec<u32>,
    most: usize,
    blocks: u32,
}

impl Budget {
    /// For `most` groups.
    pub fn new(most: usize) -> Self {
        Self { groups: Vec::with_capacity(most), most, blocks: u32::MAX }
    }

    /// As [`Budget::new`], and for at most `blocks` blocks.
    pub fn with_blocks(most: usize, blocks: u32) -> Self {
        Self { blocks, ..Self::new(most) }
    }

    /// Takes a run of data blocks that is freed from its end on: how many of its blocks fit.
    pub fn take(&mut self, io: &impl MapIo, start: FsBlock, len: u32) -> u32 {
        // What is beyond the blocks that may go is at the start of the run.
        let skip = len.saturating_sub(self.blocks);
        let (start, len) = (start + u64::from(skip), len - skip);
        let mut taken = 0;
        while taken < len {
            // The last block that is left, and the part of the run in its group.
            let last = start.0 + u64::from(len - taken) - 1;
            let group = io.group_of(FsBlock(last));
            if !self.groups.contains(&group) {
                if self.groups.len() >= self.most {
                    break;
                }
                self.groups.push(group);
            }
            let mut low = start.0;
            // Groups are contiguous, so the first block of this one is found by halving.
            let mut high = last;
            while low < high {
                let middle = u64::midpoint(low, high);
                if io.group_of(FsBlock(middle)) == group { high = middle } else { low = middle + 1 }
            }
            taken += u32::try_from(last - low + 1).unwrap_or(u32::MAX);
        }
        self.blocks -= taken;
        taken
    }
}

/// The mapping of an inode of the mounted filesystem.
pub(crate) struct FsMapIo<'a> {
    fs: &'a Ext4,
    inode: &'a Inode,
    handle: Option<&'a Handle>,
    extents: bool,
    /// Blocks reserved for mapping nodes that may be used up.
    reserved: RefCell<u64>,
}

impl<'a> FsMapIo<'a> {
    /// To look only.
    pub fn reader(fs: &'a Ext4, inode: &'a Inode) -> Self {
        let extents = inode.core.lock().is_extents();
        Self { fs, inode, handle: None, extents, reserved: RefCell::new(0) }
    }

    /// To change; nodes come out of `reserved` blocks first, which the caller gives back as far
    /// as they are used (see [`FsMapIo::reserved_left`]).
    pub fn writer(fs: &'a Ext4, inode: &'a Inode, handle: &'a Handle, reserved: u64) -> Self {
        let reserved = RefCell::new(reserved);
        Self { handle: Some(handle), reserved, ..Self::reader(fs, inode) }
    }

    /// Whether the mapping is an extent tree.
    pub fn is_extents(&self) -> bool {
        self.extents
    }

    /// Reserved blocks that were not used.
    pub fn reserved_left(&self) -> u64 {
        *self.reserved.borrow()
    }

    fn handle(&self) -> Result<&'a Handle> {
        self.handle.ok_or(Error::Errno(Errno::EROFS))
    }

    /// Sectors of `count` blocks, the unit of `i_blocks`.
    fn sectors(&self, count: u32) -> u64 {
        u64::from(count) * u64::from(self.fs.block_size() / 512)
    }

    /// Counts blocks that became the inode's.
    pub fn add_blocks(&self, count: u32) {
        self.inode.core.lock().blocks += self.sectors(count);
    }

    fn sub_blocks(&self, count: u32) {
        let sectors = self.sectors(count);
        let mut core = self.inode.core.lock();
        let left = core.blocks.checked_sub(sectors);
        core.blocks = left.unwrap_or(0);
        drop(core);
        if left.is_none() {
            let corrupt = Corrupt::value("inode", "i_blocks is less than the blocks it maps");
            self.fs.report(Some(self.inode.ino), &self.place(corrupt, None));
        }
    }

    fn seal(&self, bytes: &mut [u8]) {
        if self.extents
            && self.fs.sb.features().metadata_csum()
            && let Ok(mut node) = ExtentNode::new(bytes)
        {
            node.seal(self.inode.csum_seed);
        }
    }
}

impl MapIo for FsMapIo<'_> {
    fn block_size(&self) -> u32 {
        self.fs.block_size()
    }

    fn limits(&self) -> NodeLimits {
        NodeLimits::root(&self.fs.sb)
    }

    fn root(&self) -> [u8; ROOT_SIZE] {
        self.inode.core.lock().i_block
    }

    fn set_root(&self, root: &[u8; ROOT_SIZE]) {
        self.inode.core.lock().i_block = *root;
    }

    fn read_node(&self, block: FsBlock) -> Result<NodeBytes> {
        self.check_run(block, 1)?;
        let buf = self.fs.buffers.bread(block.0)?;
        let bytes = buf.read();
        if self.extents && !buf.is_verified() && self.fs.sb.features().metadata_csum() {
            ExtentNode::new(&bytes[..])
                .and_then(|node| node.verify(self.inode.csum_seed))
                .map_err(|c| self.place(c, Some(block)))?;
            buf.set_verified();
        }
        Ok(NodeBytes::from_slice(&bytes))
    }

    fn write_node(&self, block: FsBlock, bytes: &mut [u8]) -> Result<()> {
        self.seal(bytes);
        let buf = self.fs.buffers.bread(block.0)?;
        self.handle()?.write(&buf)?.copy_from_slice(bytes);
        Ok(())
    }

    fn create_node(&self, block: FsBlock, bytes: &mut [u8]) -> Result<()> {
        self.seal(bytes);
        let buf = self.fs.buffers.getblk(block.0);
        self.handle()?.create(&buf)?.copy_from_slice(bytes);
        buf.set_verified();
        Ok(())
    }

    fn alloc_node(&self, goal: FsBlock) -> Result<FsBlock> {
        let handle = self.handle()?;
        let mut reserved = self.reserved.borrow_mut();
        let block = if *reserved > 0 {
            let block = self.fs.new_meta_block_reserved(handle, goal)?;
            self.fs.unreserve(1);
            *reserved -= 1;
            block
        } else {
            self.fs.new_node_block(handle, goal)?
        };
        self.add_blocks(1);
        Ok(block)
    }

    fn free_node(&self, block: FsBlock) -> Result<()> {
        self.fs.free_blocks(self.handle()?, block, 1, true)?;
        self.sub_blocks(1);
        Ok(())
    }

    fn free_data(&self, start: FsBlock, len: u32) -> Result<()> {
        let meta = self.fs.is_logged(self.inode);
        self.fs.free_blocks(self.handle()?, start, len, meta)?;
        self.sub_blocks(len);
        Ok(())
    }

    fn check_run(&self, start: FsBlock, len: u32) -> Result<()> {
        if self.fs.is_data_range(start, u64::from(len)) {
            return Ok(());
        }
        let corrupt = Corrupt::value("block mapping", format!("{len} blocks that hold metadata"));
        Err(self.place(corrupt, Some(start)))
    }

    fn group_of(&self, block: FsBlock) -> u32 {
        self.fs.sb.group_of_block(block).map_or(u32::MAX, |group| group.0)
    }

    fn place(&self, corrupt: Corrupt, block: Option<FsBlock>) -> Error {
        let corrupt = corrupt.in_inode(self.inode.ino);
        block.map_or(corrupt.clone(), |block| corrupt.in_block(block)).into()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    //! A mapping in memory, for the models of `extents` and `indirect`.

    use super::*;
    use std::cell::Cell;
    use std::collections::{BTreeMap, BTreeSet};

    /// Blocks below this are data, which the tests number as they like.
    pub(crate) const FIRST_NODE: u64 = 1 << 30;

    pub(crate) struct MemIo {
        pub block_size: u32,
        pub root: Cell<[u8; ROOT_SIZE]>,
        pub nodes: RefCell<BTreeMap<u64, Vec<u8>>>,
        /// Data blocks that were freed.
        pub freed: RefCell<BTreeSet<u64>>,
        pub next_node: Cell<u64>,
        /// Nodes that may still be allocated.
        pub room: Cell<u64>,
    }

    impl MemIo {
        pub fn new(block_size: u32, root: [u8; ROOT_SIZE]) -> Self {
            Self {
                block_size,
                root: Cell::new(root),
                nodes: RefCell::default(),
                freed: RefCell::default(),
                next_node: Cell::new(FIRST_NODE),
                room: Cell::new(u64::MAX),
            }
        }
    }

    impl MapIo for MemIo {
        fn block_size(&self) -> u32 {
            self.block_size
        }
        fn limits(&self) -> NodeLimits {
            NodeLimits {
                depth: None,
                first_logical: None,
                end_logical: None,
                fs_start: FsBlock(1),
                fs_end: FsBlock(1 << 31),
            }
        }
        fn root(&self) -> [u8; ROOT_SIZE] {
            self.root.get()
        }
        fn set_root(&self, root: &[u8; ROOT_SIZE]) {
            self.root.set(*root);
        }
        fn read_node(&self, block: FsBlock) -> Result<NodeBytes> {
            let nodes = self.nodes.borrow();
            let node = nodes.get(&block.0).ok_or(Error::Errno(Errno::EIO))?;
            Ok(NodeBytes::from_slice(node))
        }
        fn write_node(&self, block: FsBlock, bytes: &mut [u8]) -> Result<()> {
            let old = self.nodes.borrow_mut().insert(block.0, bytes.to_vec());
            assert!(old.is_some(), "a node is written that does not exist");
            Ok(())
        }
        fn create_node(&self, block: FsBlock, bytes: &mut [u8]) -> Result<()> {
            let old = self.nodes.borrow_mut().insert(block.0, bytes.to_vec());
            assert!(old.is_none(), "a node is created twice");
            Ok(())
        }
        fn alloc_node(&self, _goal: FsBlock) -> Result<FsBlock> {
            let room = self.room.get().checked_sub(1).ok_or(Error::Errno(Errno::ENOSPC))?;
            self.room.set(room);
            let block = self.next_node.get();
            self.next_node.set(block + 1);
            Ok(FsBlock(block))
        }
        fn free_node(&self, block: FsBlock) -> Result<()> {
            assert!(self.nodes.borrow_mut().remove(&block.0).is_some(), "a node is freed twice");
            Ok(())
        }
        fn free_data(&self, start: FsBlock, len: u32) -> Result<()> {
            for block in start.0..start.0 + u64::from(len) {
                assert!(self.freed.borrow_mut().insert(block), "data is freed twice");
            }
            Ok(())
        }
        fn check_run(&self, _start: FsBlock, _len: u32) -> Result<()> {
            Ok(())
        }
        fn group_of(&self, block: FsBlock) -> u32 {
            (block.0 / 8192) as u32
        }
        fn place(&self, corrupt: Corrupt, _block: Option<FsBlock>) -> Error {
            corrupt.into()
        }
    }

    #[test]
    fn a_budget_takes_whole_groups_from_the_end_of_a_run() {
        let io = MemIo::new(1024, [0; ROOT_SIZE]);
        let mut budget = Budget::new(2);
        assert_eq!(budget.take(&io, FsBlock(8000), 100), 100);
        assert_eq!(budget.take(&io, FsBlock(8100), 10), 10);
        assert_eq!(budget.take(&io, FsBlock(16000), 20_000), 20_000 - (4 * 8192 - 16000));
        assert_eq!(budget.take(&io, FsBlock(16000), 100), 0);
        let mut budget = Budget::new(2);
        let groups = 3 * 8192;
        assert_eq!(budget.take(&io, FsBlock(0), groups as u32 + 5), 8192 + 5);
    }
}
