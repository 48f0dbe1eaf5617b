//! The hashes that order an indexed directory.
//!
//! Source: Documentation/filesystems/ext4/directory.rst (hash tree
//! directories). Three functions, each with names taken as signed or unsigned
//! bytes (an accident of the machine that made the filesystem, kept in
//! `s_flags`), and SipHash for encrypted case-folded directories, which needs a
//! key and is only recognised.
//!
//! Invariant: the low bit of a hash is 0; it marks collisions in the index.

use crate::error::{Corrupt, CorruptKind, Result};

/// The largest hash a cursor may hold; no entry has it (`EXT4_HTREE_EOF_32BIT << 1`).
const END_OF_DIRECTORY: u32 = 0x7FFF_FFFF << 1;
/// MD4's initial state, used where the seed is zero.
const DEFAULT_SEED: [u32; 4] = [0x6745_2301, 0xEFCD_AB89, 0x98BA_DCFE, 0x1032_5476];

/// Which function (`dx_root_info.hash_version`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashFunction {
    /// The first one (`DX_HASH_LEGACY`).
    Legacy,
    /// Half of MD4 (`DX_HASH_HALF_MD4`), the default.
    HalfMd4,
    /// TEA (`DX_HASH_TEA`).
    Tea,
}

/// A function and how it takes the bytes of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashVersion {
    /// The function.
    pub function: HashFunction,
    /// Bytes are taken as unsigned.
    pub unsigned: bool,
}

impl HashVersion {
    /// From `hash_version` of an index root or `s_def_hash_version`, with
    /// `unsigned` from `s_flags` (`EXT2_FLAGS_UNSIGNED_HASH`).
    ///
    /// # Errors
    /// `Unsupported` for SipHash, `Value` for a number the format does not define.
    pub fn from_raw(raw: u8, unsigned: bool) -> Result<Self> {
        let (function, unsigned) = match raw {
            0 => (HashFunction::Legacy, unsigned),
            1 => (HashFunction::HalfMd4, unsigned),
            2 => (HashFunction::Tea, unsigned),
            3 => (HashFunction::Legacy, true),
            4 => (HashFunction::HalfMd4, true),
            5 => (HashFunction::Tea, true),
            6 => {
                let detail = "SipHash needs the key of an encrypted directory";
                return Err(Corrupt::new(CorruptKind::Unsupported, "directory hash", detail));
            }
            other => {
                return Err(Corrupt::value("directory hash", format!("version is {other}")));
            }
        };
        Ok(Self { function, unsigned })
    }

    /// The number an index root holds: never the unsigned variants, which the
    /// superblock's flag selects.
    pub fn root_raw(self) -> u8 {
        match self.function {
            HashFunction::Legacy => 0,
            HashFunction::HalfMd4 => 1,
            HashFunction::Tea => 2,
        }
    }
}

/// A name's place in an indexed directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirHash {
    /// What the index is ordered by; even.
    pub hash: u32,
    /// Tells names of equal `hash` apart in a directory cursor.
    pub minor: u32,
}

/// A hash version with its seed: all a directory's names need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirHasher {
    /// The function.
    pub version: HashVersion,
    /// `s_hash_seed`, as little-endian words; all zero means the default.
    pub seed: [u32; 4],
}

impl DirHasher {
    /// The hash of a name.
    pub fn hash(&self, name: &[u8]) -> DirHash {
        let state = if self.seed == [0; 4] { DEFAULT_SEED } else { self.seed };
        let (hash, minor) = match self.version.function {
            HashFunction::Legacy => (legacy(name, self.version.unsigned), 0),
            HashFunction::HalfMd4 => half_md4(state, name, self.version.unsigned),
            HashFunction::Tea => tea(state, name, self.version.unsigned),
        };
        let hash = hash & !1;
        let hash = if hash == END_OF_DIRECTORY { END_OF_DIRECTORY - 2 } else { hash };
        DirHash { hash, minor }
    }
}

/// A byte of a name as the 32-bit number the functions add up.
fn widen(byte: u8, unsigned: bool) -> u32 {
    if unsigned { u32::from(byte) } else { i32::from(byte.cast_signed()).cast_unsigned() }
}

fn legacy(name: &[u8], unsigned: bool) -> u32 {
    let (mut last, mut before) = (0x12A3_FE2D_u32, 0x37AB_E8F9_u32);
    for &byte in name {
        let mixed = last ^ widen(byte, unsigned).wrapping_mul(7_152_373);
        let mut next = before.wrapping_add(mixed);
        if next & 0x8000_0000 != 0 {
            next = next.wrapping_sub(0x7FFF_FFFF);
        }
        (before, last) = (last, next);
    }
    last << 1
}

/// Packs up to `N * 4` bytes of what remains of a name, big-endian within a
/// word, padded with the remaining length in every byte.
fn pack<const N: usize>(rest: &[u8], unsigned: bool) -> [u32; N] {
    // Names are at most 255 bytes, so the low byte is all of the length.
    #[allow(clippy::cast_possible_truncation)]
    let length = rest.len() as u32;
    let pad = length | length << 8;
    let pad = pad | pad << 16;
    let mut words = [pad; N];
    for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
        for &byte in bytes {
            *word = widen(byte, unsigned).wrapping_add(*word << 8);
        }
    }
    words
}

