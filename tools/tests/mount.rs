//! The daemon's life as the shell sees it, around the filesystem in memory.
#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use uext_fuse::mount_table::{self, MountEntry};

/// An image and a directory to mount it on.
struct Bench {
    scratch: tempfile::TempDir,
}

impl Bench {
    /// `None`, loudly, where nothing can be mounted.
    fn new() -> Option<Self> {
        if !nix::unistd::getuid().is_root() || !Path::new("/dev/fuse").exists() {
            {
                use std::io::Write as _;
                let _ = writeln!(std::io::stderr(), "SKIPPED: mounting needs root and /dev/fuse");
            }
            return None;
        }
        let scratch = tempfile::tempdir().unwrap();
        File::create(scratch.path().join("image")).unwrap().set_len(1 << 20).unwrap();
        fs::create_dir(scratch.path().join("mount")).unwrap();
        Some(Self { scratch })
    }

    fn image(&self) -> PathBuf {
        self.scratch.path().join("image")
    }

    fn dir(&self) -> PathBuf {
        self.scratch.path().join("mount")
    }

    fn run(args: &[&Path]) -> Output {
        // The example lies beside the test's directory.
        let exe = std::env::current_exe().unwrap();
        let example = exe.ancestors().nth(2).unwrap().join("examples/mount-null");
        Command::new("timeout").arg("30").arg(example).args(args).output().unwrap()
    }

    fn mount(&self, options: &str) -> Output {
        let options = match std::env::var("UEXT_TEST_TRANSPORT") {
            Ok(transport) => format!("{options},transport={transport}"),
            Err(_) => options.to_owned(),
        };
        let words: [&Path; 4] =
            [Path::new("mount"), &self.image(), &self.dir(), Path::new(&options)];
        Self::run(&words)
    }

    fn umount(&self) -> Output {
        Self::run(&[Path::new("umount"), &self.dir()])
    }

    fn entry(&self) -> Option<MountEntry> {
        mount_table::mount_at(&self.dir()).unwrap()
    }

    fn daemon(&self) -> nix::unistd::Pid {
        let device = self.entry().unwrap().device;
        let state = fs::read_to_string(format!("/run/uext/{}:{}", device.0, device.1)).unwrap();
        let pid = state.lines().find_map(|line| line.strip_prefix("pid ")).unwrap();
        nix::unistd::Pid::from_raw(pid.parse().unwrap())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        while self.entry().is_some() {
            let flags = nix::mount::MntFlags::MNT_FORCE | nix::mount::MntFlags::MNT_DETACH;
            if nix::mount::umount2(&self.dir(), flags).is_err() {
                break;
            }
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_mount_is_live_when_the_program_returns_and_its_warnings_are_shown() {
    let Some(bench) = Bench::new() else { return };
    let output = bench.mount("rw,noatime");
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(said(&output), "uext: everything will be lost\n");
    assert_eq!(bench.entry().unwrap().fstype, "fuseblk.uext");
    fs::write(bench.dir().join("file"), "data").unwrap();
    let output = bench.umount();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(bench.entry(), None);
}

#[test]
fn a_mount_that_fails_says_why_in_one_line() {
    let Some(bench) = Bench::new() else { return };
    for (options, reason) in [
        ("cache_size=1", "no filesystem found"),
        ("nonsense", "option nonsense: unknown"),
        ("context=notalabel", "context"),
    ] {
        let output = bench.mount(options);
        assert_eq!(output.status.code(), Some(32));
        let said = said(&output);
        assert!(said.contains(reason) && said.lines().count() == 1, "{options}: {said}");
        assert_eq!(bench.entry(), None);
    }
}

#[test]
fn a_second_mount_of_an_image_is_refused() {
    let Some(bench) = Bench::new() else { return };
    assert!(bench.mount("rw").status.success());
    let output = bench.mount("rw");
    assert_eq!(output.status.code(), Some(32));
    assert!(said(&output).contains("in use"), "{}", said(&output));
}

#[test]
fn an_image_can_be_mounted_again_as_soon_as_umount_has_returned() {
    let Some(bench) = Bench::new() else { return };
    for round in 0..20 {
        let output = bench.mount("rw");
        assert!(output.status.success(), "round {round}: {}", said(&output));
        // umount(2) itself, which knows nothing of the daemon.
        nix::mount::umount(&bench.dir()).unwrap();
    }
}

#[test]
fn a_portable_mount_is_waited_for() {
    let Some(bench) = Bench::new() else { return };
    for _ in 0..5 {
        let output = bench.mount("rw,portable");
        assert!(output.status.success(), "{}", said(&output));
        fs::write(bench.dir().join("file"), "data").unwrap();
        let output = bench.umount();
        assert!(output.status.success(), "{}", said(&output));
    }
}

#[test]
fn sigterm_unmounts() {
    let Some(bench) = Bench::new() else { return };
    for options in ["rw", "rw,portable"] {
        assert!(bench.mount(options).status.success());
        let daemon = bench.daemon();
        nix::sys::signal::kill(daemon, nix::sys::signal::SIGTERM).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while bench.entry().is_some() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn an_unmount_whose_daemon_died_is_an_error() {
    let Some(bench) = Bench::new() else { return };
    assert!(bench.mount("rw").status.success());
    nix::sys::signal::kill(bench.daemon(), nix::sys::signal::SIGKILL).unwrap();
    let output = bench.umount();
    assert_eq!(output.status.code(), Some(32));
    assert!(said(&output).contains("the daemon died"), "{}", said(&output));
    assert_eq!(bench.entry(), None);
}

#[test]
fn an_image_that_may_not_be_written_is_mounted_read_only() {
    let Some(bench) = Bench::new() else { return };
    let device = Command::new("losetup").args(["-f", "--show", "-r"]).arg(bench.image()).output();
    let device = String::from_utf8(device.unwrap().stdout).unwrap();
    let device = Path::new(device.trim());
    let mount =
        |options: &str| Bench::run(&[Path::new("mount"), device, &bench.dir(), Path::new(options)]);
    let (refused, mounted) = (mount("rw"), mount("defaults"));
    let entry = bench.entry();
    let unmounted = bench.umount();
    Command::new("losetup").arg("-d").arg(device).status().unwrap();
    assert_eq!(refused.status.code(), Some(32));
    assert!(mounted.status.success(), "{}", said(&mounted));
    assert!(said(&mounted).contains("read-only"), "{}", said(&mounted));
    assert_eq!(entry.unwrap().source, device.as_os_str());
    assert!(unmounted.status.success(), "{}", said(&unmounted));
}

/// A mount(8) right after the unmount found the loop device still over the image, because
/// somebody was looking at it, and failed.
#[test]
fn after_an_unmount_no_loop_device_is_over_the_image() {
    let Some(bench) = Bench::new() else { return };
    assert!(bench.mount("rw").status.success());
    let device = bench.entry().unwrap().source;
    let name = Path::new(&device).file_name().unwrap();
    let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
    let image = fs::read(&backing).unwrap();
    let looking = File::open(&device).unwrap();
    let looker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        drop(looking);
    });
    let unmounted = bench.umount();
    // By now somebody else may have taken the device.
    let after = fs::read(&backing).ok();
    looker.join().unwrap();
    assert!(unmounted.status.success(), "{}", said(&unmounted));
    assert_ne!(after, Some(image));
}
