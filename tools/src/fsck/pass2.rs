//! Pass 2: every directory, its entries, and where they lead.
//!
//! Directories are taken one by one, so that names can be compared over all of
//! a directory's blocks and its index judged when its last block was read.

use std::collections::HashSet;

use uext_ondisk::dir_entry::{DirBlock, DirEntry, DirFormat};
use uext_ondisk::group_desc::GroupFlags;
use uext_ondisk::inode::InodeRef;

use super::context::{Context, DirBlockRef, InodeState};
use super::pass1::inline_value;
use super::pass2_htree::{BlockHashes, Index};
use super::problem::{At, Code};

const ROOT_INO: u32 = 2;
/// Bytes of `i_block` that hold entries of an inline directory, after the parent.
const INLINE_ENTRIES: std::ops::Range<usize> = 4..60;
/// Shortest encrypted name.
const MIN_ENCRYPTED_NAME: usize = 16;

/// The directory being checked.
struct Dir {
    ino: u32,
    /// Position in `Context::dirs`.
    at: usize,
    encrypted: bool,
    seed: u32,
    /// The filetype feature.
    filetype: bool,
    format: DirFormat,
    /// Names met, as hashes of 64 bits: a clash of two different names is less
    /// likely than a fault of the machine.
    names: HashSet<u64>,
    index: Option<Index>,
}

/// Checks all directories.
pub fn run(ctx: &mut Context<'_, '_>) {
    let blocks = std::mem::take(&mut ctx.dir_blocks);
    let total = ctx.dirs.len();
    let mut rest = &blocks[..];
    for at in 0..total {
        ctx.progress.step(2, at as u64, total as u64);
        let ino = ctx.dirs[at].ino;
        let start = rest.partition_point(|block| block.ino < ino);
        let end = rest.partition_point(|block| block.ino <= ino);
        let own = &rest[start..end];
        rest = &rest[end..];
        check_dir(ctx, at, own);
    }
    if ctx.large_files > 0 {
        use uext_ondisk::features::RoCompat;
        if !ctx.sb.features().ro_compat.contains(RoCompat::LARGE_FILE) {
            ctx.problem(Code::LargeFile, At::fs());
        }
    }
    if ctx.large_dirs > 0 && !ctx.sb.features().large_dir() {
        ctx.problem(Code::LargeDir, At::fs());
    }
}

fn check_dir(ctx: &mut Context<'_, '_>, at: usize, blocks: &[DirBlockRef]) {
    let info = ctx.dirs[at];
    let Some(bytes) = ctx.read_inode(info.ino) else { return };
    let Ok(inode) = InodeRef::new(&bytes[..]) else { return };
    let features = ctx.sb.features();
    let format = DirFormat {
        // The byte is judged here even where the feature is off.
        filetype: true,
        csum: features.metadata_csum(),
        // Where an entry leads is judged here, not by the walk over the block.
        inodes_count: u32::MAX,
    };
    let hashed = info.indexed && !info.holes && !info.inline;
    let mut dir = Dir {
        ino: info.ino,
        at,
        encrypted: ctx.inode(info.ino).is(InodeState::ENCRYPTED),
        seed: inode.csum_seed(ctx.sb.csum_seed(), info.ino.into()),
        filetype: features.filetype(),
        format,
        names: HashSet::new(),
        index: hashed.then(|| Index::new(&ctx.sb, blocks.len())),
    };
    if info.inline {
        return check_inline(ctx, &mut dir, inode);
    }
    if blocks.first().is_none_or(|block| block.logical != 0) {
        ctx.problem(Code::DirHole, At::ino(info.ino).num(0u32));
    }
    for block in blocks {
        check_block(ctx, &mut dir, *block);
    }
    if let Some(index) = dir.index.take() {
        index.judge(ctx, info.ino);
    }
}

/// A directory whose entries lie in its inode: the parent's number, entries in
/// the rest of `i_block`, more entries in an attribute.
fn check_inline(ctx: &mut Context<'_, '_>, dir: &mut Dir, inode: InodeRef<'_>) {
    let block = &inode.i_block()[..];
    let parent = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    ctx.dirs[dir.at].dotdot = parent;
    count_entry(ctx, dir.ino);
    count_entry(ctx, parent);
    let value = inline_value(inode.bytes()).unwrap_or(&[]);
    let format = DirFormat { csum: false, ..dir.format };
    for (number, area) in [&block[INLINE_ENTRIES], value].into_iter().enumerate() {
        let view = DirBlock::new(area, format);
        let at = At::ino(dir.ino).num(number as u64);
        check_entries(ctx, dir, view, &at, 2, None);
    }
}

