//! Orphans: inodes that a crash must not leave half deleted or half truncated.
//!
//! They stand in the orphan file (see `orphan_file`) when the image has one and a journal, or
//! else, and when that is full, on a list that starts in the superblock (`s_last_orphan`) and goes
//! on in each inode's `i_dtime`. An inode with no links that is still open is an orphan, and
//! one that is being truncated. At mount both are worked off.
//!
//! Invariants: the in-memory list has the order of the one on the disk; an inode
//! is an orphan at most once.
//!
//! Locks: `Ext4::orphans`, after handle start and before `core`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use uext_blockdev::mutant;
use uext_jbd2::Handle;
use uext_ondisk::features::RoCompat;
use uext_ondisk::{Corrupt, InodeNumber};

use crate::credits;
use crate::error::Result;
use crate::fs::Ext4;
use crate::inode::Inode;
use crate::orphan_file::{OrphanFile, Slot};

/// What is known in memory: every orphan and its place, and the head of the list.
#[derive(Default)]
pub(crate) struct OrphanList {
    head: Option<InodeNumber>,
    members: HashMap<InodeNumber, Member>,
    /// The orphan file, when orphans go there.
    file: Option<OrphanFile>,
}

struct Member {
    inode: Arc<Inode>,
    place: Place,
}

#[derive(Clone, Copy)]
enum Place {
    List(Neighbours),
    File(Slot),
}

#[derive(Clone, Copy)]
struct Neighbours {
    previous: Option<InodeNumber>,
    next: Option<InodeNumber>,
}

impl OrphanList {
    fn inodes(&self) -> Vec<Arc<Inode>> {
        let mut all: Vec<_> = self.members.values().map(|member| member.inode.clone()).collect();
        all.sort_unstable_by_key(|inode| inode.ino);
        all
    }

    /// The neighbours of a member of the list.
    fn neighbours(&mut self, ino: Option<InodeNumber>) -> Option<(&Arc<Inode>, &mut Neighbours)> {
        match self.members.get_mut(&ino?)? {
            Member { inode, place: Place::List(neighbours) } => Some((inode, neighbours)),
            Member { place: Place::File(_), .. } => None,
        }
    }
}

impl Ext4 {
    /// Puts an inode into the orphan file or on the list; does nothing when it is there.
    pub(crate) fn orphan_add(&self, handle: &Handle, inode: &Arc<Inode>) -> Result<()> {
        let mut list = self.orphans.lock();
        if list.members.contains_key(&inode.ino) || mutant!("orphan-not-added") {
            return Ok(());
        }
        let slot = match &mut list.file {
            Some(file) => file.add(handle, inode.ino)?,
            None => None,
        };
        if let Some(slot) = slot {
            let member = Member { inode: inode.clone(), place: Place::File(slot) };
            list.members.insert(inode.ino, member);
            return Ok(());
        }
        let next = list.head;
        self.update_super(handle, |sb| sb.set_last_orphan(Some(inode.ino)))?;
        inode.core.lock().dtime = next.map_or(0, |ino| ino.0);
        self.mark_inode_dirty(handle, inode)?;
        if let Some((_, after)) = list.neighbours(next) {
            after.previous = Some(inode.ino);
        }
        let place = Place::List(Neighbours { previous: None, next });
        list.members.insert(inode.ino, Member { inode: inode.clone(), place });
        list.head = Some(inode.ino);
        Ok(())
    }

    /// Takes an inode off the list or out of the file; does nothing when it is in neither.
    pub(crate) fn orphan_del(&self, handle: &Handle, inode: &Inode) -> Result<()> {
        let mut list = self.orphans.lock();
        match list.members.get(&inode.ino).map(|member| member.place) {
            None => return Ok(()),
            Some(Place::List(neighbours)) => {
                self.unlink_orphan(handle, &mut list, neighbours)?;
                list.members.remove(&inode.ino);
            }
            Some(Place::File(slot)) => {
                if let Some(file) = list.file.as_mut().filter(|_| !mutant!("orphan-not-removed")) {
                    file.remove(handle, slot)?;
                }
                list.members.remove(&inode.ino);
                return Ok(());
            }
        }
        inode.core.lock().dtime = 0;
        self.mark_inode_dirty(handle, inode)
    }

