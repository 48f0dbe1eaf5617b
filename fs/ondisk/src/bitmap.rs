//! Searching and editing bitmaps of a group: little-endian, bit 0 is the lowest bit
//! of the first byte.
//!
//! Source: Documentation/filesystems/ext4/bitmaps.rst.
//!
//! Invariants: a bit index at or past the end of the bytes is never an error when
//! searching (the search stops at the end); setting or clearing one is an assertion,
//! since the caller computed it. Searches look at 64 bits at a time.

const WORD: usize = 8;
const WORD_BITS: u32 = 64;

/// Bits in the bytes, at most `u32::MAX`.
fn bits(map: &[u8]) -> u32 {
    u32::try_from(map.len().saturating_mul(8)).unwrap_or(u32::MAX)
}

/// Word number `word`; bytes past the end read as zero.
#[inline]
fn load(map: &[u8], word: usize) -> u64 {
    let start = word * WORD;
    match map.get(start..start + WORD).and_then(|bytes| bytes.try_into().ok()) {
        Some(bytes) => u64::from_le_bytes(bytes),
        None => {
            let tail = map.get(start..).unwrap_or_default();
            let mut bytes = [0; WORD];
            bytes[..tail.len()].copy_from_slice(tail);
            u64::from_le_bytes(bytes)
        }
    }
}

/// First bit in `start..end` whose word, after `flip`, has a one.
#[inline]
fn find_next(map: &[u8], start: u32, end: u32, flip: u64) -> Option<u32> {
    let end = end.min(bits(map));
    if start >= end {
        return None;
    }
    let last_word = (end - 1) / WORD_BITS;
    let mut word = start / WORD_BITS;
    let mut value = (load(map, word as usize) ^ flip) & (!0 << (start % WORD_BITS));
    while value == 0 {
        if word == last_word {
            return None;
        }
        word += 1;
        value = load(map, word as usize) ^ flip;
    }
    let bit = word * WORD_BITS + value.trailing_zeros();
    (bit < end).then_some(bit)
}

/// Whether the bit is set.
///
/// # Panics
/// When it is past the end.
#[inline]
pub fn test(map: &[u8], bit: u32) -> bool {
    map[(bit / 8) as usize] >> (bit % 8) & 1 == 1
}

/// Sets a bit and returns whether it was set before.
///
/// # Panics
/// When it is past the end.
#[inline]
pub fn set(map: &mut [u8], bit: u32) -> bool {
    let byte = &mut map[(bit / 8) as usize];
    let was = *byte >> (bit % 8) & 1 == 1;
    *byte |= 1 << (bit % 8);
    was
}

/// Clears a bit and returns whether it was set before.
///
/// # Panics
/// When it is past the end.
#[inline]
pub fn clear(map: &mut [u8], bit: u32) -> bool {
    let byte = &mut map[(bit / 8) as usize];
    let was = *byte >> (bit % 8) & 1 == 1;
    *byte &= !(1 << (bit % 8));
    was
}

/// First clear bit in `start..end`.
#[inline]
pub fn find_next_zero(map: &[u8], start: u32, end: u32) -> Option<u32> {
    find_next(map, start, end, !0)
}

/// First set bit in `start..end`.
#[inline]
pub fn find_next_set(map: &[u8], start: u32, end: u32) -> Option<u32> {
    find_next(map, start, end, 0)
}

/// Last clear bit in `start..end`.
pub fn find_prev_zero(map: &[u8], start: u32, end: u32) -> Option<u32> {
    let end = end.min(bits(map));
    if start >= end {
        return None;
    }
    let mut word = (end - 1) / WORD_BITS;
    let first_word = start / WORD_BITS;
    // Bits past `end` in its word count as set.
    let keep = !0 >> (WORD_BITS - 1 - (end - 1) % WORD_BITS);
    let mut value = !load(map, word as usize) & keep;
    while value == 0 {
        if word == first_word {
            return None;
        }
        word -= 1;
        value = !load(map, word as usize);
    }
    let bit = word * WORD_BITS + (WORD_BITS - 1 - value.leading_zeros());
    (bit >= start).then_some(bit)
}

/// A run of equal bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitRun {
    /// First bit.
    pub start: u32,
    /// Bits, at least 1.
    pub len: u32,
}

impl BitRun {
    /// First bit after the run.
    pub fn end(self) -> u32 {
        self.start + self.len
    }
}

