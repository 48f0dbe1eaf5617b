//! Inodes that fast commits touch, and what they map.
//!
//! Invariants: an inode is read once, with all it maps, each block of its tree at most once; the
//! extents of a file do not overlap.

use std::collections::{BTreeMap, HashSet};

use uext_ondisk::extent::{Extent, ExtentIndex, ExtentNode, MAX_DEPTH, NodeLimits, capacity};
use uext_ondisk::indirect::{DIRECT_BLOCKS, Pointers};
use uext_ondisk::inode::{FileType, Inode, InodeFlags};
use uext_ondisk::{Corrupt, FsBlock, InodeNumber, LogicalBlock};

use super::{Replay, unsupported};
use crate::error::Result;

/// A file's inode and blocks.
pub(super) struct File {
    /// The inode as it is now, its checksum not yet computed.
    pub(super) bytes: Vec<u8>,
    /// The inode before the first record, when it was in use.
    pub(super) base: Option<Vec<u8>>,
    /// Somebody can still reach it.
    pub(super) live: bool,
    /// What an extent tree maps, by first logical block; `None` for everything else.
    pub(super) extents: Option<BTreeMap<u32, Extent>>,
    /// The tree's blocks below the root.
    pub(super) nodes: Vec<FsBlock>,
    /// Everything it owned before, the tree included.
    pub(super) owned: Vec<(u64, u64)>,
    /// `extents` changed.
    pub(super) remapped: bool,
    /// A record changed the inode.
    pub(super) dirty: bool,
}

impl File {
    pub(super) fn inode(&self) -> Inode<&[u8]> {
        Inode::new(&self.bytes[..]).expect("inodes have the superblock's inode size")
    }

    pub(super) fn inode_mut(&mut self) -> Inode<&mut [u8]> {
        self.dirty = true;
        Inode::new(&mut self.bytes[..]).expect("inodes have the superblock's inode size")
    }

    /// Forgets what a deleted inode was: its number is used again.
    pub(super) fn reset(&mut self) {
        self.bytes.fill(0);
        self.extents = None;
        self.nodes.clear();
        self.remapped = true;
    }

    /// Where a block of the file lies.
    pub(super) fn map(&self, logical: LogicalBlock) -> Option<FsBlock> {
        let (_, extent) = self.extents.as_ref()?.range(..=logical.0).next_back()?;
        extent.map(logical)
    }

    /// Unmaps `first..end`.
    pub(super) fn unmap(&mut self, first: u64, end: u64) {
        let Some(extents) = &mut self.extents else { return };
        self.remapped = true;
        self.dirty = true;
        let from = u32::try_from(first).unwrap_or(u32::MAX);
        // The extent that begins before the range may reach into it.
        let before = extents.range(..from).next_back().map(|(&at, _)| at);
        let inside = extents.range(from..).map(|(&at, _)| at);
        let touched: Vec<u32> =
            before.into_iter().chain(inside.take_while(|&at| u64::from(at) < end)).collect();
        for at in touched {
            let Some(extent) = extents.remove(&at) else { continue };
            let start = u64::from(at);
            for (from, to) in [(start, extent.end().min(first)), (end.max(start), extent.end())] {
                if from < to {
                    let skip = from - start;
                    // Parts of an extent, whose numbers fit.
                    let logical = LogicalBlock(u32::try_from(from).unwrap_or(u32::MAX));
                    let len = u32::try_from(to - from).unwrap_or(extent.len);
                    let start = extent.start + skip;
                    extents.insert(logical.0, Extent { logical, len, start, ..extent });
                }
            }
        }
    }

    /// The extents, neighbours joined.
    fn merged(&self) -> Vec<Extent> {
        let mut merged: Vec<Extent> = Vec::new();
        for extent in self.extents.iter().flat_map(BTreeMap::values) {
            match merged.last_mut() {
                Some(last) if last.can_merge(extent) => last.len += extent.len,
                _ => merged.push(*extent),
            }
        }
        merged
    }

    /// Blocks of data.
    pub(super) fn data_blocks(&self) -> u64 {
        self.extents.iter().flat_map(BTreeMap::values).map(|extent| u64::from(extent.len)).sum()
    }

    /// Everything it owns now.
    pub(super) fn owns(&self) -> Vec<(u64, u64)> {
        let data = self.extents.iter().flat_map(BTreeMap::values);
        let data = data.map(|extent| (extent.start.0, u64::from(extent.len)));
        data.chain(self.nodes.iter().map(|node| (node.0, 1))).collect()
    }
}

