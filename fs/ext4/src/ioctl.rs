//! ioctl(2): flags of inodes, the label, trimming and shutting down.
//!
//! Who may do what is checked by the kernel where it can: it knows the owner and the
//! capabilities, and hands flags on only after `vfs_fileattr_set` has agreed. What it passes
//! through unseen is root's here.
//!
//! Numbers in arguments have the machine's own byte order.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use uext_jbd2::JournalError;
use uext_ondisk::inode::InodeFlags;
use uext_vfs::{
    Context, Errno, FileKind, IOC_COLLAPSE_RANGE, IOC_FIEMAP, IOC_INSERT_RANGE, IOC_REMOUNT, Ioctl,
    RemountFlags,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::credits;
use crate::error::{Error, Result};
use crate::extents::MAX_BLOCKS;
use crate::fs::Ext4;
use crate::inode::Inode;

const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
const FS_IOC_FSGETXATTR: u32 = 0x801C_581F;
const FS_IOC_FSSETXATTR: u32 = 0x401C_5820;
const FS_IOC_GETVERSION: u32 = 0x8008_7601;
const FS_IOC_SETVERSION: u32 = 0x4008_7602;
const EXT4_IOC_GETVERSION: u32 = 0x8008_6603;
const EXT4_IOC_SETVERSION: u32 = 0x4008_6604;
const FS_IOC_GETFSLABEL: u32 = 0x8100_9431;
const FS_IOC_SETFSLABEL: u32 = 0x4100_9432;
const EXT4_IOC_GETFSUUID: u32 = 0x8008_662C;
const FS_IOC_GETFSUUID: u32 = 0x8011_1500;
const FITRIM: u32 = 0xC018_5879;
const EXT4_IOC_SHUTDOWN: u32 = 0x8004_587D;

/// Longest label, bytes.
const LABEL_MAX: usize = 16;
const UUID_SIZE: u32 = 16;

/// Flags that are shown (`EXT4_FL_USER_VISIBLE`).
const VISIBLE: u32 = 0x725B_DFFF;
/// Flags that can be set (`EXT4_FL_USER_MODIFIABLE`).
const MODIFIABLE: u32 = 0x624B_C0FF;
/// Flags that both ways of setting them know (`FS_COMMON_FL`), and their names in the other.
const COMMON: [(InodeFlags, u32); 7] = [
    (InodeFlags::IMMUTABLE, 0x0008),
    (InodeFlags::APPEND, 0x0010),
    (InodeFlags::SYNC, 0x0020),
    (InodeFlags::NOATIME, 0x0040),
    (InodeFlags::NODUMP, 0x0080),
    (InodeFlags::PROJINHERIT, 0x0200),
    (InodeFlags::DAX, 0x8000),
];
/// Of the flags that can be set, what only directories have.
const DIR_ONLY: InodeFlags = InodeFlags::DIRSYNC
    .union(InodeFlags::TOPDIR)
    .union(InodeFlags::CASEFOLD)
    .union(InodeFlags::PROJINHERIT);
/// What cannot be changed here: the kind of mapping, and what needs features.
const FIXED: InodeFlags =
    InodeFlags::EXTENTS.union(InodeFlags::EOFBLOCKS).union(InodeFlags::CASEFOLD);

/// `struct fsxattr`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct FsXattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

/// `struct fstrim_range`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct TrimRange {
    start: u64,
    len: u64,
    minlen: u64,
}

fn argument<T: FromBytes + Immutable + KnownLayout>(ioctl: &Ioctl<'_>) -> Result<T> {
    T::read_from_prefix(ioctl.input).map(|(value, _)| value).map_err(|_| Errno::EINVAL.into())
}

fn root_only(ctx: &Context) -> Result<()> {
    if ctx.is_root() { Ok(()) } else { Err(Errno::EPERM.into()) }
}

