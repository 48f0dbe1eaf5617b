//! The reserved inodes the superblock leans on: resize inode and journal.
//!
//! A journal that needs recovery was looked through before, or could not be, which was said: see
//! [`super::replay`].

use std::path::Path;

use uext_blockdev::BlockDevice;
use uext_blockdev::file::{FileDevice, OpenOptions};
use uext_ondisk::features::Incompat;
use uext_ondisk::indirect::{DOUBLE_INDIRECT, Pointers};
use uext_ondisk::inode::{InodeFlags, InodeRef};
use uext_ondisk::jbd2::{JournalSuperblock, MIN_BLOCKS, RawJournalSuperblock};
use uext_ondisk::superblock::{JournalDevice, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE};
use uext_ondisk::{GroupNumber, InodeNumber};
use zerocopy::FromBytes;

use super::context::Context;
use super::problem::{At, Code};
use super::walk::{Volume, collect_runs};

/// Checks the resize inode against the reserved descriptor blocks.
pub fn check_resize_inode(ctx: &mut Context<'_, '_>) {
    use uext_ondisk::features::Compat;
    let features = ctx.sb.features();
    let ino = InodeNumber::RESIZE.0;
    let on = features.compat.contains(Compat::RESIZE_INODE);
    if on && features.meta_bg() {
        ctx.problem(Code::ResizeWithMetaBg, At::fs());
    }
    if !on && ctx.sb.reserved_gdt_blocks() != 0 {
        let count = ctx.sb.reserved_gdt_blocks();
        ctx.problem(Code::ReservedGdtWithoutFeature, At::fs().num(count));
    }
    let Some(bytes) = ctx.read_inode(ino) else { return };
    let Ok(inode) = InodeRef::new(&bytes[..]) else { return };
    if !on {
        if inode.i_block().iter().any(|&byte| byte != 0) {
            ctx.problem(Code::ResizeInodeNotClear, At::ino(ino));
        }
        return;
    }
    if let Err(text) = resize_inode_is_sound(ctx, inode) {
        ctx.problem(Code::ResizeInodeBad, At::ino(ino).text(text));
    }
}

fn resize_inode_is_sound(ctx: &Context<'_, '_>, inode: InodeRef<'_>) -> Result<(), String> {
    let roots = Pointers::new(inode.i_block()).map_err(|error| error.detail)?;
    if roots.iter().any(|(at, _)| at != DOUBLE_INDIRECT) {
        return Err("it maps more than a double indirect block".into());
    }
    let Some(double) = roots.get(DOUBLE_INDIRECT) else {
        return Err("it has no double indirect block".into());
    };
    if inode.links_count() == 0 || !inode.is_regular() || !ctx.is_fs_block(double.0) {
        return Err("it is not in use, or its block lies outside the filesystem".into());
    }
    let unreadable = |block: u64| format!("block {block} cannot be read");
    let bytes = ctx.read_block(double.0).ok_or_else(|| unreadable(double.0))?;
    let double = Pointers::new(&bytes[..]).map_err(|error| error.detail)?;
    let sb = &ctx.sb;
    let first = sb.super_block().0 + 1 + u64::from(sb.gdt_blocks());
    let per_group = u64::from(sb.blocks_per_group());
    let backups: Vec<GroupNumber> = sb.backup_groups().collect();
    // e2fsck looks at the first quarter of the reserved blocks; so does this check.
    for n in 0..u64::from(sb.reserved_gdt_blocks() / 4) {
        let block = first + n;
        let at = (u64::from(sb.gdt_blocks()) + n) % double.len() as u64;
        let found = double.get(usize::try_from(at).unwrap_or(0)).map_or(0, |block| block.0);
        if found != block {
            return Err(format!("entry {at} is block {found}, should be {block}"));
        }
        let bytes = ctx.read_block(block).ok_or_else(|| unreadable(block))?;
        let single = Pointers::new(&bytes[..]).map_err(|error| error.detail)?;
        for (at, group) in backups.iter().enumerate().take(single.len()) {
            let expect = block + per_group * u64::from(group.0);
            let found = single.get(at).map_or(0, |block| block.0);
            if found != expect {
                return Err(format!("block {block} leads to {found}, should be {expect}"));
            }
        }
    }
    Ok(())
}

/// Checks the journal's inode and superblock, and that the superblock agrees.
pub fn check_journal(ctx: &mut Context<'_, '_>, external: Option<&Path>) {
    let raw = ctx.sb.raw();
    let features = ctx.sb.features();
    let recover = features.incompat.contains(Incompat::RECOVER);
    let inum = raw.s_journal_inum.get();
    let elsewhere = raw.s_journal_dev.get() != 0 || raw.s_journal_uuid != [0; 16];
    if !features.has_journal() {
        if recover || inum != 0 || elsewhere {
            ctx.problem(Code::JournalFlags, At::fs());
        }
        return;
    }
    if inum == 0 && elsewhere {
        match external.map(|path| check_external(ctx, path)) {
            None => ctx.problem(Code::JournalExternal, At::fs()),
            Some(Ok(())) => {}
            Some(Err(text)) => ctx.problem(Code::JournalSuper, At::fs().text(text)),
        }
        return;
    }
    match journal_block(ctx, inum) {
        Ok((block, count)) => check_journal_super(ctx, block, count, recover),
        Err(text) => ctx.problem(Code::JournalInode, At::ino(inum).text(text)),
    }
}

