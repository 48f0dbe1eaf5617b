//! The block map of ext2 and ext3: twelve direct blocks, then trees of one, two and
//! three levels of pointer blocks; and the largest sizes of both kinds of mapping.
//!
//! Source: Documentation/filesystems/ext4/blockmap.rst.
//!
//! Invariants: pointer blocks hold 32-bit block numbers, 0 for a hole, and carry no
//! checksum. A [`BlockPath`] never has more than four steps, and each step's offset
//! lies in its node.

use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use crate::error::{Corrupt, Result};
use crate::inode::I_BLOCK_SIZE;
use crate::superblock::Superblock;
use crate::units::{FsBlock, LogicalBlock};

const WHAT: &str = "block map";

/// Blocks named in the inode itself.
pub const DIRECT_BLOCKS: u32 = 12;
/// Index in `i_block` of the single, double and triple indirect block.
pub const INDIRECT: usize = 12;
/// See [`INDIRECT`].
pub const DOUBLE_INDIRECT: usize = 13;
/// See [`INDIRECT`].
pub const TRIPLE_INDIRECT: usize = 14;
/// Bytes of a block pointer.
const POINTER_SIZE: usize = 4;

/// Pointers in a block.
pub fn pointers_per_block(block_size: u32) -> u32 {
    block_size / POINTER_SIZE as u32
}

/// The way from the inode to a block of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPath {
    offsets: [u32; 4],
    steps: u8,
    boundary: u32,
}

impl BlockPath {
    /// Index in `i_block`, then the index in each pointer block below it: 1 to 4 steps.
    pub fn offsets(&self) -> &[u32] {
        &self.offsets[..usize::from(self.steps)]
    }

    /// Pointer blocks between the inode and the block: 0 to 3.
    pub fn depth(&self) -> usize {
        usize::from(self.steps) - 1
    }

    /// Pointers after the last step's in the same node: how far a run may go on without
    /// leaving it.
    pub fn blocks_to_boundary(&self) -> u32 {
        self.boundary
    }
}

/// The way to a block of the file; `None` past what the map can reach.
pub fn block_path(logical: LogicalBlock, block_size: u32) -> Option<BlockPath> {
    let per_block = u64::from(pointers_per_block(block_size));
    let last = |offset: u64| (per_block - 1 - offset % per_block) as u32;
    if logical.0 < DIRECT_BLOCKS {
        let boundary = DIRECT_BLOCKS - 1 - logical.0;
        return Some(BlockPath { offsets: [logical.0, 0, 0, 0], steps: 1, boundary });
    }
    let mut rest = u64::from(logical.0 - DIRECT_BLOCKS);
    let mut span = per_block;
    for (level, root) in (1u8..).zip([INDIRECT, DOUBLE_INDIRECT, TRIPLE_INDIRECT]) {
        if rest < span {
            let mut offsets = [root as u32, 0, 0, 0];
            let mut left = rest;
            for slot in offsets[1..=usize::from(level)].iter_mut().rev() {
                *slot = (left % per_block) as u32;
                left /= per_block;
            }
            return Some(BlockPath { offsets, steps: level + 1, boundary: last(rest) });
        }
        rest -= span;
        span = span.saturating_mul(per_block);
    }
    None
}

/// The first block of the file below each of the indirect roots, with the number of blocks
/// below it: single, double, triple. Where the file ends before (2³² blocks), cut there.
pub fn indirect_spans(block_size: u32) -> [(u64, u64); 3] {
    let per_block = u64::from(pointers_per_block(block_size));
    let mut start = u64::from(DIRECT_BLOCKS);
    let mut span = 1u64;
    [(); 3].map(|()| {
        span = span.saturating_mul(per_block);
        let first = start;
        start = start.saturating_add(span);
        (first, span)
    })
}

/// A view of block pointers: the 15 of an inode or those of a pointer block. Over `&[u8]` to
/// read, over `&mut [u8]` to edit in place.
#[derive(Clone, Copy, Debug)]
pub struct Pointers<B> {
    bytes: B,
}

impl<B: AsRef<[u8]>> Pointers<B> {
    /// A view over `i_block` or a whole block.
    ///
    /// # Errors
    /// `Truncated` when the length is no multiple of 4 or below that of `i_block`.
    pub fn new(bytes: B) -> Result<Self> {
        let len = bytes.as_ref().len();
        if len < I_BLOCK_SIZE || !len.is_multiple_of(POINTER_SIZE) {
            return Err(Corrupt::truncated(WHAT, len, I_BLOCK_SIZE));
        }
        Ok(Self { bytes })
    }

    /// Pointers.
    pub fn len(&self) -> usize {
        self.bytes.as_ref().len() / POINTER_SIZE
    }

