//! Frames, folios, address spaces, the reverse map and writeback.

use std::ops::Deref;

/// A folio's bytes, held shared: nobody changes them while it lives.
pub struct FolioReadGuard(Vec<u8>);

impl Deref for FolioReadGuard {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
