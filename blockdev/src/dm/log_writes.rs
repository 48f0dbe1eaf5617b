//! Records every change of a device: the raw material of crash tests.
//!
//! Each write, flush, FUA write, discard and zeroing is noted with its data and
//! with two times of one clock: when it was submitted and when it completed.
//! [`LogWrites::mark`] puts a note of the test between them ("fsync 3 returned").
//! [`crash`](super::crash) makes the states that a power cut could leave from it.
//!
//! The device claims a volatile cache and FUA, whatever lies below, and carries
//! PREFLUSH out itself, so that what is recorded are single steps with exact times.
//! A completion is noted before the owner of the bio hears of it.
//!
//! Invariants: times are unique and grow; an entry completes at most once.
//!
//! Locks: `log`, never held over an `end_io` or a submission. The bound: none; the
//! log keeps all data written until it is dropped.

use std::sync::Arc;

use uext_sync::Mutex;

use crate::bio::{Bio, BioFlags, BioOp};
use crate::device::BlockDevice;
use crate::flush::{self, SimpleQueue};
use crate::limits::QueueLimits;
use crate::status::BlkResult;
use crate::units::Sector;

/// What an entry of the log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogOp {
    /// A write; durable on completion with [`LogEntry::fua`].
    Write,
    /// A flush.
    Flush,
    /// A discard.
    Discard,
    /// A write of zeroes.
    WriteZeroes,
    /// A note of the test.
    Mark(String),
}

/// One entry of the log.
#[derive(Clone, Debug)]
pub struct LogEntry {
    /// What was done.
    pub op: LogOp,
    /// Where.
    pub sector: Sector,
    /// Bytes changed.
    pub bytes: u64,
    /// A write that is durable once it has completed.
    pub fua: bool,
    /// META, SYNC and such of the bio, for who reads the log.
    pub flags: BioFlags,
    /// What a write wrote.
    pub data: Arc<[u8]>,
    /// When it was submitted.
    pub submitted: u64,
    /// When it completed; `None` while it is in flight.
    pub completed: Option<u64>,
    /// How it ended; meaningful when completed.
    pub status: BlkResult<()>,
}

impl LogEntry {
    /// Whether it completed well before `time`.
    pub fn done_before(&self, time: u64) -> bool {
        self.status.is_ok() && self.completed.is_some_and(|done| done < time)
    }

    /// Whether it changes contents.
    pub fn is_change(&self) -> bool {
        matches!(self.op, LogOp::Write | LogOp::Discard | LogOp::WriteZeroes)
    }
}

/// What was recorded up to some time.
#[derive(Clone, Debug, Default)]
pub struct WriteLog {
    /// In the order of submission.
    pub entries: Vec<LogEntry>,
    /// The time of the next event.
    pub now: u64,
}

impl WriteLog {
    /// The marks and their times.
    pub fn marks(&self) -> impl Iterator<Item = (u64, &str)> {
        self.entries.iter().filter_map(|entry| match &entry.op {
            LogOp::Mark(text) => Some((entry.submitted, text.as_str())),
            _ => None,
        })
    }

    /// Changes that completed well.
    pub fn completed_changes(&self) -> usize {
        self.entries.iter().filter(|entry| entry.is_change() && entry.done_before(self.now)).count()
    }
}

/// A device that records what is done to the one below.
pub struct LogWrites {
    queue: Arc<dyn SimpleQueue>,
    recorder: Arc<Recorder>,
}

struct Recorder {
    limits: QueueLimits,
    lower: Arc<dyn BlockDevice>,
    log: Arc<Mutex<WriteLog>>,
}

impl LogWrites {
    /// Over a device, whose contents now are the base of every replay: keep a copy.
    pub fn new(lower: Arc<dyn BlockDevice>) -> Arc<Self> {
        let mut limits = lower.limits().clone();
        limits.write_cache = true;
        limits.fua = true;
        let recorder = Arc::new(Recorder { limits, lower, log: Arc::default() });
        Arc::new(Self { queue: recorder.clone(), recorder })
    }

    /// Puts a note into the log; returns its time.
    pub fn mark(&self, text: &str) -> u64 {
        let mut log = self.recorder.log.lock();
        let time = log.tick();
        let mut entry = LogEntry::new(LogOp::Mark(text.to_owned()), time);
        entry.completed = Some(time);
        log.entries.push(entry);
        time
    }

