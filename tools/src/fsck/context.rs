//! What all passes share: the device, the metadata read so far, the maps of
//! what is in use, and the reporter.
//!
//! Invariants:
//! - Every map is sized by the superblock's counts, which pass 0 has checked
//!   against the size of the device, so memory is bounded by the image.
//! - Nothing is written to the device.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;

use uext_blockdev::BlockDevice;
use uext_ondisk::group_desc::{GroupDesc, GroupFlags};
use uext_ondisk::superblock::Superblock;
use uext_ondisk::{FsBlock, GroupNumber, InodeNumber};

use super::problem::{At, Code, Problem, Weight};
use super::progress::Progress;

/// Messages of one kind that are printed before the rest are only counted.
const MESSAGES_PER_KIND: u64 = 40;

/// Why the check ended early; the reason was reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop;

/// The result of a step that may end the check.
pub type Step<T> = Result<T, Stop>;

/// Counts problems and prints them.
pub struct Reporter<'a> {
    out: &'a mut dyn Write,
    /// How many of each kind.
    pub counts: BTreeMap<Code, u64>,
    /// Problems that count against the filesystem.
    pub errors: u64,
    /// Problems that do not.
    pub warnings: u64,
}

impl<'a> Reporter<'a> {
    /// A reporter that prints to `out`.
    pub fn new(out: &'a mut dyn Write) -> Self {
        Self { out, counts: BTreeMap::new(), errors: 0, warnings: 0 }
    }

    /// Reports a problem.
    pub fn problem(&mut self, code: Code, at: At) {
        let count = self.counts.entry(code).or_default();
        *count += 1;
        let count = *count;
        match code.row().weight {
            Weight::Error => self.errors += 1,
            Weight::Warning => self.warnings += 1,
        }
        if count <= MESSAGES_PER_KIND {
            self.say(&Problem { code, at }.to_string());
        } else if count == MESSAGES_PER_KIND + 1 {
            self.say("(more problems of this kind are only counted)");
        }
    }

    /// Prints a line. A reader that went away does not change the verdict.
    pub fn say(&mut self, line: &str) {
        let _ = writeln!(self.out, "{line}");
    }
}

/// A set of bits.
#[derive(Clone)]
pub struct BitSet {
    words: Vec<u64>,
    len: u64,
}

impl BitSet {
    /// `len` clear bits.
    pub fn new(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(64)).expect("a map fits memory");
        Self { words: vec![0; words], len }
    }

    fn place(index: u64) -> (usize, u64) {
        // In range by the length of `words`.
        #[allow(clippy::cast_possible_truncation)]
        let word = (index / 64) as usize;
        (word, 1 << (index % 64))
    }

    /// Whether a bit is set; bits past the end are not.
    pub fn contains(&self, index: u64) -> bool {
        let (word, mask) = Self::place(index);
        index < self.len && self.words[word] & mask != 0
    }

    /// Sets a bit; whether it was set. Bits past the end are ignored.
    pub fn insert(&mut self, index: u64) -> bool {
        if index >= self.len {
            return false;
        }
        let (word, mask) = Self::place(index);
        let was = self.words[word] & mask != 0;
        self.words[word] |= mask;
        was
    }
}

/// What pass 1 learnt of an inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InodeState {
    /// `InodeState::USED` and its kin.
    pub flags: u8,
    /// The type an entry should name (`FileType::raw`).
    pub kind: u8,
    /// `i_links_count`.
    pub links: u16,
    /// Entries that lead to it.
    pub counted: u32,
}

impl InodeState {
    /// In use.
    pub const USED: u8 = 1;
    /// A directory.
    pub const DIR: u8 = 2;
    /// A regular file.
    pub const REG: u8 = 4;
    /// Has fields that cannot be.
    pub const BAD: u8 = 8;
    /// An imagic inode, whose links are not counted.
    pub const IMAGIC: u8 = 16;
    /// Flagged as an attribute's value.
    pub const EA: u8 = 32;
    /// An attribute refers to it.
    pub const EA_REFERENCED: u8 = 64;
    /// An encrypted directory.
    pub const ENCRYPTED: u8 = 128;

    /// Whether a flag is set.
    pub fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// A block of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirBlockRef {
    /// The directory.
    pub ino: u32,
    /// The block of the directory.
    pub logical: u32,
    /// The block of the filesystem.
    pub block: u64,
}

/// A directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirInfo {
    /// Its inode.
    pub ino: u32,
    /// The directory that holds an entry for it; 0 when none was found.
    pub parent: u32,
    /// Where `..` leads.
    pub dotdot: u32,
    /// It has the index flag and its root looked sound.
    pub indexed: bool,
    /// It has holes, so its index cannot be followed.
    pub holes: bool,
    /// Its entries lie in the inode and are not checked.
    pub inline: bool,
}

