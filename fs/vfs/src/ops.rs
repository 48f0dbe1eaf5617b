//! What a filesystem does for a front end.

use bitflags::bitflags;

use crate::errno::{Errno, Result};
use crate::reply::{DirSink, ReadReply};

/// An inode number as a front end sees it; the root is [`FileSystem::root`].
pub type Ino = u64;

/// What [`FileSystem::open`] gave, passed back with every call on the open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FileHandle(pub u64);

/// Who asks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    /// Effective user for permission and ownership, as the filesystem numbers users; or
    /// [`Context::UNKNOWN`] where nothing is made: see [`Context::known`].
    pub uid: u32,
    /// Effective group, the same.
    pub gid: u32,
    /// Thread that asked, 0 when unknown (writeback by the kernel).
    pub pid: u32,
    /// The caller's umask, for creation; already applied to `mode` unless the
    /// filesystem handles default ACLs.
    pub umask: u32,
}

impl Context {
    /// Where mounts may map users and groups, the kernel checks permissions by what it has mapped,
    /// and says who asks only with what makes an inode.
    pub const UNKNOWN: u32 = u32::MAX;

    /// With the user and group that the thread has on this machine, where the kernel has not
    /// said. They stay unknown when it cannot be seen from here, and then have no privileges.
    #[must_use]
    pub fn known(&self) -> Self {
        if self.uid != Self::UNKNOWN || self.pid == 0 {
            return *self;
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid));
        let (uid, gid) = status.ok().and_then(|text| fs_ids(&text)).unwrap_or((self.uid, self.gid));
        Self { uid, gid, ..*self }
    }

    /// Whether it is root, for all that is known.
    pub fn is_root(&self) -> bool {
        self.known().uid == 0
    }
}

/// User and group for access to files, of the text of `/proc/PID/status`.
fn fs_ids(status: &str) -> Option<(u32, u32)> {
    let fourth = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().nth(3)?.parse().ok()
    };
    Some((fourth("Uid:")?, fourth("Gid:")?))
}

/// Seconds and nanoseconds since 1970; nanoseconds below 1,000,000,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds, negative before 1970.
    pub sec: i64,
    /// Nanoseconds.
    pub nsec: u32,
}

impl Timestamp {
    /// The clock's time.
    pub fn now() -> Self {
        match std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
            Ok(since) => Self {
                sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                nsec: since.subsec_nanos(),
            },
            Err(_) => Self::default(),
        }
    }
}

/// The type of a file, as in `st_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// `S_IFREG`
    Regular,
    /// `S_IFDIR`
    Directory,
    /// `S_IFLNK`
    Symlink,
    /// `S_IFBLK`
    BlockDevice,
    /// `S_IFCHR`
    CharDevice,
    /// `S_IFIFO`
    Fifo,
    /// `S_IFSOCK`
    Socket,
}

impl FileKind {
    /// From the type bits of a mode; `None` for bits that name no type.
    pub fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & libc::S_IFMT {
            libc::S_IFREG => Self::Regular,
            libc::S_IFDIR => Self::Directory,
            libc::S_IFLNK => Self::Symlink,
            libc::S_IFBLK => Self::BlockDevice,
            libc::S_IFCHR => Self::CharDevice,
            libc::S_IFIFO => Self::Fifo,
            libc::S_IFSOCK => Self::Socket,
            _ => return None,
        })
    }

    /// The type bits of a mode.
    pub fn mode_bits(self) -> u32 {
        match self {
            Self::Regular => libc::S_IFREG,
            Self::Directory => libc::S_IFDIR,
            Self::Symlink => libc::S_IFLNK,
            Self::BlockDevice => libc::S_IFBLK,
            Self::CharDevice => libc::S_IFCHR,
            Self::Fifo => libc::S_IFIFO,
            Self::Socket => libc::S_IFSOCK,
        }
    }

    /// The `DT_*` number of a directory entry: the type bits, shifted.
    pub fn dirent_type(self) -> u32 {
        self.mode_bits() >> 12
    }
}

/// What stat(2) and statx(2) show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// Type.
    pub kind: FileKind,
    /// Permission bits with set-id and sticky, without type bits.
    pub perm: u16,
    /// Hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device file, in the kernel's new encoding.
    pub rdev: u32,
    /// Bytes.
    pub size: u64,
    /// Units of 512 bytes.
    pub blocks: u64,
    /// Preferred I/O size, bytes.
    pub blksize: u32,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the data.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Birth, where the inode has room for it.
    pub crtime: Option<Timestamp>,
}

