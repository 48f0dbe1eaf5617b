//! Extended attributes, in an inode's body and in a block of their own.
//!
//! Source: Documentation/filesystems/ext4/attributes.rst. Entries grow from the
//! start of the area, their values from its end; four zero bytes end the
//! entries. Value offsets count from the first entry in an inode, from the
//! start of the block in a block. Several inodes may share one block
//! (`h_refcount`), so it carries hashes and its checksum knows its place.
//!
//! Invariants:
//! - An [`XattrArea`] was validated whole: names and values lie inside it, and
//!   no value reaches into the entries. Values that overlap each other are for
//!   [`XattrArea::check_overlap`]; reading them is harmless.
//! - Writing goes by way of [`XattrSet`], an owned copy bounded by the area it
//!   came from, which is written back whole; entries in a block are sorted as
//!   Linux searches them (index, then length of the name, then its bytes).

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc32c;
use crate::error::{Corrupt, CorruptKind, Result};
use crate::units::{FsBlock, InodeNumber};

const WHAT: &str = "extended attributes";

/// `EXT4_XATTR_MAGIC`, of both forms.
pub const MAGIC: u32 = 0xEA02_0000;
/// Bytes of the header of a block.
pub const BLOCK_HEADER: usize = size_of::<RawXattrHeader>();
/// Bytes of the header in an inode.
pub const IBODY_HEADER: usize = 4;
/// Most inodes that share a block (`EXT4_XATTR_REFCOUNT_MAX`).
pub const REFCOUNT_MAX: u32 = 1024;
/// Longest value Linux passes through (`XATTR_SIZE_MAX`), bytes.
pub const VALUE_MAX: usize = 65536;
/// Longest name without its prefix, bytes.
pub const NAME_MAX: usize = 255;
const ENTRY_HEADER: usize = size_of::<RawXattrEntry>();
/// The four zero bytes that end the entries.
const END_SIZE: usize = 4;

/// `struct ext4_xattr_header`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; attributes.rst describes them.
pub struct RawXattrHeader {
    pub h_magic: U32,
    pub h_refcount: U32,
    pub h_blocks: U32,
    pub h_hash: U32,
    pub h_checksum: U32,
    pub h_reserved: [U32; 3],
}

/// `struct ext4_xattr_entry`, without its name.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; attributes.rst describes them.
pub struct RawXattrEntry {
    pub e_name_len: u8,
    pub e_name_index: u8,
    pub e_value_offs: U16,
    pub e_value_inum: U32,
    pub e_value_size: U32,
    pub e_hash: U32,
}

const _: () = assert!(BLOCK_HEADER == 32 && ENTRY_HEADER == 16);
const _: () = assert!(offset_of!(RawXattrHeader, h_checksum) == 16);

/// The prefix a name begins with, kept as a number (`e_name_index`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NameIndex(pub u8);

impl NameIndex {
    /// `user.`
    pub const USER: Self = Self(1);
    /// `system.posix_acl_access`, the whole name.
    pub const POSIX_ACL_ACCESS: Self = Self(2);
    /// `system.posix_acl_default`, the whole name.
    pub const POSIX_ACL_DEFAULT: Self = Self(3);
    /// `trusted.`
    pub const TRUSTED: Self = Self(4);
    /// `security.`
    pub const SECURITY: Self = Self(6);
    /// `system.`: inline data lives in `system.data`.
    pub const SYSTEM: Self = Self(7);

    /// Every prefix the format numbers; those of whole names first.
    const PREFIXES: [(Self, &'static str); 6] = [
        (Self::POSIX_ACL_ACCESS, "system.posix_acl_access"),
        (Self::POSIX_ACL_DEFAULT, "system.posix_acl_default"),
        (Self::USER, "user."),
        (Self::TRUSTED, "trusted."),
        (Self::SECURITY, "security."),
        (Self::SYSTEM, "system."),
    ];

    /// Splits a full name; `None` when its prefix has no number.
    pub fn split(name: &[u8]) -> Option<(Self, &[u8])> {
        Self::PREFIXES.iter().find_map(|&(index, prefix)| {
            let rest = name.strip_prefix(prefix.as_bytes())?;
            let whole = matches!(index, Self::POSIX_ACL_ACCESS | Self::POSIX_ACL_DEFAULT);
            (rest.is_empty() == whole).then_some((index, rest))
        })
    }

    /// The prefix; `None` for a number Linux does not show.
    pub fn prefix(self) -> Option<&'static str> {
        Self::PREFIXES.iter().find(|(index, _)| *index == self).map(|&(_, prefix)| prefix)
    }
}

