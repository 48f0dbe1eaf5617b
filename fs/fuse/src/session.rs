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
use uext_sync::Mutex;
use uext_vfs::{Errno, FileSystem};

use crate::PAGE_SIZE;
use crate::alone::Alone;
use crate::awake::Awake;
pub use crate::awake::CpuLatency;
use crate::devfuse::{self, Served};
use crate::dispatch::{AfterUnmount, Dispatcher};
use crate::mounted_fs::Reopen;
use crate::notify::Notifier;
use crate::place::Place;
use crate::stand_in::{self, StandIns};
use crate::sys::{self, FsContext, MountAttr};
use crate::uring::{self, Rings};

/// Pages of the largest request: what the kernel allows at most by default.
const MAX_PAGES: usize = 256;

/// How requests come from the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// By reads and writes of `/dev/fuse`.
    #[default]
    DevFuse,
    /// By a ring per CPU; by `/dev/fuse` when that is not to be had.
    Uring,
    /// By rings where the kernel offers them, without a word where it does not.
    Auto,
}

/// How to mount and serve.
#[derive(Clone, Debug)]
pub struct Config {
    /// How requests come from the kernel.
    pub transport: Transport,
    /// Have the kernel offer rings, to all mounts of the machine. Needs root.
    pub enable_uring: bool,
    /// Worker threads; `None`: one per CPU, 2 to 8.
    pub threads: Option<usize>,
    /// How long a worker that has served a request looks for the next before it sleeps; zero:
    /// not at all (`/dev/fuse` only).
    pub spin: Duration,
    /// How quickly idle CPUs must wake while requests come in quick succession.
    pub cpu_latency: CpuLatency,
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
    /// How far the kernel reads ahead, KiB; `None`: its default.
    pub read_ahead_kb: Option<u32>,
    /// Most of the machine's dirty pages that may be this mount's, percent; `None`: all of
    /// them with `writeback_cache`, else the kernel's default.
    pub max_ratio: Option<u8>,
    /// Large reads are answered by splice from the pages they lie in (`/dev/fuse` only).
    pub splice: bool,
    /// The subtype shown in the table of mounts.
    pub subtype: String,
    /// Further options for the kernel, such as `context`.
    pub extra: Vec<(String, Option<String>)>,
}

