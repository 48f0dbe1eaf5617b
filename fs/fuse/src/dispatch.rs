//! From a request to the filesystem and back: the one boundary behind which all
//! transports stand.
//!
//! A transport hands in a [`Request`] (header, arguments, payload) and a
//! [`ReplyBuf`], and sends the [`Answer`]. A request too short for its structure, or with
//! names that do not end, is `EINVAL`. Locks: that of the unmount's result, held while the filesystem
//! unmounts so that a second caller waits for the first, and that of [`Foresight`], a leaf.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use uext_sync::Mutex;
use uext_vfs::{
    Capabilities, Context, Entry, Errno, FileHandle, FileKind, FileSystem, IOC_COLLAPSE_RANGE,
    IOC_INSERT_RANGE, IOC_REFUSAL, IOC_REMOUNT, Ino, Ioctl, OpenReply, ReadReply, RemountFlags,
    RenameFlags, Result, Write, XattrFlags,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::abi::{self, Fopen, InitFlags, Opcode};
use crate::attr_readers::AttrReaders;
use crate::caller::Caller;
use crate::foresight::Foresight;
use crate::mounted_fs::{MountedFs, Reopen};
use crate::notify::Notifier;
use crate::reply::{self, Answer, Inodes, Listing, ReplyBuf, Timeouts};
use crate::request::{
    NAME_MAX, Request, check_xattr_name, cstr, file_name, one_name, set_attr, write_flags,
    xattr_name,
};
use crate::session::Config;

/// Longest target of a symbolic link, without its NUL.
const SYMLINK_MAX: usize = 4095;
/// Serves requests of one mount.
pub struct Dispatcher {
    fs: MountedFs,
    root: Ino,
    capabilities: Capabilities,
    timeouts: Timeouts,
    config: Config,
    /// Whether rings stand ready, so that `INIT` may ask for them.
    /// PAIRS-WITH: the release of `offer_uring` with the acquire of `wanted_flags`.
    offer_uring: AtomicBool,
    /// Whether the kernel has agreed to rings.
    /// PAIRS-WITH: the release of `init` with the acquire of `uring_agreed`.
    uring_agreed: AtomicBool,
    /// Set once nothing may reach the filesystem any more.
    /// PAIRS-WITH: the release store in `unmount` with the acquire load in `dispatch`.
    gone: AtomicBool,
    /// Because of whom the kernel must be told of changed attributes.
    attr_readers: AttrReaders,
    /// How many inodes listings bring along.
    foresight: Foresight,
    /// [itself] How the unmount went, once it was tried.
    unmounted: Mutex<Option<Result<()>>>,
    /// [unmounted] Run after the unmount, before anybody is told of it.
    after: Mutex<Option<AfterUnmount>>,
    /// Tells the kernel what it cannot know.
    notifier: OnceLock<Notifier>,
}

/// What gives up the claim on the image, say.
pub type AfterUnmount = Box<dyn FnOnce() + Send>;

impl Dispatcher {
    /// For one mount of `fs`.
    pub fn new(fs: Arc<dyn FileSystem>, config: &Config) -> Self {
        let timeouts = Timeouts {
            entry: config.entry_timeout,
            attr: config.attr_timeout,
            negative: config.negative_timeout,
        };
        Self {
            root: fs.root(),
            capabilities: fs.capabilities(),
            fs: MountedFs::new(fs),
            timeouts,
            config: config.clone(),
            offer_uring: AtomicBool::new(false),
            uring_agreed: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            attr_readers: AttrReaders::new(),
            foresight: Foresight::new(),
            unmounted: Mutex::new(None),
            after: Mutex::new(None),
            notifier: OnceLock::new(),
        }
    }

    /// Lets the kernel be told what it cannot know. Once: a dispatcher has one session.
    pub(crate) fn notify_by(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
    }

    /// A request has changed an inode's attributes, and the kernel knows of that only when it gets
    /// the reply: what others have been told before must not count after it.
    fn changed(&self, req: &Request<'_>, ino: Ino) {
        if self.attr_readers.changed(ino, req.header.pid)
            && let Some(notifier) = self.notifier.get()
            && let Err(errno) = notifier.inval_attributes(ino)
        {
            log::warn!("telling of the changed attributes of inode {ino}: {errno}");
        }
    }

    /// Says whether `INIT` may ask for FUSE over io_uring.
    pub(crate) fn offer_uring(&self, offer: bool) {
        self.offer_uring.store(offer, Ordering::Release); // PAIRS-WITH: wanted_flags
        if !offer {
            self.uring_agreed.store(false, Ordering::Release); // PAIRS-WITH: uring_agreed
        }
    }

    /// Whether the kernel has agreed to FUSE over io_uring.
    pub(crate) fn uring_agreed(&self) -> bool {
        self.uring_agreed.load(Ordering::Acquire) // PAIRS-WITH: init
    }

    /// Lets a filesystem that is mounted for reading alone be opened for writing.
    pub(crate) fn reopen_by(&self, reopen: Reopen) {
        self.fs.reopen_by(reopen);
    }

    /// Has `after` run once the filesystem has unmounted, well or not, and before
    /// umount(2) returns.
    pub fn after_unmount(&self, after: AfterUnmount) {
        *self.after.lock() = Some(after);
    }

    /// Unmounts the filesystem, once, whoever comes first: the kernel's `DESTROY` or
    /// the end of the session. Every caller gets the same result.
    ///
    /// # Errors
    /// The filesystem's: the image may not be clean.
    pub fn unmount(&self) -> Result<()> {
        let mut result = self.unmounted.lock();
        *result.get_or_insert_with(|| {
            self.gone.store(true, Ordering::Release); // PAIRS-WITH: dispatch
            let unmounted = self.fs.unmount();
            if let Some(after) = self.after.lock().take() {
                after();
            }
            unmounted
        })
    }

    /// Whether the filesystem was unmounted, whatever the outcome.
    pub fn is_unmounted(&self) -> bool {
        self.unmounted.lock().is_some()
    }

    /// Serves one request.
    pub fn dispatch(&self, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Answer {
        let Some(opcode) = Opcode::from_wire(req.header.opcode) else {
            log::debug!("opcode {} is unknown", req.header.opcode);
            return Answer::Status(Err(Errno::ENOSYS));
        };
        log::trace!("{opcode:?} node {} unique {}", req.header.nodeid, req.header.unique);
        // PAIRS-WITH: unmount. The kernel sends nothing after DESTROY; this is for a
        // kernel, or a fuzzer, that does.
        if self.gone.load(Ordering::Acquire) && opcode != Opcode::Destroy {
            return match opcode {
                Opcode::Forget | Opcode::BatchForget => Answer::None,
                _ => Answer::Status(Err(Errno::ENODEV)),
            };
        }
        if opcode == Opcode::Ioctl
            && let Err(errno) = self.before_ioctl(req)
        {
            return Answer::Status(Err(errno));
        }
        let _in = self.fs.enter();
        match self.serve(opcode, req, out) {
            Ok(answer) => answer,
            Err(_) if matches!(opcode, Opcode::Forget | Opcode::BatchForget) => Answer::None,
            Err(errno) => Answer::Status(Err(errno)),
        }
    }

    fn serve(&self, opcode: Opcode, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        match opcode {
            Opcode::Init => self.init(req, out),
            Opcode::Destroy => Ok(Answer::Status(self.unmount())),
            Opcode::Forget => self.forget(req),
            Opcode::BatchForget => self.batch_forget(req),

            Opcode::Lookup => self.lookup(req, out),
            Opcode::Getattr | Opcode::Statx => self.getattr(opcode, req, out),
            Opcode::Setattr => self.setattr(req, out),
            Opcode::Readlink => {
                let target = self.fs.readlink(&req.context(), self.node(req))?;
                out.put_bytes(&target).map(|()| Answer::Buffer)
            }
            Opcode::Access => {
                let args: abi::AccessIn = req.args()?;
                self.status(self.fs.access(&req.context(), self.node(req), args.mask))
            }

            Opcode::Mknod | Opcode::Mkdir | Opcode::Symlink | Opcode::Link => {
                self.make(opcode, req, out)
            }
            Opcode::Unlink => {
                let name = one_name(req.payload)?;
                self.fs.unlink(&req.context(), self.node(req), name)?;
                self.changed(req, self.node(req));
                Ok(Answer::Status(Ok(())))
            }
            Opcode::Rmdir => {
                let name = one_name(req.payload)?;
                self.fs.rmdir(&req.context(), self.node(req), name)?;
                self.changed(req, self.node(req));
                Ok(Answer::Status(Ok(())))
            }
            Opcode::Rename | Opcode::Rename2 => self.rename(opcode, req),

            Opcode::Open | Opcode::Opendir => self.open(opcode, req, out),
            Opcode::Create | Opcode::Tmpfile => self.create(opcode, req, out),
            Opcode::Release | Opcode::Releasedir => self.release(opcode, req),
            Opcode::Flush => self.flush(req),
            Opcode::Read => self.read(req),
            Opcode::Write => self.write(req, out),
            Opcode::Readdir | Opcode::Readdirplus => self.readdir(opcode, req, out),
            Opcode::Fsync | Opcode::Fsyncdir => self.fsync(opcode, req),
            Opcode::Fallocate => self.fallocate(req),
            Opcode::Lseek => self.lseek(req, out),
            Opcode::Ioctl => self.ioctl(req, out),
            Opcode::Bmap => self.bmap(req, out),

            Opcode::Setxattr => self.setxattr(req),
            Opcode::Getxattr | Opcode::Listxattr => self.getxattr(opcode, req, out),
            Opcode::Removexattr => {
                let name = xattr_name(req.payload)?;
                self.fs.removexattr(&req.context(), self.node(req), name)?;
                self.changed(req, self.node(req));
                Ok(Answer::Status(Ok(())))
            }

            Opcode::Statfs => {
                let stat = self.fs.statfs(&req.context())?;
                out.put(&reply::statfs_out(&stat)).map(|()| Answer::Buffer)
            }
            Opcode::Syncfs => self.status(self.fs.sync()),

            // ENOSYS tells the kernel to do it itself, or never to ask again. For an
            // interrupt that is right too: no operation here waits for an outside event.
            Opcode::Interrupt
            | Opcode::CopyFileRange
            | Opcode::CopyFileRange64
            | Opcode::Getlk
            | Opcode::Setlk
            | Opcode::Setlkw
            | Opcode::Poll
            | Opcode::NotifyReply
            | Opcode::Setupmapping
            | Opcode::Removemapping => Err(Errno::ENOSYS),
        }
    }

    /// The inode a request is about.
    fn node(&self, req: &Request<'_>) -> Ino {
        self.ino(req.header.nodeid)
    }

    fn ino(&self, nodeid: u64) -> Ino {
        reply::swap_root(self.root, nodeid)
    }

    fn status(&self, result: Result<()>) -> Result<Answer> {
        result.map(|()| Answer::Status(Ok(())))
    }

    /// Puts a counted entry into the reply, or gives its count back.
    fn put_entry(&self, entry: &Entry, out: &mut ReplyBuf<'_>) -> Result<()> {
        out.put(&reply::entry_out(entry, self.root, &self.timeouts))
            .inspect_err(|_| self.fs.forget(entry.attr.ino, 1))
    }

    fn init(&self, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let args: abi::InitIn = req.args()?;
        if args.major > abi::KERNEL_VERSION {
            // The kernel asks again with the version it is told.
            out.put(&abi::InitOut { major: abi::KERNEL_VERSION, ..Default::default() })?;
            return Ok(Answer::Buffer);
        }
        if args.major < abi::KERNEL_VERSION || args.minor < abi::MIN_MINOR_VERSION {
            log::error!("the kernel's FUSE {}.{} is too old", args.major, args.minor);
            return Err(Errno::EOPNOTSUPP);
        }
        let offered =
            InitFlags::from_bits_retain(u64::from(args.flags) | (u64::from(args.flags2) << 32));
        let wanted = self.wanted_flags();
        let agreed = wanted & offered;
        log::debug!(
            "FUSE 7.{}: agreed {agreed:?}, refused by the kernel {:?}",
            args.minor,
            wanted.difference(offered)
        );
        let over_uring = agreed.contains(InitFlags::OVER_IO_URING);
        self.uring_agreed.store(over_uring, Ordering::Release); // PAIRS-WITH: uring_agreed
        let bits = agreed.bits();
        let max_write = self.config.max_write();
        out.put(&abi::InitOut {
            major: abi::KERNEL_VERSION,
            minor: abi::KERNEL_MINOR_VERSION.min(args.minor),
            max_readahead: u32::MAX,
            flags: (bits & 0xffff_ffff) as u32,
            flags2: (bits >> 32) as u32,
            max_background: 64,
            congestion_threshold: 48,
            max_write: u32::try_from(max_write).map_err(|_| Errno::EINVAL)?,
            time_gran: 1,
            max_pages: u16::try_from(max_write / crate::PAGE_SIZE).map_err(|_| Errno::EINVAL)?,
            ..Default::default()
        })?;
        Ok(Answer::Buffer)
    }

    fn wanted_flags(&self) -> InitFlags {
        let mut flags = InitFlags::ASYNC_READ
            | InitFlags::BIG_WRITES
            | InitFlags::MAX_PAGES
            | InitFlags::PARALLEL_DIROPS
            | InitFlags::DO_READDIRPLUS
            | InitFlags::ASYNC_DIO
            | InitFlags::CACHE_SYMLINKS
            | InitFlags::EXPLICIT_INVAL_DATA
            | InitFlags::HANDLE_KILLPRIV_V2
            | InitFlags::EXPORT_SUPPORT
            | InitFlags::HAS_IOCTL_DIR
            | InitFlags::ABORT_ERROR
            | InitFlags::SETXATTR_EXT
            | InitFlags::INIT_EXT;
        if self.stateless() {
            flags |= InitFlags::NO_OPEN_SUPPORT | InitFlags::NO_OPENDIR_SUPPORT;
        }
        if self.capabilities.posix_acl {
            flags |= InitFlags::POSIX_ACL | InitFlags::DONT_MASK;
        }
        flags.set(InitFlags::WRITEBACK_CACHE, self.config.writeback_cache);
        // Requests then say who asks only where an inode is made.
        flags.set(InitFlags::ALLOW_IDMAP, self.config.default_permissions);
        let uring = self.offer_uring.load(Ordering::Acquire); // PAIRS-WITH: offer_uring
        flags.set(InitFlags::OVER_IO_URING, uring);
        flags
    }

    /// Whether the kernel is told to send no opens.
    fn stateless(&self) -> bool {
        self.config.no_open.unwrap_or(self.capabilities.stateless_open)
    }

    fn forget(&self, req: &Request<'_>) -> Result<Answer> {
        let args: abi::ForgetIn = req.args()?;
        self.fs.forget(self.node(req), args.nlookup);
        Ok(Answer::None)
    }

    fn batch_forget(&self, req: &Request<'_>) -> Result<Answer> {
        let args: abi::BatchForgetIn = req.args()?;
        // The count is the kernel's word, the payload what is really there.
        let (ones, _) = req.payload.as_chunks::<{ size_of::<abi::ForgetOne>() }>();
        for one in ones.iter().take(usize::try_from(args.count).unwrap_or(usize::MAX)) {
            let one: abi::ForgetOne = zerocopy::transmute!(*one);
            self.fs.forget(self.ino(one.nodeid), one.nlookup);
        }
        Ok(Answer::None)
    }

    fn lookup(&self, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let name = cstr(req.payload)?.0;
        if name.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if name.is_empty() || name.contains(&b'/') {
            return Err(Errno::EINVAL);
        }
        // A file handle is opened by its node alone, which may be of any type.
        let found = match name {
            b"." => self.fs.iget(&req.context(), self.node(req)),
            _ => self.fs.lookup(&req.context(), self.node(req), name),
        };
        match found {
            Ok(mut entry) => {
                self.foresight.looked_up(self.node(req));
                if entry.attr.kind == FileKind::Directory {
                    // Marked first and read after it, which its number was needed for.
                    self.attr_readers.give(entry.attr.ino, req.header.pid);
                    if let Ok(attr) = self.fs.getattr(&req.context(), entry.attr.ino) {
                        entry.attr = attr;
                    }
                }
                self.put_entry(&entry, out)?;
            }
            Err(Errno::ENOENT) if self.timeouts.negative > Duration::ZERO => {
                out.put(&reply::negative_entry(&self.timeouts))?;
            }
            Err(errno) => return Err(errno),
        }
        Ok(Answer::Buffer)
    }

    fn getattr(&self, opcode: Opcode, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        self.attr_readers.give(self.node(req), req.header.pid);
        let attr = self.fs.getattr(&req.context(), self.node(req))?;
        match opcode {
            Opcode::Statx => out.put(&reply::statx_out(&attr, self.timeouts.attr))?,
            _ => out.put(&reply::attr_out(&attr, self.timeouts.attr))?,
        }
        Ok(Answer::Buffer)
    }

    fn setattr(&self, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let args: abi::SetattrIn = req.args()?;
        let attr = self.fs.setattr(&req.context(), self.node(req), &set_attr(&args)?)?;
        out.put(&reply::attr_out(&attr, self.timeouts.attr))?;
        Ok(Answer::Buffer)
    }

    fn make(&self, opcode: Opcode, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let mut ctx = req.context();
        let parent = self.node(req);
        let entry = match opcode {
            Opcode::Mknod => {
                let args: abi::MknodIn = req.args()?;
                ctx.umask = args.umask;
                self.fs.mknod(&ctx, parent, one_name(req.payload)?, args.mode, args.rdev)
            }
            Opcode::Mkdir => {
                let args: abi::MkdirIn = req.args()?;
                ctx.umask = args.umask;
                self.fs.mkdir(&ctx, parent, one_name(req.payload)?, args.mode)
            }
            Opcode::Symlink => {
                let (name, rest) = cstr(req.payload)?;
                let (target, _) = cstr(rest)?;
                if target.len() > SYMLINK_MAX {
                    return Err(Errno::ENAMETOOLONG);
                }
                self.fs.symlink(&ctx, parent, file_name(name)?, target)
            }
            _ => {
                let args: abi::LinkIn = req.args()?;
                self.fs.link(&ctx, self.ino(args.oldnodeid), parent, one_name(req.payload)?)
            }
        }?;
        self.changed(req, parent);
        self.put_entry(&entry, out)?;
        Ok(Answer::Buffer)
    }

    fn rename(&self, opcode: Opcode, req: &Request<'_>) -> Result<Answer> {
        let (newdir, flags) = if opcode == Opcode::Rename {
            (req.args::<abi::RenameIn>()?.newdir, 0)
        } else {
            let args: abi::Rename2In = req.args()?;
            (args.newdir, args.flags)
        };
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::EINVAL)?;
        let (from, rest) = cstr(req.payload)?;
        let (to, _) = cstr(rest)?;
        let (from_dir, to_dir) = (self.node(req), self.ino(newdir));
        let (from, to) = (file_name(from)?, file_name(to)?);
        self.fs.rename(&req.context(), (from_dir, from), (to_dir, to), flags)?;
        self.changed(req, from_dir);
        self.changed(req, to_dir);
        Ok(Answer::Status(Ok(())))
    }

    fn open(&self, opcode: Opcode, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let args: abi::OpenIn = req.args()?;
        if self.stateless() {
            return Err(Errno::ENOSYS);
        }
        let ctx = req.context();
        let open = match opcode {
            Opcode::Open => self.fs.open(&ctx, self.node(req), args.flags.cast_signed())?,
            _ => self.fs.opendir(&ctx, self.node(req))?,
        };
        out.put(&open_out(&open))?;
        Ok(Answer::Buffer)
    }

    fn create(&self, opcode: Opcode, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let args: abi::CreateIn = req.args()?;
        let ctx = Context { umask: args.umask, ..req.context() };
        let (parent, flags) = (self.node(req), args.flags.cast_signed());
        let (entry, open) = match opcode {
            Opcode::Tmpfile => self.fs.tmpfile(&ctx, parent, args.mode, flags)?,
            // The kernel then makes the file by MKNOD, and opens it without asking.
            _ if self.stateless() => return Err(Errno::ENOSYS),
            _ => self.fs.create(&ctx, parent, one_name(req.payload)?, args.mode, flags)?,
        };
        self.changed(req, parent);
        self.put_entry(&entry, out)?;
        out.put(&open_out(&open))?;
        Ok(Answer::Buffer)
    }

    fn release(&self, opcode: Opcode, req: &Request<'_>) -> Result<Answer> {
        let args: abi::ReleaseIn = req.args()?;
        match opcode {
            Opcode::Release => self.fs.release(self.node(req), FileHandle(args.fh)),
            _ => self.fs.releasedir(self.node(req), FileHandle(args.fh)),
        }
        Ok(Answer::Status(Ok(())))
    }

    fn flush(&self, req: &Request<'_>) -> Result<Answer> {
        let args: abi::FlushIn = req.args()?;
        if self.stateless() {
            return Err(Errno::ENOSYS);
        }
        self.status(self.fs.flush(&req.context(), self.node(req), FileHandle(args.fh)))
    }

    fn read(&self, req: &Request<'_>) -> Result<Answer> {
        let args: abi::ReadIn = req.args()?;
        let len = usize::try_from(args.size).map_err(|_| Errno::EINVAL)?;
        if len > self.config.max_write() {
            return Err(Errno::EINVAL);
        }
        let mut data = ReadReply::new();
        let (ino, fh) = (self.node(req), FileHandle(args.fh));
        self.fs.read(&req.context(), ino, fh, args.offset, len, &mut data)?;
        if data.len() > len {
            log::error!("read of inode {ino} gave {} bytes where {len} were asked", data.len());
            return Err(Errno::EIO);
        }
        Ok(Answer::Read(data))
    }

    fn write(&self, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let args: abi::WriteIn = req.args()?;
        let len = usize::try_from(args.size).map_err(|_| Errno::EINVAL)?;
        let data = req.payload.get(..len).ok_or(Errno::EINVAL)?;
        let (ino, fh) = (self.node(req), FileHandle(args.fh));
        let flags = write_flags(args.write_flags, args.flags.cast_signed());
        let reply = |written: usize| {
            let size = u32::try_from(written).ok().filter(|size| *size <= args.size);
            Ok(abi::WriteOut { size: size.ok_or(Errno::EIO)?, padding: 0 })
        };
        let write = Write { ino, fh, offset: args.offset, data, flags };
        let Some(early) = req.early else {
            let written = self.fs.write(&req.context(), ino, fh, args.offset, data, flags)?;
            out.put(&reply(written)?)?;
            return Ok(Answer::Buffer);
        };
        let mut accepted = false;
        let mut accept = |written: usize| {
            if let Ok(body) = reply(written) {
                accepted = early(body.as_bytes());
            }
        };
        let written = self.fs.write_accepted(&req.context(), &write, &mut accept);
        if accepted {
            return Ok(Answer::None);
        }
        out.put(&reply(written?)?)?;
        Ok(Answer::Buffer)
    }

    fn readdir(&self, opcode: Opcode, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let args: abi::ReadIn = req.args()?;
        let list = Listing {
            ino: self.node(req),
            fh: FileHandle(args.fh),
            offset: args.offset,
            size: usize::try_from(args.size).map_err(|_| Errno::EINVAL)?,
        };
        let ctx = req.context();
        match opcode {
            Opcode::Readdir => reply::readdir(&*self.fs, &ctx, &list, out)?,
            _ => {
                let give = |ino| self.attr_readers.give(ino, req.header.pid);
                let worth = |names| self.foresight.worth(list.ino, list.offset == 0, names);
                let with = Inodes { timeouts: &self.timeouts, give: &give, worth: &worth };
                reply::readdirplus(&*self.fs, &ctx, &list, out, &with)?;
            }
        }
        Ok(Answer::Buffer)
    }

    fn fsync(&self, opcode: Opcode, req: &Request<'_>) -> Result<Answer> {
        let args: abi::FsyncIn = req.args()?;
        let datasync = args.fsync_flags & abi::FSYNC_FDATASYNC != 0;
        let (ctx, ino, fh) = (req.context(), self.node(req), FileHandle(args.fh));
        self.status(match opcode {
            Opcode::Fsync => self.fs.fsync(&ctx, ino, fh, datasync),
            _ => self.fs.fsyncdir(&ctx, ino, fh, datasync),
        })
    }

    fn fallocate(&self, req: &Request<'_>) -> Result<Answer> {
        let args: abi::FallocateIn = req.args()?;
        let mode = args.mode.cast_signed();
        let node = self.node(req);
        self.status(self.fs.fallocate(&req.context(), node, args.offset, args.length, mode))
    }

    fn lseek(&self, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let args: abi::LseekIn = req.args()?;
        let whence = args.whence.cast_signed();
        if whence != libc::SEEK_DATA && whence != libc::SEEK_HOLE {
            return Err(Errno::EINVAL);
        }
        let offset = self.fs.lseek(&req.context(), self.node(req), args.offset, whence)?;
        out.put(&abi::LseekOut { offset })?;
        Ok(Answer::Buffer)
    }

    /// A remount that asks for writing may have to open the filesystem anew, which no request
    /// must see half done.
    fn before_ioctl(&self, req: &Request<'_>) -> Result<()> {
        let args: abi::IoctlIn = req.args()?;
        if args.cmd != IOC_REMOUNT {
            return Ok(());
        }
        let (flags, _) = u32::read_from_prefix(req.payload).map_err(|_| Errno::EINVAL)?;
        let read_only = RemountFlags::from_bits_retain(flags).contains(RemountFlags::READ_ONLY);
        if read_only || !req.context().is_root() { Ok(()) } else { self.fs.make_writable() }
    }

    fn ioctl(&self, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let args: abi::IoctlIn = req.args()?;
        if args.flags & abi::IOCTL_UNRESTRICTED != 0 {
            return Err(Errno::ENOTTY);
        }
        let in_size = usize::try_from(args.in_size).map_err(|_| Errno::EINVAL)?;
        let input = req.payload.get(..in_size).ok_or(Errno::EINVAL)?;
        let out_size = usize::try_from(args.out_size).map_err(|_| Errno::EINVAL)?;
        if args.cmd == IOC_REFUSAL {
            let mut text = self.fs.refusal().into_bytes();
            // The last byte ends it.
            text.truncate(out_size.saturating_sub(1));
            text.resize(out_size, 0);
            out.put(&abi::IoctlOut::default())?;
            out.put_bytes(&text)?;
            return Ok(Answer::Buffer);
        }
        let caller = Caller::new(req.header.pid);
        let ioctl = Ioctl { cmd: args.cmd, input, out_size, arg: args.arg, caller: &caller };
        let moves_data = matches!(args.cmd, IOC_COLLAPSE_RANGE | IOC_INSERT_RANGE);
        if moves_data && self.config.writeback_cache {
            // The kernel then believes its own size of the file.
            return Err(Errno::EOPNOTSUPP);
        }
        let data = self.fs.ioctl(&req.context(), self.node(req), FileHandle(args.fh), &ioctl)?;
        if data.len() > out_size {
            return Err(Errno::EIO);
        }
        self.note_ioctl(self.node(req), args.cmd, moves_data);
        out.put(&abi::IoctlOut::default())?;
        out.put_bytes(&data)?;
        Ok(Answer::Buffer)
    }

    /// Has the kernel forget what an ioctl may have changed of an inode: it keeps attributes,
    /// and sees no change in what it passes on.
    fn note_ioctl(&self, ino: Ino, cmd: u32, moves_data: bool) {
        // By its number the caller only hands something in: `_IOW`.
        let writes = cmd >> 30 == 1;
        let Some(notifier) = self.notifier.get().filter(|_| writes) else { return };
        if moves_data {
            return notifier.inval_moved_data(ino);
        }
        // The kernel holds the inode's lock over some of them, which attributes alone do not take.
        if let Err(errno) = notifier.inval_attributes(ino) {
            log::debug!("inode {ino}: the kernel was not told of a change: {errno}");
        }
    }

    fn bmap(&self, req: &Request<'_>, out: &mut ReplyBuf<'_>) -> Result<Answer> {
        let args: abi::BmapIn = req.args()?;
        let block = self.fs.bmap(&req.context(), self.node(req), args.block, args.blocksize)?;
        out.put(&abi::BmapOut { block })?;
        Ok(Answer::Buffer)
    }

    fn setxattr(&self, req: &Request<'_>) -> Result<Answer> {
        let args: abi::SetxattrIn = req.args()?;
        let (name, rest) = cstr(req.payload)?;
        let name = check_xattr_name(name)?;
        let size = usize::try_from(args.size).map_err(|_| Errno::EINVAL)?;
        let value = rest.get(..size).ok_or(Errno::EINVAL)?;
        // Only the two flags of setxattr(2) travel in `flags`.
        let known = XattrFlags::CREATE | XattrFlags::REPLACE;
        let mut flags = XattrFlags::from_bits(args.flags)
            .filter(|flags| known.contains(*flags))
            .ok_or(Errno::EINVAL)?;
        if args.setxattr_flags & abi::SETXATTR_ACL_KILL_SGID != 0 {
            flags |= XattrFlags::ACL_KILL_SGID;
        }
        self.fs.setxattr(&req.context(), self.node(req), name, value, flags)?;
        self.changed(req, self.node(req));
        Ok(Answer::Status(Ok(())))
    }

    fn getxattr(
        &self,
        opcode: Opcode,
        req: &Request<'_>,
        out: &mut ReplyBuf<'_>,
    ) -> Result<Answer> {
        let args: abi::GetxattrIn = req.args()?;
        let (ctx, ino) = (req.context(), self.node(req));
        let value = match opcode {
            Opcode::Getxattr => self.fs.getxattr(&ctx, ino, xattr_name(req.payload)?)?,
            _ => self.fs.listxattr(&ctx, ino)?,
        };
        reply::xattr(&value, args.size, out)?;
        Ok(Answer::Buffer)
    }
}

fn open_out(open: &OpenReply) -> abi::OpenOut {
    let mut flags = Fopen::empty();
    flags.set(Fopen::KEEP_CACHE, open.keep_cache);
    flags.set(Fopen::DIRECT_IO, open.direct_io);
    flags.set(Fopen::CACHE_DIR, open.cache_dir);
    abi::OpenOut { fh: open.fh.0, open_flags: flags.bits(), backing_id: 0 }
}
