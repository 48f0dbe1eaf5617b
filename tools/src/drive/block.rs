//! What a block holds: who it is, and contents that tell where each sector came from.
//!
//! A block of `len` bytes (64 and more) begins with a header of 40 bytes, little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0–3 | magic `UXDB` |
//! | 4–7 | CRC32C of the block with these four bytes zero |
//! | 8–15 | file: slot in the upper half, incarnation in the lower |
//! | 16–23 | offset in the file |
//! | 24–27 | version |
//! | 28–31 | length |
//! | 32–39 | the run |
//!
//! The rest are words of eight bytes, `(key + n * STEP) ^ version * SPREAD`, where the key
//! comes from run, file and offset: any word of a block that is half old and half new says
//! of which version it is, so a torn block is told from one that never was.

/// Bytes of the header.
pub const HEADER: usize = 40;
/// Shortest block.
pub const MIN_BLOCK: usize = 64;
/// What a disk writes whole.
pub const SECTOR: u64 = 512;

const MAGIC: u32 = u32::from_le_bytes(*b"UXDB");
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// Odd, so that a multiplication by it can be undone.
const SPREAD: u64 = 0xd6e8_feb8_6659_fd93;
/// `SPREAD * UNSPREAD == 1`.
const UNSPREAD: u64 = inverse(SPREAD);

/// The inverse of an odd number, modulo 2^64, by Newton's steps.
const fn inverse(odd: u64) -> u64 {
    let mut x = odd;
    let mut n = 0;
    while n < 6 {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
        n += 1;
    }
    x
}

/// Which block of which file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockId {
    /// The run that wrote it.
    pub run: u64,
    /// Slot and incarnation.
    pub file: u64,
    /// Bytes from the file's start.
    pub offset: u64,
}

/// What a block turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is whole, and of this version.
    Version(u32),
    /// All zero: never written, a hole.
    Zeroes,
    /// Whole, but of another file, place or run.
    Foreign(BlockId, u32),
    /// Nothing that was ever written as one.
    Damaged,
}

impl BlockId {
    fn key(&self) -> u64 {
        let mut key = self.run ^ self.file.rotate_left(24) ^ self.offset.wrapping_mul(SPREAD);
        key ^= key >> 29;
        key = key.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        key ^ (key >> 32)
    }

    /// Fills `block` as its version.
    pub fn stamp(&self, version: u32, block: &mut [u8]) {
        assert!(block.len() >= MIN_BLOCK, "a block has room for its header");
        // Blocks are at most megabytes.
        let len = block.len() as u32;
        block[..4].copy_from_slice(&MAGIC.to_le_bytes());
        block[4..8].fill(0);
        block[8..16].copy_from_slice(&self.file.to_le_bytes());
        block[16..24].copy_from_slice(&self.offset.to_le_bytes());
        block[24..28].copy_from_slice(&version.to_le_bytes());
        block[28..32].copy_from_slice(&len.to_le_bytes());
        block[32..40].copy_from_slice(&self.run.to_le_bytes());
        let spread = u64::from(version).wrapping_mul(SPREAD);
        let mut word = self.key();
        let mut words = block[HEADER..].chunks_exact_mut(8);
        for place in words.by_ref() {
            place.copy_from_slice(&(word ^ spread).to_le_bytes());
            word = word.wrapping_add(STEP);
        }
        let rest = words.into_remainder();
        rest.copy_from_slice(&(word ^ spread).to_le_bytes()[..rest.len()]);
        let crc = crc32c::crc32c(block);
        block[4..8].copy_from_slice(&crc.to_le_bytes());
    }

    /// Says what `block` is.
    pub fn check(&self, block: &[u8]) -> Found {
        let Some(header) = Header::read(block) else {
            return if block.iter().all(|&byte| byte == 0) {
                Found::Zeroes
            } else {
                Found::Damaged
            };
        };
        if !header.crc_matches(block) {
            return Found::Damaged;
        }
        if header.id == *self {
            Found::Version(header.version)
        } else {
            Found::Foreign(header.id, header.version)
        }
    }

    /// The versions that the sectors of a damaged block are of, in order and without
    /// repetition; `None` for one that is of none. Zeroes count as version 0. A prefix of
    /// a block, cut at the file's end, is judged alike.
    pub fn sectors(&self, block: &[u8]) -> Vec<Option<u32>> {
        let mut versions = Vec::new();
        let mut from = 0;
        while from < block.len() {
            let at = self.offset + from as u64;
            // At most a sector.
            let to = (from + (SECTOR - at % SECTOR) as usize).min(block.len());
            let version = self.sector(block, from, to);
            if versions.last() != Some(&version) {
                versions.push(version);
            }
            from = to;
        }
        versions
    }

