//! The index of a hashed directory: root, inner nodes, and splits of leaves.
//!
//! Source: Documentation/filesystems/ext4/directory.rst (hash tree
//! directories). The root is the directory's block 0: it begins with `.` and
//! `..`, whose `rec_len` hides the rest from programs that know only linear
//! directories. An inner node hides behind one unused entry. Both then hold an
//! array of (hash, block): the first element's hash is taken by limit and
//! count, since everything below the second element's hash belongs to it.
//!
//! Invariants:
//! - [`DxBlock`] holds `1 <= count <= limit <= what fits`; entries are reached
//!   by index below `count` only. It does not promise sorted hashes: a lookup in
//!   an unsorted node is wrong, never out of bounds.
//! - Edits keep limit and count and leave the checksum to the caller, once.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc32c;
use crate::dir_entry::{
    DirBlock, DirBlockMut, DirEntry, DirFormat, ENTRY_HEADER, PackedEntry, entry_size,
    rec_len_from_disk, rec_len_to_disk,
};
use crate::dirhash::{DirHasher, HashVersion};
use crate::error::{Corrupt, CorruptKind, Result};
use crate::units::{InodeNumber, LogicalBlock};

const WHAT: &str = "directory index";
/// Where the root's `dx_root_info` lies: after `.` and `..`.
const ROOT_INFO: usize = 24;
/// Where an inner node's entries begin: after its unused entry.
const NODE_ENTRIES: usize = ENTRY_HEADER;
const ENTRY_SIZE: usize = size_of::<RawDxEntry>();
const TAIL_SIZE: usize = size_of::<RawDxTail>();
/// Block numbers in the index have 28 bits.
const BLOCK_MASK: u32 = 0x0FFF_FFFF;
/// Most levels of inner nodes below the root, without and with `large_dir`.
pub const MAX_INDIRECT_LEVELS: u8 = 1;
/// See [`MAX_INDIRECT_LEVELS`].
pub const MAX_INDIRECT_LEVELS_LARGE_DIR: u8 = 2;

/// `struct dx_root_info`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; directory.rst describes them.
pub struct RawDxRootInfo {
    pub reserved_zero: U32,
    pub hash_version: u8,
    pub info_length: u8,
    pub indirect_levels: u8,
    pub unused_flags: u8,
}

/// `struct dx_entry`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; directory.rst describes them.
pub struct RawDxEntry {
    pub hash: U32,
    pub block: U32,
}

/// `struct dx_countlimit`, in the place of the first entry's hash.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; directory.rst describes them.
pub struct RawDxCountLimit {
    pub limit: U16,
    pub count: U16,
}

/// `struct dx_tail`, after the last entry there is room for.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; directory.rst describes them.
pub struct RawDxTail {
    pub dt_reserved: U32,
    pub dt_checksum: U32,
}

const _: () = assert!(size_of::<RawDxRootInfo>() == 8);
const _: () = assert!(ENTRY_SIZE == 8 && TAIL_SIZE == 8);
const _: () = assert!(size_of::<RawDxCountLimit>() == offset_of!(RawDxEntry, block));

/// What the root says of the whole index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootInfo {
    /// `hash_version`, for [`HashVersion::from_raw`].
    pub hash_version: u8,
    /// Levels of inner nodes between the root and the leaves.
    pub indirect_levels: u8,
    /// `unused_flags`: must be 0.
    pub flags: u8,
}

/// One element of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DxEntry {
    /// The smallest hash in the block's subtree; bit 0 says that hashes equal to
    /// it also lie in the block before. 0 for the first element.
    pub hash: u32,
    /// The block of the directory it leads to.
    pub block: LogicalBlock,
}

/// Where the entries of a block lie, checked.
#[derive(Clone, Copy, Debug)]
struct Layout {
    entries: usize,
    limit: usize,
    count: usize,
}

