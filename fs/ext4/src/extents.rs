//! Extent trees: finding, inserting and converting.
//!
//! Source: Documentation/filesystems/ext4/ifork.rst.
//!
//! Invariants:
//! - Every node that is not the root has entries, and the entry that leads to it names
//!   the first block of the file it maps, exactly.
//! - All leaves lie at one depth, at most five levels below the root.
//! - A change makes room first (which may fail with `ENOSPC`, and leaves a valid tree) and
//!   changes the leaf last (which cannot).
//!
//! Locks: `Inode::map`, shared to look, exclusive to change.

use smallvec::SmallVec;
use uext_ondisk::extent::{
    Extent, ExtentIndex, ExtentNode, MAX_DEPTH, MAX_UNWRITTEN_LEN, MAX_WRITTEN_LEN, capacity,
};
use uext_ondisk::{Corrupt, FsBlock, LogicalBlock};

use crate::error::Result;
use crate::map_blocks::Mapping;
use crate::map_io::{MapIo, NodeBytes, ROOT_SIZE};

/// The first block of a file that no extent may reach (`EXT_MAX_BLOCKS`).
pub(crate) const MAX_BLOCKS: u32 = u32::MAX;

/// A node on the way from the root to a leaf.
pub(crate) struct Level {
    /// Where it lies; `None` for the root.
    pub block: Option<FsBlock>,
    /// Its contents.
    pub node: ExtentNode<NodeBytes>,
    /// In an index node the entry the way goes by; in a leaf how many extents start at or
    /// before the block that was looked for.
    pub at: usize,
}

/// The way from the root to the leaf that maps, or would map, a block of the file.
pub(crate) struct Path {
    /// Root first; never empty.
    pub levels: SmallVec<[Level; 3]>,
    /// The first block of the file after what the leaf may map.
    pub limit: u32,
}

impl Path {
    /// Reads the way to `logical`, every node checked.
    pub fn find(io: &impl MapIo, logical: u32) -> Result<Self> {
        let mut limits = io.limits();
        let mut bytes = NodeBytes::from_slice(&io.root());
        let mut block = None;
        let mut levels = SmallVec::new();
        loop {
            let node = ExtentNode::new(bytes).map_err(|c| io.place(c, block))?;
            node.check(&limits).map_err(|c| io.place(c, block))?;
            let found = node.search(LogicalBlock(logical));
            if node.is_leaf() {
                let at = found.map_or(0, |at| at + 1);
                let limit = limits.end_logical.map_or(MAX_BLOCKS, |end| end.0);
                levels.push(Level { block, node, at });
                return Ok(Self { levels, limit });
            }
            let at = found.unwrap_or(0);
            limits = limits.child(&node, at);
            let Some(entry) = node.index(at) else {
                return Err(io.place(Corrupt::value("extent node", "no entries"), block));
            };
            bytes = io.read_node(entry.child)?;
            levels.push(Level { block, node, at });
            block = Some(entry.child);
        }
    }

    /// The leaf.
    pub fn leaf(&mut self) -> &mut Level {
        self.levels.last_mut().expect("a path has a leaf")
    }

    fn depth(&self) -> usize {
        self.levels.len() - 1
    }

    /// Writes the node of a level.
    pub fn store(&mut self, io: &impl MapIo, level: usize) -> Result<()> {
        let Level { block, node, .. } = &self.levels[level];
        let mut bytes = NodeBytes::from_slice(node.bytes());
        match block {
            Some(block) => io.write_node(*block, &mut bytes),
            None => {
                let mut root = [0; ROOT_SIZE];
                root.copy_from_slice(&bytes);
                io.set_root(&root);
                Ok(())
            }
        }
    }

    /// Writes the leaf, and the entries that lead to it where its first block changed.
    pub fn store_leaf(&mut self, io: &impl MapIo) -> Result<()> {
        let depth = self.depth();
        self.store(io, depth)?;
        self.fix_keys(io, depth)
    }

