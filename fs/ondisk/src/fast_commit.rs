//! Fast commits: what changed since the last transaction, as records of operations.
//!
//! Source: Documentation/filesystems/ext4/journal.rst, "Fast commits". The area lies behind the
//! journal's log. Its first record is a head that names the transaction the records add to. A
//! tail with the checksum of everything since the last one ends each fast commit and fills its
//! block; a pad fills a block whose rest is too small for the next record.
//!
//! Invariants:
//! - Only fast commits whose tail names the expected transaction and matches are given out, in
//!   the order of the area; what comes behind the first that does not is left over from earlier.
//! - No record is larger than a block, so memory is bounded by the area.
//! - Numbers are as they were found, their form checked: whoever applies a record checks it
//!   against the filesystem.

use crate::checksum::crc32c;
use crate::dir_entry::NAME_MAX;
use crate::error::{Corrupt, CorruptKind, Result};
use crate::extent::{Extent, RawExtent};
use crate::inode::GOOD_OLD_SIZE;
use crate::units::{InodeNumber, LogicalBlock};
use zerocopy::FromBytes;

const WHAT: &str = "fast commit record";
/// Tag and length of a record.
pub const HEADER_SIZE: usize = 4;
/// Bytes of a tail that mean something: transaction and checksum.
pub const TAIL_SIZE: usize = 8;

/// What a record is (`EXT4_FC_TAG_*`).
pub mod tag {
    /// A range of a file was mapped.
    pub const ADD_RANGE: u16 = 1;
    /// A range of a file was unmapped.
    pub const DEL_RANGE: u16 = 2;
    /// A name was made for a new inode.
    pub const CREAT: u16 = 3;
    /// A name was made for an inode that has others.
    pub const LINK: u16 = 4;
    /// A name was removed.
    pub const UNLINK: u16 = 5;
    /// The contents of an inode.
    pub const INODE: u16 = 6;
    /// Nothing, to the end of the block.
    pub const PAD: u16 = 7;
    /// The end of a fast commit.
    pub const TAIL: u16 = 8;
    /// The start of the area.
    pub const HEAD: u16 = 9;
}

/// A name in a directory and what it leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dentry {
    /// The directory.
    pub parent: InodeNumber,
    /// The inode.
    pub ino: InodeNumber,
    /// 1 to 255 bytes without `/` and NUL, neither `.` nor `..`.
    pub name: Vec<u8>,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A range of a file lies where the extent says.
    AddRange(InodeNumber, Extent),
    /// `len` blocks of a file from `start` on are mapped nowhere.
    DelRange {
        /// The file.
        ino: InodeNumber,
        /// First block of the file.
        start: LogicalBlock,
        /// Blocks.
        len: u32,
    },
    /// A name of a new inode.
    Create(Dentry),
    /// Another name of an inode.
    Link(Dentry),
    /// A name that is gone.
    Unlink(Dentry),
    /// An inode's bytes: at least 128.
    Inode(InodeNumber, Vec<u8>),
}

/// The records of one fast commit.
pub type FastCommit = Vec<Record>;

/// Reads an area block by block.
pub struct Reader {
    expected: u32,
    /// Over everything since the last tail.
    crc: u32,
    begun: bool,
    pending: FastCommit,
    /// The first record since the last tail that has no sound form.
    bad: Option<Corrupt>,
    whole: Vec<FastCommit>,
}

impl Reader {
    /// A reader of the fast commits of transaction `expected`.
    pub fn new(expected: u32) -> Self {
        Self { expected, crc: 0, begun: false, pending: Vec::new(), bad: None, whole: Vec::new() }
    }

    /// The whole fast commits.
    pub fn finish(self) -> Vec<FastCommit> {
        self.whole
    }

    /// Takes the next block of the area; whether the one behind it may hold more.
    ///
    /// # Errors
    /// A record that makes no sense in a fast commit whose checksum is right, or features this
    /// program does not know.
    pub fn block(&mut self, bytes: &[u8]) -> Result<bool> {
        let mut at = 0usize;
        while let Some((kind, value)) = record_at(bytes, at) {
            let end = at + HEADER_SIZE + value.len();
            if !self.begun && kind != tag::HEAD {
                return Ok(false);
            }
            if kind == tag::TAIL {
                if !self.tail(&bytes[at..end])? {
                    return Ok(false);
                }
            } else {
                if kind == tag::HEAD && !self.head(value)? {
                    return Ok(false);
                }
                self.record(kind, value);
                self.crc = crc32c(self.crc, &bytes[at..end]);
            }
            at = end;
        }
        // A block without a single record ends the area.
        Ok(at != 0)
    }

