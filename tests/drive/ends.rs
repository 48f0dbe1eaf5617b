//! How a run can end: Ctrl-C, clients that are killed, a full disk. (The mount that
//! vanishes is in `kills`.)

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use uext_tests::mounts::{KernelMount, UextMount};
use uext_tests::require;
use uext_tests::scratch::Scratch;

use crate::{EXT4, drive, read, run};

/// A run in the background.
struct Run {
    command: Command,
    child: Option<Child>,
}

impl Run {
    fn start(target: &Path, words: &str) -> Self {
        let mut command = drive(target, words);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = Some(command.spawn().expect("it runs"));
        Self { command, child }
    }

    fn pid(&self) -> Pid {
        // A process number.
        Pid::from_raw(self.child.as_ref().expect("running").id() as i32)
    }

    /// Its clients, when there are so many.
    fn clients(&self, count: usize) -> Vec<Pid> {
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

    fn end(mut self) -> (i32, Value, String) {
        let output = self.child.take().expect("running").wait_with_output().expect("it ends");
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

fn full_disk(dir: &Path) {
    let run = Run::start(dir, "--profile mail --clients 3 --time 60s");
    run.clients(3);
    pause();
    // All that is left.
    let mut filler = std::fs::File::create(dir.join("filler")).expect("made");
    while std::io::Write::write_all(&mut filler, &[7; 64 << 10]).is_ok() {}
    let (code, figures, _) = run.end();
    assert_eq!(code, 2, "{figures:#}");
    assert_eq!(figures["status"], "failed");
    assert!(figures["errors"]["ENOSPC"].as_u64() > Some(0), "{figures:#}");
    let text = figures["failures"][0]["text"].as_str().expect("why");
    assert!(text.contains("No space left"), "{text}");
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
            full_disk(&dir);
            mount.unmount();
        } else {
            let mount = UextMount::new(&image, &dir, "");
            full_disk(&dir);
            mount.unmount();
        }
    }
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
