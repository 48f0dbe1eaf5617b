//! Sectors: the unit of every bio.

/// Bytes in a sector, whatever the device's own block size is.
pub const SECTOR_SIZE: u64 = 512;

/// A position on a device, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sector(pub u64);

impl Sector {
    /// The sector at a byte offset that is a multiple of 512.
    ///
    /// # Panics
    /// When it is not: a broken promise of the caller.
    pub fn from_byte_offset(offset: u64) -> Self {
        assert!(offset.is_multiple_of(SECTOR_SIZE), "byte offset {offset} is not on a sector");
        Self(offset / SECTOR_SIZE)
    }

    /// Bytes from the start of the device.
    pub fn byte_offset(self) -> u64 {
        self.0 * SECTOR_SIZE
    }
}

impl std::fmt::Display for Sector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
