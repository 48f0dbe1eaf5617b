//! Replies: a buffer the transport lends, and what goes into it.
//!
//! Everything but read data is built in the [`ReplyBuf`]; read data stays where
//! it is and goes out by [`Answer::Read`].

use std::time::Duration;

use uext_vfs::{
    Attr, Context, DirEntry, DirSink, Entry, Errno, FileHandle, FileSystem, Ino, ReadReply, Result,
    StatFs, Timestamp,
};
use zerocopy::{Immutable, IntoBytes};

use crate::abi;

/// What a request came to.
pub enum Answer {
    /// The kernel waits for nothing.
    None,
    /// An error, or success without data when `Ok`.
    Status(Result<()>),
    /// What the reply buffer holds.
    Buffer,
    /// Data from where it lies.
    Read(ReadReply),
}

/// Bytes of a reply after its header, in memory that the transport lends.
pub struct ReplyBuf<'a> {
    bytes: &'a mut [u8],
    len: usize,
}

impl<'a> ReplyBuf<'a> {
    /// An empty reply that can take `bytes.len()` bytes.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes, len: 0 }
    }

    /// What was put in.
    pub fn filled(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Appends bytes, all or none.
    ///
    /// # Errors
    /// `ERANGE` when they do not fit.
    pub fn put_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.len.checked_add(bytes.len()).ok_or(Errno::ERANGE)?;
        self.bytes.get_mut(self.len..end).ok_or(Errno::ERANGE)?.copy_from_slice(bytes);
        self.len = end;
        Ok(())
    }

    /// Appends a structure.
    pub(crate) fn put<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<()> {
        self.put_bytes(value.as_bytes())
    }

    /// Appends zeroes up to the boundary of records.
    fn pad(&mut self) -> Result<()> {
        let pad = abi::rec_align(self.len) - self.len;
        self.put_bytes(&[0; 8][..pad])
    }
}

/// How long the kernel may believe what it was told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    pub entry: Duration,
    pub attr: Duration,
    pub negative: Duration,
}

/// Exchanges the root's inode number with the node the kernel calls the root.
///
/// The map is its own inverse and keeps numbers apart even for a filesystem that
/// shows the inode numbered [`abi::ROOT_ID`].
pub(crate) fn swap_root(root: Ino, number: u64) -> u64 {
    match number {
        abi::ROOT_ID => root,
        _ if number == root => abi::ROOT_ID,
        _ => number,
    }
}

pub(crate) fn attr(from: &Attr) -> abi::Attr {
    abi::Attr {
        ino: from.ino,
        size: from.size,
        blocks: from.blocks,
        // The wire's seconds are the bits of a signed number.
        atime: from.atime.sec.cast_unsigned(),
        mtime: from.mtime.sec.cast_unsigned(),
        ctime: from.ctime.sec.cast_unsigned(),
        atimensec: from.atime.nsec,
        mtimensec: from.mtime.nsec,
        ctimensec: from.ctime.nsec,
        mode: from.kind.mode_bits() | u32::from(from.perm & 0o7777),
        nlink: from.nlink,
        uid: from.uid,
        gid: from.gid,
        rdev: from.rdev,
        blksize: from.blksize,
        flags: 0,
    }
}

pub(crate) fn attr_out(from: &Attr, valid: Duration) -> abi::AttrOut {
    abi::AttrOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        dummy: 0,
        attr: attr(from),
    }
}

pub(crate) fn entry_out(from: &Entry, root: Ino, timeouts: &Timeouts) -> abi::EntryOut {
    abi::EntryOut {
        nodeid: swap_root(root, from.attr.ino),
        generation: u64::from(from.generation),
        entry_valid: timeouts.entry.as_secs(),
        attr_valid: timeouts.attr.as_secs(),
        entry_valid_nsec: timeouts.entry.subsec_nanos(),
        attr_valid_nsec: timeouts.attr.subsec_nanos(),
        attr: attr(&from.attr),
    }
}

/// The answer that a name does not exist, to be remembered.
pub(crate) fn negative_entry(timeouts: &Timeouts) -> abi::EntryOut {
    abi::EntryOut {
        entry_valid: timeouts.negative.as_secs(),
        entry_valid_nsec: timeouts.negative.subsec_nanos(),
        ..abi::EntryOut::default()
    }
}

pub(crate) fn statx_out(from: &Attr, valid: Duration) -> abi::StatxOut {
    let time = |t: Timestamp| abi::SxTime { tv_sec: t.sec, tv_nsec: t.nsec, reserved: 0 };
    let born = if from.crtime.is_some() { libc::STATX_BTIME } else { 0 };
    let mode = from.kind.mode_bits() | u32::from(from.perm & 0o7777);
    abi::StatxOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        stat: abi::Statx {
            mask: libc::STATX_BASIC_STATS | born,
            blksize: from.blksize,
            nlink: from.nlink,
            uid: from.uid,
            gid: from.gid,
            // The type and permission bits of a mode are the low sixteen.
            mode: (mode & 0xffff) as u16,
            ino: from.ino,
            size: from.size,
            blocks: from.blocks,
            atime: time(from.atime),
            btime: time(from.crtime.unwrap_or_default()),
            ctime: time(from.ctime),
            mtime: time(from.mtime),
            // The new encoding: 12 bits of major between 8 and 12 bits of minor.
            rdev_major: (from.rdev >> 8) & 0xfff,
            rdev_minor: (from.rdev & 0xff) | ((from.rdev >> 12) & 0xfff00),
            ..abi::Statx::default()
        },
        ..abi::StatxOut::default()
    }
}

