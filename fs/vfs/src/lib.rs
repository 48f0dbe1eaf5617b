//! The traits between a filesystem and its front ends.
//!
//! A front end (`/dev/fuse` today) holds an `Arc<dyn FileSystem>` and calls it
//! from many threads. Everything is by inode number: names are resolved one
//! component at a time, and what a front end learned by [`FileSystem::lookup`]
//! it gives back by [`FileSystem::forget`].
//!
//! Locks: this crate holds none while it calls a filesystem.
#![forbid(unsafe_code)]

pub mod errno;
pub mod ops;
pub mod reply;

pub use errno::{Errno, Result};
pub use ops::{
    Attr, CallerMemory, Capabilities, Context, Entry, FileHandle, FileKind, FileSystem,
    IOC_COLLAPSE_RANGE, IOC_FIEMAP, IOC_INSERT_RANGE, IOC_REFUSAL, IOC_REMOUNT, Ino, Ioctl,
    NoCallerMemory, OpenReply, RemountFlags, RenameFlags, SetAttr, SetTime, StatFs, Timestamp,
    Write, WriteFlags, XattrFlags,
};
pub use reply::{DirEntry, DirSink, ReadReply, ReadSegment};
