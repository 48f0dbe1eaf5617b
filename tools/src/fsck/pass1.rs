//! Pass 1: every inode, its fields, its blocks and its attributes.
//!
//! The order of the checks on an inode follows e2fsck, because a verdict on a
//! damaged inode depends on which check looks first.

use uext_ondisk::dir_entry::{self, DirBlock, DirFormat};
use uext_ondisk::extent::{ExtentNode, capacity};
use uext_ondisk::features::{Compat, Features, Incompat, RoCompat};
use uext_ondisk::group_desc::GroupFlags;
use uext_ondisk::htree::DxBlock;
use uext_ondisk::indirect::Pointers;
use uext_ondisk::inode::{FileType, InodeFlags, InodeRef};
use uext_ondisk::xattr::{NameIndex, XattrArea, XattrValue};

use super::context::{BitSet, Context, DirInfo, InodeState};
use super::pass1_blocks::{Claims, check_sizes, claim_blocks, is_hurd};
use super::pass1_xattr::{self, XattrBlocks};
use super::problem::{At, Code};
use super::walk::{Event, Flow, Volume, walk};

const BAD_INO: u32 = 1;
const ROOT_INO: u32 = 2;
const USER_QUOTA_INO: u32 = 3;
const GROUP_QUOTA_INO: u32 = 4;
const BOOT_LOADER_INO: u32 = 5;
const RESIZE_INO: u32 = 7;
const JOURNAL_INO: u32 = 8;
/// Bytes of inode table read at once.
const CHUNK: u64 = 1 << 20;

/// What pass 1 keeps between inodes.
struct Pass1 {
    claims: Claims,
    xattrs: XattrBlocks,
    features: Features,
    /// Deletion times below the inode count mean a link of the orphan list.
    low_dtime: bool,
}

/// Marks static metadata, then checks every inode.
pub fn run(ctx: &mut Context<'_, '_>) {
    mark_metadata(ctx);
    let sb = &ctx.sb;
    let inodes = u64::from(sb.inodes_count());
    let old = |time: u64| time != 0 && time < inodes;
    let mut pass = Pass1 {
        claims: Claims::new(sb.blocks_count()),
        xattrs: XattrBlocks::default(),
        features: sb.features(),
        low_dtime: !(old(sb.write_time()) || old(sb.mount_time()) || old(sb.mkfs_time())),
    };
    if pass.features.incompat.contains(Incompat::MMP) && sb.is_fs_block(sb.mmp_block()) {
        ctx.used.insert(ctx.cluster(ctx.sb.mmp_block().0));
    }
    for group in 0..ctx.sb.groups_count() {
        ctx.progress.step(1, group.into(), ctx.sb.groups_count().into());
        scan_group(ctx, &mut pass, group);
    }
    pass.xattrs.check_refcounts(ctx);
}

/// Marks superblocks, descriptors, bitmaps and inode tables.
fn mark_metadata(ctx: &mut Context<'_, '_>) {
    let mut taken = BitSet::new(ctx.sb.blocks_count());
    let groups = ctx.sb.groups_count();
    for group in 0..groups {
        for block in ctx.group_base(group) {
            taken.insert(block);
        }
    }
    for group in 0..groups {
        let desc = ctx.desc(group);
        let (block_map, inode_map, table) =
            (desc.block_bitmap().0, desc.inode_bitmap().0, desc.inode_table().0);
        if !ctx.bad_tables[group as usize] {
            let mut conflict = None;
            for block in table..table + u64::from(ctx.sb.inode_table_blocks()) {
                if taken.insert(block) {
                    conflict = conflict.or(Some(block));
                }
            }
            if let Some(block) = conflict {
                ctx.problem(Code::InodeTableConflict, At::group(group).blk(block));
                // Two groups' inodes cannot be told apart there; leaving them out
                // also keeps the work within the size of the device.
                ctx.bad_tables[group as usize] = true;
            }
        }
        let maps = [(block_map, Code::BlockBitmapConflict), (inode_map, Code::InodeBitmapConflict)];
        for (block, code) in maps {
            if ctx.is_fs_block(block) && taken.insert(block) {
                ctx.problem(code, At::group(group).blk(block));
            }
        }
    }
    if ctx.sb.cluster_ratio_bits() == 0 {
        ctx.used = taken.clone();
    } else {
        for block in (0..ctx.sb.blocks_count()).filter(|&block| taken.contains(block)) {
            ctx.used.insert(ctx.cluster(block));
        }
    }
    ctx.metadata = taken;
}

