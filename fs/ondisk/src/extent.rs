//! Nodes of extent trees: a header, then sorted leaf or index entries.
//!
//! Source: Documentation/filesystems/ext4/ifork.rst.
//!
//! Invariants of an [`ExtentNode`]: the header's counts lie within the bytes, so
//! entry access cannot leave them; after [`ExtentNode::check`] the entries are also
//! sorted, disjoint and in range. The root is the 60 bytes of `i_block`, every other
//! node a block, whose last 4 bytes hold a checksum under `metadata_csum`.
//! [`ExtentNode::seal`] recomputes it, once after all edits.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc32c;
use crate::error::{Corrupt, CorruptKind, Result};
use crate::superblock::Superblock;
use crate::units::{FsBlock, LogicalBlock};

const WHAT: &str = "extent node";

/// `eh_magic`.
pub const MAGIC: u16 = 0xF30A;
/// The deepest tree: the root and five levels below.
pub const MAX_DEPTH: u16 = 5;
/// Most blocks of a written extent; `ee_len` up to here means written.
pub const MAX_WRITTEN_LEN: u32 = 1 << 15;
/// Most blocks of an unwritten extent.
pub const MAX_UNWRITTEN_LEN: u32 = MAX_WRITTEN_LEN - 1;
/// Bytes of the header and of each entry.
pub const ENTRY_SIZE: usize = 12;
/// Bytes of the checksum behind the last possible entry of a block.
pub const TAIL_SIZE: usize = 4;

/// `struct ext4_extent_header`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields keep Linux's names and are documented there")]
pub struct RawExtentHeader {
    pub eh_magic: U16,
    pub eh_entries: U16,
    pub eh_max: U16,
    pub eh_depth: U16,
    pub eh_generation: U32,
}

/// `struct ext4_extent`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields keep Linux's names and are documented there")]
pub struct RawExtent {
    pub ee_block: U32,
    pub ee_len: U16,
    pub ee_start_hi: U16,
    pub ee_start_lo: U32,
}

/// `struct ext4_extent_idx`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields keep Linux's names and are documented there")]
pub struct RawExtentIndex {
    pub ei_block: U32,
    pub ei_leaf_lo: U32,
    pub ei_leaf_hi: U16,
    pub ei_unused: U16,
}

const _: () = {
    assert!(size_of::<RawExtentHeader>() == ENTRY_SIZE);
    assert!(size_of::<RawExtent>() == ENTRY_SIZE);
    assert!(size_of::<RawExtentIndex>() == ENTRY_SIZE);
};

/// A run of a file's blocks that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first block of the file.
    pub logical: LogicalBlock,
    /// Blocks: 1 to 32768, or to 32767 when unwritten.
    pub len: u32,
    /// The first block of the filesystem, 48 bits.
    pub start: FsBlock,
    /// Allocated but never written: reads as zeroes.
    pub unwritten: bool,
}

impl Extent {
    /// From the raw entry. A length of 0 is damage and gives `len` 0.
    pub fn from_raw(raw: &RawExtent) -> Self {
        let len = u32::from(raw.ee_len.get());
        let unwritten = len > MAX_WRITTEN_LEN;
        Self {
            logical: LogicalBlock(raw.ee_block.get()),
            len: if unwritten { len - MAX_WRITTEN_LEN } else { len },
            start: FsBlock(
                u64::from(raw.ee_start_lo.get()) | u64::from(raw.ee_start_hi.get()) << 32,
            ),
            unwritten,
        }
    }

    /// The raw entry.
    ///
    /// # Panics
    /// When the length is 0 or too large, or the start has over 48 bits.
    pub fn to_raw(self) -> RawExtent {
        let most = if self.unwritten { MAX_UNWRITTEN_LEN } else { MAX_WRITTEN_LEN };
        assert!((1..=most).contains(&self.len), "extent of {} blocks", self.len);
        assert!(self.start.0 >> 48 == 0, "extent at block {}", self.start);
        let flag = if self.unwritten { MAX_WRITTEN_LEN } else { 0 };
        RawExtent {
            ee_block: self.logical.0.into(),
            ee_len: ((self.len + flag) as u16).into(),
            ee_start_hi: ((self.start.0 >> 32) as u16).into(),
            ee_start_lo: (self.start.0 as u32).into(),
        }
    }