/// A name's inode, counted: the front end owes one forget for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its attributes, with the inode number.
    pub attr: Attr,
    /// Generation: an inode number with another generation is another file.
    pub generation: u32,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The filesystem's clock.
    Now,
    /// This time.
    At(Timestamp),
}

/// What to change; `None` leaves a field as it is. `ctime` becomes now unless given.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// Permission bits (type bits ignored).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Truncate or extend to this size.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Change time, by the kernel under writeback cache.
    pub ctime: Option<Timestamp>,
    /// Clear set-user-ID and (when executable by group) set-group-ID, and `security.capability`.
    pub kill_suidgid: bool,
    /// The open file, when the change comes through one.
    pub fh: Option<FileHandle>,
}

bitflags! {
    /// renameat2(2)'s flags.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RenameFlags: u32 {
        /// Fail with `EEXIST` when the new name exists.
        const NOREPLACE = libc::RENAME_NOREPLACE;
        /// Swap the two names.
        const EXCHANGE = libc::RENAME_EXCHANGE;
        /// Leave a whiteout at the old name.
        const WHITEOUT = libc::RENAME_WHITEOUT;
    }

    /// setxattr(2)'s flags.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct XattrFlags: u32 {
        /// Fail with `EEXIST` when the name exists.
        const CREATE = 1;
        /// Fail with `ENODATA` when it does not.
        const REPLACE = 2;
        /// With `system.posix_acl_access`: clear the set-group-ID bit, the caller being
        /// neither of the owning group nor privileged.
        const ACL_KILL_SGID = 1 << 8;
    }

    /// How a write came.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct WriteFlags: u32 {
        /// Delayed write from the kernel's page cache; times are the kernel's business.
        const CACHE = 1;
        /// Clear set-user-ID and set-group-ID bits.
        const KILL_SUIDGID = 4;
        /// `O_SYNC`: durable with all metadata before the reply.
        const SYNC = 1 << 8;
        /// `O_DSYNC`: durable, as fdatasync, before the reply.
        const DSYNC = 1 << 9;
        /// `O_APPEND`: at the end of the file whatever the offset says.
        const APPEND = 1 << 10;
        /// `O_DIRECT`.
        const DIRECT = 1 << 11;
    }
}

/// What open gives.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenReply {
    /// Passed back with every call.
    pub fh: FileHandle,
    /// The kernel's cached pages of the file are still right.
    pub keep_cache: bool,
    /// Bypass the kernel's page cache.
    pub direct_io: bool,
    /// Directories: the kernel may cache the listing.
    pub cache_dir: bool,
}

/// What a front end tells the kernel when it mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// Nothing is kept per open file: `open`, `create`, `flush`, `release`, `opendir` and
    /// `releasedir` need not be called (a file is then made by `mknod` alone), and calls
    /// on open files carry `FileHandle(0)`.
    pub stateless_open: bool,
    /// POSIX ACLs are kept and, where a directory has a default ACL, inherited: `mode`
    /// arrives without the umask applied, and the filesystem applies `Context::umask`
    /// where no default ACL does.
    pub posix_acl: bool,
    /// Nothing can be written, whatever was asked for: the front end mounts read-only.
    pub read_only: bool,
}

bitflags! {
    /// What [`IOC_REMOUNT`] says. Of access times, what is not named stays.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct RemountFlags: u32 {
        /// The mount is read-only; without this, writable.
        const READ_ONLY = 1 << 0;
        /// Access times are not kept.
        const NOATIME = 1 << 1;
        /// Access times are kept when they are older than a change, or than a day.
        const RELATIME = 1 << 2;
        /// Access times of directories are not kept.
        const NODIRATIME = 1 << 3;
        /// Those of directories are kept as those of files are.
        const DIRATIME = 1 << 4;
    }
}

/// The ioctl of a remount, with [`RemountFlags`]: `_IOW('U', 1, u32)`.
pub const IOC_REMOUNT: u32 = 0x4004_5501;

/// Why the last remount was refused, in words, filled up with NUL: `_IOR('U', 5, [u8; 256])`.
pub const IOC_REFUSAL: u32 = 0x8100_5505;

