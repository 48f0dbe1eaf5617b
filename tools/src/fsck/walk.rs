//! Walks what an inode maps: extent trees and block maps.
//!
//! The walk checks what can be judged from the nodes alone and tells the rest to
//! a visitor, which decides whether to follow a block that maps others. A
//! visitor that follows each such block at most once bounds the walk by the
//! device; the walk itself bounds only its depth.

use uext_blockdev::BlockDevice;
use uext_ondisk::extent::{ExtentNode, MAX_DEPTH, capacity};
use uext_ondisk::indirect::{DIRECT_BLOCKS, Pointers};
use uext_ondisk::inode::{InodeFlags, InodeRef};
use uext_ondisk::superblock::Superblock;

use super::problem::{At, Code};

/// What the walk needs of the filesystem, free of borrows of the context.
#[derive(Clone, Copy)]
pub struct Volume<'a> {
    dev: &'a dyn BlockDevice,
    block_size: u32,
    first_data_block: u64,
    blocks_count: u64,
    fs_seed: Option<u32>,
}

impl<'a> Volume<'a> {
    /// Of a superblock on a device.
    pub fn new(dev: &'a dyn BlockDevice, sb: &Superblock) -> Self {
        Self {
            dev,
            block_size: sb.block_size(),
            first_data_block: sb.first_data_block().0,
            blocks_count: sb.blocks_count(),
            fs_seed: sb.features().metadata_csum().then(|| sb.csum_seed()),
        }
    }

    /// Whether a block number lies in the filesystem.
    pub fn is_legal(&self, block: u64) -> bool {
        block >= self.first_data_block && block < self.blocks_count
    }

    /// A block's bytes; `None` when it cannot be read.
    pub fn read(&self, block: u64) -> Option<Vec<u8>> {
        let offset = block.checked_mul(self.block_size.into())?;
        self.dev.read_at(offset, self.block_size as usize).ok()
    }
}

/// What the walk meets.
#[derive(Debug)]
pub enum Event {
    /// A block that maps others, legal but not yet read; level 1 is next to the data.
    Map {
        /// The block.
        block: u64,
        /// Levels to the data.
        level: u8,
    },
    /// Blocks of the file that lie together, all legal.
    Run {
        /// The first block of the file.
        logical: u64,
        /// The first block of the filesystem.
        block: u64,
        /// Blocks.
        len: u64,
        /// Allocated, but not written.
        unwritten: bool,
    },
    /// Something wrong; the part it concerns is left out.
    Bad(Code, At),
}

/// What to do with a block that maps others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Read it.
    Follow,
    /// Leave it.
    Skip,
}

/// Called for each event; the answer matters for [`Event::Map`] only.
pub type Visit<'v> = &'v mut dyn FnMut(Event) -> Flow;

/// Walks an inode's extents or block map.
pub fn walk(volume: Volume<'_>, ino: u32, inode: InodeRef<'_>, extents: bool, visit: Visit<'_>) {
    if extents && inode.flags().contains(InodeFlags::EXTENTS) {
        let seed = volume.fs_seed.map(|seed| inode.csum_seed(seed, ino.into()));
        let mut walker = ExtentWalker { volume, ino, seed, next: 0, visit };
        walker.root(inode.i_block());
    } else {
        walk_block_map(volume, ino, inode, visit);
    }
}

struct ExtentWalker<'a, 'v> {
    volume: Volume<'a>,
    ino: u32,
    seed: Option<u32>,
    /// The first block of the file after the last extent met.
    next: u64,
    visit: Visit<'v>,
}

impl ExtentWalker<'_, '_> {
    fn bad(&mut self, code: Code, at: At) {
        (self.visit)(Event::Bad(code, at));
    }

    fn at(&self) -> At {
        At::ino(self.ino)
    }

