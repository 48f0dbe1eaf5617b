//! fsync(2): a file's data and what is needed to find it, durable.

use uext_vfs::{Errno, FileKind};

use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;

impl Ext4 {
    /// Makes a file or directory durable: data, inode, and every change of its metadata before
    /// the call. With `datasync` a commit that holds only times is not waited for.
    ///
    /// # Errors
    /// How writing, the journal or the flush failed; a write error that nobody was told of yet.
    /// `EROFS` once the journal was aborted.
    pub(crate) fn sync_inode(&self, inode: &Inode, datasync: bool) -> Result<()> {
        if let Some(why) = self.journal.aborted() {
            return Err(why.into());
        }
        if self.is_read_only() {
            return Ok(());
        }
        let written = self.sync_data(inode);
        let told = inode.mapping.errseq().check_and_advance(&mut inode.data.reported.lock());
        written?;
        told.map_err(|error| Error::Errno(Errno(error.errno())))?;
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
        let tid = if datasync { &inode.datasync_tid } else { &inode.sync_tid }.load(Relaxed);
        // A commit under way may have flushed before this file's data was written: only one that
        // begins now stands for a flush.
        let covers = self.journal.running_tid() == Some(tid);
        self.journal.commit(tid)?;
        if covers { Ok(()) } else { self.barrier() }
    }

    fn barrier(&self) -> Result<()> {
        if self.options.barrier {
            self.buffers.flush_device()?;
        }
        Ok(())
    }
}