    /// Makes the entries above `level` name its node's first block.
    pub fn fix_keys(&mut self, io: &impl MapIo, level: usize) -> Result<()> {
        for level in (1..=level).rev() {
            let Some(first) = self.levels[level].node.logical(0) else { break };
            let Level { node, at, .. } = &mut self.levels[level - 1];
            if node.logical(*at) == Some(first) {
                break;
            }
            node.set_logical(*at, first);
            self.store(io, level - 1)?;
        }
        Ok(())
    }
}

/// The extents of a file that has them all in its inode, as most files have: a [`Path`] without
/// the memory for blocks, which is dear to move about.
pub(crate) struct RootLeaf {
    pub node: ExtentNode<[u8; ROOT_SIZE]>,
    /// As [`Level::at`].
    pub at: usize,
}

impl RootLeaf {
    /// The root, checked, when it is a leaf.
    pub fn find(io: &impl MapIo, logical: u32) -> Result<Option<Self>> {
        let place = |c| io.place(c, None);
        let node = ExtentNode::new(io.root()).map_err(place)?;
        if !node.is_leaf() {
            return Ok(None);
        }
        node.check(&io.limits()).map_err(place)?;
        let at = node.search(LogicalBlock(logical)).map_or(0, |at| at + 1);
        Ok(Some(Self { node, at }))
    }

    /// Writes the root.
    pub fn store(mut self, io: &impl MapIo) {
        if self.node.is_empty() {
            self.node = ExtentNode::init([0; ROOT_SIZE], 0);
        }
        let mut root = [0; ROOT_SIZE];
        root.copy_from_slice(self.node.bytes());
        io.set_root(&root);
    }
}

/// An empty root for a new file.
#[cfg(test)]
pub(crate) fn empty_root() -> [u8; ROOT_SIZE] {
    let mut root = [0; ROOT_SIZE];
    ExtentNode::init(&mut root[..], 0);
    root
}

/// Levels below the root: 0 when the extents are in the inode.
pub(crate) fn tree_depth(io: &impl MapIo) -> Result<(u16, usize)> {
    let root = io.root();
    let node = ExtentNode::new(&root[..]).map_err(|c| io.place(c, None))?;
    Ok((node.depth(), node.len()))
}

/// Where the blocks from `logical` on lie, as far as one extent or hole goes.
pub(crate) fn lookup(io: &impl MapIo, logical: u32) -> Result<Mapping> {
    if let Some(RootLeaf { node, at }) = RootLeaf::find(io, logical)? {
        return mapping_of(io, &node, at, MAX_BLOCKS, logical);
    }
    let mut path = Path::find(io, logical)?;
    let limit = path.limit;
    let Level { node, at, .. } = path.leaf();
    mapping_of(io, node, *at, limit, logical)
}

/// What a leaf says of `logical`; `at` of its extents begin there or before it.
fn mapping_of<B: AsRef<[u8]>>(
    io: &impl MapIo,
    node: &ExtentNode<B>,
    at: usize,
    limit: u32,
    logical: u32,
) -> Result<Mapping> {
    if let Some(extent) = at.checked_sub(1).and_then(|at| node.extent(at))
        && let Some(start) = extent.map(LogicalBlock(logical))
    {
        let len = extent.len - (logical - extent.logical.0);
        io.check_run(start, len)?;
        return Ok(Mapping { start: Some(start), len, unwritten: extent.unwritten });
    }
    let next = node.logical(at).map_or(limit, |next| next.0);
    Ok(Mapping::hole(next.saturating_sub(logical).max(1)))
}

/// Where to look for blocks for `logical`: after the extent before it.
pub(crate) fn goal(io: &impl MapIo, logical: u32) -> Result<Option<FsBlock>> {
    let after = |extent: Extent| {
        // A file written with gaps keeps them, so that filling them makes it contiguous.
        let gap = u64::from(logical) - u64::from(extent.logical.0);
        extent.start + gap.min(u64::from(MAX_WRITTEN_LEN))
    };
    if let Some(RootLeaf { node, at }) = RootLeaf::find(io, logical)? {
        return Ok(at.checked_sub(1).and_then(|at| node.extent(at)).map(after));
    }
    let mut path = Path::find(io, logical)?;
    let depth = path.depth();
    let parent = path.levels[depth].block;
    let Level { node, at, .. } = path.leaf();
    let before = at.checked_sub(1).and_then(|at| node.extent(at));
    Ok(before.map(after).or(parent))
}