fn check_block(ctx: &mut Context<'_, '_>, dir: &mut Dir, block: DirBlockRef) {
    let at = At::ino(dir.ino).blk(block.block).num(block.logical);
    let Some(bytes) = ctx.read_block(block.block) else {
        return ctx.problem(Code::ReadBlock, at);
    };
    // An index block is not a leaf: it has no tail of a leaf's form.
    let mut leaf = true;
    if let Some(mut index) = dir.index.take() {
        match index.add_block(ctx, dir.ino, block.logical, &bytes, dir.seed) {
            Ok(is_leaf) => {
                leaf = is_leaf;
                dir.index = Some(index);
            }
            // What is wrong was reported; the directory is judged as a linear one.
            Err(()) => leaf = block.logical != 0,
        }
    } else if ctx.dirs[dir.at].indexed && block.logical == 0 {
        leaf = false;
    }
    let format = DirFormat { csum: dir.format.csum && leaf, ..dir.format };
    let view = DirBlock::new(&bytes, format);
    if format.csum {
        use uext_ondisk::error::CorruptKind;
        match view.verify_checksum(dir.seed) {
            Ok(()) => {}
            Err(error) if error.kind == CorruptKind::Checksum => {
                ctx.problem(Code::DirCsum, at.clone().text(error.detail));
            }
            Err(_) => ctx.problem(Code::DirNoTail, at.clone()),
        }
    }
    let mut hashes = BlockHashes::default();
    let first = if block.logical == 0 { 0 } else { 2 };
    check_entries(ctx, dir, view, &at, first, leaf.then_some(&mut hashes));
    if let (true, Some(index)) = (leaf, &mut dir.index) {
        index.set_hashes(block.logical, hashes);
    }
}

/// Checks the entries of a block; `number` counts from `.` of the directory.
fn check_entries(
    ctx: &mut Context<'_, '_>,
    dir: &mut Dir,
    view: DirBlock<'_>,
    at: &At,
    first: usize,
    mut hashes: Option<&mut BlockHashes>,
) {
    for (number, entry) in (first..).zip(view.entries()) {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                ctx.problem(Code::DirCorrupt, at.clone().text(error.detail));
                return;
            }
        };
        match number {
            0 => check_dot(ctx, dir, &entry, view),
            1 => check_dotdot(ctx, dir, &entry, view),
            _ if entry.in_use() && entry.inode.0 == dir.ino => {
                ctx.problem(Code::LinkSelf, At::ino(dir.ino).name(entry.name));
            }
            _ => {}
        }
        if entry.in_use() {
            check_entry(ctx, dir, &entry, number);
            if let (Some(hashes), Some(index)) = (hashes.as_deref_mut(), &dir.index) {
                index.hash(entry.name, hashes);
            }
        }
    }
}

/// The byte after an entry's name, 0 when the entry ends there.
fn byte_after(view: DirBlock<'_>, entry: &DirEntry<'_>) -> u8 {
    let at = entry.offset + 8 + entry.name.len();
    let end = entry.offset + entry.rec_len;
    if at < end { view.bytes().get(at).copied().unwrap_or(0) } else { 0 }
}

fn check_dot(ctx: &mut Context<'_, '_>, dir: &Dir, entry: &DirEntry<'_>, view: DirBlock<'_>) {
    let at = || At::ino(dir.ino);
    if !entry.in_use() || entry.name != b"." {
        ctx.problem(Code::MissingDot, at());
    } else if byte_after(view, entry) != 0 {
        ctx.problem(Code::DotTerminator, at().name(b"."));
    }
    if entry.inode.0 != dir.ino {
        ctx.problem(Code::BadDotInode, at().num(entry.inode.0));
    }
    if entry.rec_len > 24 {
        ctx.problem(Code::BigDot, at());
    }
}

fn check_dotdot(ctx: &mut Context<'_, '_>, dir: &Dir, entry: &DirEntry<'_>, view: DirBlock<'_>) {
    let at = || At::ino(dir.ino);
    if !entry.in_use() || entry.name != b".." {
        ctx.problem(Code::MissingDotDot, at());
        return;
    }
    if byte_after(view, entry) != 0 {
        ctx.problem(Code::DotTerminator, at().name(b".."));
    }
    ctx.dirs[dir.at].dotdot = entry.inode.0;
}

