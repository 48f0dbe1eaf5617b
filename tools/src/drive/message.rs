//! What goes over the control socket: one JSON text in each packet.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::plan::Plan;

/// Longest packet: the plan's, with the workload in it.
const PACKET: usize = 128 << 10;

/// Most files of a packet.
const FILES: usize = 3;

/// To a client, with the table, the control memory and the wake-up as files.
#[derive(Debug, Serialize, Deserialize)]
pub struct Hello {
    /// What all do.
    pub plan: Plan,
    /// Which client this is.
    pub client: usize,
}

/// From a client.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Message {
    /// Its files are there, and its threads wait at the gate.
    Ready,
    /// A system call failed; the thread has ended.
    Failed(Failure),
    /// The data is not what it must be.
    Finding(Finding),
    /// All its threads have ended.
    Done,
}

/// A system call that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Why; 0 when no number says it.
    pub errno: i32,
    /// What was tried.
    pub what: String,
    /// On what.
    pub path: String,
    /// In words.
    pub text: String,
}

/// What is wrong with the data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// In a word or two: "lost write", "torn block".
    pub kind: String,
    /// Where.
    pub path: String,
    /// What was there, and what should be.
    pub text: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: {}", self.what, self.path, self.text)
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}: {}", self.kind, self.path, self.text)
    }
}

/// Sends a packet, with files.
///
/// # Errors
/// The kernel's.
pub fn send(socket: impl AsFd, packet: &impl Serialize, files: &[&OwnedFd]) -> io::Result<()> {
    let text = serde_json::to_vec(packet)?;
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match sendmsg(&socket, &[IoSlice::new(&text)], &mut rights, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            result => return Ok(result.map(drop)?),
        }
    }
}

/// Takes a packet and its files; `None` at the end.
///
/// # Errors
/// The kernel's; `InvalidData` for what is no packet of this kind.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut text = vec![0; PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut iov = [IoSliceMut::new(&mut text)];
        match recvmsg(&socket, &mut iov, &mut rights, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            result => break result?,
        }
    };
    let mut files = Vec::new();
    for message in rights.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            files.extend(fds);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&text[..received.bytes])?, files)))
}