/// Whether a device is the journal of this filesystem and of no other.
fn check_external(ctx: &Context<'_, '_>, path: &Path) -> Result<(), String> {
    let open = OpenOptions { read_only: true, direct: false, ..OpenOptions::default() };
    let device = FileDevice::open(path, open).map_err(|error| error.to_string())?;
    let device: &dyn BlockDevice = &*device;
    let read = |offset, len| {
        device.read_at(offset, len).map_err(|status| format!("{}: {status}", path.display()))
    };
    let own = JournalDevice::parse(&read(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE)?)
        .map_err(|error| format!("{}: {error}", path.display()))?;
    if own.uuid != ctx.sb.journal_uuid() {
        let wanted = ctx.sb.journal_uuid();
        return Err(format!("{} is journal {}, not {wanted}", path.display(), own.uuid));
    }
    if own.block_size != ctx.sb.block_size() {
        return Err(format!("the external journal has blocks of {} bytes", own.block_size));
    }
    let place = u64::from(own.superblock()) * u64::from(own.block_size);
    let bytes = read(place, own.block_size as usize)?;
    let journal = JournalSuperblock::parse(&bytes).map_err(|error| error.detail)?;
    let (raw, _) = RawJournalSuperblock::ref_from_prefix(&bytes)
        .map_err(|_| "the external journal's superblock is cut off".to_owned())?;
    if journal.user_count != 1 || raw.s_users.first() != Some(ctx.sb.uuid().as_bytes()) {
        let count = journal.user_count;
        return Err(format!("{count} filesystems use the external journal, and not only this one"));
    }
    let recover = ctx.sb.features().incompat.contains(Incompat::RECOVER);
    if journal.needs_recovery() && !recover && !ctx.looked_through {
        return Err(
            "the external journal holds transactions the superblock does not know of".into()
        );
    }
    Ok(())
}

/// The journal's first block and its length in blocks.
fn journal_block(ctx: &Context<'_, '_>, inum: u32) -> Result<(u64, u64), String> {
    let bytes = ctx.read_inode(inum).ok_or("it cannot be read")?;
    let inode = InodeRef::new(&bytes[..]).map_err(|error| error.detail)?;
    if inode.links_count() == 0 || !inode.is_regular() {
        return Err("it is no regular file in use".into());
    }
    if inode.flags().contains(InodeFlags::ENCRYPT) {
        return Err("it is encrypted".into());
    }
    let count = inode.raw_size() / u64::from(ctx.sb.block_size());
    if count < u64::from(MIN_BLOCKS) {
        return Err(format!("it has {count} blocks, {MIN_BLOCKS} at least"));
    }
    let volume = Volume::new(ctx.dev, &ctx.sb);
    let runs = collect_runs(volume, inum, inode, ctx.sb.features().extents())
        .ok_or("its block map is damaged")?;
    let mapped = runs.last().map_or(0, |&(logical, _, len)| logical + len);
    match runs.first() {
        Some(&(0, block, _)) if mapped >= count => Ok((block, count)),
        _ => Err(format!("it maps {mapped} of {count} blocks")),
    }
}

fn check_journal_super(ctx: &mut Context<'_, '_>, block: u64, count: u64, recover: bool) {
    let Some(bytes) = ctx.read_block(block) else {
        return ctx.problem(Code::JournalSuper, At::fs().blk(block).text("it cannot be read"));
    };
    let bad = |text: String| (Code::JournalSuper, At::fs().blk(block).text(text));
    let (code, at) = match JournalSuperblock::parse(&bytes) {
        Err(error) => bad(error.detail),
        Ok(sb) if sb.block_size != ctx.sb.block_size() => {
            bad(format!("block size {}", sb.block_size))
        }
        Ok(sb) if u64::from(sb.block_count) > count => {
            bad(format!("{} blocks in a journal of {count}", sb.block_count))
        }
        Ok(sb) if sb.log_end() < MIN_BLOCKS => bad("too many fast-commit blocks".into()),
        Ok(sb) if sb.user_count > 1 => bad(format!("{} filesystems use it", sb.user_count)),
        Ok(sb) if sb.needs_recovery() && !recover => (Code::JournalStartSet, At::fs()),
        Ok(sb) => {
            let users = RawJournalSuperblock::ref_from_prefix(&bytes);
            let stray = users.is_ok_and(|(raw, _)| !sb.v2 && raw.s_nr_users.get() > 1);
            if !stray {
                return;
            }
            bad("a version 1 superblock with users".into())
        }
    };
    ctx.problem(code, at);
}

/// Warns of times in the future, which a stopped clock makes.
pub fn check_times(ctx: &mut Context<'_, '_>, now: u64) {
    let times = [("the last mount", ctx.sb.mount_time()), ("the last write", ctx.sb.write_time())];
    for (what, time) in times {
        if time > now {
            ctx.problem(Code::FutureTime, At::fs().text(what));
        }
    }
}

/// Quota files are reserved inodes, or were ordinary ones long ago.
pub fn check_quota_inodes(ctx: &mut Context<'_, '_>) {
    let raw = ctx.sb.raw();
    let quotas = [
        (raw.s_usr_quota_inum.get(), 3),
        (raw.s_grp_quota_inum.get(), 4),
        (raw.s_prj_quota_inum.get(), 0),
    ];
    let ordinary = ctx.sb.first_ino().0..=ctx.sb.inodes_count();
    for (inum, reserved) in quotas {
        if inum != 0 && inum != reserved && !ordinary.contains(&inum) {
            ctx.problem(Code::QuotaInode, At::fs().num(inum));
        }
    }
}
