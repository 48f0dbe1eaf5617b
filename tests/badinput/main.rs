//! Damaged, foreign and busy images: a mount is refused in one clear line, nothing
//! is written, and what still mounts does not take the daemon down.

mod bases;
mod errors;
mod flips;
mod journals;
mod superblock;
mod work;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use uext_tests::mounts::{KernelMount, UextMount, unmount};
use uext_tests::scratch::{KINDS, Scratch};
use uext_tests::tree::{Rng, Size, fill};
use uext_tests::{require, uext};

const MIB: u64 = 1 << 20;
/// mount(8): the mount failed.
const EXIT_FAILURE: i32 = 32;

fn try_mount(image: &Path, dir: &Path, options: &str) -> Output {
    let mut mount = Command::new("timeout");
    mount.arg("30").arg(uext()).arg("mount").arg(image).arg(dir);
    if !options.is_empty() {
        mount.args(["-o", options]);
    }
    mount.output().expect("run uext")
}

/// Asserts a refusal: exit status, one line that says what it must, and the image as it was.
#[track_caller]
fn assert_refused(image: &Path, dir: &Path, options: &str, says: &str) {
    let before = fs::read(image).expect("read the image");
    let output = try_mount(image, dir, options);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(EXIT_FAILURE), "{text}");
    assert_eq!(text.lines().count(), 1, "not one line: {text}");
    assert!(text.contains(says), "{text:?} does not say {says:?}");
    assert!(before == fs::read(image).expect("read the image"), "the image was changed");
}

fn patch(image: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(image).expect("open the image");
    file.write_all_at(bytes, offset).expect("patch the image");
}

#[test]
fn what_is_no_filesystem_is_refused() {
    require!("mke2fs");
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let empty = scratch.sparse("empty.img", 0);
    assert_refused(&empty, &dir, "", "truncated");
    let zeroes = scratch.sparse("zeroes.img", 8 * MIB);
    assert_refused(&zeroes, &dir, "", "no ext2, ext3 or ext4 filesystem");
    let image = scratch.mkfs("cut.img", KINDS[5], 64 * MIB, &[]);
    OpenOptions::new().write(true).open(&image).and_then(|f| f.set_len(20 * MIB)).expect("cut");
    assert_refused(&image, &dir, "", "truncated");
    let image = scratch.mkfs("zeroed.img", KINDS[5], 64 * MIB, &[]);
    patch(&image, 1024, &[0; 1024]);
    assert_refused(&image, &dir, "", "e2fsck");
    let output = try_mount(&scratch.path().join("missing.img"), &dir, "");
    assert_eq!(output.status.code(), Some(EXIT_FAILURE));
}

#[test]
fn unknown_features_are_refused_or_read_only() {
    require!("mke2fs");
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    // ext3 has no superblock checksum to repair.
    let image = scratch.mkfs("incompat.img", KINDS[3], 64 * MIB, &[]);
    patch(&image, 1024 + 0x60 + 3, &[0x40]);
    assert_refused(&image, &dir, "", "unsupported feature");
    let image = scratch.mkfs("ro.img", KINDS[3], 64 * MIB, &[]);
    patch(&image, 1024 + 0x64 + 3, &[0x40]);
    assert_refused(&image, &dir, "rw", "read-only");
    let mount = UextMount::new(&image, &dir, "");
    let write = fs::write(dir.join("file"), "x").expect_err("read-only");
    assert_eq!(write.raw_os_error(), Some(libc::EROFS));
    mount.unmount();
}

#[test]
fn options_that_mean_nothing_or_too_much_are_refused() {
    require!("mke2fs");
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let image = scratch.mkfs("o.img", KINDS[5], 64 * MIB, &[]);
    assert_refused(&image, &dir, "nonsense", "nonsense");
    assert_refused(&image, &dir, "norecovery", "ro");
    assert_refused(&image, &dir, "data=somehow", "data=somehow");
}

