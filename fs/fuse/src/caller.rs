//! Memory of the process that made a request.
//!
//! Some ioctls read or write more than their number says; FUSE carries only what it
//! says, so the rest is fetched from the process itself. Needs the right to do so, which
//! root has.

use std::io::{IoSlice, IoSliceMut};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use uext_vfs::{CallerMemory, Errno, Result};

/// The thread that waits for the reply.
pub(crate) struct Caller(Pid);

impl Caller {
    /// By the number in a request's header; 0 names nobody.
    pub fn new(pid: u32) -> Self {
        Self(Pid::from_raw(i32::try_from(pid).unwrap_or(0)))
    }

    fn place(address: u64, len: usize) -> Result<RemoteIoVec> {
        let base = usize::try_from(address).map_err(|_| Errno::EFAULT)?;
        Ok(RemoteIoVec { base, len })
    }

    fn check(&self) -> Result<()> {
        if self.0.as_raw() > 0 { Ok(()) } else { Err(Errno::EFAULT) }
    }
}

fn whole(done: nix::Result<usize>, len: usize) -> Result<()> {
    match done {
        Ok(done) if done == len => Ok(()),
        Ok(_) => Err(Errno::EFAULT),
        Err(errno) => Err(Errno(errno as i32)),
    }
}

impl CallerMemory for Caller {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<()> {
        self.check()?;
        let len = into.len();
        let remote = [Self::place(address, len)?];
        whole(process_vm_readv(self.0, &mut [IoSliceMut::new(into)], &remote), len)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.check()?;
        let remote = [Self::place(address, bytes.len())?];
        whole(process_vm_writev(self.0, &[IoSlice::new(bytes)], &remote), bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_the_memory_of_a_thread() {
        let caller = Caller::new(std::process::id());
        let from = [1u8, 2, 3];
        let mut seen = [0; 3];

        caller.read(from.as_ptr() as u64, &mut seen).expect("its own memory");
        let into = [0u8; 3];
        caller.write(into.as_ptr() as u64, &[4, 5, 6]).expect("its own memory");

        assert_eq!(seen, from);
        assert_eq!(std::hint::black_box(into), [4, 5, 6]);
        assert_eq!(caller.read(1, &mut seen), Err(Errno::EFAULT));
        assert_eq!(Caller::new(0).read(1, &mut seen), Err(Errno::EFAULT));
    }
}
