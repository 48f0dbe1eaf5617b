//! The first inodes: root, lost+found, the resize inode, the journal, the orphan file.
//!
//! No I/O: each becomes a [`NewFile`] with its inode's fields and the blocks to write.
//! Their places are taken from the layout in mke2fs's order.
//!
//! Invariant: every block named in an inode or a node is taken in the layout's space,
//! once.

use uext_ondisk::dir_entry::{DirBlockMut, DirFormat, FileType};
use uext_ondisk::extent::{Extent, ExtentIndex, ExtentNode, MAX_WRITTEN_LEN, capacity};
use uext_ondisk::features::{Compat, Features, RoCompat};
use uext_ondisk::indirect::{DIRECT_BLOCKS, DOUBLE_INDIRECT, INDIRECT, Pointers};
use uext_ondisk::inode::{I_BLOCK_SIZE, InodeFlags, inode_csum_seed};
use uext_ondisk::jbd2::RawJournalSuperblock;
use uext_ondisk::superblock::Superblock;
use uext_ondisk::{FsBlock, GroupNumber, InodeNumber, LogicalBlock, orphan_file};
use zerocopy::IntoBytes;

use super::error::{MkfsError, Result, usage};
use super::layout::Layout;
use super::params::Params;
use super::space::Run;

/// The inode of lost+found: the first that is not reserved.
const LOST_FOUND: InodeNumber = InodeNumber(11);
/// The inode of the orphan file.
const ORPHAN_FILE: InodeNumber = InodeNumber(12);
/// Bytes of lost+found, so that fsck need not allocate; two blocks at least.
const LOST_FOUND_BYTES: u32 = 16 * 1024;
/// Blocks a journal may have at most.
const MAX_JOURNAL_BLOCKS: u64 = 10_240_000;
/// A journal's blocks for each block of fast commits.
const FAST_COMMIT_RATIO: u32 = 64;

/// A block and its contents.
pub type NewBlock = (u64, Vec<u8>);

/// An inode to write.
#[derive(Debug)]
pub struct NewFile {
    /// Its number.
    pub number: InodeNumber,
    /// Type and permissions.
    pub mode: u16,
    /// Links.
    pub links: u16,
    /// Owner.
    pub owner: (u32, u32),
    /// Bytes.
    pub size: u64,
    /// Sectors of 512 bytes it takes.
    pub sectors: u64,
    /// Flags.
    pub flags: InodeFlags,
    /// The root of its map.
    pub i_block: [u8; I_BLOCK_SIZE],
}

/// All first files.
#[derive(Debug, Default)]
pub struct FirstFiles {
    /// Inodes, by number.
    pub inodes: Vec<NewFile>,
    /// Blocks to write.
    pub blocks: Vec<NewBlock>,
    /// Blocks to zero: the journal's, when it is not left as it is.
    pub zero: Vec<Run>,
    /// Blocks of the journal, 0 when there is none.
    pub journal_blocks: u32,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// What maps a file's blocks.
struct Map {
    i_block: [u8; I_BLOCK_SIZE],
    flags: InodeFlags,
    blocks: u64,
}

impl FirstFiles {
    /// Plans all of them and completes the superblock (journal, orphan file, overhead).
    ///
    /// # Errors
    /// `TooSmall`, or a usage error for a journal that does not fit.
    pub fn plan(params: &Params, layout: &mut Layout) -> Result<Self> {
        let mut files = Self::default();
        let tables =
            layout.sb.blocks_count() - layout.sb.first_data_block().0 - layout.space.count_free();
        files.add_root(params, layout)?;
        files.add_lost_found(params, layout)?;
        if layout.sb.features().compat.contains(Compat::RESIZE_INODE) {
            files.add_resize_inode(layout)?;
        }
        if let Some(journal) = &params.journal_device {
            let raw = layout.sb.raw_mut();
            raw.s_journal_uuid = journal.own.uuid.into_bytes();
            raw.s_journal_dev = journal.number.into();
        } else if layout.sb.features().has_journal() {
            files.add_journal(params, layout)?;
        }
        if layout.sb.features().orphan_file() {
            files.add_orphan_file(params, layout)?;
        }
        let overhead = tables + u64::from(files.journal_blocks) + layout.sb.first_data_block().0;
        // Without a place for it the kernel counts itself.
        let overhead = u32::try_from(overhead).unwrap_or(0);
        layout.sb.raw_mut().s_overhead_clusters = overhead.into();
        if files.inodes.iter().any(|file| file.size > i32::MAX as u64) {
            files.set_feature(
                layout,
                Features { ro_compat: RoCompat::LARGE_FILE, ..Features::default() },
            )?;
        }
        files.inodes.sort_by_key(|file| file.number);
        Ok(files)
    }