/// Where a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrValue<'a> {
    /// Beside the entries.
    Inline(&'a [u8]),
    /// In an inode of its own (the ea_inode feature).
    Inode {
        /// That inode.
        inode: InodeNumber,
        /// Bytes of the value.
        size: u32,
    },
}

/// One attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XattrEntry<'a> {
    /// The prefix.
    pub index: NameIndex,
    /// The name after the prefix.
    pub name: &'a [u8],
    /// The value.
    pub value: XattrValue<'a>,
    /// `e_hash`; 0 in an inode whose values were never shared.
    pub hash: u32,
    /// Bytes from the start of the area to the entry.
    pub offset: usize,
    /// `e_value_offs`, counted as the area counts.
    pub value_offset: usize,
}

/// Bytes of an entry with a name of `name_len` bytes.
pub fn entry_size(name_len: usize) -> usize {
    (ENTRY_HEADER + name_len).next_multiple_of(4)
}

/// Bytes a value takes.
pub fn value_size(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// The attributes of an inode's body or of a block, validated.
#[derive(Clone, Copy)]
pub struct XattrArea<'a> {
    bytes: &'a [u8],
    /// Where the first entry lies.
    first: usize,
    /// Where value offsets count from.
    base: usize,
    /// Where the entries' end mark lies.
    end: usize,
}

impl<'a> XattrArea<'a> {
    /// The attributes of an inode's body: `bytes` is everything after
    /// `i_extra_isize`. `None` when there are none (no magic).
    ///
    /// # Errors
    /// `Value` for entries that do not fit.
    pub fn ibody(bytes: &'a [u8]) -> Result<Option<Self>> {
        let magic = U32::ref_from_prefix(bytes).map(|(magic, _)| magic.get());
        if magic != Ok(MAGIC) {
            return Ok(None);
        }
        Self::validate(bytes, IBODY_HEADER, IBODY_HEADER).map(Some)
    }

    /// The attributes of a block.
    ///
    /// # Errors
    /// `Magic` when it is no attribute block, `Value`, `Truncated`.
    pub fn block(bytes: &'a [u8]) -> Result<Self> {
        let (header, _) = RawXattrHeader::ref_from_prefix(bytes)
            .map_err(|_| Corrupt::truncated(WHAT, bytes.len(), BLOCK_HEADER))?;
        if header.h_magic.get() != MAGIC {
            let detail = format!("h_magic is {:#010x}", header.h_magic);
            return Err(Corrupt::new(CorruptKind::Magic, WHAT, detail));
        }
        if header.h_blocks.get() != 1 {
            return Err(Corrupt::value(WHAT, format!("h_blocks is {}", header.h_blocks)));
        }
        Self::validate(bytes, BLOCK_HEADER, 0)
    }

    fn validate(bytes: &'a [u8], first: usize, base: usize) -> Result<Self> {
        let mut end = first;
        while !ends_at(bytes, end)? {
            end = entry_at(bytes, base, end)?.1;
        }
        let area = Self { bytes, first, base, end };
        let entries_end = end + END_SIZE;
        for entry in area.entries() {
            if let XattrValue::Inline(value) = entry.value
                && !value.is_empty()
                && entry.value_offset + base < entries_end
            {
                let detail = format!("the value at {} lies in the entries", entry.value_offset);
                return Err(Corrupt::value(WHAT, detail));
            }
        }
        Ok(area)
    }

