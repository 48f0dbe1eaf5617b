//! A journal on a device of its own, between the kernel, e2fsck and uext.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use uext_tests::mounts::UextMount;
use uext_tests::scratch::Scratch;
use uext_tests::tree::{Size, assert_same, fill, listing};
use uext_tests::{require, run, sh, uext};

/// A loop device; detached when dropped.
struct Loop(String);

impl Loop {
    fn new(image: &Path) -> Self {
        let mut attach = Command::new("losetup");
        Self(run(attach.args(["--show", "-f"]).arg(image)).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// The kernel's mount of a filesystem and its journal.
struct Kernel<'a> {
    dir: &'a Path,
    // Detached after the unmount, in this order.
    _devices: (Loop, Loop),
}

impl<'a> Kernel<'a> {
    fn new(image: &Path, journal: &Path, dir: &'a Path) -> Self {
        let devices = (Loop::new(image), Loop::new(journal));
        let options = format!("journal_path={}", devices.1.0);
        run(Command::new("mount").args(["-t", "ext4", "-o", &options, &devices.0.0]).arg(dir));
        Self { dir, _devices: devices }
    }
}

impl Drop for Kernel<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.dir).status();
    }
}

fn e2fsck(image: &Path, journal: &Path, how: &str) -> (Option<i32>, String) {
    let mut e2fsck = Command::new("e2fsck");
    let output = e2fsck.args([how, "-j"]).arg(journal).arg(image).output().expect("run e2fsck");
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

fn copy(from: &Path, name: &str) -> PathBuf {
    let to = from.with_file_name(name);
    run(Command::new("cp").arg("--sparse=always").arg(from).arg(&to));
    to
}

fn tree(image: &Path, journal: &Path, dir: &Path) -> BTreeMap<PathBuf, String> {
    let _mount = Kernel::new(image, journal, dir);
    listing(dir)
}

#[track_caller]
fn assert_refused(image: &Path, dir: &Path, options: &str) {
    let before = fs::read(image).expect("read");
    let mut mount = Command::new(uext());
    let output = mount.arg("mount").arg(image).arg(dir).args(["-o", options]).output();
    let output = output.expect("run uext");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(32), "{options}: {text}");
    assert!(text.lines().count() == 1 && text.contains("external journal"), "{text}");
    assert!(before == fs::read(image).expect("read"), "the image was changed");
}

fn kernel_and_uext_share_an_external_journal(block_size: &str) {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let (image, journal) = (scratch.sparse("fs.img", 300 << 20), scratch.sparse("j.img", 16 << 20));
    {
        let devices = (Loop::new(&image), Loop::new(&journal));
        let journal = ["-q", "-F", "-O", "journal_dev", "-b", block_size, &devices.1.0];
        run(Command::new("mke2fs").args(journal));
        let by = format!("device={}", devices.1.0);
        let fs = ["-q", "-F", "-t", "ext4", "-b", block_size, "-J", &by, &devices.0.0];
        run(Command::new("mke2fs").args(fs));
    }
    let mount = Kernel::new(&image, &journal, &dir);
    fill(&dir, Size { files: 60, big_dir: 300 }, 9);
    sh(&format!("cd '{}'; mkdir late; echo text > late/file; sync -f .", dir.display()));
    let (dirty, dirty_journal) = (copy(&image, "dirty.img"), copy(&journal, "dirty-j.img"));
    drop(mount);
    let (judged, judged_journal) =
        (copy(&dirty, "judged.img"), copy(&dirty_journal, "judged-j.img"));
    assert!(e2fsck(&judged, &judged_journal, "-fy").0 < Some(2));
    let want = tree(&judged, &judged_journal, &dir);
    assert!(want.contains_key(Path::new("late/file")));

    // Without the journal, or with another one, it is refused and stays as it is.
    let other = scratch.sparse("other.img", 16 << 20);
    run(Command::new("mke2fs")
        .args(["-q", "-F", "-O", "journal_dev", "-b", block_size])
        .arg(&other));
    let other_path = format!("journal_path={}", other.display());
    for options in ["rw", &other_path, "journal_path=/nonexistent"] {
        assert_refused(&dirty, &dir, options);
    }

    // Read-only: replayed in memory.
    let with = format!("journal_path={}", dirty_journal.display());
    let before = (fs::read(&dirty).expect("read"), fs::read(&dirty_journal).expect("read"));
    let mount = UextMount::new(&dirty, &dir, &format!("ro,{with}"));
    assert_same(&want, &listing(&dir));
    mount.unmount();
    let after = (fs::read(&dirty).expect("read"), fs::read(&dirty_journal).expect("read"));
    assert!(before == after, "a read-only mount wrote");

    // Read-write: replayed, worked on, and killed in the middle.
    let mount = UextMount::new(&dirty, &dir, &with);
    assert_same(&want, &listing(&dir));
    fs::create_dir(dir.join("ours")).expect("mkdir");
    for i in 0..50 {
        fs::write(dir.join(format!("ours/{i}")), vec![7; 5000]).expect("write");
    }
    File::open(dir.join("ours/49")).and_then(|file| file.sync_all()).expect("fsync");
    let (killed, killed_journal) =
        (copy(&dirty, "killed.img"), copy(&dirty_journal, "killed-j.img"));
    mount.unmount();
    let (exit, text) = e2fsck(&dirty, &dirty_journal, "-fn");
    assert_eq!(exit, Some(0), "{text}");

    // The kernel and e2fsck replay what we wrote.
    let found = tree(&killed, &killed_journal, &dir);
    assert!(found.contains_key(Path::new("ours/49")));
    let (exit, text) = e2fsck(&killed, &killed_journal, "-fn");
    assert_eq!(exit, Some(0), "{text}");
    // And the one that was unmounted is as it was left.
    let found = tree(&dirty, &dirty_journal, &dir);
    assert!(found.contains_key(Path::new("ours/0")) && found.len() == want.len() + 51);
}