    fn unlink_orphan(
        &self,
        handle: &Handle,
        list: &mut OrphanList,
        Neighbours { previous, next }: Neighbours,
    ) -> Result<()> {
        match list.neighbours(previous) {
            Some((inode, before)) => {
                inode.core.lock().dtime = next.map_or(0, |ino| ino.0);
                self.mark_inode_dirty(handle, inode)?;
                before.next = next;
            }
            None => {
                if !mutant!("orphan-not-removed") {
                    self.update_super(handle, |sb| sb.set_last_orphan(next))?;
                }
                list.head = next;
            }
        }
        if let Some((_, after)) = list.neighbours(next) {
            after.previous = previous;
        }
        Ok(())
    }

    /// Whether orphans stand in the orphan file: what the superblock calls `orphan_present`.
    pub(crate) fn uses_orphan_file(&self) -> bool {
        let known = self.sb.features().orphan_file() && self.journal.has_journal();
        known && !mutant!("orphan-present-not-set")
    }

    /// Whether the superblock must say that the orphan file holds something, at rest.
    pub(crate) fn is_orphan_present(&self) -> bool {
        match &self.orphans.lock().file {
            Some(file) => !file.is_empty(),
            None => {
                self.with_super(|sb| sb.features().ro_compat.contains(RoCompat::ORPHAN_PRESENT))
            }
        }
    }

    /// Every orphan.
    pub(crate) fn orphan_inodes(&self) -> Vec<Arc<Inode>> {
        self.orphans.lock().inodes()
    }

    /// Works off what a crash left on the list and in the orphan file.
    pub(crate) fn clean_orphans(&self) -> Result<()> {
        let mut done = 0;
        let present = self.sb.features().ro_compat.contains(RoCompat::ORPHAN_PRESENT);
        if self.sb.features().orphan_file() && (present || self.journal.has_journal()) {
            match self.clean_orphan_file(present) {
                Ok(cleaned) => done += cleaned,
                Err(error) => self.report(None, &error),
            }
        }
        done += self.clean_orphan_list()?;
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
                let place = Place::List(Neighbours { previous, next });
                list.members.insert(inode.ino, Member { inode: inode.clone(), place });
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

    /// Reads the orphan file of a filesystem that will be written. A mount without it would leave
    /// the superblock's mark behind.
    pub(crate) fn open_orphan_file(&self) -> Result<()> {
        let present = self.sb.features().ro_compat.contains(RoCompat::ORPHAN_PRESENT);
        if self.sb.features().orphan_file() && (present || self.journal.has_journal()) {
            let file = self.load_orphan_file()?;
            self.orphans.lock().file = Some(file);
        }
        Ok(())
    }

    /// Works off what is `present` in the orphan file, and leaves it to be used.
    fn clean_orphan_file(&self, present: bool) -> Result<u32> {
        let found = self.orphans.lock().file.as_ref().map_or(Ok(Vec::new()), |f| f.orphans())?;
        if let Some((_, ino)) = found.first().filter(|_| !present) {
            self.orphans.lock().file = None;
            let corrupt = Corrupt::value("orphan file", "holds an inode, and should be empty");
            return Err(corrupt.in_inode(*ino).into());
        }
        let mut done = 0;
        for (slot, ino) in found {
            match self.enter_orphan(slot, ino) {
                Ok(inode) => self.finish_orphan(&inode)?,
                // What cannot be followed is given up; e2fsck finds what is left of it.
                Err(error) => {
                    self.report(Some(ino), &error);
                    let handle = self.start(credits::ORPHAN)?;
                    if let Some(file) = &mut self.orphans.lock().file {
                        file.remove(&handle, slot)?;
                    }
                }
            }
            done += 1;
        }
        if !self.journal.has_journal() {
            self.orphans.lock().file = None;
            let handle = self.start(credits::ORPHAN)?;
            self.update_super(&handle, |sb| sb.set_orphan_present(false))?;
        }
        Ok(done)
    }

    /// Makes an inode of the orphan file known.
    fn enter_orphan(&self, slot: Slot, ino: InodeNumber) -> Result<Arc<Inode>> {
        let inode = self.iget_deleted(self.sb.check_inode(ino)?)?;
        let mut list = self.orphans.lock();
        if list.members.contains_key(&ino) {
            return Err(Corrupt::value("orphan file", "names an inode twice").in_inode(ino).into());
        }
        list.members.insert(ino, Member { inode: inode.clone(), place: Place::File(slot) });
        Ok(inode)
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