impl Default for Config {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self {
            transport: Transport::default(),
            enable_uring: false,
            threads: None,
            spin: Duration::from_micros(50),
            cpu_latency: CpuLatency::Auto,
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
            read_ahead_kb: Some(1024),
            max_ratio: None,
            splice: false,
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
    before: Option<BeforeAttach>,
    reopen: Option<Reopen>,
}

/// Called with the mount's device number, major and minor.
type BeforeAttach = Box<dyn FnOnce((u32, u32)) + Send>;

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
            // Whatever the filesystem's: the kernel counts a file's blocks in pages, or in what
            // its attributes say, but asks for one of this size (BMAP); a swap file's pages would
            // go to other files' blocks.
            context.set_string("blksize", &PAGE_SIZE.to_string())?;
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
        let (config, after, before, reopen) = (config.clone(), None, None, None);
        Ok(Self { device, context, config, block, after, before, reopen })
    }

    /// Has `after` run once the filesystem has unmounted, well or not, and before
    /// umount(2) returns: what gives up the claim on the image, say.
    #[must_use]
    pub fn after_unmount(mut self, after: impl FnOnce() + Send + 'static) -> Self {
        self.after = Some(Box::new(after));
        self
    }

    /// Has `before` run when the mount's device number is known and nobody can see the mount yet.
    #[must_use]
    pub fn before_attach(mut self, before: impl FnOnce((u32, u32)) + Send + 'static) -> Self {
        self.before = Some(Box::new(before));
        self
    }

    /// Lets a filesystem that is mounted for reading alone be opened for writing, by a remount.
    #[must_use]
    pub fn reopen_by(mut self, reopen: Reopen) -> Self {
        self.reopen = Some(reopen);
        self
    }

    /// Starts serving `fs` and attaches the mount at `dir`, an absolute path.
    ///
    /// On failure `fs` was unmounted.
    ///
    /// # Errors
    /// Those of the protocol's start and of attaching.
    pub fn serve(self, fs: Arc<dyn FileSystem>, dir: &Path) -> io::Result<Session> {
        let Self { device, context, config, block, after, before, reopen } = self;
        let root = fs.root();
        let mut attributes = config.attributes;
        attributes.set(MountAttr::RDONLY, config.read_only || fs.capabilities().read_only);
        let dispatcher = Arc::new(Dispatcher::new(fs, &config));
        if let Some(after) = after {
            dispatcher.after_unmount(after);
        }
        if let Some(reopen) = reopen {
            dispatcher.reopen_by(reopen);
        }
        let device = Arc::new(device);
        let notifier = Notifier::new(Arc::downgrade(&device), root);
        dispatcher.notify_by(notifier.clone());
        let started = Workers::start(&device, &dispatcher, &config);
        drop(device);
        let (workers, control) = match started {
            Ok(started) => started,
            Err(error) => {
                unmount_after_failure(&dispatcher);
                return Err(error);
            }
        };
        let mut session = Session { dispatcher, workers, control, notifier, place: None };
        match attach(&context, attributes, &config, block, dir, before) {
            Ok(place) => {
                session.place = Some(place);
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

/// Attaches the mount.
fn attach(
    context: &FsContext,
    attributes: MountAttr,
    config: &Config,
    block: bool,
    dir: &Path,
    before: Option<BeforeAttach>,
) -> io::Result<Place> {
    let mount = context.mount(attributes)?;
    let device = mount.device()?;
    // Device numbers of a file's metadata are libc's; both parts fit 32 bits.
    let device = (libc::major(device), libc::minor(device));
    let max_ratio = config.max_ratio.or(config.writeback_cache.then_some(100));
    let suffix = if block { "-fuseblk" } else { "" };
    let bdi = format!("/sys/class/bdi/{}:{}{suffix}", device.0, device.1);
    let tune = |name: &str, value: Option<u32>| {
        let Some(value) = value else { return };
        if let Err(error) = std::fs::write(format!("{bdi}/{name}"), value.to_string()) {
            log::debug!("{bdi}/{name}: {error}");
        }
    };
    tune("read_ahead_kb", config.read_ahead_kb);
    tune("max_ratio", max_ratio.map(u32::from));
    if let Some(before) = before {
        before(device);
    }
    let place = Place::new(dir, device, &mount);
    mount.attach(dir)?;
    Ok(place)
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

/// The threads of a session.
struct Workers {
    threads: Vec<JoinHandle<io::Result<()>>>,
    /// The rings' other half, when requests come by rings.
    rings: Option<uring::Live>,
}

impl Workers {
    fn start(
        device: &Arc<File>,
        dispatcher: &Arc<Dispatcher>,
        config: &Config,
    ) -> io::Result<(Self, Arc<Control>)> {
        sys::install_kick()?;
        let control = Arc::new(Control::new(config));
        let mut workers = Self { threads: Vec::new(), rings: None };
        let rings = prepare_rings(device, dispatcher, &control, config);
        dispatcher.offer_uring(rings.is_some());
        devfuse::handshake(device, dispatcher, config.max_write())?;
        // A kernel that didn't agree would refuse the entries.
        let rings = rings.filter(|_| dispatcher.uring_agreed());
        match rings.map(Rings::go_live) {
            Some(Ok(mut live)) => {
                workers.threads.append(&mut live.threads);
                workers.rings = Some(live);
                let lazy = device.clone();
                workers.spawn(
                    "fuse-forget",
                    device_worker(lazy, dispatcher, &control, config, Duration::ZERO, Role::Serves),
                )?;
                return Ok((workers, control));
            }
            Some(Err(error)) => {
                dispatcher.offer_uring(false);
                log::warn!("no FUSE over io_uring, using /dev/fuse: {error}");
            }
            None => {}
        }
        let never = Duration::ZERO;
        let count = config.worker_count();
        for index in 0..(1 + stand_in::EACH) * count {
            let fuse = if index == 0 { device.clone() } else { clone_device(device) };
            let (role, spin) = match index {
                // A second that looks would only take from what the first finds.
                0 => (Role::Serves, config.spin),
                _ if index < count => (Role::Serves, never),
                _ => (Role::StandsIn, never),
            };
            let work = device_worker(fuse, dispatcher, &control, config, spin, role);
            let started = workers.spawn(&format!("fuse-{index}"), work);
            match started {
                Ok(()) => {}
                Err(error) if workers.threads.is_empty() => return Err(error),
                Err(error) => {
                    log::warn!("only {index} worker threads: {error}");
                    break;
                }
            }
        }
        Ok((workers, control))
    }

    fn spawn(
        &mut self,
        name: &str,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        self.threads.push(std::thread::Builder::new().name(name.to_owned()).spawn(work)?);
        Ok(())
    }

    /// Waits for all of them; the last error.
    fn join(self) -> Option<io::Error> {
        let mut failed = None;
        for thread in self.threads {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => failed = Some(error),
                Err(_) => failed = Some(io::Error::other("a worker panicked")),
            }
        }
        if let Some(rings) = self.rings {
            rings.close();
        }
        failed
    }
}

/// What a worker is for.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Serves,
    StandsIn,
}

/// Serves what comes through the device: everything, or, with rings, the rest.
fn device_worker(
    device: Arc<File>,
    dispatcher: &Arc<Dispatcher>,
    control: &Arc<Control>,
    config: &Config,
    spin: Duration,
    role: Role,
) -> impl FnOnce() -> io::Result<()> + Send + 'static {
    let (dispatcher, control) = (dispatcher.clone(), control.clone());
    let (max_write, splice) = (config.max_write(), config.splice);
    let lazily = dispatcher.uring_agreed();
    move || {
        let _guard = AbortOnPanic;
        sys::set_io_flusher();
        let waiting = control.enter();
        let served = Served {
            dispatcher: &dispatcher,
            control: &control,
            waiting: &waiting,
            max_write,
            lazily,
            splice,
            spin,
        };
        let result = match role {
            Role::Serves => served.serve(&device),
            Role::StandsIn => served.stand_in(&device),
        };
        control.stand_ins.close();
        control.alone.close();
        control.leave();
        result
    }
}

/// Makes the rings when they are wanted and the kernel offers them.
fn prepare_rings(
    device: &Arc<File>,
    dispatcher: &Arc<Dispatcher>,
    control: &Arc<Control>,
    config: &Config,
) -> Option<Rings> {
    match config.transport {
        Transport::DevFuse => return None,
        Transport::Auto if !uring::is_enabled() => return None,
        Transport::Uring if config.enable_uring && !uring::is_enabled() => match uring::enable() {
            Ok(()) => log::warn!("FUSE over io_uring is switched on for the whole system"),
            Err(error) => log::warn!("{}: {error}", uring::ENABLE),
        },
        Transport::Auto | Transport::Uring => {}
    }
    Rings::prepare(device, dispatcher, control, config)
        .inspect_err(|error| log::warn!("no FUSE over io_uring, using /dev/fuse: {error}"))
        .ok()
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
pub(crate) struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            log::error!("a worker panicked; stopping as if the power had failed");
            log::logger().flush();
            std::process::abort();
        }
    }
}

