//! Which files are likely to be read next: those listed behind the ones that are read.
//!
//! Who copies, packs or searches a tree lists a directory and then reads its files in that order.
//! Most are small, and each costs a wait for the disk, which readahead within a file does not
//! save. So the numbers of listed files are kept for a while; when one is read soon behind
//! another, those listed next are worth reading ahead.
//!
//! Invariants: nothing here decides what a file holds. What is kept is bounded, and a number
//! may be stale or have become another file's.
//!
//! Locks: one, a leaf.

use std::collections::VecDeque;

use uext_ondisk::InodeNumber;
use uext_sync::Mutex;

/// Numbers kept.
const MOST_LISTED: usize = 1 << 15;
/// Readers followed at the same time.
const MOST_READERS: usize = 4;
/// How many files a reader may leave out and still be said to go on.
const MOST_LEFT_OUT: usize = 32;
/// Files read ahead at first, and at most, in one go.
const FIRST_WINDOW: usize = 8;
const MOST_WINDOW: usize = 64;
/// Numbers that are compared at once.
const PIECE: usize = 64;

/// Somebody who reads files in the order of a listing. Places count from the first ever listed.
struct Reader {
    /// Behind the file read last.
    next: u64,
    /// Behind the last file that is read ahead.
    ahead: u64,
    window: usize,
}

#[derive(Default)]
struct State {
    listed: VecDeque<InodeNumber>,
    /// The place of the first one kept.
    base: u64,
    /// Who read last comes first.
    readers: VecDeque<Reader>,
}

/// Files listed lately.
#[derive(Default)]
pub(crate) struct Listings(Mutex<State>);

impl Listings {
    /// Files were listed, in this order.
    pub fn note(&self, files: &[InodeNumber]) {
        let files = &files[files.len().saturating_sub(MOST_LISTED)..];
        let mut state = self.0.lock();
        let gone = (state.listed.len() + files.len()).saturating_sub(MOST_LISTED);
        state.listed.drain(..gone);
        state.base += gone as u64;
        state.listed.extend(files);
    }

    /// A file is read from its beginning; what to read ahead, in this order. `was_ahead`: it was
    /// read ahead, so that it belongs to a reader if to anybody.
    pub fn on_read(&self, file: InodeNumber, was_ahead: bool) -> Vec<InodeNumber> {
        let mut state = self.0.lock();
        let found = state
            .readers
            .iter()
            .enumerate()
            .find_map(|(which, reader)| Some((which, state.find_behind(reader.next, file)?)));
        if let Some((which, place)) = found {
            let Some(mut reader) = state.readers.remove(which) else { return Vec::new() };
            reader.next = place + 1;
            let files = state.advance(&mut reader);
            state.readers.push_front(reader);
            return files;
        }
        if !was_ahead && let Some(place) = state.find_last(file) {
            let next = place + 1;
            state.readers.truncate(MOST_READERS - 1);
            state.readers.push_front(Reader { next, ahead: next, window: 0 });
        }
        Vec::new()
    }

    /// What to read ahead when more was listed since: for who read last, if he has read in order.
    pub fn go_on(&self) -> Vec<InodeNumber> {
        let mut state = self.0.lock();
        let Some(mut reader) = state.readers.pop_front() else { return Vec::new() };
        let goes_on = reader.window > 0 && reader.next >= state.base;
        let files = if goes_on { state.advance(&mut reader) } else { Vec::new() };
        state.readers.push_front(reader);
        files
    }

    /// The last so many files that were given out just now are not read ahead yet.
    pub fn left_over(&self, files: usize) {
        if let Some(reader) = self.0.lock().readers.front_mut() {
            reader.ahead = reader.ahead.saturating_sub(files as u64).max(reader.next);
        }
    }
}

impl State {
    /// The place of a file that is listed soon behind another place.
    fn find_behind(&self, place: u64, file: InodeNumber) -> Option<u64> {
        let from = usize::try_from(place.checked_sub(self.base)?).ok()?;
        let to = self.listed.len().min(from + MOST_LEFT_OUT);
        (from..to).find(|&at| self.listed[at] == file).map(|at| self.base + at as u64)
    }

    /// The place where a file was listed last.
    fn find_last(&self, file: InodeNumber) -> Option<u64> {
        let (first, second) = self.listed.as_slices();
        // Pieces of which the processor compares many numbers at once, since most are not it.
        let find = |numbers: &[InodeNumber]| {
            let is_in = |piece: &[InodeNumber]| piece.iter().fold(false, |is, n| is | (*n == file));
            let piece = numbers.chunks(PIECE).rposition(is_in)? * PIECE;
            Some(piece + numbers[piece..].iter().take(PIECE).rposition(|n| *n == file)?)
        };
        let at = find(second).map(|at| first.len() + at).or_else(|| find(first))?;
        Some(self.base + at as u64)
    }