/// Checks the inodes of a group that were ever used.
fn scan_group(ctx: &mut Context<'_, '_>, pass: &mut Pass1, group: u32) {
    if ctx.bad_tables[group as usize] || ctx.group_flags(group).contains(GroupFlags::INODE_UNINIT) {
        return;
    }
    let desc = ctx.desc(group);
    let per_group = ctx.sb.inodes_per_group();
    let unused = if pass.features.group_desc_csum() { desc.itable_unused() } else { 0 };
    let count = per_group.saturating_sub(unused);
    let size = u64::from(ctx.sb.inode_size());
    let per_chunk = u32::try_from(CHUNK / size).unwrap_or(1).max(1);
    let start = desc.inode_table().0 * u64::from(ctx.sb.block_size());
    let mut index = 0;
    while index < count {
        let many = per_chunk.min(count - index);
        let offset = start + u64::from(index) * size;
        let len = usize::try_from(u64::from(many) * size).unwrap_or(0);
        let Ok(bytes) = ctx.dev.read_at(offset, len) else {
            let block = offset / u64::from(ctx.sb.block_size());
            ctx.problem(Code::ReadInodes, At::group(group).blk(block));
            return;
        };
        for (at, bytes) in (0..).zip(bytes.chunks_exact(usize::from(ctx.sb.inode_size()))) {
            let ino = group * per_group + index + at + 1;
            check_inode(ctx, pass, ino, bytes);
        }
        index += many;
    }
}

/// Checks one inode; its checksum too, whatever else is found.
fn check_inode(ctx: &mut Context<'_, '_>, pass: &mut Pass1, ino: u32, bytes: &[u8]) {
    // An inode that was never written has no checksum either.
    if ino != BAD_INO && bytes[..128].iter().all(|&byte| byte == 0) && !is_special(ctx, ino) {
        return;
    }
    let Ok(inode) = InodeRef::new(bytes) else { return };
    let bad_csum = csum_problem(ctx, ino, inode);
    if let Some(at) = &bad_csum {
        ctx.problem(Code::InodeCsum, at.clone());
    }
    check_fields(ctx, pass, ino, inode, bad_csum.is_some());
}

fn is_special(ctx: &Context<'_, '_>, ino: u32) -> bool {
    ino < ctx.sb.first_ino().0
}

fn csum_problem(ctx: &Context<'_, '_>, ino: u32, inode: InodeRef<'_>) -> Option<At> {
    if !ctx.sb.features().metadata_csum() || is_hurd(ctx) {
        return None;
    }
    let (stored, computed) =
        (inode.checksum(), inode.computed_checksum(ctx.sb.csum_seed(), ino.into()));
    let blank = inode.bytes()[..128].iter().all(|&byte| byte == 0);
    (stored != computed && !blank).then(|| At::ino(ino).num(stored).num2(computed))
}

