//! Linear directory blocks: entries that tile a block, and their checksum.
//!
//! Source: Documentation/filesystems/ext4/directory.rst. Every entry's
//! `rec_len` leads to the next; the last ends at the block's end, or, with
//! metadata_csum, at a 12-byte tail that looks like an unused entry and holds
//! the block's checksum. An entry with inode 0 is unused space.
//!
//! Invariants:
//! - [`DirBlock`] validates as it walks; after the first bad entry it ends, so a
//!   walk is bounded by the block.
//! - Edits keep the tiling. They validate what they walk over and change
//!   nothing when they fail; they leave the checksum to the caller, once.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc32c;
use crate::error::{Corrupt, CorruptKind, Result};
use crate::units::InodeNumber;

const WHAT: &str = "directory block";
const TAIL_WHAT: &str = "directory block tail";

/// Longest name, bytes (`EXT4_NAME_LEN`).
pub const NAME_MAX: usize = 255;
/// Bytes of an entry before its name.
pub const ENTRY_HEADER: usize = 8;
/// Bytes of the tail that holds the checksum.
pub const TAIL_SIZE: usize = 12;
/// `file_type` of the tail (`EXT4_FT_DIR_CSUM`).
pub const FT_DIR_CSUM: u8 = 0xDE;
/// The shortest entry the kernel accepts: a name of one byte.
const MIN_ENTRY: usize = 12;

/// `struct ext4_dir_entry_2`, without its name.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; directory.rst describes them.
pub struct RawDirEntry {
    pub inode: U32,
    pub rec_len: U16,
    pub name_len: u8,
    pub file_type: u8,
}

/// `struct ext4_dir_entry_tail`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; directory.rst describes them.
pub struct RawDirEntryTail {
    pub det_reserved_zero1: U32,
    pub det_rec_len: U16,
    pub det_reserved_zero2: u8,
    pub det_reserved_ft: u8,
    pub det_checksum: U32,
}

const _: () = assert!(size_of::<RawDirEntry>() == ENTRY_HEADER);
const _: () = assert!(size_of::<RawDirEntryTail>() == TAIL_SIZE);
const _: () = assert!(offset_of!(RawDirEntryTail, det_checksum) == 8);

/// What an entry leads to (`EXT4_FT_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum FileType {
    Unknown,
    Regular,
    Directory,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
    Symlink,
}

impl FileType {
    /// From the byte on disk; `None` for one the format does not define.
    pub fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0 => Self::Unknown,
            1 => Self::Regular,
            2 => Self::Directory,
            3 => Self::CharDevice,
            4 => Self::BlockDevice,
            5 => Self::Fifo,
            6 => Self::Socket,
            7 => Self::Symlink,
            _ => return None,
        })
    }

    /// The byte on disk.
    pub fn raw(self) -> u8 {
        match self {
            Self::Unknown => 0,
            Self::Regular => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Socket => 6,
            Self::Symlink => 7,
        }
    }

    /// From `i_mode`; `Unknown` when its type bits are none of the seven.
    pub fn from_mode(mode: u16) -> Self {
        match mode >> 12 {
            0o10 => Self::Regular,
            0o04 => Self::Directory,
            0o02 => Self::CharDevice,
            0o06 => Self::BlockDevice,
            0o01 => Self::Fifo,
            0o14 => Self::Socket,
            0o12 => Self::Symlink,
            _ => Self::Unknown,
        }
    }
}

/// How a filesystem writes its directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirFormat {
    /// The filetype feature: entries carry the type.
    pub filetype: bool,
    /// The metadata_csum feature: blocks end in a tail with a checksum.
    pub csum: bool,
    /// `s_inodes_count`: entries may not lead further.
    pub inodes_count: u32,
}

/// The bytes an entry with a name of `name_len` bytes needs: at least those of a
/// name of one byte, since nothing shorter may follow another entry.
pub fn entry_size(name_len: usize) -> usize {
    // Rounded up to a multiple of 4.
    (ENTRY_HEADER + 3 + name_len.max(1)) & !3
}

