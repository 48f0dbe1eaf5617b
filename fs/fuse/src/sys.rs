//! The system calls that have no safe wrapper elsewhere; all of the crate's unsafe
//! code but that of the rings (`uring::ring`).

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use bitflags::bitflags;
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::Pid;

use crate::abi;
use crate::mount_table::MountEntry;

bitflags! {
    /// What a mount point adds to its filesystem (mount_setattr(2)).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct MountAttr: u32 {
        /// Read-only here.
        const RDONLY = 0x1;
        /// No set-id programs.
        const NOSUID = 0x2;
        /// No device files.
        const NODEV = 0x4;
        /// No programs.
        const NOEXEC = 0x8;
        /// Access times are not kept.
        const NOATIME = 0x10;
        /// Access times are always kept; without this and `NOATIME`, relatively.
        const STRICTATIME = 0x20;
        /// Access times of directories are not kept.
        const NODIRATIME = 0x80;
        /// Symbolic links are not followed.
        const NOSYMFOLLOW = 0x20_0000;
    }
}

/// The scheduling policy of a thread (`SCHED_*`).
pub(crate) fn scheduling_policy(thread: Pid) -> io::Result<i32> {
    // SAFETY: it has no pointers.
    Ok(Errno::result(unsafe { libc::sched_getscheduler(thread.as_raw()) })?)
}

/// Gives a thread a policy that has no priorities.
pub(crate) fn set_scheduling_policy(thread: Pid, policy: i32) -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters outlive the call.
    let set = unsafe { libc::sched_setscheduler(thread.as_raw(), policy, &raw const param) };
    Ok(Errno::result(set).map(drop)?)
}

/// A filesystem being configured, or with its superblock made: fsopen(2).
pub(crate) struct FsContext(OwnedFd);

const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
/// All ways to keep access times.
const MOUNT_ATTR_ATIME: u32 = 0x70;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;

impl FsContext {
    pub fn open(fstype: &CStr) -> io::Result<Self> {
        // SAFETY: the string is NUL-terminated and outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, fstype.as_ptr(), FSOPEN_CLOEXEC) };
        new_fd(fd).map(Self)
    }

    pub fn set_flag(&self, key: &str) -> io::Result<()> {
        self.config(FSCONFIG_SET_FLAG, Some(key), None)
    }

    pub fn set_string(&self, key: &str, value: &str) -> io::Result<()> {
        self.config(FSCONFIG_SET_STRING, Some(key), Some(value))
    }

    /// Makes the superblock; a block device is claimed from here on.
    pub fn create(&self) -> io::Result<()> {
        self.config(FSCONFIG_CMD_CREATE, None, None)
    }

    fn config(&self, cmd: libc::c_uint, key: Option<&str>, value: Option<&str>) -> io::Result<()> {
        let key = key.map(CString::new).transpose()?;
        let value = value.map(CString::new).transpose()?;
        let pointer = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
        // SAFETY: both strings are NULL or NUL-terminated and outlive the call.
        let result = unsafe {
            let fd = self.0.as_raw_fd();
            libc::syscall(libc::SYS_fsconfig, fd, cmd, pointer(&key), pointer(&value), 0)
        };
        if result < 0 {
            let error = io::Error::last_os_error();
            return Err(match self.message() {
                Some(message) => io::Error::new(error.kind(), format!("{message} ({error})")),
                None => error,
            });
        }
        Ok(())
    }

    /// What the kernel has to say about the last failure.
    fn message(&self) -> Option<String> {
        let mut file = File::from(self.0.try_clone().ok()?);
        let mut buf = [0; 512];
        let len = file.read(&mut buf).ok()?;
        let text = String::from_utf8_lossy(&buf[..len]);
        let text = text.trim();
        (!text.is_empty()).then(|| text.trim_start_matches("e ").to_owned())
    }

    /// A mount of the filesystem, not attached to anything yet.
    pub fn mount(&self, attributes: MountAttr) -> io::Result<DetachedMount> {
        // SAFETY: no memory is handed over.
        let fd = unsafe {
            let fd = self.0.as_raw_fd();
            libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes.bits())
        };
        new_fd(fd).map(|fd| DetachedMount(File::from(fd)))
    }
}

/// Mounts what is mounted already at `dir` too, as a mount of its own: nothing that is mounted
/// in one shows in the other. Needs root.
///
/// # Errors
/// Those of open_tree(2), mount_setattr(2) and move_mount(2). `EINVAL` when `from` is marked
/// unbindable or another filesystem is mounted over it.
pub fn mount_again(from: &MountEntry, dir: &Path, attributes: MountAttr) -> io::Result<()> {
    let device = libc::makedev(from.device.0, from.device.1);
    let from = CString::new(from.mount_point.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the string is NUL-terminated and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, from.as_ptr(), flags) };
    let mount = DetachedMount(File::from(new_fd(fd)?));
    if mount.device()? != device {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // A clone begins with the attributes of the first.
    let cleared = MountAttr::all() - MountAttr::RDONLY;
    let request = libc::mount_attr {
        attr_set: attributes.bits().into(),
        attr_clr: (cleared.bits() | MOUNT_ATTR_ATIME).into(),
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: both pointers are to what lives here, and the size is that of the structure.
    let result = unsafe {
        let (fd, size) = (mount.0.as_raw_fd(), size_of_val(&request));
        let empty = libc::AT_EMPTY_PATH;
        libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), empty, &raw const request, size)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    mount.attach(dir)
}