    fn root(&mut self, i_block: &[u8]) {
        match sound_header(i_block) {
            Ok(node) => self.node(&node, 0, 1 << 32, 0),
            Err(text) => {
                let at = self.at().text(text);
                self.bad(Code::ExtentHeader, at);
            }
        }
    }

    /// A node that maps `start..end`; `block` is where it lies, 0 for the inode.
    fn node(&mut self, node: &ExtentNode<&[u8]>, start: u64, end: u64, block: u64) {
        if node.is_leaf() {
            for extent in node.extents() {
                self.leaf_entry(&extent, start, end);
            }
            return;
        }
        let mut last = start;
        for at in 0..node.len() {
            let Some(index) = node.index(at) else { return };
            let logical = u64::from(index.logical.0);
            let stop = node.index(at + 1).map_or(end, |next| u64::from(next.logical.0));
            if logical < last || stop <= logical || stop > end {
                let place = self.at().num(logical).blk(block);
                self.bad(Code::ExtentOrder, place);
                continue;
            }
            last = logical;
            self.descend(index.child.0, logical, stop, node.depth());
        }
    }

    fn descend(&mut self, child: u64, logical: u64, end: u64, depth: u16) {
        let place = self.at().num(logical).blk(child);
        if child == 0 || !self.volume.is_legal(child) {
            return self.bad(Code::ExtentStart, place);
        }
        let level = u8::try_from(depth).unwrap_or(u8::MAX);
        if (self.visit)(Event::Map { block: child, level }) == Flow::Skip {
            return;
        }
        let Some(bytes) = self.volume.read(child) else {
            return self.bad(Code::ReadBlock, place);
        };
        let node = match sound_header(&bytes) {
            Ok(node) if node.depth() + 1 == depth => node,
            Ok(node) => {
                let text = format!("depth {} below depth {depth}", node.depth());
                return self.bad(Code::ExtentHeader, place.text(text));
            }
            Err(text) => return self.bad(Code::ExtentHeader, place.text(text)),
        };
        if let Some(Err(error)) = self.seed.map(|seed| node.verify(seed)) {
            self.bad(Code::ExtentCsum, place.clone().text(error.detail));
        }
        match node.logical(0) {
            Some(first) if u64::from(first.0) != logical => {
                self.bad(Code::ExtentIndexStart, place.num2(first.0));
            }
            Some(_) => {}
            None => self.bad(Code::ExtentHeader, place.text("no entries")),
        }
        self.node(&node, logical, end, child);
    }

    fn leaf_entry(&mut self, extent: &uext_ondisk::extent::Extent, start: u64, end: u64) {
        let (logical, block) = (u64::from(extent.logical.0), extent.start.0);
        let len = u64::from(extent.len);
        let place = self.at().num(logical).num2(len).blk(block);
        let code = if block == 0 || !self.volume.is_legal(block) {
            Some(Code::ExtentStart)
        } else if len == 0 {
            Some(Code::ExtentLength)
        } else if logical < start || logical < self.next {
            Some(if logical < start { Code::ExtentOrder } else { Code::ExtentCollision })
        } else if extent.end() > end {
            Some(Code::ExtentOutOfParent)
        } else if !self.volume.is_legal(block.saturating_add(len - 1)) {
            Some(Code::ExtentEnd)
        } else {
            None
        };
        if let Some(code) = code {
            return self.bad(code, place);
        }
        self.next = extent.end();
        (self.visit)(Event::Run { logical, block, len, unwritten: extent.unwritten });
    }
}

/// A node whose header is sound by e2fsck's rules, or what is wrong with it.
fn sound_header(bytes: &[u8]) -> Result<ExtentNode<&[u8]>, String> {
    let node = ExtentNode::new(bytes).map_err(|error| error.detail)?;
    // A writer may keep room for two entries' worth of tail, not for more.
    if node.max() + 2 < capacity(bytes.len()) {
        return Err(format!("eh_max {} of {}", node.max(), capacity(bytes.len())));
    }
    if node.depth() > MAX_DEPTH {
        return Err(format!("depth {}", node.depth()));
    }
    Ok(node)
}