    /// The first block of the file after it; 64 bits, since it may be 2³².
    pub fn end(&self) -> u64 {
        u64::from(self.logical.0) + u64::from(self.len)
    }

    /// Whether it maps the block.
    pub fn contains(&self, logical: LogicalBlock) -> bool {
        self.logical <= logical && u64::from(logical.0) < self.end()
    }

    /// Where a block of the file that it maps lies.
    pub fn map(&self, logical: LogicalBlock) -> Option<FsBlock> {
        self.contains(logical).then(|| self.start + u64::from(logical - self.logical))
    }

    /// Most blocks an extent of this kind can have.
    pub fn max_len(&self) -> u32 {
        if self.unwritten { MAX_UNWRITTEN_LEN } else { MAX_WRITTEN_LEN }
    }

    /// Whether `next` continues it in the file and on the device and they fit one extent.
    pub fn can_merge(&self, next: &Self) -> bool {
        self.unwritten == next.unwritten
            && self.end() == u64::from(next.logical.0)
            && self.start.0 + u64::from(self.len) == next.start.0
            && self.len + next.len <= self.max_len()
    }
}

/// An entry of an index node: what is mapped from `logical` on is in or below `child`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentIndex {
    /// The first block of the file below it.
    pub logical: LogicalBlock,
    /// The block of the node below.
    pub child: FsBlock,
}

impl ExtentIndex {
    /// From the raw entry.
    pub fn from_raw(raw: &RawExtentIndex) -> Self {
        Self {
            logical: LogicalBlock(raw.ei_block.get()),
            child: FsBlock(u64::from(raw.ei_leaf_lo.get()) | u64::from(raw.ei_leaf_hi.get()) << 32),
        }
    }

    /// The raw entry.
    ///
    /// # Panics
    /// When the child has over 48 bits.
    pub fn to_raw(self) -> RawExtentIndex {
        assert!(self.child.0 >> 48 == 0, "extent node at block {}", self.child);
        RawExtentIndex {
            ei_block: self.logical.0.into(),
            ei_leaf_lo: (self.child.0 as u32).into(),
            ei_leaf_hi: ((self.child.0 >> 32) as u16).into(),
            ei_unused: 0.into(),
        }
    }
}

/// What a node must agree with.
#[derive(Clone, Copy, Debug)]
pub struct NodeLimits {
    /// Depth: 0 for a leaf; `None` for a root, which says itself.
    pub depth: Option<u16>,
    /// The block of the file the parent's entry names: the first entry must start there.
    pub first_logical: Option<LogicalBlock>,
    /// The block of the file the parent's next entry names, where this node must have ended.
    pub end_logical: Option<LogicalBlock>,
    /// The first block of the filesystem that may be named.
    pub fs_start: FsBlock,
    /// The first that may not.
    pub fs_end: FsBlock,
}

impl NodeLimits {
    /// For a root: any depth, any block of the filesystem.
    pub fn root(sb: &Superblock) -> Self {
        Self {
            depth: None,
            first_logical: None,
            end_logical: None,
            // The block after the superblock is the first anybody may own.
            fs_start: sb.first_data_block() + 1,
            fs_end: FsBlock(sb.blocks_count()),
        }
    }

    /// For the node below the entry at `index` of `parent`, a node that is not a leaf.
    #[must_use]
    pub fn child<B: AsRef<[u8]>>(mut self, parent: &ExtentNode<B>, index: usize) -> Self {
        self.depth = parent.depth().checked_sub(1);
        self.first_logical = parent.index(index).map(|entry| entry.logical);
        if let Some(next) = parent.index(index + 1) {
            self.end_logical = Some(next.logical);
        }
        self
    }
}

/// There is no room for another entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the extent node is full")]
pub struct NodeFull;

/// A view of one node: over `&[u8]` to read, over `&mut [u8]` to edit in place.
#[derive(Clone, Copy, Debug)]
pub struct ExtentNode<B> {
    bytes: B,
}

/// Entries a node of that many bytes has room for: 4 in an inode, 340 in 4 KiB.
pub fn capacity(node_len: usize) -> usize {
    node_len.saturating_sub(ENTRY_SIZE) / ENTRY_SIZE
}