/// What all workers share: how they are stopped, and where they count requests.
pub(crate) struct Control {
    pub(crate) awake: Awake,
    pub(crate) stand_ins: StandIns,
    pub(crate) alone: Alone,
    /// Set for good once the workers are to end.
    ///
    /// PAIRS-WITH: `waiting` of each worker, in `Control::stop` and `devfuse::serve`:
    /// ```text
    /// CPU 0: Control::stop        CPU 1: devfuse::serve
    /// stop = true                 waiting = true
    /// if waiting: signal          if stop: end, else read the device
    /// ```
    /// Forbidden: both see the other's old value; then the worker reads and nobody signals.
    /// Two stores before two loads of the other's word: only `SeqCst` forbids that.
    stop: AtomicBool,
    /// [itself] The workers that run, each with whether it waits for a request.
    /// PAIRS-WITH: `stop`, see there.
    workers: Mutex<Vec<(Pthread, Arc<AtomicBool>)>>,
}

impl Control {
    fn new(config: &Config) -> Self {
        Self {
            awake: Awake::new(config.cpu_latency),
            stand_ins: StandIns::new(config.worker_count()),
            alone: Alone::new(config.worker_count() - 1),
            stop: AtomicBool::new(false),
            workers: Mutex::default(),
        }
    }