/// FS_IOC_FIEMAP, which FUSE does not carry, with the same argument: `_IOWR('U', 2, fiemap)`.
pub const IOC_FIEMAP: u32 = 0xC020_5502;
/// fallocate(2) with `FALLOC_FL_COLLAPSE_RANGE`, which FUSE does not carry; the argument is
/// offset and length: `_IOW('U', 3, u64[2])`. The caller has written its changes before.
pub const IOC_COLLAPSE_RANGE: u32 = 0x4010_5503;
/// The same with `FALLOC_FL_INSERT_RANGE`: `_IOW('U', 4, u64[2])`.
pub const IOC_INSERT_RANGE: u32 = 0x4010_5504;

/// Memory of the process that asks, for commands whose number does not say what they read
/// and write.
pub trait CallerMemory {
    /// Copies from the caller.
    ///
    /// # Errors
    /// `EFAULT`, or `EOPNOTSUPP` where the front end cannot reach it.
    fn read(&self, address: u64, into: &mut [u8]) -> Result<()>;

    /// Copies to the caller.
    ///
    /// # Errors
    /// As for `read`.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<()>;
}

/// A caller out of reach.
#[derive(Clone, Copy, Debug)]
pub struct NoCallerMemory;

impl CallerMemory for NoCallerMemory {
    fn read(&self, _address: u64, _into: &mut [u8]) -> Result<()> {
        Err(Errno::EOPNOTSUPP)
    }

    fn write(&self, _address: u64, _bytes: &[u8]) -> Result<()> {
        Err(Errno::EOPNOTSUPP)
    }
}

/// An ioctl(2) of fixed size, on an open file or directory.
#[derive(Clone, Copy)]
pub struct Ioctl<'a> {
    /// The command's number, such as `FS_IOC_GETFLAGS`.
    pub cmd: u32,
    /// What the caller handed in.
    pub input: &'a [u8],
    /// The most bytes the caller takes back.
    pub out_size: usize,
    /// The argument itself: for most commands an address of the caller's.
    pub arg: u64,
    /// Where that address leads.
    pub caller: &'a dyn CallerMemory,
}

/// A write(2): all of `data` at `offset`.
#[derive(Clone, Copy)]
pub struct Write<'a> {
    /// The file.
    pub ino: Ino,
    /// As `open` gave it.
    pub fh: FileHandle,
    /// Where the data begins, bytes.
    pub offset: u64,
    /// What is written.
    pub data: &'a [u8],
    /// How.
    pub flags: WriteFlags,
}

/// What statfs(2) shows; block counts in units of `bsize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct StatFs {
    /// Block size, bytes.
    pub bsize: u32,
    /// Blocks in all, without the filesystem's own overhead.
    pub blocks: u64,
    /// Free blocks.
    pub bfree: u64,
    /// Free blocks for an ordinary user.
    pub bavail: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub ffree: u64,
    /// Longest name, bytes.
    pub namelen: u32,
}

/// A mounted filesystem, called from many threads.
///
/// Errors are errno as Linux's own ext4 would give them. Names are bytes without
/// `/` and NUL, 1 to 255 long, never `.` or `..` except in `lookup`. Methods with
/// a default answer `ENOSYS`, which tells the kernel not to ask again.
pub trait FileSystem: Send + Sync {
    /// The root directory's inode number.
    fn root(&self) -> Ino;

    /// What the front end should ask of the kernel. The same for as long as it is mounted.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    /// Resolves one name; counts one lookup of the inode.
    fn lookup(&self, ctx: &Context, parent: Ino, name: &[u8]) -> Result<Entry>;

    /// Counts one lookup of a known inode: readdirplus and file handles. `ESTALE`
    /// when it is not in use.
    fn iget(&self, ctx: &Context, ino: Ino) -> Result<Entry>;

    /// Gives back `count` lookups; at none and no links the inode is deleted.
    fn forget(&self, ino: Ino, count: u64);

    /// Attributes.
    fn getattr(&self, ctx: &Context, ino: Ino) -> Result<Attr>;

    /// Changes attributes and gives them back.
    fn setattr(&self, ctx: &Context, ino: Ino, set: &SetAttr) -> Result<Attr>;

    /// The target of a symbolic link.
    fn readlink(&self, ctx: &Context, ino: Ino) -> Result<Vec<u8>>;