/// `rec_len` from disk: blocks of 64 KiB and more keep the two high bits in the low ones.
pub fn rec_len_from_disk(raw: u16, block_size: usize) -> usize {
    let raw = usize::from(raw);
    if block_size < 65536 {
        raw
    } else if raw == 0 || raw == 65535 {
        block_size
    } else {
        (raw & 65532) | (raw & 3) << 16
    }
}

/// `rec_len` to disk.
///
/// # Panics
/// When the length is not a multiple of 4 inside the block: a broken promise of the caller.
pub fn rec_len_to_disk(len: usize, block_size: usize) -> u16 {
    assert!(len <= block_size && len.is_multiple_of(4), "rec_len {len} in a block of {block_size}");
    let coded = match len {
        _ if len < 65536 => len,
        65536 if block_size == 65536 => 65535,
        _ if len == block_size => 0,
        _ => (len & 65532) | (len >> 16 & 3),
    };
    u16::try_from(coded).expect("at most 65535 by construction")
}

/// One entry, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Bytes from the start of the block.
    pub offset: usize,
    /// Bytes to the next entry.
    pub rec_len: usize,
    /// Where it leads; 0 when the entry is unused.
    pub inode: InodeNumber,
    /// The raw type byte; 0 without the filetype feature.
    pub file_type: u8,
    /// The name; may hold any bytes of an unused entry.
    pub name: &'a [u8],
}

impl DirEntry<'_> {
    /// Whether it leads somewhere.
    pub fn in_use(&self) -> bool {
        self.inode.0 != 0
    }

    /// Bytes after the entry that another could take.
    pub fn free_space(&self) -> usize {
        if self.in_use() { self.rec_len - entry_size(self.name.len()) } else { self.rec_len }
    }
}

/// The numbers of an entry, checked.
#[derive(Clone, Copy)]
struct Header {
    inode: u32,
    rec_len: usize,
    name_len: usize,
    file_type: u8,
    /// Bytes that the entry needs when it is in use.
    size: usize,
}

impl Header {
    /// Bytes that the entry itself needs.
    fn used(&self) -> usize {
        if self.inode != 0 { self.size } else { 0 }
    }

    /// Bytes after the entry that another could take.
    fn free_space(&self) -> usize {
        // Not less than the size: checked.
        self.rec_len.wrapping_sub(self.used())
    }
}

/// What a search of a block came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Search<'a> {
    /// The used entry of the name.
    pub found: Option<DirEntry<'a>>,
    /// The offset of the first entry, before that of the name, with the room that was asked for.
    pub room_at: Option<usize>,
}

/// A linear directory block.
#[derive(Clone, Copy)]
pub struct DirBlock<'a> {
    bytes: &'a [u8],
    format: DirFormat,
}

impl<'a> DirBlock<'a> {
    /// A view of a whole block (or, for inline data, of its entries).
    pub fn new(bytes: &'a [u8], format: DirFormat) -> Self {
        Self { bytes, format }
    }

    /// The block's bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Where the entries end: at the tail, if the format has one.
    fn end(&self) -> usize {
        self.bytes.len().saturating_sub(if self.format.csum { TAIL_SIZE } else { 0 })
    }

