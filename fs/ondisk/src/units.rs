//! Numbers with a unit.
//!
//! Index, count and size are different words: a newtype here is always an
//! index (where something is); counts stay plain integers.

use std::fmt;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident, $repr:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $repr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
        impl From<$repr> for $name {
            fn from(value: $repr) -> Self {
                Self(value)
            }
        }
        impl $name {
            /// The index `count` further on, or `None` past the type's range.
            pub fn checked_add(self, count: $repr) -> Option<Self> {
                self.0.checked_add(count).map(Self)
            }
        }
        impl std::ops::Add<$repr> for $name {
            type Output = Self;
            /// Panics on overflow; for numbers that were checked before.
            fn add(self, count: $repr) -> Self {
                Self(self.0 + count)
            }
        }
        impl std::ops::Sub for $name {
            type Output = $repr;
            /// The distance between two indices; panics when `other` is larger.
            fn sub(self, other: Self) -> $repr {
                self.0 - other.0
            }
        }
    };
}

unit!(
    /// A block of the filesystem, counted from the start of the device (`ext4_fsblk_t`).
    FsBlock, u64
);
unit!(
    /// A block of a file, counted from the start of the file (`ext4_lblk_t`).
    LogicalBlock, u32
);
unit!(
    /// A block group (`ext4_group_t`).
    GroupNumber, u32
);
unit!(
    /// An inode, counted from 1 as the format does.
    InodeNumber, u32
);

impl InodeNumber {
    /// `EXT4_BAD_INO`: the list of bad blocks.
    pub const BAD_BLOCKS: Self = Self(1);
    /// `EXT4_ROOT_INO`: the root directory.
    pub const ROOT: Self = Self(2);
    /// `EXT4_RESIZE_INO`: the reserved group descriptor blocks.
    pub const RESIZE: Self = Self(7);
    /// `EXT4_JOURNAL_INO`: the journal of a filesystem that holds its own.
    pub const JOURNAL: Self = Self(8);
    /// `EXT4_GOOD_OLD_FIRST_INO`: the first inode that is not reserved on revision 0.
    pub const GOOD_OLD_FIRST: Self = Self(11);
}