    /// Makes a file of any type but directory and symlink; `mode` has type bits.
    fn mknod(&self, ctx: &Context, parent: Ino, name: &[u8], mode: u32, rdev: u32)
    -> Result<Entry>;

    /// Makes a directory.
    fn mkdir(&self, ctx: &Context, parent: Ino, name: &[u8], mode: u32) -> Result<Entry>;

    /// Makes a symbolic link.
    fn symlink(&self, ctx: &Context, parent: Ino, name: &[u8], target: &[u8]) -> Result<Entry>;

    /// Makes a hard link.
    fn link(&self, ctx: &Context, ino: Ino, parent: Ino, name: &[u8]) -> Result<Entry>;

    /// Removes a name that is not a directory.
    fn unlink(&self, ctx: &Context, parent: Ino, name: &[u8]) -> Result<()>;

    /// Removes an empty directory.
    fn rmdir(&self, ctx: &Context, parent: Ino, name: &[u8]) -> Result<()>;

    /// Renames; `from` and `to` are (directory, name).
    fn rename(
        &self,
        ctx: &Context,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        flags: RenameFlags,
    ) -> Result<()>;

    /// Opens; `flags` are open(2)'s. `O_TRUNC` arrives as a setattr of its own.
    fn open(&self, _ctx: &Context, _ino: Ino, _flags: i32) -> Result<OpenReply> {
        Ok(OpenReply { keep_cache: true, ..OpenReply::default() })
    }

