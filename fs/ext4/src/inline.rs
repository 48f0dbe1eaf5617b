//! Small files inside the inode (the inline_data feature): reading only, since images
//! with it are mounted read-only.
//!
//! Source: Documentation/filesystems/ext4/inlinedata.rst. The first 60 bytes lie in
//! `i_block`, the rest is the value of the attribute `system.data`. A directory begins
//! with its parent's number; entries follow in what is left of `i_block`, and then, as
//! a list of its own, in the attribute.

use uext_ondisk::dir_entry::{DirBlock, DirFormat};
use uext_ondisk::inode::Inode as RawView;
use uext_ondisk::xattr::{NameIndex, XattrArea, XattrValue};
use uext_ondisk::{Corrupt, InodeNumber, LogicalBlock};

use crate::dir::Slot;
use crate::error::Result;
use crate::fs::Ext4;
use crate::inode::Inode;

/// Bytes of `i_block`.
const I_BLOCK_SIZE: usize = 60;
/// Bytes of the parent's number.
const PARENT_SIZE: usize = 4;

/// A directory inside its inode.
pub(crate) struct InlineDir<'a> {
    pub parent: InodeNumber,
    /// Lists of entries, with where they begin.
    pub entries: [(usize, &'a [u8]); 2],
    pub format: DirFormat,
}

impl Ext4 {
    /// The contents of a small file, not cut to its size.
    pub(crate) fn inline_bytes(&self, inode: &Inode) -> Result<Vec<u8>> {
        let mut bytes = inode.core.lock().i_block.to_vec();
        let (buffer, offset) = self.inode_buffer(inode.ino)?;
        let table = buffer.read();
        let place = |c: Corrupt| c.in_inode(inode.ino);
        let raw = RawView::new(&table[offset..offset + usize::from(self.sb.inode_size())])?;
        if let Some(area) = XattrArea::ibody(raw.xattr_area()).map_err(place)?
            && let Some(entry) = area.get(NameIndex::SYSTEM, b"data")
            && let XattrValue::Inline(value) = entry.value
        {
            bytes.extend_from_slice(value);
        }
        Ok(bytes)
    }

    /// The parts of a small directory.
    pub(crate) fn inline_parts<'a>(&self, dir: &Inode, bytes: &'a [u8]) -> Result<InlineDir<'a>> {
        let parent = bytes.first_chunk::<PARENT_SIZE>().map(|raw| u32::from_le_bytes(*raw));
        let (Some(parent), true) = (parent, bytes.len() >= I_BLOCK_SIZE) else {
            return Err(Corrupt::value("inline directory", "is cut").in_inode(dir.ino).into());
        };
        let entries = [
            (PARENT_SIZE, &bytes[PARENT_SIZE..I_BLOCK_SIZE]),
            (I_BLOCK_SIZE, &bytes[I_BLOCK_SIZE..]),
        ];
        let format = DirFormat { csum: false, ..self.dir_format() };
        Ok(InlineDir { parent: InodeNumber(parent), entries, format })
    }

    /// Finds a name in a small directory. The slot's place is the inode's: it cannot be changed.
    pub(crate) fn inline_find(&self, dir: &Inode, name: &[u8]) -> Result<Option<Slot>> {
        let bytes = self.inline_bytes(dir)?;
        let parts = self.inline_parts(dir, &bytes)?;
        let found = match name {
            b"." => Some(dir.ino),
            b".." => Some(parts.parent),
            _ => {
                let mut found = None;
                for (_, part) in parts.entries {
                    let entry = DirBlock::new(part, parts.format)
                        .find(name)
                        .map_err(|c| c.in_inode(dir.ino))?;
                    found = found.or(entry.map(|entry| entry.inode));
                }
                found
            }
        };
        let Some(ino) = found else { return Ok(None) };
        let (buffer, offset) = self.inode_buffer(dir.ino)?;
        Ok(Some(Slot { logical: LogicalBlock(0), buffer, offset, ino }))
    }
}
