//! Mounts by the kernel's ext4 and by uext, released when dropped.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use crate::{run, uext};

/// What an unmount came to. A process that another test is just starting has this one's open
/// files until its exec, so a mount that is busy is tried again for a while.
pub fn try_unmount(command: &mut Command) -> Output {
    const TRIES: usize = 200;
    for _ in 1..TRIES {
        let output = command.output().expect("run the program");
        if output.status.success() || !String::from_utf8_lossy(&output.stderr).contains("busy") {
            return output;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    command.output().expect("run the program")
}

/// [`try_unmount`] that succeeds.
#[track_caller]
pub fn unmount(command: &mut Command) {
    let output = try_unmount(command);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
}

/// An image mounted by the kernel over a loop device.
pub struct KernelMount {
    dir: PathBuf,
}

impl KernelMount {
    /// Mounts `image` on `dir`.
    #[track_caller]
    pub fn new(image: &Path, dir: &Path, options: &str) -> Self {
        let options = format!("loop,{options}");
        run(Command::new("mount")
            .args(["-t", "ext4", "-o"])
            .arg(options.trim_end_matches(','))
            .arg(image)
            .arg(dir));
        Self { dir: dir.to_owned() }
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Unmounts; panics when that fails.
    #[track_caller]
    pub fn unmount(self) {
        unmount(Command::new("umount").arg(&self.dir));
        std::mem::forget(self);
    }
}

impl Drop for KernelMount {
    fn drop(&mut self) {
        // Only after a failed assertion: what can be released is.
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
    }
}

/// An image mounted by uext.
pub struct UextMount {
    dir: PathBuf,
    log: PathBuf,
}

impl UextMount {
    /// Mounts `image` on `dir`.
    #[track_caller]
    pub fn new(image: &Path, dir: &Path, options: &str) -> Self {
        let log = image.with_extension("uext.log");
        let mut mount = Command::new(uext());
        mount.arg("mount").arg(image).arg(dir).arg("--log-file").arg(&log);
        if !options.is_empty() {
            mount.args(["-o", options]);
        }
        if let Ok(transport) = std::env::var("UEXT_TEST_TRANSPORT") {
            mount.args(["-o", &format!("transport={transport}")]);
        }
        run(&mut mount);
        Self { dir: dir.to_owned(), log }
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The daemon's process.
    pub fn daemon(&self) -> u32 {
        use std::os::unix::fs::MetadataExt;
        let device = std::fs::metadata(&self.dir).expect("the mount").dev();
        let state = format!("/run/uext/{}:{}", libc::major(device), libc::minor(device));
        let state = std::fs::read_to_string(state).expect("the daemon's state");
        let pid = state.lines().find_map(|line| line.strip_prefix("pid ")).expect("its number");
        pid.parse().expect("a number")
    }

    /// What the daemon logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Unmounts and waits until the image is clean; panics when that fails.
    #[track_caller]
    pub fn unmount(self) {
        unmount(Command::new(uext()).arg("umount").arg(&self.dir));
        std::mem::forget(self);
    }
}

impl Drop for UextMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
        eprintln!("daemon's log:\n{}", self.log());
    }
}
