//! What a mount was asked for.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use uext_vfs::RemountFlags;

/// What happens when metadata is found damaged or cannot be written (`errors=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorsPolicy {
    /// Log it and go on.
    Continue,
    /// Refuse writes from then on.
    RemountRo,
    /// Stop the daemon.
    Panic,
}

/// How file data and the journal relate (`data=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataMode {
    /// Data reaches the disk before the metadata that refers to it.
    Ordered,
    /// Data goes through the journal.
    Journal,
    /// No order is asked for between them. uext writes data first here too: it costs nothing.
    Writeback,
}

/// When reading a file updates its access time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtimePolicy {
    /// Never.
    Never,
    /// When it is older than the last change, or than a day.
    Relative,
    /// Always.
    Strict,
}

/// The policy of a live mount, which a remount may change.
pub(crate) struct Atime {
    /// As in [`Atime::FILES`]. WHY-RELAXED: a read that sees a change late is as one before it.
    files: AtomicU8,
    /// Those of directories are not kept. WHY-RELAXED: as for `files`.
    nodiratime: AtomicBool,
}

impl Atime {
    const FILES: [AtimePolicy; 3] =
        [AtimePolicy::Never, AtimePolicy::Relative, AtimePolicy::Strict];

    /// What the mount's options say.
    pub fn new(policy: AtimePolicy, nodiratime: bool) -> Self {
        let this = Self { files: AtomicU8::new(0), nodiratime: AtomicBool::new(nodiratime) };
        this.set(policy);
        this
    }

    fn set(&self, policy: AtimePolicy) {
        // The table has three entries.
        let at = Self::FILES.iter().position(|known| *known == policy).unwrap_or(0) as u8;
        self.files.store(at, Ordering::Relaxed);
    }

    /// What a remount says; `strictatime` is for a mount from its beginning only.
    pub fn change(&self, flags: RemountFlags) {
        if flags.contains(RemountFlags::NOATIME) {
            self.set(AtimePolicy::Never);
        } else if flags.contains(RemountFlags::RELATIME) {
            self.set(AtimePolicy::Relative);
        }
        if flags.intersects(RemountFlags::NODIRATIME | RemountFlags::DIRATIME) {
            let off = flags.contains(RemountFlags::NODIRATIME);
            self.nodiratime.store(off, Ordering::Relaxed);
        }
    }

    /// What holds for a directory, or for anything else.
    pub fn policy_for(&self, is_dir: bool) -> AtimePolicy {
        if is_dir && self.nodiratime.load(Ordering::Relaxed) {
            return AtimePolicy::Never;
        }
        let at = usize::from(self.files.load(Ordering::Relaxed));
        Self::FILES.get(at).copied().unwrap_or(AtimePolicy::Never)
    }
}

/// Options of a mount; the defaults are mount(8)'s.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Never write the image.
    pub read_only: bool,
    /// `rw` was asked for in words: an image that can only be read is an error, not a fallback.
    pub rw_explicit: bool,
    /// Do not replay the journal (only with `read_only`).
    pub norecovery: bool,
    /// Mount read-write although the image says it has errors.
    pub force: bool,
    /// `errors=`; the superblock's own policy when not given.
    pub errors: Option<ErrorsPolicy>,
    /// `data=`; the superblock's default (`tune2fs -o`) when not given, else ordered.
    pub data_mode: Option<DataMode>,
    /// `data_err=abort`: data that cannot be written aborts the journal.
    pub data_err_abort: bool,
    /// `auto_da_alloc`: the data of a file that replaces another, by rename or by truncation,
    /// is written before that is committed.
    pub auto_da_alloc: bool,
    /// `commit=`: the longest time a finished change stays in memory only.
    pub commit_interval: Duration,
    /// Flush the disk's cache where the promises need it.
    pub barrier: bool,
    /// Run the threads that commit by time, checkpoint early and write old pages. Tests that
    /// need every write in order switch them off.
    pub background: bool,
    /// Every journal handle is committed before the next begins: see
    /// [`JournalConfig`](uext_jbd2::JournalConfig). For tests.
    pub commit_each_handle: bool,
    /// Memory for cached pages and inodes and what is kept about them, bytes; a sixteenth of
    /// the machine's when not given.
    pub cache_bytes: Option<usize>,
    /// Access times.
    pub atime: AtimePolicy,
    /// Access times of directories are not kept.
    pub nodiratime: bool,
    /// `sb=`: the superblock to use, in units of 1 KiB as mount(8) has it.
    pub sb_block: Option<u64>,
    /// `journal_path=`: where the external journal is.
    pub journal_path: Option<PathBuf>,
    /// POSIX ACLs.
    pub acl: bool,
    /// `user.` attributes.
    pub user_xattr: bool,
    /// Without a journal: the time without changes after which everything is written and the
    /// image marked clean; never when zero.
    pub quiet_interval: Duration,
    /// Every write is durable before it returns.
    pub sync: bool,
    /// Every change of a directory is durable before it returns.
    pub dirsync: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            rw_explicit: false,
            norecovery: false,
            force: false,
            errors: None,
            data_mode: None,
            data_err_abort: false,
            auto_da_alloc: true,
            commit_interval: Duration::from_secs(5),
            barrier: true,
            background: true,
            commit_each_handle: false,
            cache_bytes: None,
            atime: AtimePolicy::Relative,
            nodiratime: false,
            sb_block: None,
            journal_path: None,
            acl: true,
            user_xattr: true,
            quiet_interval: Duration::from_secs(1),
            sync: false,
            dirsync: false,
        }
    }
}
