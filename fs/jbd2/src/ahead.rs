//! Log blocks that were never written, as the log of a new image, are filled with zeroes some
//! way ahead of the head, along with a commit.
//!
//! Who keeps the device, such as the filesystem an image lies in, must note with a flush that
//! blocks written for the first time hold something now, which a commit would wait for: a commit
//! of few blocks as long as one of many. So that is done once for many of them.
//!
//! Invariants:
//! - Zeroes go only to where a transaction's commit block is written next, and to free blocks
//!   behind it; they are there before that commit block goes out.
//! - Every block of the ring is looked at once, and what cannot be filled is left as it is.
//!
//! Locks: none; the state belongs to who has the chunk that the log is written from.

use uext_blockdev::Sector;

use crate::log::Log;

/// Bytes that are filled at once.
pub(crate) const WINDOW_BYTES: u32 = 256 << 10;

/// How far the log has been looked at.
pub(crate) struct Ahead {
    /// The block that is looked at next; `None` before the first commit.
    next: Option<u32>,
    /// Blocks of the ring to look at.
    left: u32,
}

impl Ahead {
    pub fn new(ring: u32) -> Self {
        Self { next: None, left: ring }
    }

    /// How many blocks from `at` on to fill, at most `room`, now that the log is written from
    /// `start` up to there.
    pub fn due(&mut self, log: &Log, start: u32, at: u32, room: u32) -> u32 {
        if self.left == 0 {
            return 0;
        }
        let next = self.next.unwrap_or(start);
        if log.distance(start, next) > log.distance(start, at) {
            return 0;
        }
        self.left = self.left.saturating_sub(log.distance(next, at));
        let window = (WINDOW_BYTES / log.block_size).min(self.left);
        let (fill, looked) = match room.min(window).min(log.end - at) {
            // Behind the commit block the next transaction begins.
            0 => (0, 1),
            most if is_sparse(log, at, most) => (most, most),
            most => (0, most),
        };
        self.left = self.left.saturating_sub(looked);
        self.next = Some(log.advance(at, looked));
        fill
    }

    /// Nothing is filled any more.
    pub fn stop(&mut self) {
        self.left = 0;
    }
}

/// Whether some of the blocks from one of the ring on were never written.
fn is_sparse(log: &Log, at: u32, blocks: u32) -> bool {
    let size = u64::from(log.block_size);
    let Some((physical, count)) = log.map.run(at, blocks) else { return false };
    let Some(offset) = physical.checked_mul(size) else { return false };
    log.device.is_sparse(Sector::from_byte_offset(offset), u64::from(count) * size)
}
