//! Real programs on a uext mount: git, sqlite, cargo, fsx, parallel load, mmap.
//!
//! Each test has an image of its own; at its end the mount is taken down and
//! `e2fsck -fn` must find nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

use uext_tests::mounts::UextMount;
use uext_tests::run;
use uext_tests::scratch::{Kind, Scratch, assert_clean};

mod builds;
mod fstab;
mod fsx;
mod git;
mod huge;
mod mmap;
mod ordinary_user;
mod sqlite;
mod stress;

/// What nearly everybody has.
const EXT4: Kind = Kind { fs: "ext4", block_size: 4096 };

/// One image, mounted.
struct Mounted {
    // First, so that it is unmounted before the directory goes.
    mount: Option<UextMount>,
    image: PathBuf,
    dir: PathBuf,
    options: &'static str,
    scratch: Scratch,
}

impl Mounted {
    fn new(kind: Kind, mib: u64) -> Self {
        Self::with_options(kind, mib, "")
    }

    fn with_options(kind: Kind, mib: u64, options: &'static str) -> Self {
        let scratch = Scratch::new();
        let image = scratch.mkfs("image", kind, mib << 20, &[]);
        let dir = scratch.mount_point("mount");
        let mount = Some(UextMount::new(&image, &dir, options));
        Self { mount, image, dir, options, scratch }
    }

    fn path(&self) -> &Path {
        &self.dir
    }

    /// A directory outside the mount.
    fn outside(&self) -> &Path {
        self.scratch.path()
    }

    /// Unmounts, checks, and mounts again.
    fn check_and_remount(&mut self) {
        self.unmount();
        self.mount = Some(UextMount::new(&self.image, &self.dir, self.options));
    }

    fn unmount(&mut self) {
        let mount = self.mount.take().expect("it is mounted");
        mount.unmount();
        let log = std::fs::read_to_string(self.image.with_extension("uext.log"));
        let log = log.expect("the daemon's log");
        assert!(!log.contains("panicked"), "the daemon panicked:\n{log}");
        assert_clean(&self.image);
    }

    /// Unmounts and checks.
    fn finish(mut self) {
        self.unmount();
    }
}

/// A command that is stopped when it hangs.
fn limited(seconds: u32, program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", &seconds.to_string(), program]);
    command
}

/// The workspace this test is of.
fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the workspace")
}

/// Runs git in a directory, without what the user has configured.
fn run_git(dir: &Path, args: &[&str]) -> String {
    let mut git = limited(120, "git");
    git.current_dir(dir).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    git.args(["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "safe.directory=*"]);
    run(git.args(args))
}
