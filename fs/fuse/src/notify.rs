//! Messages to the kernel that answer no request.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::sync::{Weak, mpsc};
use std::time::Duration;

use nix::sys::uio::writev;
use uext_vfs::{Errno, Ino, Result};
use zerocopy::IntoBytes;

use crate::abi;
use crate::reply::swap_root;

/// How long a request waits for the kernel to drop what it has cached of a file.
const PATIENCE: Duration = Duration::from_millis(200);

/// Tells the kernel that what it cached has changed behind its back.
///
/// But for [`Notifier::inval_attributes`], never call it while serving a request on the same
/// inode or directory: the kernel may hold the lock the notification needs.
#[derive(Clone)]
pub struct Notifier {
    /// Weak, since the connection ends with its last descriptor.
    device: Weak<File>,
    root: Ino,
}

impl Notifier {
    pub(crate) fn new(device: Weak<File>, root: Ino) -> Self {
        Self { device, root }
    }

    /// The attributes of `ino` changed, and its data from `offset` on for `len` bytes
    /// (0: to the end; a negative offset: the data did not).
    ///
    /// # Errors
    /// Those of the device; an inode the kernel does not know is no error.
    pub fn inval_inode(&self, ino: Ino, offset: i64, len: i64) -> Result<()> {
        let ino = swap_root(self.root, ino);
        let body = abi::NotifyInvalInodeOut { ino, off: offset, len };
        self.send(abi::NOTIFY_INVAL_INODE, &[body.as_bytes()])
    }

    /// The attributes of `ino` changed, and replies that the kernel has not read yet may tell of
    /// the old ones. Takes no lock that an operation holds.
    ///
    /// # Errors
    /// As for [`Notifier::inval_inode`].
    pub(crate) fn inval_attributes(&self, ino: Ino) -> Result<()> {
        self.inval_inode(ino, -1, 0)
    }

    /// The data of `ino` lies elsewhere since the request that is being served. Waits for the
    /// kernel to drop what it has cached, but not for ever: it first writes pages that a mapping
    /// has made dirty, by requests that the calling thread may be the one to serve.
    pub(crate) fn inval_moved_data(&self, ino: Ino) {
        let (notifier, (done, over)) = (self.clone(), mpsc::channel());
        let tell = move || {
            if let Err(errno) = notifier.inval_inode(ino, 0, 0) {
                log::debug!("inode {ino}: the kernel was not told of a change: {errno}");
            }
            // Nobody may be waiting any more.
            let _ = done.send(());
        };
        match std::thread::Builder::new().name("notify".into()).spawn(tell) {
            Ok(_) => drop(over.recv_timeout(PATIENCE)),
            Err(error) => log::warn!("inode {ino}: the kernel may show old data: {error}"),
        }
    }

    /// What `name` in `parent` means changed.
    ///
    /// # Errors
    /// Those of the device; a name the kernel does not know is no error.
    pub fn inval_entry(&self, parent: Ino, name: &[u8]) -> Result<()> {
        let body = abi::NotifyInvalEntryOut {
            parent: swap_root(self.root, parent),
            namelen: u32::try_from(name.len()).map_err(|_| Errno::ENAMETOOLONG)?,
            flags: 0,
        };
        self.send(abi::NOTIFY_INVAL_ENTRY, &[body.as_bytes(), name, &[0]])
    }

    fn send(&self, code: i32, parts: &[&[u8]]) -> Result<()> {
        let len = size_of::<abi::OutHeader>() + parts.iter().map(|part| part.len()).sum::<usize>();
        let len = u32::try_from(len).map_err(|_| Errno::EINVAL)?;
        let header = abi::OutHeader { len, error: code, unique: 0 };
        let mut slices = vec![IoSlice::new(header.as_bytes())];
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        // A session that has ended has nobody to tell.
        let Some(device) = self.device.upgrade() else { return Ok(()) };
        match writev(device.as_fd(), &slices) {
            Ok(_) | Err(nix::Error::ENOENT) => Ok(()),
            Err(errno) => Err(Errno(errno as i32)),
        }
    }
}
