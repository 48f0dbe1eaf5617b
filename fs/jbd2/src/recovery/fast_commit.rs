//! Telling whether fast-commit records wait for replay.
//!
//! The area lies behind the log. Its first block begins with a head record that
//! names the transaction the records add to; a tail record with a checksum ends
//! each fast commit. Only records of the first transaction that is not in the log
//! count. Source: Documentation/filesystems/ext4/journal.rst, "Fast commits".

use uext_ondisk::checksum::crc32c;
use uext_ondisk::jbd2::JournalSuperblock;

use crate::log_reader::{JournalLocation, LogReader};
use crate::tid::Tid;

const TAG_TAIL: u16 = 8;
const TAG_HEAD: u16 = 9;
/// Tag and length.
const TAG_HEADER: usize = 4;

/// Whether at least one whole fast commit of transaction `expected` is there.
pub(super) fn present(
    location: &JournalLocation<'_>,
    sb: &JournalSuperblock,
    expected: Tid,
) -> bool {
    let mut reader = LogReader::new(*location);
    let mut walk = Walk { expected, crc: 0 };
    // The kernel leaves the first block of the area unused.
    for block in sb.log_end().saturating_add(1)..sb.block_count {
        let Ok(bytes) = reader.read(block) else { return false };
        let first = block == sb.log_end() + 1;
        match walk.block(bytes, first) {
            Verdict::Whole => return true,
            Verdict::End => return false,
            Verdict::More => {}
        }
    }
    false
}

enum Verdict {
    /// A tail with the right transaction and checksum.
    Whole,
    /// No (further) record of the transaction.
    End,
    /// The records go on in the next block.
    More,
}

struct Walk {
    expected: Tid,
    /// Over all records since the last tail.
    crc: u32,
}

impl Walk {
    fn block(&mut self, bytes: &[u8], first: bool) -> Verdict {
        let mut at = 0usize;
        while let Some(record) = Record::at(bytes, at) {
            if first && at == 0 && record.tag != TAG_HEAD {
                return Verdict::End;
            }
            match record.tag {
                TAG_HEAD if record.u32_at(4) != Some(self.expected) => return Verdict::End,
                TAG_TAIL => return self.tail(bytes, at, &record),
                1..=TAG_HEAD => {}
                _ => return Verdict::End,
            }
            let end = at + TAG_HEADER + record.value.len();
            self.crc = crc32c(self.crc, &bytes[at..end]);
            at = end;
        }
        Verdict::More
    }

    /// A tail holds the transaction and the checksum of everything before the latter.
    fn tail(&mut self, bytes: &[u8], at: usize, record: &Record<'_>) -> Verdict {
        let Some((tid, crc)) = record.u32_at(0).zip(record.u32_at(4)) else {
            return Verdict::End;
        };
        let computed = crc32c(self.crc, &bytes[at..at + TAG_HEADER + 4]);
        if tid == self.expected && crc == computed { Verdict::Whole } else { Verdict::End }
    }
}

struct Record<'a> {
    tag: u16,
    value: &'a [u8],
}

impl<'a> Record<'a> {
    /// The record at a byte; `None` when it does not fit the block.
    fn at(bytes: &'a [u8], at: usize) -> Option<Self> {
        let header = bytes.get(at..at.checked_add(TAG_HEADER)?)?;
        let tag = u16::from_le_bytes([header[0], header[1]]);
        let len = usize::from(u16::from_le_bytes([header[2], header[3]]));
        let start = at + TAG_HEADER;
        Some(Self { tag, value: bytes.get(start..start.checked_add(len)?)? })
    }

    fn u32_at(&self, at: usize) -> Option<u32> {
        let bytes = self.value.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }
}