/// An entry in use: its inode, its type, its name.
fn check_entry(ctx: &mut Context<'_, '_>, dir: &mut Dir, entry: &DirEntry<'_>, number: usize) {
    let ino = entry.inode.0;
    let at = || At::ino(dir.ino).name(entry.name).num(ino);
    if let Some(code) = bad_target(ctx, entry, number) {
        ctx.problem(code, at());
        if code == Code::EntryInode {
            return;
        }
    }
    let group = (ino - 1) / ctx.sb.inodes_per_group();
    let desc = ctx.desc(group);
    let index = (ino - 1) % ctx.sb.inodes_per_group();
    let first_unused = ctx.sb.inodes_per_group().saturating_sub(desc.itable_unused());
    if desc.flags().contains(GroupFlags::INODE_UNINIT) {
        ctx.problem(Code::EntryUninit, at().in_group(group));
    } else if index >= first_unused {
        ctx.problem(Code::EntryUnusedArea, at().in_group(group));
    }
    if !ctx.inode(ino).is(InodeState::USED) {
        ctx.problem(Code::EntryUnused, at());
    }
    check_file_type(ctx, dir, entry);
    check_name(ctx, dir, entry, number);
    if number >= 2 && ctx.inode(ino).is(InodeState::DIR) {
        set_parent(ctx, dir, entry);
    }
    count_entry(ctx, ino);
}

/// What is wrong with where an entry leads.
fn bad_target(ctx: &Context<'_, '_>, entry: &DirEntry<'_>, number: usize) -> Option<Code> {
    let ino = entry.inode.0;
    let raw = ctx.sb.raw();
    let hidden =
        [raw.s_usr_quota_inum, raw.s_grp_quota_inum, raw.s_prj_quota_inum, raw.s_orphan_file_inum];
    let reserved = ino != ROOT_INO && ino < ctx.sb.first_ino().0;
    if reserved || ino > ctx.sb.inodes_count() || hidden.iter().any(|inum| inum.get() == ino) {
        return Some(Code::EntryInode);
    }
    if number >= 2 {
        if entry.name == b"." || entry.name == b".." {
            return Some(Code::DuplicateDot);
        }
        if ino == ROOT_INO {
            return Some(Code::LinkRoot);
        }
        if entry.name.is_empty() {
            return Some(Code::NullName);
        }
    }
    ctx.inode(ino).is(InodeState::EA_REFERENCED).then_some(Code::EntryEaInode)
}

fn check_file_type(ctx: &mut Context<'_, '_>, dir: &Dir, entry: &DirEntry<'_>) {
    let at = || At::ino(dir.ino).name(entry.name);
    if !dir.filetype {
        if entry.file_type != 0 {
            ctx.problem(Code::FiletypeWithoutFeature, at());
        }
        return;
    }
    let state = ctx.inode(entry.inode.0);
    if state.is(InodeState::BAD) || !state.is(InodeState::USED) {
        // Its type means nothing; that it is bad or unused was said.
        return;
    }
    let should = state.kind;
    if entry.file_type != should {
        let code = if entry.file_type == 0 { Code::FiletypeUnset } else { Code::Filetype };
        ctx.problem(code, at().num(entry.file_type).num2(should));
    }
}

fn check_name(ctx: &mut Context<'_, '_>, dir: &mut Dir, entry: &DirEntry<'_>, number: usize) {
    let at = || At::ino(dir.ino).name(entry.name);
    if dir.encrypted {
        if number >= 2 && entry.name.len() < MIN_ENCRYPTED_NAME {
            ctx.problem(Code::ShortEncryptedName, at());
        }
    } else if entry.name.iter().any(|&byte| byte == b'/' || byte == 0) {
        ctx.problem(Code::BadName, at());
    }
    if !dir.names.insert(name_hash(entry.name)) && entry.name != b"." && entry.name != b".." {
        ctx.problem(Code::DuplicateName, at());
    }
}

fn name_hash(name: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

fn set_parent(ctx: &mut Context<'_, '_>, dir: &Dir, entry: &DirEntry<'_>) {
    let Some(child) = ctx.dir_index(entry.inode.0) else { return };
    let parent = ctx.dirs[child].parent;
    if parent != 0 {
        let at = At::ino(dir.ino).name(entry.name).num(entry.inode.0).num2(parent);
        ctx.problem(Code::DirLinkedTwice, at);
    } else {
        ctx.dirs[child].parent = dir.ino;
    }
}

fn count_entry(ctx: &mut Context<'_, '_>, ino: u32) {
    if let Some(state) = ctx.inodes.get_mut(ino as usize) {
        state.counted = state.counted.saturating_add(1);
    }
}