/// Maps a hole. The run must not touch what is mapped, and its blocks must be the caller's.
///
/// # Errors
/// `ENOSPC` for a node that could not be allocated; nothing is mapped then.
pub(crate) fn insert(io: &impl MapIo, extent: Extent) -> Result<()> {
    if let Some(mut leaf) = RootLeaf::find(io, extent.logical.0)? {
        check_hole(io, &leaf.node, leaf.at, MAX_BLOCKS, extent)?;
        if merge(&mut leaf.node, leaf.at, extent)
            || leaf.node.insert_extent(leaf.at, extent).is_ok()
        {
            leaf.store(io);
            return Ok(());
        }
    } else {
        let mut path = Path::find(io, extent.logical.0)?;
        let limit = path.limit;
        let Level { node, at, .. } = path.leaf();
        check_hole(io, node, *at, limit, extent)?;
        if merge(node, *at, extent) {
            return store_merged(io, path);
        }
    }
    let mut path = make_room(io, extent.logical.0, 1)?;
    let Level { node, at, .. } = path.leaf();
    let at = *at;
    expect_room(io, node.insert_extent(at, extent))?;
    path.store_leaf(io)
}

/// Checks that nothing of an extent that is to be mapped is mapped already.
fn check_hole<B: AsRef<[u8]>>(
    io: &impl MapIo,
    node: &ExtentNode<B>,
    at: usize,
    limit: u32,
    extent: Extent,
) -> Result<()> {
    let before = at.checked_sub(1).and_then(|at| node.extent(at));
    let end = node.logical(at).map_or(limit, |next| next.0);
    if before.is_some_and(|b| b.end() > u64::from(extent.logical.0))
        || extent.end() > u64::from(end)
    {
        let corrupt =
            Corrupt::value("extent tree", "an extent is in the way").at_logical(extent.logical);
        return Err(io.place(corrupt, None));
    }
    Ok(())
}

/// Room that was made is there; a tree that says otherwise is damaged.
fn expect_room(
    io: &impl MapIo,
    result: std::result::Result<(), uext_ondisk::extent::NodeFull>,
) -> Result<()> {
    result.map_err(|_| io.place(Corrupt::value("extent tree", "a node did not split"), None))
}

/// Writes a leaf whose extents may have become fewer. When the root can hold them all they
/// move there, and the leaf is freed.
fn store_merged(io: &impl MapIo, mut path: Path) -> Result<()> {
    let lone = path.depth() == 1 && path.levels[0].node.len() == 1;
    if !lone || path.leaf().node.len() > capacity(ROOT_SIZE) {
        return path.store_leaf(io);
    }
    let Some(Level { block: Some(block), node, .. }) = path.levels.pop() else {
        return Err(io.place(Corrupt::value("extent tree", "a leaf without a place"), None));
    };
    let mut root = ExtentNode::init(NodeBytes::from_elem(0, ROOT_SIZE), 0);
    expect_room(io, root.append(&node, 0))?;
    path.levels[0].node = root;
    path.store(io, 0)?;
    io.free_node(block)
}

/// Adds the extent to its neighbours in the leaf, before and from `at`, when it continues them.
fn merge<B>(node: &mut ExtentNode<B>, at: usize, extent: Extent) -> bool
where
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    let before = at.checked_sub(1).and_then(|at| node.extent(at)).filter(|b| b.can_merge(&extent));
    let joined = match before {
        Some(before) => Extent { len: before.len + extent.len, ..before },
        None => extent,
    };
    let after = node.extent(at).filter(|after| joined.can_merge(after));
    match (before, after) {
        (None, None) => return false,
        (Some(_), None) => node.set_extent(at - 1, joined),
        (None, Some(after)) => {
            node.set_extent(at, Extent { len: extent.len + after.len, ..extent });
        }
        (Some(_), Some(after)) => {
            node.set_extent(at - 1, Extent { len: joined.len + after.len, ..joined });
            node.remove(at..at + 1);
        }
    }
    true
}