/// The most elements of a node whose array begins at `entries`.
fn capacity(block_size: usize, entries: usize, csum: bool) -> usize {
    let tail = if csum { TAIL_SIZE } else { 0 };
    block_size.saturating_sub(entries + tail) / ENTRY_SIZE
}

fn count_limit(bytes: &[u8], entries: usize, csum: bool) -> Result<Layout> {
    let room = capacity(bytes.len(), entries, csum);
    let raw = bytes.get(entries..).and_then(|rest| RawDxCountLimit::ref_from_prefix(rest).ok());
    let Some((raw, _)) = raw else {
        return Err(Corrupt::truncated(WHAT, bytes.len(), entries + ENTRY_SIZE));
    };
    let (limit, count) = (usize::from(raw.limit.get()), usize::from(raw.count.get()));
    if limit != room {
        return Err(Corrupt::value(WHAT, format!("limit is {limit}, room for {room}")));
    }
    if count == 0 || count > limit {
        return Err(Corrupt::value(WHAT, format!("count is {count} of {limit}")));
    }
    Ok(Layout { entries, limit, count })
}

fn rec_len_at(bytes: &[u8], offset: usize) -> Option<usize> {
    let field = offset + offset_of!(crate::dir_entry::RawDirEntry, rec_len);
    let raw = U16::read_from_bytes(bytes.get(field..field + 2)?).ok()?;
    Some(rec_len_from_disk(raw.get(), bytes.len()))
}

fn root_info(bytes: &[u8]) -> Result<&RawDxRootInfo> {
    let (info, _) = bytes
        .get(ROOT_INFO..)
        .and_then(|rest| RawDxRootInfo::ref_from_prefix(rest).ok())
        .ok_or_else(|| Corrupt::truncated(WHAT, bytes.len(), ROOT_INFO + 8))?;
    if rec_len_at(bytes, 0) != Some(12) || rec_len_at(bytes, 12) != Some(bytes.len() - 12) {
        let detail = "`.` and `..` do not cover the root";
        return Err(Corrupt::new(CorruptKind::Magic, WHAT, detail));
    }
    if info.reserved_zero.get() != 0 || info.info_length != 8 {
        let detail = format!(
            "root info: reserved_zero {}, info_length {}",
            info.reserved_zero, info.info_length
        );
        return Err(Corrupt::value(WHAT, detail));
    }
    Ok(info)
}

/// A root or an inner node, its counts checked.
#[derive(Clone, Copy)]
pub struct DxBlock<'a> {
    bytes: &'a [u8],
    layout: Layout,
}

impl<'a> DxBlock<'a> {
    /// The root: block 0 of an indexed directory. `csum` is the metadata_csum feature.
    ///
    /// # Errors
    /// `Magic` when block 0 is not a root, `Value` for impossible fields, `Truncated`.
    pub fn root(bytes: &'a [u8], csum: bool) -> Result<(Self, RootInfo)> {
        let raw = root_info(bytes)?;
        let entries = ROOT_INFO + usize::from(raw.info_length);
        let info = RootInfo {
            hash_version: raw.hash_version,
            indirect_levels: raw.indirect_levels,
            flags: raw.unused_flags,
        };
        Ok((Self { bytes, layout: count_limit(bytes, entries, csum)? }, info))
    }

    /// An inner node.
    ///
    /// # Errors
    /// `Magic` when it does not begin with an unused entry over the whole block,
    /// `Value` for impossible counts, `Truncated`.
    pub fn node(bytes: &'a [u8], csum: bool) -> Result<Self> {
        if rec_len_at(bytes, 0) != Some(bytes.len()) || bytes[..4] != [0; 4] {
            let detail = "no unused entry covers the node";
            return Err(Corrupt::new(CorruptKind::Magic, WHAT, detail));
        }
        Ok(Self { bytes, layout: count_limit(bytes, NODE_ENTRIES, csum)? })
    }

    /// Elements in use, at least 1.
    pub fn count(&self) -> usize {
        self.layout.count
    }