    /// The entries, used and unused, in order; a bad one ends the walk with an error.
    pub fn entries(&self) -> DirEntries<'a> {
        DirEntries { block: *self, end: self.end(), at: 0 }
    }

    /// The entry at an offset.
    #[inline]
    fn entry_at(&self, at: usize, end: usize) -> Result<DirEntry<'a>> {
        self.sound_entry_at(at, end).ok_or_else(|| self.fault_at(at, end))
    }

    /// The entry at an offset, when nothing is wrong with it.
    #[inline]
    fn sound_entry_at(&self, at: usize, end: usize) -> Option<DirEntry<'a>> {
        let Header { inode, rec_len, name_len, file_type, .. } = self.sound_header_at(at, end)?;
        let file_type = if self.format.filetype { file_type } else { 0 };
        let name = self.bytes.get(at + ENTRY_HEADER..)?.get(..name_len)?;
        Some(DirEntry { offset: at, rec_len, inode: InodeNumber(inode), file_type, name })
    }

    /// The header of the entry at an offset, when nothing is wrong with it: its name lies in
    /// the block, and so does what follows. Directories are searched with this, some hundred
    /// entries for each name that is made; what is wrong is [`DirBlock::fault_at`]'s.
    #[inline]
    fn sound_header_at(&self, at: usize, end: usize) -> Option<Header> {
        let bytes = self.bytes.get(at..end)?;
        let (raw, _) = RawDirEntry::ref_from_prefix(bytes).ok()?;
        let rec_len = match raw.rec_len.get() {
            raw if self.bytes.len() < 65536 => usize::from(raw),
            raw => rec_len_from_disk(raw, self.bytes.len()),
        };
        let name_len = usize::from(raw.name_len);
        let (inode, size) = (raw.inode.get(), entry_size(name_len));
        // Past the end it wraps to something large, which the next line sees.
        let left = bytes.len().wrapping_sub(rec_len);
        let sound = rec_len <= bytes.len()
            && size <= rec_len
            && rec_len.is_multiple_of(4)
            && (left == 0 || left >= MIN_ENTRY)
            && inode <= self.format.inodes_count;
        sound.then_some(Header { inode, rec_len, name_len, file_type: raw.file_type, size })
    }

    /// What is wrong with the entry at an offset.
    #[cold]
    fn fault_at(&self, at: usize, end: usize) -> Corrupt {
        let bad = |detail: String| Corrupt::value(WHAT, format!("entry at {at}: {detail}"));
        let room = end.saturating_sub(at);
        if room < MIN_ENTRY {
            return bad(format!("{room} bytes are too few for an entry"));
        }
        let Ok((raw, _)) = RawDirEntry::ref_from_prefix(&self.bytes[at..end]) else {
            return Corrupt::truncated(WHAT, room, ENTRY_HEADER);
        };
        let rec_len = rec_len_from_disk(raw.rec_len.get(), self.bytes.len());
        let name_len = usize::from(raw.name_len);
        if rec_len < MIN_ENTRY || !rec_len.is_multiple_of(4) || rec_len > room {
            return bad(format!("rec_len is {rec_len}, {room} bytes left"));
        }
        if entry_size(name_len) > rec_len {
            return bad(format!("name_len {name_len} does not fit rec_len {rec_len}"));
        }
        if rec_len < room && room - rec_len < MIN_ENTRY {
            return bad(format!("rec_len {rec_len} leaves {} bytes", room - rec_len));
        }
        bad(format!("inode {} of {}", raw.inode.get(), self.format.inodes_count))
    }

    /// The used entry of a name.
    ///
    /// # Errors
    /// The first bad entry met before it.
    pub fn find(&self, name: &[u8]) -> Result<Option<DirEntry<'a>>> {
        self.walk(Some(name), usize::MAX).map(|search| search.found)
    }

    /// Looks for a name, and on the way for the first entry that leaves `room` bytes for
    /// another. Who finds no name has seen the whole block sound.
    ///
    /// # Errors
    /// The first bad entry met.
    pub fn search(&self, name: &[u8], room: usize) -> Result<Search<'a>> {
        self.walk(Some(name), room)
    }

    /// As [`DirBlock::search`]; without a name the whole block is looked at.
    #[inline]
    fn walk(&self, name: Option<&[u8]>, room: usize) -> Result<Search<'a>> {
        let end = self.end();
        // No entry has the length of no name.
        let name_len = name.map_or(usize::MAX, <[u8]>::len);
        let name = name.unwrap_or_default();
        let (mut at, mut room, mut room_at) = (0, room, None);
        while at < end {
            let Some(header) = self.sound_header_at(at, end) else {
                return Err(self.fault_at(at, end));
            };
            if header.name_len == name_len && header.inode != 0 && self.has_name(at, name) {
                return Ok(Search { found: self.sound_entry_at(at, end), room_at });
            }
            if header.free_space() >= room {
                // No other is wanted.
                (room, room_at) = (usize::MAX, Some(at));
            }
            at += header.rec_len;
        }
        Ok(Search { found: None, room_at })
    }

    /// The first entry that leaves `room` bytes for another, when the whole block is sound.
    ///
    /// # Errors
    /// The first bad entry.
    pub fn find_room(&self, room: usize) -> Result<Option<usize>> {
        self.walk(None, room).map(|search| search.room_at)
    }

    /// Walks to the used entry at an offset: the offset and length of the one before, and its
    /// length.
    fn walk_to(&self, offset: usize) -> Result<(Option<(usize, usize)>, usize)> {
        let end = self.end();
        let (mut at, mut before) = (0, None);
        while at < end && at <= offset {
            let Some(header) = self.sound_header_at(at, end) else {
                return Err(self.fault_at(at, end));
            };
            if at == offset && header.inode != 0 {
                return Ok((before, header.rec_len));
            }
            before = Some((at, header.rec_len));
            at += header.rec_len;
        }
        Err(Corrupt::value(WHAT, format!("no used entry begins at {offset}")))
    }

    /// Whether the name of the sound entry at an offset, which is as long, is this. Names of a
    /// directory often differ in their ends alone.
    #[inline]
    fn has_name(&self, at: usize, name: &[u8]) -> bool {
        let start = at + ENTRY_HEADER;
        self.bytes
            .get(start..start + name.len())
            .is_some_and(|there| there.last() == name.last() && there == name)
    }

    /// Checks the tail and its checksum.
    ///
    /// # Errors
    /// `Magic` when the tail is not there, `Checksum`, `Truncated`.
    pub fn verify_checksum(&self, inode_seed: u32) -> Result<()> {
        let (body, tail) = self.tail()?;
        let (stored, computed) = (tail.det_checksum.get(), crc32c(inode_seed, body));
        if stored == computed { Ok(()) } else { Err(Corrupt::checksum(WHAT, stored, computed)) }
    }

    fn tail(&self) -> Result<(&'a [u8], &'a RawDirEntryTail)> {
        let (body, tail) = RawDirEntryTail::ref_from_suffix(self.bytes)
            .map_err(|_| Corrupt::truncated(TAIL_WHAT, self.bytes.len(), TAIL_SIZE))?;
        if tail.det_reserved_zero1.get() != 0
            || usize::from(tail.det_rec_len.get()) != TAIL_SIZE
            || tail.det_reserved_zero2 != 0
            || tail.det_reserved_ft != FT_DIR_CSUM
        {
            return Err(Corrupt::new(CorruptKind::Magic, TAIL_WHAT, "no space for the checksum"));
        }
        Ok((body, tail))
    }
}