    /// The files that follow, if a reader has used half of those read ahead for it.
    fn advance(&self, reader: &mut Reader) -> Vec<InodeNumber> {
        reader.ahead = reader.ahead.max(reader.next);
        if (reader.ahead - reader.next) as usize > reader.window / 2 {
            return Vec::new();
        }
        reader.window = (reader.window * 2).clamp(FIRST_WINDOW, MOST_WINDOW);
        let from = (reader.ahead - self.base) as usize;
        let to = self.listed.len().min(from + reader.window);
        reader.ahead = self.base + to as u64;
        self.listed.range(from..to).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(numbers: std::ops::Range<u32>) -> Vec<InodeNumber> {
        numbers.map(InodeNumber).collect()
    }

    /// Reads files; how many were read ahead when each was.
    fn read(listings: &Listings, files: &[InodeNumber], known: &mut Vec<InodeNumber>) -> usize {
        let mut hits = 0;
        for file in files {
            let hit = known.contains(file);
            hits += usize::from(hit);
            known.extend(listings.on_read(*file, hit));
        }
        hits
    }

    #[test]
    fn who_reads_in_order_finds_all_but_the_first_two_and_each_is_asked_for_once() {
        let (listings, mut known) = (Listings::default(), Vec::new());
        // Two directories, listed with several calls.
        for part in [100..180, 180..300, 1000..1010] {
            listings.note(&files(part));
        }
        let all: Vec<_> = files(100..300).into_iter().chain(files(1000..1010)).collect();
        assert_eq!(read(&listings, &all, &mut known), all.len() - 2);
        assert_eq!(known, all[2..], "each once, in order");
    }

    /// Who has read a directory in order and lists the next is expected to go on.
    #[test]
    fn a_reader_in_order_who_lists_more_is_followed_once() {
        let (listings, mut known) = (Listings::default(), Vec::new());
        assert!(listings.go_on().is_empty());
        listings.note(&files(1..20));
        listings.on_read(InodeNumber(1), false);
        assert!(listings.go_on().is_empty(), "he has read one");
        read(&listings, &files(2..20), &mut known);
        listings.note(&files(100..500));
        let ahead = listings.go_on();
        assert!(ahead == files(100..100 + ahead.len() as u32) && ahead.len() >= FIRST_WINDOW);
        let more: usize = (0..100).map(|_| listings.go_on().len()).sum();
        assert!(more <= MOST_WINDOW, "{more} for nobody");
    }

    #[test]
    fn files_left_out_do_no_harm_and_readers_do_not_disturb_each_other() {
        let (listings, mut known) = (Listings::default(), Vec::new());
        listings.note(&files(1..2000));
        let some = |from: u32| (from..from + 900).step_by(3).map(InodeNumber);
        let both: Vec<_> = some(1).zip(some(1000)).flat_map(|(a, b)| [a, b]).collect();
        assert_eq!(read(&listings, &both, &mut known), both.len() - 4);
    }

    #[test]
    fn who_reads_here_and_there_reads_nothing_ahead() {
        let (listings, mut known) = (Listings::default(), Vec::new());
        listings.note(&files(1..10_000));
        let some: Vec<_> = (1..200u32).map(|n| InodeNumber(n * 7919 % 10_000)).collect();
        read(&listings, &some, &mut known);
        read(&listings, &files(20_000..20_100), &mut known);
        assert!(known.len() <= 2 * FIRST_WINDOW, "{} read ahead", known.len());
    }

    #[test]
    fn a_file_is_found_where_it_was_listed_last() {
        let listings = Listings::default();
        // Round the ring until it lies in two pieces.
        let mut from = 100_000;
        while listings.0.lock().listed.as_slices().1.is_empty() {
            listings.note(&files(from..from + 5000));
            from += 5000;
        }
        for part in [1..3000, 2000..2100] {
            listings.note(&files(part));
        }
        let state = listings.0.lock();
        assert!(!state.listed.as_slices().1.is_empty());
        for (at, file) in state.listed.iter().enumerate() {
            let last = state.listed.iter().rposition(|listed| listed == file).unwrap();
            assert!(last == at || (2000..2100).contains(&file.0));
            if at % 97 == 0 || last != at {
                assert_eq!(state.find_last(*file), Some(state.base + last as u64));
            }
        }
        assert_eq!(state.find_last(InodeNumber(60_000)), None);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let listings = Listings::default();
        for n in 0..10 {
            listings.note(&files(n * 10_000 + 1..(n + 1) * 10_000));
        }
        listings.note(&files(200_000..300_000));
        assert_eq!(listings.0.lock().listed.len(), MOST_LISTED);
        assert!(listings.on_read(InodeNumber(5), false).is_empty());
        let (last, mut known) = (files(299_990..300_000), Vec::new());
        assert_eq!(read(&listings, &last, &mut known), 8);
    }
}
