//! fsync(2): a file's data and what is needed to find it, durable.

use std::sync::Arc;

use uext_blockdev::mutant;
use uext_vfs::{Errno, FileKind};

use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;

/// Most truncated files remembered until the next commit.
const MAX_REPLACED: usize = 1024;

impl Ext4 {
    /// Makes a file or directory durable: data, inode, and every change of its metadata before
    /// the call. With `datasync` a commit that holds only times is not waited for.
    ///
    /// # Errors
    /// How writing, the journal or the flush failed; a write error that nobody was told of yet.
    /// `EROFS` once the journal was aborted.
    pub(crate) fn sync_inode(&self, inode: &Inode, datasync: bool) -> Result<()> {
        self.stopped()?;
        if self.is_read_only() {
            return Ok(());
        }
        let written = self.sync_data(inode);
        let told = inode.mapping.errseq().check_and_advance(&mut inode.data.reported.lock());
        written?;
        told.map_err(|error| Error::Errno(Errno(error.errno())))?;
        self.flush_replaced(Some(inode));
        self.sync_metadata(inode, datasync)
    }

    fn sync_data(&self, inode: &Inode) -> Result<()> {
        if inode.kind == FileKind::Regular { self.flush_data(inode) } else { Ok(()) }
    }

    fn sync_metadata(&self, inode: &Inode, datasync: bool) -> Result<()> {
        use std::sync::atomic::Ordering::Relaxed;
        if !datasync {
            self.write_lazy(inode)?;
        }
        if !self.journal.has_journal() {
            self.buffers.write_dirty()?;
            return self.barrier();
        }
        if mutant!("fsync-without-commit") {
            return self.barrier();
        }
        // A commit under way may have flushed before this file's data was written: only one that
        // began after this call stands for a flush.
        let covers = if datasync {
            // WHY-RELAXED: see the field.
            self.journal.commit_covering(inode.datasync_tid.load(Relaxed))?
        } else {
            // Also when the inode is on the disk already: names made before the call are promised.
            self.journal.commit_all_covering()?
        };
        // All there is of a directory is in the journal: once committed it is durable.
        if covers || inode.kind == FileKind::Directory { Ok(()) } else { self.barrier() }
    }

    /// Flushes the device. A failure is final: what the device has lost no later flush
    /// brings back, so none may be believed.
    pub(crate) fn barrier(&self) -> Result<()> {
        if !self.options.barrier || mutant!("fsync-without-barrier") {
            return Ok(());
        }
        self.buffers.flush_device().inspect_err(|&status| self.flush_failed(status))?;
        Ok(())
    }

    /// A file was truncated to nothing, perhaps to be written anew.
    pub(crate) fn note_replaced(&self, inode: &Arc<Inode>) {
        let mut files = self.replaced.lock();
        // Beyond the bound a file is like any other: written by the flusher.
        if files.len() < MAX_REPLACED {
            files.push(Arc::downgrade(inode));
        }
    }

    /// Writes data of files that were truncated to nothing and written again, so that the
    /// commit that follows maps it: after a crash they are old or new, and empty only when
    /// the commit came in between. `except` does it itself. Errors are kept for the files'
    /// own fsync.
    pub(crate) fn flush_replaced(&self, except: Option<&Inode>) {
        let files = std::mem::take(&mut *self.replaced.lock());
        for inode in files.iter().filter_map(std::sync::Weak::upgrade) {
            if except.is_none_or(|other| other.ino != inode.ino)
                && let Err(error) = self.flush_data(&inode)
            {
                log::debug!("{}: inode {}: {error}", self.name, inode.ino);
            }
        }
    }
}