impl<B: AsRef<[u8]>> ExtentNode<B> {
    /// A view whose header is checked against the bytes, but not its entries: for a node
    /// that was checked when it was read.
    ///
    /// # Errors
    /// `Truncated`, `Magic`, or `Value` for a count or depth that cannot be.
    #[inline]
    pub fn new(bytes: B) -> Result<Self> {
        let node = Self { bytes };
        let have = node.bytes.as_ref().len();
        let Ok((header, _)) = RawExtentHeader::ref_from_prefix(node.bytes.as_ref()) else {
            return Err(Corrupt::truncated(WHAT, have, ENTRY_SIZE));
        };
        let (magic, entries) = (header.eh_magic.get(), header.eh_entries.get());
        let (max, depth) = (header.eh_max.get(), header.eh_depth.get());
        if magic != MAGIC {
            let detail = format!("magic is {magic:#06x}, not {MAGIC:#06x}");
            return Err(Corrupt::new(CorruptKind::Magic, WHAT, detail));
        }
        if max == 0 || usize::from(max) > capacity(have) {
            return Err(Corrupt::value(WHAT, format!("eh_max {max}, room for {}", capacity(have))));
        }
        if entries > max {
            return Err(Corrupt::value(WHAT, format!("eh_entries {entries} of {max}")));
        }
        if depth > MAX_DEPTH {
            return Err(Corrupt::value(WHAT, format!("eh_depth {depth} is over {MAX_DEPTH}")));
        }
        Ok(node)
    }

    /// A view whose header and entries are all checked.
    ///
    /// # Errors
    /// As [`ExtentNode::new`], and as [`ExtentNode::check`].
    pub fn checked(bytes: B, limits: &NodeLimits) -> Result<Self> {
        let node = Self::new(bytes)?;
        node.check(limits)?;
        Ok(node)
    }

    /// Checks the entries: sorted, disjoint, in range, agreeing with the parent.
    ///
    /// # Errors
    /// `Value` for the first that is not, with the block of the file.
    pub fn check(&self, limits: &NodeLimits) -> Result<()> {
        if let Some(depth) = limits.depth.filter(|&depth| depth != self.depth()) {
            return Err(Corrupt::value(WHAT, format!("eh_depth {}, not {depth}", self.depth())));
        }
        if self.is_empty() && (self.depth() > 0 || limits.first_logical.is_some()) {
            return Err(Corrupt::value(WHAT, "no entries"));
        }
        let mut next = u64::from(limits.first_logical.unwrap_or_default().0);
        for at in 0..self.len() {
            let (logical, end, start, blocks) = self.span(at);
            let place = |detail| Corrupt::value(WHAT, detail).at_logical(logical);
            let must_equal = at == 0 && limits.first_logical.is_some();
            let begin = u64::from(logical.0);
            if begin < next || (must_equal && begin != next) {
                return Err(place(format!("entry {at} starts there, {next} expected")));
            }
            if end <= begin || end > limits.end_logical.map_or(1 << 32, |end| end.0.into()) {
                return Err(place(format!("entry {at} ends at logical block {end}")));
            }
            let fs_end = start.0.checked_add(blocks).filter(|&end| end <= limits.fs_end.0);
            if start < limits.fs_start || fs_end.is_none() {
                return Err(place(format!("entry {at} maps {blocks} blocks at block {start}")));
            }
            next = end;
        }
        Ok(())
    }