pub(crate) fn statfs_out(from: &StatFs) -> abi::Kstatfs {
    abi::Kstatfs {
        blocks: from.blocks,
        bfree: from.bfree,
        bavail: from.bavail,
        files: from.files,
        ffree: from.ffree,
        bsize: from.bsize,
        namelen: from.namelen,
        frsize: from.bsize,
        ..abi::Kstatfs::default()
    }
}

/// What a listing asks.
#[derive(Clone, Copy)]
pub(crate) struct Listing {
    pub ino: Ino,
    pub fh: FileHandle,
    pub offset: u64,
    pub size: usize,
}

/// Takes entries as `READDIR` wants them.
struct Plain<'a, 'b> {
    out: &'a mut ReplyBuf<'b>,
    room: usize,
}

impl DirSink for Plain<'_, '_> {
    fn add(&mut self, entry: &DirEntry<'_>) -> bool {
        let record = abi::rec_align(size_of::<abi::Dirent>() + entry.name.len());
        if record > self.room || put_dirent(self.out, entry).is_err() {
            return false;
        }
        self.room -= record;
        true
    }
}

fn put_dirent(out: &mut ReplyBuf<'_>, entry: &DirEntry<'_>) -> Result<()> {
    out.put(&abi::Dirent {
        ino: entry.ino,
        off: entry.next_offset,
        namelen: u32::try_from(entry.name.len()).map_err(|_| Errno::ENAMETOOLONG)?,
        kind: entry.kind.map_or(u32::from(libc::DT_UNKNOWN), |kind| kind.dirent_type()),
    })?;
    out.put_bytes(entry.name)?;
    out.pad()
}

/// Lists names.
pub(crate) fn readdir(
    fs: &dyn FileSystem,
    ctx: &Context,
    list: &Listing,
    out: &mut ReplyBuf<'_>,
) -> Result<()> {
    let room = list.size.min(out.bytes.len());
    fs.readdir(ctx, list.ino, list.fh, list.offset, &mut Plain { out, room })
}

/// Takes entries as `READDIRPLUS` wants them, the inodes left out: the directory is
/// locked while it lists, so they are looked up when it has finished.
struct Plus<'a, 'b> {
    out: &'a mut ReplyBuf<'b>,
    room: usize,
    /// Where in `out` each entry's inode goes, and its number.
    wanted: Vec<(usize, Ino)>,
}

impl DirSink for Plus<'_, '_> {
    fn add(&mut self, entry: &DirEntry<'_>) -> bool {
        let fixed = size_of::<abi::EntryOut>() + size_of::<abi::Dirent>();
        let record = abi::rec_align(fixed + entry.name.len());
        if record > self.room {
            return false;
        }
        let at = self.out.len;
        if self.out.put(&abi::EntryOut::default()).is_err() || put_dirent(self.out, entry).is_err()
        {
            self.out.len = at;
            return false;
        }
        self.room -= record;
        // The kernel takes no inode, and so no count, for these two.
        if entry.name != b"." && entry.name != b".." {
            self.wanted.push((at, entry.ino));
        }
        true
    }
}

/// How the inodes of a listing are given.
pub(crate) struct Inodes<'a> {
    pub timeouts: &'a Timeouts,
    /// Called with each inode before its attributes are read.
    pub give: &'a dyn Fn(Ino),
    /// How many of so many names get their inodes.
    pub worth: &'a dyn Fn(usize) -> usize,
}

/// Lists names with the inodes that are worth it; each inode that stands in the reply is counted
/// once.
pub(crate) fn readdirplus(
    fs: &dyn FileSystem,
    ctx: &Context,
    list: &Listing,
    out: &mut ReplyBuf<'_>,
    with: &Inodes<'_>,
) -> Result<()> {
    let room = list.size.min(out.bytes.len());
    let mut sink = Plus { out, room, wanted: Vec::new() };
    fs.readdir(ctx, list.ino, list.fh, list.offset, &mut sink)?;
    let root = fs.root();
    let Plus { out, mut wanted, .. } = sink;
    // A name whose inode is left out keeps node 0 and is looked up when it is asked for.
    wanted.truncate((with.worth)(wanted.len()));
    let inos: Vec<Ino> = wanted.iter().map(|(_, ino)| *ino).collect();
    fs.prefetch(&inos);
    for (at, ino) in wanted {
        // An inode that cannot be read, or went since, keeps node 0: the name is listed,
        // and the error is for whoever looks it up.
        (with.give)(ino);
        if let Ok(entry) = fs.iget(ctx, ino) {
            let bytes = entry_out(&entry, root, with.timeouts);
            out.bytes[at..at + size_of::<abi::EntryOut>()].copy_from_slice(bytes.as_bytes());
        }
    }
    Ok(())
}

/// An extended attribute's value or list: its length when `size` is 0, else all of it.
pub(crate) fn xattr(value: &[u8], size: u32, out: &mut ReplyBuf<'_>) -> Result<()> {
    let len = u32::try_from(value.len()).map_err(|_| Errno::E2BIG)?;
    if size == 0 {
        return out.put(&abi::GetxattrOut { size: len, padding: 0 });
    }
    if len > size {
        return Err(Errno::ERANGE);
    }
    out.put_bytes(value)
}
