//! A hash for small numbers as keys, such as inode numbers: one multiplication.
//!
//! Whoever makes files chooses neither inode numbers nor the multiplier's effect on them, so
//! nothing is needed against keys that are chosen to collide.

use std::hash::{BuildHasherDefault, Hasher};

/// A map by small numbers.
pub(crate) type IntMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<IntHasher>>;

/// Mixes a number so that both ends of the hash are good: tables use the low bits for the place
/// and the high ones to tell entries apart.
#[derive(Default)]
pub(crate) struct IntHasher(u64);

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }
    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }
    fn write_u64(&mut self, number: u64) {
        let mixed = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}