    /// Whether there are none; never so.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn words(&self) -> &[U32] {
        <[U32]>::ref_from_bytes(self.bytes.as_ref()).expect("checked by new")
    }

    /// The pointer at `at`, `None` for a hole.
    ///
    /// # Panics
    /// When there is no such pointer.
    #[inline]
    pub fn get(&self, at: usize) -> Option<FsBlock> {
        match self.words()[at].get() {
            0 => None,
            block => Some(FsBlock(block.into())),
        }
    }

    /// The pointer at `at`, `None` for a hole, checked to lie in the filesystem.
    ///
    /// # Errors
    /// `Value` when it does not.
    ///
    /// # Panics
    /// When there is no such pointer.
    pub fn get_checked(&self, at: usize, sb: &Superblock) -> Result<Option<FsBlock>> {
        match self.get(at) {
            Some(block) if !is_valid(block, sb) => {
                Err(Corrupt::value(WHAT, format!("pointer {at} is block {block}")))
            }
            pointer => Ok(pointer),
        }
    }

    /// Checks that every pointer from `from` on lies in the filesystem.
    ///
    /// # Errors
    /// `Value` for the first that does not.
    pub fn check(&self, from: usize, sb: &Superblock) -> Result<()> {
        (from..self.len()).try_for_each(|at| self.get_checked(at, sb).map(drop))
    }

    /// Whether all pointers are holes.
    pub fn is_all_holes(&self) -> bool {
        self.bytes.as_ref().iter().all(|&byte| byte == 0)
    }

    /// How many pointers from `at` on name blocks that follow each other, at most `limit`;
    /// for a hole, how many holes follow.
    pub fn run(&self, at: usize, limit: usize) -> usize {
        let words = &self.words()[at..];
        let first = u64::from(words[0].get());
        let step = u64::from(first != 0);
        let follows =
            |(index, word): (usize, &U32)| u64::from(word.get()) == first + step * index as u64;
        words.iter().enumerate().take(limit).take_while(|&pair| follows(pair)).count()
    }

    /// All pointers that are no holes, with their index.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (usize, FsBlock)> + '_ {
        let blocks = self.words().iter().map(|word| FsBlock(word.get().into()));
        blocks.enumerate().filter(|(_, block)| block.0 != 0)
    }
}

