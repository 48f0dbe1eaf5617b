//! Renaming: over existing names, between directories, and swapping two names.
//!
//! One handle does it all, so that after a crash the old or the new tree is there. When
//! a file replaces another, its delayed data is written first (`auto_da_alloc`): who
//! replaces a file in the usual way finds the old or the new contents, never none.
//!
//! Locks: as in [`crate::namei`]. Between two directories `Ext4::rename` is held from the
//! start, which keeps the shape of the tree, so the check against moving a directory
//! below itself holds until the end.

use std::collections::HashSet;
use std::sync::Arc;

use uext_blockdev::mutant;
use uext_jbd2::Handle;
use uext_ondisk::{Corrupt, InodeNumber};
use uext_vfs::{Context, Errno, FileKind, RenameFlags};

use crate::credits;
use crate::dir::{Slot, Target};
use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::ialloc::NewInode;
use crate::inode::Inode;

const S_IFCHR: u16 = 0o020_000;

/// One of the two names.
#[derive(Clone, Copy)]
struct Side<'a> {
    ctx: &'a Context,
    dir: &'a Arc<Inode>,
    name: &'a [u8],
}

/// A name that exists.
struct Found {
    slot: Slot,
    inode: Arc<Inode>,
    /// Where its `..` stands, when it is a directory that changes its parent.
    dotdot: Option<Slot>,
}

/// Both directories and what is above them.
struct Tree {
    above_from: HashSet<InodeNumber>,
    above_to: HashSet<InodeNumber>,
}

/// How an attempt ended.
enum Attempt {
    /// Done; this inode lost a name.
    Done(Option<Arc<Inode>>),
    /// A lock is taken that may only be waited for under `Ext4::rename`.
    Again,
}

fn check_name(name: &[u8]) -> Result<()> {
    match name {
        b"" => Err(Errno::ENOENT.into()),
        b"." | b".." => Err(Errno::EBUSY.into()),
        _ if name.len() > 255 => Err(Errno::ENAMETOOLONG.into()),
        _ => Ok(()),
    }
}

impl Ext4 {
    /// Renames; `from` and `to` are (directory, name). Gives the inode whose name was replaced,
    /// for the caller to delete when it has no links and nobody knows it any more.
    ///
    /// # Errors
    /// As renameat2(2).
    pub(crate) fn rename_names(
        &self,
        ctx: &Context,
        from: (&Arc<Inode>, &[u8]),
        to: (&Arc<Inode>, &[u8]),
        flags: RenameFlags,
    ) -> Result<Option<Arc<Inode>>> {
        let others = RenameFlags::NOREPLACE | RenameFlags::WHITEOUT;
        if flags.contains(RenameFlags::EXCHANGE) && flags.intersects(others) {
            return Err(Errno::EINVAL.into());
        }
        let side = |(dir, name)| Side { ctx, dir, name };
        let (from, to) = (side(from), side(to));
        check_name(from.name)?;
        check_name(to.name)?;
        self.check_writable()?;
        if !flags.contains(RenameFlags::EXCHANGE) && self.options.auto_da_alloc {
            self.flush_early(from, to)?;
        }
        self.with_space(|| self.rename_once(ctx, from, to, flags))
    }