fn check_fields(
    ctx: &mut Context<'_, '_>,
    pass: &mut Pass1,
    ino: u32,
    inode: InodeRef<'_>,
    bad_csum: bool,
) {
    let at = || At::ino(ino);
    // An orphan's is the next one on the list.
    let orphan = ctx.orphans.contains(&ino);
    let dtime = if orphan { 0 } else { inode.dtime() };
    if dtime != 0 && pass.low_dtime && dtime < ctx.sb.inodes_count() {
        ctx.problem(Code::LowDtime, at().num(dtime));
    }
    let links = inode.links_count();
    if links != 0 {
        ctx.inodes[ino as usize].links = links;
    } else if !orphan && !is_special(ctx, ino) && !is_reserved_quota(ctx, ino) {
        if dtime == 0 && inode.mode() != 0 {
            ctx.problem(Code::ZeroDtime, at());
        }
        return;
    }
    check_flags(ctx, pass, ino, inode);
    match special_kind(ctx, pass, ino) {
        Special::BadBlocks => return check_bad_blocks(ctx, pass, ino, inode, bad_csum),
        Special::Root => {
            if !inode.is_dir() {
                ctx.problem(Code::RootNotDir, at());
            }
            if dtime != 0 && links != 0 {
                ctx.problem(Code::RootDtime, at());
            }
        }
        Special::File(code) => {
            ctx.set_flag(ino, InodeState::USED);
            if !inode.is_regular() {
                ctx.problem(code, at());
            }
            return check_blocks(ctx, pass, ino, inode, 0);
        }
        Special::Empty(what) => {
            ctx.set_flag(ino, InodeState::USED);
            let raw = inode.raw();
            if links != 0 || raw.i_blocks_lo.get() != 0 || raw.i_block[..4] != [0; 4] {
                ctx.problem(Code::ReservedNotClear, at().text(what));
            }
        }
        Special::Reserved => {
            ctx.set_flag(ino, InodeState::USED);
            check_reserved_mode(ctx, ino, inode);
            return check_blocks(ctx, pass, ino, inode, 0);
        }
        Special::None => {}
    }
    if links == 0 && !orphan {
        return;
    }
    if dtime != 0 {
        ctx.problem(Code::InUseDtime, at());
    }
    ctx.set_flag(ino, InodeState::USED);
    ctx.inodes[ino as usize].kind = dir_entry::FileType::from_mode(inode.mode()).raw();
    check_used(ctx, pass, ino, inode);
    if ctx.is_gone(ino) {
        // A directory that is on its way out is no part of the tree.
        while ctx.dir_blocks.pop_if(|block| block.ino == ino).is_some() {}
    }
}

