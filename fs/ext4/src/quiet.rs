//! Without a journal: the superblock says clean while nothing happens.
//!
//! After a second without changes everything is written, and then the mark that the
//! image is clean, so that a power cut in a quiet moment needs no check. The next
//! write finds the mark and takes it away first, durably, whoever writes.
//!
//! [`QuietDevice`] stands between the filesystem and its device to see every write.
//! While `marked` is set a write waits for `mark`'s lock, writes the superblock
//! without the mark, flushes, and goes on.
//!
//! Why the disk is whole when the mark is written: `marked` is set first, so from
//! then on no write begins. Then no handle is open, so no update is half done; then
//! no buffer is dirty or on its way, so what memory says stands on the disk. A handle
//! opened in between can only leave dirty buffers, which are seen, or stay in memory.
//! Orphans and delayed data are looked for too: with either the image is not clean.
//!
//! Locks: `mark`, held over the writes of the superblock. Under it are taken
//! `live_super` and the list of dirty buffers, which nobody holds while he writes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use uext_blockdev::{Bio, BioFlags, BioOp, BlkResult, BlockDevice, QueueLimits, Sector};
use uext_ondisk::superblock::{SUPERBLOCK_OFFSET, State, Superblock};
use uext_sync::Mutex;
use uext_vfs::Timestamp;

use crate::error::Result;
use crate::fs::Ext4;

/// How often is looked whether anything happens; a quarter of the time without changes after
/// which the image is marked.
const TICKS_TO_MARK: u32 = 4;

/// A device whose superblock is kept honest: see the module.
pub(crate) struct QuietDevice {
    below: Arc<dyn BlockDevice>,
    /// The superblock says clean. PAIRS-WITH: set under `mark` in [`QuietDevice::mark_clean`],
    /// which then looks at the buffers under their lock; a writer takes its buffers out of there
    /// before it looks here.
    marked: AtomicBool,
    /// The superblock without the mark, while it is marked.
    mark: Mutex<Vec<u8>>,
    /// Writes so far. WHY-RELAXED: only compared with an older value to see that something happens.
    writes: AtomicU64,
}

impl QuietDevice {
    pub fn new(below: Arc<dyn BlockDevice>) -> Arc<Self> {
        let mark = Mutex::new(Vec::new());
        Arc::new(Self { below, marked: AtomicBool::new(false), mark, writes: AtomicU64::new(0) })
    }

    /// Takes the mark away before a write.
    fn before_write(&self) -> BlkResult<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        if !self.marked.load(Ordering::SeqCst) {
            return Ok(());
        }
        let unmarked = self.mark.lock();
        if self.marked.load(Ordering::SeqCst) {
            let flags = BioFlags::FUA | BioFlags::META | BioFlags::SYNC;
            self.below.write_at(SUPERBLOCK_OFFSET, &unmarked, flags)?;
            self.below.flush()?;
            self.marked.store(false, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Writes `clean` when `is_whole` says so after all writes have stopped; whether it did.
    /// `unmarked` is the same superblock without the mark.
    fn mark_clean(
        &self,
        clean: &[u8],
        unmarked: Vec<u8>,
        is_whole: impl FnOnce() -> bool,
    ) -> BlkResult<bool> {
        let mut mark = self.mark.lock();
        self.marked.store(true, Ordering::SeqCst);
        if !is_whole() {
            self.marked.store(false, Ordering::SeqCst);
            return Ok(false);
        }
        *mark = unmarked;
        let flags = BioFlags::PREFLUSH | BioFlags::FUA | BioFlags::META | BioFlags::SYNC;
        // When this fails the mark may be there: the next write takes it away.
        self.below.write_at(SUPERBLOCK_OFFSET, clean, flags)?;
        Ok(true)
    }
}

fn changes(bio: &Bio) -> bool {
    matches!(bio.op(), BioOp::Write | BioOp::Discard | BioOp::WriteZeroes)
}

impl BlockDevice for QuietDevice {
    fn limits(&self) -> &QueueLimits {
        self.below.limits()
    }

    fn submit_bio(&self, bio: Bio) {
        match if changes(&bio) { self.before_write() } else { Ok(()) } {
            Ok(()) => self.below.submit_bio(bio),
            Err(status) => bio.end_io(Err(status)),
        }
    }

    fn submit_bios(&self, bios: Vec<Bio>) {
        match if bios.iter().any(changes) { self.before_write() } else { Ok(()) } {
            Ok(()) => self.below.submit_bios(bios),
            Err(status) => bios.into_iter().for_each(|bio| bio.end_io(Err(status))),
        }
    }

    fn submit_bio_wait(&self, bio: Bio) -> BlkResult<Bio> {
        if changes(&bio) {
            self.before_write()?;
        }
        self.below.submit_bio_wait(bio)
    }

    fn write_slice_wait(&self, sector: Sector, data: &[u8]) -> BlkResult<()> {
        self.before_write()?;
        self.below.write_slice_wait(sector, data)
    }

    fn is_sparse(&self, sector: Sector, bytes: u64) -> bool {
        self.below.is_sparse(sector, bytes)
    }

    fn submit_batch_wait(&self, bios: &mut Vec<Bio>) {
        if bios.iter().any(changes)
            && let Err(status) = self.before_write()
        {
            bios.iter_mut().for_each(|bio| bio.set_status(Err(status)));
            return;
        }
        self.below.submit_batch_wait(bios);
    }
}

/// The thread that looks for quiet moments; stops when dropped.
pub(crate) struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(fs: Weak<Ext4>, device: Arc<QuietDevice>, quiet: Duration) -> Self {
        let (stop, stopped) = bounded(0);
        let run = move || watch(&fs, &device, &stopped, quiet / TICKS_TO_MARK);
        let thread = std::thread::Builder::new().name("uext-quiet".into()).spawn(run);
        let thread = thread.map_err(|error| log::warn!("never marked clean: {error}")).ok();
        Self { stop: Some(stop), thread }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        let Some(thread) = self.thread.take() else { return };
        // The thread itself drops the filesystem when it held the last reference.
        if thread.thread().id() != std::thread::current().id() {
            let _ = thread.join();
        }
    }
}

/// What changes when anything happens.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Activity {
    handles: u64,
    writes: u64,
    dirty_pages: usize,
}