fn half_md4(mut state: [u32; 4], name: &[u8], unsigned: bool) -> (u32, u32) {
    let mut rest = name;
    while !rest.is_empty() {
        half_md4_transform(&mut state, pack::<8>(rest, unsigned));
        rest = rest.get(32..).unwrap_or(&[]);
    }
    (state[1], state[2])
}

fn half_md4_transform(state: &mut [u32; 4], input: [u32; 8]) {
    type Mix = fn(u32, u32, u32) -> u32;
    let choose: Mix = |x, y, z| z ^ (x & (y ^ z));
    let majority: Mix = |x, y, z| (x & y).wrapping_add((x ^ y) & z);
    let parity: Mix = |x, y, z| x ^ y ^ z;
    // Per round: the function, its constant, the order of the input, the rotations.
    let rounds: [(Mix, u32, [usize; 8], [u32; 4]); 3] = [
        (choose, 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        (majority, 0x5A82_7999, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]),
        (parity, 0x6ED9_EBA1, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, constant, order, rotations) in rounds {
        for (&index, &rotation) in order.iter().zip(rotations.iter().cycle()) {
            let sum = a.wrapping_add(mix(b, c, d)).wrapping_add(input[index]);
            let turned = sum.wrapping_add(constant).rotate_left(rotation);
            (a, b, c, d) = (d, turned, b, c);
        }
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}

fn tea(mut state: [u32; 4], name: &[u8], unsigned: bool) -> (u32, u32) {
    let mut rest = name;
    while !rest.is_empty() {
        tea_transform(&mut state, pack::<4>(rest, unsigned));
        rest = rest.get(16..).unwrap_or(&[]);
    }
    (state[0], state[1])
}

fn tea_transform(state: &mut [u32; 4], key: [u32; 4]) {
    let step = |half: u32, sum: u32, low: u32, high: u32| {
        (half << 4).wrapping_add(low) ^ half.wrapping_add(sum) ^ (half >> 5).wrapping_add(high)
    };
    let (mut left, mut right, mut sum) = (state[0], state[1], 0u32);
    for _ in 0..16 {
        sum = sum.wrapping_add(0x9E37_79B9);
        left = left.wrapping_add(step(right, sum, key[0], key[1]));
        right = right.wrapping_add(step(left, sum, key[2], key[3]));
    }
    state[0] = state[0].wrapping_add(left);
    state[1] = state[1].wrapping_add(right);
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const FUNCTIONS: [HashFunction; 3] =
        [HashFunction::Legacy, HashFunction::HalfMd4, HashFunction::Tea];
    const SEEDS: [(&str, [u32; 4]); 2] = [
        ("00000000-0000-0000-0000-000000000000", [0; 4]),
        (
            "7ba3d9c1-02ff-4e80-91a5-d0e1f2031425",
            [0xC1D9_A37B, 0x804E_FF02, 0xE1D0_A591, 0x2514_03F2],
        ),
    ];

    fn names() -> Vec<String> {
        let mut names: Vec<String> =
            ["a", "abc", "lost+found", "Grüße-日本語", "ÿþ"].map(String::from).into();
        for length in [4, 15, 16, 17, 31, 32, 33, 63, 64, 100, 254] {
            names.push("xY9-".chars().cycle().take(length).collect());
            names.push("éa".chars().cycle().take(length / 2).collect());
        }
        names
    }

    /// Runs debugfs once with all commands; `None`, loudly, without debugfs.
    fn debugfs_hashes(commands: &str) -> Option<Vec<(u32, u32)>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), commands).unwrap();
        let run = Command::new("debugfs").arg("-f").arg(file.path()).output();
        let Ok(output) = run else {
            eprintln!("SKIP: debugfs is not installed, dirhash is not compared with it");
            return None;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let number = |word: &str| u32::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
        let hashes = text.lines().filter_map(|line| line.rsplit_once(" is 0x")).map(|(_, tail)| {
            let mut words = tail.split_whitespace();
            let hash = number(words.next().unwrap());
            (hash, number(words.last().unwrap().trim_end_matches(')')))
        });
        Some(hashes.collect())
    }

    #[test]
    fn every_hash_agrees_with_debugfs() {
        let mut commands = String::new();
        let mut ours = Vec::new();
        for (seed_text, seed) in SEEDS {
            for unsigned in [false, true] {
                for function in FUNCTIONS {
                    let hasher = DirHasher { version: HashVersion { function, unsigned }, seed };
                    // debugfs takes the unsigned variants only by number.
                    let number = hasher.version.root_raw() + 3 * u8::from(unsigned);
                    for name in names() {
                        commands += &format!("dx_hash -h {number} -s {seed_text} {name}\n");
                        let hash = hasher.hash(name.as_bytes());
                        ours.push((name, hasher, (hash.hash, hash.minor)));
                    }
                }
            }
        }
        let Some(theirs) = debugfs_hashes(&commands) else { return };
        assert_eq!(theirs.len(), ours.len());
        for ((name, hasher, ours), theirs) in ours.into_iter().zip(theirs) {
            assert_eq!(ours, theirs, "{name} by {hasher:?}");
        }
    }

    #[test]
    fn siphash_is_unsupported_and_others_are_corrupt() {
        let kind = |raw| HashVersion::from_raw(raw, false).unwrap_err().kind;
        assert_eq!(kind(6), CorruptKind::Unsupported);
        assert_eq!(kind(7), CorruptKind::Value);
        assert!(HashVersion::from_raw(4, false).unwrap().unsigned);
        assert!(HashVersion::from_raw(1, true).unwrap().unsigned);
    }
}