/// First run of clear bits in `start..end`, cut at `end`.
#[inline]
pub fn next_zero_run(map: &[u8], start: u32, end: u32) -> Option<BitRun> {
    let end = end.min(bits(map));
    let first = find_next_zero(map, start, end)?;
    let stop = find_next_set(map, first, end).unwrap_or(end);
    Some(BitRun { start: first, len: stop - first })
}

/// First run of set bits in `start..end`, cut at `end`.
#[inline]
pub fn next_set_run(map: &[u8], start: u32, end: u32) -> Option<BitRun> {
    let end = end.min(bits(map));
    let first = find_next_set(map, start, end)?;
    let stop = find_next_zero(map, first, end).unwrap_or(end);
    Some(BitRun { start: first, len: stop - first })
}

/// Every run of clear bits in `start..end`, in order.
pub fn zero_runs(map: &[u8], start: u32, end: u32) -> impl Iterator<Item = BitRun> + '_ {
    let mut next = start;
    std::iter::from_fn(move || {
        let run = next_zero_run(map, next, end)?;
        next = run.end();
        Some(run)
    })
}

/// Every run of set bits in `start..end`, in order.
pub fn set_runs(map: &[u8], start: u32, end: u32) -> impl Iterator<Item = BitRun> + '_ {
    let mut next = start;
    std::iter::from_fn(move || {
        let run = next_set_run(map, next, end)?;
        next = run.end();
        Some(run)
    })
}

/// First run of at least `len` clear bits in `start..end`; its length is exactly `len`. Looks at
/// no more of a run than that.
pub fn find_zero_run(map: &[u8], start: u32, end: u32, len: u32) -> Option<BitRun> {
    let (end, len) = (end.min(bits(map)), len.max(1));
    let mut next = start;
    loop {
        let first = find_next_zero(map, next, end)?;
        let stop = first.checked_add(len).filter(|stop| *stop <= end)?;
        match find_next_set(map, first, stop) {
            Some(set) => next = set,
            None => return Some(BitRun { start: first, len }),
        }
    }
}

/// Masks for the edge bytes of `start..start+len` and the range of whole bytes between.
fn edges(start: u32, len: u32) -> (usize, u8, std::ops::Range<usize>, u8) {
    let end = start + len;
    let (first, last) = ((start / 8) as usize, (end / 8) as usize);
    let head = 0xFFu8 << (start % 8);
    let tail = (1u8 << (end % 8)) - 1;
    if first == last {
        (first, head & tail, first..first, 0)
    } else {
        (first, head, first + 1..last, tail)
    }
}

/// Sets `len` bits from `start`.
///
/// # Panics
/// When the range does not lie in the bitmap.
pub fn set_range(map: &mut [u8], start: u32, len: u32) {
    assert!(in_map(map, start, len), "bits {start}+{len} are outside the bitmap");
    if len == 0 {
        return;
    }
    let (first, head, whole, tail) = edges(start, len);
    let after = whole.end.max(first + 1);
    map[first] |= head;
    map[whole].fill(0xFF);
    if tail != 0 {
        map[after] |= tail;
    }
}

/// Clears `len` bits from `start`.
///
/// # Panics
/// When the range does not lie in the bitmap.
pub fn clear_range(map: &mut [u8], start: u32, len: u32) {
    assert!(in_map(map, start, len), "bits {start}+{len} are outside the bitmap");
    if len == 0 {
        return;
    }
    let (first, head, whole, tail) = edges(start, len);
    let after = whole.end.max(first + 1);
    map[first] &= !head;
    map[whole].fill(0);
    if tail != 0 {
        map[after] &= !tail;
    }
}

fn in_map(map: &[u8], start: u32, len: u32) -> bool {
    start.checked_add(len).is_some_and(|end| end <= bits(map))
}

/// Whether all `len` bits from `start` are clear; bits past the end count as set.
pub fn is_range_clear(map: &[u8], start: u32, len: u32) -> bool {
    in_map(map, start, len) && find_next_set(map, start, start + len).is_none()
}

/// Whether all `len` bits from `start` are set; bits past the end count as clear.
pub fn is_range_set(map: &[u8], start: u32, len: u32) -> bool {
    in_map(map, start, len) && find_next_zero(map, start, start + len).is_none()
}

/// Set bits in `0..end`.
pub fn count_set(map: &[u8], end: u32) -> u32 {
    let end = end.min(bits(map));
    let (words, rest) = (end / WORD_BITS, end % WORD_BITS);
    let whole: u32 = (0..words).map(|word| load(map, word as usize).count_ones()).sum();
    if rest == 0 {
        return whole;
    }
    whole + (load(map, words as usize) & ((1 << rest) - 1)).count_ones()
}

