//! The `/dev/fuse` transport: each worker thread reads a request, serves it and
//! writes the reply, on a descriptor of its own.
//!
//! A request is read to just before a page boundary, so that the data of a `WRITE`
//! begins on a page and can go to the disk as it lies. A reply to `READ` is
//! gathered from where the data is.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno as Nix;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::uio::writev;
use uext_vfs::{Errno, ReadReply, ReadSegment};
use zerocopy::IntoBytes;

use crate::PAGE_SIZE;
use crate::abi::{self, InHeader, Opcode, OutHeader};
use crate::alone::{Alone, Lonely};
use crate::beside::Beside;
use crate::dispatch::Dispatcher;
use crate::reply::{Answer, ReplyBuf};
use crate::request::{self, Request};
use crate::session::Control;
use crate::spin::{Look, Spin};
use crate::splice::{self, ReplyPipe};
use crate::stand_in::StandIns;
use crate::sys;

/// Header and arguments of a `WRITE`: what stands before its data.
const WRITE_PREFIX: usize = size_of::<InHeader>() + size_of::<abi::WriteIn>();
/// What stands before a reply's body.
const REPLY_PREFIX: usize = size_of::<OutHeader>();
/// Most pieces one `writev` takes.
const IOV_MAX: usize = 1024;
/// What holes are sent from.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// Memory of one worker: where requests are read to and replies built.
struct Buffers {
    request: Vec<u8>,
    start: usize,
    /// Header and body of a reply, so that both go out as one piece.
    reply: Vec<u8>,
    /// For large replies, when they are to be spliced.
    pipe: Option<ReplyPipe>,
}

impl Buffers {
    fn new(max_write: usize) -> Self {
        let len = (WRITE_PREFIX + max_write).max(abi::MIN_READ_BUFFER);
        // Zeroed in bulk, so pages come when they are first touched.
        let request = vec![0; len + 2 * PAGE_SIZE];
        let page = request.as_ptr().align_offset(PAGE_SIZE);
        let start = page + PAGE_SIZE - WRITE_PREFIX;
        Self { request, start, reply: vec![0; max_write + PAGE_SIZE], pipe: None }
    }

    fn request_mut(&mut self, max_write: usize) -> &mut [u8] {
        let len = (WRITE_PREFIX + max_write).max(abi::MIN_READ_BUFFER);
        &mut self.request[self.start..self.start + len]
    }
}

/// Answers requests up to and with `INIT`.
pub(crate) fn handshake(
    device: &File,
    dispatcher: &Dispatcher,
    max_write: usize,
) -> io::Result<()> {
    let mut buffers = Buffers::new(max_write);
    loop {
        let len = match nix::unistd::read(device, buffers.request_mut(max_write)) {
            Ok(len) => len,
            Err(Nix::EINTR | Nix::ENOENT | Nix::EAGAIN) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let request = &buffers.request[buffers.start..buffers.start + len];
        let request = Request::parse(request).map_err(|_| io::Error::other("malformed INIT"))?;
        let unique = request.header.unique;
        let mut out = ReplyBuf::new(&mut buffers.reply[REPLY_PREFIX..]);
        let answer = dispatcher.dispatch(&request, &mut out);
        let end = REPLY_PREFIX + out.filled().len();
        let refused = match &answer {
            Answer::Status(Err(errno)) => Some(*errno),
            _ => None,
        };
        send(device, unique, &answer, &mut buffers.reply[..end], None)?;
        if request.header.opcode == Opcode::Init as u32 {
            // A kernel with a newer major version sends a second INIT to whoever reads next.
            return refused.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno.0)));
        }
    }
}

/// What a worker serves, and when it ends.
pub(crate) struct Served<'a> {
    pub(crate) dispatcher: &'a Dispatcher,
    pub(crate) control: &'a Control,
    /// Whether the thread waits for a request, so that a signal interrupts nothing else.
    pub(crate) waiting: &'a AtomicBool,
    pub(crate) max_write: usize,
    /// Requests come another way, and here only what can wait (FORGET) or is rare
    /// (INTERRUPT): let some come together rather than wake up for each.
    pub(crate) lazily: bool,
    /// Large replies are spliced.
    pub(crate) splice: bool,
    /// How long the worker looks for the next request before it sleeps: one of a mount may.
    pub(crate) spin: Duration,
}

