//! A device that lets something else happen just before a write: what another thread does
//! while a commit is on its way, at the same moment in every run.

use std::sync::{Arc, Mutex};

use uext_blockdev::{Bio, BioOp, BlkResult, BlockDevice, QueueLimits, Sector};

type Work = Box<dyn FnOnce() + Send>;

/// Passes everything on.
pub struct Intruder {
    lower: Arc<dyn BlockDevice>,
    armed: Mutex<Option<Work>>,
}

impl Intruder {
    /// Over a device.
    pub fn over(lower: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(Self { lower, armed: Mutex::default() })
    }

    /// Before the next write, this is done in another thread.
    pub fn arm(&self, work: Work) {
        *self.armed.lock().expect("nobody panicked") = Some(work);
    }

    /// Forgets what was not done.
    pub fn disarm(&self) {
        self.armed.lock().expect("nobody panicked").take();
    }

    fn intrude(&self, op: BioOp) {
        if op != BioOp::Write {
            return;
        }
        // Taken first: what it writes itself goes straight down.
        let work = self.armed.lock().expect("nobody panicked").take();
        if let Some(work) = work {
            // Its panic shows as a missing result.
            let _ = std::thread::spawn(work).join();
        }
    }
}

impl BlockDevice for Intruder {
    fn limits(&self) -> &QueueLimits {
        self.lower.limits()
    }

    fn is_sparse(&self, sector: Sector, bytes: u64) -> bool {
        self.lower.is_sparse(sector, bytes)
    }

    fn submit_bio(&self, bio: Bio) {
        self.intrude(bio.op());
        self.lower.submit_bio(bio);
    }

    fn submit_bios(&self, bios: Vec<Bio>) {
        bios.iter().for_each(|bio| self.intrude(bio.op()));
        self.lower.submit_bios(bios);
    }

    fn submit_bio_wait(&self, bio: Bio) -> BlkResult<Bio> {
        self.intrude(bio.op());
        self.lower.submit_bio_wait(bio)
    }

    fn submit_bios_wait(&self, bios: Vec<Bio>) -> Vec<Bio> {
        bios.iter().for_each(|bio| self.intrude(bio.op()));
        self.lower.submit_bios_wait(bios)
    }
}