    /// The attributes, in the order they lie.
    pub fn entries(&self) -> XattrEntries<'a> {
        XattrEntries { area: *self, at: self.first }
    }

    /// The attribute of a name.
    pub fn get(&self, index: NameIndex, name: &[u8]) -> Option<XattrEntry<'a>> {
        self.entries().find(|entry| entry.index == index && entry.name == name)
    }

    /// Whether two values share bytes, which only a writer must care about.
    ///
    /// # Errors
    /// `Value`.
    pub fn check_overlap(&self) -> Result<()> {
        let mut ranges: Vec<_> = self
            .entries()
            .filter_map(|entry| match entry.value {
                XattrValue::Inline(value) if !value.is_empty() => {
                    Some((entry.value_offset, entry.value_offset + value_size(value.len())))
                }
                _ => None,
            })
            .collect();
        ranges.sort_unstable();
        match ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => Err(Corrupt::value(WHAT, format!("two values overlap at {}", pair[1].0))),
            None => Ok(()),
        }
    }

    /// The header's `h_refcount` and `h_hash`; `None` in an inode's body.
    pub fn header(&self) -> Option<&'a RawXattrHeader> {
        (self.base == 0)
            .then(|| RawXattrHeader::ref_from_prefix(self.bytes).ok().map(|(header, _)| header))
            .flatten()
    }

    /// Checks the checksum of a block at `number` (metadata_csum only); the seed
    /// is the filesystem's, since inodes share the block.
    ///
    /// # Errors
    /// `Checksum`.
    pub fn verify_checksum(&self, fs_seed: u32, number: FsBlock) -> Result<()> {
        let stored = self.header().map_or(0, |header| header.h_checksum.get());
        let computed = block_checksum(self.bytes, fs_seed, number);
        if stored == computed { Ok(()) } else { Err(Corrupt::checksum(WHAT, stored, computed)) }
    }
}

fn ends_at(bytes: &[u8], at: usize) -> Result<bool> {
    let mark = bytes.get(at..).and_then(|rest| U32::ref_from_prefix(rest).ok());
    match mark {
        Some((mark, _)) => Ok(mark.get() == 0),
        None => Err(Corrupt::value(WHAT, format!("the entries do not end by {}", bytes.len()))),
    }
}

/// The entry at an offset and where the next begins.
fn entry_at(bytes: &[u8], base: usize, at: usize) -> Result<(XattrEntry<'_>, usize)> {
    let bad = |detail: String| Corrupt::value(WHAT, format!("entry at {at}: {detail}"));
    let (raw, rest) = bytes
        .get(at..)
        .and_then(|rest| RawXattrEntry::ref_from_prefix(rest).ok())
        .ok_or_else(|| bad("cut off".into()))?;
    let name_len = usize::from(raw.e_name_len);
    // Written back with an empty value it would read as the end of the entries.
    if name_len == 0 && raw.e_name_index == 0 {
        return Err(bad("neither prefix nor name".into()));
    }
    let next = at + entry_size(name_len);
    let name = rest.get(..name_len).ok_or_else(|| bad(format!("name_len is {name_len}")))?;
    if next > bytes.len() {
        return Err(bad(format!("name_len is {name_len}")));
    }
    let (offset, size) = (usize::from(raw.e_value_offs.get()), raw.e_value_size.get());
    let value = match raw.e_value_inum.get() {
        0 => {
            let start = if size == 0 { base } else { base + offset };
            let range = usize::try_from(size)
                .ok()
                .filter(|_| offset.is_multiple_of(4) || size == 0)
                .and_then(|size| {
                    start.checked_add(value_size_checked(size)?).map(|end| (size, end))
                })
                .filter(|&(_, end)| end <= bytes.len())
                .and_then(|(size, _)| bytes.get(start..start + size));
            let value = range.ok_or_else(|| bad(format!("{size} bytes of value at {offset}")))?;
            XattrValue::Inline(value)
        }
        inode => XattrValue::Inode { inode: InodeNumber(inode), size },
    };
    let index = NameIndex(raw.e_name_index);
    let entry =
        XattrEntry { index, name, value, hash: raw.e_hash.get(), offset: at, value_offset: offset };
    Ok((entry, next))
}

fn value_size_checked(size: usize) -> Option<usize> {
    size.checked_next_multiple_of(4)
}

/// See [`XattrArea::entries`].
pub struct XattrEntries<'a> {
    area: XattrArea<'a>,
    at: usize,
}

