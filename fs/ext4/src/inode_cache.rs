//! The inodes in memory, and what front ends owe forgets for.
//!
//! A front end may know many more inodes than are worth keeping: the kernel forgets one
//! only when it needs the memory. So lookups are counted apart from the inodes, and an
//! inode that nobody uses at the moment is dropped when there are too many, known to a
//! front end or not; it is read again from its table block when it is asked for. Its pages
//! go with it, so one that has many stays, above the bound: it takes little beside them, and
//! the page cache decides how long they are worth keeping.
//!
//! Invariants:
//! - One [`Inode`] per number at a time: while anybody has its `Arc` it stays.
//! - What the table block doesn't say stays too: dirty pages and reservations, times in
//!   memory only, an error nobody was told of, an inode without links.
//! - No number is given out again while lookups of it are counted.
//!
//! Locks: `order`, then a shard; both leaves for everybody else.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use uext_ondisk::InodeNumber;
use uext_pagecache::{ErrSeqMark, NumberMap};
use uext_sync::Mutex;

use crate::inode::Inode;
use crate::lookups::{Lookups, ROW};

/// Shards of the cache, by inode number, whole rows of lookups in one.
const SHARDS: usize = 16;
/// Inodes dropped at a time.
const BATCH: usize = 64;
/// An inode with so many pages stays: it takes less than a hundredth of their memory.
const MANY_PAGES: usize = 64;

#[derive(Default)]
struct Shard {
    inodes: NumberMap<InodeNumber, Arc<Inode>>,
    /// Lookups that a front end owes a forget for.
    lookups: Lookups,
}

/// The inodes in use, and some that were lately.
pub(crate) struct InodeCache {
    shards: [Mutex<Shard>; SHARDS],
    /// Numbers in the order in which they came; stale ones are skipped.
    order: Mutex<VecDeque<InodeNumber>>,
    /// Inodes kept, but for those in use.
    max_inodes: usize,
    /// Inodes in all shards.
    /// WHY-RELAXED: it decides when to look for victims; the shards' locks decide the rest.
    len: AtomicUsize,
    /// Those of them that are spared.
    /// WHY-RELAXED: as `len`.
    spared: AtomicUsize,
}

impl InodeCache {
    /// An empty cache, for so many inodes.
    pub fn new(max_inodes: usize) -> Self {
        Self {
            shards: Default::default(),
            order: Mutex::default(),
            max_inodes,
            len: AtomicUsize::new(0),
            spared: AtomicUsize::new(0),
        }
    }

    fn shard(&self, ino: InodeNumber) -> &Mutex<Shard> {
        &self.shards[(ino.0 / ROW) as usize % SHARDS]
    }

    /// The inode, when cached.
    pub fn find(&self, ino: InodeNumber) -> Option<Arc<Inode>> {
        let inode = self.shard(ino).lock().inodes.get(&ino).cloned()?;
        inode.used.store(true, Ordering::Relaxed);
        Some(inode)
    }

    /// Whether the inode is cached.
    pub fn is_cached(&self, ino: InodeNumber) -> bool {
        self.shard(ino).lock().inodes.contains_key(&ino)
    }

    /// Lookups that a front end owes a forget for.
    pub fn lookups(&self, ino: InodeNumber) -> u64 {
        self.shard(ino).lock().lookups.get(ino)
    }

    /// Puts a new inode in, in place of whatever had its number.
    pub fn insert(&self, inode: &Arc<Inode>) {
        let before = {
            let mut shard = self.shard(inode.ino).lock();
            let before = shard.inodes.insert(inode.ino, inode.clone());
            before.inspect(|before| self.spare(before, false))
        };
        if before.is_none() {
            self.came(inode.ino);
        }
    }

    /// Puts an inode in unless another thread was faster; gives the one that counts.
    pub fn insert_or_find(&self, inode: &Arc<Inode>) -> Arc<Inode> {
        let found = {
            let mut shard = self.shard(inode.ino).lock();
            shard.inodes.entry(inode.ino).or_insert_with(|| inode.clone()).clone()
        };
        // One that was there may be counted twice in the order, which costs nothing.
        if Arc::ptr_eq(&found, inode) {
            self.came(inode.ino);
        }
        found
    }

