//! The `FileSystem` as the `fuser` crate sees it: one method for each request.
//!
//! Each call of the filesystem runs with `Shared::gate` held for reading (`Adapter::run`),
//! so that none is under way when it unmounts.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner,
    OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
};
use uext_vfs::{
    Attr, Context, DirEntry, DirSink, Entry, Errno, FileHandle, FileKind, FileSystem, Ino, Ioctl,
    NoCallerMemory, ReadReply, RenameFlags, Result, SetAttr, XattrFlags,
};

use super::Shared;
use super::convert::{attr, code, context, file_type, open_flags, set_time, timestamp};
use crate::reply::swap_root;
use crate::request::{file_name, write_flags};

/// Names listed at a time: about what a reply holds.
const LIST_BATCH: usize = 256;

fn done(result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(code(errno)),
    }
}

/// Keeps some entries, so that the directory is not locked while they are looked at.
struct Batch(Vec<(Ino, Option<FileKind>, Vec<u8>, u64)>);

impl DirSink for Batch {
    fn add(&mut self, entry: &DirEntry<'_>) -> bool {
        if self.0.len() >= LIST_BATCH {
            return false;
        }
        self.0.push((entry.ino, entry.kind, entry.name.to_vec(), entry.next_offset));
        true
    }
}

/// The `FileSystem` as fuser sees it.
pub(super) struct Adapter(pub(super) Arc<Shared>);

impl Adapter {
    fn named<'a, T>(
        &self,
        name: &'a OsStr,
        run: impl FnOnce(&dyn FileSystem, &'a [u8]) -> Result<T>,
    ) -> Result<T> {
        let name = file_name(name.as_bytes())?;
        let _in = self.0.enter()?;
        run(&*self.0.fs, name)
    }

    fn run<T>(&self, run: impl FnOnce(&dyn FileSystem) -> Result<T>) -> Result<T> {
        let _in = self.0.enter()?;
        run(&*self.0.fs)
    }