impl Ext4 {
    /// ioctl(2) on an open file or directory.
    ///
    /// # Errors
    /// `ENOTTY` for a command that is not known here; else the command's own.
    pub(crate) fn file_ioctl(
        &self,
        ctx: &Context,
        inode: &Arc<Inode>,
        ioctl: &Ioctl<'_>,
    ) -> Result<Vec<u8>> {
        let none = |()| Vec::new();
        match ioctl.cmd {
            FS_IOC_GETFLAGS => Ok(self.visible_flags(inode).as_bytes().to_vec()),
            FS_IOC_SETFLAGS => self.set_flags(ctx, inode, argument(ioctl)?).map(none),
            FS_IOC_FSGETXATTR => Ok(self.fsxattr(inode)?.as_bytes().to_vec()),
            FS_IOC_FSSETXATTR => self.set_fsxattr(ctx, inode, &argument(ioctl)?).map(none),
            FS_IOC_GETVERSION | EXT4_IOC_GETVERSION => Ok(inode.generation.as_bytes().to_vec()),
            // The kernel's FUSE takes an inode of another generation for another inode.
            FS_IOC_SETVERSION | EXT4_IOC_SETVERSION => {
                let fixed = self.sb.features().metadata_csum();
                Err(if fixed { Errno::ENOTTY } else { Errno::EOPNOTSUPP }.into())
            }
            FS_IOC_GETFSLABEL => Ok(self.label()),
            FS_IOC_SETFSLABEL => self.set_label(ctx, ioctl.input).map(none),
            FS_IOC_GETFSUUID => {
                let mut reply = vec![UUID_SIZE as u8];
                reply.extend_from_slice(self.sb.uuid().as_bytes());
                Ok(reply)
            }
            EXT4_IOC_GETFSUUID => self.uuid_of_ext4(ioctl),
            FITRIM => {
                let range: TrimRange = argument(ioctl)?;
                root_only(ctx)?;
                let len = self.trim(range.start, range.len, range.minlen)?;
                Ok(TrimRange { len, ..range }.as_bytes().to_vec())
            }
            EXT4_IOC_SHUTDOWN => {
                root_only(ctx)?;
                let mut how = 0u32;
                ioctl.caller.read(ioctl.arg, how.as_mut_bytes())?;
                self.shut_down(how).map(none)
            }
            IOC_REMOUNT => {
                root_only(ctx)?;
                let flags = RemountFlags::from_bits(argument(ioctl)?).ok_or(Errno::EINVAL)?;
                self.remount(flags).map(none)
            }
            IOC_FIEMAP => self.fiemap(inode, ioctl),
            IOC_COLLAPSE_RANGE | IOC_INSERT_RANGE => {
                let [offset, len]: [u64; 2] = argument(ioctl)?;
                self.shift_range(ctx, inode, (offset, len), ioctl.cmd == IOC_INSERT_RANGE).map(none)
            }
            _ => Err(Errno::ENOTTY.into()),
        }
    }

    fn visible_flags(&self, inode: &Inode) -> u32 {
        let flags = inode.core.lock().flags.bits() & VISIBLE;
        if inode.is_dir() { flags } else { flags & !InodeFlags::PROJINHERIT.bits() }
    }