    /// Counts a lookup for a front end.
    pub fn count_lookup(&self, inode: &Arc<Inode>) {
        let came = {
            let mut shard = self.shard(inode.ino).lock();
            shard.lookups.add_one(inode.ino);
            // An inode that was dropped between iget and here comes back.
            let came = !shard.inodes.contains_key(&inode.ino);
            if came {
                shard.inodes.insert(inode.ino, inode.clone());
            }
            came
        };
        if came {
            self.came(inode.ino);
        }
    }

    /// All lookups that a front end owes forgets for.
    pub fn known(&self) -> Vec<(InodeNumber, u64)> {
        self.shards.iter().flat_map(|shard| shard.lock().lookups.all()).collect()
    }

    /// Says that a front end owes forgets for so many lookups, whatever was counted before.
    pub fn owe(&self, ino: InodeNumber, count: u64) {
        self.shard(ino).lock().lookups.set(ino, count);
    }

    /// Gives back lookups; the inode when none is left and it is in memory. For one that was
    /// never looked up `count` is 0.
    pub fn forget(&self, ino: InodeNumber, count: u64) -> Option<Arc<Inode>> {
        let mut shard = self.shard(ino).lock();
        if shard.lookups.take(ino, count) > 0 {
            return None;
        }
        let inode = shard.inodes.get(&ino)?.clone();
        inode.used.store(false, Ordering::Relaxed);
        Some(inode)
    }

    /// Gives all lookups of an inode back.
    pub fn forget_all(&self, ino: InodeNumber) {
        self.shard(ino).lock().lookups.remove(ino);
    }

