//! Names: looking up, making, linking and removing files.
//!
//! Every change is one handle: after a crash it happened as a whole or not at all.
//! A failure inside a handle leaves what the handle has done so far sound: a new
//! inode without a name goes on the orphan list and is deleted at once.
//!
//! Locks: `rwsem` of the directory, exclusively for a change; then of the inode whose
//! links change. A thread that waits for the lock of a second directory holds
//! `Ext4::rename`; without it, it only tries, and begins again with the mutex when the
//! lock is taken. So no order of directories can deadlock, not even in a damaged tree
//! that has a circle.

use std::collections::HashSet;
use std::sync::Arc;

use uext_blockdev::mutant;
use uext_jbd2::Handle;
use uext_ondisk::inode::InodeFlags;
use uext_ondisk::{Corrupt, InodeNumber};
use uext_sync::RwLockWriteGuard;
use uext_vfs::{Context, Errno, FileKind};

use crate::credits;
use crate::dir::{Room, Search, Target};
use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::ialloc::NewInode;
use crate::inode::{Core, Inode};
use crate::last_search::NamesLock;

/// Most links of an inode (`EXT4_LINK_MAX`).
pub(crate) const LINK_MAX: u16 = 65_000;
/// Longest name, bytes.
const NAME_MAX: usize = 255;
/// How often an operation that found no space is tried again after a commit.
const SPACE_RETRIES: u32 = 3;

/// What a new name leads to.
#[derive(Clone, Copy)]
enum NewNode<'a> {
    /// Any type but directory and symlink; the device number in the kernel's new encoding.
    File {
        mode: u16,
        rdev: u32,
    },
    Directory {
        mode: u16,
    },
    Symlink {
        target: &'a [u8],
    },
}

impl NewNode<'_> {
    /// Type and permission bits.
    fn mode(&self) -> u16 {
        match *self {
            Self::File { mode, .. } | Self::Directory { mode } => mode,
            Self::Symlink { .. } => mode_of(FileKind::Symlink) | 0o777,
        }
    }
}

/// The type bits of a mode.
fn mode_of(kind: FileKind) -> u16 {
    // Type bits lie below bit 16.
    #[allow(clippy::cast_possible_truncation)]
    let bits = kind.mode_bits() as u16;
    bits
}

/// Permission bits of a mode argument.
fn permissions(mode: u32) -> u16 {
    // Masked to twelve bits.
    #[allow(clippy::cast_possible_truncation)]
    let bits = (mode & 0o7777) as u16;
    bits
}

/// A name that may be made; `.` and `..` are there already.
fn check_new_name(name: &[u8]) -> Result<()> {
    match name {
        b"" => Err(Errno::ENOENT.into()),
        b"." | b".." => Err(Errno::EEXIST.into()),
        _ => check_length(name),
    }
}

fn check_length(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX { Err(Errno::ENAMETOOLONG.into()) } else { Ok(()) }
}

impl Core {
    /// Whether the flags forbid any change of the inode's names and attributes.
    fn is_fixed(&self) -> bool {
        self.flags.intersects(InodeFlags::APPEND | InodeFlags::IMMUTABLE)
    }
}

