//! Which blocks are taken: an ordered set of disjoint runs, for devices of any size.

use std::collections::BTreeMap;
use std::ops::Range;

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First block.
    pub start: u64,
    /// Blocks.
    pub len: u64,
}

/// The taken blocks of `limits`.
///
/// Invariant: runs in `taken` (start → end) are disjoint, not empty and not adjacent.
#[derive(Clone, Debug)]
pub struct Space {
    limits: Range<u64>,
    taken: BTreeMap<u64, u64>,
}

impl Space {
    /// All blocks of `limits` free.
    pub fn new(limits: Range<u64>) -> Self {
        Self { limits, taken: BTreeMap::new() }
    }

    /// Takes a run of free blocks.
    ///
    /// # Panics
    /// When one of them is taken or outside: the caller looked first.
    pub fn take(&mut self, start: u64, len: u64) {
        let mut end = start + len;
        assert!(self.limits.start <= start && end <= self.limits.end, "{start}+{len} is outside");
        assert!(self.first_taken(start, end).is_none(), "{start}+{len} is taken");
        let mut start = start;
        if len == 0 {
            return;
        }
        if let Some((&before, &before_end)) = self.taken.range(..start).next_back()
            && before_end == start
        {
            start = before;
        }
        if let Some(after_end) = self.taken.remove(&end) {
            end = after_end;
        }
        self.taken.insert(start, end);
    }

    /// The first taken run that reaches into `start..end`.
    fn first_taken(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let before = self.taken.range(..=start).next_back().filter(|(_, stop)| **stop > start);
        let run = before.or_else(|| self.taken.range(start..end).next())?;
        Some((*run.0, *run.1))
    }

    /// The taken runs of `range`, cut to it.
    pub fn taken_in(&self, range: Range<u64>) -> impl Iterator<Item = Run> + '_ {
        let mut next = range.start;
        std::iter::from_fn(move || {
            // A run that goes on behind the range would be found again and again.
            if next >= range.end {
                return None;
            }
            let (start, end) = self.first_taken(next, range.end)?;
            let (start, end) = (start.max(next), end.min(range.end));
            next = end;
            Some(Run { start, len: end - start })
        })
    }

    /// The free runs of `range`, cut to it.
    pub fn free_in(&self, range: Range<u64>) -> impl Iterator<Item = Run> + '_ {
        let end = range.end.min(self.limits.end);
        let mut next = range.start.max(self.limits.start);
        std::iter::from_fn(move || {
            while next < end {
                let start = next;
                match self.first_taken(start, end) {
                    None => {
                        next = end;
                        return Some(Run { start, len: end - start });
                    }
                    Some((from, to)) => {
                        next = to;
                        if from > start {
                            return Some(Run { start, len: from - start });
                        }
                    }
                }
            }
            None
        })
    }

    /// Taken blocks in `range`.
    pub fn count_taken(&self, range: Range<u64>) -> u64 {
        self.taken_in(range).map(|run| run.len).sum()
    }

    /// Free blocks.
    pub fn count_free(&self) -> u64 {
        self.limits.end - self.limits.start - self.count_taken(self.limits.clone())
    }

    /// Takes the first `len` free blocks that lie together in one of `ranges`, tried in order.
    pub fn take_together(
        &mut self,
        len: u64,
        ranges: impl IntoIterator<Item = Range<u64>>,
    ) -> Option<u64> {
        for range in ranges {
            let found = self.free_in(range).find(|run| run.len >= len);
            if let Some(run) = found {
                self.take(run.start, len);
                return Some(run.start);
            }
        }
        None
    }

    /// Takes `count` free blocks from `goal` on, then from the start; `None`, and none taken,
    /// when there are not so many.
    pub fn take_runs(&mut self, count: u64, goal: u64) -> Option<Vec<Run>> {
        let mut runs = Vec::new();
        let mut left = count;
        let limits = self.limits.clone();
        for range in [goal..limits.end, limits.start..goal.min(limits.end)] {
            for run in self.free_in(range) {
                if left == 0 {
                    break;
                }
                let len = run.len.min(left);
                runs.push(Run { start: run.start, len });
                left -= len;
            }
        }
        if left > 0 {
            return None;
        }
        runs.iter().for_each(|run| self.take(run.start, run.len));
        Some(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_runs_become_one() {
        let mut space = Space::new(0..100);
        space.take(10, 5);
        space.take(20, 5);
        space.take(15, 5);
        assert_eq!(space.taken_in(0..100).collect::<Vec<_>>(), [Run { start: 10, len: 15 }]);
        assert_eq!(space.count_free(), 85);
    }

    /// The journal of a filesystem with 1 KiB blocks spans groups; counting what it takes of
    /// one of them did not end.
    #[test]
    fn a_run_across_the_end_of_the_range_is_cut_once() {
        let mut space = Space::new(0..100);
        space.take(10, 50);
        assert_eq!(space.taken_in(20..30).collect::<Vec<_>>(), [Run { start: 20, len: 10 }]);
        assert_eq!((space.count_taken(0..20), space.count_taken(60..60)), (10, 0));
    }

    #[test]
    fn free_runs_are_the_gaps() {
        let mut space = Space::new(1..50);
        space.take(1, 2);
        space.take(10, 10);
        let free: Vec<_> = space.free_in(0..45).collect();
        assert_eq!(free, [Run { start: 3, len: 7 }, Run { start: 20, len: 25 }]);
        assert_eq!(space.count_taken(2..12), 3);
    }

    #[test]
    fn a_search_wraps_and_gives_nothing_when_it_cannot_give_all() {
        let mut space = Space::new(0..20);
        space.take(5, 10);
        assert_eq!(space.take_runs(11, 16), None);
        let runs = space.take_runs(6, 16).unwrap();
        assert_eq!(runs, [Run { start: 16, len: 4 }, Run { start: 0, len: 2 }]);
        assert_eq!(space.take_together(3, [16..20, 0..20]), Some(2));
        assert_eq!(space.take_together(3, std::iter::once(0..20)), None);
    }
}