/// Clear bits in `0..end`.
pub fn count_zero(map: &[u8], end: u32) -> u32 {
    let end = end.min(bits(map));
    end - count_set(map, end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive(map: &[u8], bit: u32) -> bool {
        map[(bit / 8) as usize] & (1 << (bit % 8)) != 0
    }

    /// Bytes that are often all ones or all zeroes, so that runs are long.
    fn maps() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![4 => Just(0u8), 4 => Just(0xFF), 2 => any::<u8>()];
        proptest::collection::vec(byte, 1..70)
    }

    #[test]
    fn searches_on_an_empty_range_find_nothing() {
        assert_eq!(find_next_zero(&[0], 8, 100), None);
        assert_eq!(find_next_set(&[], 0, 8), None);
        assert_eq!(find_prev_zero(&[0], 3, 3), None);
    }

    #[test]
    fn a_run_is_cut_at_the_end_of_the_search() {
        assert_eq!(next_zero_run(&[0; 32], 10, 200), Some(BitRun { start: 10, len: 190 }));
        assert_eq!(next_zero_run(&[0; 8], 10, 200), Some(BitRun { start: 10, len: 54 }));
    }

    proptest! {
        #[test]
        fn searches_agree_with_looking_at_each_bit(map in maps(), a in 0u32..600, b in 0u32..600) {
            let end = b.min(map.len() as u32 * 8);
            let zero = (a..end).find(|&bit| !naive(&map, bit));
            let one = (a..end).find(|&bit| naive(&map, bit));
            let prev = (a..end).rev().find(|&bit| !naive(&map, bit));
            prop_assert_eq!(find_next_zero(&map, a, b), zero);
            prop_assert_eq!(find_next_set(&map, a, b), one);
            prop_assert_eq!(find_prev_zero(&map, a, b), prev);
            prop_assert_eq!(count_set(&map, b), (0..end).filter(|&bit| naive(&map, bit)).count() as u32);
            prop_assert_eq!(count_zero(&map, b), (0..end).filter(|&bit| !naive(&map, bit)).count() as u32);
        }

        #[test]
        fn the_first_run_that_is_long_enough_is_found(
            map in maps(), a in 0u32..600, b in 0u32..600, len in 0u32..100,
        ) {
            let (end, len) = (b.min(map.len() as u32 * 8), len.max(1));
            let fits = |start: u32| start + len <= end && (start..start + len).all(|bit| !naive(&map, bit));
            let first = (a..end).find(|&start| fits(start)).map(|start| BitRun { start, len });
            prop_assert_eq!(find_zero_run(&map, a, b, len), first);
        }

        #[test]
        fn runs_cover_exactly_the_clear_bits(map in maps()) {
            let mut seen = vec![0xFFu8; map.len()];
            for run in zero_runs(&map, 0, u32::MAX) {
                prop_assert!(is_range_clear(&map, run.start, run.len));
                clear_range(&mut seen, run.start, run.len);
            }
            prop_assert_eq!(&seen, &map);
            let mut seen = vec![0u8; map.len()];
            for run in set_runs(&map, 0, u32::MAX) {
                prop_assert!(is_range_set(&map, run.start, run.len));
                set_range(&mut seen, run.start, run.len);
            }
            prop_assert_eq!(&seen, &map);
        }

        #[test]
        fn ranges_change_their_bits_and_no_other(map in maps(), a in 0u32..560, len in 0u32..560) {
            let total = map.len() as u32 * 8;
            let (a, len) = (a % total, len.min(total - a % total));
            let mut set_map = map.clone();
            let mut clear_map = map.clone();
            set_range(&mut set_map, a, len);
            clear_range(&mut clear_map, a, len);
            for bit in 0..total {
                let inside = (a..a + len).contains(&bit);
                prop_assert_eq!(naive(&set_map, bit), inside || naive(&map, bit));
                prop_assert_eq!(naive(&clear_map, bit), !inside && naive(&map, bit));
            }
        }

        #[test]
        fn single_bits_report_their_old_value(map in maps(), bit in 0u32..560) {
            let bit = bit % (map.len() as u32 * 8);
            let mut other = map.clone();
            prop_assert_eq!(set(&mut other, bit), naive(&map, bit));
            prop_assert!(test(&other, bit));
            prop_assert!(clear(&mut other, bit));
            prop_assert!(!test(&other, bit));
        }
    }
}
