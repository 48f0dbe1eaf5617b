//! Large replies by splice: the pages they lie in are put into a pipe, and from there
//! into the device, instead of being named by `writev`.
//!
//! The kernel copies them all the same (it takes pages over only when they are
//! unmapped, clean and single, which memory of a program is not), so this saves
//! nothing and costs a second system call; it is there to be measured.
//!
//! Invariants: the pipe is empty between replies; one that can't be emptied is thrown
//! away. The memory is read before [`ReplyPipe::send`] returns.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno as Nix;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice, vmsplice};

use crate::PAGE_SIZE;

/// What the largest reply needs: its pages and the header.
const WANTED: i32 = 2 << 20;
/// From here on a reply goes this way.
pub(crate) const MIN_BYTES: usize = 64 << 10;

/// The pipe of one worker.
pub(crate) struct ReplyPipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Pieces it holds.
    places: usize,
}

impl ReplyPipe {
    /// A pipe as large as the system allows.
    ///
    /// # Errors
    /// Those of pipe(2).
    pub(crate) fn new() -> io::Result<Self> {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // Beyond `pipe-max-size` it takes a privilege; smaller replies fit without.
        let size = fcntl(&write, FcntlArg::F_SETPIPE_SZ(WANTED))
            .or_else(|_| fcntl(&write, FcntlArg::F_SETPIPE_SZ(WANTED / 2)))
            .or_else(|_| fcntl(&write, FcntlArg::F_GETPIPE_SZ))?;
        let places = usize::try_from(size).unwrap_or(0) / PAGE_SIZE;
        Ok(Self { read, write, places })
    }

    /// Sends a reply, header first. `None`: it doesn't fit, and nothing was sent.
    pub(crate) fn send(&self, device: &File, reply: &[IoSlice<'_>]) -> Option<io::Result<()>> {
        let pages = |slice: &IoSlice<'_>| slice.len() / PAGE_SIZE + 2;
        if reply.iter().map(pages).sum::<usize>() > self.places * 3 {
            return None;
        }
        let len: usize = reply.iter().map(|slice| slice.len()).sum();
        let filled = match vmsplice(self.write.as_fd(), reply, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Ok(filled) if filled == len => filled,
            Ok(_) | Err(_) => {
                self.empty();
                return None;
            }
        };
        // The whole reply in one call, as the device wants it.
        let result = loop {
            let flags = SpliceFFlags::empty();
            match splice(self.read.as_fd(), None, device.as_fd(), None, filled, flags) {
                Err(Nix::EINTR) => {}
                other => break other,
            }
        };
        if result != Ok(filled) {
            self.empty();
        }
        Some(match result {
            Ok(sent) if sent == filled => Ok(()),
            Ok(sent) => Err(io::Error::other(format!("{sent} of {filled} bytes taken"))),
            Err(errno) => Err(errno.into()),
        })
    }

    /// Takes out what is left; it doesn't block.
    fn empty(&self) {
        let mut rest = [0; 4 * PAGE_SIZE];
        while nix::unistd::read(self.read.as_fd(), &mut rest).is_ok_and(|len| len > 0) {}
        log::trace!("pipe {} emptied", self.read.as_raw_fd());
    }
}
