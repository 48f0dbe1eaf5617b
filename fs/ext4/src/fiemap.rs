//! Where a file's blocks lie on the device, as FS_IOC_FIEMAP tells it.
//!
//! FUSE does not carry that ioctl, so it comes by a number of our own with the same
//! argument. The extents behind its header are written into the caller's memory.
//!
//! Locks: `Inode::rwsem` shared, then what [`Ext4::map_lookup`] takes.

use std::sync::Arc;

use uext_ondisk::LogicalBlock;
use uext_vfs::{Errno, FileKind, Ioctl};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;

const FLAG_SYNC: u32 = 1;
const FLAG_XATTR: u32 = 2;
const FLAG_CACHE: u32 = 4;
const EXTENT_LAST: u32 = 0x1;
const EXTENT_UNKNOWN: u32 = 0x2;
const EXTENT_DELALLOC: u32 = 0x4;
const EXTENT_UNWRITTEN: u32 = 0x800;
const EXTENT_MERGED: u32 = 0x1000;
/// Extents that are handed over at once.
const BATCH: usize = 512;

/// `struct fiemap`, without its extents.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// Extents on their way into the caller's memory.
struct Out<'a, 'b> {
    ioctl: &'a Ioctl<'b>,
    /// How many the caller has room for; 0: they are only counted.
    room: u32,
    /// How many there are.
    count: u32,
    /// How many were handed over.
    written: u32,
    batch: Vec<FiemapExtent>,
}

impl Out<'_, '_> {
    /// Whether there is room for another.
    fn has_room(&self) -> bool {
        self.room == 0 || self.count < self.room
    }

    fn push(&mut self, extent: FiemapExtent) -> Result<()> {
        self.count += 1;
        if self.room > 0 {
            if self.batch.len() == BATCH {
                self.hand_over()?;
            }
            self.batch.push(extent);
        }
        Ok(())
    }

    fn hand_over(&mut self) -> Result<()> {
        let behind =
            size_of::<Fiemap>() as u64 + u64::from(self.written) * size_of::<FiemapExtent>() as u64;
        let address = self.ioctl.arg.checked_add(behind).ok_or(Error::Errno(Errno::EFAULT))?;
        self.ioctl.caller.write(address, self.batch.as_bytes())?;
        self.written += u32::try_from(self.batch.len()).unwrap_or(u32::MAX);
        self.batch.clear();
        Ok(())
    }
}

impl Ext4 {
    /// Tells the extents of a range; gives the header that goes back.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for what is neither file nor directory, `EINVAL` for a range of nothing,
    /// `EBADR` for a flag that is not known, `EFBIG` for a start that no file reaches.
    pub(crate) fn fiemap(&self, inode: &Arc<Inode>, ioctl: &Ioctl<'_>) -> Result<Vec<u8>> {
        let (mut head, _) =
            Fiemap::read_from_prefix(ioctl.input).map_err(|_| Error::Errno(Errno::EINVAL))?;
        if !matches!(inode.kind, FileKind::Regular | FileKind::Directory) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        if head.length == 0 {
            return Err(Errno::EINVAL.into());
        }
        if head.start > self.max_file_size(inode) {
            return Err(Errno::EFBIG.into());
        }
        if head.flags & !(FLAG_SYNC | FLAG_XATTR | FLAG_CACHE) != 0 {
            return Err(Errno(libc::EBADR).into());
        }
        if head.flags & FLAG_SYNC != 0 && inode.kind == FileKind::Regular {
            self.flush_data(inode)?;
        }
        let end = head.start.saturating_add(head.length);
        let mut out =
            Out { ioctl, room: head.extent_count, count: 0, written: 0, batch: Vec::new() };
        {
            let _shared = inode.rwsem.read();
            if head.flags & FLAG_XATTR != 0 {
                self.attribute_extent(inode, &mut out)?;
            } else {
                self.list_extents(
                    inode,
                    self.block_at(head.start),
                    self.block_behind(end),
                    &mut out,
                )?;
            }
        }
        out.hand_over()?;
        head.mapped_extents = out.count;
        Ok(head.as_bytes().to_vec())
    }

    /// The block of extended attributes; those in the inode have none of their own.
    fn attribute_extent(&self, inode: &Inode, out: &mut Out<'_, '_>) -> Result<()> {
        let block = inode.core.lock().file_acl;
        if block.0 == 0 {
            return Ok(());
        }
        let block_size = u64::from(self.block_size());
        out.push(FiemapExtent {
            physical: block.0 * block_size,
            length: block_size,
            flags: EXTENT_LAST,
            ..FiemapExtent::default()
        })
    }

    fn list_extents(
        &self,
        inode: &Inode,
        first: u32,
        end: u32,
        out: &mut Out<'_, '_>,
    ) -> Result<()> {
        let block_size = u64::from(self.block_size());
        let merged = if inode.core.lock().is_extents() { 0 } else { EXTENT_MERGED };
        let (mut at, mut last) = (first, None);
        while at < end && out.has_room() {
            let (delayed_end, next_delayed) = {
                let delayed = inode.data.delayed.lock();
                (delayed.end_of(at), delayed.next(at).unwrap_or(end))
            };
            let (len, physical, flags) = if let Some(stop) = delayed_end {
                (stop.min(end) - at, Some(0), EXTENT_DELALLOC | EXTENT_UNKNOWN)
            } else {
                let most = next_delayed.min(end) - at;
                let run = self.map_lookup(inode, LogicalBlock(at), most)?;
                let unwritten = if run.unwritten { EXTENT_UNWRITTEN } else { 0 };
                let physical = run.start.map(|start| start.0 * block_size);
                (run.len.min(most), physical, unwritten | merged)
            };
            if let Some(physical) = physical {
                // The one before is now known not to be the last.
                let extent = FiemapExtent {
                    logical: u64::from(at) * block_size,
                    physical,
                    length: u64::from(len) * block_size,
                    flags,
                    ..FiemapExtent::default()
                };
                if let Some(before) = last.replace(extent) {
                    out.push(before)?;
                }
            }
            at += len;
        }
        match last {
            Some(extent) if out.has_room() => {
                out.push(FiemapExtent { flags: extent.flags | EXTENT_LAST, ..extent })
            }
            _ => Ok(()),
        }
    }
}
