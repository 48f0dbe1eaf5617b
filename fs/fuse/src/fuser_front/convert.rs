//! Values between the `fuser` crate and the `FileSystem` traits, both ways.
//!
//! No locks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, FopenFlags, INodeNo, Request, TimeOrNow};
use uext_vfs::{Attr, Context, Errno, FileKind, Ino, OpenReply, SetTime, Timestamp};

use crate::reply::swap_root;

pub(super) fn code(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.0)
}

pub(super) fn context(req: &Request, umask: u32) -> Context {
    Context { uid: req.uid(), gid: req.gid(), pid: req.pid(), umask }
}

fn system_time(time: Timestamp) -> SystemTime {
    let whole = Duration::from_secs(time.sec.unsigned_abs());
    let base = match time.sec {
        ..0 => UNIX_EPOCH.checked_sub(whole),
        _ => UNIX_EPOCH.checked_add(whole),
    };
    let nanos = Duration::from_nanos(u64::from(time.nsec));
    base.and_then(|base| base.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    let seconds = |since: Duration| i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => Timestamp { sec: seconds(since), nsec: since.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            match before.subsec_nanos() {
                0 => Timestamp { sec: -seconds(before), nsec: 0 },
                nsec => Timestamp { sec: -seconds(before) - 1, nsec: 1_000_000_000 - nsec },
            }
        }
    }
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(timestamp(time)),
    }
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
    }
}

/// The attributes, with the kernel's number for the root.
pub(super) fn attr(root: Ino, from: &Attr) -> FileAttr {
    FileAttr {
        // This front shows the node's number as the inode's, so the root's is the kernel's.
        ino: INodeNo(swap_root(root, from.ino)),
        size: from.size,
        blocks: from.blocks,
        atime: system_time(from.atime),
        mtime: system_time(from.mtime),
        ctime: system_time(from.ctime),
        crtime: system_time(from.crtime.unwrap_or_default()),
        kind: file_type(from.kind),
        perm: from.perm & 0o7777,
        nlink: from.nlink,
        uid: from.uid,
        gid: from.gid,
        rdev: from.rdev,
        blksize: from.blksize,
        flags: 0,
    }
}

pub(super) fn open_flags(open: &OpenReply) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, open.keep_cache);
    flags.set(FopenFlags::FOPEN_DIRECT_IO, open.direct_io);
    flags.set(FopenFlags::FOPEN_CACHE_DIR, open.cache_dir);
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_survive_the_detour() {
        for time in [(0, 0), (-1, 0), (-1, 999_999_999), (-5, 1), (1 << 34, 7)] {
            let time = Timestamp { sec: time.0, nsec: time.1 };
            assert_eq!(timestamp(system_time(time)), time);
        }
    }
}
