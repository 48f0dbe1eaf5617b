//! `uext mount`: an image or device becomes a mount, served by a daemon.
//!
//! The program starts itself again as the daemon and waits for its word: the mount is
//! live, or one line why not. So the daemon has a fresh process without threads, and
//! the caller's exit status tells the truth. As root the mount is a fuseblk one where
//! that is possible, so that umount(8) waits for a clean image; for a user, and with
//! `-o portable`, it goes through fusermount3.
//!
//! Order: a block device is claimed by its superblock, then opened; an image is
//! opened and locked, then gets its loop device. The filesystem is mounted (its
//! journal replayed) before anybody sees it. The claim on an image ends after the
//! filesystem has unmounted and before umount(2) returns.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use log::LevelFilter;
use nix::sys::signal::{SigSet, Signal};
use uext_blockdev::BlockDevice;
use uext_blockdev::file::{FileDevice, OpenError, OpenOptions};
use uext_ext4::MountOptions;
use uext_fuse::fuser_front::{self, FuserMount};
use uext_fuse::{Pending, Reopen, Session, SessionError, Source, Stopper, mount_table};
use uext_vfs::FileSystem;

use crate::logging::{self, LogTarget};
use crate::mount_again::mount_again;
use crate::mount_options::MountRequest;
use crate::shown;
use crate::state::MountState;

/// Says to the program started again that it is the daemon.
const DAEMON_ENV: &str = "UEXT_MOUNT_DAEMON";
/// The daemon's last byte to who started it: the mount is live.
const LIVE: u8 = 0x06;

/// Mounts the filesystem on a device; the second argument is its name in messages.
pub type Opener =
    fn(Arc<dyn BlockDevice>, &str, &MountOptions) -> Result<Arc<dyn FileSystem>, String>;

/// What to mount, where and how.
pub struct Mount {
    /// A path, or `UUID=…` or `LABEL=…`.
    pub source: OsString,
    /// An existing directory.
    pub dir: PathBuf,
    /// The options.
    pub request: MountRequest,
    /// Serve in this process and return after the unmount.
    pub foreground: bool,
    /// More messages.
    pub verbose: bool,
}

/// Mounts; returns when the mount is live, in the foreground after its unmount.
///
/// # Errors
/// One line. An empty one when the daemon has said why already.
pub fn mount(mount: Mount, opener: Opener) -> Result<(), String> {
    if std::env::var_os(DAEMON_ENV).is_some() {
        return daemon(mount, opener);
    }
    if let Ok(source) = resolve(&mount.source)
        && let Some(again) = mount_again(&source, &mount.dir, &mount.request)
    {
        return again;
    }
    if mount.foreground {
        let level = if mount.verbose { LevelFilter::Info } else { LevelFilter::Warn };
        let log = logging::init(level, Box::new(io::stderr()));
        return serve(mount, opener, &log, || Ok(()));
    }
    start_daemon()
}

/// Starts this program again, with the same arguments, and waits for its word.
fn start_daemon() -> Result<(), String> {
    let mut args = std::env::args_os();
    // The link still works when the program was replaced meanwhile.
    let program = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(program.unwrap_or_else(|| "/proc/self/exe".into()));
    command.arg0(args.next().unwrap_or_else(|| "uext".into())).args(args);
    command.env(DAEMON_ENV, "1").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| format!("starting the daemon: {error}"))?;
    let mut words = Vec::new();
    if let Some(mut pipe) = child.stdout.take() {
        // Until the daemon closes it: live, or at its end.
        pipe.read_to_end(&mut words).map_err(|error| format!("the daemon: {error}"))?;
    }
    let live = words.last() == Some(&LIVE);
    if live {
        words.pop();
    }
    // Warnings of a mount that succeeded go the same way as the reason of one that did not.
    io::stderr().write_all(&words).map_err(|error| error.to_string())?;
    if live {
        return Ok(());
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    match status.signal() {
        Some(signal) => Err(format!("the daemon died of signal {signal}")),
        None if words.is_empty() => Err(format!("the daemon ended: {status}")),
        None => Err(String::new()),
    }
}

/// The daemon's main function.
fn daemon(mount: Mount, opener: Opener) -> Result<(), String> {
    let level = if mount.verbose { LevelFilter::Info } else { LevelFilter::Warn };
    let log = logging::init(level, Box::new(io::stdout()));
    // Not a group leader, having been started by one, so this cannot fail.
    let _ = nix::unistd::setsid();
    let after = log.clone();
    let live = move || {
        after.leave_stream();
        // A daemon keeps no directory busy.
        let _ = std::env::set_current_dir("/");
        let mut stdout = io::stdout();
        let null = File::options().read(true).write(true).open("/dev/null");
        stdout
            .write_all(&[LIVE])
            .and_then(|()| stdout.flush())
            .and_then(|()| nix::unistd::dup2_stdout(null?).map_err(io::Error::from))
            .map_err(|error| error.to_string())
    };
    let result = serve(mount, opener, &log, live);
    if let Err(problem) = &result {
        // Before it is live the log goes to who waits, after to the log.
        log::error!("{problem}");
    }
    result.map_err(|_| String::new())
}

