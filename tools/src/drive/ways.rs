//! The ways to read and write: each moves whole pieces between memory and a file.
//!
//! Invariants: a transfer that returns `Ok` moved every byte of every piece. What a way
//! needs beside the file (a ring, a pipe, a file to copy from) is made when it is first
//! used, and belongs to one thread.
//!
//! Locks: none; callers hold the mutexes of what they transfer.

use std::io::{self, IoSlice, IoSliceMut, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, SeekFrom, sendfile};
use rustix::io::{Errno, ReadWriteFlags, retry_on_intr};
use rustix::pipe::SpliceFlags;
use uext_drive_sys::{Aio, Direction, FileMap, Piece, Ring};

use super::stats::{Op, Shard};
use super::workload::Way;

/// What is sent through a pipe or a socket at once, at most, bytes.
const CHUNK: usize = 64 << 10;
/// After so long, AIO requests are cancelled.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a thread has for the ways it has used.
#[derive(Debug)]
pub struct Ways {
    depth: usize,
    aio: Option<Aio>,
    ring: Option<Ring>,
    pipes: Option<Pipes>,
    sockets: Option<(UnixStream, UnixStream)>,
    staging: Option<OwnedFd>,
}

#[derive(Debug)]
struct Pipes {
    /// What both hold, bytes: less than usual for a user who has many.
    room: usize,
    out: OwnedFd,
    into: OwnedFd,
    twin_out: OwnedFd,
    twin_into: OwnedFd,
}

/// How files of a way are opened, beside what all need.
pub fn open_flags(way: Way) -> OFlags {
    if matches!(way, Way::Direct | Way::Aio) { OFlags::DIRECT } else { OFlags::empty() }
}

/// Whether what a way has written is on the disk already.
pub fn is_durable(way: Way) -> bool {
    way == Way::Flags
}

impl Ways {
    /// Nothing yet; batches have so many pieces.
    pub fn new(depth: usize) -> Self {
        let (aio, ring, pipes, sockets, staging) = (None, None, None, None, None);
        Self { depth, aio, ring, pipes, sockets, staging }
    }