fn watch(fs: &Weak<Ext4>, device: &QuietDevice, stopped: &Receiver<()>, tick: Duration) {
    let mut last = None;
    let mut since = Instant::now();
    let mut tried = false;
    loop {
        match stopped.recv_timeout(tick) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
        let Some(fs) = fs.upgrade() else { return };
        let now = fs.activity(device);
        if last != Some(now) {
            (last, since, tried) = (Some(now), Instant::now(), false);
        } else if !tried && since.elapsed() >= tick * (TICKS_TO_MARK - 1) {
            match fs.mark_quiet(device) {
                Ok(marked) => tried = marked,
                Err(error) => {
                    log::warn!("{}: not marked clean: {error}", fs.name);
                    tried = true;
                }
            }
            last = Some(fs.activity(device));
        }
    }
}

impl Ext4 {
    /// Watches for quiet moments from now on; for filesystems without a journal.
    pub(crate) fn watch_quiet(&self, device: Arc<QuietDevice>) {
        let quiet = self.options.quiet_interval;
        let valid = self.sb.state().contains(State::VALID);
        if valid && !quiet.is_zero() && !self.is_read_only() {
            *self.quiet.lock() = Some(Watch::start(self.this.clone(), device, quiet));
        }
    }

    fn activity(&self, device: &QuietDevice) -> Activity {
        Activity {
            handles: self.journal.plain_handles().0,
            writes: device.writes.load(Ordering::Relaxed),
            dirty_pages: self.cache.stats().dirty_pages,
        }
    }

    /// Writes everything and marks the image clean; false when something came between.
    fn mark_quiet(&self, device: &QuietDevice) -> Result<bool> {
        if self.is_read_only() || self.had_error() {
            return Ok(true);
        }
        self.sync_all()?;
        let mut clean = self.with_super(Superblock::clone);
        if clean.state().contains(State::ERROR) {
            return Ok(true);
        }
        self.sum_counts(&mut clean)?;
        clean.set_write_time(u64::try_from(Timestamp::now().sec).unwrap_or(0));
        let unmarked = clean.sealed_bytes().to_vec();
        let state = clean.state() | State::VALID;
        clean.set_state(state);
        let sealed = clean.sealed_bytes().to_vec();
        let marked = device.mark_clean(&sealed, unmarked, || {
            self.journal.plain_handles().1 == 0
                && self.buffers.is_written()
                && self.cache.stats().dirty_pages == 0
                && clean_still(self, &clean)
        })?;
        Ok(marked)
    }
}

/// Whether the superblock still is the one that is about to be written, and names no orphan.
fn clean_still(fs: &Ext4, clean: &Superblock) -> bool {
    fs.with_super(|sb| {
        sb.last_orphan().is_none()
            && sb.features() == clean.features()
            && sb.state() | State::VALID == clean.state()
    })
}