/// The path to a leaf with room for `need` more extents at `logical`: splits nodes and lets
/// the tree grow, one node at a time. After a failure the tree is whole, with less room.
pub(crate) fn make_room(io: &impl MapIo, logical: u32, need: usize) -> Result<Path> {
    // A split for every level and a new root, twice over for a leaf with too little room after.
    for _ in 0..4 * usize::from(MAX_DEPTH) {
        let mut path = Path::find(io, logical)?;
        let leaf = &path.leaf().node;
        if leaf.len() + need <= leaf.max() {
            return Ok(path);
        }
        let depth = path.depth();
        match (0..depth).rev().find(|&level| !path.levels[level].node.is_full()) {
            Some(level) => split(io, path, level + 1)?,
            None => grow(io, path)?,
        }
    }
    Err(io.place(Corrupt::value("extent tree", "nodes have no room to split"), None))
}

/// Moves the upper part of a node into a new one beside it; its parent has room.
fn split(io: &impl MapIo, mut path: Path, level: usize) -> Result<()> {
    let last = level == path.depth();
    let limit = path.limit;
    let Level { block, node, at } = &mut path.levels[level];
    // Appending to the file leaves full nodes behind: only the last entry moves. In the middle
    // that would make many nodes of few entries, more than `nodes_needed` says.
    let at_end = if last { *at == node.len() } else { *at + 1 == node.len() };
    let appends = at_end && limit == MAX_BLOCKS;
    let from = if appends { node.len().saturating_sub(1) } else { node.len() / 2 };
    let Some(key) = node.logical(from).filter(|_| from > 0) else {
        return Err(io.place(Corrupt::value("extent node", "has no room to split"), *block));
    };
    let child = io.alloc_node(block.unwrap_or_default() + 1)?;
    let mut right =
        ExtentNode::init(NodeBytes::from_elem(0, io.block_size() as usize), node.depth());
    expect_room(io, node.move_tail(from, &mut right))?;
    io.create_node(child, &mut NodeBytes::from_slice(right.bytes()))?;
    path.store(io, level)?;
    let Level { node, at, .. } = &mut path.levels[level - 1];
    let at = *at + 1;
    expect_room(io, node.insert_index(at, ExtentIndex { logical: key, child }))?;
    path.store(io, level - 1)
}

/// Moves the root's entries into a new node below it.
fn grow(io: &impl MapIo, mut path: Path) -> Result<()> {
    let root = &path.levels[0].node;
    let depth = root.depth();
    let Some(key) = root.logical(0).filter(|_| depth < MAX_DEPTH) else {
        return Err(io.place(Corrupt::value("extent tree", "is too deep to grow"), None));
    };
    let near = match (root.extent(0), root.index(0)) {
        (Some(extent), _) => extent.start,
        (None, index) => index.map_or(FsBlock(0), |index| index.child),
    };
    let child = io.alloc_node(near)?;
    let mut node = ExtentNode::init(NodeBytes::from_elem(0, io.block_size() as usize), depth);
    expect_room(io, node.append(root, 0))?;
    io.create_node(child, &mut NodeBytes::from_slice(node.bytes()))?;
    let mut root = ExtentNode::init(NodeBytes::from_elem(0, ROOT_SIZE), depth + 1);
    expect_room(io, root.insert_index(0, ExtentIndex { logical: key, child }))?;
    path.levels[0].node = root;
    path.store(io, 0)
}

/// Makes the unwritten blocks of a range written, whose data is on the disk.
///
/// # Errors
/// `ENOSPC` for a node that could not be allocated; what was converted before stays so.
pub(crate) fn mark_written(io: &impl MapIo, logical: u32, end: u32) -> Result<()> {
    let mut at = logical;
    while at < end {
        let mut path = Path::find(io, at)?;
        let Level { node, at: pos, .. } = path.leaf();
        let found = pos.checked_sub(1).and_then(|p| node.extent(p));
        let Some(extent) = found.filter(|e| e.contains(LogicalBlock(at))) else {
            let corrupt = Corrupt::value("extent tree", "written blocks are not mapped");
            return Err(io.place(corrupt.at_logical(LogicalBlock(at)), None));
        };
        let stop = end.min(u32::try_from(extent.end()).unwrap_or(MAX_BLOCKS));
        if extent.unwritten {
            convert(io, extent, at, stop)?;
        }
        at = stop;
    }
    Ok(())
}