impl<'a> Iterator for XattrEntries<'a> {
    type Item = XattrEntry<'a>;

    fn next(&mut self) -> Option<XattrEntry<'a>> {
        if self.at >= self.area.end {
            return None;
        }
        // Validation walked the same bytes, so this cannot fail.
        let (entry, next) = entry_at(self.area.bytes, self.area.base, self.at).ok()?;
        self.at = next;
        Some(entry)
    }
}

/// The checksum of a block: of its own number, and of its bytes with `h_checksum` zero.
fn block_checksum(bytes: &[u8], fs_seed: u32, number: FsBlock) -> u32 {
    let at = offset_of!(RawXattrHeader, h_checksum);
    let seed = crc32c(fs_seed, U64::new(number.0).as_bytes());
    let (head, rest) = (bytes.get(..at).unwrap_or(bytes), bytes.get(at + 4..).unwrap_or(&[]));
    crc32c(crc32c(crc32c(seed, head), &[0; 4]), rest)
}

/// `e_hash` of an attribute whose value lies beside it: of name and value.
pub fn entry_hash(name: &[u8], value: &[u8]) -> u32 {
    mix_value(mix_name(name, u32::from), value)
}

/// As [`entry_hash`], with the name's bytes taken as signed: what Linux wrote on
/// most machines before 6.2 for names beyond ASCII, and still accepts.
pub fn entry_hash_signed(name: &[u8], value: &[u8]) -> u32 {
    mix_value(mix_name(name, |byte| i32::from(byte.cast_signed()).cast_unsigned()), value)
}

fn mix_name(name: &[u8], widen: fn(u8) -> u32) -> u32 {
    name.iter().fold(0u32, |hash, &byte| hash.rotate_left(5) ^ widen(byte))
}

fn mix_value(hash: u32, value: &[u8]) -> u32 {
    value.chunks(4).fold(hash, |hash, chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        hash.rotate_left(16) ^ u32::from_le_bytes(word)
    })
}

/// `h_hash` of a block, from its entries' hashes in order; 0, meaning that it
/// must not be shared, when one of them is 0.
pub fn block_hash(hashes: impl IntoIterator<Item = u32>) -> u32 {
    let mut block = 0u32;
    for hash in hashes {
        if hash == 0 {
            return 0;
        }
        block = block.rotate_left(16) ^ hash;
    }
    block
}

/// Why an attribute was not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetError {
    /// The name is empty (only whole-name prefixes have none) or too long: `ERANGE`.
    #[error("the attribute's name has {0} bytes, at most {NAME_MAX} fit")]
    Name(usize),
    /// The area has no room for it: `ENOSPC`.
    #[error("the attributes need {need} bytes, there are {room}")]
    NoSpace {
        /// Bytes needed.
        need: usize,
        /// Bytes there are.
        room: usize,
    },
}

/// An owned value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnedValue {
    /// Beside the entries.
    Inline(Vec<u8>),
    /// In an inode of its own.
    Inode {
        /// That inode.
        inode: InodeNumber,
        /// Bytes of the value.
        size: u32,
        /// `e_hash`, which only that inode's contents give.
        hash: u32,
    },
}

impl OwnedValue {
    /// Bytes it takes beside the entries.
    fn room(&self) -> usize {
        match self {
            Self::Inline(value) => value_size(value.len()),
            Self::Inode { .. } => 0,
        }
    }
}

/// An owned attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedXattr {
    /// The prefix.
    pub index: NameIndex,
    /// The name after the prefix.
    pub name: Vec<u8>,
    /// The value.
    pub value: OwnedValue,
}

/// The attributes of one area, to change and write back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XattrSet {
    entries: Vec<OwnedXattr>,
}

impl From<XattrArea<'_>> for XattrSet {
    fn from(area: XattrArea<'_>) -> Self {
        let owned = |entry: XattrEntry<'_>| OwnedXattr {
            index: entry.index,
            name: entry.name.to_vec(),
            value: match entry.value {
                XattrValue::Inline(value) => OwnedValue::Inline(value.to_vec()),
                XattrValue::Inode { inode, size } => {
                    OwnedValue::Inode { inode, size, hash: entry.hash }
                }
            },
        };
        Self { entries: area.entries().map(owned).collect() }
    }
}