    /// Sets what can be set to what of `flags` can be.
    fn set_flags(&self, ctx: &Context, inode: &Arc<Inode>, flags: u32) -> Result<()> {
        self.check_writable()?;
        if flags & !VISIBLE != 0 {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let new = InodeFlags::from_bits_retain(flags & MODIFIABLE);
        if !inode.is_dir() && new.intersects(DIR_ONLY) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let modifiable = InodeFlags::from_bits_retain(MODIFIABLE);
        let _exclusive = inode.rwsem.write();
        let old = inode.core.lock().flags & modifiable;
        let changed = old ^ new;
        if (old & new).contains(InodeFlags::IMMUTABLE) && !changed.is_empty() {
            return Err(Errno::EPERM.into());
        }
        if changed.contains(InodeFlags::JOURNAL_DATA) {
            root_only(ctx)?;
        }
        if changed.intersects(FIXED) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        if changed.contains(InodeFlags::JOURNAL_DATA) && inode.kind == FileKind::Regular {
            self.set_journal_data(inode, new.contains(InodeFlags::JOURNAL_DATA))?;
        }
        let handle = self.start(credits::SETATTR)?;
        {
            let now = self.now();
            let mut core = inode.core.lock();
            core.flags = (core.flags - modifiable) | new;
            core.ctime = now;
        }
        self.mark_inode_dirty(&handle, inode)?;
        drop(handle);
        if new.contains(InodeFlags::SYNC) || self.options.sync {
            self.sync_inode(inode, false)?;
        }
        Ok(())
    }

    fn fsxattr(&self, inode: &Inode) -> Result<FsXattr> {
        let flags = InodeFlags::from_bits_retain(self.visible_flags(inode));
        let xflags = COMMON
            .iter()
            .filter(|(flag, _)| flags.contains(*flag))
            .fold(0, |all, (_, name)| all | name);
        Ok(FsXattr { xflags, projid: self.project_of(inode)?, ..FsXattr::default() })
    }

    fn set_fsxattr(&self, ctx: &Context, inode: &Arc<Inode>, new: &FsXattr) -> Result<()> {
        // Other flags and hints are not ext4's, which drops them without a word.
        if new.projid != self.project_of(inode)? {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let mut flags = InodeFlags::from_bits_retain(self.visible_flags(inode));
        for (flag, name) in COMMON {
            flags.set(flag, new.xflags & name != 0);
        }
        self.set_flags(ctx, inode, flags.bits())
    }

    fn label(&self) -> Vec<u8> {
        let mut label = self.with_super(|sb| sb.label().to_vec());
        label.resize(LABEL_MAX + 1, 0);
        label
    }

    fn set_label(&self, ctx: &Context, text: &[u8]) -> Result<()> {
        root_only(ctx)?;
        self.check_writable()?;
        let len = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        if len > LABEL_MAX {
            return Err(Errno::EINVAL.into());
        }
        let handle = self.start(credits::SUPER)?;
        self.update_super(&handle, |sb| sb.set_label(&text[..len]))?;
        drop(handle);
        self.journal.commit_all()?;
        // In its place, too, where blkid(8) looks.
        self.journal.checkpoint_all()?;
        self.buffers.write_dirty()?;
        Ok(())
    }

    /// The UUID in ext4's own way: a length and flags are read, and 16 bytes go behind them.
    fn uuid_of_ext4(&self, ioctl: &Ioctl<'_>) -> Result<Vec<u8>> {
        let mut header = [0u32; 2];
        ioctl.caller.read(ioctl.arg, header.as_mut_bytes())?;
        let [len, flags] = header;
        if len != 0 {
            if len < UUID_SIZE || flags != 0 {
                return Err(Errno::EINVAL.into());
            }
            let behind = ioctl.arg.checked_add(8).ok_or(Error::Errno(Errno::EFAULT))?;
            ioctl.caller.write(behind, self.sb.uuid().as_bytes())?;
        }
        Ok([UUID_SIZE, flags].as_bytes().to_vec())
    }

    /// Ends all writing, as a power cut would: 0 after everything is on the disk, 1 after a
    /// commit, 2 at once.
    fn shut_down(&self, how: u32) -> Result<()> {
        if how > 2 {
            return Err(Errno::EINVAL.into());
        }
        if self.is_shut_down() {
            return Ok(());
        }
        log::error!("{}: shut down on request ({how})", self.name);
        if !self.is_read_only() {
            match how {
                0 => self.sync_all()?,
                1 => self.journal.commit_all()?,
                _ => {}
            }
        }
        self.shut_down.store(true, Ordering::Relaxed);
        self.read_only.store(true, Ordering::Relaxed);
        self.journal.abort(JournalError::Shutdown);
        // What is dirty will not be written; nobody may wait for it.
        for inode in self.inodes.all() {
            let _writeback = inode.writeback.lock();
            inode.mapping.truncate(0);
            self.drop_delayed(&inode, 0, MAX_BLOCKS);
        }
        Ok(())
    }

    /// Where a block of a file lies on the device, 0 when nowhere; `block` counts in units of
    /// `block_size`, as does the answer. So a larger unit than the filesystem's must lie in one
    /// piece and begin at a multiple of itself: who gets a place writes there.
    ///
    /// # Errors
    /// `EINVAL` for anything but a regular file, or how writing its delayed data failed.
    pub(crate) fn block_map(&self, inode: &Arc<Inode>, block: u64, block_size: u32) -> Result<u64> {
        if inode.kind != FileKind::Regular || block_size == 0 {
            return Err(Errno::EINVAL.into());
        }
        self.flush_data(inode)?;
        let _shared = inode.rwsem.read();
        let offset = block.saturating_mul(block_size.into());
        if offset >= inode.size().next_multiple_of(self.block_size().into()) {
            return Ok(0);
        }
        let logical = uext_ondisk::LogicalBlock(self.block_at(offset));
        // Blocks without data count too: swap goes to them past the filesystem.
        let count = block_size.div_ceil(self.block_size());
        let run = self.map_lookup(inode, logical, count)?;
        let Some(start) = run.start else { return Ok(0) };
        let byte = start.0 * u64::from(self.block_size()) + offset % u64::from(self.block_size());
        let whole = run.len >= count && byte.is_multiple_of(block_size.into());
        Ok(if whole { byte / u64::from(block_size) } else { 0 })
    }
}
