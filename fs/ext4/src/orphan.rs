//! Orphans: inodes that a crash must not leave half deleted or half truncated.
//!
//! On the disk the list starts in the superblock (`s_last_orphan`) and goes on in
//! each inode's `i_dtime`. An inode with no links that is still open is on it, and
//! one that is being truncated. At mount the list, and the orphan file when the
//! image has one, is worked off.
//!
//! Invariants: the in-memory list has the order of the one on the disk; an inode
//! is on it at most once.
//!
//! Locks: `Ext4::orphans`, after handle start and before `core`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use uext_blockdev::mutant;
use uext_jbd2::Handle;
use uext_ondisk::features::RoCompat;
use uext_ondisk::{Corrupt, InodeNumber, LogicalBlock, orphan_file};

use crate::credits;
use crate::error::Result;
use crate::fs::Ext4;
use crate::inode::Inode;

/// The list in memory: its head and every member's neighbours.
#[derive(Default)]
pub(crate) struct OrphanList {
    head: Option<InodeNumber>,
    members: HashMap<InodeNumber, Member>,
}

struct Member {
    inode: Arc<Inode>,
    previous: Option<InodeNumber>,
    next: Option<InodeNumber>,
}

impl OrphanList {
    fn inodes(&self) -> Vec<Arc<Inode>> {
        let mut all: Vec<_> = self.members.values().map(|member| member.inode.clone()).collect();
        all.sort_unstable_by_key(|inode| inode.ino);
        all
    }
}

impl Ext4 {
    /// Puts an inode on the list; does nothing when it is there.
    pub(crate) fn orphan_add(&self, handle: &Handle, inode: &Arc<Inode>) -> Result<()> {
        let mut list = self.orphans.lock();
        if list.members.contains_key(&inode.ino) || mutant!("orphan-not-added") {
            return Ok(());
        }
        let next = list.head;
        self.update_super(handle, |sb| sb.set_last_orphan(Some(inode.ino)))?;
        inode.core.lock().dtime = next.map_or(0, |ino| ino.0);
        self.mark_inode_dirty(handle, inode)?;
        if let Some(after) = next.and_then(|ino| list.members.get_mut(&ino)) {
            after.previous = Some(inode.ino);
        }
        let member = Member { inode: inode.clone(), previous: None, next };
        list.members.insert(inode.ino, member);
        list.head = Some(inode.ino);
        Ok(())
    }

    /// Takes an inode off the list; does nothing when it is not there.
    pub(crate) fn orphan_del(&self, handle: &Handle, inode: &Inode) -> Result<()> {
        let mut list = self.orphans.lock();
        let Some(Member { previous, next, .. }) = list.members.get(&inode.ino) else {
            return Ok(());
        };
        let (previous, next) = (*previous, *next);
        match previous.and_then(|ino| list.members.get_mut(&ino)) {
            Some(before) => {
                before.inode.core.lock().dtime = next.map_or(0, |ino| ino.0);
                self.mark_inode_dirty(handle, &before.inode)?;
                before.next = next;
            }
            None => {
                if !mutant!("orphan-not-removed") {
                    self.update_super(handle, |sb| sb.set_last_orphan(next))?;
                }
                list.head = next;
            }
        }
        if let Some(after) = next.and_then(|ino| list.members.get_mut(&ino)) {
            after.previous = previous;
        }
        list.members.remove(&inode.ino);
        inode.core.lock().dtime = 0;
        self.mark_inode_dirty(handle, inode)
    }

    /// Every inode on the list.
    pub(crate) fn orphan_inodes(&self) -> Vec<Arc<Inode>> {
        self.orphans.lock().inodes()
    }

    /// Works off what a crash left on the list and in the orphan file.
    pub(crate) fn clean_orphans(&self) -> Result<()> {
        let mut done = self.clean_orphan_list()?;
        if self.sb.features().ro_compat.contains(RoCompat::ORPHAN_PRESENT) {
            done += self.clean_orphan_file()?;
        }
        if done > 0 {
            log::info!("{}: {done} orphan inodes deleted or truncated", self.name);
        }
        Ok(())
    }