    fn set_feature(&mut self, layout: &mut Layout, feature: Features) -> Result<()> {
        let features = layout.sb.features().with(feature);
        Ok(layout.sb.set_features(features)?)
    }

    fn add_root(&mut self, params: &Params, layout: &mut Layout) -> Result<()> {
        let number = InodeNumber::ROOT;
        let mut file = self.new_directory(layout, number, number, 1)?;
        let entry = self.blocks.last_mut().map(|(_, bytes)| &mut bytes[..]).unwrap_or_default();
        let format = dir_format(&layout.sb);
        let mut dir = DirBlockMut::new(entry, format);
        dir.insert(b"lost+found", LOST_FOUND, FileType::Directory)?;
        dir.set_checksum(seed(&layout.sb, number))?;
        file.links = 3;
        file.mode |= params.root_perms;
        file.owner = params.root_owner;
        self.inodes.push(file);
        Ok(())
    }

    fn add_lost_found(&mut self, params: &Params, layout: &mut Layout) -> Result<()> {
        let blocks = (LOST_FOUND_BYTES / params.block_size).clamp(2, DIRECT_BLOCKS);
        let mut file = self.new_directory(layout, LOST_FOUND, InodeNumber::ROOT, blocks.into())?;
        file.mode |= 0o700;
        self.inodes.push(file);
        Ok(())
    }

    /// A directory of `count` blocks with `.` and `..` in the first. Of a directory of one
    /// block, that block is the last of `self.blocks`.
    fn new_directory(
        &mut self,
        layout: &mut Layout,
        number: InodeNumber,
        parent: InodeNumber,
        count: u64,
    ) -> Result<NewFile> {
        let size = layout.sb.block_size() as usize;
        let (runs, map) = self.allocate(layout, number, count, 0)?;
        let format = dir_format(&layout.sb);
        for (at, block) in blocks_of(&runs).enumerate() {
            let mut bytes = vec![0; size];
            let mut dir = DirBlockMut::new(&mut bytes, format);
            if at == 0 {
                dir.init_dot(number, parent);
            } else {
                dir.init_empty();
            }
            dir.set_checksum(seed(&layout.sb, number))?;
            self.blocks.push((block, bytes));
        }
        Ok(new_file(&layout.sb, number, 0o040_000, 2, count, map))
    }

    /// The inode that owns the blocks reserved for descriptors: a double indirect map whose
    /// pointer blocks are the reserved blocks after the primary descriptors, each naming its
    /// copies behind the backups.
    fn add_resize_inode(&mut self, layout: &mut Layout) -> Result<()> {
        let sb = layout.sb.clone();
        let block_size = sb.block_size() as usize;
        let per_block = u64::from(sb.block_size() / 4);
        let [root] = take_exact(layout, 1, 0)?[..] else { return Err(no_room("resize inode")) };
        let mut i_block = [0; I_BLOCK_SIZE];
        Pointers::new(&mut i_block[..])?.set(DOUBLE_INDIRECT, Some(FsBlock(root.start)));
        let backups: Vec<GroupNumber> = sb.backup_groups().collect();
        let mut root_bytes = vec![0; block_size];
        let mut used = 1;
        for at in 0..sb.reserved_gdt_blocks() {
            let index = sb.gdt_blocks() + at;
            let block = sb.super_block() + 1 + u64::from(index);
            let slot = u64::from(index) % per_block;
            Pointers::new(&mut root_bytes[..])?.set(slot as usize, Some(block));
            let mut bytes = vec![0; block_size];
            let mut copies = Pointers::new(&mut bytes[..])?;
            for (at, group) in backups.iter().enumerate() {
                let distance = u64::from(group.0) * u64::from(sb.blocks_per_group());
                copies.set(at, Some(block + distance));
            }
            used += 1 + backups.len() as u64;
            self.blocks.push((block.0, bytes));
        }
        self.blocks.push((root.start, root_bytes));
        let reach = per_block * per_block + per_block + u64::from(DIRECT_BLOCKS);
        let map = Map { i_block, flags: InodeFlags::empty(), blocks: used };
        let mut file = new_file(&sb, InodeNumber::RESIZE, 0o100_600, 1, reach, map);
        file.sectors = used * u64::from(sb.block_size() / 512);
        self.inodes.push(file);
        Ok(())
    }