    /// Elements there is room for.
    pub fn limit(&self) -> usize {
        self.layout.limit
    }

    /// Whether there is no room for another.
    pub fn is_full(&self) -> bool {
        self.count() == self.limit()
    }

    /// The element at `index`.
    ///
    /// # Panics
    /// When `index` is not below [`DxBlock::count`]: a broken promise of the caller.
    pub fn entry(&self, index: usize) -> DxEntry {
        assert!(index < self.layout.count, "index {index} of {}", self.layout.count);
        read_entry(self.bytes, self.layout.entries, index)
    }

    /// The elements in order.
    pub fn entries(&self) -> impl DoubleEndedIterator<Item = DxEntry> + ExactSizeIterator + '_ {
        (0..self.count()).map(|index| self.entry(index))
    }

    /// The index of the element whose subtree holds `hash`: the last one whose
    /// hash is not above it.
    pub fn lookup(&self, hash: u32) -> usize {
        let (mut low, mut high) = (1, self.count());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(middle).hash > hash {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        low - 1
    }

    /// Checks the checksum (metadata_csum only).
    ///
    /// # Errors
    /// `Checksum`.
    pub fn verify_checksum(&self, inode_seed: u32) -> Result<()> {
        let (stored, computed) = checksum(self.bytes, self.layout, inode_seed)?;
        if stored == computed { Ok(()) } else { Err(Corrupt::checksum(WHAT, stored, computed)) }
    }
}

fn read_entry(bytes: &[u8], entries: usize, index: usize) -> DxEntry {
    let at = entries + index * ENTRY_SIZE;
    let raw = RawDxEntry::read_from_bytes(&bytes[at..at + ENTRY_SIZE])
        .expect("the slice has the entry's size");
    let hash = if index == 0 { 0 } else { raw.hash.get() };
    DxEntry { hash, block: LogicalBlock(raw.block.get() & BLOCK_MASK) }
}

/// The stored and the computed checksum: over the used entries and the tail.
fn checksum(bytes: &[u8], layout: Layout, inode_seed: u32) -> Result<(u32, u32)> {
    let at = layout.entries + layout.limit * ENTRY_SIZE;
    let tail = bytes.get(at..).and_then(|rest| RawDxTail::ref_from_prefix(rest).ok());
    let Some((tail, _)) = tail else {
        return Err(Corrupt::truncated(WHAT, bytes.len(), at + TAIL_SIZE));
    };
    let used = &bytes[..layout.entries + layout.count * ENTRY_SIZE];
    let crc = crc32c(crc32c(inode_seed, used), tail.dt_reserved.as_bytes());
    Ok((tail.dt_checksum.get(), crc32c(crc, &[0; 4])))
}

/// A root or an inner node to edit in place.
pub struct DxBlockMut<'a> {
    bytes: &'a mut [u8],
    layout: Layout,
    csum: bool,
}

impl<'a> DxBlockMut<'a> {
    /// See [`DxBlock::root`].
    ///
    /// # Errors
    /// As [`DxBlock::root`].
    pub fn root(bytes: &'a mut [u8], csum: bool) -> Result<Self> {
        let layout = DxBlock::root(bytes, csum)?.0.layout;
        Ok(Self { bytes, layout, csum })
    }

    /// See [`DxBlock::node`].
    ///
    /// # Errors
    /// As [`DxBlock::node`].
    pub fn node(bytes: &'a mut [u8], csum: bool) -> Result<Self> {
        let layout = DxBlock::node(bytes, csum)?.layout;
        Ok(Self { bytes, layout, csum })
    }