impl XattrSet {
    /// No attributes.
    pub fn new() -> Self {
        Self::default()
    }

    /// The attributes.
    pub fn entries(&self) -> &[OwnedXattr] {
        &self.entries
    }

    /// Whether there are none: then a block is freed, an inode's header zeroed.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of a name.
    pub fn get(&self, index: NameIndex, name: &[u8]) -> Option<&OwnedValue> {
        self.entries
            .iter()
            .find(|entry| entry.index == index && entry.name == name)
            .map(|entry| &entry.value)
    }

    /// Adds or replaces an attribute; the value it had. Whether all fit is known
    /// when they are written.
    ///
    /// # Errors
    /// `Name`.
    pub fn set(
        &mut self,
        index: NameIndex,
        name: &[u8],
        value: OwnedValue,
    ) -> std::result::Result<Option<OwnedValue>, SetError> {
        let whole = matches!(index, NameIndex::POSIX_ACL_ACCESS | NameIndex::POSIX_ACL_DEFAULT);
        if name.len() > NAME_MAX || name.is_empty() != whole {
            return Err(SetError::Name(name.len()));
        }
        let found = self.entries.iter_mut().find(|e| e.index == index && e.name == name);
        if let Some(entry) = found {
            return Ok(Some(std::mem::replace(&mut entry.value, value)));
        }
        self.entries.push(OwnedXattr { index, name: name.to_vec(), value });
        Ok(None)
    }

    /// Removes an attribute; the value it had.
    pub fn remove(&mut self, index: NameIndex, name: &[u8]) -> Option<OwnedValue> {
        let at = self.entries.iter().position(|e| e.index == index && e.name == name)?;
        Some(self.entries.remove(at).value)
    }

    /// Bytes of entries, their end mark, and values: what must fit beside the header.
    pub fn size(&self) -> usize {
        let size = |entry: &OwnedXattr| entry_size(entry.name.len()) + entry.value.room();
        END_SIZE + self.entries.iter().map(size).sum::<usize>()
    }

    /// Whether the attributes fit an inode's body of `len` bytes after `i_extra_isize`.
    pub fn fits_ibody(&self, len: usize) -> bool {
        self.is_empty() || IBODY_HEADER + self.size() <= len
    }

    /// Whether the attributes fit a block.
    pub fn fits_block(&self, block_size: usize) -> bool {
        BLOCK_HEADER + self.size() <= block_size
    }

    /// Writes the attributes over an inode's body after `i_extra_isize`; without
    /// any, the body is zeroed.
    ///
    /// # Errors
    /// `NoSpace`; then nothing was written.
    pub fn write_ibody(&self, bytes: &mut [u8]) -> std::result::Result<(), SetError> {
        if !self.fits_ibody(bytes.len()) {
            let room = bytes.len().saturating_sub(IBODY_HEADER);
            return Err(SetError::NoSpace { need: self.size(), room });
        }
        bytes.fill(0);
        if self.is_empty() {
            return Ok(());
        }
        bytes[..IBODY_HEADER].copy_from_slice(U32::new(MAGIC).as_bytes());
        // Linux hashes only what may be shared, so entries in an inode have none.
        let order: Vec<&OwnedXattr> = self.entries.iter().collect();
        write_entries(bytes, IBODY_HEADER, IBODY_HEADER, &order, |_| 0);
        Ok(())
    }