    /// The version that `block[from..to]` is of.
    fn sector(&self, block: &[u8], from: usize, to: usize) -> Option<u32> {
        if block[from..to].iter().all(|&byte| byte == 0) {
            return Some(0);
        }
        // A header that is cut says its version in no word; the words behind it do.
        let mut at = if from < HEADER { HEADER } else { HEADER + (from - HEADER).div_ceil(8) * 8 };
        let mut version = None;
        while at + 8 <= to {
            let word = u64::from_le_bytes(block[at..at + 8].try_into().unwrap_or_default());
            let base = self.key().wrapping_add(STEP.wrapping_mul(((at - HEADER) / 8) as u64));
            let found = u32::try_from((word ^ base).wrapping_mul(UNSPREAD)).ok()?;
            if found == 0 || version.is_some_and(|version| version != found) {
                return None;
            }
            version = Some(found);
            at += 8;
        }
        match (version, Header::read(block)) {
            // A sector with a header agrees with it.
            (Some(version), Some(header)) if from == 0 && to >= HEADER => {
                (header.id == *self && header.version == version).then_some(version)
            }
            (Some(version), _) if from > 0 || to < HEADER => Some(version),
            (Some(_), _) => None,
            // Too short to say: the header's word, or the benefit of the doubt.
            (None, Some(header)) if from == 0 => (header.id == *self).then_some(header.version),
            (None, _) => Some(0),
        }
    }
}

/// Whether a block that should be of a version is.
pub fn is_right(found: &Found, expected: u32) -> bool {
    match found {
        Found::Version(version) => *version == expected,
        Found::Zeroes => expected == 0,
        Found::Foreign(..) | Found::Damaged => false,
    }
}

/// What is wrong with a block, in two words and in full.
pub fn describe(
    at: usize,
    expected: u32,
    found: &Found,
    sectors: &[Option<u32>],
) -> (&'static str, String) {
    match found {
        Found::Version(version) if *version < expected => {
            ("lost write", format!("block {at} is version {version}, and was {expected}"))
        }
        Found::Version(version) => (
            "unknown write",
            format!("block {at} is version {version}, which is later than {expected}"),
        ),
        Found::Zeroes => ("lost write", format!("block {at} is zero, and was version {expected}")),
        Found::Foreign(id, version) => (
            "foreign block",
            format!(
                "block {at} should be version {expected}, and is version {version} of file \
                 {:x}.{:x} at {} of run {:x}",
                id.file >> 32,
                id.file & 0xffff_ffff,
                id.offset,
                id.run
            ),
        ),
        Found::Damaged => {
            let sectors: Vec<String> = sectors
                .iter()
                .map(|version| version.map_or("unknown".into(), |version| version.to_string()))
                .collect();
            let text = format!(
                "block {at} should be version {expected}; its sectors are of {}",
                sectors.join(", ")
            );
            ("torn block", text)
        }
    }
}

/// How long the block is that memory begins with, when its header makes sense.
pub fn block_len(memory: &[u8]) -> Option<usize> {
    let header = Header::read(memory)?;
    let len = header.len as usize;
    (len >= MIN_BLOCK && header.version > 0).then_some(len)
}

struct Header {
    id: BlockId,
    crc: u32,
    version: u32,
    len: u32,
}

impl Header {
    fn read(block: &[u8]) -> Option<Self> {
        let u32_at = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(block.get(at..at + 4)?.try_into().ok()?))
        };
        let u64_at = |at: usize| -> Option<u64> {
            Some(u64::from_le_bytes(block.get(at..at + 8)?.try_into().ok()?))
        };
        let id = BlockId { run: u64_at(32)?, file: u64_at(8)?, offset: u64_at(16)? };
        let header = Self { id, crc: u32_at(4)?, version: u32_at(24)?, len: u32_at(28)? };
        (u32_at(0)? == MAGIC).then_some(header)
    }

    fn crc_matches(&self, block: &[u8]) -> bool {
        let crc = crc32c::crc32c(&block[..4]);
        let crc = crc32c::crc32c_append(crc, &[0; 4]);
        self.len as usize == block.len() && crc32c::crc32c_append(crc, &block[8..]) == self.crc
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: BlockId = BlockId { run: 9, file: 7 << 32 | 3, offset: 12288 };

    fn stamped(version: u32, len: usize) -> Vec<u8> {
        let mut block = vec![0xaa; len];
        ID.stamp(version, &mut block);
        block
    }

    #[test]
    fn a_block_is_what_it_was_stamped_as_whatever_its_length() {
        for len in [64, 100, 512, 777, 4096, 8192] {
            let block = stamped(5, len);
            assert_eq!(ID.check(&block), Found::Version(5));
            assert_eq!(ID.sectors(&block), [Some(5)], "{len}");
            let other = BlockId { offset: 0, ..ID };
            assert_eq!(other.check(&block), Found::Foreign(ID, 5));
        }
        assert_eq!(ID.check(&[0; 512]), Found::Zeroes);
    }

    #[test]
    fn any_changed_bit_is_damage() {
        let block = stamped(5, 1000);
        for bit in (0..8000).step_by(37) {
            let mut damaged = block.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(ID.check(&damaged), Found::Damaged, "bit {bit}");
        }
    }

    #[test]
    fn a_torn_block_says_which_versions_met() {
        let (old, new) = (stamped(5, 4096), stamped(6, 4096));
        for cut in (512..4096).step_by(512) {
            let torn = [&new[..cut], &old[cut..]].concat();
            assert_eq!(ID.check(&torn), Found::Damaged);
            assert_eq!(ID.sectors(&torn), [Some(6), Some(5)], "at {cut}");
        }
        let mut torn = old.clone();
        torn[1024..1536].fill(0);
        assert_eq!(ID.sectors(&torn), [Some(5), Some(0), Some(5)]);
        torn[2048..2100].fill(0xee);
        assert!(ID.sectors(&torn).contains(&None));
        // Not at a sector's edge: no disk does that.
        let torn = [&new[..700], &old[700..]].concat();
        assert!(ID.sectors(&torn).contains(&None));
    }
}
