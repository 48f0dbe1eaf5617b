//! Image files and block devices as devices.
//!
//! A [`FileDevice`] checks each bio against its limits and gives it to an engine.
//! Engines differ only in how a thread that doesn't wait gets its bios done; a
//! thread that waits ([`BlockDevice::submit_bio_wait`]) does the system calls
//! itself, since handing a bio to another thread and back costs as much as a read
//! of the disk.
//!
//! Invariants: an engine owns the bios it has taken, and so their memory, until it
//! completes them, each once. Dropping the device waits for all of them.
//!
//! Locks: none here; each engine has its queue's.

mod aio_context;
mod aio_ring;
mod batch;
mod engine_aio;
mod engine_sync;
mod engine_uring;
mod flight;
mod loops;
mod open;
mod slab;
mod target;

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::bio::Bio;
use crate::device::BlockDevice;
use crate::limits::QueueLimits;
use crate::status::BlkResult;
use crate::units::Sector;
use crate::waiter::Waiter;
use uext_sync::Mutex;

use engine_aio::AioEngine;
use engine_sync::{SyncEngine, WORKERS};
use engine_uring::UringEngine;
pub use open::OpenError;
use target::{Kind, Target};

/// Waiters kept for threads that wait for a batch.
const MAX_WAITERS: usize = 4;

/// How bios of threads that don't wait reach the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Engine {
    /// The best that the kernel allows.
    #[default]
    Auto,
    /// An io_uring of the device's own.
    IoUring,
    /// Linux AIO, with completions read from its ring.
    Aio,
    /// `preadv2` and `pwritev2` on a few threads.
    Sync,
}

/// How to open a file as a device.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Refuse writes. Many readers share a file; a block device isn't claimed.
    pub read_only: bool,
    /// The engine.
    pub engine: Engine,
    /// Pass the page cache by, where the file system can.
    pub direct: bool,
    /// Claim a block device that is to be written; not when a mount (fuseblk) has
    /// claimed it on behalf of this program.
    pub claim: bool,
}

impl Default for OpenOptions {
    /// Read-write, direct, the best engine.
    fn default() -> Self {
        Self { read_only: false, engine: Engine::Auto, direct: true, claim: true }
    }
}

/// What does the bios of a [`FileDevice`].
trait EngineQueue: Send + Sync {
    /// Takes bios that passed the limits' check; completes each once, from any thread.
    fn submit(&self, bios: &mut dyn Iterator<Item = Bio>);

    /// Does a batch in place and waits for it; `false` where it has no quicker way than
    /// `submit` and the call-backs.
    fn submit_wait(&self, _bios: &mut Vec<Bio>) -> bool {
        false
    }

    /// Its name for messages.
    fn name(&self) -> &'static str;
}

/// An image file or block device.
pub struct FileDevice {
    target: Arc<Target>,
    engine: Box<dyn EngineQueue>,
    /// For threads that wait for a batch; kept, so that waiting allocates nothing.
    waiters: Mutex<Vec<Arc<Waiter>>>,
}

impl FileDevice {
    /// Opens an image or block device and claims it: for writing exclusively, for
    /// reading shared with readers.
    ///
    /// # Errors
    /// [`OpenError::InUse`] when somebody else has it, else why it can't be opened.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Arc<Self>, OpenError> {
        let target = Arc::new(open::open(path.as_ref(), &options)?);
        let engine = make_engine(&target, options.engine)
            .map_err(|source| OpenError::Io { path: path.as_ref().to_owned(), source })?;
        let waiters = Mutex::new(Vec::with_capacity(MAX_WAITERS));
        Ok(Arc::new(Self { target, engine, waiters }))
    }

    /// Gives up the claim on an image before the device is dropped: whoever unmounts
    /// says so when nothing will be written any more. A block device's claim stays.
    pub fn release_claim(&self) {
        if self.target.kind == Kind::Image {
            open::unlock(&self.target.file);
        }
    }

    /// Whether the page cache is passed by.
    pub fn is_direct(&self) -> bool {
        self.target.direct
    }

    /// The engine in use, for messages: `io_uring`, `aio` or `sync`.
    pub fn engine_name(&self) -> &'static str {
        self.engine.name()
    }

    /// Does a bio in the calling thread and leaves its end in its status.
    fn run_in_place(&self, bio: &mut Bio) {
        let result = self.target.limits.check(bio).and_then(|()| self.target.run(bio));
        bio.set_status(result);
    }
}

/// The engine that was asked for, or the best one.
fn make_engine(target: &Arc<Target>, engine: Engine) -> io::Result<Box<dyn EngineQueue>> {
    let sync = || Box::new(SyncEngine::new(target.clone(), WORKERS));
    if engine == Engine::Sync {
        return Ok(sync());
    }
    if engine == Engine::Aio {
        // AIO on the page cache would do all of the work in the thread that submits.
        if target.direct {
            return Ok(Box::new(AioEngine::new(target.clone())?));
        }
        log::warn!("no direct I/O, so no Linux AIO: using threads");
        return Ok(sync());
    }
    match UringEngine::new(target.clone()) {
        Ok(uring) => Ok(Box::new(uring)),
        Err(error) if engine == Engine::Auto => {
            log::info!("no io_uring ({error}), using threads");
            Ok(sync())
        }
        Err(error) => Err(error),
    }
}

impl BlockDevice for FileDevice {
    fn limits(&self) -> &QueueLimits {
        &self.target.limits
    }

    fn submit_bio(&self, bio: Bio) {
        if let Some(bio) = self.target.limits.admit(bio) {
            self.engine.submit(&mut std::iter::once(bio));
        }
    }

    fn submit_bios(&self, bios: Vec<Bio>) {
        self.engine.submit(&mut bios.into_iter().filter_map(|bio| self.target.limits.admit(bio)));
    }

    fn submit_bio_wait(&self, mut bio: Bio) -> BlkResult<Bio> {
        drop(bio.take_end_io());
        self.run_in_place(&mut bio);
        bio.status().map(|()| bio)
    }

    fn write_slice_wait(&self, sector: Sector, data: &[u8]) -> BlkResult<()> {
        self.target.limits.check_write(sector, data)?;
        self.target.write_slice(sector.byte_offset(), data)
    }

    fn is_sparse(&self, sector: Sector, bytes: u64) -> bool {
        self.target.is_sparse(sector.byte_offset(), bytes)
    }

    fn submit_drain(&self, bios: &mut Vec<Bio>) {
        self.engine.submit(&mut bios.drain(..).filter_map(|bio| self.target.limits.admit(bio)));
    }

    fn submit_batch_wait(&self, bios: &mut Vec<Bio>) {
        for bio in bios.iter_mut() {
            drop(bio.take_end_io());
        }
        if bios.len() < 2 {
            bios.iter_mut().for_each(|bio| self.run_in_place(bio));
        } else if !self.engine.submit_wait(bios) {
            let waiter = self.waiters.lock().pop().unwrap_or_else(Waiter::new);
            waiter.run(self, bios);
            let mut waiters = self.waiters.lock();
            if waiters.len() < MAX_WAITERS {
                waiters.push(waiter);
            }
        }
    }
}
