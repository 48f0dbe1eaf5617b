//! What follows an error: the log, the superblock's record of it, and `errors=`.
//!
//! Damage is logged with its place and recorded in the superblock (`s_error_count`, the
//! first and the last error), best effort: the record is for who looks at the image later,
//! and never fails an operation. Then `errors=` decides:
//! - `continue`: nothing more. The record goes to the disk with the next transaction, which is
//!   begun at the edge, where no lock is held ([`Ext4::store_errors`]).
//! - `remount-ro`: the journal is aborted. What has not been committed is not trusted.
//! - `panic`: the daemon ends, after writing the record.
//!
//! A journal that is aborted, for this or because a write of the log or a flush failed,
//! stops everything that writes, whatever `errors=` says ([`Ext4::stopped`]): changes and
//! fsync fail with `EROFS`, reads go on. Then, and without a journal, the record is written
//! past the journal: into the superblock as the disk has it, since the one in memory may
//! hold changes of a transaction that never commits.
//!
//! Locks: `report` may be called under any lock down to the group lock; it takes
//! `live_super` and the journal's own, and may write one sector under them.

use std::sync::atomic::Ordering;

use uext_blockdev::{BioFlags, BlkStatus};
use uext_jbd2::{IoWhat, JournalError};
use uext_ondisk::InodeNumber;
use uext_ondisk::error::CorruptKind;
use uext_ondisk::superblock::{
    ErrorRecord, ErrorsPolicy as OnDisk, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock,
};
use uext_vfs::{Errno, Timestamp};

use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::options::ErrorsPolicy;

/// `EXT4_ERR_*`: the format's own numbers of what went wrong.
mod code {
    pub const UNKNOWN: u8 = 1;
    pub const EIO: u8 = 2;
    pub const EFSBADCRC: u8 = 4;
    pub const EFSCORRUPTED: u8 = 5;
    pub const ENOSPC: u8 = 6;
}

impl Ext4 {
    /// `EROFS` once an error has stopped everything that writes.
    pub(crate) fn stopped(&self) -> Result<()> {
        if let Some(why) = self.journal.aborted() {
            return Err(why.into());
        }
        // WHY-RELAXED: set once, and whoever must not miss it asks the journal.
        if self.stopped.load(Ordering::Relaxed) { Err(Errno::EROFS.into()) } else { Ok(()) }
    }

    /// Logs an error with its place; damage is recorded, and `errors=` obeyed.
    pub(crate) fn report(&self, inode: Option<InodeNumber>, error: &Error) {
        // Of an abort it was logged when it happened; every call since then fails of it.
        if matches!(error, Error::Errno(_) | Error::Journal(JournalError::Aborted(_))) {
            return;
        }
        let place = inode.map(|ino| format!(" inode {ino}:")).unwrap_or_default();
        match error {
            Error::Errno(_) => {}
            Error::Corrupt(_) => log::error!("{}:{place} damaged: {error}", self.name),
            Error::Blk(_) | Error::Journal(_) => log::error!("{}:{place} {error}", self.name),
        }
        let Error::Corrupt(corrupt) = error else { return };
        if self.is_read_only() {
            return;
        }
        let code = match corrupt.kind {
            CorruptKind::Checksum => code::EFSBADCRC,
            _ => code::EFSCORRUPTED,
        };
        self.record(&ErrorRecord {
            code,
            inode: inode.or(corrupt.inode).map_or(0, |ino| ino.0),
            block: corrupt.block.map_or(0, |block| block.0),
            func: String::from(corrupt.what),
            ..ErrorRecord::default()
        });
        match self.errors_policy() {
            ErrorsPolicy::Continue => {}
            ErrorsPolicy::RemountRo if self.journal.has_journal() => {
                self.journal.abort(JournalError::Filesystem(error.errno().0));
            }
            ErrorsPolicy::RemountRo => self.stop("errors=remount-ro"),
            ErrorsPolicy::Panic => self.panic(),
        }
    }

    /// Notes an error in the superblock in memory.
    fn record(&self, record: &ErrorRecord) {
        self.had_error.store(true, Ordering::Relaxed);
        let time = u64::try_from(Timestamp::now().sec).unwrap_or(0);
        let mut sb = self.live_super.lock();
        sb.record_error(&ErrorRecord { time, ..record.clone() });
        drop(sb);
        self.errors_pending.store(true, Ordering::Relaxed);
    }