    fn add_journal(&mut self, params: &Params, layout: &mut Layout) -> Result<()> {
        let Some((log, fast)) = journal_size(params, layout)? else {
            self.warnings.push("the filesystem is too small for a journal".to_owned());
            let mut features = layout.sb.features();
            features.compat.remove(Compat::HAS_JOURNAL | Compat::ORPHAN_FILE | Compat::FAST_COMMIT);
            layout.sb.set_features(features)?;
            return Ok(());
        };
        let number = InodeNumber::JOURNAL;
        let count = log + fast;
        let packed = params.packed_meta.then_some(0);
        let goal = params.journal_location.or(packed).unwrap_or_else(|| middle(layout));
        let (runs, map) = self.allocate(layout, number, count.into(), goal)?;
        let mut raw = RawJournalSuperblock::new(params.block_size, count, 1, params.uuid);
        raw.s_num_fc_blks = fast.into();
        let mut bytes = raw.as_bytes().to_vec();
        bytes.resize(params.block_size as usize, 0);
        self.blocks.push((runs[0].start, bytes));
        if !params.lazy_journal_init {
            let mut rest = runs;
            rest[0] = Run { start: rest[0].start + 1, len: rest[0].len - 1 };
            self.zero.extend(rest.iter().filter(|run| run.len > 0));
        }
        let file = new_file(&layout.sb, number, 0o100_600, 1, count.into(), map);
        let mut words = [0u32; 15];
        for (word, bytes) in words.iter_mut().zip(file.i_block.chunks(4)) {
            *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
        }
        layout.sb.set_journal_backup(words, file.size);
        layout.sb.raw_mut().s_journal_inum = number.0.into();
        self.inodes.push(file);
        self.journal_blocks = count;
        Ok(())
    }

    fn add_orphan_file(&mut self, params: &Params, layout: &mut Layout) -> Result<()> {
        let count = params.orphan_blocks.unwrap_or_else(|| match layout.sb.blocks_count() {
            0..0x2_0000 => 32,
            blocks if blocks < 0x20_0000 => (blocks / 4096) as u32,
            _ => 512,
        });
        let (runs, map) = self.allocate(layout, ORPHAN_FILE, count.into(), 0)?;
        for block in blocks_of(&runs) {
            let mut bytes = vec![0; params.block_size as usize];
            orphan_file::init(&mut bytes)?;
            if layout.sb.features().metadata_csum() {
                let seed = seed(&layout.sb, ORPHAN_FILE);
                orphan_file::set_checksum(&mut bytes, seed, FsBlock(block))?;
            }
            self.blocks.push((block, bytes));
        }
        self.inodes.push(new_file(&layout.sb, ORPHAN_FILE, 0o100_600, 1, count.into(), map));
        layout.sb.raw_mut().s_orphan_file_inum = ORPHAN_FILE.0.into();
        Ok(())
    }

    /// Takes `count` blocks for a file and maps them.
    fn allocate(
        &mut self,
        layout: &mut Layout,
        number: InodeNumber,
        count: u64,
        goal: u64,
    ) -> Result<(Vec<Run>, Map)> {
        let runs = take_exact(layout, count, goal)?;
        let map = if layout.sb.features().extents() {
            self.map_by_extents(layout, number, &runs)?
        } else {
            self.map_by_blocks(layout, &runs)?
        };
        Ok((runs, map))
    }