    /// Makes the block an inner node with one element, which leads to `first`.
    ///
    /// # Errors
    /// `Truncated` when the block is too small for a node.
    pub fn init_node(bytes: &'a mut [u8], csum: bool, first: LogicalBlock) -> Result<Self> {
        let limit = capacity(bytes.len(), NODE_ENTRIES, csum);
        if limit < 2 {
            return Err(Corrupt::truncated(WHAT, bytes.len(), NODE_ENTRIES + 2 * ENTRY_SIZE));
        }
        bytes.fill(0);
        let rec_len = rec_len_to_disk(bytes.len(), bytes.len());
        bytes[4..6].copy_from_slice(U16::new(rec_len).as_bytes());
        let mut node =
            Self { layout: Layout { entries: NODE_ENTRIES, limit, count: 1 }, bytes, csum };
        node.write_counts();
        node.set_block(0, first);
        Ok(node)
    }

    /// The block to read.
    pub fn view(&self) -> DxBlock<'_> {
        DxBlock { bytes: self.bytes, layout: self.layout }
    }

    fn write_counts(&mut self) {
        let number = |count: usize| U16::new(u16::try_from(count).expect("a block holds < 65536"));
        let raw =
            RawDxCountLimit { limit: number(self.layout.limit), count: number(self.layout.count) };
        let at = self.layout.entries;
        self.bytes[at..at + 4].copy_from_slice(raw.as_bytes());
    }

    /// Lets the element at `index` lead to another block.
    ///
    /// # Panics
    /// When `index` is not below the count: a broken promise of the caller.
    pub fn set_block(&mut self, index: usize, block: LogicalBlock) {
        assert!(index < self.layout.count && block.0 <= BLOCK_MASK, "element {index} to {block}");
        let at = self.layout.entries + index * ENTRY_SIZE + 4;
        self.bytes[at..at + 4].copy_from_slice(U32::new(block.0).as_bytes());
    }

    /// Inserts an element after the one at `index`. False, and nothing done,
    /// when the block is full.
    ///
    /// # Panics
    /// When `index` is not below the count: a broken promise of the caller.
    #[must_use]
    pub fn insert_after(&mut self, index: usize, hash: u32, block: LogicalBlock) -> bool {
        assert!(index < self.layout.count && block.0 <= BLOCK_MASK, "element {index} to {block}");
        if self.view().is_full() {
            return false;
        }
        let at = self.layout.entries + (index + 1) * ENTRY_SIZE;
        let end = self.layout.entries + self.layout.count * ENTRY_SIZE;
        self.bytes.copy_within(at..end, at + ENTRY_SIZE);
        let raw = RawDxEntry { hash: U32::new(hash), block: U32::new(block.0) };
        self.bytes[at..at + ENTRY_SIZE].copy_from_slice(raw.as_bytes());
        self.layout.count += 1;
        self.write_counts();
        true
    }

    /// Moves the upper half of an inner node's elements into `new`, which
    /// becomes a node; gives the hash the parent must hold for it.
    ///
    /// # Errors
    /// `Value` when there are fewer than two elements, `Truncated` when `new` is smaller.
    pub fn split_into(&mut self, new: &mut [u8]) -> Result<u32> {
        let (count, keep) = (self.layout.count, self.layout.count / 2);
        if keep == 0 || new.len() != self.bytes.len() {
            return Err(Corrupt::value(WHAT, format!("cannot split a node of {count}")));
        }
        let hash = self.view().entry(keep).hash;
        self.copy_tail_into(new, keep)?;
        self.layout.count = keep;
        self.write_counts();
        Ok(hash)
    }

    /// Adds a level below the root: all its elements go to `new`, which becomes
    /// a node at directory block `number`, and the root leads only there.
    ///
    /// # Errors
    /// `Value` when this is no root or cannot have another level, `Truncated`.
    pub fn push_level(&mut self, new: &mut [u8], number: LogicalBlock) -> Result<()> {
        let levels_at = ROOT_INFO + offset_of!(RawDxRootInfo, indirect_levels);
        let levels = root_info(self.bytes)?.indirect_levels;
        if self.layout.entries == NODE_ENTRIES || levels >= MAX_INDIRECT_LEVELS_LARGE_DIR {
            return Err(Corrupt::value(WHAT, format!("no level fits below {levels}")));
        }
        self.copy_tail_into(new, 0)?;
        self.layout.count = 1;
        self.write_counts();
        self.set_block(0, number);
        self.bytes[levels_at] = levels + 1;
        Ok(())
    }

    /// Copies the elements from index `from` on into a new node.
    fn copy_tail_into(&self, new: &mut [u8], from: usize) -> Result<()> {
        let mut node = DxBlockMut::init_node(new, self.csum, LogicalBlock(0))?;
        let count = self.layout.count - from;
        if count > node.layout.limit {
            return Err(Corrupt::truncated(WHAT, node.layout.limit, count));
        }
        let start = self.layout.entries + from * ENTRY_SIZE;
        let bytes = &self.bytes[start..start + count * ENTRY_SIZE];
        let to = node.layout.entries;
        node.bytes[to..to + bytes.len()].copy_from_slice(bytes);
        node.layout.count = count;
        node.write_counts();
        Ok(())
    }

    /// Sets the checksum; nothing without metadata_csum.
    pub fn set_checksum(&mut self, inode_seed: u32) {
        if !self.csum {
            return;
        }
        let (_, computed) =
            checksum(self.bytes, self.layout, inode_seed).expect("the layout leaves the tail room");
        let at = self.layout.entries + self.layout.limit * ENTRY_SIZE + 4;
        self.bytes[at..at + 4].copy_from_slice(U32::new(computed).as_bytes());
    }
}

