//! A mount's life: claim the source, answer `INIT`, serve, attach, and at the end
//! unmount the filesystem, once, whichever way it ended.
//!
//! 1. [`Pending::create`] makes the superblock. A block device is claimed by it from
//!    then on, before anything is read from it, and nothing is visible yet.
//! 2. [`Pending::serve`] answers `INIT`, starts the workers, and only then attaches
//!    the mount: who sees it can use it.
//! 3. [`Session::wait`] returns when the kernel has ended the connection (unmount,
//!    abort) or [`Stopper::stop`] was called, and the filesystem is unmounted.
//!
//! As `fuseblk` (a device, or an image behind a loop device) the kernel's last
//! request is `DESTROY`, and umount(2) returns only after its answer. As plain `fuse`
//! it does not, and the filesystem is unmounted when the connection has ended.
//!
//! Locks: `Control::workers`, held for no call but pthread_kill.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use parking_lot::Mutex;
use uext_vfs::{Errno, FileSystem};

use crate::PAGE_SIZE;
use crate::devfuse;
use crate::dispatch::{AfterUnmount, Dispatcher};
use crate::mount_table;
use crate::notify::Notifier;
use crate::sys::{self, FsContext, MountAttr};

/// Pages of the largest request: what the kernel allows at most by default.
const MAX_PAGES: usize = 256;

/// How to mount and serve.
#[derive(Clone, Debug)]
pub struct Config {
    /// Worker threads; `None`: one per CPU, 2 to 8.
    pub threads: Option<usize>,
    /// How long the kernel may keep a name.
    pub entry_timeout: Duration,
    /// How long the kernel may keep attributes.
    pub attr_timeout: Duration,
    /// How long the kernel may remember that a name does not exist; zero: not at all.
    pub negative_timeout: Duration,
    /// Users other than the one who mounts may enter.
    pub allow_other: bool,
    /// The kernel checks permissions, from modes and ACLs.
    pub default_permissions: bool,
    /// The kernel delays writes.
    pub writeback_cache: bool,
    /// Whether the kernel sends opens; `None`: as the filesystem says.
    pub no_open: Option<bool>,
    /// Nothing is written.
    pub read_only: bool,
    /// Every write is synchronous.
    pub sync: bool,
    /// Every change of a directory is synchronous.
    pub dirsync: bool,
    /// What the mount point adds.
    pub attributes: MountAttr,
    /// Block size, bytes, a power of two; what stat(2) falls back to.
    pub block_size: u32,
    /// How far the kernel reads ahead, KiB; `None`: its default.
    pub read_ahead_kb: Option<u32>,
    /// The subtype shown in the table of mounts.
    pub subtype: String,
    /// Further options for the kernel, such as `context`.
    pub extra: Vec<(String, Option<String>)>,
}

impl Default for Config {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self {
            threads: None,
            entry_timeout: DAY,
            attr_timeout: DAY,
            negative_timeout: DAY,
            allow_other: true,
            default_permissions: true,
            writeback_cache: false,
            no_open: None,
            read_only: false,
            sync: false,
            dirsync: false,
            attributes: MountAttr::empty(),
            block_size: 4096,
            read_ahead_kb: Some(1024),
            subtype: "uext".into(),
            extra: Vec::new(),
        }
    }
}

impl Config {
    /// Most bytes of one read or write.
    pub fn max_write(&self) -> usize {
        MAX_PAGES * PAGE_SIZE
    }

    /// How many workers to start.
    pub(crate) fn worker_count(&self) -> usize {
        let cpus = std::thread::available_parallelism().map_or(2, |cpus| cpus.get());
        self.threads.unwrap_or_else(|| cpus.clamp(2, 8)).clamp(1, 256)
    }
}

/// What the mount is of.
#[derive(Clone, Debug)]
pub enum Source {
    /// A block device, claimed by the mount; who serves it must not open it `O_EXCL`.
    Device(PathBuf),
    /// An image file; a loop device stands for it.
    Image(PathBuf),
    /// Anything else, by the name the table of mounts shows. Without `DESTROY`:
    /// umount(2) does not wait for the filesystem.
    Name(String),
}