/// See [`DirBlock::entries`].
pub struct DirEntries<'a> {
    block: DirBlock<'a>,
    end: usize,
    at: usize,
}

impl<'a> Iterator for DirEntries<'a> {
    type Item = Result<DirEntry<'a>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let entry = self.block.entry_at(self.at, self.end);
        self.at = match &entry {
            Ok(entry) => entry.offset + entry.rec_len,
            Err(_) => self.end,
        };
        Some(entry)
    }
}

/// A linear directory block to edit in place.
pub struct DirBlockMut<'a> {
    bytes: &'a mut [u8],
    format: DirFormat,
}

impl<'a> DirBlockMut<'a> {
    /// An editor of a whole block.
    pub fn new(bytes: &'a mut [u8], format: DirFormat) -> Self {
        Self { bytes, format }
    }

    /// The block to read.
    pub fn view(&self) -> DirBlock<'_> {
        DirBlock::new(self.bytes, self.format)
    }

    /// Makes the block empty: one unused entry, and the tail.
    pub fn init_empty(&mut self) {
        self.bytes.fill(0);
        let end = self.view().end();
        self.write_header(0, end, 0, InodeNumber(0), FileType::Unknown);
        self.init_tail();
    }

    /// Makes the block a new directory's first: `.`, `..`, and the tail.
    pub fn init_dot(&mut self, this: InodeNumber, parent: InodeNumber) {
        self.bytes.fill(0);
        let end = self.view().end();
        let dot = entry_size(1);
        self.write_entry(0, dot, this, FileType::Directory, b".");
        self.write_entry(dot, end - dot, parent, FileType::Directory, b"..");
        self.init_tail();
    }

    fn init_tail(&mut self) {
        if !self.format.csum {
            return;
        }
        if let Ok((_, tail)) = RawDirEntryTail::mut_from_suffix(self.bytes) {
            tail.det_reserved_zero1 = U32::ZERO;
            tail.det_rec_len = U16::new(12);
            tail.det_reserved_zero2 = 0;
            tail.det_reserved_ft = FT_DIR_CSUM;
            tail.det_checksum = U32::ZERO;
        }
    }

    fn write_header(
        &mut self,
        at: usize,
        rec_len: usize,
        name_len: usize,
        inode: InodeNumber,
        file_type: FileType,
    ) {
        let block_size = self.bytes.len();
        let raw = RawDirEntry {
            inode: U32::new(inode.0),
            rec_len: U16::new(rec_len_to_disk(rec_len, block_size)),
            name_len: u8::try_from(name_len).expect("names are at most 255 bytes"),
            file_type: if self.format.filetype { file_type.raw() } else { 0 },
        };
        self.bytes[at..at + ENTRY_HEADER].copy_from_slice(raw.as_bytes());
    }

    fn write_entry(
        &mut self,
        at: usize,
        rec_len: usize,
        inode: InodeNumber,
        file_type: FileType,
        name: &[u8],
    ) {
        self.write_header(at, rec_len, name.len(), inode, file_type);
        let start = at + ENTRY_HEADER;
        self.bytes[start..start + name.len()].copy_from_slice(name);
        // What an older entry left after the name is not this one's.
        self.bytes[start + name.len()..at + entry_size(name.len())].fill(0);
    }

    fn set_rec_len(&mut self, at: usize, rec_len: usize) {
        let raw = rec_len_to_disk(rec_len, self.bytes.len());
        let field = at + offset_of!(RawDirEntry, rec_len);
        self.bytes[field..field + 2].copy_from_slice(U16::new(raw).as_bytes());
    }

    /// Puts an entry into the first space that holds it; its offset, or `None`
    /// when the block is full. Does not look for the name.
    ///
    /// # Errors
    /// A bad entry met on the way.
    ///
    /// # Panics
    /// When the name is empty or longer than 255 bytes: a broken promise of the caller.
    pub fn insert(
        &mut self,
        name: &[u8],
        inode: InodeNumber,
        file_type: FileType,
    ) -> Result<Option<usize>> {
        assert!(!name.is_empty() && name.len() <= NAME_MAX, "name of {} bytes", name.len());
        let Some(at) = self.view().find_room(entry_size(name.len()))? else { return Ok(None) };
        Ok(self.insert_at(at, name, inode, file_type))
    }

    /// Puts an entry into the space that the entry at an offset, as
    /// [`DirBlock::search`] gave it, leaves; its offset, or `None` when it does not fit there.
    ///
    /// # Panics
    /// As [`DirBlockMut::insert`].
    pub fn insert_at(
        &mut self,
        at: usize,
        name: &[u8],
        inode: InodeNumber,
        file_type: FileType,
    ) -> Option<usize> {
        assert!(!name.is_empty() && name.len() <= NAME_MAX, "name of {} bytes", name.len());
        let view = self.view();
        let header = view.sound_header_at(at, view.end())?;
        if header.free_space() < entry_size(name.len()) {
            return None;
        }
        let (used, rec_len) = (header.used(), header.rec_len);
        if used != 0 {
            self.set_rec_len(at, used);
        }
        self.write_entry(at + used, rec_len - used, inode, file_type, name);
        Some(at + used)
    }

    /// Appends an entry that takes the rest of the block from `at` to its end:
    /// for packing a block entry by entry. See [`DirBlockMut::finish_packing`].
    pub(crate) fn pack(&mut self, at: usize, entry: &PackedEntry) -> Option<usize> {
        let size = entry_size(entry.name.len());
        let end = at.checked_add(size).filter(|&end| end <= self.view().end())?;
        self.write_header(at, size, entry.name.len(), entry.inode, FileType::Unknown);
        self.bytes[at + offset_of!(RawDirEntry, file_type)] = entry.file_type;
        let start = at + ENTRY_HEADER;
        self.bytes[start..start + entry.name.len()].copy_from_slice(&entry.name);
        self.bytes[start + entry.name.len()..end].fill(0);
        Some(end)
    }

    /// Ends packing: the entry at `last` takes the rest of the block; without
    /// one the block becomes empty.
    pub(crate) fn finish_packing(&mut self, last: Option<usize>) {
        let end = self.view().end();
        match last {
            Some(at) => self.set_rec_len(at, end - at),
            None => self.init_empty(),
        }
        self.init_tail();
    }

    /// Removes the entry at an offset: the one before it takes its space, and
    /// its bytes are zeroed; the first entry becomes unused.
    ///
    /// # Errors
    /// A bad entry met on the way, or `Value` when no used entry begins there.
    pub fn remove(&mut self, offset: usize) -> Result<()> {
        let (before, rec_len) = self.view().walk_to(offset)?;
        match before {
            Some((previous, previous_len)) => {
                self.bytes[offset..offset + rec_len].fill(0);
                self.set_rec_len(previous, previous_len + rec_len);
            }
            None => {
                self.bytes[offset..offset + rec_len].fill(0);
                self.set_rec_len(offset, rec_len);
            }
        }
        Ok(())
    }

    /// Lets the entry at an offset lead elsewhere: rename over it, and `..` of a
    /// directory that moved.
    ///
    /// # Errors
    /// A bad entry met on the way, or `Value` when no used entry begins there.
    pub fn set_target(
        &mut self,
        offset: usize,
        inode: InodeNumber,
        file_type: FileType,
    ) -> Result<()> {
        let view = self.view();
        let (_, rec_len) = view.walk_to(offset)?;
        let name_len = view.sound_header_at(offset, view.end()).map_or(0, |header| header.name_len);
        self.write_header(offset, rec_len, name_len, inode, file_type);
        Ok(())
    }

    /// Sets the checksum; nothing without metadata_csum.
    ///
    /// # Errors
    /// `Magic` when the block has no tail: it must not be overwritten.
    pub fn set_checksum(&mut self, inode_seed: u32) -> Result<()> {
        if !self.format.csum {
            return Ok(());
        }
        let (body, _) = self.view().tail()?;
        let checksum = crc32c(inode_seed, body);
        if let Ok((_, tail)) = RawDirEntryTail::mut_from_suffix(self.bytes) {
            tail.det_checksum = U32::new(checksum);
        }
        Ok(())
    }
}

/// An entry taken out of a block, to be packed into another.
#[derive(Clone, Debug)]
pub(crate) struct PackedEntry {
    pub inode: InodeNumber,
    pub file_type: u8,
    pub name: Vec<u8>,
}

impl From<DirEntry<'_>> for PackedEntry {
    fn from(entry: DirEntry<'_>) -> Self {
        Self { inode: entry.inode, file_type: entry.file_type, name: entry.name.to_vec() }
    }
}

#[cfg(test)]
mod tests;
