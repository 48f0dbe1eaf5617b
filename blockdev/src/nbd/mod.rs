//! Network block devices: the protocol, addresses, and a client.
//!
//! - [`protocol`]: numbers and layouts, and nothing that waits;
//! - [`address`]: `nbd://` and `nbd+unix://` addresses;
//! - [`client`]: a connection to an export, which a thread reads and writes through.
//!
//! Specified by the NBD project (`doc/proto.md` and `doc/uri.md`): fixed newstyle
//! negotiation and simple replies. No TLS.
//!
//! Locks: none; a connection belongs to one thread.

pub mod address;
pub mod client;
pub mod protocol;

pub use address::{Address, Server};
pub use client::{ConnectError, Connection, Export};
