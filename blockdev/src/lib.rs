//! Bios and the devices that carry them.
//!
//! A filesystem hands a [`Bio`] to a [`BlockDevice`]; the device completes it by
//! calling its `end_io`, which gets the bio back, with its buffers. Submission
//! never blocks on the disk. A thread that wants to wait uses
//! [`submit_bio_wait`] or the helpers on [`dyn BlockDevice`](BlockDevice).
//!
//! A device moves sectors and knows nothing of caches or journals.
//!
//! Lock order, outermost first: mempool wait list, plug list (thread-local),
//! engine queue. No lock is held while an `end_io` runs.

pub mod aligned;
pub mod bio;
pub mod bio_set;
pub mod device;
pub mod dm;
pub mod file;
pub mod flush;
pub mod limits;
pub mod memory;
pub mod mempool;
pub mod mutants;
pub mod nbd;
pub mod plug;
pub mod split;
pub mod status;
pub mod units;
mod waiter;

pub use aligned::AlignedBuf;
pub use bio::{Bio, BioEndIo, BioFlags, BioOp, BioVec, IoBuffer};
pub use bio_set::BioSet;
pub use device::{BlockDevice, submit_bio_wait};
pub use file::{FileDevice, OpenError, OpenOptions};
pub use limits::QueueLimits;
pub use memory::{MemoryDevice, MemoryOptions};
pub use mempool::{Mempool, Pooled};
pub use plug::Plug;
pub use status::{BlkResult, BlkStatus};
pub use units::{SECTOR_SIZE, Sector};