    /// Whether the area is of the expected transaction.
    fn head(&mut self, value: &[u8]) -> Result<bool> {
        let Some((features, tid)) = le32(value, 0).zip(le32(value, 4)) else { return Ok(false) };
        if tid != self.expected {
            return Ok(false);
        }
        if features != 0 {
            let detail = format!("unknown features {features:#x}");
            return Err(Corrupt::new(CorruptKind::Unsupported, "fast commit area", detail));
        }
        self.begun = true;
        Ok(true)
    }

    /// Ends a fast commit; false when it is not whole.
    fn tail(&mut self, record: &[u8]) -> Result<bool> {
        let value = &record[HEADER_SIZE..];
        let Some((tid, stored)) = le32(value, 0).zip(le32(value, 4)) else { return Ok(false) };
        let computed = crc32c(self.crc, &record[..HEADER_SIZE + 4]);
        if tid != self.expected || stored != computed {
            return Ok(false);
        }
        if let Some(bad) = self.bad.take() {
            return Err(bad);
        }
        self.crc = 0;
        self.whole.push(std::mem::take(&mut self.pending));
        Ok(true)
    }

    fn record(&mut self, kind: u16, value: &[u8]) {
        if matches!(kind, tag::HEAD | tag::PAD) {
            return;
        }
        match parse(kind, value) {
            Ok(record) => self.pending.push(record),
            // Judged at the tail: without one this is left over from earlier.
            Err(bad) => {
                self.bad.get_or_insert(bad);
            }
        }
    }
}