    /// Writes the data of a file that is about to replace another, before any lock is taken.
    fn flush_early(&self, from: Side<'_>, to: Side<'_>) -> Result<()> {
        let find = |side: Side<'_>| {
            let _shared = side.dir.rwsem.read();
            self.lookup_locked(side.dir, side.name)
        };
        let (Ok(source), Ok(_)) = (find(from), find(to)) else { return Ok(()) };
        if source.kind == FileKind::Regular && !mutant!("rename-without-flush") {
            self.flush_data(&source)
        } else {
            Ok(())
        }
    }

    fn rename_once(
        &self,
        ctx: &Context,
        from: Side<'_>,
        to: Side<'_>,
        flags: RenameFlags,
    ) -> Result<Option<Arc<Inode>>> {
        let cross = from.dir.ino != to.dir.ino;
        if !cross && let Attempt::Done(gone) = self.try_rename(ctx, from, to, flags, None, false)? {
            return Ok(gone);
        }
        let _mutex = self.rename.lock();
        let tree = if cross {
            let (above_from, above_to) = (self.ancestors(from.dir)?, self.ancestors(to.dir)?);
            Some(Tree { above_from, above_to })
        } else {
            None
        };
        match self.try_rename(ctx, from, to, flags, tree.as_ref(), true)? {
            Attempt::Done(gone) => Ok(gone),
            Attempt::Again => Err(Errno::EBUSY.into()),
        }
    }

    /// One attempt; `wait` says that `Ext4::rename` is held.
    #[allow(clippy::too_many_arguments, reason = "who, from where, to where, and how")]
    fn try_rename(
        &self,
        ctx: &Context,
        from: Side<'_>,
        to: Side<'_>,
        flags: RenameFlags,
        tree: Option<&Tree>,
        wait: bool,
    ) -> Result<Attempt> {
        // The mutex makes the order of the two free; a parent goes before its child anyway.
        let from_first = tree.is_none_or(|t| {
            t.above_to.contains(&from.dir.ino)
                || (!t.above_from.contains(&to.dir.ino) && from.dir.ino < to.dir.ino)
        });
        let (first, second) = if from_first { (from.dir, to.dir) } else { (to.dir, from.dir) };
        let _first = self.lock_names(first);
        let _second = tree.map(|_| self.lock_names(second));

        let Some(mut source) = self.find_side(from)? else { return Err(Errno::ENOENT.into()) };
        let mut target = self.find_side(to)?;
        self.check_sides(from, to, &source, target.as_ref(), flags, tree)?;
        if target.as_ref().is_some_and(|target| target.inode.ino == source.inode.ino) {
            return Ok(Attempt::Done(None));
        }

        // Locks are taken on copies, so that the sides stay changeable.
        let (source_inode, target_inode) =
            (source.inode.clone(), target.as_ref().map(|target| target.inode.clone()));
        let mut children = vec![&source_inode];
        // A directory that stays below its parent is not changed by its new name.
        if source_inode.is_dir() && tree.is_none() {
            children.clear();
        }
        children.extend(target_inode.as_ref());
        let held = [from.dir.ino, to.dir.ino];
        let Some(_children) = self.lock_children(&children, &held, wait)? else {
            return Ok(Attempt::Again);
        };

        if tree.is_some() {
            self.find_dotdot(from, &mut source)?;
        }
        if flags.contains(RenameFlags::EXCHANGE) {
            let Some(mut target) = target else { return Err(Errno::ENOENT.into()) };
            if tree.is_some() {
                self.find_dotdot(to, &mut target)?;
            }
            self.exchange(from, to, &source, &target)?;
            return Ok(Attempt::Done(None));
        }
        if let Some(target) = &mut target
            && target.inode.is_dir()
            && !self.is_empty_dir(&target.inode)?
        {
            return Err(Errno::ENOTEMPTY.into());
        }
        if target.is_some()
            && source.inode.kind == FileKind::Regular
            && self.options.auto_da_alloc
            && !mutant!("rename-without-flush")
        {
            self.flush_data(&source.inode)?;
        }
        let whiteout = flags.contains(RenameFlags::WHITEOUT).then_some(ctx);
        self.move_name(from, to, &source, target.as_ref(), whiteout)?;
        Ok(Attempt::Done(target.map(|target| target.inode)))
    }

    fn find_side(&self, side: Side<'_>) -> Result<Option<Found>> {
        if !side.dir.is_dir() {
            return Err(Errno::ENOTDIR.into());
        }
        if side.dir.core.lock().nlink == 0 {
            return Err(Errno::ENOENT.into());
        }
        let Some(slot) = self.find_entry(side.dir, side.name)? else { return Ok(None) };
        let inode = self.entry_inode(side.dir, slot.ino)?;
        Ok(Some(Found { slot, inode, dotdot: None }))
    }

    /// What renameat2(2) refuses before anything changes.
    fn check_sides(
        &self,
        from: Side<'_>,
        to: Side<'_>,
        source: &Found,
        target: Option<&Found>,
        flags: RenameFlags,
        tree: Option<&Tree>,
    ) -> Result<()> {
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        if flags.contains(RenameFlags::NOREPLACE) && target.is_some() {
            return Err(Errno::EEXIST.into());
        }
        if exchange && target.is_none() {
            return Err(Errno::ENOENT.into());
        }
        if let Some(tree) = tree {
            if tree.above_to.contains(&source.inode.ino) {
                return Err(Errno::EINVAL.into());
            }
            if target.is_some_and(|target| tree.above_from.contains(&target.inode.ino)) {
                let errno = if exchange { Errno::EINVAL } else { Errno::ENOTEMPTY };
                return Err(errno.into());
            }
        }
        if let Some(target) = target
            && target.inode.ino == source.inode.ino
        {
            return Ok(());
        }
        self.check_may_remove(from.dir, &source.inode)?;
        match target {
            Some(target) => {
                self.check_may_remove(to.dir, &target.inode)?;
                let (old_dir, new_dir) = (source.inode.is_dir(), target.inode.is_dir());
                if !exchange && old_dir && !new_dir {
                    return Err(Errno::ENOTDIR.into());
                }
                if !exchange && !old_dir && new_dir {
                    return Err(Errno::EISDIR.into());
                }
                if exchange && tree.is_some() && old_dir != new_dir {
                    let gains = if old_dir { to.dir } else { from.dir };
                    if self.is_dir_full(gains) {
                        return Err(Errno::EMLINK.into());
                    }
                }
            }
            None => {
                self.check_may_create(to.dir)?;
                if tree.is_some() && source.inode.is_dir() && self.is_dir_full(to.dir) {
                    return Err(Errno::EMLINK.into());
                }
            }
        }
        Ok(())
    }

    /// Finds the `..` of a directory that is to change its parent.
    fn find_dotdot(&self, side: Side<'_>, found: &mut Found) -> Result<()> {
        if !found.inode.is_dir() {
            return Ok(());
        }
        let dotdot = self.find_dot(&found.inode, b"..")?;
        if dotdot.ino != side.dir.ino {
            let detail = format!("`..` leads to {}, not {}", dotdot.ino, side.dir.ino);
            return Err(Corrupt::value("directory", detail).in_inode(found.inode.ino).into());
        }
        found.dotdot = Some(dotdot);
        Ok(())
    }

    /// The inode has another name: its change time, and its `..`.
    fn renamed(&self, handle: &Handle, found: &Found, parent: &Inode) -> Result<()> {
        found.inode.core.lock().ctime = self.now();
        self.mark_inode_dirty(handle, &found.inode)?;
        if let Some(dotdot) = &found.dotdot {
            self.redirect_entry(handle, &found.inode, dotdot, Target::of(parent))?;
            found.inode.note_tid(handle.tid(), true);
        }
        Ok(())
    }

    fn move_name(
        &self,
        from: Side<'_>,
        to: Side<'_>,
        source: &Found,
        target: Option<&Found>,
        whiteout: Option<&Context>,
    ) -> Result<()> {
        let handle = self.start_for(to.ctx, credits::RENAME + credits::NEW_INODE)?;
        let whiteout = match whiteout {
            Some(ctx) => Some(self.new_whiteout(ctx, &handle, from.dir)?),
            None => None,
        };
        let leads_to = Target::of(&source.inode);
        let placed = match target {
            Some(target) => self.redirect_entry(&handle, to.dir, &target.slot, leads_to),
            None => self.add_entry(&handle, to.dir, to.name, leads_to),
        };
        if let (Err(_), Some(whiteout)) = (&placed, &whiteout) {
            self.discard_new(handle, whiteout);
            return placed;
        }
        placed?;
        // Adding the new name may have moved the old one within the directory.
        let slot = self.find_entry(from.dir, from.name)?.ok_or(Error::Errno(Errno::EIO))?;
        match &whiteout {
            Some(whiteout) => {
                self.redirect_entry(&handle, from.dir, &slot, Target::of(whiteout))?;
            }
            None => self.remove_entry(&handle, from.dir, &slot)?,
        }
        self.renamed(&handle, source, to.dir)?;

        if source.inode.is_dir() {
            let stays = from.dir.ino == to.dir.ino;
            if !stays || target.is_some() {
                self.drop_dir_link(from.dir);
            }
            if !stays && target.is_none() {
                self.add_dir_link(to.dir);
            }
        }
        if let Some(target) = target {
            self.drop_link(&handle, &target.inode)?;
        }
        self.dir_changed(&handle, from.dir)?;
        self.dir_changed(&handle, to.dir)
    }

    /// A character device of number 0, which stands where a name was in an overlay's upper layer.
    fn new_whiteout(&self, ctx: &Context, handle: &Handle, dir: &Inode) -> Result<Arc<Inode>> {
        let spec = NewInode { mode: S_IFCHR, uid: ctx.uid, gid: ctx.gid, rdev: 0 };
        let inode = self.new_inode(handle, dir, &spec)?;
        self.mark_inode_dirty(handle, &inode)?;
        Ok(inode)
    }

    fn exchange(&self, from: Side<'_>, to: Side<'_>, source: &Found, target: &Found) -> Result<()> {
        let handle = self.start_for(to.ctx, credits::RENAME)?;
        self.redirect_entry(&handle, to.dir, &target.slot, Target::of(&source.inode))?;
        self.redirect_entry(&handle, from.dir, &source.slot, Target::of(&target.inode))?;
        self.renamed(&handle, source, to.dir)?;
        self.renamed(&handle, target, from.dir)?;
        if from.dir.ino != to.dir.ino {
            match (source.inode.is_dir(), target.inode.is_dir()) {
                (true, false) => {
                    self.drop_dir_link(from.dir);
                    self.add_dir_link(to.dir);
                }
                (false, true) => {
                    self.drop_dir_link(to.dir);
                    self.add_dir_link(from.dir);
                }
                _ => {}
            }
        }
        self.dir_changed(&handle, from.dir)?;
        self.dir_changed(&handle, to.dir)
    }
}
