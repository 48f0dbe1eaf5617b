//! Images whose journal holds what the filesystem does not: checked as their replay would leave
//! them, and not written.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use uext_tests::mounts::KernelMount;
use uext_tests::run;
use uext_tests::scratch::Scratch;
use uext_tools::fsck::problem::Code;

use crate::{ours, theirs};

/// The image as it lies on the disk while the kernel has it mounted: what a power cut leaves.
fn cut_short(scratch: &Scratch, options: &[&str]) -> PathBuf {
    let image = scratch.path().join("image");
    let dirty = scratch.path().join("dirty");
    File::create(&image).expect("make an image").set_len(64 << 20).expect("size it");
    run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).args(options).arg(&image));
    let mount = KernelMount::new(&image, &scratch.mount_point("mnt"), "commit=1000");
    let path = mount.path();
    for i in 0..40 {
        let dir = path.join(format!("dir-{i}"));
        fs::create_dir(&dir).expect("mkdir");
        fs::write(dir.join("file"), vec![7; 3000 * i]).expect("write");
    }
    let held = File::create(path.join("held")).expect("create");
    held.write_all_at(&[1; 100_000], 0).expect("write");
    fs::create_dir(path.join("gone")).expect("mkdir");
    let inside = File::open(path.join("gone")).expect("open");
    fs::remove_file(path.join("held")).expect("unlink");
    fs::remove_dir(path.join("gone")).expect("rmdir");
    held.sync_all().expect("fsync");
    fs::copy(&image, &dirty).expect("copy the image");
    drop((held, inside));
    mount.unmount();
    dirty
}

/// The image after e2fsck's replay, and the work on orphans that comes with it.
fn replayed(image: &Path) -> PathBuf {
    let copy = image.with_extension("replayed");
    fs::copy(image, &copy).expect("copy the image");
    let done = Command::new("e2fsck").arg("-fy").arg(&copy).output().expect("run e2fsck");
    assert!(done.status.code() < Some(2), "{}", String::from_utf8_lossy(&done.stdout));
    copy
}

/// The inodes in use, of a summary line.
fn inodes_in_use(text: &str, mark: &str) -> u64 {
    let line = text.lines().find(|line| line.contains(mark)).expect("a summary");
    let mut counts = line.split(' ').filter_map(|word| word.split_once('/')?.0.parse().ok());
    counts.next().expect("a count")
}

/// The first block of a file.
fn first_block(image: &Path, file: &str, index: u32) -> u64 {
    let text =
        run(Command::new("debugfs").args(["-R", &format!("bmap {file} {index}")]).arg(image));
    text.lines().find_map(|line| line.trim().parse().ok()).expect("a block")
}

fn looks_through(options: &[&str]) {
    uext_tests::require!("mke2fs", "e2fsck", "debugfs", "losetup");
    let scratch = Scratch::new();
    let image = cut_short(&scratch, options);
    let before = fs::read(&image).expect("read the image");
    let (outcome, text) = ours(&image);
    assert_eq!((outcome.exit, outcome.warnings), (0, 0), "{text}");
    assert!(text.contains("The journal holds"), "{text}");
    assert!(text.contains("2 orphan inodes wait"), "{text}");
    assert!(before == fs::read(&image).expect("read the image"), "it was written");
    let replayed = replayed(&image);
    let (clean, their_text) = theirs(&replayed);
    assert!(clean, "{their_text}");
    let (ours_used, used) =
        (inodes_in_use(&text, "checked:"), inodes_in_use(&their_text, " files ("));
    assert_eq!(ours_used, used + 2, "{text}\n{their_text}");
    // Damage that the log does not mend is seen through it.
    let size = if options.contains(&"1024") { 1024 } else { 4096 };
    let file = fs::OpenOptions::new().write(true).open(&image).expect("open");
    let at = first_block(&replayed, "<11>", 0) * size;
    file.write_all_at(&[0xFF; 8], at).expect("damage lost+found");
    let (outcome, text) = ours(&image);
    assert_eq!(outcome.exit, 4, "{text}");
}

#[test]
fn a_journal_of_the_kernels_is_looked_through() {
    looks_through(&["-b", "4096", "-O", "orphan_file"]);
}

#[test]
fn a_journal_without_checksums_is_looked_through() {
    looks_through(&["-b", "1024", "-O", "^metadata_csum,^64bit,^orphan_file"]);
}

/// A committed block that does not fit its checksum.
#[test]
fn a_damaged_log_is_an_error() {
    uext_tests::require!("mke2fs", "e2fsck", "debugfs", "losetup");
    let scratch = Scratch::new();
    let image = cut_short(&scratch, &["-b", "1024"]);
    // The log begins with a descriptor in block 1.
    let logged = first_block(&image, "<8>", 2) * 1024;
    let file = fs::OpenOptions::new().read(true).write(true).open(&image).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, logged + 700).expect("read");
    file.write_all_at(&[byte[0] ^ 1], logged + 700).expect("damage the log");
    let (outcome, text) = ours(&image);
    assert!(outcome.counts.contains_key(&Code::JournalDamaged), "{text}");
    assert_eq!(outcome.exit, 4, "{text}");
}