/// Turns a full linear block 0 into the root of an index with one leaf: all
/// entries but `.` and `..` go to `leaf`, which becomes directory block
/// `leaf_number`. Both blocks still need their checksums.
///
/// # Errors
/// What is wrong with the linear block; then nothing was changed.
pub fn convert_to_index(
    block: &mut [u8],
    leaf: &mut [u8],
    leaf_number: LogicalBlock,
    format: DirFormat,
    version: HashVersion,
) -> Result<()> {
    let linear = DirBlock::new(block, format);
    let (mut dots, mut rest) = (Vec::new(), Vec::new());
    for entry in linear.entries() {
        let entry = entry?;
        match dots.len() {
            0 | 1 => dots.push((entry.inode, entry.name.to_vec())),
            _ if entry.in_use() => rest.push(PackedEntry::from(entry)),
            _ => {}
        }
    }
    let good = dots.len() == 2
        && dots[0].1 == b"."
        && dots[1].1 == b".."
        && dots.iter().all(|dot| dot.0.0 != 0);
    let limit = capacity(block.len(), ROOT_INFO + 8, format.csum);
    if !good || limit < 2 || leaf.len() != block.len() || leaf_number.0 > BLOCK_MASK {
        return Err(Corrupt::value(WHAT, "block 0 does not begin with `.` and `..`"));
    }
    pack_into(leaf, &rest, format)?;
    let (this, parent) = (dots[0].0, dots[1].0);
    let mut root = DirBlockMut::new(block, DirFormat { csum: false, ..format });
    root.init_dot(this, parent);
    init_root_info(block, version, leaf_number, format.csum)
}

/// Makes a block whose `.` and `..` are written the root of an index with one leaf.
fn init_root_info(
    block: &mut [u8],
    version: HashVersion,
    leaf: LogicalBlock,
    csum: bool,
) -> Result<()> {
    let info = RawDxRootInfo {
        reserved_zero: U32::ZERO,
        hash_version: version.root_raw(),
        info_length: 8,
        indirect_levels: 0,
        unused_flags: 0,
    };
    let entries = ROOT_INFO + info.as_bytes().len();
    block[ROOT_INFO..entries].copy_from_slice(info.as_bytes());
    let limit = capacity(block.len(), entries, csum);
    let layout = Layout { entries, limit, count: 1 };
    let mut root = DxBlockMut { bytes: block, layout, csum };
    root.write_counts();
    root.set_block(0, leaf);
    Ok(())
}

