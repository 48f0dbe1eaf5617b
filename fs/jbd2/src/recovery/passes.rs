//! The three passes over a log.

use std::collections::{HashMap, HashSet};

use uext_blockdev::mutant;
use uext_ondisk::error::CorruptKind;
use uext_ondisk::jbd2::{
    self, BlockType, CHECKSUM_CRC32, CommitBlock, CsumVersion, Header, JournalCompat,
    JournalIncompat, JournalSuperblock, RawCommitHeader, RawRevokeHeader, TagFlags, TagFormat,
    descriptor_tags, revoke_records, transaction_crc32,
};
use uext_ondisk::{Corrupt, FsBlock};
use zerocopy::FromBytes;

use super::target::{LogPlace, Target};
use crate::error::{JournalError, Result};
use crate::log_reader::{JournalLocation, LogReader};
use crate::tid::{Tid, tid_geq, tid_gt};

/// Bytes of `struct commit_header` with its padding: what a torn commit block keeps.
const COMMIT_HEADER_BYTES: usize = 64;

/// What the scan found.
pub(super) struct Scan {
    /// First transaction that is not committed.
    pub(super) end: Tid,
    /// The log's block behind the last committed transaction.
    pub(super) head: u32,
    /// A transaction whose commit block is damaged: the log ends before it.
    pub(super) failed_commit: Option<Tid>,
    /// Every block some tag names; the revoke table needs no others.
    tagged: HashSet<FsBlock>,
}

/// For each logged block the last transaction that revoked it.
pub(super) struct Revoked {
    last: HashMap<FsBlock, Tid>,
    /// Records read.
    pub(super) records: u64,
}

impl Revoked {
    fn covers(&self, block: FsBlock, tid: Tid) -> bool {
        let covers = self.last.get(&block).is_some_and(|&revoked| !tid_gt(tid, revoked));
        covers && !mutant!("revoke-ignored")
    }
}

/// What the replay did.
#[derive(Default)]
pub(super) struct Replayed {
    pub(super) written: u64,
    pub(super) revoked: u64,
    /// The first thing that could not be replayed.
    pub(super) damage: Option<JournalError>,
}

/// Where a pass stands in the log.
struct Cursor {
    /// The block to read next.
    block: u32,
    /// The transaction it must belong to.
    tid: Tid,
    /// Blocks left before the log has been all round once.
    left: u32,
}

/// A walk over one log.
pub(super) struct Passes<'a> {
    reader: LogReader<'a>,
    sb: &'a JournalSuperblock,
    format: TagFormat,
    seed: u32,
}

impl<'a> Passes<'a> {
    pub(super) fn new(journal: JournalLocation<'a>, sb: &'a JournalSuperblock) -> Self {
        let (format, seed) = (sb.tag_format(), sb.csum_seed());
        Self { reader: LogReader::new(journal), sb, format, seed }
    }

    fn cursor(&self) -> Cursor {
        let left = self.sb.log_end() - self.sb.first;
        Cursor { block: self.sb.start, tid: self.sb.sequence, left }
    }

    /// Moves `count` blocks on, round the ring once at most.
    fn advance(&self, cursor: &mut Cursor, count: u32) -> Result<()> {
        let (first, end) = (self.sb.first, self.sb.log_end());
        let mut block = cursor.block.saturating_add(count);
        if block >= end {
            block = first.saturating_add(block - end);
        }
        if block >= end {
            let detail = format!("{count} blocks described, the log has {}", end - first);
            return Err(Corrupt::value("journal descriptor block", detail).into());
        }
        cursor.block = block;
        cursor.left = cursor.left.saturating_sub(count);
        Ok(())
    }

    /// The next block of the log that is not a logged copy; `None` at the log's end.
    fn next(&mut self, cursor: &mut Cursor) -> Result<Option<(BlockType, Vec<u8>)>> {
        if cursor.left == 0 {
            return Ok(None);
        }
        let bytes = self.reader.read(cursor.block)?.to_vec();
        self.advance(cursor, 1)?;
        Ok(match Header::parse(&bytes) {
            Ok(header) if header.sequence == cursor.tid => Some((header.block_type, bytes)),
            _ => None,
        })
    }

    fn tail_is_good(&self, bytes: &[u8]) -> bool {
        !self.format.has_csum() || jbd2::verify_tail(self.seed, bytes).is_ok()
    }

    /// Finds the end of the log.
    pub(super) fn scan(&mut self) -> Result<Scan> {
        let mut cursor = self.cursor();
        let mut state = ScanState::new(cursor.block);
        while let Some((block_type, bytes)) = self.next(&mut cursor)? {
            match block_type {
                BlockType::Descriptor => {
                    state.suspect |= !self.tail_is_good(&bytes);
                    self.scan_descriptor(&mut state, &mut cursor, &bytes)?;
                }
                BlockType::Revoke => state.suspect |= !self.tail_is_good(&bytes),
                BlockType::Commit => {
                    if !self.scan_commit(&mut state, &mut cursor, &bytes)? {
                        break;
                    }
                }
                BlockType::SuperblockV1 | BlockType::SuperblockV2 => break,
            }
        }
        Ok(Scan {
            end: state.end.unwrap_or(cursor.tid),
            head: state.end_head.unwrap_or(state.head),
            failed_commit: state.failed_commit,
            tagged: state.tagged,
        })
    }