/// Tag and value of the record at a byte; `None` when none fits there.
fn record_at(bytes: &[u8], at: usize) -> Option<(u16, &[u8])> {
    let header = bytes.get(at..at.checked_add(HEADER_SIZE)?)?;
    let kind = u16::from_le_bytes([header[0], header[1]]);
    let len = usize::from(u16::from_le_bytes([header[2], header[3]]));
    let start = at + HEADER_SIZE;
    let value = bytes.get(start..start.checked_add(len)?)?;
    (kind != 0).then_some((kind, value))
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn parse(kind: u16, value: &[u8]) -> Result<Record> {
    let short = || Corrupt::value(WHAT, format!("tag {kind} with {} bytes", value.len()));
    let number = |at| le32(value, at).ok_or_else(short);
    let ino = InodeNumber(number(0)?);
    Ok(match kind {
        tag::ADD_RANGE => {
            let bytes = value.get(4..16).ok_or_else(short)?;
            let raw = RawExtent::read_from_bytes(bytes).map_err(|_| short())?;
            let extent = Extent::from_raw(&raw);
            if extent.len == 0 || extent.end() > 1 << 32 {
                let detail = format!("maps {} blocks", extent.len);
                return Err(Corrupt::value(WHAT, detail).in_inode(ino).at_logical(extent.logical));
            }
            Record::AddRange(ino, extent)
        }
        tag::DEL_RANGE => {
            let (start, len) = (LogicalBlock(number(4)?), number(8)?);
            Record::DelRange { ino, start, len }
        }
        tag::CREAT => Record::Create(dentry(value, &short)?),
        tag::LINK => Record::Link(dentry(value, &short)?),
        tag::UNLINK => Record::Unlink(dentry(value, &short)?),
        tag::INODE => {
            let bytes = value.get(4..).filter(|bytes| bytes.len() >= GOOD_OLD_SIZE);
            Record::Inode(ino, bytes.ok_or_else(short)?.to_vec())
        }
        _ => return Err(Corrupt::new(CorruptKind::Unsupported, WHAT, format!("tag {kind}"))),
    })
}

fn dentry(value: &[u8], short: &impl Fn() -> Corrupt) -> Result<Dentry> {
    let (parent, ino) = le32(value, 0).zip(le32(value, 4)).ok_or_else(short)?;
    let name = value.get(8..).ok_or_else(short)?;
    let sound = (1..=NAME_MAX).contains(&name.len())
        && !name.contains(&b'/')
        && !name.contains(&0)
        && name != b"."
        && name != b"..";
    if !sound {
        let detail = format!("{:?} is no name", String::from_utf8_lossy(name));
        return Err(Corrupt::value(WHAT, detail).in_inode(InodeNumber(parent)));
    }
    Ok(Dentry { parent: InodeNumber(parent), ino: InodeNumber(ino), name: name.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An area of blocks of 1 KiB with a head and these records, a tail at the end.
    fn area(tid: u32, records: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut block = Vec::new();
        let mut put = |kind: u16, value: &[u8]| {
            block.extend(kind.to_le_bytes());
            block.extend(u16::try_from(value.len()).unwrap().to_le_bytes());
            block.extend(value);
        };
        let mut head = vec![0; 4];
        head.extend(tid.to_le_bytes());
        put(tag::HEAD, &head);
        for (kind, value) in records {
            put(*kind, value);
        }
        let fill = 1024 - block.len() - HEADER_SIZE;
        block.extend(tag::TAIL.to_le_bytes());
        block.extend(u16::try_from(fill).unwrap().to_le_bytes());
        block.extend(tid.to_le_bytes());
        let crc = crc32c(0, &block);
        block.extend(crc.to_le_bytes());
        block.resize(1024, 0);
        block
    }

    fn name(kind: u16, parent: u32, ino: u32, name: &[u8]) -> (u16, Vec<u8>) {
        let mut value = parent.to_le_bytes().to_vec();
        value.extend(ino.to_le_bytes());
        value.extend(name);
        (kind, value)
    }

    #[test]
    fn records_come_out_when_their_tail_matches() {
        let mut reader = Reader::new(7);
        let block = area(7, &[name(tag::CREAT, 2, 12, b"a"), name(tag::UNLINK, 2, 13, b"b")]);
        assert_eq!(reader.block(&block), Ok(true));
        let dentry = |ino, name: &[u8]| Dentry {
            parent: InodeNumber(2),
            ino: InodeNumber(ino),
            name: name.to_vec(),
        };
        let records = vec![Record::Create(dentry(12, b"a")), Record::Unlink(dentry(13, b"b"))];
        assert_eq!(reader.finish(), [records]);
    }

    #[test]
    fn another_transaction_and_a_wrong_checksum_end_the_area() {
        let mut block = area(7, &[name(tag::CREAT, 2, 12, b"a")]);
        assert_eq!(Reader::new(8).block(&block), Ok(false));
        block[30] ^= 1;
        let mut reader = Reader::new(7);
        assert_eq!(reader.block(&block), Ok(false));
        assert!(reader.finish().is_empty());
    }

    #[test]
    fn a_record_without_sense_is_damage_only_in_a_whole_fast_commit() {
        for bad in [
            name(tag::CREAT, 2, 12, b""),
            name(tag::LINK, 2, 12, b"a/b"),
            name(tag::UNLINK, 2, 12, b".."),
            (tag::INODE, vec![0; 100]),
            (tag::ADD_RANGE, vec![0; 15]),
            (tag::ADD_RANGE, vec![0; 16]),
            (tag::DEL_RANGE, vec![0; 11]),
            (77, vec![0; 8]),
        ] {
            let mut block = area(7, std::slice::from_ref(&bad));
            assert!(Reader::new(7).block(&block).is_err(), "{bad:?}");
            block[5] = 1;
            assert!(Reader::new(7).block(&block).is_err(), "unknown features");
            block[5] = 0;
            block[16] ^= 0xFF;
            assert!(Reader::new(7).block(&block).is_ok_and(|more| !more), "not whole");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            flip in 0usize..1024, value: u8,
        ) {
            let mut reader = Reader::new(7);
            let mut block = area(7, &[name(tag::CREAT, 2, 12, b"a")]);
            block[flip] = value;
            let _ = reader.block(&block);
            let _ = reader.block(&bytes);
            let _ = Reader::new(0).block(&bytes);
        }
    }
}
