//! Opening an image or a block device: exclusive use, direct I/O, size and limits.
//!
//! Invariants: who has a [`Target`] for writing is the only writer that asks the
//! kernel the same way (flock on an image, `O_EXCL` on a block device), until the
//! target is dropped.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::OpenOptions;
use super::loops;
use super::target::{Kind, Target};
use crate::limits::QueueLimits;
use crate::units::{SECTOR_SIZE, Sector};

/// Most bytes in one request to the kernel.
const MAX_BYTES: u32 = 4 << 20;
/// Most bvecs in one request to the kernel; its own limit is 1024.
const MAX_SEGMENTS: u16 = 512;
/// How long an image may stay in use by somebody who is gone.
const GRACE: Duration = Duration::from_millis(500);

/// Why a file can't be used as a device.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Somebody else uses it: another uext program, or for a block device the kernel.
    #[error("{} is in use by another program or mounted", .0.display())]
    InUse(PathBuf),
    /// There is no such file.
    #[error("{} does not exist", .0.display())]
    NotFound(PathBuf),
    /// The permissions, or a read-only medium, don't allow it; opening read-only may.
    #[error("{} may not be opened: {source}", path.display())]
    Denied {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    NotADevice(PathBuf),
    /// Everything else.
    #[error("cannot open {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl OpenError {
    fn new(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::EBUSY | libc::EWOULDBLOCK | libc::ETXTBSY) => Self::InUse(path),
            Some(libc::ENOENT) => Self::NotFound(path),
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => Self::Denied { path, source },
            _ => Self::Io { path, source },
        }
    }
}

/// Opens, claims and measures the file.
pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Target, OpenError> {
    let fail = |source| OpenError::new(path, source);
    let kind = kind_of(&std::fs::metadata(path).map_err(fail)?)
        .ok_or_else(|| OpenError::NotADevice(path.to_owned()))?;
    let mut direct = options.direct;
    let mut file = match open_file(path, kind, options, direct) {
        // The file system has no direct I/O (tmpfs).
        Err(error) if direct && error.raw_os_error() == Some(libc::EINVAL) => {
            direct = false;
            open_file(path, kind, options, direct)
        }
        other => other,
    }
    .map_err(fail)?;
    // What was opened may not be what was looked at.
    if kind_of(&file.metadata().map_err(fail)?) != Some(kind) {
        return Err(OpenError::NotADevice(path.to_owned()));
    }
    let mut align = dio_align(&file);
    if direct && align == Some(DioAlign { memory: 0, offset: 0 }) {
        // It opens, but the kernel says direct I/O won't work.
        direct = false;
        file = open_file(path, kind, options, direct).map_err(fail)?;
    }
    if kind == Kind::Image {
        let meta = file.metadata().map_err(fail)?;
        wait_while_used(|| lock(&file, options.read_only)).map_err(fail)?;
        wait_while_used(|| match loops::in_use(&meta, options.read_only) {
            true => Err(io::ErrorKind::ResourceBusy.into()),
            false => Ok(()),
        })
        .map_err(|_| OpenError::InUse(path.to_owned()))?;
    }
    if options.direct && !direct {
        log::warn!("{}: no direct I/O here, using the page cache", path.display());
    }
    if !direct {
        align = Some(DioAlign { memory: 1, offset: 512 });
    }
    let limits = limits_of(&file, kind, options.read_only, align).map_err(fail)?;
    Ok(Target::new(file, kind, direct, limits))
}

fn kind_of(meta: &std::fs::Metadata) -> Option<Kind> {
    if meta.file_type().is_file() {
        Some(Kind::Image)
    } else if meta.file_type().is_block_device() {
        Some(Kind::Block)
    } else {
        None
    }
}

fn open_file(path: &Path, kind: Kind, options: &OpenOptions, direct: bool) -> io::Result<File> {
    let mut flags = 0;
    if direct {
        flags |= libc::O_DIRECT;
    }
    let read_only = options.read_only;
    if kind == Kind::Block && !read_only && options.claim {
        // Without O_CREAT it claims the device, as a mount does.
        flags |= libc::O_EXCL;
    }
    std::fs::OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)
}

