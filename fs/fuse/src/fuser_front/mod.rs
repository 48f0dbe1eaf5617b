//! The portable front, for users without root: the `fuser` crate, which mounts by
//! fusermount3, before the same `FileSystem`.
//!
//! It lacks what only the own transport has: fuseblk and so `DESTROY` (umount(8) does
//! not wait; `uext umount` does), syncfs(2), readdirplus, `O_TMPFILE`, statx birth
//! times, aligned write data and replies without a copy.
//!
//! The filesystem is unmounted once: when the kernel ends the connection, or after
//! [`Stopper::stop`] even while files are still open.
//!
//! Locks: `Shared::gate`, read for each request, written by the unmount.

mod adapter;
mod convert;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use fuser::{INodeNo, MountOption, SessionACL, SessionUnmounter};
use uext_sync::{RwLock, RwLockReadGuard};
use uext_vfs::{Errno, FileSystem, Ino, Result};

use self::adapter::Adapter;
use crate::reply::swap_root;
use crate::session::{Config, SessionError};
use crate::sys::MountAttr;

/// How long the kernel may take to end a connection that was detached.
const DETACH_PATIENCE: Duration = Duration::from_secs(2);

/// What the requests of one mount share.
struct Shared {
    fs: Arc<dyn FileSystem>,
    root: Ino,
    config: Config,
    stateless: bool,
    posix_acl: bool,
    /// [itself] How the unmount went, once it was tried; no request runs meanwhile.
    gate: RwLock<Option<Result<()>>>,
}

impl Shared {
    fn unmount(&self) -> Result<()> {
        *self.gate.write().get_or_insert_with(|| self.fs.unmount())
    }

    /// Lets a request in, if the filesystem is still mounted.
    fn enter(&self) -> Result<RwLockReadGuard<'_, Option<Result<()>>>> {
        let gate = self.gate.read();
        if gate.is_some() { Err(Errno::ENODEV) } else { Ok(gate) }
    }

    fn ino(&self, node: INodeNo) -> Ino {
        swap_root(self.root, node.0)
    }
}

/// Why [`FuserMount::wait`] wakes.
enum Event {
    Ended(io::Result<()>),
    Stop,
}

/// A mount through fusermount3, answered from [`FuserMount::wait`] on.
pub struct FuserMount {
    session: fuser::Session<Adapter>,
    unmounter: SessionUnmounter,
    shared: Arc<Shared>,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
}

impl FuserMount {
    /// Mounts `fs` at `dir`; `name` is what the table of mounts shows as source.
    ///
    /// On failure the filesystem was unmounted.
    ///
    /// # Errors
    /// Those of fusermount3 and of the protocol's start.
    pub fn new(
        fs: Arc<dyn FileSystem>,
        name: &str,
        dir: &Path,
        config: &Config,
    ) -> io::Result<Self> {
        let capabilities = fs.capabilities();
        let shared = Arc::new(Shared {
            root: fs.root(),
            stateless: config.no_open.unwrap_or(capabilities.stateless_open),
            posix_acl: capabilities.posix_acl,
            config: config.clone(),
            gate: RwLock::new(None),
            fs,
        });
        let config =
            Config { read_only: config.read_only || capabilities.read_only, ..config.clone() };
        let options = fuser_config(name, &config);
        match fuser::Session::new(Adapter(shared.clone()), dir, &options) {
            Ok(mut session) => {
                let unmounter = session.unmount_callable();
                Ok(Self { session, unmounter, shared, events: mpsc::channel() })
            }
            Err(error) => {
                if let Err(errno) = shared.unmount() {
                    log::error!("unmounting the filesystem failed: {errno}");
                }
                Err(error)
            }
        }
    }

    /// A way to end the session from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.events.0.clone())
    }

    /// Serves until the end; the filesystem is then unmounted.
    ///
    /// # Errors
    /// The filesystem's own from its unmount: the image may not be clean.
    pub fn wait(self) -> std::result::Result<(), SessionError> {
        let Self { session, mut unmounter, shared, events: (sender, events) } = self;
        let ended = sender.clone();
        let spawned = std::thread::Builder::new().name("fuser".into()).spawn(move || {
            // Nobody listens when the session was stopped and given up.
            let _ = ended.send(Event::Ended(session.run()));
        });
        let mut result = match spawned {
            Ok(_) => events.recv().unwrap_or(Event::Stop),
            Err(error) => Event::Ended(Err(error)),
        };
        if matches!(result, Event::Stop) {
            if let Err(error) = unmounter.unmount() {
                log::warn!("umount: {error}");
            }
            // Files that are still open keep the connection; the image does not wait.
            result = events.recv_timeout(DETACH_PATIENCE).unwrap_or(Event::Ended(Ok(())));
        }
        shared.unmount().map_err(SessionError::Unmount)?;
        match result {
            Event::Ended(Err(error)) => Err(SessionError::Device(error)),
            _ => Ok(()),
        }
    }
}

/// Ends a session from outside: a signal, say.
#[derive(Clone)]
pub struct Stopper(mpsc::Sender<Event>);

impl Stopper {
    /// Detaches the mount and ends the session, open files or not.
    pub fn stop(&self) {
        // A session that has ended listens no more.
        let _ = self.0.send(Event::Stop);
    }
}

fn fuser_config(name: &str, config: &Config) -> fuser::Config {
    let mut options = vec![
        MountOption::FSName(name.to_owned()),
        MountOption::Subtype(config.subtype.clone()),
        if config.read_only { MountOption::RO } else { MountOption::RW },
    ];
    let flags = [
        (config.default_permissions, MountOption::DefaultPermissions),
        (config.sync, MountOption::Sync),
        (config.dirsync, MountOption::DirSync),
        (config.attributes.contains(MountAttr::NOEXEC), MountOption::NoExec),
        (config.attributes.contains(MountAttr::NOATIME), MountOption::NoAtime),
    ];
    options.extend(flags.into_iter().filter(|(on, _)| *on).map(|(_, option)| option));
    let mut out = fuser::Config::default();
    out.mount_options = options;
    out.acl = if config.allow_other { SessionACL::All } else { SessionACL::Owner };
    out.n_threads = Some(config.worker_count());
    out.clone_fd = true;
    out
}