impl Source {
    /// Device or image, by what `path` is.
    ///
    /// # Errors
    /// Those of stat(2), and what is neither device nor regular file.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        let kind = std::fs::metadata(path)?.file_type();
        if kind.is_block_device() {
            Ok(Self::Device(path.to_owned()))
        } else if kind.is_file() {
            Ok(Self::Image(path.to_owned()))
        } else {
            Err(io::Error::other("neither a block device nor a regular file"))
        }
    }
}

/// A superblock that nobody sees yet.
pub struct Pending {
    device: File,
    context: FsContext,
    config: Config,
    /// bdi names of block-backed FUSE filesystems have a suffix.
    block: bool,
    after: Option<AfterUnmount>,
}

impl Pending {
    /// Makes the superblock and claims the source. Needs root.
    ///
    /// # Errors
    /// `EBUSY` for a device that somebody else holds; `EACCES` for a read-only device
    /// that is to be written; what the kernel says of an option.
    pub fn create(source: &Source, config: &Config) -> io::Result<Self> {
        let device = open_fuse()?;
        let (fstype, name, token) = match source {
            Source::Device(path) => (c"fuseblk", path.to_string_lossy().into_owned(), None),
            Source::Image(path) => {
                let (path, token) = loop_over(path, config.read_only)?;
                (c"fuseblk", path, Some(token))
            }
            Source::Name(name) => (c"fuse", name.clone(), None),
        };
        let block = !matches!(source, Source::Name(_));
        let context = FsContext::open(fstype)?;
        context.set_string("source", &name)?;
        context.set_string("subtype", &config.subtype)?;
        context.set_string("fd", &device.as_raw_fd().to_string())?;
        context.set_string("rootmode", "40000")?;
        context.set_string("user_id", &nix::unistd::getuid().to_string())?;
        context.set_string("group_id", &nix::unistd::getgid().to_string())?;
        context.set_string("max_read", &config.max_write().to_string())?;
        if block {
            let size = config.block_size.clamp(512, PAGE_SIZE as u32);
            context.set_string("blksize", &size.to_string())?;
        }
        let flags = [
            ("allow_other", config.allow_other),
            ("default_permissions", config.default_permissions),
            ("ro", config.read_only),
            ("sync", config.sync),
            ("dirsync", config.dirsync),
        ];
        for (flag, _) in flags.iter().filter(|(_, on)| *on) {
            context.set_flag(flag)?;
        }
        for (key, value) in &config.extra {
            match value {
                Some(value) => context.set_string(key, value)?,
                None => context.set_flag(key)?,
            }
        }
        context.create()?;
        // The superblock holds the loop device from here on.
        drop(token);
        Ok(Self { device, context, config: config.clone(), block, after: None })
    }

    /// Has `after` run once the filesystem has unmounted, well or not, and before
    /// umount(2) returns: what gives up the claim on the image, say.
    #[must_use]
    pub fn after_unmount(mut self, after: impl FnOnce() + Send + 'static) -> Self {
        self.after = Some(Box::new(after));
        self
    }

    /// Starts serving `fs` and attaches the mount at `dir`, an absolute path.
    ///
    /// On failure `fs` was unmounted.
    ///
    /// # Errors
    /// Those of the protocol's start and of attaching.
    pub fn serve(self, fs: Arc<dyn FileSystem>, dir: &Path) -> io::Result<Session> {
        let Self { device, context, config, block, after } = self;
        let root = fs.root();
        let mut attributes = config.attributes;
        attributes.set(MountAttr::RDONLY, config.read_only || fs.capabilities().read_only);
        let dispatcher = Arc::new(Dispatcher::new(fs, &config));
        if let Some(after) = after {
            dispatcher.after_unmount(after);
        }
        let device = Arc::new(device);
        let notifier = Notifier::new(Arc::downgrade(&device), root);
        let started = Workers::start(&device, &dispatcher, &config);
        drop(device);
        let (workers, control) = match started {
            Ok(started) => started,
            Err(error) => {
                unmount_after_failure(&dispatcher);
                return Err(error);
            }
        };
        let mut session = Session {
            dispatcher,
            workers: workers.0,
            control,
            notifier,
            mount_point: dir.to_owned(),
            device: (0, 0),
        };
        match attach(&context, attributes, &config, block, dir) {
            Ok(device) => {
                session.device = device;
                Ok(session)
            }
            Err(error) => {
                // Without a mount the superblock goes with its context, which ends the
                // connection and the workers.
                drop(context);
                session.control.stop();
                if let Err(unmount) = session.wait() {
                    log::error!("{unmount}");
                }
                Err(error)
            }
        }
    }
}