/// Mounts and serves until the end; `live` is called once the mount can be used.
fn serve(
    mut mount: Mount,
    opener: Opener,
    log: &LogTarget,
    live: impl FnOnce() -> Result<(), String>,
) -> Result<(), String> {
    // Before any thread: all of them inherit it, and one takes the signals.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().map_err(|errno| errno.to_string())?;
    if let Some(path) = &mount.request.log_file {
        log.also_to_file(path).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    spare_from_oom_killer();
    uext_fuse::serve_under_pressure();
    let source = resolve(&mount.source)?;
    let dir = mount.dir.canonicalize();
    let dir = dir.map_err(|error| format!("{}: {error}", mount.dir.display()))?;
    if !dir.is_dir() {
        return Err(format!("{}: not a directory", dir.display()));
    }
    if !mount.request.ignored.is_empty() {
        log::info!("options without a meaning here: {}", mount.request.ignored.join(","));
    }
    let (front, state) = Front::start(&source, &dir, &mut mount.request, opener)?;
    end_on_signal(signals, front.stopper());
    live()?;
    log::info!("{} is mounted on {}", source.display(), dir.display());
    let result = front.wait().map_err(|error| format!("{}: {error}", source.display()));
    match &result {
        Ok(()) => log::info!("{} is unmounted and clean", source.display()),
        Err(problem) => log::error!("{problem}"),
    }
    if let Some(state) = state {
        state.finish(result.clone());
    }
    result
}

/// A filesystem's mount, by one front or the other.
enum Front {
    Own(Session),
    Portable(FuserMount),
}

impl Front {
    fn start(
        source: &Path,
        dir: &Path,
        request: &mut MountRequest,
        opener: Opener,
    ) -> Result<(Self, Option<MountState>), String> {
        let portable = request.portable || !nix::unistd::geteuid().is_root();
        let (device, pending) = open(source, request, portable)?;
        let name = source.to_string_lossy();
        let fs = opener(device.clone(), &name, &request.ext4);
        let fs = fs.map_err(|problem| format!("{name}: {problem}"))?;
        let shown = dir.to_owned();
        fs.on_read_only(Box::new(move || shown::show_read_only(shown.clone())));
        let on = |error: io::Error| format!("{}: {error}", dir.display());
        let Some(pending) = pending else {
            let front = FuserMount::new(fs, &name, dir, &request.fuse).map_err(on)?;
            let mount = mount_table::mount_at(dir).ok().flatten();
            let device = mount.map_or((0, 0), |mount| mount.device);
            let state = leave_word(device, source, dir, &request.given);
            return Ok((Self::Portable(front), state));
        };
        // Who sees the mount finds the word of it too, not that of a dead one with its number.
        let (to_us, word) = std::sync::mpsc::channel();
        let place = (source.to_owned(), dir.to_owned(), request.given.clone());
        // Also where the image asks for it: then the attempt says why.
        let pending = if fs.capabilities().read_only {
            pending.reopen_by(reopener(source, dir, request, opener))
        } else {
            pending
        };
        let served = pending
            .after_unmount(move || device.release_claim())
            .before_attach(move |number| {
                let _ = to_us.send(leave_word(number, &place.0, &place.1, &place.2));
            })
            .serve(fs, dir);
        let state = word.try_recv().ok().flatten();
        match served {
            Ok(session) => Ok((Self::Own(session), state)),
            Err(error) => {
                let problem = on(error);
                if let Some(state) = state {
                    state.finish(Err(problem.clone()));
                }
                Err(problem)
            }
        }
    }

    fn stopper(&self) -> AnyStopper {
        match self {
            Self::Own(session) => AnyStopper::Own(session.stopper()),
            Self::Portable(mount) => AnyStopper::Portable(mount.stopper()),
        }
    }

    fn wait(self) -> Result<(), SessionError> {
        match self {
            Self::Own(session) => session.wait(),
            Self::Portable(mount) => mount.wait(),
        }
    }
}

/// Opens for writing what is mounted for reading alone. Over an image lies a loop device that
/// cannot be written, and the kernel lets nobody change that, not for a mount of its own either.
fn reopener(source: &Path, dir: &Path, request: &MountRequest, opener: Opener) -> Reopen {
    // A daemon has the root directory for its own.
    let source = source.canonicalize().unwrap_or_else(|_| source.to_owned());
    let (dir, engine, mut ext4) = (dir.to_owned(), request.engine, request.ext4.clone());
    let norecovery = ext4.norecovery;
    (ext4.read_only, ext4.rw_explicit) = (false, true);
    Box::new(move || {
        let again = "unmount it and mount it with rw";
        if norecovery {
            return Err(format!("mounted with norecovery: {again}"));
        }
        if !is_block_device(&source) {
            return Err(format!("an image that was mounted read-only: {again}"));
        }
        let options = OpenOptions { engine, claim: false, ..OpenOptions::default() };
        let device = FileDevice::open(&source, options).map_err(|error| error.to_string())?;
        let fs = opener(device, &source.to_string_lossy(), &ext4)?;
        let dir = dir.clone();
        fs.on_read_only(Box::new(move || shown::show_read_only(dir.clone())));
        Ok(fs)
    })
}

/// What `uext umount` waits by, and a remount compares with; the mount works without it.
fn leave_word(
    device: (u32, u32),
    source: &Path,
    dir: &Path,
    options: &[String],
) -> Option<MountState> {
    MountState::create(device, source, dir, options)
        .inspect_err(|error| log::warn!("nobody will be able to wait for the unmount: {error}"))
        .ok()
}

enum AnyStopper {
    Own(Stopper),
    Portable(fuser_front::Stopper),
}

/// Unmounts on SIGTERM and SIGINT; SIGHUP means nothing to a daemon.
fn end_on_signal(signals: SigSet, stopper: AnyStopper) {
    let wait = move || {
        loop {
            match signals.wait() {
                Ok(Signal::SIGHUP) | Err(_) => {}
                Ok(signal) => {
                    log::warn!("{signal}: unmounting");
                    match &stopper {
                        AnyStopper::Own(stopper) => stopper.stop(),
                        AnyStopper::Portable(stopper) => stopper.stop(),
                    }
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("signals".into()).spawn(wait) {
        log::warn!("signals will not unmount: {error}");
    }
}

/// What opening came to: a device, and for the own front a superblock over it.
type Opened = (Arc<FileDevice>, Option<Pending>);

/// Why opening failed, and whether it would not have for reading alone.
struct OpenFailure {
    problem: String,
    may_be_read: bool,
}

impl From<OpenError> for OpenFailure {
    fn from(error: OpenError) -> Self {
        let may_be_read = matches!(error, OpenError::Denied { .. });
        Self { problem: error.to_string(), may_be_read }
    }
}

impl OpenFailure {
    fn of_mount(source: &Path, error: &io::Error) -> Self {
        let kinds = [io::ErrorKind::PermissionDenied, io::ErrorKind::ReadOnlyFilesystem];
        let may_be_read = kinds.contains(&error.kind());
        Self { problem: format!("{}: {error}", source.display()), may_be_read }
    }
}

/// Opens the source, for reading alone where nothing else is possible and nobody
/// insisted on more.
fn open(source: &Path, request: &mut MountRequest, portable: bool) -> Result<Opened, String> {
    match try_open(source, request, portable) {
        Ok(opened) => Ok(opened),
        Err(failure)
            if failure.may_be_read && !request.ext4.read_only && !request.ext4.rw_explicit =>
        {
            request.set_read_only(true);
            let opened = try_open(source, request, portable).map_err(|failure| failure.problem)?;
            log::warn!("{}: mounted read-only: it may not be written", source.display());
            Ok(opened)
        }
        Err(failure) => Err(failure.problem),
    }
}

fn is_block_device(source: &Path) -> bool {
    std::fs::metadata(source).is_ok_and(|meta| meta.file_type().is_block_device())
}

fn try_open(source: &Path, request: &MountRequest, portable: bool) -> Result<Opened, OpenFailure> {
    let options = OpenOptions {
        read_only: request.ext4.read_only,
        engine: request.engine,
        ..OpenOptions::default()
    };
    if portable {
        return Ok((FileDevice::open(source, options)?, None));
    }
    let create = |of: &Source| Pending::create(of, &request.fuse);
    let mount_error = |error: io::Error| OpenFailure::of_mount(source, &error);
    if is_block_device(source) {
        let pending = create(&Source::Device(source.to_owned())).map_err(mount_error)?;
        let device = FileDevice::open(source, OpenOptions { claim: false, ..options })?;
        return Ok((device, Some(pending)));
    }
    let device = FileDevice::open(source, options)?;
    let pending = create(&Source::Image(source.to_owned())).or_else(|error| {
        // Containers often have no loop devices.
        let pending = create(&Source::Name(source.to_string_lossy().into_owned()));
        pending.map_err(|_| mount_error(error)).inspect(|_| {
            log::warn!("no loop device: umount(8) will not wait, `uext umount` will");
        })
    })?;
    Ok((device, Some(pending)))
}

/// The path of a source, which may be a tag of the filesystem on it.
fn resolve(source: &OsString) -> Result<PathBuf, String> {
    let text = source.to_string_lossy();
    let tags = [("UUID=", "by-uuid"), ("LABEL=", "by-label"), ("PARTUUID=", "by-partuuid")];
    let path = tags
        .iter()
        .find_map(|(tag, by)| Some(Path::new("/dev/disk").join(by).join(text.strip_prefix(tag)?)))
        .unwrap_or_else(|| PathBuf::from(source));
    path.canonicalize().map_err(|error| format!("{text}: {error}"))
}

/// Killing the daemon is like pulling the plug; better something else goes. Needs a
/// privilege, and without it nothing changes.
fn spare_from_oom_killer() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        log::debug!("oom_score_adj: {error}");
    }
}