    /// First and end block of the file, first block on the device and blocks there of an entry.
    fn span(&self, at: usize) -> (LogicalBlock, u64, FsBlock, u64) {
        if let Some(extent) = self.extent(at) {
            return (extent.logical, extent.end(), extent.start, extent.len.into());
        }
        let index = self.index(at).expect("the entry exists in a node that is no leaf");
        (index.logical, u64::from(index.logical.0) + 1, index.child, 1)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    #[inline]
    fn header(&self) -> &RawExtentHeader {
        RawExtentHeader::ref_from_prefix(self.bytes.as_ref()).expect("checked by new").0
    }

    /// Levels below: 0 for a leaf.
    #[inline]
    pub fn depth(&self) -> u16 {
        self.header().eh_depth.get()
    }

    /// Whether the entries are extents.
    #[inline]
    pub fn is_leaf(&self) -> bool {
        self.depth() == 0
    }

    /// Entries.
    #[inline]
    pub fn len(&self) -> usize {
        self.header().eh_entries.get().into()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Entries it has room for.
    pub fn max(&self) -> usize {
        self.header().eh_max.get().into()
    }

    /// Whether there is no room for another entry.
    pub fn is_full(&self) -> bool {
        self.len() >= self.max()
    }

    #[inline]
    fn entry_bytes(&self, at: usize) -> Option<&[u8]> {
        if at >= self.len() {
            return None;
        }
        self.bytes.as_ref().get(ENTRY_SIZE * (at + 1)..ENTRY_SIZE * (at + 2))
    }

    /// The extent at `at`; `None` past the last, and in a node that is no leaf.
    #[inline]
    pub fn extent(&self, at: usize) -> Option<Extent> {
        if !self.is_leaf() {
            return None;
        }
        RawExtent::ref_from_bytes(self.entry_bytes(at)?).ok().map(Extent::from_raw)
    }

    /// The index entry at `at`; `None` past the last, and in a leaf.
    #[inline]
    pub fn index(&self, at: usize) -> Option<ExtentIndex> {
        if self.is_leaf() {
            return None;
        }
        RawExtentIndex::ref_from_bytes(self.entry_bytes(at)?).ok().map(ExtentIndex::from_raw)
    }

    /// All extents of a leaf, in order.
    pub fn extents(&self) -> impl DoubleEndedIterator<Item = Extent> + '_ {
        (0..self.len()).filter_map(|at| self.extent(at))
    }

    /// All entries of an index node, in order.
    pub fn indexes(&self) -> impl DoubleEndedIterator<Item = ExtentIndex> + '_ {
        (0..self.len()).filter_map(|at| self.index(at))
    }

    /// The first block of the file an entry names; leaf and index entries start with it.
    #[inline]
    pub fn logical(&self, at: usize) -> Option<LogicalBlock> {
        let (block, _) = U32::ref_from_prefix(self.entry_bytes(at)?).ok()?;
        Some(LogicalBlock(block.get()))
    }

