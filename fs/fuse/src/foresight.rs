//! How many of a listing's inodes are worth bringing along.
//!
//! With an inode in the reply the kernel needs no lookup for the name, which saves its asker far
//! more than the inode costs; but who wants names alone pays for all of them. The kernel does not
//! say which it will be, and most programs list a whole directory before they ask for anything.
//!
//! So each listing brings its first [`FREE`] inodes, and further ones are paid from a credit,
//! which lookups in a directory whose listing was cut short fill up: each would have been saved
//! by an inode, and shows that inodes are wanted. What is wasted on names is thus bounded by what
//! a mount begins with and by what lookups have cost.
//!
//! Locks: one of its own, held for a few instructions, under which nothing else is taken. A lookup
//! takes it only in a directory whose listing was cut short.

use uext_sync::Mutex;
use uext_sync::atomic::{AtomicU64, Ordering};
use uext_vfs::Ino;

/// The inodes that every listing brings.
const FREE: u32 = 256;
/// The inodes that a mount gives before it has seen what is done with them.
const BEGIN: u32 = 16 * 1024;
/// The most that is saved up.
const MOST: u32 = 64 * 1024;
/// A lookup waits about as long as so many inodes of a listing take.
const LOOKUP: u32 = 4;
/// Enough for the directories that are listed at one time.
const SLOTS: usize = 64;

/// A directory's last listing.
#[derive(Clone, Copy, Default)]
struct Listed {
    dir: Ino,
    /// Names so far.
    names: u32,
}

struct State {
    credit: u32,
    /// By inode number; directories that share a slot forget each other's.
    listed: [Listed; SLOTS],
}

/// Counts what listings gave, and what was looked up all the same.
pub(crate) struct Foresight {
    /// [itself]
    state: Mutex<State>,
    /// By slot, the directory whose last listing gave some names without their inodes, or 0.
    /// WHY-RELAXED: a lookup that is counted or not changes the credit alone.
    cut: [AtomicU64; SLOTS],
}

fn slot(dir: Ino) -> usize {
    // Below the number of slots.
    (dir % SLOTS as u64) as usize
}

impl Foresight {
    pub fn new() -> Self {
        let state = State { credit: BEGIN, listed: [Listed::default(); SLOTS] };
        Self { state: Mutex::new(state), cut: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    /// How many of the next `names` names of a listing get their inodes.
    pub fn worth(&self, dir: Ino, first: bool, names: usize) -> usize {
        let names = u32::try_from(names).unwrap_or(u32::MAX);
        let mut state = self.state.lock();
        let mut listed = state.listed[slot(dir)];
        if first || listed.dir != dir {
            listed = Listed { dir, names: 0 };
            self.cut[slot(dir)].store(0, Ordering::Relaxed); // WHY-RELAXED: see `cut`
        }
        let free = FREE.saturating_sub(listed.names).min(names);
        let paid = (names - free).min(state.credit);
        state.credit -= paid;
        listed.names = listed.names.saturating_add(names);
        state.listed[slot(dir)] = listed;
        if free + paid < names {
            self.cut[slot(dir)].store(dir, Ordering::Relaxed); // WHY-RELAXED: see `cut`
        }
        (free + paid) as usize
    }

    /// A name was looked up.
    pub fn looked_up(&self, dir: Ino) {
        // WHY-RELAXED: see `cut`
        if self.cut[slot(dir)].load(Ordering::Relaxed) == dir {
            let mut state = self.state.lock();
            state.credit = (state.credit + LOOKUP).min(MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lists `names` names in pieces of 100; how many inodes came along.
    fn list(foresight: &Foresight, dir: Ino, names: usize) -> usize {
        (0..names).step_by(100).map(|at| foresight.worth(dir, at == 0, 100)).sum()
    }

    #[test]
    fn names_alone_waste_no_more_than_the_beginning() {
        let foresight = Foresight::new();
        let given: usize = (0..10).map(|_| list(&foresight, 7, 100_000)).sum();
        assert_eq!(given, (10 * FREE + BEGIN) as usize);
        assert_eq!(list(&foresight, 7, 200), 200, "a small directory's inodes always come");
    }

    #[test]
    fn lookups_after_a_cut_listing_earn_inodes() {
        let foresight = Foresight::new();
        list(&foresight, 7, 100_000);
        let short = list(&foresight, 7, 10_000);
        assert_eq!(short, FREE as usize);
        for _ in short..10_000 {
            foresight.looked_up(7);
            foresight.looked_up(8);
        }
        assert_eq!(list(&foresight, 7, 10_000), 10_000);
        let earned = (10_000 - FREE) * LOOKUP - (10_000 - FREE);
        assert_eq!(list(&foresight, 9, 100_000), (FREE + earned) as usize);
    }

    #[test]
    fn lookups_where_nothing_was_cut_earn_nothing() {
        let foresight = Foresight::new();
        list(&foresight, 7, 100_000);
        list(&foresight, 8, 200);
        (0..10_000).for_each(|_| foresight.looked_up(8));
        assert_eq!(list(&foresight, 8, 10_000), FREE as usize);
    }
}
