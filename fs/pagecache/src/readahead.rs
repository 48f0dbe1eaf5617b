//! Readahead: how far ahead of a sequential reader to read.
//!
//! Per open file, or per inode where nothing is kept per open file. A read that
//! continues where the last one ended is sequential; the window doubles from four times
//! the request to the limit, and the next window is asked for when the reader enters
//! the last half of the one under way, so that it never catches up. A random read asks
//! for nothing.

use std::ops::Range;

use crate::frame::PAGE_SIZE;

/// Largest window unless told otherwise: 4 MiB, since the kernel asks for 1 MiB at a time and
/// the disk is to work while that is copied.
pub(crate) const MAX_PAGES: u64 = (4 * 1024 * 1024 / PAGE_SIZE) as u64;
/// Smallest window, pages.
const MIN_PAGES: u64 = 4;

/// The window of one reader; all in pages.
#[derive(Clone, Debug)]
pub struct ReadaheadState {
    max_pages: u64,
    /// Where the last read ended.
    next_index: u64,
    /// Whether there was a read.
    started: bool,
    /// The window last asked for.
    window: Range<u64>,
}

impl Default for ReadaheadState {
    fn default() -> Self {
        Self::new(MAX_PAGES)
    }
}

impl ReadaheadState {
    /// A reader whose window grows to `max_pages`; 0 turns readahead off.
    pub fn new(max_pages: u64) -> Self {
        Self { max_pages, next_index: 0, started: false, window: 0..0 }
    }

    /// Most pages of a window; 0 when readahead is off.
    pub fn max_pages(&self) -> u64 {
        self.max_pages
    }

    /// Tells of a read of `count` pages at `index` in a file of `total` pages. Returns
    /// what to read ahead now: it begins at or after the read, lies inside the file, and
    /// is not asked for again while the reader goes on.
    pub fn on_read(&mut self, index: u64, count: u64, total: u64) -> Option<Range<u64>> {
        let end = index.saturating_add(count);
        let sequential = if self.started {
            // Reads smaller than a page touch the same page again.
            index == self.next_index || index.checked_add(1) == Some(self.next_index)
        } else {
            index == 0
        };
        self.started = true;
        self.next_index = end;
        if !sequential || self.max_pages == 0 {
            self.window = 0..0;
            return None;
        }
        // Windows follow each other without gaps, so all up to the last one's end was asked for.
        let within = !self.window.is_empty() && end <= self.window.end;
        let (start, len) = if within {
            let half = self.window.start + (self.window.end - self.window.start) / 2;
            if end <= half {
                return None;
            }
            (self.window.end, (self.window.end - self.window.start).saturating_mul(2))
        } else {
            (end, count.saturating_mul(4).max(MIN_PAGES))
        };
        let stop = start.saturating_add(len.min(self.max_pages)).min(total);
        if start >= stop {
            return None;
        }
        self.window = start..stop;
        Some(start..stop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `total` pages in requests of `step`; returns the windows.
    fn stream(state: &mut ReadaheadState, step: u64, total: u64) -> Vec<Range<u64>> {
        (0..total)
            .step_by(step as usize)
            .filter_map(|at| state.on_read(at, step.min(total - at), total))
            .collect()
    }

    #[test]
    fn a_sequential_reader_gets_growing_windows_without_gap_or_overlap() {
        let mut state = ReadaheadState::default();
        let windows = stream(&mut state, 1, 8000);
        assert_eq!(windows[0], 1..5);
        assert!(windows.windows(2).all(|w| w[0].end == w[1].start));
        assert_eq!(windows.last().map(|w| w.end), Some(8000));
        assert_eq!(windows.iter().map(|w| w.end - w.start).max(), Some(1024));
    }

    #[test]
    fn a_window_is_asked_for_before_the_reader_needs_it() {
        let mut state = ReadaheadState::default();
        let mut ahead = 0;
        for at in 0..1000 {
            assert!(at == 0 || at < ahead, "page {at} was read before it was read ahead");
            if let Some(window) = state.on_read(at, 1, 1000) {
                ahead = window.end;
            }
        }
    }

    #[test]
    fn random_reads_ask_for_nothing() {
        let mut state = ReadaheadState::default();
        for at in [100, 7, 900, 55, 3000, 12] {
            assert_eq!(state.on_read(at, 2, 10_000), None);
        }
    }

    #[test]
    fn reads_smaller_than_a_page_are_sequential() {
        let mut state = ReadaheadState::default();
        assert!(state.on_read(0, 1, 100).is_some());
        assert_eq!(state.on_read(0, 1, 100), None);
        assert_eq!(state.on_read(1, 1, 100), None);
        assert_eq!(state.on_read(1, 1, 100), None);
        assert!(state.on_read(2, 1, 100).is_some() || state.on_read(3, 1, 100).is_some());
    }

    #[test]
    fn nothing_is_read_past_the_end_whatever_the_numbers() {
        let mut state = ReadaheadState::default();
        assert_eq!(state.on_read(0, 10, 10), None);
        assert_eq!(state.on_read(10, u64::MAX, 10), None);
        assert_eq!(state.on_read(u64::MAX, u64::MAX, u64::MAX), None);
        let mut off = ReadaheadState::new(0);
        assert_eq!(off.on_read(0, 1, 100), None);
    }

    #[test]
    fn a_new_sequence_starts_small_again() {
        let mut state = ReadaheadState::default();
        stream(&mut state, 8, 2000);
        assert_eq!(state.on_read(500, 1, 2000), None);
        assert_eq!(state.on_read(501, 1, 2000), Some(502..506));
    }
}