/// Everything a pass works on.
pub struct Context<'a, 'r> {
    /// The device, only read.
    pub dev: &'a dyn BlockDevice,
    /// The superblock in use.
    pub sb: Superblock,
    /// All descriptors, `desc_size` bytes each.
    pub descs: Vec<u8>,
    /// Groups whose inode table cannot be used.
    pub bad_tables: Vec<bool>,
    /// The device is seen through its journal, as the next mount would find it.
    pub looked_through: bool,
    /// Inodes that the next mount deletes or truncates; known only when looked through.
    pub orphans: HashSet<u32>,
    /// Where problems go.
    pub report: &'r mut Reporter<'a>,
    /// Where progress goes.
    pub progress: &'r mut Progress,
    /// Clusters in use, by cluster number from block 0.
    pub used: BitSet,
    /// Blocks of static metadata.
    pub metadata: BitSet,
    /// By inode number; index 0 is unused.
    pub inodes: Vec<InodeState>,
    /// Blocks of directories, by directory and logical block.
    pub dir_blocks: Vec<DirBlockRef>,
    /// Directories, by number.
    pub dirs: Vec<DirInfo>,
    /// Regular files of 2 GiB and more.
    pub large_files: u64,
    /// Directories whose size or index needs large_dir.
    pub large_dirs: u64,
}

impl Context<'_, '_> {
    /// Reports a problem.
    pub fn problem(&mut self, code: Code, at: At) {
        self.report.problem(code, at);
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> usize {
        self.sb.block_size() as usize
    }

    /// A block's bytes; `None` outside the device or when it cannot be read.
    pub fn read_block(&self, block: u64) -> Option<Vec<u8>> {
        let offset = block.checked_mul(u64::from(self.sb.block_size()))?;
        self.dev.read_at(offset, self.block_size()).ok()
    }

    /// A group's descriptor.
    pub fn desc(&self, group: u32) -> GroupDesc<&[u8]> {
        let size = usize::from(self.sb.desc_size());
        let at = group as usize * size;
        GroupDesc::new(&self.descs[at..at + size]).expect("descriptors have their size")
    }

    /// A group's flags; none unless descriptors carry a checksum.
    pub fn group_flags(&self, group: u32) -> GroupFlags {
        if self.sb.features().group_desc_csum() {
            self.desc(group).flags()
        } else {
            GroupFlags::empty()
        }
    }

    /// The bytes of an inode, read from the device.
    pub fn read_inode(&self, ino: u32) -> Option<Vec<u8>> {
        let place = self.sb.inode_location(InodeNumber(ino))?;
        if self.bad_tables.get(place.group.0 as usize).copied().unwrap_or(true) {
            return None;
        }
        let table = self.desc(place.group.0).inode_table().0;
        let block = table.checked_add(place.table_block.into())?;
        let offset = block.checked_mul(self.sb.block_size().into())?;
        let offset = offset.checked_add(place.offset.into())?;
        self.dev.read_at(offset, usize::from(self.sb.inode_size())).ok()
    }

    /// Whether a file may own the block.
    pub fn is_fs_block(&self, block: u64) -> bool {
        self.sb.is_fs_block(FsBlock(block))
    }

    /// The cluster of a block.
    pub fn cluster(&self, block: u64) -> u64 {
        block >> self.sb.cluster_ratio_bits()
    }

    /// The state of an inode; of none for a number that does not exist.
    pub fn inode(&self, ino: u32) -> InodeState {
        self.inodes.get(ino as usize).copied().unwrap_or_default()
    }

    /// Whether an inode has no name and waits to be deleted.
    pub fn is_gone(&self, ino: u32) -> bool {
        self.inode(ino).links == 0 && self.orphans.contains(&ino)
    }

    /// Adds a flag to an inode's state.
    pub fn set_flag(&mut self, ino: u32, flag: u8) {
        if let Some(state) = self.inodes.get_mut(ino as usize) {
            state.flags |= flag;
        }
    }

    /// The index of a directory in `dirs`.
    pub fn dir_index(&self, ino: u32) -> Option<usize> {
        self.dirs.binary_search_by_key(&ino, |dir| dir.ino).ok()
    }

    /// Marks what a group keeps at its start: superblock, descriptors, reserved descriptors.
    pub fn group_base(&self, group: u32) -> std::ops::Range<u64> {
        group_base(&self.sb, group)
    }
}

/// The blocks at the start of a group that hold superblock and descriptors.
pub fn group_base(sb: &Superblock, group: u32) -> std::ops::Range<u64> {
    let group = GroupNumber(group);
    let first = sb.group_first_block(group).0;
    let count = u64::from(sb.base_meta_blocks(group));
    first..first.saturating_add(count).min(sb.blocks_count())
}