    /// What was recorded so far. The data is shared, not copied.
    pub fn log(&self) -> WriteLog {
        self.recorder.log.lock().clone()
    }
}

impl WriteLog {
    fn tick(&mut self) -> u64 {
        let time = self.now;
        self.now += 1;
        time
    }
}

impl LogEntry {
    fn new(op: LogOp, submitted: u64) -> Self {
        Self {
            op,
            sector: Sector(0),
            bytes: 0,
            fua: false,
            flags: BioFlags::empty(),
            data: Arc::default(),
            submitted,
            completed: None,
            status: Ok(()),
        }
    }
}

impl Recorder {
    /// Notes a bio that is on its way down, and arranges that its end is noted.
    fn record(&self, mut bio: Bio) -> Bio {
        let op = match bio.op() {
            BioOp::Read => return bio,
            BioOp::Write => LogOp::Write,
            BioOp::Flush => LogOp::Flush,
            BioOp::Discard => LogOp::Discard,
            BioOp::WriteZeroes => LogOp::WriteZeroes,
        };
        let data: Arc<[u8]> = if op == LogOp::Write { bio.data().into() } else { Arc::default() };
        let mut log = self.log.lock();
        let time = log.tick();
        let index = log.entries.len();
        log.entries.push(LogEntry {
            sector: bio.sector(),
            bytes: bio.len(),
            fua: bio.flags().contains(BioFlags::FUA),
            flags: bio.flags(),
            data,
            ..LogEntry::new(op, time)
        });
        drop(log);
        let owner = bio.take_end_io();
        let log = self.log.clone();
        bio.set_end_io(move |mut bio| {
            let status = bio.status();
            let mut log = log.lock();
            let time = log.tick();
            log.entries[index].completed = Some(time);
            log.entries[index].status = status;
            drop(log);
            bio.restore_end_io(owner);
            bio.end_io(status);
        });
        bio
    }
}

impl SimpleQueue for Recorder {
    fn limits(&self) -> &QueueLimits {
        &self.limits
    }

    fn submit_simple(&self, bios: &mut dyn Iterator<Item = Bio>) {
        let bios: Vec<Bio> = bios.map(|bio| self.record(bio)).collect();
        self.lower.submit_bios(bios);
    }
}

impl BlockDevice for LogWrites {
    fn limits(&self) -> &QueueLimits {
        &self.recorder.limits
    }

    fn is_sparse(&self, sector: Sector, bytes: u64) -> bool {
        self.recorder.lower.is_sparse(sector, bytes)
    }

    fn submit_bio(&self, bio: Bio) {
        self.submit_bios(vec![bio]);
    }

    fn submit_bios(&self, bios: Vec<Bio>) {
        let limits = &self.recorder.limits;
        flush::submit(&self.queue, &mut bios.into_iter().filter_map(|bio| limits.admit(bio)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryDevice;

    #[test]
    fn steps_and_marks_are_recorded_with_data_and_growing_times() {
        let log_dev = LogWrites::new(MemoryDevice::new(1 << 20));
        let dev: &dyn BlockDevice = &*log_dev;
        dev.write_at(4096, &[7; 4096], BioFlags::PREFLUSH | BioFlags::FUA).expect("memory works");
        log_dev.mark("synced");
        dev.read_at(0, 512).expect("memory works");
        dev.submit_bio_wait(Bio::range(BioOp::Discard, Sector(0), 512)).expect("memory works");

        let log = log_dev.log();

        let ops: Vec<_> = log.entries.iter().map(|entry| entry.op.clone()).collect();
        let mark = LogOp::Mark("synced".into());
        assert_eq!(ops, [LogOp::Flush, LogOp::Write, mark, LogOp::Discard]);
        assert!(log.entries[1].fua && log.entries[1].data[..] == [7; 4096]);
        let times = log.entries.iter().flat_map(|e| [e.submitted, e.completed.expect("done")]);
        assert_eq!(times.collect::<Vec<_>>(), [0, 1, 2, 3, 4, 4, 5, 6]);
        assert_eq!(log.marks().collect::<Vec<_>>(), [(4, "synced")]);
        assert_eq!(log.completed_changes(), 2);
    }
}