/// Attaches the mount and gives its device number.
fn attach(
    context: &FsContext,
    attributes: MountAttr,
    config: &Config,
    block: bool,
    dir: &Path,
) -> io::Result<(u32, u32)> {
    let mount = context.mount(attributes)?;
    let device = mount.device()?;
    // Device numbers of a file's metadata are libc's; both parts fit 32 bits.
    let device = (libc::major(device), libc::minor(device));
    if let Some(kb) = config.read_ahead_kb {
        let suffix = if block { "-fuseblk" } else { "" };
        let bdi = format!("/sys/class/bdi/{}:{}{suffix}/read_ahead_kb", device.0, device.1);
        if let Err(error) = std::fs::write(&bdi, kb.to_string()) {
            log::debug!("{bdi}: {error}");
        }
    }
    mount.attach(dir)?;
    Ok(device)
}

fn unmount_after_failure(dispatcher: &Dispatcher) {
    if let Err(errno) = dispatcher.unmount() {
        log::error!("unmounting the filesystem failed: {errno}");
    }
}

fn open_fuse() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/fuse")
        .map_err(|error| io::Error::new(error.kind(), format!("/dev/fuse: {error}")))
}

/// Puts a loop device over an image; the device goes when its last user does.
fn loop_over(image: &Path, read_only: bool) -> io::Result<(String, File)> {
    let open = |path: &Path| OpenOptions::new().read(true).write(!read_only).open(path);
    let named = |what: &Path, error: io::Error| {
        io::Error::new(error.kind(), format!("{}: {error}", what.display()))
    };
    let backing = open(image).map_err(|error| named(image, error))?;
    let control = Path::new("/dev/loop-control");
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open(control)
        .map_err(|error| named(control, error))?;
    // Another process may take the free device first; then the next is asked for.
    for _ in 0..64 {
        let path = format!("/dev/loop{}", sys::loop_get_free(&control)?);
        let device = open(Path::new(&path)).map_err(|error| named(Path::new(&path), error))?;
        match sys::loop_configure(&device, &backing, image, read_only) {
            Ok(()) => return Ok((path, device)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(named(Path::new(&path), error)),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "no loop device stays free"))
}

/// The worker threads of a session.
struct Workers(Vec<JoinHandle<io::Result<()>>>);

impl Workers {
    fn start(
        device: &Arc<File>,
        dispatcher: &Arc<Dispatcher>,
        config: &Config,
    ) -> io::Result<(Self, Arc<Control>)> {
        let max_write = config.max_write();
        sys::install_kick()?;
        devfuse::handshake(device, dispatcher, max_write)?;
        let control = Arc::new(Control::default());
        let mut workers = Vec::new();
        for index in 0..config.worker_count() {
            let device = if index == 0 { device.clone() } else { clone_device(device) };
            let (dispatcher, control) = (dispatcher.clone(), control.clone());
            let work = move || {
                let _guard = AbortOnPanic;
                sys::set_io_flusher();
                let state = control.enter();
                let result = devfuse::serve(&device, &dispatcher, &control.stop, &state, max_write);
                control.leave();
                result
            };
            match std::thread::Builder::new().name(format!("fuse-{index}")).spawn(work) {
                Ok(thread) => workers.push(thread),
                Err(error) if workers.is_empty() => return Err(error),
                Err(error) => {
                    log::warn!("only {index} worker threads: {error}");
                    break;
                }
            }
        }
        Ok((Self(workers), control))
    }
}

/// Another descriptor of the connection, with a queue of its own; the same one where
/// the kernel gives none.
fn clone_device(session: &Arc<File>) -> Arc<File> {
    let clone = open_fuse().and_then(|new| sys::clone_connection(&new, session).map(|()| new));
    match clone {
        Ok(new) => Arc::new(new),
        Err(error) => {
            log::warn!("FUSE_DEV_IOC_CLONE: {error}");
            session.clone()
        }
    }
}

/// A panic has left the filesystem in a state nobody knows. What is on the disk is
/// safe, for the journal is written to survive a stop at any point; going on is not.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            log::error!("a worker panicked; stopping as if the power had failed");
            log::logger().flush();
            std::process::abort();
        }
    }
}

