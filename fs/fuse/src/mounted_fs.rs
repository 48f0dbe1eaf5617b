//! The filesystem behind a mount. One that was mounted for reading alone may be replaced, once,
//! by the same image opened for writing.
//!
//! Invariants: requests that came before the change have ended when it happens, and who comes
//! later finds the second; the lookups that the kernel owes forgets for go with it.
//!
//! Locks: `gate`, outermost of all: shared by each request, exclusive for the change. A mount
//! that cannot be replaced does without.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use uext_sync::{Mutex, RwLock, RwLockReadGuard};
use uext_vfs::{Errno, FileSystem, Result};

/// Opens the filesystem for writing, or says in one line why not.
pub type Reopen = Box<dyn Fn() -> std::result::Result<Arc<dyn FileSystem>, String> + Send + Sync>;

pub(crate) struct MountedFs {
    first: Arc<dyn FileSystem>,
    /// What is served from when it is there.
    second: OnceLock<Arc<dyn FileSystem>>,
    reopen: OnceLock<Reopen>,
    gate: RwLock<()>,
    /// [itself] Why it could not be opened for writing, last time.
    refusal: Mutex<String>,
}

impl MountedFs {
    pub fn new(first: Arc<dyn FileSystem>) -> Self {
        Self {
            first,
            second: OnceLock::new(),
            reopen: OnceLock::new(),
            gate: RwLock::default(),
            refusal: Mutex::default(),
        }
    }

    /// Lets it be opened for writing later. Before the first request.
    pub fn reopen_by(&self, reopen: Reopen) {
        let _ = self.reopen.set(reopen);
    }

    /// Lets a request in.
    pub fn enter(&self) -> Option<RwLockReadGuard<'_, ()>> {
        self.reopen.get().map(|_| self.gate.read())
    }

    /// Opens it for writing where it was mounted for reading alone. Not from within a request.
    ///
    /// # Errors
    /// `EROFS`: see [`Self::refusal`].
    pub fn make_writable(&self) -> Result<()> {
        let Some(reopen) = self.reopen.get() else { return Ok(()) };
        let _alone = self.gate.write();
        if self.second.get().is_some() {
            return Ok(());
        }
        let second = reopen().map_err(|problem| {
            log::error!("not remounted read-write: {problem}");
            *self.refusal.lock() = problem;
            Errno::EROFS
        })?;
        second.take_over(&self.first.known());
        if let Err(errno) = self.first.unmount() {
            log::warn!("leaving the read-only filesystem: {errno}");
        }
        let _ = self.second.set(second);
        // What makes it read-only from now on is another reason.
        self.refusal.lock().clear();
        Ok(())
    }

    /// Why it could not be made writable; empty when nobody tried.
    pub fn refusal(&self) -> String {
        self.refusal.lock().clone()
    }
}

impl Deref for MountedFs {
    type Target = dyn FileSystem;

    fn deref(&self) -> &Self::Target {
        &**self.second.get().unwrap_or(&self.first)
    }
}