/// How long what comes lazily may wait.
const LAZY: Duration = Duration::from_millis(10);

/// What a worker has of its own.
struct Worker<'a> {
    device: &'a File,
    /// For who looks for requests.
    looking: Option<Looking>,
    buffers: Buffers,
    slept: bool,
    served: bool,
}

impl<'a> Worker<'a> {
    fn new(served: &Served<'_>, device: &'a File) -> Self {
        let mut buffers = Buffers::new(served.max_write);
        if served.splice {
            let pipe = ReplyPipe::new().inspect_err(|error| log::warn!("no pipe: {error}"));
            buffers.pipe = pipe.ok();
        }
        // What was read from one descriptor is answered there.
        let wants_quick = served.spin > Duration::ZERO && !served.lazily;
        let quick = if wants_quick { nonblocking_clone(device) } else { None };
        let looking = quick.map(|quick| Looking {
            quick,
            spin: Spin::new(served.spin),
            lonely: Lonely::new(),
            beside: Beside::new(),
            asked: true,
        });
        let slept = !served.lazily;
        Self { device, looking, buffers, slept, served: false }
    }
}

/// How a worker looks for requests.
struct Looking {
    /// Reads from it don't wait.
    quick: File,
    spin: Spin,
    lonely: Lonely,
    beside: Beside,
    /// Whether somebody waited for the last answer.
    asked: bool,
}

impl Looking {
    /// The read that found a request, if one did, and whether that had waited.
    fn look(&mut self, alone: &Alone, request: &mut [u8]) -> Option<(nix::Result<usize>, bool)> {
        if self.beside.is_there() || self.lonely.leaves_it(alone) {
            return None;
        }
        let look = || match nix::unistd::read(&self.quick, request) {
            Err(Nix::EAGAIN) => None,
            result => Some(result),
        };
        match self.spin.until(look) {
            Look::Found { found, waited } => Some((found, waited)),
            Look::InVain => None,
            Look::Busy => {
                self.lonely.found(alone, true);
                None
            }
        }
    }

    /// A request was taken; if by looking, it had waited or not.
    fn took(&mut self, alone: &Alone, message: &[u8], waited: Option<bool>) {
        let client = request::client(message);
        self.lonely.took(alone, client);
        let asks = request::is_waited_for(message);
        if let Some(waited) = waited {
            // A client does not wait for the end of some messages before it asks again.
            self.lonely.found(alone, waited && asks && self.asked);
        }
        self.asked = asks;
        if request::takes_long(message) {
            self.stop(alone);
        } else {
            // Last: what is before may take the lock of `alone`.
            self.beside.took(alone, client, || self.spin.has_spare_cpu());
        }
    }

    /// What comes takes long, or requests are not looked for any more.
    fn stop(&mut self, alone: &Alone) {
        self.beside.leave(alone);
        self.lonely.stop(alone);
    }
}

