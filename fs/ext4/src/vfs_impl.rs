//! The filesystem as a front end sees it: locks are taken below, errors become
//! errno here, and are logged when a number cannot say what they are.

use std::sync::Arc;

use uext_jbd2::Handle;
use uext_ondisk::InodeNumber;
use uext_ondisk::inode::InodeFlags;
use uext_vfs::{
    Attr, Capabilities, Context, DirSink, Entry, Errno, FileHandle, FileKind, FileSystem, Ino,
    Ioctl, OpenReply, ReadReply, RenameFlags, SetAttr, SetTime, StatFs, Write, WriteFlags,
    XattrFlags,
};

use crate::credits;
use crate::error::{Error, Result};
use crate::file::without_set_id;
use crate::fs::Ext4;
use crate::inode::Inode;
use crate::options::AtimePolicy;

/// Whether a change takes the set-id bits with it. A change of the owner does; and the
/// kernel, which leaves that to the filesystem, asks for nothing else by a change of nothing.
fn kills_suidgid(set: &SetAttr) -> bool {
    let nothing = set.mode.is_none()
        && set.size.is_none()
        && set.atime.is_none()
        && set.mtime.is_none()
        && set.ctime.is_none();
    set.kill_suidgid || set.uid.is_some() || set.gid.is_some() || nothing
}

/// What chattr(1)'s flags forbid.
fn check_flags(inode: &Inode, set: &SetAttr) -> Result<()> {
    let flags = inode.core.lock().flags;
    let immutable = flags.contains(InodeFlags::IMMUTABLE);
    let fixed = immutable || flags.contains(InodeFlags::APPEND);
    let is_time = |time: Option<SetTime>| matches!(time, Some(SetTime::At(_)));
    // Times with a change time come from the kernel's cache of writes that were allowed.
    let from_cache = set.ctime.is_some();
    let sets_times = !from_cache && (is_time(set.atime) || is_time(set.mtime));
    let touches = !from_cache && (set.atime.is_some() || set.mtime.is_some());
    let sets_owner = set.mode.is_some() || set.uid.is_some() || set.gid.is_some();
    let forbidden =
        (fixed && (sets_owner || sets_times || set.size.is_some())) || (immutable && touches);
    if forbidden { Err(Errno::EPERM.into()) } else { Ok(()) }
}

impl Ext4 {
    /// Whether every access is to change a time: `strictatime`.
    fn sees_every_read(&self) -> bool {
        self.options.atime == AtimePolicy::Strict
    }

    fn inode(&self, ino: Ino) -> Result<Arc<Inode>> {
        let ino = u32::try_from(ino).map_err(|_| Error::Errno(Errno::ESTALE))?;
        self.iget(InodeNumber(ino))
    }

    /// The answer for an inode whose lookup was counted, under the lock of its directory.
    /// Nothing is locked any more, so this is where memory for others can be made.
    fn entry(&self, inode: &Arc<Inode>) -> Entry {
        self.shrink_inodes();
        Entry { attr: inode.attr(self.block_size()), generation: inode.generation }
    }

    /// The edge: logs what errno cannot say.
    fn edge<T>(&self, ino: Ino, result: Result<T>) -> uext_vfs::Result<T> {
        result.map_err(|error| {
            self.report(u32::try_from(ino).ok().map(InodeNumber), &error);
            self.store_errors();
            error.errno()
        })
    }

    /// The edge of a change of names, which `sync` and `dirsync` make durable before it returns.
    fn edge_names<T>(&self, ino: Ino, result: Result<T>) -> uext_vfs::Result<T> {
        let done = self.edge(ino, result)?;
        let durable = InodeFlags::SYNC | InodeFlags::DIRSYNC;
        let flagged = || {
            let dir = u32::try_from(ino).ok().and_then(|ino| self.inodes.find(InodeNumber(ino)));
            dir.is_some_and(|dir| dir.core.lock().flags.intersects(durable))
        };
        if self.options.sync || self.options.dirsync || flagged() {
            self.edge(ino, self.commit_names())?;
        }
        Ok(done)
    }

    fn commit_names(&self) -> Result<()> {
        self.flush_replaced(None);
        if self.journal.has_journal() {
            return Ok(self.journal.commit_all()?);
        }
        self.buffers.write_dirty()?;
        self.barrier()
    }

    /// Deletes an inode whose last name went while no front end knew it.
    fn release_unlinked(&self, victim: Option<Arc<Inode>>) -> Result<()> {
        match victim {
            Some(inode) if inode.core.lock().nlink == 0 && self.inodes.lookups(inode.ino) == 0 => {
                self.delete_inode(&inode)
            }
            _ => Ok(()),
        }
    }