    /// Where a thread's copies go through: a name in a directory.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn make_staging(&mut self, dir: impl AsFd, name: &str) -> io::Result<()> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        self.staging = Some(rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o644))?);
        Ok(())
    }

    /// Moves all pieces, and counts each.
    ///
    /// # Errors
    /// The filesystem's; `UnexpectedEof` for a file that ends before a piece.
    pub fn transfer(
        &mut self,
        way: Way,
        direction: Direction,
        file: impl AsFd,
        pieces: &mut [Piece<'_>],
        shard: Shard<'_>,
    ) -> io::Result<()> {
        let file = file.as_fd();
        let op = if direction == Direction::Read { Op::Read } else { Op::Write };
        if matches!(way, Way::Aio | Way::Uring) {
            let start = Instant::now();
            let results = match way {
                Way::Aio => {
                    let aio = match &mut self.aio {
                        Some(aio) => aio,
                        none => none.insert(Aio::new(self.depth)?),
                    };
                    aio.run(direction, file, pieces, Some(PATIENCE))?
                }
                _ => {
                    // The depth is at most 1024.
                    let depth = (self.depth as u32).next_power_of_two();
                    let ring = match &mut self.ring {
                        Some(ring) => ring,
                        none => none.insert(Ring::new(depth)?),
                    };
                    ring.run(direction, file, pieces)
                }
            };
            let took = start.elapsed();
            for (piece, result) in pieces.iter_mut().zip(results) {
                let moved = result?;
                // What is short goes on by the plain way.
                if moved < piece.memory.len() {
                    let rest = &mut piece.memory[moved..];
                    Self::plain(direction, file, piece.offset + moved as u64, rest)?;
                }
                shard.count(op, took, piece.memory.len() as u64);
            }
            return Ok(());
        }
        for piece in pieces {
            let start = Instant::now();
            let Piece { offset, memory } = piece;
            match (way, direction) {
                (Way::Vector, _) => Self::vector(direction, file, *offset, memory)?,
                (Way::Flags, _) => Self::flags(direction, file, *offset, memory)?,
                (Way::Mmap, _) => Self::mapped(direction, file, *offset, memory)?,
                (Way::Splice, Direction::Read) => self.splice_out(file, *offset, memory)?,
                (Way::Splice, Direction::Write) => self.splice_in(file, *offset, memory)?,
                (Way::Sendfile, Direction::Read) => self.send_out(file, *offset, memory)?,
                (Way::Sendfile, Direction::Write) => self.send_in(file, *offset, memory)?,
                (Way::Copy, Direction::Read) => self.copy_out(file, *offset, memory)?,
                (Way::Copy, Direction::Write) => self.copy_in(file, *offset, memory)?,
                _ => Self::plain(direction, file, *offset, memory)?,
            }
            shard.count(op, start.elapsed(), memory.len() as u64);
        }
        Ok(())
    }

    fn plain(
        direction: Direction,
        file: impl AsFd,
        offset: u64,
        memory: &mut [u8],
    ) -> io::Result<()> {
        whole(memory.len(), |done| {
            let at = offset + done as u64;
            match direction {
                Direction::Read => rustix::io::pread(&file, &mut memory[done..], at),
                Direction::Write => rustix::io::pwrite(&file, &memory[done..], at),
            }
        })
    }

    fn vector(
        direction: Direction,
        file: impl AsFd,
        offset: u64,
        memory: &mut [u8],
    ) -> io::Result<()> {
        whole(memory.len(), |done| {
            let (first, second) = {
                let rest = &mut memory[done..];
                let middle = rest.len() / 2;
                rest.split_at_mut(middle)
            };
            let at = offset + done as u64;
            match direction {
                Direction::Read => {
                    let mut two = [IoSliceMut::new(first), IoSliceMut::new(second)];
                    rustix::io::preadv(&file, &mut two, at)
                }
                Direction::Write => {
                    rustix::io::pwritev(&file, &[IoSlice::new(first), IoSlice::new(second)], at)
                }
            }
        })
    }

    fn flags(
        direction: Direction,
        file: impl AsFd,
        offset: u64,
        memory: &mut [u8],
    ) -> io::Result<()> {
        whole(memory.len(), |done| {
            let at = offset + done as u64;
            if direction == Direction::Write {
                let piece = [IoSlice::new(&memory[done..])];
                return rustix::io::pwritev2(&file, &piece, at, ReadWriteFlags::DSYNC);
            }
            let mut piece = [IoSliceMut::new(&mut memory[done..])];
            // What is not in the page cache, or a filesystem that can't say so.
            match rustix::io::preadv2(&file, &mut piece, at, ReadWriteFlags::NOWAIT) {
                Err(Errno::AGAIN | Errno::OPNOTSUPP) => {
                    rustix::io::preadv2(&file, &mut piece, at, ReadWriteFlags::empty())
                }
                result => result,
            }
        })
    }

    fn mapped(
        direction: Direction,
        file: impl AsFd,
        offset: u64,
        memory: &mut [u8],
    ) -> io::Result<()> {
        let end = offset + memory.len() as u64;
        let size = u64::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0);
        let too_long = |_| io::Error::from(Errno::FBIG);
        let len = usize::try_from(end).map_err(too_long)?;
        match direction {
            Direction::Read if size < end => Err(io::ErrorKind::UnexpectedEof.into()),
            Direction::Read => {
                FileMap::new(file, len, false)?.read(len - memory.len(), memory);
                Ok(())
            }
            Direction::Write => {
                if size < end {
                    // Room that is there, since its lack would be a signal and no error.
                    match rustix::fs::fallocate(
                        &file,
                        rustix::fs::FallocateFlags::empty(),
                        offset,
                        memory.len() as u64,
                    ) {
                        Err(Errno::OPNOTSUPP) => rustix::fs::ftruncate(&file, end)?,
                        result => result?,
                    }
                }
                FileMap::new(file, len, true)?.write(len - memory.len(), memory);
                Ok(())
            }
        }
    }

    fn pipes(&mut self) -> io::Result<&Pipes> {
        if self.pipes.is_none() {
            let (out, into) = rustix::pipe::pipe()?;
            let (twin_out, twin_into) = rustix::pipe::pipe()?;
            let room = [&into, &twin_into].map(rustix::pipe::fcntl_getpipe_size);
            let room = room[0]?.min(room[1]?).min(CHUNK);
            self.pipes = Some(Pipes { room, out, into, twin_out, twin_into });
        }
        self.pipes.as_ref().ok_or_else(|| io::ErrorKind::Other.into())
    }

    /// Memory to pipe, its twin by tee, pipe to file; the twin must be the same.
    fn splice_in(&mut self, file: impl AsFd, offset: u64, memory: &[u8]) -> io::Result<()> {
        let pipes = self.pipes()?;
        let mut at = offset;
        let mut twin = vec![0; pipes.room.min(memory.len())];
        for chunk in memory.chunks(pipes.room) {
            whole(chunk.len(), |done| rustix::io::write(&pipes.into, &chunk[done..]))?;
            let copied =
                rustix::pipe::tee(&pipes.out, &pipes.twin_into, chunk.len(), SpliceFlags::empty())?;
            whole(chunk.len(), |_| {
                let to = Some(&mut at);
                rustix::pipe::splice(&pipes.out, None, &file, to, chunk.len(), SpliceFlags::empty())
            })?;
            whole(copied, |done| rustix::io::read(&pipes.twin_out, &mut twin[done..copied]))?;
            if twin[..copied] != chunk[..copied] {
                return Err(io::Error::other("tee made another stream of it"));
            }
        }
        Ok(())
    }

    fn splice_out(&mut self, file: impl AsFd, offset: u64, memory: &mut [u8]) -> io::Result<()> {
        let pipes = self.pipes()?;
        let mut at = offset;
        for chunk in memory.chunks_mut(pipes.room) {
            let len = chunk.len();
            let mut done = 0;
            while done < len {
                let flags = SpliceFlags::empty();
                let moved = retry_on_intr(|| {
                    let from = Some(&mut at);
                    rustix::pipe::splice(&file, from, &pipes.into, None, len - done, flags)
                })?;
                if moved == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let part = &mut chunk[done..done + moved];
                whole(moved, |read| rustix::io::read(&pipes.out, &mut part[read..]))?;
                done += moved;
            }
        }
        Ok(())
    }

    fn staging(&self) -> io::Result<&OwnedFd> {
        self.staging.as_ref().ok_or_else(|| io::Error::other("no file to copy through"))
    }

    /// From the file beside it: sendfile to a file goes where that stands.
    fn send_in(&mut self, file: impl AsFd, offset: u64, memory: &mut [u8]) -> io::Result<()> {
        let staging = self.staging()?;
        Self::plain(Direction::Write, staging, 0, memory)?;
        rustix::fs::seek(&file, SeekFrom::Start(offset))?;
        let mut from = 0;
        whole(memory.len(), |done| sendfile(&file, staging, Some(&mut from), memory.len() - done))
    }

    fn send_out(&mut self, file: impl AsFd, offset: u64, memory: &mut [u8]) -> io::Result<()> {
        let (into, out) = match &mut self.sockets {
            Some(pair) => pair,
            none => none.insert(UnixStream::pair()?),
        };
        let mut at = offset;
        for chunk in memory.chunks_mut(CHUNK) {
            let mut done = 0;
            while done < chunk.len() {
                let left = chunk.len() - done;
                let sent = retry_on_intr(|| sendfile(&into, &file, Some(&mut at), left))?;
                if sent == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                out.read_exact(&mut chunk[done..done + sent])?;
                done += sent;
            }
        }
        Ok(())
    }

    fn copy_in(&mut self, file: impl AsFd, offset: u64, memory: &mut [u8]) -> io::Result<()> {
        let staging = self.staging()?;
        Self::plain(Direction::Write, staging, 0, memory)?;
        let (mut from, mut to) = (0, offset);
        whole(memory.len(), |done| {
            let left = memory.len() - done;
            rustix::fs::copy_file_range(staging, Some(&mut from), &file, Some(&mut to), left)
        })
    }

    fn copy_out(&mut self, file: impl AsFd, offset: u64, memory: &mut [u8]) -> io::Result<()> {
        let staging = self.staging()?;
        let (mut from, mut to) = (offset, 0);
        whole(memory.len(), |done| {
            let left = memory.len() - done;
            rustix::fs::copy_file_range(&file, Some(&mut from), staging, Some(&mut to), left)
        })?;
        Self::plain(Direction::Read, staging, 0, memory)
    }
}