    /// Sends a value or list of extended attributes by the protocol of sizes.
    fn xattr(value: Result<Vec<u8>>, size: u32, reply: ReplyXattr) {
        match value.map(|value| (u32::try_from(value.len()), value)) {
            Ok((Ok(len), _)) if size == 0 => reply.size(len),
            Ok((Ok(len), value)) if len <= size => reply.data(&value),
            Ok((Ok(_), _)) => reply.error(code(Errno::ERANGE)),
            Ok((Err(_), _)) => reply.error(code(Errno::E2BIG)),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn list(&self, ctx: &Context, ino: Ino, fh: u64, offset: u64) -> Result<Batch> {
        self.run(|fs| {
            let mut batch = Batch(Vec::new());
            fs.readdir(ctx, ino, FileHandle(fh), offset, &mut batch)?;
            for (ino, kind, _, _) in batch.0.iter_mut().filter(|entry| entry.1.is_none()) {
                *kind = fs.getattr(ctx, *ino).ok().map(|attr| attr.kind);
            }
            Ok(batch)
        })
    }

    /// How long attributes are believed. Of a directory not for long: nobody tells the kernel here
    /// that a reply on its way is older than a change (see [`crate::attr_readers`]).
    fn attr_timeout(&self, attr: &Attr) -> Duration {
        let given = self.0.config.attr_timeout;
        if attr.kind == FileKind::Directory { given.min(Duration::from_secs(1)) } else { given }
    }

    fn reply_entry(&self, result: Result<Entry>, reply: ReplyEntry) {
        match result {
            Ok(entry) => reply.entry_with_ttls(
                &self.attr_timeout(&entry.attr),
                &self.0.config.entry_timeout,
                &attr(self.0.root, &entry.attr),
                Generation(u64::from(entry.generation)),
            ),
            Err(errno) => reply.error(code(errno)),
        }
    }
}

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let shared = &self.0;
        let mut wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_EXPORT_SUPPORT
            | InitFlags::FUSE_HAS_IOCTL_DIR;
        if shared.stateless {
            wanted |= InitFlags::FUSE_NO_OPEN_SUPPORT | InitFlags::FUSE_NO_OPENDIR_SUPPORT;
        }
        if shared.posix_acl {
            wanted |= InitFlags::FUSE_POSIX_ACL | InitFlags::FUSE_DONT_MASK;
        }
        wanted.set(InitFlags::FUSE_WRITEBACK_CACHE, shared.config.writeback_cache);
        let agreed = wanted & config.capabilities();
        let max_write = u32::try_from(shared.config.max_write()).map_err(io::Error::other)?;
        config
            .add_capabilities(agreed)
            .map_err(|flags| io::Error::other(format!("refused by the kernel: {flags:?}")))?;
        config.set_max_write(max_write).map_err(|_| io::Error::other("max_write"))?;
        config.set_max_background(64).map_err(|_| io::Error::other("max_background"))?;
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let parent = self.0.ino(parent);
        let result = self.run(|fs| fs.lookup(&context(req, 0), parent, name.as_bytes()));
        self.reply_entry(result, reply);
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        let ino = self.0.ino(ino);
        // After the unmount nothing is counted any more.
        let _ = self.run(|fs| {
            fs.forget(ino, nlookup);
            Ok(())
        });
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _: Option<fuser::FileHandle>, reply: ReplyAttr) {
        let ino = self.0.ino(ino);
        match self.run(|fs| fs.getattr(&context(req, 0), ino)) {
            Ok(found) => reply.attr(&self.attr_timeout(&found), &attr(self.0.root, &found)),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        fh: Option<fuser::FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let ino = self.0.ino(ino);
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            ctime: ctime.map(timestamp),
            // The kernel, not told otherwise, clears the bits by a mode.
            kill_suidgid: false,
            fh: fh.map(|fh| FileHandle(fh.0)),
        };
        match self.run(|fs| fs.setattr(&context(req, 0), ino, &set)) {
            Ok(found) => reply.attr(&self.attr_timeout(&found), &attr(self.0.root, &found)),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        let ino = self.0.ino(ino);
        match self.run(|fs| fs.readlink(&context(req, 0), ino)) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let parent = self.0.ino(parent);
        let ctx = context(req, umask);
        let result = self.named(name, |fs, name| fs.mknod(&ctx, parent, name, mode, rdev));
        self.reply_entry(result, reply);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let parent = self.0.ino(parent);
        let ctx = context(req, umask);
        let result = self.named(name, |fs, name| fs.mkdir(&ctx, parent, name, mode));
        self.reply_entry(result, reply);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let parent = self.0.ino(parent);
        done(self.named(name, |fs, name| fs.unlink(&context(req, 0), parent, name)), reply);
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let parent = self.0.ino(parent);
        done(self.named(name, |fs, name| fs.rmdir(&context(req, 0), parent, name)), reply);
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let parent = self.0.ino(parent);
        let target = target.as_os_str().as_bytes();
        let ctx = context(req, 0);
        let result = self.named(link_name, |fs, name| fs.symlink(&ctx, parent, name, target));
        self.reply_entry(result, reply);
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = (self.0.ino(parent), self.0.ino(newparent));
        let result = self.named(name, |fs, name| {
            let newname = file_name(newname.as_bytes())?;
            let flags = RenameFlags::from_bits(flags.bits()).ok_or(Errno::EINVAL)?;
            fs.rename(&context(req, 0), (from, name), (to, newname), flags)
        });
        done(result, reply);
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let (ino, parent) = (self.0.ino(ino), self.0.ino(newparent));
        let ctx = context(req, 0);
        let result = self.named(newname, |fs, name| fs.link(&ctx, ino, parent, name));
        self.reply_entry(result, reply);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if self.0.stateless {
            return reply.error(code(Errno::ENOSYS));
        }
        let ino = self.0.ino(ino);
        match self.run(|fs| fs.open(&context(req, 0), ino, flags.0)) {
            Ok(open) => reply.opened(fuser::FileHandle(open.fh.0), open_flags(&open)),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        if self.0.stateless {
            return reply.error(code(Errno::ENOSYS));
        }
        let parent = self.0.ino(parent);
        let ctx = context(req, umask);
        match self.named(name, |fs, name| fs.create(&ctx, parent, name, mode, flags)) {
            Ok((entry, open)) => reply.created(
                &self.attr_timeout(&entry.attr),
                &attr(self.0.root, &entry.attr),
                Generation(u64::from(entry.generation)),
                fuser::FileHandle(open.fh.0),
                open_flags(&open),
            ),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let ino = self.0.ino(ino);
        let result = self.run(|fs| {
            let len = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
            let mut data = ReadReply::new();
            fs.read(&context(req, 0), ino, FileHandle(fh.0), offset, len, &mut data)?;
            if data.len() > len { Err(Errno::EIO) } else { Ok(data) }
        });
        match result {
            Ok(data) => reply.data(&data.to_vec()),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        offset: u64,
        data: &[u8],
        flags: fuser::WriteFlags,
        open_flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let ino = self.0.ino(ino);
        let flags = write_flags(flags.bits(), open_flags.0);
        let ctx = context(req, 0);
        match self.run(|fs| fs.write(&ctx, ino, FileHandle(fh.0), offset, data, flags)) {
            Ok(written) => match u32::try_from(written) {
                Ok(written) => reply.written(written),
                Err(_) => reply.error(code(Errno::EIO)),
            },
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn flush(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        if self.0.stateless {
            return reply.error(code(Errno::ENOSYS));
        }
        let ino = self.0.ino(ino);
        done(self.run(|fs| fs.flush(&context(req, 0), ino, FileHandle(fh.0))), reply);
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let ino = self.0.ino(ino);
        let release = |fs: &dyn FileSystem| {
            fs.release(ino, FileHandle(fh.0));
            Ok(())
        };
        done(self.run(release), reply);
    }

    fn fsync(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let ino = self.0.ino(ino);
        done(self.run(|fs| fs.fsync(&context(req, 0), ino, FileHandle(fh.0), datasync)), reply);
    }

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.0.stateless {
            return reply.error(code(Errno::ENOSYS));
        }
        let ino = self.0.ino(ino);
        match self.run(|fs| fs.opendir(&context(req, 0), ino)) {
            Ok(open) => reply.opened(fuser::FileHandle(open.fh.0), open_flags(&open)),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn readdir(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let ino = self.0.ino(ino);
        match self.list(&context(req, 0), ino, fh.0, offset) {
            Ok(batch) => {
                for (ino, kind, name, next) in batch.0 {
                    // An inode that cannot be read shows as a file; who looks it up is told.
                    let kind = file_type(kind.unwrap_or(FileKind::Regular));
                    let node = INodeNo(swap_root(self.0.root, ino));
                    if reply.add(node, next, kind, OsStr::from_bytes(&name)) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn releasedir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let ino = self.0.ino(ino);
        let release = |fs: &dyn FileSystem| {
            fs.releasedir(ino, FileHandle(fh.0));
            Ok(())
        };
        done(self.run(release), reply);
    }

    fn fsyncdir(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let ino = self.0.ino(ino);
        done(self.run(|fs| fs.fsyncdir(&context(req, 0), ino, FileHandle(fh.0), datasync)), reply);
    }

    fn statfs(&self, req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.run(|fs| fs.statfs(&context(req, 0))) {
            Ok(s) => reply
                .statfs(s.blocks, s.bfree, s.bavail, s.files, s.ffree, s.bsize, s.namelen, s.bsize),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let ino = self.0.ino(ino);
        let flags = XattrFlags::from_bits(flags.cast_unsigned())
            .filter(|flags| !flags.contains(XattrFlags::ACL_KILL_SGID));
        let result = self.run(|fs| {
            let flags = flags.ok_or(Errno::EINVAL)?;
            fs.setxattr(&context(req, 0), ino, name.as_bytes(), value, flags)
        });
        done(result, reply);
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let ino = self.0.ino(ino);
        let value = self.run(|fs| fs.getxattr(&context(req, 0), ino, name.as_bytes()));
        Self::xattr(value, size, reply);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let ino = self.0.ino(ino);
        Self::xattr(self.run(|fs| fs.listxattr(&context(req, 0), ino)), size, reply);
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let ino = self.0.ino(ino);
        done(self.run(|fs| fs.removexattr(&context(req, 0), ino, name.as_bytes())), reply);
    }

    fn access(&self, req: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        let ino = self.0.ino(ino);
        let mask = mask.bits().cast_unsigned();
        done(self.run(|fs| fs.access(&context(req, 0), ino, mask)), reply);
    }

    fn ioctl(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        _flags: IoctlFlags,
        cmd: u32,
        in_data: &[u8],
        out_size: u32,
        reply: ReplyIoctl,
    ) {
        let ino = self.0.ino(ino);
        let result = self.run(|fs| {
            let out_size = usize::try_from(out_size).map_err(|_| Errno::EINVAL)?;
            // The crate does not say where the argument lies.
            let (arg, caller) = (0, &NoCallerMemory);
            let ioctl = Ioctl { cmd, input: in_data, out_size, arg, caller };
            let data = fs.ioctl(&context(req, 0), ino, FileHandle(fh.0), &ioctl)?;
            if data.len() > out_size { Err(Errno::EIO) } else { Ok(data) }
        });
        match result {
            Ok(data) => reply.ioctl(0, &data),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: fuser::FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let ino = self.0.ino(ino);
        done(self.run(|fs| fs.fallocate(&context(req, 0), ino, offset, length, mode)), reply);
    }

    fn lseek(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: fuser::FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let ino = self.0.ino(ino);
        let result = self.run(|fs| {
            let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
            let found = fs.lseek(&context(req, 0), ino, offset, whence)?;
            i64::try_from(found).map_err(|_| Errno::EOVERFLOW)
        });
        match result {
            Ok(offset) => reply.offset(offset),
            Err(errno) => reply.error(code(errno)),
        }
    }
}
