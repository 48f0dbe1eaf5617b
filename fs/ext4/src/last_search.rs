//! The last search of a directory, kept for the change that tends to follow it: the kernel
//! looks a name up before it has it made or removed, and the answer is still good then.
//!
//! Invariants:
//! - What is kept is what a search came to under `rwsem`, and no name of the directory has
//!   changed since: who locks a directory to change its names does so with
//!   [`Ext4::lock_names`], which takes it out.
//! - There are few places, for whatever directories: a kept search pins a buffer.
//!
//! Locks: each place's, a leaf below `rwsem`.

use uext_ondisk::InodeNumber;
use uext_sync::{Mutex, RwLockWriteGuard};

use crate::dir::Search;
use crate::error::Result;
use crate::fs::Ext4;
use crate::inode::Inode;

/// Directories whose last search is kept, by number.
const PLACES: usize = 16;

/// A search and what it came to.
struct LastSearch {
    dir: InodeNumber,
    generation: u32,
    name: Vec<u8>,
    search: Search,
}

impl LastSearch {
    fn is_of(&self, dir: &Inode) -> bool {
        self.dir == dir.ino && self.generation == dir.generation
    }
}

/// The last searches of some directories.
#[derive(Default)]
pub(crate) struct LastSearches([Mutex<Option<LastSearch>>; PLACES]);

impl LastSearches {
    fn place(&self, dir: &Inode) -> &Mutex<Option<LastSearch>> {
        &self.0[dir.ino.0 as usize % PLACES]
    }
}

/// A directory locked to change its names.
pub(crate) struct NamesLock<'a> {
    dir: &'a Inode,
    last: Option<LastSearch>,
    _rwsem: RwLockWriteGuard<'a, ()>,
}

impl NamesLock<'_> {
    /// As [`Ext4::search_entry`]; the first search may have been done already.
    pub fn search(&mut self, fs: &Ext4, name: &[u8]) -> Result<Search> {
        match self.last.take() {
            Some(last) if last.name == name => Ok(last.search),
            _ => fs.search_entry(self.dir, name),
        }
    }
}

impl Ext4 {
    /// Keeps what a search came to. The directory's lock is held.
    pub(crate) fn keep_search(&self, dir: &Inode, name: &[u8], search: &Search) {
        // The inode of inline entries changes for other reasons too.
        if self.is_inline(dir) {
            return;
        }
        // What another thread keeps meanwhile is as good.
        let Some(mut place) = self.last_searches.place(dir).try_lock() else { return };
        let mut kept = place.take().map_or_else(Vec::new, |last| last.name);
        kept.clear();
        kept.extend_from_slice(name);
        let (dir, generation) = (dir.ino, dir.generation);
        *place = Some(LastSearch { dir, generation, name: kept, search: search.clone() });
    }

    /// Locks a directory to change its names.
    pub(crate) fn lock_names<'a>(&self, dir: &'a Inode) -> NamesLock<'a> {
        let rwsem = dir.rwsem.write();
        let last = self.last_searches.place(dir).lock().take_if(|last| last.is_of(dir));
        NamesLock { dir, last, _rwsem: rwsem }
    }
}
