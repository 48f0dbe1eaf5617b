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