    /// Takes a deleted inode out.
    pub fn remove(&self, inode: &Arc<Inode>) {
        let mut shard = self.shard(inode.ino).lock();
        if shard.inodes.get(&inode.ino).is_some_and(|cached| Arc::ptr_eq(cached, inode)) {
            shard.inodes.remove(&inode.ino);
            self.spare(inode, false);
            self.len.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Counts an inode that was put in.
    fn came(&self, ino: InodeNumber) {
        let len = self.len.fetch_add(1, Ordering::Relaxed) + 1;
        let mut order = self.order.lock();
        order.push_back(ino);
        // Deleted inodes leave their numbers behind.
        if order.len() > 2 * len + 1024 {
            let mut seen = HashSet::new();
            order.retain(|ino| seen.insert(*ino) && self.is_cached(*ino));
        }
    }

    /// Inodes to drop when there are too many: the oldest that were not used lately.
    pub fn victims(&self) -> Vec<Arc<Inode>> {
        let bound = self.max_inodes + self.spared.load(Ordering::Relaxed);
        let excess = self.len.load(Ordering::Relaxed).saturating_sub(bound).min(BATCH);
        let mut victims = Vec::new();
        if excess == 0 {
            return victims;
        }
        let mut order = self.order.lock();
        for _ in 0..4 * BATCH {
            let Some(ino) = order.pop_front() else { break };
            let (inode, spare) = {
                let shard = self.shard(ino).lock();
                let Some(inode) = shard.inodes.get(&ino) else { continue };
                let spare = inode.mapping.nr_pages() >= MANY_PAGES;
                self.spare(inode, spare);
                (inode.clone(), spare)
            };
            if inode.used.swap(false, Ordering::Relaxed) || spare {
                order.push_back(ino);
            } else {
                victims.push(inode);
                if victims.len() == excess {
                    break;
                }
            }
        }
        victims
    }

    /// Counts an inode as spared or not. Called under its shard's lock.
    fn spare(&self, inode: &Inode, spare: bool) {
        match (inode.spared.swap(spare, Ordering::Relaxed), spare) {
            (false, true) => drop(self.spared.fetch_add(1, Ordering::Relaxed)),
            (true, false) => drop(self.spared.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
    }

    /// Drops a victim that nobody uses and that has nothing the disk doesn't have; any
    /// other waits for its next turn.
    pub fn drop_if_unused(&self, inode: &Arc<Inode>) {
        {
            let mut shard = self.shard(inode.ino).lock();
            let cached = shard.inodes.get(&inode.ino);
            if !cached.is_some_and(|cached| Arc::ptr_eq(cached, inode)) {
                return;
            }
            // The cache's own and the caller's; nobody gets another without the shard's lock.
            if Arc::strong_count(inode) == 2 && inode.is_all_on_disk() {
                shard.inodes.remove(&inode.ino);
                self.spare(inode, false);
                self.len.fetch_sub(1, Ordering::Relaxed);
                return;
            }
        }
        self.order.lock().push_back(inode.ino);
    }

    /// Every cached inode, by number.
    pub fn all(&self) -> Vec<Arc<Inode>> {
        self.select(|_| true)
    }

    /// The inodes that a sync has something to do for, by number: the order in which it writes
    /// them is the same in every run.
    pub fn to_sync(&self) -> Vec<Arc<Inode>> {
        self.select(Inode::has_work_for_sync)
    }

    fn select(&self, wanted: impl Fn(&Inode) -> bool) -> Vec<Arc<Inode>> {
        let mut all = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            all.extend(shard.inodes.values().filter(|inode| wanted(inode)).cloned());
        }
        all.sort_unstable_by_key(|inode| inode.ino);
        all
    }
}

impl Inode {
    /// Whether a sync writes something of the inode or waits for it: for a deletion, a large
    /// write, or pages that are dirty or on their way. Who has `core` may wait for the shard, so
    /// an inode that is in use counts as one.
    fn has_work_for_sync(&self) -> bool {
        self.core.try_lock().is_none_or(|core| core.lazy_dirty || core.nlink == 0)
            || self.mapping.has_dirty()
            || self.has_large_write()
    }

    /// Whether reading the inode again would give all that is in memory.
    fn is_all_on_disk(&self) -> bool {
        let core = self.core.lock();
        core.nlink > 0
            && !core.lazy_dirty
            && core.size == core.disk_size
            && !self.mapping.has_dirty()
            && self.reserved.load(Ordering::Relaxed) == 0
            && self.delayed.load(Ordering::Relaxed) == 0
            && self.mapping.errseq().check(ErrSeqMark::default()).is_ok()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use uext_vfs::{Context, FileHandle, FileSystem as _, ReadReply, WriteFlags};

    use super::*;
    use crate::test_image::mke2fs;
    use crate::{Ext4, MountOptions};

    /// A large file lost all its cached pages to a walk over many small ones.
    #[test]
    fn an_inode_with_many_pages_stays_as_long_as_it_has_them() {
        let device = mke2fs(64, &["-t", "ext4", "-b", "4096", "-N", "16384"]);
        let options = MountOptions { cache_bytes: Some(8 << 20), ..MountOptions::default() };
        let fs = Ext4::mount(device, "test", &options).unwrap();
        let root = Context { uid: 0, gid: 0, pid: 1, umask: 0 };
        let make = |name: &str, pages: usize| {
            let made = fs.mknod(&root, fs.root(), name.as_bytes(), 0o100_644, 0).unwrap().attr;
            let data = vec![7; pages * 4096];
            let (fh, flags) = (FileHandle(0), WriteFlags::empty());
            assert_eq!(fs.write(&root, made.ino, fh, 0, &data, flags), Ok(data.len()));
            fs.fsync(&root, made.ino, fh, false).unwrap();
            // A large write has left nothing in the cache.
            fs.read(&root, made.ino, fh, 0, data.len(), &mut ReadReply::new()).unwrap();
            fs.forget(made.ino, 1);
            InodeNumber(u32::try_from(made.ino).unwrap())
        };
        let make_many = |of: &str| {
            for n in 0..3 * fs.inodes.max_inodes {
                let name = format!("{of}{n}");
                let made = fs.mknod(&root, fs.root(), name.as_bytes(), 0o100_644, 0).unwrap();
                fs.forget(made.attr.ino, 1);
            }
            fs.sync().unwrap();
            // Times and sizes are on the disk now, so these can go.
            for n in 0..3 * fs.inodes.max_inodes {
                fs.lookup(&root, fs.root(), format!("{of}{n}").as_bytes()).unwrap();
                fs.shrink_inodes();
            }
        };
        let (small, large) = (make("small", 1), make("large", MANY_PAGES));
        make_many("a");
        assert!(!fs.inodes.is_cached(small), "it had its turn");
        let inode = fs.inodes.find(large).expect("it stays");
        assert!(fs.inodes.len.load(Ordering::Relaxed) <= fs.inodes.max_inodes + 1 + BATCH);
        assert_eq!(fs.inodes.spared.load(Ordering::Relaxed), 1);
        inode.mapping.invalidate(0..MANY_PAGES as u64);
        drop(inode);
        make_many("b");
        assert!(!fs.inodes.is_cached(large), "nothing keeps it");
        assert_eq!(fs.inodes.spared.load(Ordering::Relaxed), 0);
        fs.unmount().unwrap();
    }
}