/// How workers are stopped.
#[derive(Default)]
struct Control {
    /// Set for good once the workers are to end.
    stop: AtomicBool,
    /// [itself] The workers that run, each with whether it waits for a request.
    workers: Mutex<Vec<(Pthread, Arc<AtomicBool>)>>,
}

impl Control {
    /// Enters the calling thread.
    fn enter(&self) -> Arc<AtomicBool> {
        let waiting = Arc::new(AtomicBool::new(false));
        self.workers.lock().push((pthread_self(), waiting.clone()));
        waiting
    }

    /// Takes the calling thread out.
    fn leave(&self) {
        let this = pthread_self();
        self.workers.lock().retain(|(thread, _)| *thread != this);
    }

    /// Tells all workers to end after what they are doing.
    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst); // PAIRS-WITH: devfuse::serve
        while self.kick() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Takes waiting workers out of their read; whether there were any. A signal that
    /// comes just before the read is lost, so it is sent until nobody waits.
    fn kick(&self) -> bool {
        let mut any = false;
        for (thread, waiting) in self.workers.lock().iter() {
            if waiting.load(Ordering::SeqCst) {
                any = true;
                // A thread in the list has not ended, since it leaves under the lock.
                let _ = pthread_kill(*thread, sys::KICK);
            }
        }
        any
    }
}

/// A mount that is served.
pub struct Session {
    dispatcher: Arc<Dispatcher>,
    workers: Vec<JoinHandle<io::Result<()>>>,
    control: Arc<Control>,
    notifier: Notifier,
    mount_point: PathBuf,
    device: (u32, u32),
}

impl Session {
    /// The filesystem's device number, major and minor, as the table of mounts has it.
    pub fn device(&self) -> (u32, u32) {
        self.device
    }

    /// A way to tell the kernel of changes.
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// A way to end the session from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper {
            control: self.control.clone(),
            mount_point: self.mount_point.clone(),
            device: self.device,
        }
    }

    /// Waits for the end; the filesystem is then unmounted.
    ///
    /// # Errors
    /// The filesystem's own from its unmount: the image may not be clean.
    pub fn wait(self) -> Result<(), SessionError> {
        let mut failed = None;
        for worker in self.workers {
            match worker.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => failed = Some(error),
                Err(_) => failed = Some(io::Error::other("a worker panicked")),
            }
        }
        // DESTROY has done it, except for plain fuse and after an abort.
        self.dispatcher.unmount().map_err(SessionError::Unmount)?;
        detach(&self.mount_point, self.device);
        failed.map_or(Ok(()), |error| Err(SessionError::Device(error)))
    }
}

/// Whether the mount is still in its place.
fn is_mounted(dir: &Path, device: (u32, u32)) -> bool {
    matches!(mount_table::mount_at(dir), Ok(Some(mount)) if mount.device == device)
}

/// Takes a dead mount (its connection aborted) out of the way.
fn detach(dir: &Path, device: (u32, u32)) {
    if is_mounted(dir, device)
        && let Err(errno) = umount2(dir, MntFlags::MNT_DETACH)
    {
        log::warn!("{}: umount: {errno}", dir.display());
    }
}

/// Ends a session from outside: a signal, say.
#[derive(Clone)]
pub struct Stopper {
    control: Arc<Control>,
    mount_point: PathBuf,
    device: (u32, u32),
}

impl Stopper {
    /// Unmounts. A mount in use is detached, what the kernel has not written yet is
    /// written, and the session ends with files open, whose users get errors.
    pub fn stop(&self) {
        let dir = &self.mount_point;
        if is_mounted(dir, self.device) {
            match umount2(dir, MntFlags::empty()) {
                Ok(()) => return,
                Err(errno) => log::warn!("{}: umount: {errno}; detaching it", dir.display()),
            }
            if let Err(error) = File::open(dir).and_then(|root| sys::syncfs(&root)) {
                log::warn!("{}: syncfs: {error}", dir.display());
            }
            detach(dir, self.device);
        }
        self.control.stop();
    }
}

/// Why a session ended badly.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The filesystem could not be unmounted.
    #[error("unmounting failed, the filesystem may not be clean: {0}")]
    Unmount(Errno),
    /// Requests could not be read; the filesystem was unmounted.
    #[error("/dev/fuse: {0}")]
    Device(io::Error),
}
