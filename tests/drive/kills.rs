//! The daemon is killed under load, again and again: what was synced is there when it is
//! mounted again, and what was never written is not. The mount that vanishes ends the run
//! with a message.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use uext_tests::mounts::UextMount;
use uext_tests::require;
use uext_tests::scratch::{Scratch, assert_clean};
use uext_tests::uext;

use crate::{EXT4, drive, read, setting, verify};

const LONG: Duration = Duration::from_secs(60);

/// A daemon in the foreground; killed when dropped, and its mount taken away.
pub(crate) struct Daemon<'a> {
    child: Child,
    dir: &'a Path,
}

fn is_mounted(dir: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mounts").expect("the mounts");
    let dir = dir.to_string_lossy();
    table.lines().any(|line| line.split(' ').nth(1) == Some(&dir))
}

impl<'a> Daemon<'a> {
    pub(crate) fn start(image: &Path, dir: &'a Path) -> Self {
        let mut command = Command::new(uext());
        command.args(["mount", "-f"]).arg(image).arg(dir);
        command.arg("--log-file").arg(image.with_extension("daemon.log"));
        // What it says is in its log too.
        command.stdin(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("the daemon");
        let daemon = Self { child, dir };
        let start = Instant::now();
        while !is_mounted(dir) {
            assert!(start.elapsed() < LONG, "no mount");
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if is_mounted(self.dir) {
            let _ = umount2(self.dir, MntFlags::MNT_DETACH);
        }
    }
}

fn kills(profile: &str) {
    let kills = setting("UEXT_KILLS", 3);
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", EXT4, 256 << 20, &[]);
    let dir = scratch.mount_point("mnt");
    let log = scratch.path().join("log");
    let seed = std::process::id();
    println!("{profile}: {kills} kills at moments by seed {seed}");
    for kill in 0..kills {
        let mut daemon = Daemon::start(&image, &dir);
        let words = format!("--profile {profile} --clients 4 --threads 2 --time 60s ");
        let mut command = drive(&dir, &words);
        command.arg("--log").arg(&log).stdout(Stdio::piped()).stderr(Stdio::piped());
        let run = command.spawn().expect("it runs");
        let moment = u64::from(seed).wrapping_mul(2 * kill as u64 + 1) % 900;
        std::thread::sleep(Duration::from_millis(500 + moment));
        daemon.child.kill().expect("killed");
        daemon.child.wait().expect("gone");
        let output = run.wait_with_output().expect("it ends");
        let (code, figures) = read(&output, &command);
        assert_eq!(code, 2, "a mount that vanished: {figures:#}");
        let text = figures["failures"][0]["text"].as_str().expect("why");
        assert!(!text.is_empty() && figures["errors"].as_object().is_some_and(|e| !e.is_empty()));
        drop(daemon);
        let mount = UextMount::new(&image, &dir, "");
        let verdict = verify(&dir, &log);
        assert_eq!(
            verdict,
            (0, Vec::new()),
            "{profile}: kill {kill} after {moment} ms, seed {seed}"
        );
        mount.unmount();
        assert_clean(&image);
    }
}

#[test]
fn mail_that_was_synced_survives_the_daemon() {
    require!("mke2fs", "e2fsck");
    kills("mail");
}

#[test]
fn pages_that_were_synced_survive_the_daemon() {
    require!("mke2fs", "e2fsck");
    kills("database");
}
