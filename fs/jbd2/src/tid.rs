//! Transaction numbers, which wrap round.

/// The number of a transaction (`tid_t`). Compare with [`tid_gt`] and [`tid_geq`], never with `<`.
pub type Tid = u32;

/// Whether `a` comes after `b`, on a ring of 2^32.
pub fn tid_gt(a: Tid, b: Tid) -> bool {
    a.wrapping_sub(b).cast_signed() > 0
}

/// Whether `a` is `b` or comes after it.
pub fn tid_geq(a: Tid, b: Tid) -> bool {
    a.wrapping_sub(b).cast_signed() >= 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_goes_on_past_the_wrap() {
        assert!(tid_gt(2, u32::MAX));
        assert!(!tid_gt(u32::MAX, 2));
        assert!(tid_geq(7, 7) && !tid_gt(7, 7));
    }
}
