//! The FUSE front: requests from `/dev/fuse` to a filesystem.
//!
//! `Pending` and [`Session`] mount and serve as root; [`fuser_front`] does it through
//! fusermount3 for everybody else. Transports ([`devfuse`], [`uring`]) hand requests to the one
//! [`Dispatcher`], which knows only the `uext_vfs` traits.
//!
//! Locks, outermost first: the gate of a mount that may be reopened, the dispatcher's unmount result, the session's list of
//! workers, the rings' lists of finished entries and the pool's queue. The first is
//! held while the filesystem unmounts, none of them for any other call of it.

pub mod abi;
mod alone;
mod attr_readers;
mod awake;
mod beside;
mod caller;
pub mod control;
mod crowd;
mod devfuse;
pub mod dispatch;
mod foresight;
pub mod fuser_front;
pub mod mount_table;
mod mounted_fs;
pub mod notify;
pub mod null;
mod place;
pub mod reply;
mod request;
pub mod session;
mod spin;
mod splice;
mod stand_in;
mod sys;
mod uring;

pub use dispatch::Dispatcher;
pub use mounted_fs::Reopen;
pub use notify::Notifier;
pub use reply::{Answer, ReplyBuf};
pub use request::Request;
pub use session::{Config, CpuLatency, Pending, Session, SessionError, Source, Stopper, Transport};
pub use sys::{MountAttr, mount_again, serve_under_pressure};

/// The page the protocol counts in.
pub(crate) const PAGE_SIZE: usize = 4096;
