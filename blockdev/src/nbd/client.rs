//! A connection to an export.
//!
//! Invariants: requests and replies are in step whenever no call is under way, also after
//! one that the server refused; after anything else (a connection that broke, a server that
//! says what makes no sense) every later call fails. At most [`IN_FLIGHT`] requests wait for
//! their replies, so that the replies always fit in the socket's buffers and both sides
//! never wait to be read.
//!
//! Locks: none; a connection belongs to one thread.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::address::{Address, Server};
use super::protocol::{self, Reply, Request};

/// Most requests that wait for their replies.
const IN_FLIGHT: usize = 64;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The network's or the socket's error.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The server has no place: it has taken the connection, and says nothing.
    #[error("no answer: the server may take no more connections")]
    Silent,
    /// The server refuses.
    #[error("{0}")]
    Refused(String),
    /// What answers is no server of this kind.
    #[error("not an NBD server that can be talked to: {0}")]
    Protocol(&'static str),
}

/// What an export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// See [`protocol`].
    pub flags: u16,
    /// Requests are multiples of this, bytes.
    pub least: u32,
    /// Longest request, bytes.
    pub most: u32,
}

impl Export {
    /// Whether it has all of some flags.
    pub fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn open(server: &Server, patience: Duration) -> io::Result<Self> {
        match server {
            Server::Tcp(host, port) => {
                let mut last = io::Error::from(io::ErrorKind::NotFound);
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, patience) {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            return Ok(Self::Tcp(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
            Server::Unix(path) => Ok(Self::Unix(UnixStream::connect(path)?)),
        }
    }

    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(patience),
            Self::Unix(stream) => stream.set_read_timeout(patience),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(buffer),
            Self::Unix(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The connection. Dropping it tells the server.
pub struct Connection {
    stream: BufReader<Stream>,
    export: Export,
    /// The next request's.
    cookie: u64,
    broken: bool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("export", &self.export).finish_non_exhaustive()
    }
}

/// A part of a transfer that is one request.
#[derive(Clone)]
struct Part {
    piece: usize,
    offset: u64,
    range: Range<usize>,
}

impl Connection {
    /// Connects, and begins with the export. A server may take `patience` for each answer.
    ///
    /// # Errors
    /// Why there is no connection.
    pub fn open(address: &Address, patience: Duration) -> Result<Self, ConnectError> {
        let stream = Stream::open(&address.server, patience)?;
        stream.set_patience(Some(patience))?;
        let mut stream = BufReader::new(stream);
        let export = negotiate(&mut stream, &address.export).map_err(|error| match error {
            ConnectError::Io(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ConnectError::Silent
            }
            ConnectError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                ConnectError::Refused("the server closed the connection".into())
            }
            error => error,
        })?;
        stream.get_ref().set_patience(None)?;
        Ok(Self { stream, export, cookie: 0, broken: false })
    }

    /// What the export is.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Reads all pieces, each from its offset on; tells when each is there.
    ///
    /// # Errors
    /// The first of the server's; `ECONNRESET` for a connection that broke.
    pub fn read(
        &mut self,
        pieces: &mut [(u64, &mut [u8])],
        finished: impl FnMut(usize),
    ) -> io::Result<()> {
        let parts = self.parts(pieces.iter().map(|(offset, memory)| (*offset, memory.len())));
        self.run(
            &parts,
            finished,
            |stream, window, first| {
                let mut requests = Vec::with_capacity(window.len() * protocol::REQUEST_LEN);
                for (part, cookie) in window.iter().zip(first..) {
                    requests.extend(request(protocol::READ, 0, cookie, part).encode());
                }
                stream.write_all(&requests)
            },
            |stream, part| stream.read_exact(&mut pieces[part.piece].1[part.range.clone()]),
        )
    }

    /// Writes all pieces, each from its offset on; tells when each is answered. With `fua`
    /// they are safe then.
    ///
    /// # Errors
    /// As [`Connection::read`].
    pub fn write(
        &mut self,
        pieces: &[(u64, &[u8])],
        fua: bool,
        finished: impl FnMut(usize),
    ) -> io::Result<()> {
        let flags = if fua { protocol::FUA } else { 0 };
        let parts = self.parts(pieces.iter().map(|(offset, memory)| (*offset, memory.len())));
        self.run(
            &parts,
            finished,
            |stream, window, first| {
                for (part, cookie) in window.iter().zip(first..) {
                    let header = request(protocol::WRITE, flags, cookie, part).encode();
                    stream.write_all(&header)?;
                    stream.write_all(&pieces[part.piece].1[part.range.clone()])?;
                }
                Ok(())
            },
            |_, _| Ok(()),
        )
    }

    /// Makes what was written safe.
    ///
    /// # Errors
    /// As [`Connection::read`].
    pub fn flush(&mut self) -> io::Result<()> {
        let all = [Part { piece: 0, offset: 0, range: 0..0 }];
        self.run(
            &all,
            |_| (),
            |stream, window, first| {
                stream.write_all(&request(protocol::FLUSH, 0, first, &window[0]).encode())
            },
            |_, _| Ok(()),
        )
    }

    /// Pieces as requests that are not too long.
    fn parts(&self, pieces: impl Iterator<Item = (u64, usize)>) -> Vec<Part> {
        let most = self.export.most as usize;
        let part = |piece, offset: u64, from: usize, len: usize| {
            let range = from..(from + most).min(len);
            Part { piece, offset: offset + from as u64, range }
        };
        pieces
            .enumerate()
            .flat_map(|(piece, (offset, len))| {
                (0..len).step_by(most).map(move |from| part(piece, offset, from, len))
            })
            .collect()
    }

    /// Sends the requests, a window at a time, and takes the replies as they come.
    fn run(
        &mut self,
        parts: &[Part],
        mut finished: impl FnMut(usize),
        mut send: impl FnMut(&mut Stream, &[Part], u64) -> io::Result<()>,
        mut take: impl FnMut(&mut BufReader<Stream>, &Part) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.broken {
            return Err(lost());
        }
        // Until all replies are there.
        self.broken = true;
        let mut failed = None;
        for window in parts.chunks(IN_FLIGHT) {
            let first = self.cookie;
            self.cookie += window.len() as u64;
            send(self.stream.get_mut(), window, first).map_err(as_lost)?;
            let mut waiting = vec![true; window.len()];
            for _ in window {
                let reply = self.reply()?;
                let at = usize::try_from(reply.cookie.wrapping_sub(first)).unwrap_or(usize::MAX);
                if !waiting.get_mut(at).is_some_and(std::mem::take) {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the server answers what was not asked",
                    ));
                }
                if reply.error == 0 {
                    take(&mut self.stream, &window[at]).map_err(as_lost)?;
                    finished(window[at].piece);
                } else {
                    let errno = i32::try_from(reply.error).unwrap_or(libc::EIO);
                    failed.get_or_insert(errno);
                }
            }
            // The rest was not asked for.
            if failed.is_some() {
                break;
            }
        }
        self.broken = false;
        failed.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    fn reply(&mut self) -> io::Result<Reply> {
        let mut bytes = [0; protocol::REPLY_LEN];
        self.stream.read_exact(&mut bytes).map_err(as_lost)?;
        Reply::decode(bytes).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "the server sends what is no reply")
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.broken {
            let part = Part { piece: 0, offset: 0, range: 0..0 };
            let bye = request(protocol::DISCONNECT, 0, self.cookie, &part).encode();
            // A server that is gone need not hear it.
            let _ = self.stream.get_mut().write_all(&bye);
        }
    }
}

fn request(command: u16, flags: u16, cookie: u64, part: &Part) -> Request {
    // At most `Export::most`, which is a u32.
    let length = part.range.len() as u32;
    Request { flags, command, cookie, offset: part.offset, length }
}

fn lost() -> io::Error {
    io::Error::from_raw_os_error(libc::ECONNRESET)
}

/// The end of a stream is not the end of a file.
fn as_lost(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof { lost() } else { error }
}

fn array<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = protocol::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    // A name and some numbers.
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// From the greeting to the moment in which requests may be sent.
fn negotiate(stream: &mut BufReader<Stream>, name: &str) -> Result<Export, ConnectError> {
    if u64::from_be_bytes(array(stream)?) != protocol::MAGIC {
        return Err(ConnectError::Protocol("another greeting"));
    }
    match u64::from_be_bytes(array(stream)?) {
        protocol::OPTION_MAGIC => {}
        protocol::OLDSTYLE_MAGIC => return Err(ConnectError::Protocol("an oldstyle one")),
        _ => return Err(ConnectError::Protocol("another greeting")),
    }
    let flags = u16::from_be_bytes(array(stream)?);
    if flags & protocol::FIXED_NEWSTYLE == 0 {
        return Err(ConnectError::Protocol("not fixed newstyle"));
    }
    let flags = flags & (protocol::FIXED_NEWSTYLE | protocol::NO_ZEROES);
    stream.get_mut().write_all(&u32::from(flags).to_be_bytes())?;
    let mut data = u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(1u16.to_be_bytes());
    data.extend(protocol::INFO_BLOCK_SIZE.to_be_bytes());
    stream.get_mut().write_all(&option(protocol::OPTION_GO, &data))?;
    let mut export = Export { size: 0, flags: 0, least: 1, most: protocol::DEFAULT_MOST };
    loop {
        match answer(stream)? {
            (protocol::REPLY_ACK, _) => return Ok(export),
            (protocol::REPLY_INFO, info) => learn(&mut export, &info)?,
            (protocol::REPLY_UNSUPPORTED, _) => return begin_unasked(stream, name, flags),
            (number, text) => return Err(ConnectError::Refused(refusal(number, name, &text))),
        }
    }
}

/// The answer to an option: its kind, and what it brings.
fn answer(stream: &mut BufReader<Stream>) -> Result<(u32, Vec<u8>), ConnectError> {
    if u64::from_be_bytes(array(stream)?) != protocol::OPTION_REPLY_MAGIC {
        return Err(ConnectError::Protocol("no answer to an option"));
    }
    // Only one option is under way.
    let _option: [u8; 4] = array(stream)?;
    let kind = u32::from_be_bytes(array(stream)?);
    let len = u32::from_be_bytes(array(stream)?);
    if len > protocol::LONGEST_ANSWER {
        return Err(ConnectError::Protocol("an answer too long to listen to"));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

fn learn(export: &mut Export, info: &[u8]) -> Result<(), ConnectError> {
    let short = ConnectError::Protocol("information cut short");
    let (kind, rest) = info.split_first_chunk().ok_or(short)?;
    match (u16::from_be_bytes(*kind), rest.len()) {
        (protocol::INFO_EXPORT, 10) => {
            let (size, flags) = rest.split_at(8);
            export.size = u64::from_be_bytes(size.try_into().unwrap_or_default());
            export.flags = u16::from_be_bytes(flags.try_into().unwrap_or_default());
        }
        (protocol::INFO_BLOCK_SIZE, 12) => {
            let number =
                |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap_or_default());
            let (least, most) = (number(0), number(8));
            if !least.is_power_of_two() || most < least {
                return Err(ConnectError::Protocol("block sizes that make no sense"));
            }
            export.least = least;
            // A multiple of the least, and no more than what is usual.
            export.most = most.min(protocol::DEFAULT_MOST).max(least) / least * least;
        }
        (protocol::INFO_EXPORT | protocol::INFO_BLOCK_SIZE, _) => {
            return Err(ConnectError::Protocol("information of another length"));
        }
        // What was not asked for may come, and is not needed.
        _ => {}
    }
    Ok(())
}

/// For a server that doesn't know `OPTION_GO`: it answers, or closes the connection.
fn begin_unasked(
    stream: &mut BufReader<Stream>,
    name: &str,
    flags: u16,
) -> Result<Export, ConnectError> {
    stream.get_mut().write_all(&option(protocol::OPTION_EXPORT_NAME, name.as_bytes()))?;
    if stream.fill_buf()?.is_empty() {
        return Err(ConnectError::Refused(format!("no export {name:?}")));
    }
    let size = u64::from_be_bytes(array(stream)?);
    let export_flags = u16::from_be_bytes(array(stream)?);
    if flags & protocol::NO_ZEROES == 0 {
        let _zeroes: [u8; 124] = array(stream)?;
    }
    Ok(Export { size, flags: export_flags, least: 1, most: protocol::DEFAULT_MOST })
}

fn refusal(number: u32, name: &str, text: &[u8]) -> String {
    let why = match number {
        protocol::REPLY_UNKNOWN => format!("no export {name:?}"),
        protocol::REPLY_TLS => "the server wants TLS, which is not supported".into(),
        protocol::REPLY_POLICY => "the server does not allow it".into(),
        protocol::REPLY_SHUTDOWN => "the server is going down".into(),
        number => format!("the server refuses with {number:#x}"),
    };
    match String::from_utf8_lossy(text) {
        text if text.is_empty() => why,
        text => format!("{why}: {text}"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    use super::*;

    /// A server with a script, at a socket of its own, for one connection.
    struct Scripted {
        _dir: tempfile::TempDir,
        address: Address,
        thread: std::thread::JoinHandle<()>,
    }

    impl Scripted {
        fn new(script: impl FnOnce(UnixStream) + Send + 'static) -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            let path: PathBuf = dir.path().join("socket");
            let listener = UnixListener::bind(&path).expect("a socket");
            let thread = std::thread::spawn(move || script(listener.accept().expect("it").0));
            let address = Address { server: Server::Unix(path), export: "disk".into() };
            Self { _dir: dir, address, thread }
        }

        fn open(&self) -> Result<Connection, ConnectError> {
            Connection::open(&self.address, Duration::from_millis(500))
        }
    }

    fn take(stream: &mut UnixStream, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        stream.read_exact(&mut bytes).expect("sent");
        bytes
    }

    fn greet(stream: &mut UnixStream) {
        let flags = protocol::FIXED_NEWSTYLE | protocol::NO_ZEROES;
        let greeting = [
            &protocol::MAGIC.to_be_bytes()[..],
            &protocol::OPTION_MAGIC.to_be_bytes(),
            &flags.to_be_bytes(),
        ];
        stream.write_all(&greeting.concat()).expect("greeted");
        assert_eq!(take(stream, 4), [0, 0, 0, 3]);
        // The option, its length, and the length and name of the export in it.
        assert_eq!(take(stream, 16)[8..12], protocol::OPTION_GO.to_be_bytes());
        assert_eq!(take(stream, 12)[..8], *b"\0\0\0\x04disk");
    }

    fn answer(stream: &mut UnixStream, kind: u32, data: &[u8]) {
        let bytes = [
            &protocol::OPTION_REPLY_MAGIC.to_be_bytes()[..],
            &protocol::OPTION_GO.to_be_bytes(),
            &kind.to_be_bytes(),
            &u32::try_from(data.len()).expect("short").to_be_bytes(),
            data,
        ];
        stream.write_all(&bytes.concat()).expect("answered");
    }

    /// An export of 1 MiB whose requests are at most 4 KiB.
    fn begin(stream: &mut UnixStream) {
        greet(stream);
        let size = [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[1, 0x0d]].concat();
        answer(stream, protocol::REPLY_INFO, &size);
        let blocks: Vec<u8> = [512u32, 4096, 4096].iter().flat_map(|n| n.to_be_bytes()).collect();
        answer(stream, protocol::REPLY_INFO, &[&[0, 3][..], &blocks].concat());
        answer(stream, protocol::REPLY_ACK, &[]);
    }

    fn reply(stream: &mut UnixStream, error: u32, cookie: u64, data: &[u8]) {
        let magic = protocol::REPLY_MAGIC.to_be_bytes();
        let bytes = [&magic[..], &error.to_be_bytes(), &cookie.to_be_bytes(), data].concat();
        stream.write_all(&bytes).expect("replied");
    }

    fn cookie(request: &[u8]) -> u64 {
        u64::from_be_bytes(request[8..16].try_into().expect("eight"))
    }

    #[test]
    fn long_pieces_are_several_requests_whose_replies_come_in_any_order() {
        let server = Scripted::new(|mut stream| {
            begin(&mut stream);
            let requests: Vec<_> = (0..3).map(|_| take(&mut stream, 28)).collect();
            for (n, request) in requests.iter().enumerate().rev() {
                let len = if n == 1 { 2048 } else { 4096 };
                assert_eq!(request[24..], u32::to_be_bytes(len));
                reply(&mut stream, 0, cookie(request), &vec![n as u8 + 1; len as usize]);
            }
            assert_eq!(take(&mut stream, 28)[6..8], protocol::DISCONNECT.to_be_bytes());
        });
        let mut connection = server.open().expect("connected");
        let export = *connection.export();
        assert_eq!((export.size, export.least, export.most), (1 << 20, 512, 4096));
        assert!(export.has(protocol::SEND_FLUSH | protocol::SEND_FUA | protocol::CAN_MULTI_CONN));
        let (mut one, mut two) = ([0; 6144], [0; 4096]);
        let mut seen = Vec::new();
        connection.read(&mut [(0, &mut one), (8192, &mut two)], |n| seen.push(n)).expect("read");
        assert!(one[..4096] == [1; 4096] && one[4096..] == [2; 2048] && two == [3; 4096]);
        assert_eq!(seen, [1, 0, 0]);
        drop(connection);
        server.thread.join().expect("as the script says");
    }

    #[test]
    fn an_error_is_one_requests_and_the_next_goes_on() {
        let server = Scripted::new(|mut stream| {
            begin(&mut stream);
            let one = take(&mut stream, 28 + 512);
            let two = take(&mut stream, 28 + 512);
            assert_eq!(one[4..6], protocol::FUA.to_be_bytes());
            reply(&mut stream, 0, cookie(&two), &[]);
            reply(&mut stream, 28, cookie(&one), &[]);
            let flush = take(&mut stream, 28);
            assert_eq!(flush[6..8], protocol::FLUSH.to_be_bytes());
            reply(&mut stream, 0, cookie(&flush), &[]);
            take(&mut stream, 28);
        });
        let mut connection = server.open().expect("connected");
        let data = [7; 512];
        let error = connection.write(&[(0, &data), (512, &data)], true, |n| assert_eq!(n, 1));
        assert_eq!(error.expect_err("full").raw_os_error(), Some(libc::ENOSPC));
        connection.flush().expect("flushed");
        drop(connection);
        server.thread.join().expect("as the script says");
    }

    #[test]
    fn a_server_that_lies_or_goes_is_not_asked_again() {
        for lie in [true, false] {
            let server = Scripted::new(move |mut stream| {
                begin(&mut stream);
                let request = take(&mut stream, 28);
                if lie {
                    reply(&mut stream, 0, cookie(&request) + 1, &[]);
                }
            });
            let mut connection = server.open().expect("connected");
            let kind =
                if lie { io::ErrorKind::InvalidData } else { io::ErrorKind::ConnectionReset };
            assert_eq!(connection.flush().expect_err("no reply").kind(), kind);
            let again = connection.flush().expect_err("broken");
            assert_eq!(again.kind(), io::ErrorKind::ConnectionReset);
            server.thread.join().expect("as the script says");
        }
    }

    #[test]
    fn a_refusal_says_why() {
        let server = Scripted::new(|mut stream| {
            greet(&mut stream);
            answer(&mut stream, protocol::REPLY_UNKNOWN, b"look elsewhere");
        });
        let error = server.open().expect_err("refused").to_string();
        assert_eq!(error, "no export \"disk\": look elsewhere");
        let silent = Scripted::new(|stream| {
            std::thread::sleep(Duration::from_secs(2));
            drop(stream);
        });
        assert!(matches!(silent.open(), Err(ConnectError::Silent)));
        let other = Scripted::new(|mut stream| {
            stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 and more\r\n").expect("greeted");
        });
        assert!(matches!(other.open(), Err(ConnectError::Protocol(_))));
        let hostile = Scripted::new(|mut stream| {
            greet(&mut stream);
            answer(&mut stream, protocol::REPLY_INFO, &[0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            std::thread::sleep(Duration::from_millis(100));
        });
        assert!(matches!(hostile.open(), Err(ConnectError::Protocol(_))));
    }

    #[test]
    fn a_server_without_go_begins_all_the_same() {
        let server = Scripted::new(|mut stream| {
            greet(&mut stream);
            answer(&mut stream, protocol::REPLY_UNSUPPORTED, &[]);
            let option = take(&mut stream, 20);
            assert_eq!(option[8..12], protocol::OPTION_EXPORT_NAME.to_be_bytes());
            assert_eq!(option[16..], *b"disk");
            stream.write_all(&(1u64 << 20).to_be_bytes()).expect("a size");
            stream.write_all(&[0, 5]).expect("flags");
            take(&mut stream, 28);
        });
        let connection = server.open().expect("connected");
        assert_eq!(connection.export().size, 1 << 20);
        drop(connection);
        server.thread.join().expect("as the script says");
    }
}