    fn scan_descriptor(
        &mut self,
        state: &mut ScanState,
        cursor: &mut Cursor,
        bytes: &[u8],
    ) -> Result<()> {
        let mut count = 0;
        for tag in descriptor_tags(bytes, self.format) {
            state.tagged.insert(tag.block);
            count += 1;
        }
        if !self.sb.compat.contains(JournalCompat::CHECKSUM) || state.end.is_some() {
            return self.advance(cursor, count);
        }
        state.crc = transaction_crc32(state.crc, bytes);
        for _ in 0..count {
            state.crc = transaction_crc32(state.crc, self.reader.read(cursor.block)?);
            self.advance(cursor, 1)?;
        }
        Ok(())
    }

    /// Judges a commit block; false when the log ends here.
    fn scan_commit(
        &self,
        state: &mut ScanState,
        cursor: &mut Cursor,
        bytes: &[u8],
    ) -> Result<bool> {
        let time = CommitBlock::parse(bytes)?.time.as_secs();
        if state.suspect {
            // A damaged block before this one: left over from an earlier lap if
            // the time goes back, otherwise this log is damaged.
            if time >= state.last_time {
                let detail = format!("a block of transaction {} is damaged", cursor.tid);
                let corrupt = Corrupt::new(CorruptKind::Checksum, "journal", detail);
                return Err(corrupt.into());
            }
            return Ok(false);
        }
        if state.end.is_some() && self.sb.compat.contains(JournalCompat::CHECKSUM) {
            // Behind a transaction that was ended early stands one that was
            // committed: the log is damaged, not merely cut off.
            state.failed_commit = state.end;
            return Ok(true);
        }
        if !self.commit_is_good(state.crc, bytes) {
            if time < state.last_time {
                return Ok(false);
            }
            state.end = Some(cursor.tid);
            state.end_head = Some(state.head);
            if !self.sb.incompat.contains(JournalIncompat::ASYNC_COMMIT) {
                state.failed_commit = Some(cursor.tid);
                return Ok(true);
            }
        }
        state.crc = !0;
        state.last_time = time;
        state.head = cursor.block;
        cursor.tid = cursor.tid.wrapping_add(1);
        Ok(true)
    }

    fn commit_is_good(&self, crc: u32, bytes: &[u8]) -> bool {
        if self.sb.compat.contains(JournalCompat::CHECKSUM) {
            let Ok((raw, _)) = RawCommitHeader::ref_from_prefix(bytes) else { return false };
            let stored = raw.h_chksum[0].get();
            let kind = (raw.h_chksum_type, raw.h_chksum_size);
            return (kind == (CHECKSUM_CRC32, 4) && stored == crc)
                || (kind == (0, 0) && stored == 0);
        }
        if !self.format.has_csum() || CommitBlock::verify(bytes, self.seed).is_ok() {
            return true;
        }
        // Only the first sector of the commit block may have reached the disk.
        // Everything it says is in its header; the rest is zero by definition.
        let mut whole = vec![0; bytes.len()];
        let header = COMMIT_HEADER_BYTES.min(bytes.len());
        whole[..header].copy_from_slice(&bytes[..header]);
        CommitBlock::verify(&whole, self.seed).is_ok()
    }

    /// Collects the revoke records of the committed transactions.
    pub(super) fn revoke(&mut self, scan: &Scan) -> Result<Revoked> {
        let mut revoked = Revoked { last: HashMap::new(), records: 0 };
        let mut cursor = self.cursor();
        while !tid_geq(cursor.tid, scan.end) {
            let Some((block_type, bytes)) = self.next(&mut cursor)? else { break };
            match block_type {
                BlockType::Descriptor => {
                    let count = descriptor_tags(&bytes, self.format).fold(0u32, |n, _| n + 1);
                    self.advance(&mut cursor, count)?;
                }
                BlockType::Commit => cursor.tid = cursor.tid.wrapping_add(1),
                BlockType::Revoke => {
                    self.note_revokes(&mut revoked, scan, cursor.tid, &bytes)?;
                }
                BlockType::SuperblockV1 | BlockType::SuperblockV2 => break,
            }
        }
        ends_where_the_scan_did(&cursor, scan).map(|()| revoked)
    }

