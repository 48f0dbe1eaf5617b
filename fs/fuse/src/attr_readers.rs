//! Who may still be about to believe old attributes.
//!
//! The kernel keeps the attributes that a reply gives it for a day, unless it learned of a change
//! after it had asked. Of a change that it asked for itself, such as a new name in a directory, it
//! marks what it has as old, but a reply that was on its way meanwhile, whose reader had not run
//! yet, then counts as new, and a directory keeps the time before the change. A notification ends
//! that: replies to questions from before it are thrown away.
//!
//! One is sent only where such a reply may exist: an inode's slot says who has been given its
//! attributes since the last notification. A thread's own reply has been read when it asks for
//! something else. Inodes may share a slot, which costs a notification too many.
//!
//! Locks: none. Who gives attributes marks first and reads them after it; who changes them looks
//! at the mark after the change. So of two that meet, one sees the other.

use uext_sync::atomic::{AtomicU32, Ordering};
use uext_vfs::Ino;

/// A power of two; enough for the directories that are busy at one time.
const SLOTS: usize = 4096;
/// Nobody has been given attributes.
const NOBODY: u32 = 0;
/// More than one has, or one without a number.
const MANY: u32 = u32::MAX;

/// The threads that have been given attributes, by inode.
pub(crate) struct AttrReaders(
    /// PAIRS-WITH: `give` with `changed`, as above; the filesystem's locks order the attributes
    /// themselves.
    Box<[AtomicU32]>,
);

impl AttrReaders {
    pub fn new() -> Self {
        Self((0..SLOTS).map(|_| AtomicU32::new(NOBODY)).collect())
    }

    fn slot(&self, ino: Ino) -> &AtomicU32 {
        // Below the number of slots.
        &self.0[(ino % SLOTS as u64) as usize]
    }

    /// A thread is about to be given an inode's attributes.
    pub fn give(&self, ino: Ino, thread: u32) {
        let thread = if thread == NOBODY { MANY } else { thread };
        let slot = self.slot(ino);
        // PAIRS-WITH: changed
        let seen = slot.compare_exchange(NOBODY, thread, Ordering::SeqCst, Ordering::SeqCst);
        if seen.is_err_and(|other| other != thread) {
            slot.store(MANY, Ordering::SeqCst); // PAIRS-WITH: changed
        }
    }

    /// A thread has changed an inode's attributes; whether somebody else may be about to believe
    /// the old ones.
    pub fn changed(&self, ino: Ino, thread: u32) -> bool {
        let slot = self.slot(ino);
        // PAIRS-WITH: give. Most changes meet nobody, and need not take the line from other
        // processors.
        if slot.load(Ordering::SeqCst) == NOBODY {
            return false;
        }
        // PAIRS-WITH: give
        let reader = slot.swap(NOBODY, Ordering::SeqCst);
        reader != NOBODY && reader != thread
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;
    use std::sync::Arc;

    use nix::fcntl::OFlag;
    use zerocopy::{FromBytes as _, IntoBytes as _};

    use super::*;
    use crate::abi::{self, Opcode};
    use crate::dispatch::Dispatcher;
    use crate::notify::Notifier;
    use crate::null::NullFs;
    use crate::reply::{Answer, ReplyBuf};
    use crate::request::Request;
    use crate::session::Config;

    #[test]
    fn only_others_are_told() {
        let readers = AttrReaders::new();
        assert!(!readers.changed(7, 1), "nobody has read");
        readers.give(7, 1);
        assert!(!readers.changed(7, 1), "its own reply has been read");
        readers.give(7, 1);
        assert!(!readers.changed(8, 2), "of another inode");
        assert!(readers.changed(7, 2), "another's reply may be on its way");
        assert!(!readers.changed(7, 2), "it was told already");
        readers.give(7, 1);
        readers.give(7, 2);
        assert!(readers.changed(7, 1) && !readers.changed(7, 1), "one of two");
        readers.give(7, 0);
        assert!(readers.changed(7, 3), "who has no number may be anybody");
    }

    /// A request as a thread sends it.
    fn ask(dispatcher: &Dispatcher, opcode: Opcode, thread: u32, body: &[u8]) {
        let header = abi::InHeader {
            opcode: opcode as u32,
            nodeid: abi::ROOT_ID,
            pid: thread,
            len: (size_of::<abi::InHeader>() + body.len()) as u32,
            ..Default::default()
        };
        let message = [header.as_bytes(), body].concat();
        let mut memory = vec![0; 4096];
        let request = Request::parse(&message).map_err(|_| "a bad request").unwrap();
        match dispatcher.dispatch(&request, &mut ReplyBuf::new(&mut memory)) {
            Answer::Buffer | Answer::Status(Ok(())) => {}
            _ => panic!("{opcode:?} is refused"),
        }
    }

    #[test]
    fn a_directory_that_another_has_looked_at_is_told_of() {
        let dispatcher = Dispatcher::new(Arc::new(NullFs::new(false)), &Config::default());
        let (told, device) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        let (mut told, device) = (File::from(told), Arc::new(File::from(device)));
        dispatcher.notify_by(Notifier::new(Arc::downgrade(&device), abi::ROOT_ID));
        let mut heard = || {
            let mut bytes = [0; 256];
            told.read(&mut bytes).map_or(0, |len| {
                let (header, _) = abi::OutHeader::read_from_prefix(&bytes[..len]).unwrap();
                header.error
            })
        };
        let look = |thread| {
            ask(&dispatcher, Opcode::Getattr, thread, abi::GetattrIn::default().as_bytes());
        };
        let mkdir = |thread, name: &[u8]| {
            let body = [abi::MkdirIn::default().as_bytes(), name].concat();
            ask(&dispatcher, Opcode::Mkdir, thread, &body);
        };
        look(1);
        mkdir(1, b"a\0");
        assert_eq!(heard(), 0, "its own look");
        look(1);
        mkdir(2, b"b\0");
        assert_eq!(heard(), abi::NOTIFY_INVAL_INODE, "another's look");
        mkdir(2, b"c\0");
        assert_eq!(heard(), 0, "nobody has looked since");
        look(1);
        ask(&dispatcher, Opcode::Rmdir, 2, b"c\0");
        assert_eq!(heard(), abi::NOTIFY_INVAL_INODE, "a removal");
    }
}
