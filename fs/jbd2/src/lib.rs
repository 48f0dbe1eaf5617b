//! The journal: recovery, handles, commit and checkpoint.
//!
//! A filesystem changes its metadata under a [`Handle`]: all changes of a handle
//! reach the disk, or none. Handles gather in the running transaction; a commit
//! writes the new contents of its blocks into the log and, when the commit block
//! is durable, the transaction has happened. Later a checkpoint brings the blocks
//! home and frees their place in the log. After a crash [`Recovery`] does that.
//!
//! Ordered data is the filesystem's own doing: it writes a file's data, and waits
//! for it, before it starts the handle that maps the blocks. The commit block's
//! flush makes that data durable first.
//!
//! What must hold at any time:
//! - A block comes home only with contents of a durable transaction, after which
//!   the log's tail may move past that transaction, and only behind a flush.
//! - A transaction number is used once in the life of a journal.
//! - The log has room for the running transaction from the moment it opens, so a
//!   commit never waits for space.
//! - After an abort nothing more is written but `s_errno`.
//!
//! Locks, outermost first:
//! 1. `Journal::checkpointing` (one checkpoint at a time; may wait for commits)
//! 2. being the committing thread (`State::committing`; waits for handles)
//! 3. `Journal::home_io`
//! 4. a buffer's content lock
//! 5. `Journal::state`, the list lock; never held over I/O
//! 6. a buffer's journal state
//! 7. `Log::superblock`, `Log::chunk`: leaves, not taken under the list lock
#![forbid(unsafe_code)]

mod ahead;
mod background;
mod checkpoint;
mod commit;
pub mod config;
pub mod error;
mod fast_commit;
pub mod handle;
pub mod journal;
mod log;
pub mod log_reader;
pub mod map;
mod memory;
#[cfg(all(test, shuttle))]
mod model;
pub mod recovery;
pub mod tid;
pub mod transaction;

pub use config::JournalConfig;
pub use error::{IoWhat, JournalError, Result};
pub use handle::{HANDLE, Handle, WriteGuard};
pub use journal::{BeforeCommit, Journal, JournalStatus, OnAbort, OnCommit};
pub use log_reader::JournalLocation;
pub use map::{JournalMap, JournalRun};
pub use recovery::{OnDamage, Recovery, RecoveryReport, ReplayPlan, ReplayViews};
pub use tid::{Tid, tid_geq, tid_gt};
pub use transaction::TxState;