/// Tries for a moment: of a daemon that was killed the kernel ends rings and mounts only a while
/// after the process, and until then they hold the image.
fn wait_while_used(mut claim: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match claim() {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy
                ) && start.elapsed() < GRACE =>
            {
                std::thread::sleep(GRACE / 50);
            }
            other => return other,
        }
    }
}

/// One writer, or many readers.
fn lock(file: &File, read_only: bool) -> io::Result<()> {
    let how = if read_only { libc::LOCK_SH } else { libc::LOCK_EX };
    // SAFETY: the descriptor is open.
    if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Undoes [`lock`].
pub(super) fn unlock(file: &File) {
    // SAFETY: the descriptor is open.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) } != 0 {
        log::warn!("giving up the image's lock: {}", io::Error::last_os_error());
    }
}

/// What direct I/O asks for, bytes; both 0 where it isn't there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct DioAlign {
    memory: u32,
    offset: u32,
}

/// From statx, where the kernel (6.1 and later) and the file system tell.
fn dio_align(file: &File) -> Option<DioAlign> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    let empty = CString::default();
    // SAFETY: the path is a C string, the buffer is large enough for a statx.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            stat.as_mut_ptr(),
        )
    };
    if result != 0 {
        return None;
    }
    // SAFETY: zeroes are a valid statx, and the call has filled it in.
    let stat = unsafe { stat.assume_init() };
    (stat.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some(DioAlign { memory: stat.stx_dio_mem_align, offset: stat.stx_dio_offset_align })
}

fn limits_of(
    file: &File,
    kind: Kind,
    read_only: bool,
    align: Option<DioAlign>,
) -> io::Result<QueueLimits> {
    let (bytes, sector, physical) = match kind {
        Kind::Image => (file.metadata()?.len(), 512, 4096),
        Kind::Block => (
            ioctl_get::<u64>(file, BLKGETSIZE64)?,
            ioctl_get::<u32>(file, BLKSSZGET).unwrap_or(512),
            ioctl_get::<u32>(file, BLKPBSZGET).unwrap_or(4096),
        ),
    };
    let align = align.unwrap_or(DioAlign { memory: sector, offset: sector });
    let logical = align.offset.max(sector).max(512);
    let usable = bytes / u64::from(logical) * u64::from(logical);
    if usable != bytes {
        log::info!("{} bytes behind the last whole block are not used", bytes - usable);
    }
    let discard = match kind {
        Kind::Image => u64::from(logical) << 31,
        Kind::Block => discard_max(file).unwrap_or(0),
    };
    Ok(QueueLimits {
        capacity: Sector(usable / SECTOR_SIZE),
        logical_block_size: logical,
        physical_block_size: physical.max(logical),
        dma_alignment: align.memory.max(1),
        max_bytes: MAX_BYTES,
        max_segments: MAX_SEGMENTS,
        write_cache: true,
        // RWF_DSYNC: the kernel knows best how the device below does it.
        fua: true,
        max_discard_bytes: discard,
        max_write_zeroes_bytes: u64::from(logical) << 31,
        read_only,
    })
}

/// `queue/discard_max_bytes` of a block device or of the disk a partition is on.
fn discard_max(file: &File) -> Option<u64> {
    let dev = file.metadata().ok()?.rdev();
    let dir = format!("/sys/dev/block/{}:{}", libc::major(dev), libc::minor(dev));
    let read = |name: &str| std::fs::read_to_string(Path::new(&dir).join(name)).ok();
    let text = read("queue/discard_max_bytes").or_else(|| read("../queue/discard_max_bytes"))?;
    text.trim().parse().ok()
}

const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKSSZGET: libc::Ioctl = 0x1268;
const BLKPBSZGET: libc::Ioctl = 0x127b;

fn ioctl_get<T: Default>(file: &File, request: libc::Ioctl) -> io::Result<T> {
    let mut value = T::default();
    // SAFETY: each request above writes one value of the type it is asked for.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}