impl Served<'_> {
    /// Serves requests until the connection ends or `stop` is set.
    ///
    /// # Errors
    /// Those of the device that do not mean that the filesystem was unmounted.
    pub(crate) fn serve(&self, device: &File) -> io::Result<()> {
        let mut worker = Worker::new(self, device);
        let ended = loop {
            match self.serve_next(&mut worker) {
                Ok(true) if worker.looking.is_none() => self.control.alone.rest(),
                Ok(true) => {}
                ended => break ended.map(drop),
            }
        };
        if let Some(looking) = &mut worker.looking {
            looking.beside.leave(&self.control.alone);
        }
        ended
    }

    /// The same for a stand-in, which serves only when it is wanted.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn stand_in(&self, device: &File) -> io::Result<()> {
        let mut worker = Worker::new(self, device);
        while let Some(_standing) = self.control.stand_ins.stand() {
            if !self.serve_next(&mut worker)? {
                break;
            }
        }
        Ok(())
    }

    /// Waits for a request and serves it, or for anything else that ends the wait; whether there
    /// may be more.
    fn serve_next(&self, worker: &mut Worker<'_>) -> io::Result<bool> {
        let Worker { device, looking, buffers, slept, served } = worker;
        let mut looked = None;
        if let Some(looking) = looking {
            if self.control.awake.is_held() {
                // A CPU that doesn't halt is not worth looking for.
                looking.stop(&self.control.alone);
            } else if *served {
                let request = buffers.request_mut(self.max_write);
                looked = looking.look(&self.control.alone, request);
            }
        }
        let waited = looked.map(|(_, waited)| waited);
        let result = match looked {
            Some((result, _)) => Some(result),
            None => self.wait_and_read(device, buffers, slept),
        };
        let Some(result) = result else { return Ok(!self.control.is_stopping()) };
        let len = match result {
            Ok(len) => len,
            // ENOENT: the request was taken back between the wake-up and the read.
            Err(Nix::EINTR | Nix::ENOENT | Nix::EAGAIN) => {
                *served = false;
                return Ok(true);
            }
            // Unmounted. ECONNABORTED is told of: who aborted the connection lost requests.
            Err(Nix::ENODEV) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        *served = true;
        if !self.lazily {
            self.control.awake.note();
        }
        if let Some(looking) = looking {
            let message = &buffers.request[buffers.start..buffers.start + len];
            looking.took(&self.control.alone, message, waited);
        }
        let device = match &*looking {
            Some(looking) if waited.is_some() => &looking.quick,
            _ => *device,
        };
        let result = serve_one(device, self.dispatcher, &self.control.stand_ins, buffers, len);
        if let Some(looking) = looking {
            looking.lonely.served();
        }
        match result {
            Ok(()) => {}
            // The connection is gone, and with it who asked; so nobody counts lookups.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            // The kernel has ended the request with EIO; it is our reply that was wrong.
            Err(error) => log::error!("a reply was refused: {error}"),
        }
        Ok(true)
    }

    /// Waits for a request and reads it. Nothing when the worker is to end, or when what comes
    /// lazily has not come yet.
    fn wait_and_read(
        &self,
        device: &File,
        buffers: &mut Buffers,
        slept: &mut bool,
    ) -> Option<nix::Result<usize>> {
        self.waiting.store(true, Ordering::SeqCst); // PAIRS-WITH: session::Control::kick
        if self.control.is_stopping() {
            self.waiting.store(false, Ordering::SeqCst); // PAIRS-WITH: session::Control::kick
            return None;
        }
        if self.lazily && !has_request(device, if *slept { 0 } else { -1 }) {
            *slept = false;
            return None;
        }
        if !*slept {
            std::thread::sleep(LAZY);
            *slept = true;
        }
        let result = nix::unistd::read(device, buffers.request_mut(self.max_write));
        self.waiting.store(false, Ordering::SeqCst); // PAIRS-WITH: session::Control::kick
        Some(result)
    }
}

/// A descriptor of the connection whose reads don't wait, or none where there is no such thing.
fn nonblocking_clone(device: &File) -> Option<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let new = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/fuse");
    let clone = new.and_then(|new| sys::clone_connection(&new, device).map(|()| new));
    clone.inspect_err(|error| log::debug!("requests are not looked for: {error}")).ok()
}

/// Waits, `timeout` milliseconds or for ever (-1), until a read would not; also true
/// when the connection has ended.
fn has_request(device: &File, timeout: i32) -> bool {
    let mut fds = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::NONE);
    poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
}

fn serve_one(
    device: &File,
    dispatcher: &Dispatcher,
    stand_ins: &StandIns,
    buffers: &mut Buffers,
    len: usize,
) -> io::Result<()> {
    let message = &buffers.request[buffers.start..buffers.start + len];
    match Request::parse(message) {
        Ok(request) => {
            let unique = request.header.unique;
            // Until the request has been served.
            let away = Cell::new(None);
            let early = |body: &[u8]| {
                let Some(goes) = stand_ins.away() else { return false };
                // Who asked may be gone, and then nobody waits for it.
                if let Err(error) = write_reply(device, unique, 0, &[IoSlice::new(body)]) {
                    log::debug!("an early reply was refused: {error}");
                }
                away.set(Some(goes));
                true
            };
            let request = Request { early: Some(&early), ..request };
            let mut out = ReplyBuf::new(&mut buffers.reply[REPLY_PREFIX..]);
            let answer = dispatcher.dispatch(&request, &mut out);
            let end = REPLY_PREFIX + out.filled().len();
            let (reply, pipe) = (&mut buffers.reply[..end], buffers.pipe.as_ref());
            send(device, request.header.unique, &answer, reply, pipe)
        }
        Err(header) => {
            log::error!("malformed request of {len} bytes: {header:?}");
            let Some(header) = header else { return Ok(()) };
            write_reply(device, header.unique, -Errno::EINVAL.0, &[])
        }
    }
}