    /// Makes a regular file and opens it.
    fn create(
        &self,
        ctx: &Context,
        parent: Ino,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> Result<(Entry, OpenReply)> {
        let mode = (mode & !libc::S_IFMT) | libc::S_IFREG;
        let entry = self.mknod(ctx, parent, name, mode, 0)?;
        let open = self.open(ctx, entry.attr.ino, flags)?;
        Ok((entry, open))
    }

    /// Makes an open file without a name (`O_TMPFILE`) in the filesystem of `parent`.
    fn tmpfile(
        &self,
        _ctx: &Context,
        _parent: Ino,
        _mode: u32,
        _flags: i32,
    ) -> Result<(Entry, OpenReply)> {
        Err(Errno::EOPNOTSUPP)
    }

    /// Reads at most `len` bytes at `offset` into `reply`; short only at the end of the file.
    fn read(
        &self,
        ctx: &Context,
        ino: Ino,
        fh: FileHandle,
        offset: u64,
        len: usize,
        reply: &mut ReadReply,
    ) -> Result<()>;

    /// Writes all of `data` at `offset`, or fails; gives the bytes written.
    fn write(
        &self,
        ctx: &Context,
        ino: Ino,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
    ) -> Result<usize>;

    /// [`FileSystem::write`] that may let the caller of write(2) go on before it returns. It
    /// calls `accept`, at most once, with the bytes written, and from then on owes what it owes
    /// after a return: whoever reads finds the data, whoever syncs waits for it and hears of
    /// its failure. The data is lent until the return, whose value then means nothing.
    ///
    /// # Errors
    /// As for `write`, when `accept` was not called.
    fn write_accepted(
        &self,
        ctx: &Context,
        write: &Write<'_>,
        _accept: &mut dyn FnMut(usize),
    ) -> Result<usize> {
        self.write(ctx, write.ino, write.fh, write.offset, write.data, write.flags)
    }

    /// One descriptor of an open file was closed; may report a write error without consuming it.
    fn flush(&self, _ctx: &Context, _ino: Ino, _fh: FileHandle) -> Result<()> {
        Ok(())
    }

    /// The last reference of an open file is gone.
    fn release(&self, _ino: Ino, _fh: FileHandle) {}

    /// Makes a file durable; with `datasync`, what is needed to read its data back.
    fn fsync(&self, ctx: &Context, ino: Ino, fh: FileHandle, datasync: bool) -> Result<()>;

    /// Opens a directory.
    fn opendir(&self, _ctx: &Context, _ino: Ino) -> Result<OpenReply> {
        Ok(OpenReply::default())
    }

    /// Lists a directory from `offset` (0, or an entry's `next_offset`) until `sink` is full.
    fn readdir(
        &self,
        ctx: &Context,
        ino: Ino,
        fh: FileHandle,
        offset: u64,
        sink: &mut dyn DirSink,
    ) -> Result<()>;

    /// These inodes are about to be asked for: what of them must be read may be read in one
    /// go. Errors show when they are asked for.
    fn prefetch(&self, _inos: &[Ino]) {}

    /// The last reference of an open directory is gone.
    fn releasedir(&self, _ino: Ino, _fh: FileHandle) {}

    /// Makes a directory durable.
    fn fsyncdir(&self, ctx: &Context, ino: Ino, fh: FileHandle, datasync: bool) -> Result<()> {
        self.fsync(ctx, ino, fh, datasync)
    }

    /// Sizes and free counts.
    fn statfs(&self, ctx: &Context) -> Result<StatFs>;

    /// The value of an extended attribute, by its full name. `ENODATA` when not there.
    fn getxattr(&self, ctx: &Context, ino: Ino, name: &[u8]) -> Result<Vec<u8>>;

    /// Full names, each ended by a NUL.
    fn listxattr(&self, ctx: &Context, ino: Ino) -> Result<Vec<u8>>;

    /// Sets an extended attribute.
    fn setxattr(
        &self,
        ctx: &Context,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()>;

    /// Removes an extended attribute. `ENODATA` when not there.
    fn removexattr(&self, ctx: &Context, ino: Ino, name: &[u8]) -> Result<()>;

    /// access(2); asked only without `default_permissions`.
    fn access(&self, _ctx: &Context, _ino: Ino, _mask: u32) -> Result<()> {
        Err(Errno::ENOSYS)
    }

    /// fallocate(2).
    fn fallocate(
        &self,
        _ctx: &Context,
        _ino: Ino,
        _offset: u64,
        _len: u64,
        _mode: i32,
    ) -> Result<()> {
        Err(Errno::EOPNOTSUPP)
    }

    /// lseek(2) with `SEEK_DATA` and `SEEK_HOLE`.
    fn lseek(&self, _ctx: &Context, _ino: Ino, _offset: u64, _whence: i32) -> Result<u64> {
        Err(Errno::ENOSYS)
    }

    /// Where a block of the file, in units of `block_size`, lies on the device, 0 for a hole:
    /// for swap files and boot loaders, on a mount whose source is a block device.
    fn bmap(&self, _ctx: &Context, _ino: Ino, _block: u64, _block_size: u32) -> Result<u64> {
        Err(Errno::ENOSYS)
    }

    /// ioctl(2); gives what goes back to the caller, at most `out_size` bytes. `ENOTTY`
    /// for a command it does not know.
    fn ioctl(
        &self,
        _ctx: &Context,
        _ino: Ino,
        _fh: FileHandle,
        _ioctl: &Ioctl<'_>,
    ) -> Result<Vec<u8>> {
        Err(Errno::ENOTTY)
    }

    /// Makes everything durable (sync(2), syncfs(2)).
    fn sync(&self) -> Result<()>;

    /// Calls `f` once, when an error makes the filesystem read-only while it is mounted. `f`
    /// is called under locks: it waits for nothing of this filesystem.
    fn on_read_only(&self, _f: Box<dyn Fn() + Send + Sync>) {}

    /// What front ends owe it forgets for: inodes, and how many lookups of each.
    fn known(&self) -> Vec<(Ino, u64)> {
        Vec::new()
    }

    /// Takes the place of a filesystem that has served the same inodes until now and was
    /// [known](Self::known) like this.
    fn take_over(&self, _known: &[(Ino, u64)]) {}

    /// Unmounts: when it returns `Ok`, the image is clean and complete. Called once, last.
    fn unmount(&self) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_is_found_by_the_thread_where_it_is_not_said() {
        let status = "Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9\n";
        assert_eq!(fs_ids(status), Some((4, 8)));
        assert_eq!(fs_ids("Uid:\t1\t2\nGid:\t5\t6\t7\t8\n"), None);
        let unknown = Context::UNKNOWN;
        let asks = |uid, pid| Context { uid, gid: uid, pid, umask: 0 };
        let own = std::fs::read_to_string("/proc/self/status").ok().and_then(|text| fs_ids(&text));
        let found = asks(unknown, std::process::id()).known();
        assert_eq!(Some((found.uid, found.gid)), own);
        assert_eq!(asks(7, std::process::id()).known().uid, 7, "what was said counts");
        assert_eq!(asks(unknown, 0).known().uid, unknown);
        // No thread has this number.
        assert!(!asks(unknown, u32::MAX).is_root());
    }
}
