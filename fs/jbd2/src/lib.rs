//! The journal: recovery, handles, commit and checkpoint.
#![forbid(unsafe_code)]

pub mod error;
pub mod log_reader;
pub mod map;
pub mod recovery;
pub mod tid;

pub use error::{IoWhat, JournalError, Result};
pub use log_reader::JournalLocation;
pub use map::{JournalMap, JournalRun};
pub use recovery::{OnDamage, Overlay, Recovery, RecoveryReport};
pub use tid::{Tid, tid_geq, tid_gt};