    /// Applies what setattr(2) changes except the size.
    fn set_attributes(
        &self,
        ctx: &Context,
        handle: &Handle,
        inode: &Arc<Inode>,
        set: &SetAttr,
    ) -> Result<()> {
        let now = self.now();
        let (mode, group) = {
            let core = inode.core.lock();
            let bits = set.mode.map_or(core.mode, |mode| mode as u16);
            ((core.mode & 0o170_000) | (bits & 0o7777), core.gid)
        };
        let kills = kills_suidgid(set) && inode.kind != FileKind::Directory;
        let mode = if kills { without_set_id(ctx, mode, group) } else { mode };
        let time = |time: SetTime| match time {
            SetTime::Now => now,
            SetTime::At(at) => self.storable_time(at),
        };
        {
            let mut core = inode.core.lock();
            core.mode = mode;
            if let Some(uid) = set.uid {
                core.uid = uid;
            }
            if let Some(gid) = set.gid {
                core.gid = gid;
            }
            if let Some(atime) = set.atime {
                core.atime = time(atime);
            }
            if let Some(mtime) = set.mtime {
                core.mtime = time(mtime);
            }
            core.ctime = set.ctime.unwrap_or(now);
        }
        if set.mode.is_some() {
            self.chmod_acl(handle, inode)?;
        }
        self.mark_attributes_dirty(handle, inode)
    }

    fn set_attr(&self, ctx: &Context, ino: Ino, set: &SetAttr) -> Result<Attr> {
        let inode = self.inode(ino)?;
        self.check_writable()?;
        let _exclusive = inode.rwsem.write();
        check_flags(&inode, set)?;
        if set.size.is_some() || set.kill_suidgid || kills_suidgid(set) {
            self.kill_capability(&inode)?;
        }
        if let Some(size) = set.size {
            match inode.kind {
                FileKind::Regular => self.truncate(&inode, size)?,
                FileKind::Directory => return Err(Errno::EISDIR.into()),
                _ => return Err(Errno::EINVAL.into()),
            }
        }
        let others = SetAttr { size: None, fh: None, ..*set };
        let only_size = set.size.is_some()
            && others.mode.is_none()
            && others.uid.is_none()
            && others.gid.is_none()
            && others.atime.is_none()
            && others.mtime.is_none()
            && !others.kill_suidgid;
        if !only_size {
            let handle = self.start(credits::SETATTR + credits::XATTR)?;
            self.set_attributes(ctx, &handle, &inode, &others)?;
        }
        Ok(inode.attr(self.block_size()))
    }

    fn stat_fs(&self) -> StatFs {
        let (free, reserved, pending) = {
            let space = self.space.lock();
            (space.free, space.reserved, space.pending)
        };
        let bfree = (free + pending).saturating_sub(reserved);
        let ffree: u64 =
            self.groups.list.iter().map(|g| u64::from(g.state.lock().free_inodes)).sum();
        StatFs {
            bsize: self.block_size(),
            blocks: self.sb.blocks_count().saturating_sub(self.overhead),
            bfree,
            bavail: bfree.saturating_sub(self.root_reserve() + self.node_pool()),
            files: u64::from(self.sb.inodes_count()),
            ffree,
            namelen: 255,
        }
    }
}