/// Whether a file may own the block: past the superblock's, and in the filesystem.
fn is_valid(block: FsBlock, sb: &Superblock) -> bool {
    sb.first_data_block() < block && sb.is_fs_block(block)
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> Pointers<B> {
    /// Sets the pointer at `at`, `None` for a hole.
    ///
    /// # Panics
    /// When there is no such pointer, or the block has over 32 bits: block-mapped files get
    /// their blocks below that.
    pub fn set(&mut self, at: usize, block: Option<FsBlock>) {
        let number = block.map_or(0, |block| block.0);
        let number = u32::try_from(number).expect("a block map holds 32-bit blocks");
        let start = at * POINTER_SIZE;
        self.bytes.as_mut()[start..start + POINTER_SIZE].copy_from_slice(&number.to_le_bytes());
    }
}

/// The largest size in bytes of a file mapped by extents (`s_maxbytes`): 2³² - 1 blocks, less
/// without `huge_file`, since `i_blocks` then counts sectors in 32 bits.
pub fn max_extent_file_size(block_size: u32, huge_file: bool) -> u64 {
    let blocks = u64::from(u32::MAX);
    let blocks = if huge_file { blocks } else { blocks.min(max_counted_blocks(block_size)) };
    (blocks * u64::from(block_size)).min(i64::MAX as u64)
}

/// The largest size in bytes of a block-mapped file (`s_bitmap_maxbytes`): what the map
/// reaches, less when the file's blocks together with its pointer blocks, were it dense,
/// could not be counted in `i_blocks`.
pub fn max_block_map_file_size(block_size: u32, huge_file: bool) -> u64 {
    let limit = if huge_file { (1 << 48) - 1 } else { max_counted_blocks(block_size) };
    let per_block = u64::from(pointers_per_block(block_size));
    let (single, double) = (per_block, per_block * per_block);
    let direct = u64::from(DIRECT_BLOCKS);
    let reach = direct + single + double + double.saturating_mul(per_block);
    let reach_meta = 1 + (1 + single) + (1 + single + double);
    let blocks = if reach.saturating_add(reach_meta) <= limit {
        reach
    } else {
        // Count the pointer blocks a file of `limit` blocks would need, and leave them out.
        let below_double = limit - direct - single;
        let meta = match below_double.checked_sub(double) {
            None => 2 + below_double.div_ceil(per_block),
            Some(triple) => {
                1 + (1 + single) + 1 + triple.div_ceil(per_block) + triple.div_ceil(double)
            }
        };
        limit - meta
    };
    blocks.saturating_mul(u64::from(block_size)).min(i64::MAX as u64)
}

/// Blocks that 2³² - 1 sectors make.
fn max_counted_blocks(block_size: u32) -> u64 {
    u64::from(u32::MAX) / u64::from(block_size / 512)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_level_starts_where_the_one_before_ends() {
        let at = |logical| block_path(LogicalBlock(logical), 1024).unwrap().offsets().to_vec();
        assert_eq!(at(11), [11]);
        assert_eq!(at(12), [12, 0]);
        assert_eq!(at(12 + 255), [12, 255]);
        assert_eq!(at(12 + 256), [13, 0, 0]);
        assert_eq!(at(12 + 256 + 65535), [13, 255, 255]);
        assert_eq!(at(12 + 256 + 65536), [14, 0, 0, 0]);
        let end = 12 + 256 + 65536 + 256 * 65536;
        assert_eq!(at(end - 1), [14, 255, 255, 255]);
        assert_eq!(block_path(LogicalBlock(end), 1024), None);
    }

    #[test]
    fn boundary_counts_what_is_left_in_the_last_node() {
        let boundary =
            |logical| block_path(LogicalBlock(logical), 1024).unwrap().blocks_to_boundary();
        assert_eq!([boundary(0), boundary(11), boundary(12), boundary(267)], [11, 0, 255, 0]);
    }

    /// The kernel prints these as `s_maxbytes` limits; the values with huge files are the
    /// map's whole reach, which is public knowledge (16 GiB, 256 GiB, 4 TiB and a bit).
    #[test]
    fn block_map_limits_are_the_known_ones() {
        assert_eq!(max_block_map_file_size(1024, true), (12 + 256 + 65536 + 16_777_216) * 1024);
        assert_eq!(
            max_block_map_file_size(2048, true),
            (12u64 + 512 + 512 * 512 + 512 * 512 * 512) * 2048
        );
        assert_eq!(max_block_map_file_size(4096, true), 4_402_345_721_856);
        // Without huge_file the 4 KiB limit is 2 TiB less the pointer blocks.
        let limit = max_block_map_file_size(4096, false);
        assert!(limit < 2 << 40 && limit > (2 << 40) - (3 << 30));
    }

    #[test]
    fn extent_limits_are_the_known_ones() {
        assert_eq!(max_extent_file_size(4096, true), (16 << 40) - 4096);
        assert_eq!(max_extent_file_size(1024, true), (4 << 40) - 1024);
        assert_eq!(max_extent_file_size(4096, false), (2 << 40) - 4096);
    }

    #[test]
    fn a_dense_file_of_the_largest_size_can_be_counted() {
        for block_size in [1024u32, 2048, 4096, 8192, 16384, 32768, 65536] {
            let blocks = max_block_map_file_size(block_size, false) / u64::from(block_size);
            let per_block = u64::from(pointers_per_block(block_size));
            let mut total = blocks;
            let mut left = blocks - 12;
            for level in 1..=3u32 {
                let here = left.min(per_block.pow(level));
                total += (1..=level).map(|l| here.div_ceil(per_block.pow(l))).sum::<u64>();
                left -= here;
            }
            assert!(total * u64::from(block_size / 512) <= u64::from(u32::MAX), "{block_size}");
        }
    }

    #[test]
    fn runs_stop_at_a_gap_a_hole_and_the_limit() {
        let mut bytes = [0u8; 60];
        let mut map = Pointers::new(&mut bytes[..]).unwrap();
        for (at, block) in [(0, 100), (1, 101), (2, 102), (3, 200)] {
            map.set(at, Some(FsBlock(block)));
        }
        assert_eq!((map.run(0, 15), map.run(0, 2), map.run(3, 15), map.run(4, 15)), (3, 2, 1, 11));
        assert_eq!(map.iter().count(), 4);
    }

    proptest! {
        #[test]
        fn paths_count_up_without_gaps(logical in 0u32..u32::MAX - 1, bits in 10u32..=16) {
            let block_size = 1 << bits;
            let per_block = u64::from(pointers_per_block(block_size));
            if let Some(path) = block_path(LogicalBlock(logical), block_size) {
                let offsets = path.offsets();
                let (start, _) = if path.depth() == 0 { (0, 0) } else { indirect_spans(block_size)[path.depth() - 1] };
                let within = offsets[1..].iter().fold(0, |sum, &o| sum * per_block + u64::from(o));
                let first = if path.depth() == 0 { u64::from(offsets[0]) } else { start };
                prop_assert_eq!(first + within, u64::from(logical));
            }
        }
    }
}