/// What an inode number stands for.
enum Special {
    BadBlocks,
    Root,
    /// A file of the filesystem's own; the problem of another mode.
    File(Code),
    /// Reserved for a feature that is off.
    Empty(&'static str),
    Reserved,
    None,
}

fn special_kind(ctx: &Context<'_, '_>, pass: &Pass1, ino: u32) -> Special {
    let raw = ctx.sb.raw();
    let quotas = [raw.s_usr_quota_inum, raw.s_grp_quota_inum, raw.s_prj_quota_inum];
    match ino {
        BAD_INO => Special::BadBlocks,
        ROOT_INO => Special::Root,
        JOURNAL_INO if raw.s_journal_inum.get() == JOURNAL_INO => Special::File(Code::JournalMode),
        JOURNAL_INO => Special::Empty("the journal is not here"),
        _ if is_reserved_quota(ctx, ino) => {
            let on = pass.features.ro_compat.contains(RoCompat::QUOTA);
            if on && quotas.iter().any(|inum| inum.get() == ino) {
                Special::File(Code::QuotaMode)
            } else {
                Special::Empty("no quota is kept here")
            }
        }
        _ if ino == raw.s_orphan_file_inum.get() => {
            if pass.features.compat.contains(Compat::ORPHAN_FILE) {
                Special::File(Code::OrphanFileMode)
            } else {
                Special::Empty("orphan_file is off")
            }
        }
        _ if is_special(ctx, ino) => Special::Reserved,
        _ => Special::None,
    }
}

fn is_reserved_quota(ctx: &Context<'_, '_>, ino: u32) -> bool {
    let project = ctx.sb.raw().s_prj_quota_inum.get();
    ino == USER_QUOTA_INO || ino == GROUP_QUOTA_INO || (project != 0 && ino == project)
}

fn check_reserved_mode(ctx: &mut Context<'_, '_>, ino: u32, inode: InodeRef<'_>) {
    let mode = inode.mode();
    let bad = match ino {
        BOOT_LOADER_INO => inode.is_dir(),
        RESIZE_INO => mode != 0 && !inode.is_regular(),
        _ => mode != 0,
    };
    if bad {
        ctx.problem(Code::ReservedMode, At::ino(ino).num(mode));
    }
}

/// Flags against features and each other.
fn check_flags(ctx: &mut Context<'_, '_>, pass: &Pass1, ino: u32, inode: InodeRef<'_>) {
    let flags = inode.flags();
    let at = || At::ino(ino);
    let incompat = pass.features.incompat;
    if flags.contains(InodeFlags::CASEFOLD) {
        if !inode.is_dir() {
            ctx.problem(Code::CasefoldNotDir, at());
        }
        if !incompat.contains(Incompat::CASEFOLD) {
            ctx.problem(Code::CasefoldFeature, at());
        }
    }
    if flags.contains(InodeFlags::EA_INODE) {
        if inode.is_regular() {
            ctx.set_flag(ino, InodeState::EA);
        } else {
            ctx.problem(Code::EaInodeNotRegular, at());
        }
    }
    let inline = flags.contains(InodeFlags::INLINE_DATA);
    if inline && flags.contains(InodeFlags::EXTENTS) {
        ctx.problem(Code::InlineAndExtents, at());
    }
    if inline && !is_special(ctx, ino) {
        if !incompat.contains(Incompat::INLINE_DATA) {
            ctx.problem(Code::InlineFeature, at());
        } else if inline_value(inode.bytes()).is_none() {
            ctx.problem(Code::InlineNoAttribute, at());
        }
    }
    let extents = flags.contains(InodeFlags::EXTENTS);
    let in_use = inode.links_count() != 0 || [BAD_INO, ROOT_INO, JOURNAL_INO].contains(&ino);
    if extents && !pass.features.extents() && in_use {
        ctx.problem(Code::ExtentFeature, at());
    }
    let maps = inode.is_regular() || inode.is_dir();
    if !extents && pass.features.extents() && in_use && maps && holds_extents(inode) {
        ctx.problem(Code::ExtentFlagMissing, at());
    }
}

fn holds_extents(inode: InodeRef<'_>) -> bool {
    let block = &inode.i_block()[..];
    ExtentNode::new(block).is_ok_and(|node| node.max() + 2 >= capacity(block.len()))
}

/// The part of an inode's inline data that lies in the `system.data` attribute.
pub fn inline_value(inode_bytes: &[u8]) -> Option<&[u8]> {
    let extra = usize::from(InodeRef::new(inode_bytes).ok()?.extra_isize());
    let area = XattrArea::ibody(inode_bytes.get(128 + extra..)?).ok()??;
    match area.get(NameIndex::SYSTEM, b"data")?.value {
        XattrValue::Inline(value) => Some(value),
        XattrValue::Inode { .. } => None,
    }
}

/// The bad block list: every block it names is out of use.
fn check_bad_blocks(
    ctx: &mut Context<'_, '_>,
    pass: &mut Pass1,
    ino: u32,
    inode: InodeRef<'_>,
    bad_csum: bool,
) {
    let raw = inode.raw();
    let invalid = bad_csum
        || inode.mode() != 0
        || raw.i_uid.get() != 0
        || raw.i_gid.get() != 0
        || inode.links_count() != 0
        || inode.flags().contains(InodeFlags::INLINE_DATA)
        || raw.i_file_acl_lo.get() != 0;
    if invalid {
        ctx.problem(Code::BadBlocksInode, At::ino(ino));
    }
    ctx.set_flag(ino, InodeState::USED);
    let volume = Volume::new(ctx.dev, &ctx.sb);
    let mut followed = std::collections::HashSet::new();
    let vital = vital_blocks(ctx);
    let mut budget = ctx.sb.blocks_count();
    walk(volume, ino, inode, pass.features.extents(), &mut |event| match event {
        Event::Bad(Code::IllegalBlock, at) => {
            ctx.problem(Code::BadBlockIllegal, at);
            Flow::Skip
        }
        Event::Bad(code, at) => {
            ctx.problem(code, at);
            Flow::Skip
        }
        Event::Map { block, .. } => {
            let taken = ctx.used.insert(ctx.cluster(block));
            if taken {
                let at = At::ino(ino).blk(block).text("something else, and maps bad blocks");
                ctx.problem(Code::BadBlockMetadata, at);
            }
            if followed.insert(block) && !taken { Flow::Follow } else { Flow::Skip }
        }
        Event::Run { block, len, .. } => {
            for block in block..block + len {
                let at = At::ino(ino).blk(block);
                if !ctx.used.insert(ctx.cluster(block)) {
                    continue;
                }
                // As many blocks twice as there are: the list means nothing.
                let Some(left) = budget.checked_sub(1) else { break };
                budget = left;
                if vital.contains(block) {
                    ctx.problem(Code::BadBlockMetadata, at.text("metadata"));
                } else {
                    ctx.problem(Code::BadBlockSpare, at);
                }
            }
            Flow::Skip
        }
    });
}

/// Metadata without which a filesystem does not work: the primary superblock and
/// descriptors, bitmaps and inode tables.
fn vital_blocks(ctx: &Context<'_, '_>) -> BitSet {
    let mut vital = BitSet::new(ctx.sb.blocks_count());
    let first = ctx.sb.first_data_block().0;
    for block in first..=first + u64::from(ctx.sb.gdt_blocks()) {
        vital.insert(block);
    }
    for group in 0..ctx.sb.groups_count() {
        let desc = ctx.desc(group);
        let table = desc.inode_table().0;
        let table_end = table.saturating_add(ctx.sb.inode_table_blocks().into());
        let maps = [desc.block_bitmap().0, desc.inode_bitmap().0];
        for block in maps.into_iter().chain(table..table_end) {
            vital.insert(block);
        }
    }
    vital
}

/// Whether an inode says how it is encrypted.
fn has_encryption_context(ctx: &Context<'_, '_>, inode: InodeRef<'_>) -> bool {
    const ENCRYPTION: NameIndex = NameIndex(9);
    let extra = usize::from(inode.extra_isize());
    let body = inode.bytes().get(128 + extra..).and_then(|bytes| XattrArea::ibody(bytes).ok()?);
    if body.is_some_and(|area| area.get(ENCRYPTION, b"c").is_some()) {
        return true;
    }
    let block = inode.file_acl(ctx.sb.features()).0;
    let bytes = if block == 0 { None } else { ctx.read_block(block) };
    let area = bytes.as_deref().and_then(|bytes| XattrArea::block(bytes).ok());
    area.is_some_and(|area| area.get(ENCRYPTION, b"c").is_some())
}

/// An inode in use that is not the filesystem's own.
fn check_used(ctx: &mut Context<'_, '_>, pass: &mut Pass1, ino: u32, inode: InodeRef<'_>) {
    check_impossible_fields(ctx, pass, ino, inode);
    if inode.flags().contains(InodeFlags::IMAGIC) {
        if pass.features.compat.contains(Compat::IMAGIC_INODES) {
            ctx.set_flag(ino, InodeState::IMAGIC);
        } else {
            ctx.problem(Code::Imagic, At::ino(ino));
        }
    }
    let value_clusters = pass1_xattr::check_body(ctx, ino, inode);
    if ctx.is_gone(ino) {
        // Its blocks go before it does: what they held makes no sense any more.
        if inode.is_dir() {
            ctx.set_flag(ino, InodeState::DIR);
        }
        return check_blocks(ctx, pass, ino, inode, value_clusters);
    }
    check_really_directory(ctx, ino, inode);
    let extents = pass.features.extents() && inode.flags().contains(InodeFlags::EXTENTS);
    if extents && inode.is_symlink() && !has_blocks(inode, pass.features) {
        ctx.problem(Code::FastSymlinkExtents, At::ino(ino));
    }
    if inode.flags().contains(InodeFlags::ENCRYPT) && !has_encryption_context(ctx, inode) {
        ctx.problem(Code::NoEncryptionContext, At::ino(ino));
    }
    match inode.file_type() {
        Some(FileType::Directory) => {
            ctx.set_flag(ino, InodeState::DIR);
            if inode.flags().contains(InodeFlags::ENCRYPT) {
                ctx.set_flag(ino, InodeState::ENCRYPTED);
            }
        }
        Some(FileType::Regular) => ctx.set_flag(ino, InodeState::REG),
        Some(FileType::Symlink) if symlink_is_sound(ctx, pass, inode) => {
            check_immutable(ctx, ino, inode);
            if inode.flags().contains(InodeFlags::INLINE_DATA) {
                return;
            }
        }
        Some(FileType::Symlink) => bad_field(ctx, ino, "the symlink is invalid".into()),
        None => bad_field(ctx, ino, format!("impossible mode {:#o}", inode.mode())),
        Some(_) => check_special_file(ctx, ino, inode),
    }
    check_blocks(ctx, pass, ino, inode, value_clusters);
}

fn bad_field(ctx: &mut Context<'_, '_>, ino: u32, text: String) {
    ctx.problem(Code::BadField, At::ino(ino).text(text));
    ctx.set_flag(ino, InodeState::BAD);
}

fn check_impossible_fields(ctx: &mut Context<'_, '_>, pass: &Pass1, ino: u32, inode: InodeRef<'_>) {
    let raw = inode.raw();
    let hurd = is_hurd(ctx);
    if raw.i_obso_faddr.get() != 0 {
        bad_field(ctx, ino, format!("i_faddr is {}", raw.i_obso_faddr));
    }
    let high = raw.i_size_high.get();
    if inode.is_dir() && high != 0 && !pass.features.large_dir() {
        bad_field(ctx, ino, format!("i_size_high is {high}"));
    }
    let acl_high = raw.l_i_file_acl_high.get();
    if !hurd && acl_high != 0 && !pass.features.bit64() {
        bad_field(ctx, ino, format!("i_file_acl_high is {acl_high}"));
    }
    let blocks_high = raw.l_i_blocks_high.get();
    if !hurd && blocks_high != 0 && !pass.features.huge_file() {
        bad_field(ctx, ino, format!("i_blocks_high is {blocks_high}"));
    }
}

/// Whether `i_block` maps blocks, by the inode's own word.
fn has_blocks(inode: InodeRef<'_>, features: Features) -> bool {
    let raw = inode.raw();
    let second = &raw.i_block[4..8];
    match inode.file_type() {
        Some(FileType::Symlink) => {
            let size = raw.i_size_lo.get();
            let maps = if inode.file_acl(features).0 == 0 {
                raw.i_blocks_lo.get() != 0
            } else {
                // The attribute block counts in i_blocks, so the content must tell.
                size >= 60 || (size > 4 && second == [0; 4])
            };
            maps && !inode.flags().contains(InodeFlags::INLINE_DATA)
        }
        Some(FileType::Directory | FileType::Regular) => {
            !inode.flags().contains(InodeFlags::INLINE_DATA)
        }
        _ => false,
    }
}

/// Whether a symlink's target is as long as its size says.
fn symlink_is_sound(ctx: &Context<'_, '_>, pass: &Pass1, inode: InodeRef<'_>) -> bool {
    let flags = inode.flags();
    let size = inode.raw_size();
    if size == 0 || size >> 32 != 0 || flags.contains(InodeFlags::INDEX) {
        return false;
    }
    if flags.contains(InodeFlags::INLINE_DATA) {
        let len = 60 + inline_value(inode.bytes()).map_or(0, <[u8]>::len) as u64;
        let extents = flags.contains(InodeFlags::EXTENTS);
        return !extents && (size == len || (size <= 60 && len == 60));
    }
    let block;
    let target = if size < 60 {
        if flags.contains(InodeFlags::EXTENTS) {
            return false;
        }
        &inode.i_block()[..]
    } else {
        let Some(bytes) = symlink_block(ctx, pass, inode).and_then(|at| ctx.read_block(at)) else {
            return false;
        };
        block = bytes;
        &block[..]
    };
    let len = if flags.contains(InodeFlags::ENCRYPT) {
        usize::from(u16::from_le_bytes([target[0], target[1]])) + 2
    } else {
        target.iter().position(|&byte| byte == 0).unwrap_or(target.len())
    };
    len < target.len() && len as u64 == size
}

/// The one block of a symlink that is too long for its inode.
fn symlink_block(ctx: &Context<'_, '_>, pass: &Pass1, inode: InodeRef<'_>) -> Option<u64> {
    if pass.features.extents() && inode.flags().contains(InodeFlags::EXTENTS) {
        let node = ExtentNode::new(&inode.i_block()[..]).ok()?;
        let extent = node.extent(0)?;
        let one = node.len() == 1 && extent.logical.0 == 0 && extent.len == 1;
        return (one && ctx.is_fs_block(extent.start.0)).then_some(extent.start.0);
    }
    let pointers = Pointers::new(inode.i_block()).ok()?;
    let only = pointers.iter().all(|(at, _)| at == 0);
    let block = pointers.get(0)?.0;
    (only && ctx.is_fs_block(block)).then_some(block)
}

fn check_immutable(ctx: &mut Context<'_, '_>, ino: u32, inode: InodeRef<'_>) {
    if inode.flags().intersects(InodeFlags::IMMUTABLE | InodeFlags::APPEND) {
        ctx.problem(Code::Immutable, At::ino(ino));
    }
}

/// Devices, pipes and sockets: no size, no blocks, few flags.
fn check_special_file(ctx: &mut Context<'_, '_>, ino: u32, inode: InodeRef<'_>) {
    let flags = inode.flags();
    let locked = flags.intersects(InodeFlags::IMMUTABLE | InodeFlags::APPEND);
    let junk = inode.i_block()[16..].iter().any(|&byte| byte != 0);
    if flags.intersects(InodeFlags::INDEX | InodeFlags::EXTENTS) || (locked && junk) {
        return bad_field(ctx, ino, "the special file has blocks or an index".into());
    }
    if flags.contains(InodeFlags::INLINE_DATA) {
        ctx.problem(Code::SpecialFlags, At::ino(ino).num(flags.bits()));
    }
    check_immutable(ctx, ino, inode);
    if inode.raw_size() != 0 {
        ctx.problem(Code::SpecialSize, At::ino(ino).num(inode.raw_size()));
    }
}

/// An inode of another type whose first block begins like a directory.
fn check_really_directory(ctx: &mut Context<'_, '_>, ino: u32, inode: InodeRef<'_>) {
    let kind = inode.file_type();
    let mapped = matches!(kind, Some(FileType::Directory | FileType::Regular | FileType::Symlink));
    if mapped || inode.i_block()[..4] == [0; 4] {
        return;
    }
    let flags = inode.flags();
    let block = if flags.contains(InodeFlags::INLINE_DATA) {
        None
    } else if ctx.sb.features().extents() && flags.contains(InodeFlags::EXTENTS) {
        ExtentNode::new(&inode.i_block()[..])
            .ok()
            .and_then(|node| node.extent(0))
            .filter(|extent| extent.logical.0 == 0)
            .map(|extent| extent.start.0)
    } else {
        let Ok(pointers) = Pointers::new(inode.i_block()) else { return };
        let free = |block: u64| ctx.is_fs_block(block) && !ctx.used.contains(ctx.cluster(block));
        let possible = pointers.iter().all(|(_, block)| free(block.0));
        let device = matches!(kind, Some(FileType::CharDevice | FileType::BlockDevice))
            && inode.links_count() == 1
            && pointers.iter().all(|(at, _)| at < 4);
        if possible && !device { pointers.get(0).map(|block| block.0) } else { None }
    };
    let Some(bytes) = block.filter(|&at| ctx.is_fs_block(at)).and_then(|at| ctx.read_block(at))
    else {
        return;
    };
    let format = DirFormat { filetype: false, csum: false, inodes_count: u32::MAX };
    let mut entries = DirBlock::new(&bytes, format).entries();
    let dot = entries
        .next()
        .is_some_and(|entry| entry.is_ok_and(|entry| entry.name == b"." && entry.inode.0 == ino));
    let dotdot = entries.next().is_some_and(|entry| entry.is_ok_and(|entry| entry.name == b".."));
    if dot && dotdot {
        ctx.problem(Code::ReallyDirectory, At::ino(ino).num(inode.mode()));
    }
}

/// The blocks of an inode, and what depends on them.
fn check_blocks(
    ctx: &mut Context<'_, '_>,
    pass: &mut Pass1,
    ino: u32,
    inode: InodeRef<'_>,
    value_clusters: u64,
) {
    let flags = inode.flags();
    let is_dir = inode.is_dir();
    let xattr = pass1_xattr::check_block(ctx, &mut pass.claims, &mut pass.xattrs, ino, inode);
    let inline = pass.features.inline_data() && flags.contains(InodeFlags::INLINE_DATA);
    let mut count = if !inline && has_blocks(inode, pass.features) {
        claim_blocks(ctx, &mut pass.claims, ino, inode)
    } else {
        super::pass1_blocks::BlockCount::default()
    };
    let empty = count.clusters == 0;
    count.clusters += xattr + value_clusters;
    let mut indexed = false;
    let gone = ctx.is_gone(ino);
    if flags.contains(InodeFlags::INDEX) && !gone {
        indexed = check_index(ctx, ino, inode);
    }
    if is_dir && !gone && (ino == ROOT_INO || !is_special(ctx, ino)) {
        let dir = DirInfo {
            ino,
            parent: if ino == ROOT_INO { ROOT_INO } else { 0 },
            dotdot: 0,
            indexed,
            holes: count.holes,
            inline,
        };
        ctx.dirs.push(dir);
        if empty && !inline {
            ctx.problem(Code::ZeroLengthDir, At::ino(ino));
            return;
        }
    }
    check_sizes(ctx, ino, inode, &count);
}

/// Whether an index may be followed: its flag belongs there and its root is sound.
fn check_index(ctx: &mut Context<'_, '_>, ino: u32, inode: InodeRef<'_>) -> bool {
    let at = || At::ino(ino);
    if !inode.is_dir() {
        ctx.problem(Code::IndexNotDir, at());
        return false;
    }
    if !ctx.sb.features().dir_index() {
        ctx.problem(Code::IndexFeature, at());
        return false;
    }
    let root = ctx.dir_blocks.last().filter(|block| block.ino == ino).and_then(|_| {
        let first = ctx.dir_blocks.partition_point(|block| block.ino < ino);
        ctx.dir_blocks.get(first).filter(|block| block.logical == 0).map(|block| block.block)
    });
    let Some(bytes) = root.and_then(|block| ctx.read_block(block)) else {
        ctx.problem(Code::IndexRoot, at().text("block 0 cannot be read"));
        return false;
    };
    let info = match DxBlock::root(&bytes, ctx.sb.features().metadata_csum()) {
        Ok((_, info)) => info,
        Err(error) => {
            ctx.problem(Code::IndexRoot, at().text(error.detail));
            return false;
        }
    };
    let hashed_entries = inode.flags().contains(InodeFlags::CASEFOLD | InodeFlags::ENCRYPT);
    let siphash = info.hash_version == 6;
    let mut text = None;
    if !matches!(info.hash_version, 0..=2 | 6) || siphash != hashed_entries {
        text = Some(format!("hash version {}", info.hash_version));
    } else if info.flags & 1 != 0 {
        text = Some(format!("flags {:#x}", info.flags));
    } else if info.indirect_levels > 2
        || (info.indirect_levels > 1 && !ctx.sb.features().large_dir())
    {
        text = Some(format!("{} levels", info.indirect_levels));
    }
    let sound = text.is_none();
    if let Some(text) = text {
        ctx.problem(Code::IndexRoot, at().text(text));
    }
    sound
}
