//! Times of inodes: 34 bits of seconds and nanoseconds, 1901 to 2446.
//!
//! Source: Documentation/filesystems/ext4/inodes.rst, "Inode Timestamps".

/// A time with nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub secs: i64,
    /// Nanoseconds, 0..10⁹.
    pub nanos: u32,
}

impl Timestamp {
    /// The first time an inode can hold: December 1901.
    pub const MIN: Self = Self { secs: i32::MIN as i64, nanos: 0 };
    /// The last time an inode with extra fields can hold: May 2446.
    pub const MAX: Self = Self { secs: i32::MIN as i64 + (1 << 34) - 1, nanos: 999_999_999 };
    /// The last time an inode of 128 bytes can hold: January 2038.
    pub const MAX_SMALL: Self = Self { secs: i32::MAX as i64, nanos: 0 };

    /// From the two words: 32 signed bits of seconds; two more bits and the nanoseconds in
    /// `extra`. Nanoseconds over 10⁹ - 1, which only damage makes, read as the largest.
    pub fn decode(secs: u32, extra: u32) -> Self {
        let epoch = i64::from(extra & 3) << 32;
        let nanos = (extra >> 2).min(999_999_999);
        Self { secs: i64::from(secs.cast_signed()) + epoch, nanos }
    }

    /// The two words. A time outside the range is stored as the nearest that fits.
    pub fn encode(self) -> (u32, u32) {
        let time = self.clamp(Self::MIN, Self::MAX);
        let low = time.secs as u32;
        let epoch = ((time.secs - i64::from(low.cast_signed())) >> 32) as u32 & 3;
        (low, epoch | time.nanos.min(999_999_999) << 2)
    }

    /// The one word of an inode without the extra field; see [`Timestamp::encode`].
    pub fn encode_small(self) -> u32 {
        self.secs.clamp(Self::MIN.secs, Self::MAX_SMALL.secs) as u32
    }
}