    /// The last entry that starts at or before `logical`; `None` when all start after it.
    #[inline]
    pub fn search(&self, logical: LogicalBlock) -> Option<usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = usize::midpoint(low, high);
            if self.logical(middle).is_some_and(|first| first <= logical) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low.checked_sub(1)
    }

    /// Where the checksum lies: behind room for `eh_max` entries. `None` in a root.
    fn tail_offset(&self) -> Option<usize> {
        let offset = ENTRY_SIZE * (self.max() + 1);
        (offset + TAIL_SIZE <= self.bytes.as_ref().len()).then_some(offset)
    }

    /// The checksum a block's node should have; `None` when it has no room for one.
    pub fn computed_checksum(&self, inode_seed: u32) -> Option<u32> {
        let offset = self.tail_offset()?;
        Some(crc32c(inode_seed, &self.bytes.as_ref()[..offset]))
    }

    /// The stored checksum; `None` when there is no room for one.
    pub fn checksum(&self) -> Option<u32> {
        let (tail, _) = U32::ref_from_prefix(&self.bytes.as_ref()[self.tail_offset()?..]).ok()?;
        Some(tail.get())
    }

    /// Checks the checksum of a block's node, whose seed is the inode's
    /// ([`crate::inode::inode_csum_seed`]). Only under `metadata_csum`, never for a root.
    ///
    /// # Errors
    /// `Checksum` with both; `Value` when `eh_max` leaves no room for one.
    pub fn verify(&self, inode_seed: u32) -> Result<()> {
        match (self.checksum(), self.computed_checksum(inode_seed)) {
            (Some(stored), Some(computed)) if stored == computed => Ok(()),
            (Some(stored), Some(computed)) => Err(Corrupt::checksum(WHAT, stored, computed)),
            _ => Err(Corrupt::value(WHAT, format!("eh_max {} leaves no checksum", self.max()))),
        }
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> ExtentNode<B> {
    /// Writes the header of an empty node over `bytes`; the rest keeps its contents.
    ///
    /// # Panics
    /// When there is no room for one entry, or the depth is too large.
    pub fn init(mut bytes: B, depth: u16) -> Self {
        let max = capacity(bytes.as_ref().len()).min(u16::MAX.into());
        assert!(max > 0 && depth <= MAX_DEPTH, "a node of depth {depth} for {max} entries");
        let header = RawExtentHeader {
            eh_magic: MAGIC.into(),
            eh_entries: 0.into(),
            eh_max: (max as u16).into(),
            eh_depth: depth.into(),
            eh_generation: 0.into(),
        };
        bytes.as_mut()[..ENTRY_SIZE].copy_from_slice(header.as_bytes());
        Self { bytes }
    }

    fn header_mut(&mut self) -> &mut RawExtentHeader {
        RawExtentHeader::mut_from_prefix(self.bytes.as_mut()).expect("checked by new").0
    }

    fn set_len(&mut self, len: usize) {
        debug_assert!(len <= self.max());
        self.header_mut().eh_entries = (len as u16).into();
    }

    /// Sets the depth: of a root whose tree grew or shrank.
    ///
    /// # Panics
    /// When it is too large.
    pub fn set_depth(&mut self, depth: u16) {
        assert!(depth <= MAX_DEPTH, "a tree of depth {depth}");
        self.header_mut().eh_depth = depth.into();
    }

    /// Replaces the extent at `at` of a leaf.
    ///
    /// # Panics
    /// When there is none.
    pub fn set_extent(&mut self, at: usize, extent: Extent) {
        assert!(self.is_leaf() && at < self.len(), "no extent {at} of {}", self.len());
        self.put(at, extent.to_raw().as_bytes());
    }

    /// Replaces the entry at `at` of an index node.
    ///
    /// # Panics
    /// When there is none.
    pub fn set_index(&mut self, at: usize, index: ExtentIndex) {
        assert!(!self.is_leaf() && at < self.len(), "no index entry {at} of {}", self.len());
        self.put(at, index.to_raw().as_bytes());
    }

    /// Sets the first block of the file an entry names, as when the first entry below changed.
    ///
    /// # Panics
    /// When there is no such entry.
    pub fn set_logical(&mut self, at: usize, logical: LogicalBlock) {
        assert!(at < self.len(), "no entry {at} of {}", self.len());
        let start = ENTRY_SIZE * (at + 1);
        self.bytes.as_mut()[start..start + 4].copy_from_slice(&logical.0.to_le_bytes());
    }

    /// Inserts an extent before the entry at `at` of a leaf.
    ///
    /// # Errors
    /// [`NodeFull`], and nothing changes.
    ///
    /// # Panics
    /// In an index node, and when `at` is past the end.
    pub fn insert_extent(
        &mut self,
        at: usize,
        extent: Extent,
    ) -> std::result::Result<(), NodeFull> {
        assert!(self.is_leaf(), "an extent in an index node");
        self.insert(at, extent.to_raw().as_bytes())
    }

    /// Inserts an entry before the one at `at` of an index node.
    ///
    /// # Errors
    /// [`NodeFull`], and nothing changes.
    ///
    /// # Panics
    /// In a leaf, and when `at` is past the end.
    pub fn insert_index(
        &mut self,
        at: usize,
        index: ExtentIndex,
    ) -> std::result::Result<(), NodeFull> {
        assert!(!self.is_leaf(), "an index entry in a leaf");
        self.insert(at, index.to_raw().as_bytes())
    }

    fn insert(&mut self, at: usize, entry: &[u8]) -> std::result::Result<(), NodeFull> {
        let len = self.len();
        assert!(at <= len, "entry {at} of {len}");
        if self.is_full() {
            return Err(NodeFull);
        }
        let (start, end) = (ENTRY_SIZE * (at + 1), ENTRY_SIZE * (len + 1));
        self.bytes.as_mut().copy_within(start..end, start + ENTRY_SIZE);
        self.put(at, entry);
        self.set_len(len + 1);
        Ok(())
    }

    fn put(&mut self, at: usize, entry: &[u8]) {
        let start = ENTRY_SIZE * (at + 1);
        self.bytes.as_mut()[start..start + ENTRY_SIZE].copy_from_slice(entry);
    }

    /// Removes the entries of a range and clears the bytes that became free.
    ///
    /// # Panics
    /// When the range does not lie in the entries.
    pub fn remove(&mut self, range: std::ops::Range<usize>) {
        let len = self.len();
        assert!(range.start <= range.end && range.end <= len, "entries {range:?} of {len}");
        let new_len = len - range.len();
        let end = ENTRY_SIZE * (len + 1);
        let bytes = self.bytes.as_mut();
        bytes.copy_within(ENTRY_SIZE * (range.end + 1)..end, ENTRY_SIZE * (range.start + 1));
        bytes[ENTRY_SIZE * (new_len + 1)..end].fill(0);
        self.set_len(new_len);
    }

    /// Moves the entries from `at` on to the end of `other`, a node of the same depth.
    ///
    /// # Errors
    /// [`NodeFull`], and nothing changes.
    ///
    /// # Panics
    /// When the depths differ or `at` is past the end.
    pub fn move_tail<C>(
        &mut self,
        at: usize,
        other: &mut ExtentNode<C>,
    ) -> std::result::Result<(), NodeFull>
    where
        C: AsRef<[u8]> + AsMut<[u8]>,
    {
        other.append(self, at)?;
        self.remove(at..self.len());
        Ok(())
    }

    /// Copies the entries from `at` on of another node of the same depth behind its own: a
    /// root that moves into a block, or two nodes that become one.
    ///
    /// # Errors
    /// [`NodeFull`], and nothing changes.
    ///
    /// # Panics
    /// When the depths differ or `at` is past the end.
    pub fn append<C: AsRef<[u8]>>(
        &mut self,
        from: &ExtentNode<C>,
        at: usize,
    ) -> std::result::Result<(), NodeFull> {
        assert_eq!(self.depth(), from.depth(), "nodes of different depths");
        let (len, count) = (self.len(), from.len() - at);
        if len + count > self.max() {
            return Err(NodeFull);
        }
        let source = &from.bytes.as_ref()[ENTRY_SIZE * (at + 1)..ENTRY_SIZE * (at + 1 + count)];
        let start = ENTRY_SIZE * (len + 1);
        self.bytes.as_mut()[start..start + source.len()].copy_from_slice(source);
        self.set_len(len + count);
        Ok(())
    }

    /// Computes and stores the checksum of a block's node: the last step of every edit, under
    /// `metadata_csum`.
    pub fn seal(&mut self, inode_seed: u32) {
        if let (Some(offset), Some(csum)) = (self.tail_offset(), self.computed_checksum(inode_seed))
        {
            self.bytes.as_mut()[offset..offset + TAIL_SIZE].copy_from_slice(&csum.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::sample_superblock;
    use proptest::prelude::*;

    fn extent(logical: u32, len: u32, start: u64) -> Extent {
        Extent { logical: LogicalBlock(logical), len, start: FsBlock(start), unwritten: false }
    }

    fn leaf(extents: &[Extent]) -> ExtentNode<Vec<u8>> {
        let mut node = ExtentNode::init(vec![0; 1024], 0);
        for (at, extent) in extents.iter().enumerate() {
            node.insert_extent(at, *extent).unwrap();
        }
        node
    }

    fn problem(node: &ExtentNode<Vec<u8>>, limits: &NodeLimits) -> String {
        node.check(limits).unwrap_err().to_string()
    }

    #[test]
    fn the_length_says_whether_it_was_written() {
        for (len, unwritten, raw) in
            [(1, false, 1), (32768, false, 32768), (1, true, 32769), (32767, true, 65535)]
        {
            let extent = Extent { unwritten, ..extent(0, len, 1) };
            assert_eq!(extent.to_raw().ee_len.get(), raw);
            assert_eq!(Extent::from_raw(&extent.to_raw()), extent);
        }
    }

    #[test]
    fn capacity_is_what_the_format_says() {
        let blocks = [60, 1024, 2048, 4096, 65536];
        assert_eq!(blocks.map(capacity), [4, 84, 169, 340, 5460]);
    }

    #[test]
    fn bad_headers_are_refused() {
        let mut bytes = leaf(&[extent(0, 1, 50)]).bytes().to_vec();
        let refused = |bytes: &[u8]| ExtentNode::new(bytes).unwrap_err().detail;
        bytes[4] = 85;
        assert_eq!(refused(&bytes), "eh_max 85, room for 84");
        bytes[4] = 84;
        bytes[2] = 85;
        assert_eq!(refused(&bytes), "eh_entries 85 of 84");
        bytes[2] = 1;
        bytes[6] = 6;
        assert_eq!(refused(&bytes), "eh_depth 6 is over 5");
        bytes[0] = 0;
        assert_eq!(refused(&bytes), "magic is 0xf300, not 0xf30a");
        assert!(ExtentNode::new(&bytes[..11]).is_err());
    }

    #[test]
    fn bad_entries_are_refused_with_their_place() {
        let sb = sample_superblock();
        let limits = NodeLimits::root(&sb);
        let overlap = leaf(&[extent(0, 4, 50), extent(3, 4, 90)]);
        assert_eq!(
            problem(&overlap, &limits),
            "extent node at logical block 3: entry 1 starts there, 4 expected"
        );
        let order = leaf(&[extent(10, 1, 50), extent(5, 1, 90)]);
        assert!(problem(&order, &limits).contains("starts there, 11 expected"));
        let end = leaf(&[extent(0, 4, sb.blocks_count() - 3)]);
        assert!(problem(&end, &limits).contains("maps 4 blocks at block"));
        let on_super = leaf(&[extent(0, 4, 0)]);
        assert!(problem(&on_super, &limits).contains("maps 4 blocks at block 0"));
        let past = leaf(&[extent(u32::MAX, 2, 50)]);
        assert!(problem(&past, &limits).contains("ends at logical block 4294967297"));
        let mut zero = leaf(&[extent(0, 1, 50)]);
        zero.bytes[16] = 0;
        assert!(problem(&zero, &limits).contains("ends at logical block 0"));
    }

    #[test]
    fn a_child_must_agree_with_its_parent() {
        let sb = sample_superblock();
        let mut root = ExtentNode::init(vec![0; 60], 1);
        for (at, logical) in [(0, 0), (1, 100)] {
            let child = FsBlock(500 + logical);
            root.insert_index(at, ExtentIndex { logical: LogicalBlock(logical as u32), child })
                .unwrap();
        }
        root.check(&NodeLimits::root(&sb)).unwrap();
        let first = NodeLimits::root(&sb).child(&root, 0);
        assert!(leaf(&[extent(0, 100, 50)]).check(&first).is_ok());
        assert!(leaf(&[extent(0, 101, 50)]).check(&first).is_err());
        assert!(leaf(&[extent(1, 1, 50)]).check(&first).is_err());
        assert!(leaf(&[]).check(&first).is_err());
        let second = NodeLimits::root(&sb).child(&root, 1);
        assert!(leaf(&[extent(100, 4000, 50)]).check(&second).is_ok());
        assert!(ExtentNode::init(vec![0; 1024], 1).check(&second).is_err());
    }

    #[test]
    fn a_full_node_takes_no_more_and_stays_as_it_was() {
        let mut root = ExtentNode::init(vec![0; 60], 0);
        (0..4).for_each(|at| root.insert_extent(at, extent(at as u32 * 2, 1, 50)).unwrap());
        let before = root.bytes().to_vec();
        assert_eq!(root.insert_extent(2, extent(3, 1, 70)), Err(NodeFull));
        assert_eq!(root.bytes(), before);
        assert_eq!(root.checksum(), None);
    }

    proptest! {
        #[test]
        fn edits_agree_with_a_vector(steps in proptest::collection::vec((any::<u8>(), any::<u16>(), any::<u8>()), 1..200)) {
            let mut node = leaf(&[]);
            let mut model: Vec<Extent> = Vec::new();
            for (kind, place, count) in steps {
                let at = usize::from(place) % (model.len() + 1);
                match kind % 4 {
                    0 | 1 => {
                        let new = extent(u32::from(place), 1, u64::from(count));
                        if node.insert_extent(at, new).is_ok() {
                            model.insert(at, new);
                        } else {
                            prop_assert_eq!(model.len(), 84);
                        }
                    }
                    2 => {
                        let end = (at + usize::from(count % 4)).min(model.len());
                        node.remove(at..end);
                        model.drain(at..end);
                    }
                    _ => {
                        let mut other = leaf(&[]);
                        node.move_tail(at, &mut other).unwrap();
                        prop_assert_eq!(other.len(), model.len() - at);
                        node.append(&other, 0).unwrap();
                    }
                }
                prop_assert_eq!(node.extents().collect::<Vec<_>>(), model.clone());
            }
            node.seal(5);
            prop_assert!(node.verify(5).is_ok() && node.verify(6).is_err());
        }

        #[test]
        fn search_finds_the_last_start_at_or_before(starts in proptest::collection::btree_set(any::<u32>(), 0..84), want: u32) {
            let extents: Vec<_> = starts.iter().map(|&start| extent(start, 1, 50)).collect();
            let found = leaf(&extents).search(LogicalBlock(want));
            prop_assert_eq!(found, starts.iter().rposition(|&start| start <= want));
        }
    }
}
