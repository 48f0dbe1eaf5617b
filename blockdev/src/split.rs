//! Splitting of bios that are larger than a request.
//!
//! The pieces share a [`Chain`]; the last one to complete completes the parent,
//! once, with the first error or with success. A piece that is dropped counts as
//! failed, so the parent never waits for ever.
//!
//! Locks: the chain's, never held over an `end_io`.

use std::sync::Arc;

use uext_sync::Mutex;

use crate::bio::{Bio, BioEndIo, BioOp};
use crate::limits::QueueLimits;
use crate::status::BlkResult;

/// Whether a device with these limits takes the bio in one request.
pub fn fits(bio: &Bio, limits: &QueueLimits) -> bool {
    bio.len() <= most_bytes(bio.op(), limits)
        && bio.vecs().len() <= usize::from(limits.max_segments.max(1))
}

/// Cuts a bio into pieces that fit and that complete it together.
pub fn split(bio: Bio, limits: &QueueLimits) -> Vec<Bio> {
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < bio.len() {
        let bytes = next_cut(&bio, done, limits);
        pieces.push(bio.piece(done, bytes));
        done += bytes;
    }
    if pieces.is_empty() {
        return vec![bio];
    }
    let state = State { left: pieces.len(), status: Ok(()), parent: Some(bio) };
    let chain = Arc::new(Chain { state: Mutex::new(state) });
    for piece in &mut pieces {
        piece.set_end_io_shared(chain.clone());
    }
    pieces
}

/// The longest request for the operation, in whole blocks.
fn most_bytes(op: BioOp, limits: &QueueLimits) -> u64 {
    let block = u64::from(limits.logical_block_size);
    let most = match op {
        BioOp::Read | BioOp::Write | BioOp::Flush => u64::from(limits.max_bytes),
        BioOp::Discard => limits.max_discard_bytes,
        // 0 means that the device writes the zeroes, in what portions it likes.
        BioOp::WriteZeroes if limits.max_write_zeroes_bytes == 0 => u64::MAX,
        BioOp::WriteZeroes => limits.max_write_zeroes_bytes,
    };
    (most / block * block).max(block)
}

/// Bytes of the piece that starts at `skip`.
fn next_cut(bio: &Bio, skip: u64, limits: &QueueLimits) -> u64 {
    let most = most_bytes(bio.op(), limits).min(bio.len() - skip);
    let (mut at, mut segments, mut bytes) = (0, 0, 0);
    for vec in bio.vecs() {
        let (start, end) = (at, at + u64::from(vec.len));
        at = end;
        if end <= skip {
            continue;
        }
        if segments == limits.max_segments.max(1) || bytes >= most {
            return bytes.min(most);
        }
        bytes += end - start.max(skip);
        segments += 1;
    }
    most
}

/// What the pieces of one parent share.
struct Chain {
    state: Mutex<State>,
}

struct State {
    left: usize,
    status: BlkResult<()>,
    parent: Option<Bio>,
}

impl BioEndIo for Chain {
    fn end_io(&self, piece: Bio) {
        let mut state = self.state.lock();
        state.left -= 1;
        if state.status.is_ok() {
            state.status = piece.status();
        }
        if state.left > 0 {
            return;
        }
        let (parent, status) = (state.parent.take(), state.status);
        drop(state);
        if let Some(parent) = parent {
            parent.end_io(status);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aligned::AlignedBuf;
    use crate::bio::{BioFlags, BioVec};
    use crate::status::BlkStatus;
    use crate::units::Sector;

    fn limits() -> QueueLimits {
        let mut limits = QueueLimits::new(Sector(1 << 20));
        limits.max_bytes = 5000;
        limits.max_segments = 3;
        limits
    }

    fn write(lens: &[usize]) -> Bio {
        let mut bio = Bio::new(BioOp::Write, BioFlags::FUA, Sector(100));
        for (n, len) in lens.iter().enumerate() {
            let buf = AlignedBuf::from_slice(&vec![n as u8 + 1; *len]);
            bio.add_vec(BioVec::whole(Arc::new(buf)));
        }
        bio
    }

    #[test]
    fn pieces_keep_to_both_limits_and_cover_the_bio_in_order() {
        let bio = write(&[512, 512, 512, 512, 8192, 1024]);
        let data = bio.data();

        let pieces = split(bio, &limits());

        let mut joined = Vec::new();
        let mut at = 100;
        for piece in &pieces {
            assert!(fits(piece, &limits()), "{piece:?}");
            assert_eq!(piece.sector().0, at);
            assert_eq!(piece.flags(), BioFlags::FUA);
            at = piece.end_sector().0;
            joined.extend(piece.data());
        }
        assert_eq!(joined, data);
    }

    #[test]
    fn a_discard_is_cut_by_its_own_limit() {
        let mut limits = limits();
        limits.max_discard_bytes = 1 << 20;

        let pieces = split(Bio::range(BioOp::Discard, Sector(0), (5 << 20) + 512), &limits);

        assert_eq!(
            pieces.iter().map(Bio::len).collect::<Vec<_>>(),
            [[1 << 20; 5].as_slice(), &[512]].concat()
        );
    }

    #[test]
    fn the_parent_completes_once_with_the_first_error() {
        let (send, recv) = std::sync::mpsc::channel();
        let mut bio = write(&[4096, 4096, 4096]);
        bio.set_end_io(move |bio| send.send((bio.status(), bio.vecs().len())).expect("a receiver"));

        let mut pieces = split(bio, &limits());
        assert!(pieces.len() >= 3);
        let last = pieces.pop().expect("three pieces");
        for (n, piece) in pieces.into_iter().enumerate() {
            piece.end_io(if n == 0 { Err(BlkStatus::NoSpc) } else { Ok(()) });
        }
        assert!(recv.try_recv().is_err(), "a piece is still out");
        drop(last);

        assert_eq!(recv.recv(), Ok((Err(BlkStatus::NoSpc), 3)));
        assert!(recv.recv().is_err(), "completed once");
    }
}
