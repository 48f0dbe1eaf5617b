//! The kernel's FUSE wire format (`include/uapi/linux/fuse.h`, protocol 7.45).
//!
//! Every request is an [`InHeader`], then a structure that its opcode fixes, then
//! names or data. Numbers are in the machine's own byte order, since the other
//! end is the kernel of the same machine. Structures are plain bytes in both
//! directions; a constant assertion holds the size of each.
#![allow(missing_docs, reason = "the fields and constants are the kernel's, by the kernel's names")]

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Major version of the protocol; the kernel must have the same.
pub const KERNEL_VERSION: u32 = 7;
/// Newest minor version whose messages are known here.
pub const KERNEL_MINOR_VERSION: u32 = 45;
/// Oldest minor version served: the first with `INIT_EXT` (Linux 5.17).
pub const MIN_MINOR_VERSION: u32 = 36;
/// The node of the root directory, whatever inode number it has.
pub const ROOT_ID: u64 = 1;
/// The smallest buffer the kernel accepts for `read` on the device.
pub const MIN_READ_BUFFER: usize = 8192;
/// Marks the `unique` of an `INTERRUPT`.
pub const INT_REQ_BIT: u64 = 1;

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident[$size:literal] { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        pub struct $name { $(pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

wire! {
    /// Before every request.
    InHeader[40] {
        len: u32, opcode: u32, unique: u64, nodeid: u64,
        uid: u32, gid: u32, pid: u32,
        // Extensions at the end of the message, in units of 8 bytes.
        total_extlen: u16, padding: u16,
    }
    /// Before every reply and notification; `error` is a negative errno or 0, and of a
    /// notification (`unique` 0) its code.
    OutHeader[16] { len: u32, error: i32, unique: u64, }

    Attr[88] {
        ino: u64, size: u64, blocks: u64,
        atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32,
        mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    EntryOut[128] {
        nodeid: u64, generation: u64,
        entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32,
        attr: Attr,
    }
    AttrOut[104] { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }

    InitIn[64] {
        major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11],
    }
    InitOut[64] {
        major: u32, minor: u32, max_readahead: u32, flags: u32,
        max_background: u16, congestion_threshold: u16, max_write: u32,
        time_gran: u32, max_pages: u16, map_alignment: u16,
        flags2: u32, max_stack_depth: u32, request_timeout: u16, unused: [u16; 11],
    }

    ForgetIn[8] { nlookup: u64, }
    ForgetOne[16] { nodeid: u64, nlookup: u64, }
    BatchForgetIn[8] { count: u32, dummy: u32, }
    InterruptIn[8] { unique: u64, }

    GetattrIn[16] { getattr_flags: u32, dummy: u32, fh: u64, }
    SetattrIn[88] {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64,
        atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32,
        mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    StatxIn[24] { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    SxTime[16] { tv_sec: i64, tv_nsec: u32, reserved: i32, }
    Statx[256] {
        mask: u32, blksize: u32, attributes: u64,
        nlink: u32, uid: u32, gid: u32, mode: u16, spare0: u16,
        ino: u64, size: u64, blocks: u64, attributes_mask: u64,
        atime: SxTime, btime: SxTime, ctime: SxTime, mtime: SxTime,
        rdev_major: u32, rdev_minor: u32, dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    StatxOut[288] {
        attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx,
    }

    MknodIn[16] { mode: u32, rdev: u32, umask: u32, padding: u32, }
    MkdirIn[8] { mode: u32, umask: u32, }
    RenameIn[8] { newdir: u64, }
    Rename2In[16] { newdir: u64, flags: u32, padding: u32, }
    LinkIn[8] { oldnodeid: u64, }

    OpenIn[8] { flags: u32, open_flags: u32, }
    CreateIn[16] { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    OpenOut[16] { fh: u64, open_flags: u32, backing_id: i32, }
    ReleaseIn[24] { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    FlushIn[24] { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    FsyncIn[16] { fh: u64, fsync_flags: u32, padding: u32, }
    SyncfsIn[8] { padding: u64, }

    /// `READ`, `READDIR` and `READDIRPLUS`.
    ReadIn[40] {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64,
        flags: u32, padding: u32,
    }
    WriteIn[40] {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64,
        flags: u32, padding: u32,
    }
    WriteOut[8] { size: u32, padding: u32, }
    /// The fixed part of a directory entry; the name follows, padded to 8 bytes.
    Dirent[24] { ino: u64, off: u64, namelen: u32, kind: u32, }

    Kstatfs[80] {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64,
        bsize: u32, namelen: u32, frsize: u32, padding: u32, spare: [u32; 6],
    }

    SetxattrIn[16] { size: u32, flags: u32, setxattr_flags: u32, padding: u32, }
    /// `GETXATTR` and `LISTXATTR`.
    GetxattrIn[8] { size: u32, padding: u32, }
    GetxattrOut[8] { size: u32, padding: u32, }

    AccessIn[8] { mask: u32, padding: u32, }
    FileLock[24] { start: u64, end: u64, kind: u32, pid: u32, }
    LkIn[48] { fh: u64, owner: u64, lk: FileLock, lk_flags: u32, padding: u32, }
    BmapIn[16] { block: u64, blocksize: u32, padding: u32, }
    BmapOut[8] { block: u64, }
    IoctlIn[32] { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32, }
    IoctlOut[16] { result: i32, flags: u32, in_iovs: u32, out_iovs: u32, }
    PollIn[24] { fh: u64, kh: u64, flags: u32, events: u32, }
    FallocateIn[32] { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    LseekIn[24] { fh: u64, offset: u64, whence: u32, padding: u32, }
    LseekOut[8] { offset: u64, }
    CopyFileRangeIn[56] {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64,
        len: u64, flags: u64,
    }
    NotifyRetrieveIn[40] {
        dummy1: u64, offset: u64, size: u32, dummy2: u32, dummy3: u64, dummy4: u64,
    }
    SetupmappingIn[40] { fh: u64, foffset: u64, len: u64, flags: u64, moffset: u64, }
    RemovemappingIn[4] { count: u32, }

    NotifyInvalInodeOut[24] { ino: u64, off: i64, len: i64, }
    NotifyInvalEntryOut[16] { parent: u64, namelen: u32, flags: u32, }
}

macro_rules! opcodes {
    ($($name:ident = $number:literal, $args:expr;)*) => {
        /// What a request asks.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Opcode { $($name = $number,)* }

        impl Opcode {
            /// From a request's header; `None` for one this protocol version lacks.
            pub fn from_wire(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Bytes of the structure between the header and the names or data.
            pub fn args_len(self) -> usize {
                match self { $(Self::$name => $args,)* }
            }
        }
    };
}

opcodes! {
    Lookup = 1, 0;
    Forget = 2, size_of::<ForgetIn>();
    Getattr = 3, size_of::<GetattrIn>();
    Setattr = 4, size_of::<SetattrIn>();
    Readlink = 5, 0;
    Symlink = 6, 0;
    Mknod = 8, size_of::<MknodIn>();
    Mkdir = 9, size_of::<MkdirIn>();
    Unlink = 10, 0;
    Rmdir = 11, 0;
    Rename = 12, size_of::<RenameIn>();
    Link = 13, size_of::<LinkIn>();
    Open = 14, size_of::<OpenIn>();
    Read = 15, size_of::<ReadIn>();
    Write = 16, size_of::<WriteIn>();
    Statfs = 17, 0;
    Release = 18, size_of::<ReleaseIn>();
    Fsync = 20, size_of::<FsyncIn>();
    Setxattr = 21, size_of::<SetxattrIn>();
    Getxattr = 22, size_of::<GetxattrIn>();
    Listxattr = 23, size_of::<GetxattrIn>();
    Removexattr = 24, 0;
    Flush = 25, size_of::<FlushIn>();
    Init = 26, size_of::<InitIn>();
    Opendir = 27, size_of::<OpenIn>();
    Readdir = 28, size_of::<ReadIn>();
    Releasedir = 29, size_of::<ReleaseIn>();
    Fsyncdir = 30, size_of::<FsyncIn>();
    Getlk = 31, size_of::<LkIn>();
    Setlk = 32, size_of::<LkIn>();
    Setlkw = 33, size_of::<LkIn>();
    Access = 34, size_of::<AccessIn>();
    Create = 35, size_of::<CreateIn>();
    Interrupt = 36, size_of::<InterruptIn>();
    Bmap = 37, size_of::<BmapIn>();
    Destroy = 38, 0;
    Ioctl = 39, size_of::<IoctlIn>();
    Poll = 40, size_of::<PollIn>();
    NotifyReply = 41, size_of::<NotifyRetrieveIn>();
    BatchForget = 42, size_of::<BatchForgetIn>();
    Fallocate = 43, size_of::<FallocateIn>();
    Readdirplus = 44, size_of::<ReadIn>();
    Rename2 = 45, size_of::<Rename2In>();
    Lseek = 46, size_of::<LseekIn>();
    CopyFileRange = 47, size_of::<CopyFileRangeIn>();
    Setupmapping = 48, size_of::<SetupmappingIn>();
    Removemapping = 49, size_of::<RemovemappingIn>();
    Syncfs = 50, size_of::<SyncfsIn>();
    Tmpfile = 51, size_of::<CreateIn>();
    Statx = 52, size_of::<StatxIn>();
    CopyFileRange64 = 53, size_of::<CopyFileRangeIn>();
}

bitflags! {
    /// What both ends can do: `flags` and, from bit 32, `flags2` of `INIT`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct InitFlags: u64 {
        const ASYNC_READ = 1 << 0;
        const POSIX_LOCKS = 1 << 1;
        const ATOMIC_O_TRUNC = 1 << 3;
        const EXPORT_SUPPORT = 1 << 4;
        const BIG_WRITES = 1 << 5;
        const DONT_MASK = 1 << 6;
        const SPLICE_WRITE = 1 << 7;
        const SPLICE_MOVE = 1 << 8;
        const SPLICE_READ = 1 << 9;
        const FLOCK_LOCKS = 1 << 10;
        const HAS_IOCTL_DIR = 1 << 11;
        const AUTO_INVAL_DATA = 1 << 12;
        const DO_READDIRPLUS = 1 << 13;
        const READDIRPLUS_AUTO = 1 << 14;
        const ASYNC_DIO = 1 << 15;
        const WRITEBACK_CACHE = 1 << 16;
        const NO_OPEN_SUPPORT = 1 << 17;
        const PARALLEL_DIROPS = 1 << 18;
        const HANDLE_KILLPRIV = 1 << 19;
        const POSIX_ACL = 1 << 20;
        const ABORT_ERROR = 1 << 21;
        const MAX_PAGES = 1 << 22;
        const CACHE_SYMLINKS = 1 << 23;
        const NO_OPENDIR_SUPPORT = 1 << 24;
        const EXPLICIT_INVAL_DATA = 1 << 25;
        const MAP_ALIGNMENT = 1 << 26;
        const SUBMOUNTS = 1 << 27;
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        const SETXATTR_EXT = 1 << 29;
        const INIT_EXT = 1 << 30;
        const SECURITY_CTX = 1 << 32;
        const HAS_INODE_DAX = 1 << 33;
        const CREATE_SUPP_GROUP = 1 << 34;
        const HAS_EXPIRE_ONLY = 1 << 35;
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
        const PASSTHROUGH = 1 << 37;
        const NO_EXPORT_SUPPORT = 1 << 38;
        const HAS_RESEND = 1 << 39;
        const ALLOW_IDMAP = 1 << 40;
        const OVER_IO_URING = 1 << 41;
        const REQUEST_TIMEOUT = 1 << 42;
    }

    /// `SetattrIn::valid`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Fattr: u32 {
        const MODE = 1 << 0;
        const UID = 1 << 1;
        const GID = 1 << 2;
        const SIZE = 1 << 3;
        const ATIME = 1 << 4;
        const MTIME = 1 << 5;
        const FH = 1 << 6;
        const ATIME_NOW = 1 << 7;
        const MTIME_NOW = 1 << 8;
        const LOCKOWNER = 1 << 9;
        const CTIME = 1 << 10;
        const KILL_SUIDGID = 1 << 11;
    }

    /// `OpenOut::open_flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Fopen: u32 {
        const DIRECT_IO = 1 << 0;
        const KEEP_CACHE = 1 << 1;
        const NONSEEKABLE = 1 << 2;
        const CACHE_DIR = 1 << 3;
        const STREAM = 1 << 4;
        const NOFLUSH = 1 << 5;
        const PARALLEL_DIRECT_WRITES = 1 << 6;
        const PASSTHROUGH = 1 << 7;
    }

    /// `WriteIn::write_flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct WriteInFlags: u32 {
        const CACHE = 1 << 0;
        const LOCKOWNER = 1 << 1;
        const KILL_SUIDGID = 1 << 2;
    }
}

/// `FsyncIn::fsync_flags`: only what is needed to read the data back.
pub const FSYNC_FDATASYNC: u32 = 1;
/// `SetxattrIn::setxattr_flags`: clear set-group-ID with the access ACL.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1;
/// `IoctlIn::flags` this end understands: none that changes the argument's layout.
pub const IOCTL_UNRESTRICTED: u32 = 1 << 1;

/// `OutHeader::error` of a notification: forget attributes and data.
pub const NOTIFY_INVAL_INODE: i32 = 2;
/// `OutHeader::error` of a notification: forget a name.
pub const NOTIFY_INVAL_ENTRY: i32 = 3;

/// `_IOR(229, 0, u32)`: makes a newly opened device another way to a connection.
pub const DEV_IOC_CLONE: u64 = 0x8004_e500;

/// Pads a variable-length record to its boundary.
pub fn rec_align(len: usize) -> usize {
    len.next_multiple_of(8)
}