/// Makes the first written extent of a range unwritten, as far as it lies in it and one extent
/// can hold. Returns where the rest of the range begins, `None` when nothing is left.
///
/// # Errors
/// `ENOSPC` for a node that could not be allocated; nothing is changed then.
pub(crate) fn unwrite_step(io: &impl MapIo, from: u32, end: u32) -> Result<Option<u32>> {
    let mut at = from;
    while at < end {
        let mut path = Path::find(io, at)?;
        let limit = path.limit;
        let Level { node, at: pos, .. } = path.leaf();
        let found = pos.checked_sub(1).and_then(|p| node.extent(p));
        let Some(extent) = found.filter(|e| e.contains(LogicalBlock(at))) else {
            at = node.logical(*pos).map_or(limit, |next| next.0).max(at + 1);
            continue;
        };
        let stop = end.min(u32::try_from(extent.end()).unwrap_or(MAX_BLOCKS));
        if !extent.unwritten {
            let stop = stop.min(at + MAX_UNWRITTEN_LEN);
            convert(io, extent, at, stop)?;
            return Ok((stop < end).then_some(stop));
        }
        at = stop;
    }
    Ok(None)
}

/// Splits an extent into what stays as it is and what of it, `from..to`, becomes the other:
/// written or unwritten.
fn convert(io: &impl MapIo, extent: Extent, from: u32, to: u32) -> Result<()> {
    let part = |from: u32, to: u32, changed: bool| Extent {
        logical: LogicalBlock(from),
        len: to - from,
        start: extent.start + u64::from(from - extent.logical.0),
        unwritten: extent.unwritten != changed,
    };
    let end = u32::try_from(extent.end()).unwrap_or(MAX_BLOCKS);
    let first = extent.logical.0;
    let need = usize::from(from > first) + usize::from(to < end);
    let mut path = make_room(io, first, need)?;
    let leaf = path.leaf();
    let Some(at) = leaf.at.checked_sub(1) else {
        return Err(io.place(Corrupt::value("extent tree", "changed while it was read"), None));
    };
    leaf.node.remove(at..at + 1);
    leaf.at = at;
    for (from, to, changed) in [(first, from, false), (from, to, true), (to, end, false)] {
        if from == to {
            continue;
        }
        // Each joins what is before it in place, so there is always room.
        let extent = part(from, to, changed);
        let at = leaf.at;
        if !merge(&mut leaf.node, at, extent) {
            expect_room(io, leaf.node.insert_extent(at, extent))?;
            leaf.at += 1;
        }
    }
    store_merged(io, path)
}

/// Most mapping blocks that mapping `count` single blocks anywhere can need, in a tree of this
/// depth whose root has `root_len` entries.
pub(crate) fn nodes_needed(count: u64, depth: u16, root_len: usize, block_size: u32) -> u64 {
    if count == 0 {
        return 0;
    }
    let max = capacity(block_size as usize) as u64;
    // A split leaves both halves half full, so that many entries fill a new node.
    let half = (max / 2).max(1);
    let root_max = capacity(ROOT_SIZE) as u64;
    let mut total = 0u64;
    let mut entries = count;
    for level in 0..depth {
        // Nodes of this level that may be full already, each of which one insertion splits.
        let above = u32::from(depth - 1 - level);
        let full = root_max.saturating_mul(max.saturating_pow(above));
        entries = entries.min(full.saturating_add(entries / half));
        total += entries;
    }
    // What arrives at the root; when that overflows, levels are added.
    let mut level = entries.saturating_add(root_len as u64);
    while level > root_max {
        level = level.div_ceil(half);
        total += level;
    }
    total
}