/// Sends an answer; what it has put into the buffer stands in `reply` after the room for the
/// header.
fn send(
    device: &File,
    unique: u64,
    answer: &Answer,
    reply: &mut [u8],
    pipe: Option<&ReplyPipe>,
) -> io::Result<()> {
    match answer {
        Answer::None => Ok(()),
        Answer::Status(Ok(())) => write_reply(device, unique, 0, &[]),
        Answer::Status(Err(errno)) => write_reply(device, unique, -errno.0, &[]),
        Answer::Buffer => {
            // One piece of memory is what the kernel finds quickest.
            let header = reply_header(unique, 0, reply.len() - REPLY_PREFIX)?;
            reply[..REPLY_PREFIX].copy_from_slice(header.as_bytes());
            nix::unistd::write(device, reply).map(drop).map_err(io::Error::from)
        }
        Answer::Read(data) => {
            let mut slices = Vec::with_capacity(data.segments().len());
            gather(data, &mut slices);
            if let Some(pipe) = pipe
                && data.len() >= splice::MIN_BYTES
            {
                let header = reply_header(unique, 0, data.len())?;
                let mut reply = Vec::with_capacity(slices.len() + 1);
                reply.push(IoSlice::new(header.as_bytes()));
                reply.extend(slices.iter().map(|slice| IoSlice::new(slice)));
                if let Some(result) = pipe.send(device, &reply) {
                    return result;
                }
            }
            if slices.len() < IOV_MAX {
                return write_reply(device, unique, 0, &slices);
            }
            // So many small pieces are quicker copied than listed, even if they could be.
            write_reply(device, unique, 0, &[IoSlice::new(&data.to_vec())])
        }
    }
}

/// The pieces of read data, holes from the zero page.
fn gather<'a>(data: &'a ReadReply, slices: &mut Vec<IoSlice<'a>>) {
    for segment in data.segments() {
        match segment {
            ReadSegment::Folio(folio, range) => slices.push(IoSlice::new(&folio[range.clone()])),
            ReadSegment::Bytes(bytes) => slices.push(IoSlice::new(bytes)),
            ReadSegment::Zeroes(len) => {
                let mut left = *len;
                while left > 0 {
                    let piece = left.min(ZEROES.len());
                    slices.push(IoSlice::new(&ZEROES[..piece]));
                    left -= piece;
                }
            }
        }
    }
}

fn reply_header(unique: u64, error: i32, len: usize) -> io::Result<OutHeader> {
    let len = u32::try_from(REPLY_PREFIX + len).map_err(io::Error::other)?;
    Ok(OutHeader { len, error, unique })
}

fn write_reply(device: &File, unique: u64, error: i32, data: &[IoSlice<'_>]) -> io::Result<()> {
    let header = reply_header(unique, error, data.iter().map(|slice| slice.len()).sum())?;
    let header = IoSlice::new(header.as_bytes());
    // Only gathered reads need the heap.
    let result = match data {
        [] => nix::unistd::write(device, &header),
        [one] => writev(device.as_fd(), &[header, IoSlice::new(one)]),
        many => {
            let mut all = Vec::with_capacity(many.len() + 1);
            all.push(header);
            all.extend(many.iter().map(|slice| IoSlice::new(slice)));
            writev(device.as_fd(), &all)
        }
    };
    result.map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_of_a_write_begins_on_a_page() {
        let mut buffers = Buffers::new(1 << 20);
        let request = buffers.request_mut(1 << 20);
        assert_eq!(request.as_ptr().addr() % PAGE_SIZE, PAGE_SIZE - WRITE_PREFIX);
        assert_eq!(request.len(), WRITE_PREFIX + (1 << 20));
    }

    #[test]
    fn holes_are_gathered_without_memory_of_their_own() {
        let mut data = ReadReply::new();
        data.push(ReadSegment::Bytes(vec![7; 3]));
        data.push(ReadSegment::Zeroes(ZEROES.len() + 5));
        let mut slices = Vec::new();
        gather(&data, &mut slices);
        let lens: Vec<usize> = slices.iter().map(|slice| slice.len()).collect();
        assert_eq!(lens, [3, ZEROES.len(), 5]);
    }
}
