//! How often a front end knows each inode: the lookups it owes forgets for.
//!
//! The kernel may know millions of inodes whose memory is its own, so what is kept here for
//! each must be little: counts of neighbouring inodes lie together, two bytes each, and only a
//! count that outgrows them gets an entry of its own. A million files take some 4 MiB where a
//! map of numbers took 36.
//!
//! Invariants:
//! - A count is the sum of its place in `near` and its entry in `far`; the place is full
//!   whenever there is an entry.
//! - A row of zeroes is not kept.
//!
//! Locks: none; whoever has it has the lock.

use uext_ondisk::InodeNumber;
use uext_pagecache::NumberMap;

/// Inodes of one row.
pub(crate) const ROW: u32 = 16;

/// Counts of lookups by inode.
#[derive(Default)]
pub(crate) struct Lookups {
    near: NumberMap<u32, [u16; ROW as usize]>,
    far: NumberMap<InodeNumber, u64>,
}

impl Lookups {
    fn place(ino: InodeNumber) -> (u32, usize) {
        (ino.0 / ROW, (ino.0 % ROW) as usize)
    }

    /// Lookups of an inode.
    pub fn get(&self, ino: InodeNumber) -> u64 {
        let (row, at) = Self::place(ino);
        match self.near.get(&row).map_or(0, |row| row[at]) {
            u16::MAX => u64::from(u16::MAX) + self.far.get(&ino).copied().unwrap_or(0),
            count => count.into(),
        }
    }

    /// Counts one more.
    pub fn add_one(&mut self, ino: InodeNumber) {
        let (row, at) = Self::place(ino);
        let count = &mut self.near.entry(row).or_default()[at];
        if *count < u16::MAX {
            *count += 1;
        } else {
            *self.far.entry(ino).or_default() += 1;
        }
    }

    /// Takes some away; how many are left.
    pub fn take(&mut self, ino: InodeNumber, lookups: u64) -> u64 {
        let left = self.get(ino).saturating_sub(lookups);
        self.set(ino, left);
        left
    }

    /// Forgets an inode.
    pub fn remove(&mut self, ino: InodeNumber) {
        self.set(ino, 0);
    }

    /// All counts.
    pub fn all(&self) -> Vec<(InodeNumber, u64)> {
        let inodes = self.near.keys().flat_map(|row| (0..ROW).map(move |at| row * ROW + at));
        let counts = inodes.map(|ino| (InodeNumber(ino), self.get(InodeNumber(ino))));
        counts.filter(|(_, count)| *count > 0).collect()
    }

    /// Counts so many, whatever was counted before.
    pub fn set(&mut self, ino: InodeNumber, lookups: u64) {
        let near = u16::try_from(lookups).unwrap_or(u16::MAX);
        let far = lookups - u64::from(near);
        if far > 0 {
            self.far.insert(ino, far);
        } else if !self.far.is_empty() {
            self.far.remove(&ino);
        }
        let (row, at) = Self::place(ino);
        if lookups > 0 {
            self.near.entry(row).or_default()[at] = near;
        } else if let Some(counts) = self.near.get_mut(&row) {
            counts[at] = 0;
            if *counts == [0; ROW as usize] {
                self.near.remove(&row);
                // After a million forgets the memory goes back.
                if self.near.len() < self.near.capacity() / 8 {
                    self.near.shrink_to(self.near.len() * 2);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_are_those_of_a_plain_map(
            steps in prop::collection::vec((1u32..40, 0u8..5, 0u64..70_000), 1..200),
        ) {
            let mut plain = HashMap::<u32, u64>::new();
            let mut lookups = Lookups::default();
            for (ino, what, many) in steps {
                let number = InodeNumber(ino);
                let count = plain.entry(ino).or_default();
                match what {
                    0 => {
                        *count += many;
                        (0..many).for_each(|_| lookups.add_one(number));
                    }
                    1 | 2 => {
                        *count = count.saturating_sub(many);
                        prop_assert_eq!(lookups.take(number, many), *count);
                    }
                    3 => {
                        *count = many;
                        lookups.set(number, many);
                    }
                    _ => {
                        *count = 0;
                        lookups.remove(number);
                    }
                }
                for (&ino, &count) in &plain {
                    prop_assert_eq!(lookups.get(InodeNumber(ino)), count);
                }
                let all: HashMap<_, _> = lookups.all().into_iter().map(|(ino, n)| (ino.0, n)).collect();
                let counted = plain.clone().into_iter().filter(|(_, count)| *count > 0).collect();
                prop_assert_eq!(all, counted);
            }
            for &ino in plain.keys() {
                lookups.remove(InodeNumber(ino));
            }
            prop_assert!(lookups.near.is_empty() && lookups.far.is_empty());
        }
    }
}