/// Fills a block with entries, packed, the last one taking the rest.
fn pack_into(block: &mut [u8], entries: &[PackedEntry], format: DirFormat) -> Result<()> {
    let need: usize = entries.iter().map(|entry| entry_size(entry.name.len())).sum();
    if need > block.len() {
        return Err(Corrupt::truncated(WHAT, block.len(), need));
    }
    block.fill(0);
    let size = block.len();
    let mut packer = DirBlockMut::new(block, format);
    let (mut at, mut last) = (0, None);
    for entry in entries {
        let end = packer.pack(at, entry).ok_or_else(|| Corrupt::truncated(WHAT, size, need))?;
        (last, at) = (Some(at), end);
    }
    packer.finish_packing(last);
    Ok(())
}

/// One entry of a leaf, in the order of hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MapEntry {
    /// Its hash.
    pub hash: u32,
    /// Its offset in the leaf.
    pub offset: usize,
    /// The bytes it needs.
    pub size: usize,
}

/// The used entries of a leaf in the order of their hashes.
///
/// # Errors
/// The first bad entry.
pub fn leaf_map(leaf: DirBlock<'_>, hasher: &DirHasher) -> Result<Vec<MapEntry>> {
    let mut map = Vec::new();
    for entry in leaf.entries() {
        let entry = entry?;
        if entry.in_use() && !entry.name.is_empty() {
            map.push(MapEntry {
                hash: hasher.hash(entry.name).hash,
                offset: entry.offset,
                size: entry_size(entry.name.len()),
            });
        }
    }
    map.sort_unstable();
    Ok(map)
}

/// Where a sorted map is cut: the index of the first entry of the upper part.
/// As many of the largest hashes as fill half a block go up; when all fit,
/// half of them by count, so that neither part is more than half full.
pub fn split_point(map: &[MapEntry], block_size: usize) -> usize {
    let mut size = 0;
    for (index, entry) in map.iter().enumerate().rev() {
        if size + entry.size / 2 > block_size / 2 {
            return index + 1;
        }
        size += entry.size;
    }
    map.len() / 2
}

/// What a split tells the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafSplit {
    /// The smallest hash in the new leaf: an entry with this hash or above goes there.
    pub hash: u32,
    /// Entries with this very hash also stayed in the old leaf.
    pub continued: bool,
}

impl LeafSplit {
    /// The hash of the new leaf's element in the index: bit 0 marks a continued hash.
    pub fn index_hash(self) -> u32 {
        self.hash | u32::from(self.continued)
    }
}

/// Splits a leaf: the entries with the larger hashes go to `new`, which becomes
/// a leaf; both are packed. Both still need their checksums.
///
/// # Errors
/// What is wrong with the leaf, or `Value` when it has fewer than two entries;
/// then nothing was changed.
pub fn split_leaf(
    leaf: &mut [u8],
    new: &mut [u8],
    format: DirFormat,
    hasher: &DirHasher,
) -> Result<LeafSplit> {
    let view = DirBlock::new(leaf, format);
    let map = leaf_map(view, hasher)?;
    let split = split_point(&map, leaf.len());
    if split == 0 || split >= map.len() || new.len() != leaf.len() {
        return Err(Corrupt::value(WHAT, format!("cannot split a leaf of {}", map.len())));
    }
    let continued = map[split].hash == map[split - 1].hash;
    let result = LeafSplit { hash: map[split].hash, continued };
    let (mut lower, mut upper) = (Vec::new(), Vec::new());
    let moves: std::collections::HashSet<usize> =
        map[split..].iter().map(|entry| entry.offset).collect();
    for entry in view.entries().flatten().filter(DirEntry::in_use) {
        let part = if moves.contains(&entry.offset) { &mut upper } else { &mut lower };
        part.push(PackedEntry::from(entry));
    }
    pack_into(new, &upper, format)?;
    pack_into(leaf, &lower, format)?;
    Ok(result)
}