    /// An extent tree over the runs: as many levels as needed until the root holds the top.
    fn map_by_extents(
        &mut self,
        layout: &mut Layout,
        number: InodeNumber,
        runs: &[Run],
    ) -> Result<Map> {
        let block_size = layout.sb.block_size() as usize;
        let seed = seed(&layout.sb, number);
        let csum = layout.sb.features().metadata_csum();
        let mut blocks: u64 = runs.iter().map(|run| run.len).sum();
        let extents = extents_of(runs);
        let mut i_block = [0; I_BLOCK_SIZE];
        if extents.len() <= capacity(I_BLOCK_SIZE) {
            let mut root = ExtentNode::init(&mut i_block[..], 0);
            for (at, extent) in extents.iter().enumerate() {
                root.insert_extent(at, *extent).map_err(|_| no_room("extents"))?;
            }
            return Ok(Map { i_block, flags: InodeFlags::EXTENTS, blocks });
        }
        let goal = runs[0].start;
        let mut level: Vec<ExtentIndex> = Vec::new();
        for part in extents.chunks(capacity(block_size)) {
            let mut node = ExtentNode::init(vec![0; block_size], 0);
            for (at, extent) in part.iter().enumerate() {
                node.insert_extent(at, *extent).map_err(|_| no_room("extents"))?;
            }
            level.push(self.place_node(
                layout,
                node,
                part[0].logical,
                goal,
                csum.then_some(seed),
            )?);
        }
        let mut depth = 1;
        blocks += level.len() as u64;
        while level.len() > capacity(I_BLOCK_SIZE) {
            let mut above = Vec::new();
            for part in level.chunks(capacity(block_size)) {
                let mut node = ExtentNode::init(vec![0; block_size], depth);
                for (at, index) in part.iter().enumerate() {
                    node.insert_index(at, *index).map_err(|_| no_room("extents"))?;
                }
                above.push(self.place_node(
                    layout,
                    node,
                    part[0].logical,
                    goal,
                    csum.then_some(seed),
                )?);
            }
            depth += 1;
            blocks += above.len() as u64;
            level = above;
        }
        let mut root = ExtentNode::init(&mut i_block[..], depth);
        for (at, index) in level.iter().enumerate() {
            root.insert_index(at, *index).map_err(|_| no_room("extents"))?;
        }
        Ok(Map { i_block, flags: InodeFlags::EXTENTS, blocks })
    }

    fn place_node(
        &mut self,
        layout: &mut Layout,
        mut node: ExtentNode<Vec<u8>>,
        logical: LogicalBlock,
        goal: u64,
        seed: Option<u32>,
    ) -> Result<ExtentIndex> {
        let child = take_exact(layout, 1, goal)?[0].start;
        if let Some(seed) = seed {
            node.seal(seed);
        }
        self.blocks.push((child, node.bytes().to_vec()));
        Ok(ExtentIndex { logical, child: FsBlock(child) })
    }

    /// A block map over the runs: direct blocks, then trees of one, two and three levels.
    fn map_by_blocks(&mut self, layout: &mut Layout, runs: &[Run]) -> Result<Map> {
        let mut i_block = [0; I_BLOCK_SIZE];
        let mut data = blocks_of(runs).peekable();
        let goal = runs[0].start;
        let before = self.blocks.len() as u64;
        for at in 0..DIRECT_BLOCKS as usize {
            Pointers::new(&mut i_block[..])?.set(at, data.next().map(FsBlock));
        }
        for (level, root) in (1u32..).zip(INDIRECT..INDIRECT + 3) {
            if data.peek().is_some() {
                let block = self.place_pointers(layout, level, &mut data, goal)?;
                Pointers::new(&mut i_block[..])?.set(root, Some(FsBlock(block)));
            }
        }
        let pointer_blocks = self.blocks.len() as u64 - before;
        let blocks = runs.iter().map(|run| run.len).sum::<u64>() + pointer_blocks;
        Ok(Map { i_block, flags: InodeFlags::empty(), blocks })
    }

    /// A pointer block of the given level (1: of data) and all below it. The recursion is three
    /// deep at most.
    fn place_pointers(
        &mut self,
        layout: &mut Layout,
        level: u32,
        data: &mut std::iter::Peekable<impl Iterator<Item = u64>>,
        goal: u64,
    ) -> Result<u64> {
        let here = take_exact(layout, 1, goal)?[0].start;
        let mut bytes = vec![0; layout.sb.block_size() as usize];
        for at in 0..bytes.len() / 4 {
            if data.peek().is_none() {
                break;
            }
            let child = match level {
                1 => data.next(),
                _ => Some(self.place_pointers(layout, level - 1, data, goal)?),
            };
            Pointers::new(&mut bytes[..])?.set(at, child.map(FsBlock));
        }
        self.blocks.push((here, bytes));
        Ok(here)
    }
}

fn no_room(what: &str) -> MkfsError {
    MkfsError::TooSmall(format!("no room for {what}"))
}

fn take_exact(layout: &mut Layout, count: u64, goal: u64) -> Result<Vec<Run>> {
    let runs = layout.space.take_runs(count, goal).filter(|runs| !runs.is_empty());
    runs.ok_or_else(|| no_room("the first files"))
}

fn blocks_of(runs: &[Run]) -> impl Iterator<Item = u64> + '_ {
    runs.iter().flat_map(|run| run.start..run.start + run.len)
}