    /// Writes the attributes over a block, sorted, with their hashes. The
    /// checksum is set by [`set_block_checksum`].
    ///
    /// # Errors
    /// `NoSpace`; then nothing was written.
    pub fn write_block(
        &self,
        bytes: &mut [u8],
        refcount: u32,
    ) -> std::result::Result<(), SetError> {
        if !self.fits_block(bytes.len()) {
            let room = bytes.len().saturating_sub(BLOCK_HEADER);
            return Err(SetError::NoSpace { need: self.size(), room });
        }
        let mut order: Vec<&OwnedXattr> = self.entries.iter().collect();
        order.sort_by(|a, b| {
            let key = |entry: &OwnedXattr| (entry.index, entry.name.len());
            key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
        });
        let hash = |entry: &OwnedXattr| match &entry.value {
            OwnedValue::Inline(value) => entry_hash(&entry.name, value),
            OwnedValue::Inode { hash, .. } => *hash,
        };
        bytes.fill(0);
        write_entries(bytes, BLOCK_HEADER, 0, &order, hash);
        let header = RawXattrHeader {
            h_magic: U32::new(MAGIC),
            h_refcount: U32::new(refcount),
            h_blocks: U32::new(1),
            h_hash: U32::new(block_hash(order.iter().map(|entry| hash(entry)))),
            h_checksum: U32::ZERO,
            h_reserved: [U32::ZERO; 3],
        };
        bytes[..BLOCK_HEADER].copy_from_slice(header.as_bytes());
        Ok(())
    }
}

/// Writes entries from `first` on and values from the end down. They fit.
fn write_entries(
    bytes: &mut [u8],
    first: usize,
    base: usize,
    entries: &[&OwnedXattr],
    inline_hash: impl Fn(&OwnedXattr) -> u32,
) {
    // An inode's body may end unaligned to the base; values stay aligned to it.
    let mut top = base + (bytes.len() - base) / 4 * 4;
    let mut at = first;
    for entry in entries {
        let (mut offset, mut inum, size) = (0, 0, entry_size(entry.name.len()));
        let (value_len, hash) = match &entry.value {
            OwnedValue::Inline(value) => {
                if !value.is_empty() {
                    top -= value_size(value.len());
                    bytes[top..top + value.len()].copy_from_slice(value);
                    offset = top - base;
                }
                (value.len(), inline_hash(entry))
            }
            OwnedValue::Inode { inode, size, hash } => {
                inum = inode.0;
                (usize::try_from(*size).unwrap_or(usize::MAX), *hash)
            }
        };
        let raw = RawXattrEntry {
            e_name_len: u8::try_from(entry.name.len()).expect("names are at most 255 bytes"),
            e_name_index: entry.index.0,
            e_value_offs: U16::new(u16::try_from(offset).expect("an area is at most 64 KiB")),
            e_value_inum: U32::new(inum),
            e_value_size: U32::new(u32::try_from(value_len).expect("a value is below 4 GiB")),
            e_hash: U32::new(hash),
        };
        bytes[at..at + ENTRY_HEADER].copy_from_slice(raw.as_bytes());
        let name = at + ENTRY_HEADER;
        bytes[name..name + entry.name.len()].copy_from_slice(&entry.name);
        at += size;
    }
}

/// Changes `h_refcount` of a block in place.
///
/// # Errors
/// `Truncated`.
pub fn set_block_refcount(bytes: &mut [u8], refcount: u32) -> Result<()> {
    let have = bytes.len();
    let (header, _) = RawXattrHeader::mut_from_prefix(bytes)
        .map_err(|_| Corrupt::truncated(WHAT, have, BLOCK_HEADER))?;
    header.h_refcount = U32::new(refcount);
    Ok(())
}