/// Makes a block the root of an index of a directory: for tools that rebuild one.
///
/// # Errors
/// `Truncated` when the block is too small.
pub fn init_root(
    block: &mut [u8],
    (this, parent): (InodeNumber, InodeNumber),
    leaf: LogicalBlock,
    format: DirFormat,
    version: HashVersion,
) -> Result<()> {
    if capacity(block.len(), ROOT_INFO + 8, format.csum) < 2 {
        return Err(Corrupt::truncated(WHAT, block.len(), ROOT_INFO + 8 + 2 * ENTRY_SIZE));
    }
    DirBlockMut::new(block, DirFormat { csum: false, ..format }).init_dot(this, parent);
    init_root_info(block, version, leaf, format.csum)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dirhash::HashFunction;

    const FORMAT: DirFormat = DirFormat { filetype: true, csum: true, inodes_count: 100_000 };
    const VERSION: HashVersion = HashVersion { function: HashFunction::HalfMd4, unsigned: false };
    const HASHER: DirHasher = DirHasher { version: VERSION, seed: [1, 2, 3, 4] };

    fn names_of(block: &[u8]) -> Vec<Vec<u8>> {
        DirBlock::new(block, FORMAT)
            .entries()
            .map(|entry| entry.expect("the block is sound"))
            .filter(DirEntry::in_use)
            .map(|entry| entry.name.to_vec())
            .collect()
    }

    fn full_linear_block(size: usize) -> (Vec<u8>, Vec<Vec<u8>>) {
        let mut bytes = vec![0; size];
        let mut block = DirBlockMut::new(&mut bytes, FORMAT);
        block.init_dot(InodeNumber(12), InodeNumber(2));
        let mut names = Vec::new();
        for number in 13u32.. {
            let name = format!("file-{number:x}").into_bytes();
            let kind = crate::dir_entry::FileType::Regular;
            if block.insert(&name, InodeNumber(number), kind).unwrap().is_none() {
                break;
            }
            names.push(name);
        }
        (bytes, names)
    }

    #[test]
    fn a_full_block_becomes_a_root_and_a_leaf_and_the_leaf_splits_by_hash() {
        let (mut root, mut names) = full_linear_block(1024);
        let (mut leaf, mut new) = (vec![0; 1024], vec![0; 1024]);
        convert_to_index(&mut root, &mut leaf, LogicalBlock(1), FORMAT, VERSION).unwrap();
        let split = split_leaf(&mut leaf, &mut new, FORMAT, &HASHER).unwrap();
        let mut edit = DxBlockMut::root(&mut root, true).unwrap();
        assert!(edit.insert_after(0, split.index_hash(), LogicalBlock(2)));
        edit.set_checksum(5);

        let (view, info) = DxBlock::root(&root, true).unwrap();
        assert_eq!(view.verify_checksum(5), Ok(()));
        assert_eq!((info.hash_version, info.indirect_levels, info.flags), (1, 0, 0));
        for (number, block) in [(1, &leaf), (2, &new)] {
            for name in names_of(block) {
                let at = view.lookup(HASHER.hash(&name).hash);
                assert_eq!(view.entry(at).block, LogicalBlock(number));
            }
        }
        let mut both = [names_of(&leaf), names_of(&new)].concat();
        both.sort();
        names.sort();
        assert_eq!(both, names);
        // To a program that knows only linear directories the root holds two names.
        let linear = DirFormat { csum: false, ..FORMAT };
        assert_eq!(DirBlock::new(&root, linear).entries().flatten().count(), 2);
    }

    #[test]
    fn a_full_root_gets_a_level_and_its_node_splits() {
        let mut root = vec![0; 1024];
        let dots = (InodeNumber(12), InodeNumber(2));
        init_root(&mut root, dots, LogicalBlock(1), FORMAT, VERSION).unwrap();
        let mut edit = DxBlockMut::root(&mut root, true).unwrap();
        let mut count = 1;
        while edit.insert_after(count - 1, (count as u32) * 16, LogicalBlock(count as u32)) {
            count += 1;
        }
        assert_eq!(count, (1024 - 32 - 8) / 8);
        let (mut first, mut second) = (vec![0; 1024], vec![0; 1024]);
        edit.push_level(&mut first, LogicalBlock(500)).unwrap();
        let mut node = DxBlockMut::node(&mut first, true).unwrap();
        let hash = node.split_into(&mut second).unwrap();
        node.set_checksum(1);
        assert!(edit.insert_after(0, hash, LogicalBlock(501)));

        let (view, info) = DxBlock::root(&root, true).unwrap();
        assert_eq!((info.indirect_levels, view.count()), (1, 2));
        let nodes = [&first, &second].map(|bytes| DxBlock::node(bytes, true).unwrap());
        assert_eq!(nodes[0].verify_checksum(1), Ok(()));
        for number in 1..count as u32 {
            let node = nodes[view.lookup(number * 16 + 6)];
            let found = node.entry(node.lookup(number * 16 + 6));
            assert_eq!(found.block, LogicalBlock(number));
        }
    }

    #[test]
    fn impossible_counts_are_refused() {
        let mut bytes = vec![0; 1024];
        DxBlockMut::init_node(&mut bytes, false, LogicalBlock(3)).unwrap();
        assert!(DxBlock::node(&bytes, false).is_ok());
        assert!(DxBlock::node(&bytes, true).is_err(), "the limit leaves no room for a tail");
        for count in [0u16, 128, 0xFFFF] {
            bytes[10..12].copy_from_slice(&count.to_le_bytes());
            assert_eq!(
                DxBlock::node(&bytes, false).err().map(|e| e.kind),
                Some(CorruptKind::Value)
            );
        }
        assert!(DxBlock::node(&[0; 3], false).is_err());
        assert!(DxBlock::root(&[0; 31], false).is_err());
    }

    proptest! {
        #[test]
        fn a_split_keeps_every_entry_and_fits(lengths in prop::collection::vec(1usize..=255, 1..60)) {
            let mut leaf = vec![0; 4096];
            let mut block = DirBlockMut::new(&mut leaf, FORMAT);
            block.init_empty();
            let mut names = Vec::new();
            for (number, length) in lengths.into_iter().enumerate() {
                let name = format!("{number:x}-").bytes().cycle().take(length).collect::<Vec<_>>();
                let unique = !names.contains(&name);
                let kind = crate::dir_entry::FileType::Regular;
                if unique && block.insert(&name, InodeNumber(12), kind).unwrap().is_some() {
                    names.push(name);
                }
            }
            prop_assume!(names.len() > 1);
            let mut new = vec![0; 4096];
            let split = split_leaf(&mut leaf, &mut new, FORMAT, &HASHER).unwrap();
            let (low, high) = (names_of(&leaf), names_of(&new));
            prop_assert!(!low.is_empty() && !high.is_empty());
            prop_assert!(low.iter().all(|name| HASHER.hash(name).hash <= split.hash));
            prop_assert!(high.iter().all(|name| HASHER.hash(name).hash >= split.hash));
            let mut both = [low, high].concat();
            both.sort();
            names.sort();
            prop_assert_eq!(both, names);
        }

        #[test]
        fn any_bytes_parse_or_fail_and_never_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200), csum: bool, hash: u32,
        ) {
            if let Ok((root, _)) = DxBlock::root(&bytes, csum) {
                root.entry(root.lookup(hash));
            }
            if bytes.len() >= 6 {
                let length = u16::try_from(bytes.len()).unwrap();
                bytes[..4].fill(0);
                bytes[4..6].copy_from_slice(&length.to_le_bytes());
            }
            if let Ok(node) = DxBlock::node(&bytes, csum) {
                node.entry(node.lookup(hash));
                let _ = node.verify_checksum(1);
            }
        }
    }
}
