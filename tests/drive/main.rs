//! `uext drive`: on uext and on the kernel's ext4, with defects planted that it must find,
//! and to every kind of end.
//!
//! `make test` runs a few clients for a second; `UEXT_DRIVE_CLIENTS` and `UEXT_KILLS` are
//! for `make drive`.

mod ends;
mod kills;
mod nbd;
mod planted;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use uext_tests::mounts::{KernelMount, UextMount};
use uext_tests::require;
use uext_tests::scratch::{Kind, Scratch, assert_clean};
use uext_tests::uext;

const EXT4: Kind = Kind { fs: "ext4", block_size: 4096 };

/// All profiles, or those of `UEXT_DRIVE_PROFILES`.
fn profiles() -> Vec<String> {
    let all = "metadata mail database build stream mixed".to_owned();
    let names = std::env::var("UEXT_DRIVE_PROFILES").unwrap_or(all);
    names.split_whitespace().map(str::to_owned).collect()
}

/// A number from the environment.
fn setting(name: &str, otherwise: usize) -> usize {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// A command of `uext drive`, its figures as JSON at its standard output.
fn drive(target: &Path, words: &str) -> Command {
    let mut command = Command::new(uext());
    command.arg("drive").arg(target).args(words.split_whitespace()).args(["--json", "-"]);
    command.stdin(Stdio::null());
    command
}

/// Runs it; its exit status, and its figures.
fn run(command: &mut Command) -> (i32, Value) {
    read(&command.output().expect("it runs"), command)
}

fn read(output: &Output, command: &Command) -> (i32, Value) {
    let figures = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    let code = output.status.code().unwrap_or_else(|| panic!("{command:?}: {}", output.status));
    if code != 0 {
        eprintln!("{command:?}: {code}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    (code, figures)
}

/// What verification by a log says: the exit status, and the kinds of what is wrong.
fn verify(target: &Path, log: &Path) -> (i32, Vec<String>) {
    let mut command = Command::new(uext());
    command.args(["drive", "verify"]).arg(target).arg("--log").arg(log).args(["--json", "-"]);
    let (code, verdict) = run(&mut command);
    let findings = verdict["findings"].as_array().cloned().unwrap_or_default();
    if code != 0 {
        eprintln!("{verdict:#}");
    }
    let kinds = findings.iter().map(|f| f["kind"].as_str().expect("a kind").to_owned());
    (code, kinds.collect())
}

/// Runs a profile; everything must be good, also when it is mounted again.
fn profile_on(mount: &Path, profile: &str, log: &Path) -> Value {
    let clients = setting("UEXT_DRIVE_CLIENTS", 8);
    let time = if clients > 100 { "20s" } else { "700ms" };
    let words = format!("--profile {profile} --clients {clients} --time {time} --verify-after ");
    let (code, figures) = run(drive(mount, &words).arg("--log").arg(log));
    assert_eq!(code, 0, "{profile}: {figures:#}");
    assert!(figures["steps"].as_u64() > Some(0), "{profile}: nothing was done");
    let seconds = figures["seconds"].as_f64().expect("seconds");
    let cpu = figures["coordinator_cpu_percent"].as_f64().expect("a percentage");
    let rate = figures["operations_per_second"].as_f64().expect("a rate");
    let verified = figures["verified_blocks"].as_u64().expect("a count")
        + figures["verification"]["blocks"].as_u64().expect("a count");
    println!(
        "{profile}: {clients} clients, {seconds:.1} s, {rate:.0} operations/s, {verified} blocks verified, coordinator {cpu:.2} %"
    );
    // A second is too short to say anything about a percentage.
    assert!(clients < 1000 || cpu < 5.0, "{profile}: the coordinator took {cpu} %");
    figures
}

fn all_profiles(scratch: &Scratch) -> (PathBuf, PathBuf) {
    let size = if setting("UEXT_DRIVE_CLIENTS", 8) > 100 { 8 << 30 } else { 512 << 20 };
    let image = scratch.mkfs("image", EXT4, size, &["-N", "400000"]);
    (image, scratch.mount_point("mnt"))
}

#[test]
fn every_profile_is_good_on_uext_and_after_a_remount() {
    require!("mke2fs", "e2fsck");
    let scratch = Scratch::new();
    let (image, dir) = all_profiles(&scratch);
    for profile in &profiles() {
        let log = scratch.path().join("log");
        let mount = UextMount::new(&image, &dir, "");
        profile_on(&dir, profile, &log);
        mount.unmount();
        let mount = UextMount::new(&image, &dir, "");
        assert_eq!(verify(&dir, &log), (0, Vec::new()), "{profile}");
        mount.unmount();
        assert_clean(&image);
    }
}

#[test]
fn every_profile_is_good_on_the_kernels_ext4() {
    require!("mke2fs", "e2fsck");
    let scratch = Scratch::new();
    let (image, dir) = all_profiles(&scratch);
    let mount = KernelMount::new(&image, &dir, "");
    for profile in &profiles() {
        let log = scratch.path().join("log");
        profile_on(&dir, profile, &log);
        assert_eq!(verify(&dir, &log), (0, Vec::new()), "{profile}");
    }
    mount.unmount();
}

/// What scripts read, and people.
#[test]
fn a_run_writes_json_and_a_page_and_repeats_by_its_seed() {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("dir");
    let page = scratch.path().join("page.html");
    let words = "--profile metadata --clients 2 --threads 2 --ops 2000 --seed 7";
    let steps = |words: &str| {
        let (code, figures) = run(drive(&dir, words).arg("--html").arg(&page));
        assert_eq!(code, 0);
        assert_eq!(figures["steps"], 2000);
        let ops = figures["ops"].as_object().expect("operations").clone();
        ops.into_iter().map(|(op, f)| (op, f["count"].as_u64())).collect::<Vec<_>>()
    };
    assert_eq!(steps(words), steps(words), "the same seed, other operations");
    let page = std::fs::read_to_string(page).expect("a page");
    assert!(page.contains("<svg") && page.contains("</html>") && !page.contains("http"), "{page}");
    assert!(!dir.join("uext-drive").exists(), "the files stay");
}

#[test]
fn a_rate_is_kept_and_threads_start_one_after_the_other() {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("dir");
    let words = "--profile metadata --clients 2 --threads 4 --time 2s --rate 400/s --ramp 500ms";
    let (code, figures) = run(&mut drive(&dir, words));
    assert_eq!(code, 0);
    let steps = figures["steps"].as_u64().expect("steps");
    assert!((400..=820).contains(&steps), "{steps} steps in 2 s at 400/s");
}

#[test]
fn a_file_is_driven_like_a_device_again_and_again() {
    let scratch = Scratch::new();
    let file = scratch.sparse("disk", 64 << 20);
    let log = scratch.path().join("log");
    for profile in ["database", "stream", "mixed"] {
        let words = format!("--profile {profile} --time 500ms --verify-after ");
        let (code, figures) = run(drive(&file, &words).arg("--log").arg(&log));
        assert_eq!(code, 0, "{profile}: {figures:#}");
        assert_eq!(verify(&file, &log), (0, Vec::new()));
    }
    let (code, _) = run(&mut drive(&file, "--profile mail --time 100ms"));
    assert_eq!(code, 1, "mail needs names");
}

/// What a run did not make is left alone, to the last byte, until it is told otherwise.
#[test]
fn what_holds_something_is_left_alone() {
    require!("mke2fs", "e2fsck");
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", EXT4, 64 << 20, &[]);
    let noise = scratch.path().join("noise");
    std::fs::write(&noise, vec![1; 64 << 20]).expect("written");
    let words = "--profile database --time 100ms";
    for target in [&image, &noise] {
        let before = std::fs::read(target).expect("read");
        let output = drive(target, words).output().expect("it runs");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains("say --destroy") && errors.lines().count() == 1, "{errors}");
        assert!(std::fs::read(target).expect("read") == before, "it was written");
    }
    // What somebody has mounted stays whatever is said.
    let dir = scratch.mount_point("mnt");
    let mount = UextMount::new(&image, &dir, "");
    let (code, _) = run(&mut drive(&image, &format!("{words} --destroy")));
    assert_eq!(code, 1);
    mount.unmount();
    assert_clean(&image);
    // And a directory that only has the name.
    let theirs = scratch.mount_point("dir/uext-drive/photos");
    let parent = scratch.path().join("dir");
    assert_eq!(run(&mut drive(&parent, words)).0, 1);
    assert!(theirs.exists(), "it was removed");
    for target in [&image, &noise] {
        let (code, _) = run(&mut drive(target, &format!("{words} --destroy")));
        assert_eq!(code, 0);
        assert_eq!(run(&mut drive(target, words)).0, 0, "what a run has made is a run's");
    }
}