/// Runs as extents, none longer than the format allows.
fn extents_of(runs: &[Run]) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut logical = 0u32;
    for run in runs {
        let mut start = run.start;
        while start < run.start + run.len {
            let len = (run.start + run.len - start).min(u64::from(MAX_WRITTEN_LEN)) as u32;
            let extent = Extent {
                logical: LogicalBlock(logical),
                len,
                start: FsBlock(start),
                unwritten: false,
            };
            extents.push(extent);
            start += u64::from(len);
            logical += len;
        }
    }
    extents
}

fn new_file(
    sb: &Superblock,
    number: InodeNumber,
    mode: u16,
    links: u16,
    blocks: u64,
    map: Map,
) -> NewFile {
    NewFile {
        number,
        mode,
        links,
        owner: (0, 0),
        size: blocks * u64::from(sb.block_size()),
        sectors: map.blocks * u64::from(sb.block_size() / 512),
        flags: map.flags,
        i_block: map.i_block,
    }
}

fn dir_format(sb: &Superblock) -> DirFormat {
    DirFormat {
        filetype: sb.features().filetype(),
        csum: sb.features().metadata_csum(),
        inodes_count: sb.inodes_count(),
    }
}

fn seed(sb: &Superblock, number: InodeNumber) -> u32 {
    inode_csum_seed(sb.csum_seed(), number, 0)
}

/// Blocks of the log and of fast commits; `None` when the filesystem is too small for any.
fn journal_size(params: &Params, layout: &Layout) -> Result<Option<(u32, u32)>> {
    let usual: u32 = match layout.sb.blocks_count() {
        0..0x800 => 0,
        0x800..0x8000 => 1024,
        0x8000..0x4_0000 => 4096,
        0x4_0000..0x8_0000 => 8192,
        0x8_0000..0x40_0000 => 16384,
        0x40_0000..0x80_0000 => 32768,
        0x80_0000..0x100_0000 => 65536,
        0x100_0000..0x200_0000 => 131_072,
        _ => 262_144,
    };
    if usual == 0 {
        return Ok(None);
    }
    let fast_commit = layout.sb.features().compat.contains(Compat::FAST_COMMIT);
    let fast = if fast_commit { usual / FAST_COMMIT_RATIO } else { 0 };
    let Some(mib) = params.journal_mib else { return Ok(Some((usual, fast))) };
    let blocks = u64::from(mib) * (1 << 20) / u64::from(params.block_size);
    let total = blocks + u64::from(fast);
    if !(1024..=MAX_JOURNAL_BLOCKS).contains(&total) {
        return Err(usage(format!("a journal of {total} blocks: 1024 to {MAX_JOURNAL_BLOCKS}")));
    }
    if total > layout.space.count_free() / 2 {
        return Err(usage(format!("a journal of {mib} MiB takes over half of the free blocks")));
    }
    Ok(Some((blocks as u32, fast)))
}

/// Where to look for the journal's place: the middle of the device, so that no part of it is
/// far, in the emptiest group there.
fn middle(layout: &Layout) -> u64 {
    let sb = &layout.sb;
    let half = sb.first_data_block().0 + (sb.blocks_count() - sb.first_data_block().0) / 2;
    let group = sb.group_of_block(FsBlock(half)).unwrap_or_default().0;
    let free = |group: &u32| {
        let group = GroupNumber(*group);
        let range = sb.group_first_block(group).0..layout.group_end(group);
        u64::from(sb.blocks_in_group(group)) - layout.space.count_taken(range)
    };
    let per_flex = 1 << sb.log_groups_per_flex();
    let first = if per_flex > 1 && group > per_flex {
        group & !(per_flex - 1)
    } else {
        group.saturating_sub(1)
    };
    let last = (group + 1).min(sb.groups_count() - 1);
    // The first of the emptiest: rev() because max_by_key takes the last.
    let best = (first..=last).rev().max_by_key(free).unwrap_or(group);
    sb.group_first_block(GroupNumber(best)).0
}
