//! Attribute blocks that inodes share: files with the same attributes have one block.
//!
//! Blocks that were read or written lately are known by the hash in their header
//! (`h_hash`); one that is about to be written is looked for among them first.
//!
//! Invariants: what changes a block's contents or number of owners, or frees it, holds
//! [`XattrShare`]; so a block found here is in use until the lock is dropped, and an owner
//! that is about to change it in place is its only one.
//!
//! Locks: after the handle's start, before buffers and the group lock.

use std::collections::HashMap;

use uext_jbd2::Handle;
use uext_ondisk::FsBlock;
use uext_ondisk::xattr::{REFCOUNT_MAX, XattrArea, set_block_refcount};
use uext_sync::{Mutex, MutexGuard};

use crate::error::Result;
use crate::fs::Ext4;
use crate::xattr::set_block_checksum_if;

/// Bytes of a block's header; what follows is the same in blocks that can be shared.
const HEADER: usize = 32;
/// Most blocks that are known; then all are forgotten.
const MOST: usize = 4096;
/// Most blocks of one hash that are compared.
const MOST_ALIKE: usize = 16;

/// Known attribute blocks, by hash.
#[derive(Default)]
pub(crate) struct Known {
    blocks: HashMap<u32, Vec<FsBlock>>,
    count: usize,
}

impl Known {
    /// Notes a block; a hash of 0 says that it may not be shared.
    pub fn add(&mut self, hash: u32, block: FsBlock) {
        if hash == 0 {
            return;
        }
        if self.count >= MOST {
            *self = Self::default();
        }
        let alike = self.blocks.entry(hash).or_default();
        if alike.len() < MOST_ALIKE && !alike.contains(&block) {
            alike.push(block);
            self.count += 1;
        }
    }

    /// Forgets a block.
    pub fn remove(&mut self, hash: u32, block: FsBlock) {
        if let Some(alike) = self.blocks.get_mut(&hash) {
            let before = alike.len();
            alike.retain(|known| *known != block);
            self.count -= before - alike.len();
            if alike.is_empty() {
                self.blocks.remove(&hash);
            }
        }
    }

    fn find(&self, hash: u32) -> Vec<FsBlock> {
        self.blocks.get(&hash).cloned().unwrap_or_default()
    }
}

/// Known blocks, and the lock over how they are shared.
#[derive(Default)]
pub(crate) struct XattrShare(Mutex<Known>);

impl XattrShare {
    /// Takes the lock.
    pub fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock()
    }
}

/// The hash in a block's header, 0 when it has none.
pub(crate) fn hash_of(bytes: &[u8]) -> u32 {
    XattrArea::block(bytes).ok().and_then(|area| area.header().map(|h| h.h_hash.get())).unwrap_or(0)
}

impl Ext4 {
    /// A known block that holds what `wanted` holds, with one more owner now; `except` is the
    /// caller's own.
    pub(crate) fn share_xattr_block(
        &self,
        handle: &Handle,
        known: &mut Known,
        wanted: &[u8],
        except: Option<FsBlock>,
    ) -> Result<Option<FsBlock>> {
        let hash = hash_of(wanted);
        if hash == 0 {
            return Ok(None);
        }
        for number in known.find(hash) {
            if Some(number) == except {
                continue;
            }
            let buffer = self.buffers.bread(number.0)?;
            let owners = {
                let bytes = buffer.read();
                let header = XattrArea::block(&bytes)
                    .ok()
                    .and_then(|area| area.header().map(|header| header.h_refcount.get()));
                if bytes.get(HEADER..) == wanted.get(HEADER..) { header } else { None }
            };
            let Some(owners) = owners.filter(|owners| (1..REFCOUNT_MAX).contains(owners)) else {
                continue;
            };
            let mut bytes = handle.write(&buffer)?;
            set_block_refcount(&mut bytes, owners + 1)?;
            set_block_checksum_if(self, &mut bytes, number)?;
            return Ok(Some(number));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_bounded_and_can_be_forgotten() {
        let mut known = Known::default();
        known.add(0, FsBlock(1));
        assert!(known.find(0).is_empty());
        for block in 0..40 {
            known.add(7, FsBlock(block));
        }
        assert_eq!(known.find(7).len(), MOST_ALIKE);
        known.remove(7, FsBlock(3));
        assert!(!known.find(7).contains(&FsBlock(3)));
        for hash in 1..20_000 {
            known.add(hash, FsBlock(u64::from(hash)));
        }
        assert!(known.count <= MOST);
        assert_eq!(known.blocks.values().map(Vec::len).sum::<usize>(), known.count);
    }
}
