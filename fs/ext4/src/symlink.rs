//! Symbolic links: short targets in the inode, longer ones in one block.
//!
//! Source: Documentation/filesystems/ext4/inodes.rst (i_block). A target of less than
//! 60 bytes lies in `i_block`, and the inode then maps no blocks: that, not its length,
//! tells the two apart. The block of a long one is journalled as metadata.

use uext_jbd2::Handle;
use uext_ondisk::inode::InodeFlags;
use uext_ondisk::{Corrupt, LogicalBlock};
use uext_vfs::{Errno, FileKind};

use crate::error::Result;
use crate::fs::Ext4;
use crate::inode::Inode;

/// Bytes of `i_block`; the target's end mark is among them.
const I_BLOCK_SIZE: usize = 60;
/// The longest path, with its end mark (`PATH_MAX`).
const PATH_MAX: usize = 4096;
const WHAT: &str = "symbolic link";

impl Ext4 {
    /// Whether a target can be stored.
    pub(crate) fn check_symlink_target(&self, target: &[u8]) -> Result<()> {
        match target.len() {
            0 => Err(Errno::ENOENT.into()),
            // With its end mark it must fit a block.
            len if len >= PATH_MAX.min(self.block_size() as usize) => {
                Err(Errno::ENAMETOOLONG.into())
            }
            _ => Ok(()),
        }
    }

    /// Stores a target in a new inode. The caller writes the inode.
    pub(crate) fn write_symlink(
        &self,
        handle: &Handle,
        inode: &Inode,
        target: &[u8],
    ) -> Result<()> {
        if target.len() < I_BLOCK_SIZE {
            let mut core = inode.core.lock();
            core.flags.remove(InodeFlags::EXTENTS);
            core.i_block = [0; I_BLOCK_SIZE];
            core.i_block[..target.len()].copy_from_slice(target);
        } else {
            let block = self.map_new_meta(handle, inode, LogicalBlock(0))?;
            let buffer = self.buffers.getblk(block.0);
            let mut bytes = handle.create(&buffer)?;
            bytes.fill(0);
            bytes[..target.len()].copy_from_slice(target);
        }
        let mut core = inode.core.lock();
        core.size = target.len() as u64;
        core.disk_size = core.size;
        Ok(())
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// `EINVAL` for another kind of file, `Corrupt` when size and place do not agree.
    pub(crate) fn read_link(&self, inode: &Inode) -> Result<Vec<u8>> {
        if inode.kind != FileKind::Symlink {
            return Err(Errno::EINVAL.into());
        }
        let bad = |detail: String| Corrupt::value(WHAT, detail).in_inode(inode.ino);
        let (size, i_block, is_fast, is_inline) = {
            let core = inode.core.lock();
            let attributes =
                if core.file_acl.0 == 0 { 0 } else { u64::from(self.block_size() / 512) };
            let is_fast = core.blocks.saturating_sub(attributes) == 0;
            let is_inline = core.flags.contains(InodeFlags::INLINE_DATA);
            (core.size, core.i_block, is_fast, is_inline)
        };
        let limit = if is_inline || !is_fast { u64::from(self.block_size()) } else { 59 };
        if size == 0 || size > limit {
            return Err(bad(format!("size is {size}, at most {limit}")).into());
        }
        // At most a block.
        let len = size as usize;
        let mut target = if is_inline {
            self.inline_bytes(inode)?
        } else if is_fast {
            i_block.to_vec()
        } else {
            let start = self.map_lookup(inode, LogicalBlock(0), 1)?.start;
            let block = start.ok_or_else(|| bad("its block is a hole".into()))?;
            self.buffers.bread(block.0)?.read().to_vec()
        };
        if target.len() < len {
            return Err(bad(format!("size is {size}, {} bytes are there", target.len())).into());
        }
        target.truncate(len);
        Ok(target)
    }
}