impl Replay<'_> {
    /// The inode's block in the table and its offset there.
    pub(super) fn inode_place(&mut self, ino: InodeNumber) -> Result<(FsBlock, usize)> {
        let place = self.sb.check_inode(ino).map(|ino| self.sb.inode_location(ino))?;
        let place = place.ok_or_else(|| Corrupt::value("inode number", ino.to_string()))?;
        let table = self.groups.inode_table(&mut self.view, &self.sb, place.group)?;
        Ok((table + u64::from(place.table_block), place.offset as usize))
    }

    pub(super) fn read_inode(&mut self, ino: InodeNumber) -> Result<Vec<u8>> {
        let (block, offset) = self.inode_place(ino)?;
        let size = usize::from(self.sb.inode_size());
        let bytes = self.view.read(block)?;
        Ok(bytes.get(offset..offset + size).unwrap_or_default().to_vec())
    }

    /// Reads an inode and what it maps, unless that was done.
    pub(super) fn load(&mut self, ino: InodeNumber) -> Result<&mut File> {
        if !self.files.contains_key(&ino) {
            let file = self.read_file(ino)?;
            self.files.insert(ino, file);
        }
        Ok(self.files.get_mut(&ino).expect("just found or read"))
    }

    fn read_file(&mut self, ino: InodeNumber) -> Result<File> {
        let in_use = self.groups.inode_in_use(&mut self.view, &self.sb, ino)?;
        let bytes = self.read_inode(ino)?;
        let mut file = File {
            base: in_use.then(|| bytes.clone()),
            bytes,
            live: false,
            extents: None,
            nodes: Vec::new(),
            owned: Vec::new(),
            remapped: false,
            dirty: false,
        };
        if !in_use {
            file.bytes.fill(0);
            return Ok(file);
        }
        let inode = Inode::new(&file.bytes[..])?;
        inode.verify(&self.sb, ino)?;
        file.live = inode.links_count() > 0 || self.orphans.contains(&ino);
        let maps = match inode.file_type() {
            Some(FileType::Regular | FileType::Directory) => true,
            Some(FileType::Symlink) => inode.flags().contains(InodeFlags::EXTENTS),
            _ => false,
        };
        if !maps {
            return Ok(file);
        }
        if inode.flags().intersects(InodeFlags::INLINE_DATA | InodeFlags::ENCRYPT) {
            return Err(unsupported(ino, "has inline data or is encrypted"));
        }
        let mut walk = Walk { seen: HashSet::new(), extents: BTreeMap::new(), owned: Vec::new() };
        let seed = inode.csum_seed(self.sb.csum_seed(), ino);
        if inode.flags().contains(InodeFlags::EXTENTS) {
            let root = *inode.i_block();
            self.walk_extents(&mut walk, &root, &NodeLimits::root(&self.sb), seed)
                .map_err(|error| in_inode(error, ino))?;
            file.nodes = walk.seen.iter().copied().collect();
            file.nodes.sort_unstable();
            file.extents = Some(walk.extents);
            file.owned = file.owns();
        } else {
            let root = *inode.i_block();
            self.walk_map(&mut walk, &root).map_err(|error| in_inode(error, ino))?;
            file.owned = walk.owned;
        }
        Ok(file)
    }

    /// A block of a tree that was not met before.
    fn read_node(&mut self, walk: &mut Walk, block: FsBlock) -> Result<Vec<u8>> {
        if !self.sb.is_fs_block(block) || !walk.seen.insert(block) {
            let detail = "leaves the filesystem or meets a block twice";
            return Err(Corrupt::value("block map", detail).in_block(block).into());
        }
        self.view.read(block)
    }

    fn walk_extents(
        &mut self,
        walk: &mut Walk,
        bytes: &[u8],
        limits: &NodeLimits,
        seed: u32,
    ) -> Result<()> {
        let node = ExtentNode::checked(bytes, limits)?;
        if node.is_leaf() {
            walk.extents.extend(node.extents().map(|extent| (extent.logical.0, extent)));
            return Ok(());
        }
        for (at, entry) in node.indexes().enumerate() {
            let child = self.read_node(walk, entry.child)?;
            if self.sb.features().metadata_csum() {
                ExtentNode::new(&child[..])?.verify(seed).map_err(|c| c.in_block(entry.child))?;
            }
            self.walk_extents(walk, &child, &limits.child(&node, at), seed)?;
        }
        Ok(())
    }

    /// What a file with a block map owns: it can be deleted, not changed.
    fn walk_map(&mut self, walk: &mut Walk, i_block: &[u8; 60]) -> Result<()> {
        let root: Vec<_> = Pointers::new(&i_block[..])?.iter().collect();
        for (at, block) in root {
            let level = u32::try_from(at).unwrap_or(0).saturating_sub(DIRECT_BLOCKS - 1);
            self.walk_branch(walk, block, level)?;
        }
        Ok(())
    }

    fn walk_branch(&mut self, walk: &mut Walk, block: FsBlock, level: u32) -> Result<()> {
        walk.owned.push((block.0, 1));
        if level == 0 {
            return Ok(());
        }
        let bytes = self.read_node(walk, block)?;
        let children: Vec<_> = Pointers::new(&bytes[..])?.iter().collect();
        for (_, child) in children {
            self.walk_branch(walk, child, level - 1)?;
        }
        Ok(())
    }

    /// Writes a file's extents into a tree: the blocks it had first, then new ones.
    pub(super) fn build_tree(&mut self, ino: InodeNumber) -> Result<()> {
        let Some(file) = self.files.get(&ino) else { return Ok(()) };
        let seed = file.inode().csum_seed(self.sb.csum_seed(), ino);
        let mut spare = file.nodes.clone();
        spare.reverse();
        let mut nodes = Vec::new();
        let mut root = [0u8; 60];
        let mut level = Level::Leaf(file.merged());
        for depth in 0..=MAX_DEPTH {
            if level.len() <= capacity(root.len()) {
                level.fill(&mut ExtentNode::init(&mut root[..], depth));
                let file = self.load(ino)?;
                *file.inode_mut().i_block_mut() = root;
                file.nodes = nodes;
                return Ok(());
            }
            let size = self.sb.block_size() as usize;
            let mut above = Vec::new();
            for part in level.parts(capacity(size)) {
                let block = match spare.pop() {
                    Some(block) => block,
                    None => self.allocate_near(ino)?,
                };
                let mut bytes = vec![0; size];
                let mut node = ExtentNode::init(&mut bytes[..], depth);
                part.fill(&mut node);
                if self.sb.features().metadata_csum() {
                    node.seal(seed);
                }
                self.view.write(block, bytes);
                nodes.push(block);
                above.push(ExtentIndex { logical: part.first(), child: block });
            }
            level = Level::Index(above);
        }
        Err(unsupported(ino, "has more extents than a tree holds"))
    }

    /// A block near an inode.
    pub(super) fn allocate_near(&mut self, ino: InodeNumber) -> Result<FsBlock> {
        let group = self.sb.inode_location(ino).map(|place| place.group).unwrap_or_default();
        self.groups.allocate(&mut self.view, &self.sb, group)
    }
}

