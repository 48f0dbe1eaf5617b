//! NBD exports, by three servers: driven and verified like a device, damaged underneath,
//! failing, going away, and refusing.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use uext_tests::require;
use uext_tests::scratch::Scratch;

use crate::ends::Run;
use crate::{drive, run, verify};

const BYTES: u64 = 64 << 20;

/// A server in the foreground, killed when dropped.
struct Server {
    child: Child,
    address: PathBuf,
}

impl Server {
    /// Starts one that listens at a socket in a scratch directory.
    fn start(scratch: &Scratch, command: &mut Command, export: &str) -> Self {
        let socket = scratch.path().join("socket");
        let child = command.stdin(Stdio::null()).spawn().expect("a server");
        let address = format!("nbd+unix:///{export}?socket={}", socket.display());
        let server = Self { child, address: address.into() };
        let start = Instant::now();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(start.elapsed() < Duration::from_secs(30), "{command:?} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    fn nbdkit(scratch: &Scratch, words: &str) -> Self {
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "--unix"]);
        command.arg(scratch.path().join("socket")).args(words.split_whitespace());
        Self::start(scratch, &mut command, "")
    }

    fn qemu(scratch: &Scratch, disk: &Path) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=20", "--format=raw", "--export-name=a disk"]);
        command.arg("--socket").arg(scratch.path().join("socket")).arg(disk);
        Self::start(scratch, &mut command, "a%20disk")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn every_profile(server: &Server, scratch: &Scratch) {
    let log = scratch.path().join("log");
    for profile in ["database", "stream", "mixed"] {
        let words = format!("--profile {profile} --time 500ms --verify-after ");
        let (code, figures) = run(drive(&server.address, &words).arg("--log").arg(&log));
        assert_eq!(code, 0, "{profile}: {figures:#}");
        assert!(figures["verified_blocks"].as_u64() > Some(0), "{profile}: nothing was read");
        assert_eq!(verify(&server.address, &log), (0, Vec::new()), "{profile}");
    }
}

#[test]
fn an_export_of_nbdkit_is_driven_like_a_device() {
    require!("nbdkit");
    let scratch = Scratch::new();
    every_profile(&Server::nbdkit(&scratch, "memory 64M"), &scratch);
}

/// Its disk is read beside it, and damaged.
#[test]
fn an_export_of_qemu_is_driven_and_damage_to_its_disk_is_found() {
    require!("qemu-nbd");
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk", BYTES);
    let log = scratch.path().join("log");
    let server = Server::qemu(&scratch, &disk);
    every_profile(&server, &scratch);
    let (code, _) =
        run(drive(&server.address, "--profile database --ops 2000").arg("--log").arg(&log));
    assert_eq!(code, 0);
    assert_eq!(verify(&server.address, &log), (0, Vec::new()));
    drop(server);
    // The same log judges the disk without a server.
    assert_eq!(verify(&disk, &log), (0, Vec::new()));
    let file = OpenOptions::new().write(true).open(&disk).expect("the disk");
    file.write_all_at(&[0x5a; 8], 8192 * 3 + 600).expect("written");
    let server = Server::qemu(&scratch, &disk);
    assert_eq!(verify(&server.address, &log), (3, vec!["torn block".to_owned()]));
}

/// Each thread has a connection of its own: more of them than requests wait on one.
#[test]
fn many_clients_have_a_connection_each() {
    require!("nbdkit");
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, "memory 64M");
    let words = "--profile database --clients 50 --threads 2 --time 1s --verify-after";
    let (code, figures) = run(&mut drive(&server.address, words));
    assert_eq!(code, 0, "{figures:#}");
}

#[test]
fn a_server_that_fails_ends_the_run_with_its_error() {
    require!("nbdkit");
    for (error, said) in [("EIO", "Input/output error"), ("ENOSPC", "No space left")] {
        let scratch = Scratch::new();
        let trigger = scratch.path().join("trigger");
        let words = format!(
            "--filter=error memory 64M error={error} error-pwrite-rate=100% error-file={}",
            trigger.display()
        );
        let server = Server::nbdkit(&scratch, &words);
        let run = Run::start(&server.address, "--profile database --clients 4 --time 60s");
        run.clients(4);
        std::thread::sleep(Duration::from_millis(500));
        File::create(&trigger).expect("made");
        let (code, figures, errors) = run.end();
        assert_eq!((code, figures["status"].as_str()), (2, Some("failed")), "{figures:#}");
        assert!(figures["errors"][error].as_u64() > Some(0), "{figures:#}");
        assert!(errors.contains(said) && errors.contains("the run ends"), "{errors}");
    }
}

#[test]
fn a_server_that_goes_away_ends_the_run() {
    require!("nbdkit");
    let scratch = Scratch::new();
    let mut server = Server::nbdkit(&scratch, "memory 64M");
    let run = Run::start(&server.address, "--profile mixed --clients 4 --time 60s");
    run.clients(4);
    std::thread::sleep(Duration::from_millis(500));
    server.child.kill().expect("killed");
    let (code, figures, errors) = run.end();
    assert_eq!((code, figures["status"].as_str()), (2, Some("failed")), "{figures:#}");
    assert!(errors.contains("the run ends"), "{errors}");
}

#[test]
fn what_an_export_can_not_do_is_said_in_a_line() {
    require!("nbdkit", "qemu-nbd");
    let says = |address: &Path, words: &str, text: &str| {
        let output = drive(address, words).output().expect("it runs");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains(text) && errors.lines().count() == 1, "{errors}");
    };
    let scratch = Scratch::new();
    let socket = scratch.path().join("socket");
    let other = |export: &str| format!("nbd+unix:///{export}?socket={}", socket.display()).into();
    let other = |export: &str| -> PathBuf { other(export) };
    says(&other(""), "", "No such file");
    {
        let server = Server::nbdkit(&scratch, "--readonly memory 64M");
        says(&server.address, "", "read-only");
    }
    std::fs::remove_file(&socket).expect("it was");
    {
        let server = Server::nbdkit(&scratch, "memory 64M");
        says(&server.address, "--profile mail", "needs a directory");
    }
    std::fs::remove_file(&socket).expect("it was");
    let disk = scratch.sparse("disk", BYTES);
    let file = OpenOptions::new().write(true).open(&disk).expect("the disk");
    file.write_all_at(b"somebody's", 1024).expect("written");
    let server = Server::qemu(&scratch, &disk);
    says(&other("another"), "", "no export");
    says(&server.address, "--profile database", "--destroy");
    let words = "--profile database --time 200ms --destroy";
    assert_eq!(run(&mut drive(&server.address, words)).0, 0);
}