impl FileSystem for Ext4 {
    fn root(&self) -> Ino {
        Ino::from(InodeNumber::ROOT.0)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            // Every read is to be seen, and what the kernel has cached it reads unseen.
            stateless_open: !self.sees_every_read(),
            posix_acl: self.options.acl,
            read_only: self.is_read_only(),
        }
    }

    fn lookup(&self, ctx: &Context, parent: Ino, name: &[u8]) -> uext_vfs::Result<Entry> {
        let found = self.inode(parent).and_then(|dir| self.lookup_name(ctx, &dir, name));
        self.edge(parent, found).map(|inode| self.entry(&inode))
    }

    fn iget(&self, _ctx: &Context, ino: Ino) -> uext_vfs::Result<Entry> {
        if ino < self.sb.first_ino().0.into() && ino != self.root() {
            return Err(Errno::ESTALE);
        }
        // The kernel asks for what it does not have itself, so an inode without links is on its
        // way out, whatever lookups are still counted.
        match self.inode(ino) {
            Ok(inode) if inode.core.lock().nlink > 0 => {
                self.inodes.count_lookup(&inode);
                Ok(self.entry(&inode))
            }
            _ => Err(Errno::ESTALE),
        }
    }

    fn forget(&self, ino: Ino, count: u64) {
        if let Ok(ino) = u32::try_from(ino) {
            self.forget_inode(InodeNumber(ino), count);
        }
    }

    fn getattr(&self, _ctx: &Context, ino: Ino) -> uext_vfs::Result<Attr> {
        self.edge(ino, self.inode(ino)).map(|inode| inode.attr(self.block_size()))
    }

    fn setattr(&self, ctx: &Context, ino: Ino, set: &SetAttr) -> uext_vfs::Result<Attr> {
        self.edge(ino, self.set_attr(ctx, ino, set))
    }

    fn readlink(&self, _ctx: &Context, ino: Ino) -> uext_vfs::Result<Vec<u8>> {
        let target = self.inode(ino).and_then(|inode| {
            let target = self.read_link(&inode)?;
            self.touch_atime(&inode);
            Ok(target)
        });
        self.edge(ino, target)
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: Ino,
        name: &[u8],
        mode: u32,
        rdev: u32,
    ) -> uext_vfs::Result<Entry> {
        let made = self.inode(parent).and_then(|dir| self.make_node(ctx, &dir, name, mode, rdev));
        self.edge_names(parent, made).map(|inode| self.entry(&inode))
    }

    fn mkdir(&self, ctx: &Context, parent: Ino, name: &[u8], mode: u32) -> uext_vfs::Result<Entry> {
        let made = self.inode(parent).and_then(|dir| self.make_dir(ctx, &dir, name, mode));
        self.edge_names(parent, made).map(|inode| self.entry(&inode))
    }

    fn tmpfile(
        &self,
        ctx: &Context,
        parent: Ino,
        mode: u32,
        _flags: i32,
    ) -> uext_vfs::Result<(Entry, OpenReply)> {
        let made = self.inode(parent).and_then(|dir| self.make_tmpfile(ctx, &dir, mode));
        let entry = self.edge_names(parent, made).map(|inode| self.entry(&inode))?;
        Ok((entry, OpenReply { keep_cache: true, ..OpenReply::default() }))
    }

    fn symlink(
        &self,
        ctx: &Context,
        parent: Ino,
        name: &[u8],
        target: &[u8],
    ) -> uext_vfs::Result<Entry> {
        let made = self.inode(parent).and_then(|dir| self.make_symlink(ctx, &dir, name, target));
        self.edge_names(parent, made).map(|inode| self.entry(&inode))
    }

    fn link(&self, ctx: &Context, ino: Ino, parent: Ino, name: &[u8]) -> uext_vfs::Result<Entry> {
        let made = self.inode(ino).and_then(|inode| {
            let dir = self.inode(parent)?;
            self.make_link(ctx, &inode, &dir, name)?;
            Ok(inode)
        });
        self.edge_names(parent, made).map(|inode| self.entry(&inode))
    }

    fn unlink(&self, ctx: &Context, parent: Ino, name: &[u8]) -> uext_vfs::Result<()> {
        let gone = self.inode(parent).and_then(|dir| self.unlink_name(ctx, &dir, name));
        self.edge_names(parent, gone.and_then(|inode| self.release_unlinked(Some(inode))))
    }

    fn rmdir(&self, ctx: &Context, parent: Ino, name: &[u8]) -> uext_vfs::Result<()> {
        let gone = self.inode(parent).and_then(|dir| self.remove_dir(ctx, &dir, name));
        self.edge_names(parent, gone.and_then(|inode| self.release_unlinked(Some(inode))))
    }

    fn rename(
        &self,
        ctx: &Context,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        flags: RenameFlags,
    ) -> uext_vfs::Result<()> {
        let replaced = self.inode(from.0).and_then(|old_dir| {
            let new_dir = self.inode(to.0)?;
            self.rename_names(ctx, (&old_dir, from.1), (&new_dir, to.1), flags)
        });
        self.edge_names(from.0, replaced.and_then(|inode| self.release_unlinked(inode)))
    }

    fn read(
        &self,
        _ctx: &Context,
        ino: Ino,
        _fh: FileHandle,
        offset: u64,
        len: usize,
        reply: &mut ReadReply,
    ) -> uext_vfs::Result<()> {
        let done = self.inode(ino).and_then(|inode| self.file_read(&inode, offset, len, reply));
        self.edge(ino, done)
    }

    fn write(
        &self,
        ctx: &Context,
        ino: Ino,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
    ) -> uext_vfs::Result<usize> {
        let write = Write { ino, fh, offset, data, flags };
        let done = self.inode(ino).and_then(|inode| self.file_write(ctx, &inode, &write, None));
        self.edge(ino, done)
    }

    fn write_accepted(
        &self,
        ctx: &Context,
        write: &Write<'_>,
        accept: &mut dyn FnMut(usize),
    ) -> uext_vfs::Result<usize> {
        let inode = self.inode(write.ino);
        let done = inode.and_then(|inode| self.file_write(ctx, &inode, write, Some(accept)));
        self.edge(write.ino, done)
    }

    fn fsync(
        &self,
        _ctx: &Context,
        ino: Ino,
        _fh: FileHandle,
        datasync: bool,
    ) -> uext_vfs::Result<()> {
        let done = self.inode(ino).and_then(|inode| self.sync_inode(&inode, datasync));
        self.edge(ino, done)
    }

    /// Asked only on mounts that want opens; else what chattr(1)'s flags forbid shows at the
    /// first write.
    fn open(&self, _ctx: &Context, ino: Ino, flags: i32) -> uext_vfs::Result<OpenReply> {
        let inode = self.edge(ino, self.inode(ino))?;
        let forbids = inode.core.lock().flags;
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let appends = flags & libc::O_APPEND != 0 && flags & libc::O_TRUNC == 0;
        if (writes && forbids.contains(InodeFlags::IMMUTABLE))
            || (writes && !appends && forbids.contains(InodeFlags::APPEND))
        {
            return Err(Errno::EPERM);
        }
        Ok(OpenReply { keep_cache: !self.sees_every_read(), ..OpenReply::default() })
    }

    fn opendir(&self, _ctx: &Context, _ino: Ino) -> uext_vfs::Result<OpenReply> {
        Ok(OpenReply { cache_dir: true, keep_cache: true, ..OpenReply::default() })
    }

    fn readdir(
        &self,
        _ctx: &Context,
        ino: Ino,
        _fh: FileHandle,
        offset: u64,
        sink: &mut dyn DirSink,
    ) -> uext_vfs::Result<()> {
        let done = self.inode(ino).and_then(|dir| self.read_dir(&dir, offset, sink));
        self.edge(ino, done)
    }

    fn prefetch(&self, inos: &[Ino]) {
        self.prefetch_inodes(inos.iter().filter_map(|ino| u32::try_from(*ino).ok()));
    }

    fn statfs(&self, _ctx: &Context) -> uext_vfs::Result<StatFs> {
        Ok(self.stat_fs())
    }

    fn getxattr(&self, ctx: &Context, ino: Ino, name: &[u8]) -> uext_vfs::Result<Vec<u8>> {
        let value = self.inode(ino).and_then(|inode| self.get_xattr(ctx, &inode, name));
        self.edge(ino, value)
    }

    fn listxattr(&self, ctx: &Context, ino: Ino) -> uext_vfs::Result<Vec<u8>> {
        self.edge(ino, self.inode(ino).and_then(|inode| self.list_xattr(ctx, &inode)))
    }

    fn setxattr(
        &self,
        ctx: &Context,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> uext_vfs::Result<()> {
        let done =
            self.inode(ino).and_then(|inode| self.set_xattr(ctx, &inode, name, value, flags));
        self.edge(ino, done)
    }

    fn removexattr(&self, ctx: &Context, ino: Ino, name: &[u8]) -> uext_vfs::Result<()> {
        self.edge(ino, self.inode(ino).and_then(|inode| self.remove_xattr(ctx, &inode, name)))
    }

    fn fallocate(
        &self,
        ctx: &Context,
        ino: Ino,
        offset: u64,
        len: u64,
        mode: i32,
    ) -> uext_vfs::Result<()> {
        let done =
            self.inode(ino).and_then(|inode| self.file_allocate(ctx, &inode, offset, len, mode));
        self.edge(ino, done)
    }

    fn lseek(&self, _ctx: &Context, ino: Ino, offset: u64, whence: i32) -> uext_vfs::Result<u64> {
        self.edge(ino, self.inode(ino).and_then(|inode| self.seek(&inode, offset, whence)))
    }

    fn bmap(&self, _ctx: &Context, ino: Ino, block: u64, block_size: u32) -> uext_vfs::Result<u64> {
        self.edge(ino, self.inode(ino).and_then(|inode| self.block_map(&inode, block, block_size)))
    }

    fn ioctl(
        &self,
        ctx: &Context,
        ino: Ino,
        _fh: FileHandle,
        ioctl: &Ioctl<'_>,
    ) -> uext_vfs::Result<Vec<u8>> {
        self.edge(ino, self.inode(ino).and_then(|inode| self.file_ioctl(ctx, &inode, ioctl)))
    }

    fn sync(&self) -> uext_vfs::Result<()> {
        self.edge(self.root(), self.sync_all())
    }

    fn on_read_only(&self, f: Box<dyn Fn() + Send + Sync>) {
        *self.on_read_only.lock() = Some(f);
    }

    fn known(&self) -> Vec<(Ino, u64)> {
        self.inodes.known().into_iter().map(|(ino, count)| (ino.0.into(), count)).collect()
    }

    fn take_over(&self, known: &[(Ino, u64)]) {
        for &(ino, count) in known {
            if let Ok(ino) = u32::try_from(ino) {
                self.inodes.owe(InodeNumber(ino), count);
            }
        }
    }

    fn unmount(&self) -> uext_vfs::Result<()> {
        self.edge(self.root(), self.unmount_all())
    }
}