    fn note_revokes(
        &self,
        revoked: &mut Revoked,
        scan: &Scan,
        tid: Tid,
        bytes: &[u8],
    ) -> Result<()> {
        let count = RawRevokeHeader::ref_from_prefix(bytes).map_or(0, |(raw, _)| raw.r_count.get());
        if (count as usize) < size_of::<RawRevokeHeader>() {
            return Ok(()); // Not even its own header: jbd2 reads it as no records.
        }
        for block in revoke_records(bytes, self.format)? {
            revoked.records += 1;
            if scan.tagged.contains(&block) {
                let last = revoked.last.entry(block).or_insert(tid);
                if tid_gt(tid, *last) {
                    *last = tid;
                }
            }
        }
        Ok(())
    }

    /// Hands every logged block of a committed transaction that was not revoked to `target`.
    ///
    /// # Errors
    /// Only what `target` fails with; damage of the log is in the result.
    pub(super) fn replay(
        &mut self,
        scan: &Scan,
        revoked: &Revoked,
        target: &mut dyn Target,
    ) -> Result<Replayed> {
        let mut replayed = Replayed::default();
        let mut cursor = self.cursor();
        while !tid_geq(cursor.tid, scan.end) {
            let (block_type, bytes) = match self.next(&mut cursor) {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(damage) => {
                    replayed.damage = Some(damage);
                    return Ok(replayed);
                }
            };
            match block_type {
                BlockType::Descriptor => {
                    let mut place = Place { cursor: &mut cursor, revoked, target };
                    self.replay_descriptor(&mut replayed, &mut place, &bytes)?;
                }
                BlockType::Commit => cursor.tid = cursor.tid.wrapping_add(1),
                BlockType::Revoke => {}
                BlockType::SuperblockV1 | BlockType::SuperblockV2 => break,
            }
        }
        if let Err(damage) = ends_where_the_scan_did(&cursor, scan) {
            replayed.damage.get_or_insert(damage);
        }
        Ok(replayed)
    }

    fn replay_descriptor(
        &mut self,
        replayed: &mut Replayed,
        place: &mut Place<'_>,
        descriptor: &[u8],
    ) -> Result<()> {
        for tag in descriptor_tags(descriptor, self.format) {
            let at = place.cursor.block;
            if let Err(damage) = self.advance(place.cursor, 1) {
                replayed.damage.get_or_insert(damage);
                return Ok(());
            }
            let data = match self.reader.read(at) {
                Ok(data) => data,
                Err(damage) => {
                    replayed.damage.get_or_insert(damage);
                    continue;
                }
            };
            if place.revoked.covers(tag.block, place.cursor.tid) {
                replayed.revoked += 1;
                continue;
            }
            let matches = tag.matches(self.format, self.seed, place.cursor.tid, data);
            if !matches && !mutant!("tag-checksum-unchecked") {
                replayed.damage.get_or_insert_with(|| damaged_copy(tag.block, self.format));
                continue;
            }
            if let Err(damage) = place.target.check(tag.block) {
                replayed.damage.get_or_insert(damage);
                continue;
            }
            let mut data = data.to_vec();
            let escaped = tag.flags.contains(TagFlags::ESCAPE) && !mutant!("escape-not-undone");
            if escaped {
                jbd2::unescape(&mut data);
            }
            place.target.put(tag.block, data, LogPlace { block: at, escaped })?;
            replayed.written += 1;
        }
        Ok(())
    }
}

/// Where the replay of one descriptor block stands.
struct Place<'p> {
    cursor: &'p mut Cursor,
    revoked: &'p Revoked,
    target: &'p mut dyn Target,
}

/// What the scan carries from block to block.
struct ScanState {
    /// A descriptor or revoke block since the last commit has a wrong checksum.
    suspect: bool,
    /// Seconds of the last good commit block.
    last_time: u64,
    /// Over the transaction so far (compat `CHECKSUM`).
    crc: u32,
    /// Where the log ends, when a damaged commit block said so.
    end: Option<Tid>,
    head: u32,
    end_head: Option<u32>,
    failed_commit: Option<Tid>,
    tagged: HashSet<FsBlock>,
}

impl ScanState {
    fn new(start: u32) -> Self {
        Self {
            suspect: false,
            last_time: 0,
            crc: !0,
            end: None,
            head: start,
            end_head: None,
            failed_commit: None,
            tagged: HashSet::new(),
        }
    }
}

fn damaged_copy(block: FsBlock, format: TagFormat) -> JournalError {
    let version = if format.csum == CsumVersion::V3 { "v3" } else { "v2" };
    let detail = format!("the logged copy does not match its csum {version} tag");
    Corrupt::new(CorruptKind::Checksum, "journal", detail).in_block(block).into()
}

/// Different passes must see the same log; a device whose reads fail can break that.
fn ends_where_the_scan_did(cursor: &Cursor, scan: &Scan) -> Result<()> {
    if cursor.tid == scan.end {
        return Ok(());
    }
    let detail = format!("a pass ended at transaction {}, not {}", cursor.tid, scan.end);
    Err(Corrupt::value("journal", detail).into())
}