#[test]
fn external_journal_1k() {
    require!("mke2fs", "e2fsck", "losetup", "setfacl", "setfattr");
    kernel_and_uext_share_an_external_journal("1024");
}

#[test]
fn external_journal_4k() {
    require!("mke2fs", "e2fsck", "losetup", "setfacl", "setfattr");
    kernel_and_uext_share_an_external_journal("4096");
}

/// Runs the program; its exit status and what it said.
fn run_uext(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(uext()).args(args).output().expect("run uext");
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

#[track_caller]
fn mkfs(args: &[&str]) -> String {
    let (status, text) = run_uext(&[&["mkfs"], args].concat());
    assert_eq!(status, Some(0), "{args:?}: {text}");
    text
}

fn our_mkfs_makes_journals_the_kernel_uses(block_size: &str) {
    let scratch = Scratch::new();
    let journal = scratch.sparse("journal.img", 16 << 20);
    let image = scratch.sparse("image.img", 64 << 20);
    let (dir, names) = (scratch.mount_point("mnt"), [&journal, &image]);
    let [journal_name, image_name] = names.map(|path| path.to_str().expect("a name"));
    mkfs(&["-q", "-O", "journal_dev", "-b", block_size, "-L", "a-journal", journal_name]);
    let dumped = run(Command::new("dumpe2fs").arg(&journal));
    assert!(dumped.contains("journal_dev") && dumped.contains("a-journal"), "{dumped}");
    assert!(dumped.contains("Journal number of users:  0"), "{dumped}");
    // A journal is no filesystem, and says so.
    let (status, text) = run_uext(&["mount", journal_name, dir.to_str().expect("a name")]);
    assert_eq!(status, Some(32), "{text}");
    assert!(text.contains("external journal") && text.lines().count() == 1, "{text}");

    // By the name of a device, whose number goes into the superblock.
    let attached = Loop::new(&journal);
    let by_name = format!("device={}", attached.0);
    mkfs(&["-q", "-J", &by_name, image_name]);
    let dumped = run(Command::new("dumpe2fs").arg("-h").arg(&image));
    let device = std::os::unix::fs::MetadataExt::rdev(&fs::metadata(&attached.0).expect("stat"));
    let number = nix::sys::stat::major(device) << 8 | nix::sys::stat::minor(device);
    let shown = format!("Journal device:\t          0x{number:04x}");
    assert!(dumped.contains(&shown), "{shown}: {dumped}");
    // It has a user now, who stays.
    let (status, text) = run_uext(&["mkfs", "-q", "-F", "-n", "-J", &by_name, image_name]);
    assert_eq!(status, Some(0), "{text}");
    let other = scratch.sparse("other.img", 64 << 20);
    let other_name = other.to_str().expect("a name");
    let (status, text) = run_uext(&["mkfs", "-q", "-J", &by_name, other_name]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("is used by") && text.lines().count() == 1, "{text}");
    drop(attached);
    assert_eq!(e2fsck(&image, &journal, "-fn").0, Some(0));

    let size = Size { files: 100, big_dir: 200 };
    let by_kernel = {
        let _mount = Kernel::new(&image, &journal, &dir);
        fill(&dir, size, 1);
        listing(&dir)
    };
    let mount = UextMount::new(&image, &dir, &format!("journal_path={journal_name}"));
    assert_same(&listing(&dir), &by_kernel);
    mount.unmount();
    assert_eq!(e2fsck(&image, &journal, "-fn").0, Some(0));
    let (status, text) = run_uext(&["fsck", "-n", "-f", "-j", journal_name, image_name]);
    assert_eq!(status, Some(0), "{text}");

    // Another journal is found out, and by its UUID or label one is found.
    let wrong = scratch.sparse("wrong.img", 16 << 20);
    // A label is the machine's: nobody else who tests has this one.
    let label = format!("u{}-{block_size}", std::process::id());
    let wrong_name = wrong.to_str().expect("a name");
    mkfs(&["-q", "-O", "journal_dev", "-b", block_size, "-L", &label, wrong_name]);
    let (status, text) = run_uext(&["fsck", "-n", "-f", "-j", wrong_name, image_name]);
    assert_eq!(status, Some(4), "{text}");
    let _attached = Loop::new(&wrong);
    let uuid = run(Command::new("blkid").args(["-p", "-s", "UUID", "-o", "value"]).arg(&wrong));
    for spec in [format!("device=UUID={}", uuid.trim()), format!("device=LABEL={label}")] {
        let text = mkfs(&["-F", "-J", &spec, other_name]);
        assert!(text.contains(uuid.trim()), "{spec}: {text}");
        assert_eq!(e2fsck(&other, &wrong, "-fn").0, Some(0));
    }
}

#[test]
fn our_mkfs_makes_journals_of_1k_blocks() {
    require!("mke2fs", "e2fsck", "dumpe2fs", "losetup");
    our_mkfs_makes_journals_the_kernel_uses("1024");
}

#[test]
fn our_mkfs_makes_journals_of_4k_blocks() {
    require!("mke2fs", "e2fsck", "dumpe2fs", "losetup");
    our_mkfs_makes_journals_the_kernel_uses("4096");
}
