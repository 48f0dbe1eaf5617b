//! How a run can end: Ctrl-C, clients that are killed or stopped, a full disk, one that
//! fails. (The mount that vanishes is in `kills`, the server in `nbd`.)
//!
//! The story behind the limit in [`Run::end`]: a run on a full tmpfs once did not end for
//! minutes. Whatever happens to whom, an end may take what [`LONG`] says.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use uext_tests::mounts::{KernelMount, UextMount};
use uext_tests::require;
use uext_tests::scratch::Scratch;

use crate::kills::Daemon;
use crate::{EXT4, drive, read, run};

/// Longest end of a run: clients have a minute.
const LONG: Duration = Duration::from_secs(100);

/// A run in the background.
pub(crate) struct Run {
    command: Command,
    child: Option<Child>,
}

impl Run {
    pub(crate) fn start(target: &Path, words: &str) -> Self {
        let mut command = drive(target, words);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = Some(command.spawn().expect("it runs"));
        Self { command, child }
    }

    fn pid_of(&self, child: &Child) -> Pid {
        // A process number.
        Pid::from_raw(child.id() as i32)
    }

    fn pid(&self) -> Pid {
        self.pid_of(self.child.as_ref().expect("running"))
    }

    /// Its clients, when there are so many.
    pub(crate) fn clients(&self, count: usize) -> Vec<Pid> {
        let start = Instant::now();
        loop {
            let pid = self.pid();
            let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            let list = list.expect("its children");
            if list.split(' ').filter(|word| !word.is_empty()).count() == count {
                let numbers = list.split_whitespace().map(|word| word.parse().expect("a number"));
                return numbers.map(Pid::from_raw).collect();
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{list} are not {count}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end: the exit status, the figures, and what it said.
    pub(crate) fn end(mut self) -> (i32, Value, String) {
        let child = self.child.take().expect("running");
        // Who waits for the output would not see that it hangs.
        let pid = self.pid_of(&child);
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let watch = std::thread::spawn(move || {
            if told.recv_timeout(LONG) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = kill(pid, Signal::SIGKILL);
                return false;
            }
            true
        });
        let output = child.wait_with_output().expect("it ends");
        let _ = tell.send(());
        assert!(watch.join().expect("watched"), "{:?} hung", self.command);
        let (code, figures) = read(&output, &self.command);
        (code, figures, String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn pause() {
    std::thread::sleep(Duration::from_millis(800));
}

#[test]
fn ctrl_c_ends_it_at_once_with_a_report() {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("dir");
    let run = Run::start(&dir, "--profile mixed --clients 3 --time 300s");
    run.clients(3);
    pause();
    let start = Instant::now();
    kill(run.pid(), Signal::SIGINT).expect("sent");
    let (code, figures, _) = run.end();
    assert_eq!(code, 130);
    assert!(start.elapsed() < Duration::from_secs(30));
    assert_eq!(figures["status"], "interrupted");
    assert!(
        figures["operations"].as_u64() > Some(0) && figures["verified_blocks"].as_u64() > Some(0)
    );
    assert!(!dir.join("uext-drive").exists(), "the files stay");
}

#[test]
fn killed_clients_are_reported_and_the_others_go_on() {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("dir");
    // Clients share files, and so mutexes; builds meet at a barrier.
    for profile in ["database", "build"] {
        let words = format!("--profile {profile} --clients 8 --time 3s --verify-after");
        let run = Run::start(&dir, &words);
        let clients = run.clients(8);
        pause();
        for victim in &clients[..3] {
            kill(*victim, Signal::SIGKILL).expect("killed");
        }
        let (code, figures, errors) = run.end();
        assert_eq!(code, 2, "{profile}: {figures:#}");
        assert_eq!(figures["status"], "clients lost");
        let killed = figures["killed"].as_array().expect("a list");
        assert_eq!(killed.len(), 3, "{profile}: {killed:?}");
        assert!(errors.contains("SIGKILL"), "{errors}");
        let intervals = figures["intervals"].as_array().expect("intervals");
        let late = &intervals[intervals.len() - 2];
        assert!(
            !late["ops"].as_object().expect("operations").is_empty(),
            "{profile}: all stood still"
        );
    }
}

/// What a client had begun to write when it was killed is nobody's mistake. (A file that was
/// just being made longer once was "wrong size" and "unknown write".)
#[test]
fn clients_killed_in_the_middle_of_a_write_leave_nothing_wrong() {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("dir");
    for kill_after in [1, 15, 40, 90, 160, 250] {
        let run = Run::start(&dir, "--profile stream --clients 2 --time 600ms --verify-after");
        let clients = run.clients(2);
        std::thread::sleep(Duration::from_millis(kill_after));
        kill(clients[0], Signal::SIGKILL).expect("killed");
        let (code, figures, _) = run.end();
        assert_eq!(code, 2, "after {kill_after} ms: {figures:#}");
    }
}

/// Takes all that is left, and whatever becomes free, until the run has ended.
fn fill_until_it_ends(dir: &Path, run: &mut Run) {
    use std::io::Write as _;
    let mut filler = std::fs::File::create(dir.join("filler")).expect("made");
    let start = Instant::now();
    while run.child.as_mut().expect("running").try_wait().expect("looked").is_none() {
        while filler.write_all(&[7; 64 << 10]).is_ok() {}
        while filler.write_all(&[7; 512]).is_ok() {}
        std::thread::sleep(Duration::from_millis(2));
        // `end` says that it hangs.
        if start.elapsed() > LONG {
            return;
        }
    }
}

fn full_disk(dir: &Path, profile: &str) {
    let mut run = Run::start(dir, &format!("--profile {profile} --clients 3 --time 60s"));
    run.clients(3);
    pause();
    fill_until_it_ends(dir, &mut run);
    let (code, figures, errors) = run.end();
    assert_eq!(code, 2, "{figures:#}");
    assert_eq!(figures["status"], "failed");
    assert!(figures["errors"]["ENOSPC"].as_u64() > Some(0), "{figures:#}");
    let text = figures["failures"][0]["text"].as_str().expect("why");
    assert!(text.contains("No space left") && errors.contains("the run ends"), "{text}\n{errors}");
    std::fs::remove_file(dir.join("filler")).expect("removed");
}

#[test]
fn a_full_disk_ends_it_with_a_message() {
    require!("mke2fs");
    let scratch = Scratch::new();
    for (name, kernel) in [("uext", false), ("kernel", true)] {
        let image = scratch.mkfs(name, EXT4, 32 << 20, &["-m", "0"]);
        let dir = scratch.mount_point(&format!("{name}-mnt"));
        if kernel {
            let mount = KernelMount::new(&image, &dir, "");
            full_disk(&dir, "mail");
            mount.unmount();
        } else {
            let mount = UextMount::new(&image, &dir, "");
            full_disk(&dir, "mail");
            mount.unmount();
        }
    }
}

/// A tmpfs, unmounted when dropped.
struct Tmpfs(std::path::PathBuf);

impl Tmpfs {
    fn new(dir: std::path::PathBuf, options: &str) -> Self {
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("uext-drive"), &dir, Some("tmpfs"), flags, Some(options))
            .expect("a tmpfs");
        Self(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Every profile that asks for space, by every way: of mappings too.
#[test]
fn a_full_tmpfs_ends_every_profile_that_asks_for_space() {
    require!();
    let scratch = Scratch::new();
    let tmpfs = Tmpfs::new(scratch.mount_point("tmpfs"), "size=24m");
    for profile in ["metadata", "mail", "build", "mixed"] {
        full_disk(&tmpfs.0, profile);
    }
}

/// The disk below the filesystem fails: an image on a tmpfs that is full. uext gives its
/// journal up, the kernel's ext4 too; what the clients see is an error of some kind.
#[test]
fn a_disk_that_fails_ends_it_with_a_message() {
    require!("mke2fs");
    for kernel in [false, true] {
        let scratch = Scratch::new();
        let store = Tmpfs::new(scratch.mount_point("store"), "size=40m");
        let sparse = scratch.mkfs("image", EXT4, 256 << 20, &[]);
        let image = store.0.join("image");
        uext_tests::run(Command::new("cp").arg("--sparse=always").arg(&sparse).arg(&image));
        let dir = scratch.mount_point("mnt");
        let daemon = (!kernel).then(|| Daemon::start(&image, &dir));
        let mount = kernel.then(|| KernelMount::new(&image, &dir, ""));
        // It wants more than the tmpfs has.
        let run = Run::start(&dir, "--profile mail --clients 60 --time 120s");
        let (code, figures, errors) = run.end();
        assert_eq!(code, 2, "{figures:#}");
        assert_eq!(figures["status"], "failed");
        let names = figures["errors"].as_object().expect("errors");
        let expected = ["EIO", "EROFS", "ENOSPC"];
        assert!(names.keys().any(|name| expected.contains(&name.as_str())), "{names:?}");
        assert!(errors.contains("the run ends"), "{errors}");
        drop((mount, daemon));
    }
}

/// A client that can't go on (here: stopped) is killed in the end, and does not keep the
/// run from ending.
#[test]
fn a_client_that_hangs_is_killed() {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("dir");
    let run = Run::start(&dir, "--profile mail --clients 3 --time 2s");
    let clients = run.clients(3);
    pause();
    kill(clients[1], Signal::SIGSTOP).expect("stopped");
    pause();
    // Twice: at once.
    kill(run.pid(), Signal::SIGINT).expect("sent");
    pause();
    kill(run.pid(), Signal::SIGINT).expect("sent");
    let (code, figures, errors) = run.end();
    assert_eq!(code, 2, "{figures:#}");
    assert_eq!(figures["status"], "clients lost");
    assert!(errors.contains("was killed"), "{errors}");
}

#[test]
fn what_can_not_be_run_is_said_in_a_line() {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("dir");
    for words in [
        "--profile nail",
        "--clients 20000 --threads 1024",
        "--workload /nonexistent",
        "--time 5parsecs",
    ] {
        let (code, _) = run(&mut drive(&dir, words));
        assert_eq!(code, 1, "{words}");
    }
    let missing = scratch.path().join("missing");
    assert_eq!(run(&mut drive(&missing, "")).0, 1);
    std::fs::write(scratch.path().join("log"), "no log").expect("written");
    assert_eq!(crate::verify(&dir, &scratch.path().join("log")).0, 1);
}