#[test]
fn an_image_in_use_is_refused() {
    require!("mke2fs");
    let scratch = Scratch::new();
    let (dir, other) = (scratch.mount_point("mnt"), scratch.mount_point("other"));
    let image = scratch.mkfs("busy.img", KINDS[5], 64 * MIB, &[]);
    for by_kernel in [false, true] {
        let mounts = (
            by_kernel.then(|| KernelMount::new(&image, &dir, "")),
            (!by_kernel).then(|| UextMount::new(&image, &dir, "")),
        );
        let output = try_mount(&image, &other, "");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(EXIT_FAILURE), "{text}");
        assert_eq!(text.lines().count(), 1, "not one line: {text}");
        assert!(text.contains("in use"), "{text}");
        mounts.0.into_iter().for_each(KernelMount::unmount);
        mounts.1.into_iter().for_each(UextMount::unmount);
    }
}

/// Bytes are flipped all over the metadata; reading everything must neither hang nor crash, and a
/// read-only mount leaves the image as it is. `UEXT_SEED` replays one image.
#[test]
fn flipped_bytes_neither_crash_nor_hang_nor_write() {
    require!("mke2fs", "setfacl", "setfattr");
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let pristine = scratch.mkfs("pristine.img", KINDS[5], 128 * MIB, &["-N", "4096"]);
    let mount = KernelMount::new(&pristine, &dir, "");
    fill(&dir, Size { files: 100, big_dir: 1000 }, 3);
    mount.unmount();
    let seeds = match std::env::var("UEXT_SEED") {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => (0..12u64).collect(),
    };
    for seed in seeds {
        eprintln!("UEXT_SEED={seed}");
        let mut rng = Rng(seed);
        let image = scratch.path().join("flipped.img");
        fs::copy(&pristine, &image).expect("copy");
        // The first blocks hold the descriptors, bitmaps and inode tables of a flex group;
        // the superblock is left alone in most, or nothing behind it would be reached.
        for _ in 0..40 {
            let offset = 4096 + rng.below(3 * MIB);
            patch(&image, offset, &rng.bytes(1));
        }
        if seed % 4 == 0 {
            patch(&image, 1024 + rng.below(1024), &rng.bytes(1));
        }
        let before = fs::read(&image).expect("read");
        let output = try_mount(&image, &dir, "ro");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            let walk = format!(
                "find '{0}' -type f -size -1000k -exec cat {{}} + >/dev/null 2>&1; \
                 find '{0}' -exec getfattr -h -d -m - {{}} + >/dev/null 2>&1; stat -f '{0}'",
                dir.display()
            );
            let walked = Command::new("timeout").args(["60", "bash", "-c", &walk]).output();
            assert!(walked.expect("walk").status.success(), "the daemon died or hangs");
            unmount(Command::new("timeout").arg("30").arg(uext()).arg("umount").arg(&dir));
        } else {
            assert_eq!(output.status.code(), Some(EXIT_FAILURE), "{text}");
            assert_eq!(text.lines().count(), 1, "not one line: {text}");
        }
        assert!(before == fs::read(&image).expect("read"), "a read-only mount wrote");
    }
}

/// A thread that makes an inode holds the inode bitmap while it clears the raw inode: when a
/// damaged descriptor put both in one block it waited for itself.
#[test]
fn descriptors_that_share_a_block_are_refused_for_writing() {
    require!("mke2fs");
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let image = scratch.mkfs("shared.img", KINDS[0], 64 * MIB, &[]);
    let mut table = [0; 4];
    let descriptor = 2 * 1024;
    let file = OpenOptions::new().read(true).open(&image).expect("open the image");
    file.read_exact_at(&mut table, descriptor + 8).expect("read bg_inode_table");
    patch(&image, descriptor + 4, &table);
    assert_refused(&image, &dir, "", "two structures lie at block");
    let mount = UextMount::new(&image, &dir, "ro");
    assert!(fs::read_dir(&dir).expect("readdir").count() > 0);
    mount.unmount();
}