    /// The journal was aborted; called once, by who aborted it.
    pub(crate) fn journal_aborted(&self, why: &JournalError) {
        if *why == JournalError::Shutdown {
            // Somebody wanted it so. The image has no error, and the mount says EIO, not EROFS.
            self.stopped.store(true, Ordering::Relaxed);
            return;
        }
        // Damage that led here is recorded already.
        if !matches!(why, JournalError::Filesystem(_)) {
            let code = match why.errno() {
                libc::EIO => code::EIO,
                libc::EBADMSG => code::EFSBADCRC,
                libc::EUCLEAN => code::EFSCORRUPTED,
                libc::ENOSPC => code::ENOSPC,
                _ => code::UNKNOWN,
            };
            let block = if let JournalError::Io { block, .. } = why { *block } else { 0 };
            let inode = self.sb.journal_inum().map_or(0, |ino| ino.0);
            let func = "journal".into();
            self.record(&ErrorRecord { code, inode, block, func, ..ErrorRecord::default() });
        }
        if self.errors_policy() == ErrorsPolicy::Panic {
            self.panic();
        }
        self.stop("the journal was aborted");
    }

    /// Data could not be written: `data_err=`.
    pub(crate) fn data_write_failed(&self, status: BlkStatus) {
        if self.options.data_err_abort && self.journal.has_journal() {
            self.journal.abort(JournalError::Io { what: IoWhat::WriteFs, block: 0, status });
        }
    }

    /// A flush of the device failed.
    pub(crate) fn flush_failed(&self, status: BlkStatus) {
        if self.journal.has_journal() {
            self.journal.abort(JournalError::Io { what: IoWhat::Flush, block: 0, status });
            return;
        }
        log::error!("{}: flushing the device failed: {status}", self.name);
        let (code, func) = (code::EIO, "flush".into());
        self.record(&ErrorRecord { code, func, ..ErrorRecord::default() });
        if self.errors_policy() == ErrorsPolicy::Panic {
            self.panic();
        }
        self.stop("what the device was given may be lost");
    }

    /// Refuses every change from here on.
    fn stop(&self, why: &str) {
        self.stopped.store(true, Ordering::Relaxed);
        if self.read_only.swap(true, Ordering::Relaxed) {
            return;
        }
        log::error!("{}: read-only from here on: {why}", self.name);
        self.write_errors();
        if let Some(call) = &*self.on_read_only.lock() {
            call();
        }
    }

    fn panic(&self) -> ! {
        self.write_errors();
        log::error!("{}: stopping (errors=panic)", self.name);
        std::process::abort();
    }

    /// Puts what was recorded into the running transaction. The caller holds no lock.
    pub(crate) fn store_errors(&self) {
        if self.is_read_only() || !self.errors_pending.swap(false, Ordering::Relaxed) {
            return;
        }
        let stored = self.start(1).and_then(|handle| self.update_super(&handle, |_| ()));
        if let Err(error) = stored {
            log::warn!("{}: an error could not be recorded: {error}", self.name);
        }
    }

    /// Writes what was recorded into the superblock on the disk, past the journal.
    fn write_errors(&self) {
        if let Err(error) = self.try_write_errors() {
            log::warn!("{}: the error could not be recorded: {error}", self.name);
        }
    }

    fn try_write_errors(&self) -> Result<()> {
        let device = self.buffers.device();
        let mut sb = Superblock::parse(&device.read_at(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE)?)?;
        sb.copy_errors(&self.live_super.lock());
        let flags = BioFlags::META | BioFlags::SYNC | BioFlags::FUA;
        Ok(device.write_at(SUPERBLOCK_OFFSET, sb.sealed_bytes(), flags)?)
    }

    pub(crate) fn errors_policy(&self) -> ErrorsPolicy {
        self.options.errors.unwrap_or(match self.sb.errors_policy() {
            OnDisk::Continue => ErrorsPolicy::Continue,
            OnDisk::Panic => ErrorsPolicy::Panic,
            OnDisk::RemountRo => ErrorsPolicy::RemountRo,
        })
    }
}

/// What a superblock tells of earlier errors, in one line; `None` when there were none.
pub(crate) fn earlier_errors(sb: &Superblock) -> Option<String> {
    let (first, last) = (sb.first_error()?, sb.last_error()?);
    let say = |error: &ErrorRecord| {
        let mut text = format!("at {} in {}", error.time, error.func.trim_end_matches('\0'));
        for (name, value) in [
            ("line", u64::from(error.line)),
            ("inode", u64::from(error.inode)),
            ("block", error.block),
        ] {
            if value != 0 {
                text += &format!(" {name} {value}");
            }
        }
        text
    };
    let count = sb.error_count();
    Some(format!(
        "errors recorded earlier: {count}, first {}, last {}; run e2fsck",
        say(&first),
        say(&last)
    ))
}
