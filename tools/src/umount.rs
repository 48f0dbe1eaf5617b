//! `uext umount`: unmounts and returns when the image is clean.
//!
//! umount(2) of a fuseblk mount waits by itself; of a plain fuse mount it does not,
//! and this waits for the daemon either way, so that the image may be used by
//! somebody else right after.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use uext_fuse::mount_table::{self, MountEntry};

use crate::state::MountWaiter;

/// How to unmount.
#[derive(Clone, Copy, Debug, Default)]
pub struct UmountOptions {
    /// Detach now, unmount when nobody uses it any more; does not wait.
    pub lazy: bool,
    /// Abort the connection: who uses the mount gets errors.
    pub force: bool,
}

/// Unmounts `target`, a mount point or what is mounted, and waits.
///
/// # Errors
/// One line.
pub fn umount(target: &Path, options: UmountOptions) -> Result<(), String> {
    let mount = find(target)?;
    let dir = mount.mount_point.clone();
    let named = |problem: &str| format!("{}: {problem}", dir.display());
    // Before the unmount: the file goes with the daemon.
    let waiter = MountWaiter::find(&mount, mount.user);
    let loop_device = OwnLoop::under(&mount);
    if nix::unistd::geteuid().is_root() {
        let mut flags = MntFlags::empty();
        flags.set(MntFlags::MNT_DETACH, options.lazy);
        flags.set(MntFlags::MNT_FORCE, options.force);
        match umount2(&dir, flags) {
            Ok(()) => {}
            // A forced umount has aborted the connection even when the mount is busy; its
            // daemon takes it away.
            Err(nix::Error::EBUSY) if options.force => {}
            Err(nix::Error::EBUSY) => return Err(named("target is busy")),
            Err(errno) => return Err(named(errno.desc())),
        }
    } else {
        fusermount(&dir, options)?;
    }
    if options.lazy && !options.force {
        return Ok(());
    }
    // Another mount of the filesystem keeps it going.
    let still = mount_table::mounts().unwrap_or_default();
    if mount.device != (0, 0) && !options.force && still.iter().any(|m| m.device == mount.device) {
        return Ok(());
    }
    let unmounted = match waiter {
        Some(waiter) => waiter.wait().map_err(|problem| named(&problem)),
        None if mount.fstype.starts_with("fuseblk") => Ok(()),
        None => {
            Err(named("unmounted, but its daemon cannot be found: the image may still be written"))
        }
    };
    if let Some(loop_device) = loop_device {
        loop_device.wait();
    }
    unmounted
}

/// The loop device that the daemon put over an image. It goes with its last user, who may be
/// somebody just looking at it; until then mount(8) takes it for one to use again, and fails.
struct OwnLoop {
    backing: PathBuf,
    image: Vec<u8>,
}

impl OwnLoop {
    /// Longest wait for who looks at it.
    const PATIENCE: Duration = Duration::from_secs(2);

    /// One that goes by itself: what the user set up with losetup stays.
    fn under(mount: &MountEntry) -> Option<Self> {
        let name = Path::new(&mount.source).strip_prefix("/dev").ok()?;
        let state = Path::new("/sys/block").join(name).join("loop");
        let goes = fs::read_to_string(state.join("autoclear")).ok()?.trim() == "1";
        let backing = state.join("backing_file");
        let image = fs::read(&backing).ok()?;
        goes.then_some(Self { backing, image })
    }

    /// Waits until it is free, or over another image.
    fn wait(&self) {
        let begin = Instant::now();
        while begin.elapsed() < Self::PATIENCE
            && fs::read(&self.backing).is_ok_and(|image| image == self.image)
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The mount that is meant: a mount point, or the source of one mount.
fn find(target: &Path) -> Result<MountEntry, String> {
    let problem = |what: &dyn std::fmt::Display| format!("{}: {what}", target.display());
    let mounts = mount_table::mounts().map_err(|error| problem(&error))?;
    // The mount point of a dead daemon cannot be looked at, only its parent.
    let dir = canonical_mount_point(target);
    // fuser, used as root, does not tell the kernel its subtype.
    let ours = |mount: &&MountEntry| {
        let fuse = mount.fstype.starts_with("fuse");
        let named = mount.fstype.ends_with(".uext");
        fuse && (named || MountWaiter::find(mount, mount.user).is_some())
    };
    if let Some(mount) = mounts.iter().rfind(|mount| mount.mount_point == dir) {
        return if ours(&mount) {
            Ok(mount.clone())
        } else {
            Err(problem(&format_args!("is mounted as {}, not by uext", mount.fstype)))
        };
    }
    let mut by_source = mounts.iter().filter(ours).filter(|mount| mount.source == dir.as_os_str());
    match (by_source.next(), by_source.next()) {
        (Some(mount), None) => Ok(mount.clone()),
        (Some(_), Some(_)) => Err(problem(&"is mounted more than once: name the mount point")),
        (None, _) => Err(problem(&"not mounted")),
    }
}

fn canonical_mount_point(target: &Path) -> PathBuf {
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
    let by_parent = target.file_name().and_then(|name| {
        let parent = parent.unwrap_or(Path::new(".")).canonicalize().ok()?;
        Some(parent.join(name))
    });
    target.canonicalize().ok().or(by_parent).unwrap_or_else(|| target.to_owned())
}

fn fusermount(dir: &Path, options: UmountOptions) -> Result<(), String> {
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if options.lazy || options.force {
        command.arg("-z");
    }
    let output = command.arg("--").arg(dir).output();
    let output = output.map_err(|error| format!("fusermount3: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}