/// A mount without a place; dropping it unmounts.
pub(crate) struct DetachedMount(File);

impl AsFd for DetachedMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl DetachedMount {
    /// The device number of the filesystem; asks it for its root's attributes.
    pub fn device(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        self.0.metadata().map(|meta| meta.dev())
    }

    /// Attaches it.
    pub fn attach(self, dir: &Path) -> io::Result<()> {
        let dir = CString::new(dir.as_os_str().as_bytes())?;
        // SAFETY: both strings are NUL-terminated and outlive the call.
        let result = unsafe {
            let (from, at) = (self.0.as_raw_fd(), libc::AT_FDCWD);
            let flags = MOVE_MOUNT_F_EMPTY_PATH;
            libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), at, dir.as_ptr(), flags)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn new_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes `new` (freshly opened `/dev/fuse`) another way to the connection of `session`.
pub(crate) fn clone_connection(new: &File, session: &File) -> io::Result<()> {
    let fd = session.as_raw_fd().cast_unsigned();
    // SAFETY: the kernel reads one u32 from the pointer, which lives through the call.
    let result = unsafe { libc::ioctl(new.as_raw_fd(), abi::DEV_IOC_CLONE, &raw const fd) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

const LOOP_CTL_GET_FREE: u64 = 0x4c82;
const LOOP_CONFIGURE: u64 = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo64 {
    lo_device: u64,
    lo_inode: u64,
    lo_rdevice: u64,
    lo_offset: u64,
    lo_sizelimit: u64,
    lo_number: u32,
    lo_encrypt_type: u32,
    lo_encrypt_key_size: u32,
    lo_flags: u32,
    lo_file_name: [u8; 64],
    lo_crypt_name: [u8; 64],
    lo_encrypt_key: [u8; 32],
    lo_init: [u64; 2],
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

/// The number of a loop device that is free at this moment.
pub(crate) fn loop_get_free(control: &File) -> io::Result<u32> {
    // SAFETY: the command takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Ties `device` to `backing` until its last user is gone.
pub(crate) fn loop_configure(
    device: &File,
    backing: &File,
    name: &Path,
    read_only: bool,
) -> io::Result<()> {
    let mut lo_file_name = [0; 64];
    let name = name.as_os_str().as_bytes();
    let len = name.len().min(63);
    lo_file_name[..len].copy_from_slice(&name[..len]);
    let read_only = if read_only { LO_FLAGS_READ_ONLY } else { 0 };
    let config = LoopConfig {
        fd: backing.as_raw_fd().cast_unsigned(),
        block_size: 0,
        info: LoopInfo64 {
            lo_device: 0,
            lo_inode: 0,
            lo_rdevice: 0,
            lo_offset: 0,
            lo_sizelimit: 0,
            lo_number: 0,
            lo_encrypt_type: 0,
            lo_encrypt_key_size: 0,
            lo_flags: LO_FLAGS_AUTOCLEAR | read_only,
            lo_file_name,
            lo_crypt_name: [0; 64],
            lo_encrypt_key: [0; 32],
            lo_init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads one LoopConfig from the pointer, which lives through the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// From `linux/prctl.h`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Prepares the process to write while memory is short, before it starts threads, which inherit
/// it: the kernel neither makes them wait for what only they can write out, nor swaps out what
/// they have touched. Needs privileges; without them nothing changes.
pub fn serve_under_pressure() {
    set_io_flusher();
    // On fault: only what is used, not the stacks' and pools' whole room.
    // SAFETY: no memory is handed over.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } != 0 {
        log::debug!("mlockall: {}", io::Error::last_os_error());
    }
}

/// Tells the kernel that this thread writes out what the kernel wants to reclaim, so
/// that it must not be made to wait for that. Needs a privilege; without it nothing changes.
pub(crate) fn set_io_flusher() {
    // SAFETY: no memory is handed over.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result < 0 {
        log::debug!("PR_SET_IO_FLUSHER: {}", io::Error::last_os_error());
    }
}

/// The signal that takes a thread out of a blocking call.
pub(crate) const KICK: Signal = Signal::SIGUSR1;

extern "C" fn kicked(_: libc::c_int) {}

/// Makes [`KICK`] interrupt system calls and do nothing else.
pub(crate) fn install_kick() -> io::Result<()> {
    let action = SigAction::new(SigHandler::Handler(kicked), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, so it is safe whatever it interrupts.
    unsafe { sigaction(KICK, &action) }.map(drop).map_err(io::Error::from)
}

/// syncfs(2).
pub(crate) fn syncfs(file: &File) -> io::Result<()> {
    // SAFETY: no memory is handed over.
    let result = unsafe { libc::syncfs(file.as_fd().as_raw_fd()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An ioctl(2) that gives text, filled up with NUL.
pub(crate) fn receive_text(file: &File, command: u32) -> io::Result<String> {
    let mut text = [0u8; 256];
    assert!(command >> 16 & 0x3fff == 256, "the command's number has the size");
    // SAFETY: the command's number says that it writes 256 bytes, which live here.
    let result =
        unsafe { libc::ioctl(file.as_raw_fd(), libc::Ioctl::from(command), text.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned())
}

/// An ioctl(2) that takes a number.
pub(crate) fn send_word(file: &File, command: u32, word: u32) -> io::Result<()> {
    // SAFETY: the command's number says that it reads four bytes, which live here.
    let result =
        unsafe { libc::ioctl(file.as_raw_fd(), libc::Ioctl::from(command), &raw const word) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