fn walk_block_map(volume: Volume<'_>, ino: u32, inode: InodeRef<'_>, visit: Visit<'_>) {
    let mut walker = MapWalker { volume, ino, visit };
    let per_block = u64::from(volume.block_size / 4);
    let (direct, roots) = inode.i_block().split_at(DIRECT_BLOCKS as usize * 4);
    // A view wants at least the inode's 15 pointers; the direct ones are its first 12.
    let Ok(all) = Pointers::new(inode.i_block()) else { return };
    walker.data(&all, direct.len() / 4, 0);
    let mut logical = u64::from(DIRECT_BLOCKS);
    let mut span = per_block;
    for (level, root) in (1u8..).zip(roots.chunks(4)) {
        let root = root.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        walker.tree(root, level, logical);
        logical = logical.saturating_add(span);
        span = span.saturating_mul(per_block);
    }
}

struct MapWalker<'a, 'v> {
    volume: Volume<'a>,
    ino: u32,
    visit: Visit<'v>,
}

impl MapWalker<'_, '_> {
    /// The first `count` pointers of a node next to the data.
    fn data<B: AsRef<[u8]>>(&mut self, pointers: &Pointers<B>, count: usize, logical: u64) {
        let mut at = 0;
        while at < count {
            let run = pointers.run(at, count - at).max(1);
            if let Some(block) = pointers.get(at) {
                self.run(logical + at as u64, block.0, run as u64);
            }
            at += run;
        }
    }

    /// A run of blocks: the legal part as one event, each of the others as a problem.
    fn run(&mut self, logical: u64, block: u64, len: u64) {
        let legal = (0..len).take_while(|&at| self.volume.is_legal(block + at)).count() as u64;
        if legal > 0 {
            (self.visit)(Event::Run { logical, block, len: legal, unwritten: false });
        }
        for at in legal..len {
            let place = At::ino(self.ino).blk(block + at).num(logical + at);
            (self.visit)(Event::Bad(Code::IllegalBlock, place));
        }
    }

    fn tree(&mut self, block: u64, level: u8, logical: u64) {
        if block == 0 {
            return;
        }
        let place = At::ino(self.ino).blk(block).num(logical);
        if !self.volume.is_legal(block) {
            (self.visit)(Event::Bad(Code::IllegalBlock, place));
            return;
        }
        if (self.visit)(Event::Map { block, level }) == Flow::Skip {
            return;
        }
        let Some(bytes) = self.volume.read(block) else {
            (self.visit)(Event::Bad(Code::ReadBlock, place));
            return;
        };
        let Ok(pointers) = Pointers::new(&bytes[..]) else { return };
        if level == 1 {
            return self.data(&pointers, pointers.len(), logical);
        }
        let per_block = u64::from(self.volume.block_size / 4);
        let span = per_block.saturating_pow(u32::from(level) - 1);
        for (at, child) in pointers.iter() {
            let first = logical.saturating_add(span.saturating_mul(at as u64));
            self.tree(child.0, level - 1, first);
        }
    }
}

/// The runs an inode maps, at most `limit` map blocks followed; `None` when
/// something is wrong with the map.
pub fn collect_runs(
    volume: Volume<'_>,
    ino: u32,
    inode: InodeRef<'_>,
    extents: bool,
) -> Option<Vec<(u64, u64, u64)>> {
    let mut runs = Vec::new();
    let mut followed = std::collections::HashSet::new();
    let mut sound = true;
    walk(volume, ino, inode, extents, &mut |event| {
        match event {
            Event::Map { block, .. } if followed.insert(block) => return Flow::Follow,
            Event::Map { .. } | Event::Bad(..) => sound = false,
            Event::Run { logical, block, len, .. } => runs.push((logical, block, len)),
        }
        Flow::Skip
    });
    sound.then_some(runs)
}