    /// Enters the calling thread.
    pub(crate) fn enter(&self) -> Arc<AtomicBool> {
        // PAIRS-WITH: `stop`, see there.
        let waiting = Arc::new(AtomicBool::new(false));
        self.workers.lock().push((pthread_self(), waiting.clone()));
        waiting
    }

    /// Takes the calling thread out.
    pub(crate) fn leave(&self) {
        let this = pthread_self();
        self.workers.lock().retain(|(thread, _)| *thread != this);
    }

    /// Whether workers are to end.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst) // PAIRS-WITH: stop
    }

    /// Tells all workers to end after what they are doing.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst); // PAIRS-WITH: devfuse::serve
        self.stand_ins.close();
        self.alone.close();
        while self.kick() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Takes waiting workers out of their read; whether there were any. A signal that
    /// comes just before the read is lost, so it is sent until nobody waits.
    fn kick(&self) -> bool {
        let mut any = false;
        for (thread, waiting) in self.workers.lock().iter() {
            // PAIRS-WITH: devfuse::serve
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
    workers: Workers,
    control: Arc<Control>,
    notifier: Notifier,
    /// `None` when it could not be attached.
    place: Option<Place>,
}

impl Session {
    /// The filesystem's device number, major and minor, as the table of mounts has it.
    pub fn device(&self) -> (u32, u32) {
        self.place.as_ref().map_or((0, 0), |place| place.device)
    }

    /// Whether requests come by rings.
    pub fn is_over_uring(&self) -> bool {
        self.workers.rings.is_some()
    }

    /// A way to tell the kernel of changes.
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// A way to end the session from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper { control: self.control.clone(), place: self.place.clone() }
    }

    /// Waits for the end; the filesystem is then unmounted.
    ///
    /// # Errors
    /// The filesystem's own from its unmount: the image may not be clean.
    pub fn wait(self) -> Result<(), SessionError> {
        let failed = self.workers.join();
        // DESTROY has done it, except for plain fuse and after an abort. It comes when the last
        // mount is gone.
        let destroyed = self.dispatcher.is_unmounted();
        let unmounted = self.dispatcher.unmount();
        if let Some(place) = self.place.filter(|_| !destroyed) {
            place.detach();
        }
        unmounted.map_err(SessionError::Unmount)?;
        failed.map_or(Ok(()), |error| Err(SessionError::Device(error)))
    }
}

/// Ends a session from outside: a signal, say.
#[derive(Clone)]
pub struct Stopper {
    control: Arc<Control>,
    place: Option<Place>,
}

impl Stopper {
    /// Unmounts. A mount in use is detached, what the kernel has not written yet is
    /// written, and the session ends with files open, whose users get errors.
    pub fn stop(&self) {
        if let Some(place) = self.place.as_ref().filter(|place| place.is_taken()) {
            let dir = &place.dir;
            match umount2(dir, MntFlags::empty()) {
                Ok(()) => return,
                Err(errno) => log::warn!("{}: umount: {errno}; detaching it", dir.display()),
            }
            if let Err(error) = File::open(dir).and_then(|root| sys::syncfs(&root)) {
                log::warn!("{}: syncfs: {error}", dir.display());
            }
            place.detach();
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