/// Sets the checksum of a block that lies at `number`.
///
/// # Errors
/// `Truncated`.
pub fn set_block_checksum(bytes: &mut [u8], fs_seed: u32, number: FsBlock) -> Result<()> {
    let computed = block_checksum(bytes, fs_seed, number);
    let have = bytes.len();
    let (header, _) = RawXattrHeader::mut_from_prefix(bytes)
        .map_err(|_| Corrupt::truncated(WHAT, have, BLOCK_HEADER))?;
    header.h_checksum = U32::new(computed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    type Model = BTreeMap<(u8, Vec<u8>), Vec<u8>>;

    fn contents(area: XattrArea<'_>) -> Model {
        area.entries()
            .map(|entry| match entry.value {
                XattrValue::Inline(value) => ((entry.index.0, entry.name.to_vec()), value.to_vec()),
                XattrValue::Inode { .. } => panic!("no value was put into an inode"),
            })
            .collect()
    }

    fn attributes() -> impl Strategy<Value = Vec<(u8, Vec<u8>, Vec<u8>)>> {
        let name = prop::collection::vec(any::<u8>(), 1..20);
        let value = prop::collection::vec(any::<u8>(), 0..40);
        let index = prop::sample::select(vec![1u8, 4, 6, 7]);
        prop::collection::vec((index, name, value), 0..12)
    }

    proptest! {
        #[test]
        fn what_was_set_is_read_back_from_both_areas(all in attributes(), drop_first: bool) {
            let (mut set, mut model) = (XattrSet::new(), Model::new());
            for (index, name, value) in &all {
                let owned = OwnedValue::Inline(value.clone());
                set.set(NameIndex(*index), name, owned).unwrap();
                model.insert((*index, name.clone()), value.clone());
            }
            if let (true, Some((index, name, _))) = (drop_first, all.first()) {
                prop_assert!(set.remove(NameIndex(*index), name).is_some());
                model.remove(&(*index, name.clone()));
            }
            let mut block = vec![0xFF; 1024];
            set.write_block(&mut block, 3).unwrap();
            set_block_checksum(&mut block, 5, FsBlock(9)).unwrap();
            let area = XattrArea::block(&block).unwrap();
            prop_assert_eq!(area.verify_checksum(5, FsBlock(9)), Ok(()));
            prop_assert!(area.verify_checksum(5, FsBlock(10)).is_err());
            prop_assert_eq!(area.check_overlap(), Ok(()));
            prop_assert_eq!(contents(area), model.clone());
            let keys: Vec<_> = area.entries().map(|e| (e.index, e.name.len(), e.name)).collect();
            prop_assert!(keys.is_sorted());

            let mut body = vec![0xFF; 94];
            let fits = set.fits_ibody(body.len());
            prop_assert_eq!(set.write_ibody(&mut body).is_ok(), fits);
            if fits {
                let area = XattrArea::ibody(&body).unwrap();
                prop_assert_eq!(area.map(contents).unwrap_or_default(), model);
            } else {
                prop_assert!(body.iter().all(|&byte| byte == 0xFF));
            }
        }

        #[test]
        fn any_bytes_parse_or_fail(
            mut bytes in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 40..200),
        ) {
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            if let Ok(Some(area)) = XattrArea::ibody(&bytes) {
                let _ = (area.entries().count(), area.check_overlap());
            }
            bytes[8..12].copy_from_slice(&[1, 0, 0, 0]);
            if let Ok(area) = XattrArea::block(&bytes) {
                let _ = (area.entries().count(), area.check_overlap());
            }
        }
    }

    #[test]
    fn names_split_at_their_prefix() {
        let split = |name: &'static str| NameIndex::split(name.as_bytes());
        assert_eq!(split("user.a"), Some((NameIndex::USER, &b"a"[..])));
        assert_eq!(split("security.selinux"), Some((NameIndex::SECURITY, &b"selinux"[..])));
        let access = Some((NameIndex::POSIX_ACL_ACCESS, &b""[..]));
        assert_eq!(split("system.posix_acl_access"), access);
        assert_eq!(split("user."), None);
        assert_eq!(split("other.a"), None);
        assert_eq!(NameIndex::TRUSTED.prefix(), Some("trusted."));
    }

    #[test]
    fn names_too_long_or_missing_are_refused() {
        let mut set = XattrSet::new();
        let value = || OwnedValue::Inline(vec![]);
        assert_eq!(set.set(NameIndex::USER, b"", value()), Err(SetError::Name(0)));
        assert_eq!(set.set(NameIndex::USER, &[65; 256], value()), Err(SetError::Name(256)));
        assert_eq!(set.set(NameIndex::POSIX_ACL_ACCESS, b"", value()), Ok(None));
    }

    #[test]
    fn hashes_rotate_names_by_5_and_values_by_16() {
        assert_eq!(entry_hash(b"a", b""), 0x61);
        assert_eq!(entry_hash(b"ab", &[1, 0, 0, 0]), (0x61 << 5 ^ 0x62) << 16 ^ 1);
        assert_ne!(entry_hash(b"\xE9x", b"v"), entry_hash_signed(b"\xE9x", b"v"));
        assert_eq!(entry_hash(b"key", b"value"), entry_hash_signed(b"key", b"value"));
        assert_eq!(block_hash([5, 0, 7]), 0);
    }
}
