//! A batch of reads or writes by Linux AIO: io_submit, io_getevents, io_cancel.
//!
//! Invariants: [`Aio::run`] returns only when the kernel has ended every request of the
//! batch, so the memory it was lent is never the kernel's afterwards. Cancelling is advice:
//! a request that is cancelled is waited for like any other.
//!
//! Locks: none; a context belongs to one thread. Unsafe is here because libc wraps none of
//! these calls.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use crate::{Direction, Piece};

/// `IOCB_CMD_PREAD`.
const CMD_PREAD: u16 = 0;
/// `IOCB_CMD_PWRITE`.
const CMD_PWRITE: u16 = 1;

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// An AIO context.
#[derive(Debug)]
pub struct Aio {
    context: u64,
    depth: usize,
}

impl Aio {
    /// One for `depth` requests at a time.
    ///
    /// # Errors
    /// `EAGAIN` when the system's `aio-max-nr` is used up.
    pub fn new(depth: usize) -> io::Result<Self> {
        let mut context = 0u64;
        // SAFETY: the kernel writes one number, which outlives the call.
        check(unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut context) })?;
        Ok(Self { context, depth })
    }

    /// Runs a batch to its end; the bytes that each piece moved, or its error. With
    /// `patience`, requests that take longer are cancelled, where they can be.
    ///
    /// # Errors
    /// The batch could not be submitted; none of it is under way then.
    pub fn run(
        &mut self,
        direction: Direction,
        file: impl AsFd,
        pieces: &mut [Piece<'_>],
        patience: Option<Duration>,
    ) -> io::Result<Vec<io::Result<usize>>> {
        let mut results: Vec<io::Result<usize>> = Vec::with_capacity(pieces.len());
        for chunk in pieces.chunks_mut(self.depth) {
            self.run_chunk(direction, file.as_fd().as_raw_fd(), chunk, patience, &mut results)?;
        }
        Ok(results)
    }

    fn run_chunk(
        &mut self,
        direction: Direction,
        fd: i32,
        pieces: &mut [Piece<'_>],
        mut patience: Option<Duration>,
        results: &mut Vec<io::Result<usize>>,
    ) -> io::Result<()> {
        let first = results.len();
        let mut requests: Vec<libc::iocb> = Vec::with_capacity(pieces.len());
        for (index, piece) in pieces.iter_mut().enumerate() {
            // SAFETY: all fields are integers.
            let mut request: libc::iocb = unsafe { std::mem::zeroed() };
            request.aio_data = index as u64;
            request.aio_lio_opcode =
                if direction == Direction::Write { CMD_PWRITE } else { CMD_PREAD };
            request.aio_fildes = fd.cast_unsigned();
            request.aio_buf = piece.memory.as_mut_ptr().expose_provenance() as u64;
            request.aio_nbytes = piece.memory.len() as u64;
            request.aio_offset = piece.offset.cast_signed();
            requests.push(request);
            results.push(Err(io::ErrorKind::Other.into()));
        }
        let mut list: Vec<*mut libc::iocb> = requests.iter_mut().map(std::ptr::from_mut).collect();
        let mut submitted = 0;
        let mut done = 0;
        while submitted < list.len() {
            // SAFETY: the requests and the memory they name outlive `collect` below, which
            // returns when the kernel has ended them.
            let taken = check(unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context,
                    list.len() - submitted,
                    list[submitted..].as_mut_ptr(),
                )
            });
            match taken {
                // The count is at most the length.
                Ok(count) => submitted += count as usize,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // No place: wait for one.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && done < submitted => {
                    done += self.collect(None, &mut results[first..]);
                }
                Err(error) if submitted == 0 => return Err(error),
                // The kernel looks at one request after the other: this one is refused.
                Err(error) => {
                    for result in &mut results[first + submitted..] {
                        *result = Err(clone(&error));
                    }
                    break;
                }
            }
        }
        while done < submitted {
            let got = self.collect(patience, &mut results[first..]);
            if got == 0 && patience.take().is_some() {
                for request in &mut requests[..submitted] {
                    self.cancel(request);
                }
            }
            done += got;
        }
        Ok(())
    }

    /// Asks the kernel to end a request early. Most kinds of file don't hear it.
    fn cancel(&self, request: &mut libc::iocb) {
        let mut event = Event::default();
        // SAFETY: both outlive the call. A request that has ended, or whose kind cannot be
        // cancelled, is refused; a completion comes in either case.
        unsafe {
            libc::syscall(
                libc::SYS_io_cancel,
                self.context,
                std::ptr::from_mut(request),
                &raw mut event,
            )
        };
    }

    /// Takes completions, at least one unless the limit is reached; how many.
    fn collect(&self, limit: Option<Duration>, results: &mut [io::Result<usize>]) -> usize {
        let mut events = [Event::default(); 32];
        let limit = limit.map(|limit| libc::timespec {
            tv_sec: limit.as_secs().cast_signed(),
            tv_nsec: i64::from(limit.subsec_nanos()),
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        loop {
            // SAFETY: the kernel writes at most as many events as there is room for.
            let got = check(unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    1usize,
                    events.len(),
                    events.as_mut_ptr(),
                    limit,
                )
            });
            let got = match got {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // It would leave memory with the kernel that its owner takes back.
                Err(error) => panic!("io_getevents: {error}"),
                // At most the array's length.
                Ok(got) => got as usize,
            };
            for event in &events[..got] {
                let Some(result) =
                    usize::try_from(event.data).ok().and_then(|n| results.get_mut(n))
                else {
                    continue;
                };
                *result = usize::try_from(event.res).map_err(|_| {
                    // Errors are small negative numbers.
                    io::Error::from_raw_os_error(i32::try_from(-event.res).unwrap_or(libc::EIO))
                });
            }
            return got;
        }
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: the context is this value's, and nothing of it is under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn clone(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::moves_more_than_a_batch;

    #[test]
    fn a_batch_larger_than_the_context_is_read_back_as_written() {
        let mut aio = Aio::new(4).expect("a context");
        moves_more_than_a_batch(|direction, file, pieces| {
            let results = aio.run(direction, file, pieces, Some(Duration::from_secs(5)));
            results.expect("submitted").into_iter().map(|r| r.expect("moved")).sum()
        });
    }

    #[test]
    fn a_request_that_is_refused_is_an_error() {
        let (_reader, writer) = std::io::pipe().expect("a pipe");
        let mut aio = Aio::new(1).expect("a context");
        let mut memory = [0u8; 8];
        let mut pieces = [Piece { offset: 0, memory: &mut memory }];
        let refused = aio.run(Direction::Read, &writer, &mut pieces, None);
        assert!(refused.is_err() || refused.is_ok_and(|results| results[0].is_err()));
    }
}