impl Ext4 {
    /// Does something that needs space; when there is none but a commit frees some, again.
    pub(crate) fn with_space<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        for _ in 0..SPACE_RETRIES {
            match work() {
                Err(error) if error.is(Errno::ENOSPC) && self.space.lock().pending > 0 => {
                    self.journal.commit_all()?;
                }
                other => return other,
            }
        }
        work()
    }

    /// Whether names may be added to a directory; its lock is held.
    pub(crate) fn check_may_create(&self, dir: &Inode) -> Result<()> {
        if !dir.is_dir() {
            return Err(Errno::ENOTDIR.into());
        }
        let core = dir.core.lock();
        if core.nlink == 0 {
            return Err(Errno::ENOENT.into());
        }
        if core.flags.contains(InodeFlags::IMMUTABLE) {
            return Err(Errno::EPERM.into());
        }
        Ok(())
    }

    /// Whether an inode's name may be taken out of a directory; its lock is held.
    pub(crate) fn check_may_remove(&self, dir: &Inode, inode: &Inode) -> Result<()> {
        if dir.core.lock().is_fixed() || inode.core.lock().is_fixed() {
            return Err(Errno::EPERM.into());
        }
        Ok(())
    }

    /// Whether a directory may not take another subdirectory.
    pub(crate) fn is_dir_full(&self, dir: &Inode) -> bool {
        let many =
            self.sb.features().ro_compat.contains(uext_ondisk::features::RoCompat::DIR_NLINK)
                && self.is_indexed(dir);
        dir.core.lock().nlink >= LINK_MAX && !many
    }

    /// A directory gained a subdirectory. Past the limit an indexed one stops counting, at 1.
    pub(crate) fn add_dir_link(&self, dir: &Inode) {
        let indexed = self.is_indexed(dir);
        let mut core = dir.core.lock();
        core.nlink = core.nlink.saturating_add(1);
        if indexed && (core.nlink > LINK_MAX || core.nlink == 2) {
            core.nlink = 1;
        }
    }

    /// A directory lost a subdirectory.
    pub(crate) fn drop_dir_link(&self, dir: &Inode) {
        let mut core = dir.core.lock();
        if core.nlink > 2 {
            core.nlink -= 1;
        }
    }

    /// Takes one link from a file, all from a directory, and notes the time. An inode that has
    /// none left goes on the orphan list.
    pub(crate) fn drop_link(&self, handle: &Handle, inode: &Arc<Inode>) -> Result<()> {
        let now = self.now();
        let left = {
            let mut core = inode.core.lock();
            core.ctime = now;
            if core.nlink == 0 {
                log::warn!("{}: inode {}: a name, but no links", self.name, inode.ino);
            }
            core.nlink = if inode.is_dir() { 0 } else { core.nlink.saturating_sub(1) };
            core.nlink
        };
        if !mutant!("nlink-not-journalled") {
            self.mark_inode_dirty(handle, inode)?;
        }
        if left == 0 {
            self.orphan_add(handle, inode)?;
        }
        Ok(())
    }

    /// Finds a name. The directory's lock is held.
    pub(crate) fn lookup_locked(&self, dir: &Inode, name: &[u8]) -> Result<Arc<Inode>> {
        if !dir.is_dir() {
            return Err(Errno::ENOTDIR.into());
        }
        check_length(name)?;
        if dir.core.lock().nlink == 0 {
            return Err(Errno::ENOENT.into());
        }
        let search = self.search_entry(dir, name)?;
        self.keep_search(dir, name, &search);
        let slot = search.found().ok_or(Error::Errno(Errno::ENOENT))?;
        self.entry_inode(dir, slot.ino)
    }

    /// The inode that a directory's entry leads to.
    pub(crate) fn entry_inode(&self, dir: &Inode, ino: InodeNumber) -> Result<Arc<Inode>> {
        // Reserved inodes have no names, but for the root.
        if ino < self.sb.first_ino() && ino != InodeNumber::ROOT {
            let corrupt = Corrupt::value("directory entry", format!("leads to inode {ino}"));
            return Err(corrupt.in_inode(dir.ino).into());
        }
        self.iget(ino)
    }

    /// Resolves a name and counts a lookup of what it leads to, which the caller owes a forget.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `ENAMETOOLONG`, or what is wrong with the directory.
    pub(crate) fn lookup_name(
        &self,
        _ctx: &Context,
        dir: &Arc<Inode>,
        name: &[u8],
    ) -> Result<Arc<Inode>> {
        let _shared = dir.rwsem.read();
        let inode = self.lookup_locked(dir, name)?;
        // Under the directory's lock, so that no unlink deletes the inode in between.
        self.inodes.count_lookup(&inode);
        Ok(inode)
    }

    /// Makes a file of any type but directory and symlink; counts a lookup.
    ///
    /// # Errors
    /// `EEXIST`, `EINVAL` for another type, `ENOSPC`, …
    pub(crate) fn make_node(
        &self,
        ctx: &Context,
        dir: &Arc<Inode>,
        name: &[u8],
        mode: u32,
        rdev: u32,
    ) -> Result<Arc<Inode>> {
        let kind = match FileKind::from_mode(mode) {
            None if mode & libc_ifmt() == 0 => FileKind::Regular,
            Some(FileKind::Directory) => return Err(Errno::EPERM.into()),
            None | Some(FileKind::Symlink) => return Err(Errno::EINVAL.into()),
            Some(kind) => kind,
        };
        let mode = mode_of(kind) | permissions(mode);
        self.make(ctx, dir, name, NewNode::File { mode, rdev })
    }

    /// Makes a directory; counts a lookup.
    ///
    /// # Errors
    /// `EEXIST`, `EMLINK`, `ENOSPC`, …
    pub(crate) fn make_dir(
        &self,
        ctx: &Context,
        dir: &Arc<Inode>,
        name: &[u8],
        mode: u32,
    ) -> Result<Arc<Inode>> {
        let mode = mode_of(FileKind::Directory) | permissions(mode);
        self.make(ctx, dir, name, NewNode::Directory { mode })
    }

    /// Makes a symbolic link; counts a lookup.
    ///
    /// # Errors
    /// `EEXIST`, `ENAMETOOLONG` for a target over a block, `ENOSPC`, …
    pub(crate) fn make_symlink(
        &self,
        ctx: &Context,
        dir: &Arc<Inode>,
        name: &[u8],
        target: &[u8],
    ) -> Result<Arc<Inode>> {
        self.check_symlink_target(target)?;
        self.make(ctx, dir, name, NewNode::Symlink { target })
    }

    fn make(
        &self,
        ctx: &Context,
        dir: &Arc<Inode>,
        name: &[u8],
        node: NewNode<'_>,
    ) -> Result<Arc<Inode>> {
        check_new_name(name)?;
        self.with_space(|| {
            let mut names = self.lock_names(dir);
            self.check_may_create(dir)?;
            let Search::Missing(room) = names.search(self, name)? else {
                return Err(Errno::EEXIST.into());
            };
            let is_dir = matches!(node, NewNode::Directory { .. });
            if is_dir && self.is_dir_full(dir) {
                return Err(Errno::EMLINK.into());
            }
            let made = self.make_locked(ctx, dir, (name, room), node);
            if let Ok(inode) = &made {
                self.inodes.count_lookup(inode);
            }
            drop(names);
            made
        })
    }

    /// Makes an inode and its name, with the room that was found for it, in one handle.
    fn make_locked(
        &self,
        ctx: &Context,
        dir: &Arc<Inode>,
        (name, room): (&[u8], Option<Room>),
        node: NewNode<'_>,
    ) -> Result<Arc<Inode>> {
        let acls = self.plan_acls(dir, node.mode(), ctx.umask)?;
        let rdev = if let NewNode::File { rdev, .. } = node { rdev } else { 0 };
        let spec = NewInode { mode: acls.mode, uid: ctx.uid, gid: ctx.gid, rdev };
        let handle = self.start_for(ctx, credits::CREATE)?;
        let inode = self.new_inode(&handle, dir, &spec)?;
        let made = self
            .fill_new(&handle, dir, &inode, node)
            .and_then(|()| self.apply_acls(&handle, &inode, &acls))
            .and_then(|()| self.mark_inode_dirty(&handle, &inode))
            .and_then(|()| self.add_missing(&handle, dir, name, Target::of(&inode), room));
        if let Err(error) = made {
            self.discard_new(handle, &inode);
            return Err(error);
        }
        if inode.is_dir() {
            self.add_dir_link(dir);
        }
        self.dir_changed(&handle, dir)?;
        inode.note_tid(handle.tid(), true);
        Ok(inode)
    }

    fn fill_new(
        &self,
        handle: &Handle,
        dir: &Inode,
        inode: &Inode,
        node: NewNode<'_>,
    ) -> Result<()> {
        match node {
            NewNode::File { .. } => Ok(()),
            NewNode::Directory { .. } => {
                self.init_dir(handle, inode, dir.ino)?;
                inode.core.lock().nlink = 2;
                Ok(())
            }
            NewNode::Symlink { target } => self.write_symlink(handle, inode, target),
        }
    }

    /// A new inode gets no name after all: it is deleted, now or, should that fail, at the
    /// next mount.
    pub(crate) fn discard_new(&self, handle: Handle, inode: &Arc<Inode>) {
        inode.core.lock().nlink = 0;
        let listed =
            self.mark_inode_dirty(&handle, inode).and_then(|()| self.orphan_add(&handle, inode));
        drop(handle);
        // Nobody has looked it up, so no forget will delete it.
        for outcome in [listed, self.delete_inode(inode)] {
            if let Err(error) = outcome {
                self.report(Some(inode.ino), &error);
            }
        }
    }

    /// Makes a regular file without a name, counting a lookup; it is deleted at its last forget
    /// unless it was linked.
    pub(crate) fn make_tmpfile(
        &self,
        ctx: &Context,
        dir: &Arc<Inode>,
        mode: u32,
    ) -> Result<Arc<Inode>> {
        let mode = mode_of(FileKind::Regular) | permissions(mode);
        self.with_space(|| {
            let _shared = dir.rwsem.read();
            self.check_may_create(dir)?;
            let acls = self.plan_acls(dir, mode, ctx.umask)?;
            let spec = NewInode { mode: acls.mode, uid: ctx.uid, gid: ctx.gid, rdev: 0 };
            let handle = self.start_for(ctx, credits::CREATE)?;
            let inode = self.new_inode(&handle, dir, &spec)?;
            inode.core.lock().nlink = 0;
            let made = self
                .apply_acls(&handle, &inode, &acls)
                .and_then(|()| self.mark_inode_dirty(&handle, &inode))
                .and_then(|()| self.orphan_add(&handle, &inode));
            if let Err(error) = made {
                self.discard_new(handle, &inode);
                return Err(error);
            }
            self.inodes.count_lookup(&inode);
            Ok(inode)
        })
    }

    /// Makes a hard link; counts a lookup.
    ///
    /// # Errors
    /// `EPERM` for a directory, `EMLINK`, `EEXIST`, `ENOSPC`, …
    pub(crate) fn make_link(
        &self,
        ctx: &Context,
        inode: &Arc<Inode>,
        dir: &Arc<Inode>,
        name: &[u8],
    ) -> Result<()> {
        check_new_name(name)?;
        if inode.is_dir() {
            return Err(Errno::EPERM.into());
        }
        self.with_space(|| {
            let mut names = self.lock_names(dir);
            self.check_may_create(dir)?;
            let _inode_exclusive = inode.rwsem.write();
            if inode.core.lock().is_fixed() {
                return Err(Errno::EPERM.into());
            }
            if inode.core.lock().nlink >= LINK_MAX {
                return Err(Errno::EMLINK.into());
            }
            let Search::Missing(room) = names.search(self, name)? else {
                return Err(Errno::EEXIST.into());
            };
            let handle = self.start_for(ctx, credits::LINK)?;
            self.add_missing(&handle, dir, name, Target::of(inode), room)?;
            let now = self.now();
            let first = {
                let mut core = inode.core.lock();
                core.ctime = now;
                core.nlink += 1;
                core.nlink == 1
            };
            if first {
                // A file made without a name has one now.
                self.orphan_del(&handle, inode)?;
            }
            self.mark_inode_dirty(&handle, inode)?;
            self.dir_changed(&handle, dir)?;
            self.inodes.count_lookup(inode);
            Ok(())
        })
    }

    /// Removes a name that is not a directory. Gives the inode, for the caller to delete when
    /// nobody knows it any more.
    ///
    /// # Errors
    /// `ENOENT`, `EISDIR`, …
    pub(crate) fn unlink_name(
        &self,
        _ctx: &Context,
        dir: &Arc<Inode>,
        name: &[u8],
    ) -> Result<Arc<Inode>> {
        check_length(name)?;
        if name == b"." || name == b".." {
            return Err(Errno::EISDIR.into());
        }
        let mut names = self.lock_names(dir);
        let (slot, inode) = self.find_removable(dir, name, &mut names)?;
        if inode.is_dir() {
            return Err(Errno::EISDIR.into());
        }
        self.check_may_remove(dir, &inode)?;
        {
            let _inode_exclusive = inode.rwsem.write();
            let handle = self.start(credits::UNLINK)?;
            self.remove_entry(&handle, dir, &slot)?;
            self.dir_changed(&handle, dir)?;
            self.drop_link(&handle, &inode)?;
        }
        Ok(inode)
    }

    /// The entry of a name to be removed, and its inode.
    fn find_removable(
        &self,
        dir: &Inode,
        name: &[u8],
        names: &mut NamesLock<'_>,
    ) -> Result<(crate::dir::Slot, Arc<Inode>)> {
        if !dir.is_dir() {
            return Err(Errno::ENOTDIR.into());
        }
        if dir.core.lock().nlink == 0 {
            return Err(Errno::ENOENT.into());
        }
        let slot = names.search(self, name)?.found().ok_or(Error::Errno(Errno::ENOENT))?;
        let inode = self.entry_inode(dir, slot.ino)?;
        Ok((slot, inode))
    }

    /// Removes an empty directory; gives its inode, as [`Ext4::unlink_name`].
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `ENOTEMPTY`, …
    pub(crate) fn remove_dir(
        &self,
        _ctx: &Context,
        dir: &Arc<Inode>,
        name: &[u8],
    ) -> Result<Arc<Inode>> {
        check_length(name)?;
        match name {
            b"." => return Err(Errno::EINVAL.into()),
            b".." => return Err(Errno::ENOTEMPTY.into()),
            _ => {}
        }
        if let Some(child) = self.try_rmdir(dir, name, false)? {
            return Ok(child);
        }
        let _tree = self.rename.lock();
        self.try_rmdir(dir, name, true)?.ok_or(Error::Errno(Errno::EBUSY))
    }

    /// Removes an empty directory; `None` when its lock is taken and `wait` is not set.
    fn try_rmdir(&self, dir: &Arc<Inode>, name: &[u8], wait: bool) -> Result<Option<Arc<Inode>>> {
        let mut names = self.lock_names(dir);
        let (slot, child) = self.find_removable(dir, name, &mut names)?;
        if !child.is_dir() {
            return Err(Errno::ENOTDIR.into());
        }
        self.check_may_remove(dir, &child)?;
        let Some(_children) = self.lock_children(&[&child], &[dir.ino], wait)? else {
            return Ok(None);
        };
        if !self.is_empty_dir(&child)? {
            return Err(Errno::ENOTEMPTY.into());
        }
        let handle = self.start(credits::UNLINK)?;
        self.remove_entry(&handle, dir, &slot)?;
        self.drop_link(&handle, &child)?;
        self.drop_dir_link(dir);
        self.dir_changed(&handle, dir)?;
        Ok(Some(child.clone()))
    }

    /// Locks inodes exclusively, each once: directories first, by number. `None` when a
    /// directory's lock is taken and `wait` is not set; `wait` needs `Ext4::rename`.
    ///
    /// # Errors
    /// `Corrupt` when one of them is a directory whose lock is held: it has itself as a name.
    pub(crate) fn lock_children<'a>(
        &self,
        inodes: &[&'a Arc<Inode>],
        held: &[InodeNumber],
        wait: bool,
    ) -> Result<Option<Vec<RwLockWriteGuard<'a, ()>>>> {
        let mut inodes = inodes.to_vec();
        inodes.sort_by_key(|inode| (!inode.is_dir(), inode.ino));
        inodes.dedup_by_key(|inode| inode.ino);
        let mut guards = Vec::with_capacity(inodes.len());
        for inode in inodes {
            if held.contains(&inode.ino) {
                let corrupt = Corrupt::value("directory", "has itself as an entry");
                return Err(corrupt.in_inode(inode.ino).into());
            }
            if wait || !inode.is_dir() {
                guards.push(inode.rwsem.write());
            } else if let Some(guard) = inode.rwsem.try_write() {
                guards.push(guard);
            } else {
                return Ok(None);
            }
        }
        Ok(Some(guards))
    }

    /// A directory and all above it, up to the root. `Ext4::rename` is held, so they stay.
    ///
    /// # Errors
    /// `Corrupt` for a circle, `ENOENT` for a directory that was removed.
    pub(crate) fn ancestors(&self, dir: &Arc<Inode>) -> Result<HashSet<InodeNumber>> {
        let mut seen = HashSet::new();
        let mut current = dir.clone();
        loop {
            if !current.is_dir() {
                return Err(Errno::ENOTDIR.into());
            }
            if current.core.lock().nlink == 0 {
                return Err(Errno::ENOENT.into());
            }
            if !seen.insert(current.ino) {
                let corrupt = Corrupt::value("directory", "`..` goes round in a circle");
                return Err(corrupt.in_inode(current.ino).into());
            }
            if current.ino == InodeNumber::ROOT {
                return Ok(seen);
            }
            let parent = self.parent_of(&current)?;
            current = self.entry_inode(&current, parent)?;
        }
    }
}

/// `S_IFMT`.
fn libc_ifmt() -> u32 {
    0o170_000
}