    fn clean_orphan_list(&self) -> Result<u32> {
        // The list is read first and joined in memory, so that every removal keeps the disk's order.
        let (mut chain, mut seen) = (Vec::new(), HashSet::new());
        let mut next = self.with_super(|sb| sb.last_orphan());
        while let Some(ino) = next {
            if !seen.insert(ino) {
                return Err(Corrupt::value("orphan list", "goes round in a circle")
                    .in_inode(ino)
                    .into());
            }
            let inode = match self
                .sb
                .check_inode(ino)
                .map_err(Into::into)
                .and_then(|ino| self.iget_deleted(ino))
            {
                Ok(inode) => inode,
                Err(error) => {
                    // What cannot be followed is given up; e2fsck finds what is left of it.
                    self.report(Some(ino), &error);
                    break;
                }
            };
            next = Some(InodeNumber(inode.core.lock().dtime)).filter(|ino| ino.0 != 0);
            chain.push(inode);
        }
        {
            let mut list = self.orphans.lock();
            list.head = chain.first().map(|inode| inode.ino);
            for (index, inode) in chain.iter().enumerate() {
                let previous = index.checked_sub(1).map(|i| chain[i].ino);
                let next = chain.get(index + 1).map(|i| i.ino);
                list.members.insert(inode.ino, Member { inode: inode.clone(), previous, next });
            }
        }
        let mut done = 0;
        for inode in chain {
            self.finish_orphan(&inode)?;
            done += 1;
        }
        let handle = self.start(credits::ORPHAN)?;
        self.update_super(&handle, |sb| sb.set_last_orphan(None))?;
        Ok(done)
    }

    fn clean_orphan_file(&self) -> Result<u32> {
        let Some(file) = self.sb.orphan_file_inum() else {
            return Err(
                Corrupt::value("superblock", "orphans are present, but no orphan file").into()
            );
        };
        let file = self.iget(file)?;
        let blocks = file.core.lock().size.div_ceil(u64::from(self.block_size()));
        let mut done = 0;
        for logical in 0..u32::try_from(blocks).unwrap_or(u32::MAX) {
            let mapping = self.map_lookup(&file, LogicalBlock(logical), 1)?;
            let Some(block) = mapping.start else { continue };
            let buf = self.buffers.bread(block.0)?;
            let seed = file.csum_seed;
            let members: Vec<InodeNumber> = {
                let bytes = buf.read();
                if self.sb.features().metadata_csum() {
                    orphan_file::verify_checksum(&bytes, seed, block)
                        .map_err(|c| c.in_inode(file.ino))?;
                }
                orphan_file::orphans(&bytes)?.map(|(_, ino)| ino).collect()
            };
            for ino in members {
                let inode = self.iget_deleted(self.sb.check_inode(ino)?)?;
                self.finish_orphan(&inode)?;
                done += 1;
            }
            let handle = self.start(credits::ORPHAN)?;
            let mut bytes = handle.write(&buf)?;
            orphan_file::init(&mut bytes)?;
            if self.sb.features().metadata_csum() {
                orphan_file::set_checksum(&mut bytes, seed, block)?;
            }
        }
        let handle = self.start(credits::ORPHAN)?;
        self.update_super(&handle, |sb| sb.set_orphan_present(false))?;
        Ok(done)
    }

    /// Deletes an orphan without links, or truncates one with links to its size.
    fn finish_orphan(&self, inode: &Arc<Inode>) -> Result<()> {
        if inode.core.lock().nlink == 0 {
            return self.delete_inode(inode);
        }
        let _exclusive = inode.rwsem.write();
        let size = inode.core.lock().disk_size;
        self.truncate(inode, size)?;
        let handle = self.start(credits::ORPHAN + credits::SETATTR)?;
        self.orphan_del(&handle, inode)
    }
}