/// Calls until `len` bytes have moved.
fn whole(len: usize, mut call: impl FnMut(usize) -> Result<usize, Errno>) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match call(done) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => done += moved,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::stats::LEN;
    use super::*;
    use uext_blockdev::aligned::AlignedBuf;
    use uext_sync::atomic::AtomicU64;

    /// Each way writes what the plain way reads, and reads what it wrote.
    #[test]
    fn every_way_moves_the_same_bytes() {
        let counts: Vec<AtomicU64> = (0..LEN).map(|_| AtomicU64::new(0)).collect();
        let shard = Shard::new(&counts, 0);
        let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
        let dir_fd = std::fs::File::open(dir.path()).expect("the directory");
        for way in Way::ALL {
            let mut ways = Ways::new(4);
            ways.make_staging(&dir_fd, "staging").expect("a file");
            let flags = OFlags::RDWR | OFlags::CREATE | open_flags(way);
            let name = format!("{way:?}");
            let file = rustix::fs::openat(&dir_fd, &name, flags, Mode::from_raw_mode(0o600));
            let file = file.expect("a file");
            // Not in order, and longer than a pipe.
            let places = [3u64, 0, 1, 2, 5];
            let mut memory: Vec<AlignedBuf> = places
                .iter()
                .map(|&n| AlignedBuf::from_slice(&vec![n as u8 + 1; 128 << 10]))
                .collect();
            let mut pieces = |memory: &mut [AlignedBuf], direction| {
                let mut pieces: Vec<Piece<'_>> = memory
                    .iter_mut()
                    .zip(places)
                    .map(|(memory, n)| Piece { offset: n * (128 << 10), memory })
                    .collect();
                ways.transfer(way, direction, &file, &mut pieces, shard)
            };
            pieces(&mut memory, Direction::Write).unwrap_or_else(|e| panic!("{way:?}: {e}"));
            let whole = std::fs::read(dir.path().join(&name)).expect("the file");
            for (n, chunk) in whole.chunks(128 << 10).enumerate() {
                let value = if n == 4 { 0 } else { n as u8 + 1 };
                assert!(chunk.iter().all(|&byte| byte == value), "{way:?}: piece {n}");
            }
            let mut back: Vec<AlignedBuf> = places.map(|_| AlignedBuf::new(128 << 10)).into();
            pieces(&mut back, Direction::Read).unwrap_or_else(|e| panic!("{way:?}: {e}"));
            assert!(back.iter().zip(&memory).all(|(a, b)| **a == **b), "{way:?}");
            let mut beyond = [AlignedBuf::new(4096)];
            let mut piece = [Piece { offset: 1 << 20, memory: &mut beyond[0] }];
            let end = ways.transfer(way, Direction::Read, &file, &mut piece, shard);
            assert_eq!(end.expect_err("the end").kind(), io::ErrorKind::UnexpectedEof, "{way:?}");
        }
    }
}