/// What a walk has met.
struct Walk {
    seen: HashSet<FsBlock>,
    extents: BTreeMap<u32, Extent>,
    owned: Vec<(u64, u64)>,
}

/// The entries of one level of a tree.
enum Level {
    Leaf(Vec<Extent>),
    Index(Vec<ExtentIndex>),
}

impl Level {
    fn len(&self) -> usize {
        match self {
            Self::Leaf(extents) => extents.len(),
            Self::Index(entries) => entries.len(),
        }
    }

    /// Pieces that fill a node each.
    fn parts(&self, most: usize) -> Vec<Self> {
        match self {
            Self::Leaf(all) => all.chunks(most).map(|part| Self::Leaf(part.to_vec())).collect(),
            Self::Index(all) => all.chunks(most).map(|part| Self::Index(part.to_vec())).collect(),
        }
    }

    fn first(&self) -> LogicalBlock {
        match self {
            Self::Leaf(all) => all.first().map(|extent| extent.logical),
            Self::Index(all) => all.first().map(|entry| entry.logical),
        }
        .unwrap_or_default()
    }

    /// Writes all entries into an empty node that has room.
    fn fill(&self, node: &mut ExtentNode<&mut [u8]>) {
        let full = "the node was made for these entries";
        match self {
            Self::Leaf(all) => {
                for (at, extent) in all.iter().enumerate() {
                    node.insert_extent(at, *extent).expect(full);
                }
            }
            Self::Index(all) => {
                for (at, entry) in all.iter().enumerate() {
                    node.insert_index(at, *entry).expect(full);
                }
            }
        }
    }
}

fn in_inode(error: crate::error::JournalError, ino: InodeNumber) -> crate::error::JournalError {
    match error {
        crate::error::JournalError::Corrupt(corrupt) => corrupt.in_inode(ino).into(),
        other => other,
    }
}
