//! Bodies of the fuzz targets: every parser on any bytes, and every edit on what parses.
//!
//! `tests/fuzz` calls them with a fuzzer's input, the unit tests here with seeded random
//! and mutated bytes. A body fails by panicking.

mod journal;
mod metadata;
mod names;

pub use journal::*;
pub use metadata::*;
pub use names::*;

/// Runs a body on `rounds` inputs derived from `sample`: pure noise, the sample with a few
/// bytes changed, and the sample cut short. The seed in the panic's context replays it.
#[cfg(test)]
pub(crate) fn run_seeded(body: fn(&[u8]), sample: &[u8], seed: u64, rounds: u32) {
    let mut rng = XorShift(seed | 1);
    body(sample);
    body(&[]);
    for _ in 0..rounds {
        let mut input = sample.to_vec();
        match rng.below(4) {
            0 => input.iter_mut().for_each(|byte| *byte = rng.next() as u8),
            1 => input.truncate(rng.below(sample.len() + 1)),
            _ => {
                for _ in 0..=rng.below(8) {
                    let at = rng.below(input.len().max(1));
                    let interesting = [0, 1, 0x7F, 0x80, 0xFF, rng.next() as u8];
                    if let Some(byte) = input.get_mut(at) {
                        *byte = interesting[rng.below(interesting.len())];
                    }
                }
            }
        }
        body(&input);
    }
}

/// A small generator: the tests need repeatable noise, not good noise.
#[cfg(test)]
pub(crate) struct XorShift(pub u64);

#[cfg(test)]
impl XorShift {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}
