//! How far the format goes: the largest files, the feature that large ones need, and a
//! directory of a million entries.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use uext_tests::mounts::{KernelMount, UextMount};
use uext_tests::scratch::{KINDS, Kind, Scratch, assert_clean};
use uext_tests::{require, sh};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

fn can_be(file: &File, size: u64) -> bool {
    file.set_len(size).is_ok()
}

/// The largest size that truncate(2) gives a file.
fn largest(file: &File) -> u64 {
    let (mut can, mut cannot) = (0, 1 << 62);
    while cannot - can > 1 {
        let size = can + (cannot - can) / 2;
        if can_be(file, size) { can = size } else { cannot = size }
    }
    can
}

#[test]
fn the_largest_file_is_as_large_as_the_kernels() {
    require!("mke2fs", "e2fsck");
    for kind in KINDS {
        let scratch = Scratch::new();
        let dir = scratch.mount_point("mnt");
        let image = scratch.mkfs("largest.img", kind, 64 * MIB, &[]);
        let mount = KernelMount::new(&image, &dir, "");
        let want = largest(&File::create(dir.join("theirs")).expect("create"));
        fs::remove_file(dir.join("theirs")).expect("remove");
        mount.unmount();
        let mount = UextMount::new(&image, &dir, "");
        let file = File::create(dir.join("ours")).expect("create");
        assert_eq!(largest(&file), want, "{kind:?}");
        assert!(can_be(&file, want));
        file.write_all_at(b"last", want - 4).expect("write the last bytes");
        let error = file.write_at(b"more", want).expect_err("behind the last byte");
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG), "{kind:?}");
        drop(file);
        mount.unmount();
        assert_clean(&image);
        let mount = KernelMount::new(&image, &dir, "ro");
        assert_eq!(fs::metadata(dir.join("ours")).expect("stat").len(), want);
        assert_eq!(read(&dir.join("ours"), want - 4, 4), b"last");
        mount.unmount();
    }
}

fn read(path: &Path, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(path).and_then(|file| file.read_exact_at(&mut bytes, at)).expect("read");
    bytes
}

#[test]
fn a_file_over_two_tebibytes_is_whole_for_the_kernel_and_again_for_us() {
    require!("mke2fs", "e2fsck");
    let kind = Kind { fs: "ext4", block_size: 4096 };
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let image = scratch.mkfs("far.img", kind, 64 * MIB, &[]);
    let path = dir.join("far");
    let places = [0, 2 * TIB - 3, 2 * TIB + 4096 * 3, 9 * TIB + 1];
    let mount = UextMount::new(&image, &dir, "");
    let file = File::create(&path).expect("create");
    for at in places {
        file.write_all_at(&at.to_le_bytes(), at).expect("write");
    }
    drop(file);
    mount.unmount();
    assert_clean(&image);
    let mount = KernelMount::new(&image, &dir, "");
    assert_eq!(fs::metadata(&path).expect("stat").len(), 9 * TIB + 9);
    for at in places {
        assert_eq!(read(&path, at, 8), at.to_le_bytes());
    }
    let file = OpenOptions::new().write(true).open(&path).expect("open");
    file.write_all_at(b"kernel", 5 * TIB).expect("write");
    drop(file);
    mount.unmount();
    let mount = UextMount::new(&image, &dir, "");
    assert_eq!(read(&path, 5 * TIB, 6), b"kernel");
    let file = OpenOptions::new().write(true).open(&path).expect("open");
    file.set_len(2 * TIB).expect("truncate");
    drop(file);
    assert_eq!(read(&path, 2 * TIB - 3, 3), (2 * TIB - 3).to_le_bytes()[..3]);
    // Left are the first block, the one before the new end, and maybe a block of extents.
    let sectors = fs::metadata(&path).expect("stat").blocks();
    assert!((2 * 8..=3 * 8).contains(&sectors), "{sectors} sectors");
    mount.unmount();
    assert_clean(&image);
}

#[test]
fn the_first_large_file_sets_its_feature_as_the_kernel_does() {
    require!("mke2fs", "e2fsck", "dumpe2fs");
    for kind in [KINDS[1], KINDS[3], KINDS[5]] {
        for change in ["truncate -s 3G file", "truncate -s 2G file; echo more >> file"] {
            let scratch = Scratch::new();
            let dir = scratch.mount_point("mnt");
            // The resize inode alone is a large file.
            let image = scratch.mkfs(
                "large.img",
                kind,
                64 * MIB,
                &["-O", "^large_file,^huge_file,^resize_inode"],
            );
            let features =
                || sh(&format!("dumpe2fs -h '{}' 2>&1 | grep features:", image.display()));
            let mount = UextMount::new(&image, &dir, "");
            sh(&format!("cd '{}'; truncate -s 2147483647 small", dir.display()));
            mount.unmount();
            assert!(!features().contains("large_file"), "{kind:?}: not needed yet");
            let mount = UextMount::new(&image, &dir, "");
            sh(&format!("cd '{}'; {change}", dir.display()));
            mount.unmount();
            assert!(features().contains("large_file"), "{kind:?}, {change}");
            assert_clean(&image);
        }
    }
}

/// `UEXT_TEST_FULL=1` runs it: it takes minutes.
#[test]
fn a_directory_of_a_million_entries_is_made_read_and_emptied() {
    require!("mke2fs", "e2fsck");
    if !crate::wants_full() {
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "SKIPPED a million entries: set UEXT_TEST_FULL=1");
        return;
    }
    const ENTRIES: usize = 1_000_000;
    const LINKS: usize = 50_000;
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let image = scratch.mkfs("million.img", KINDS[5], 1 << 30, &[]);
    let big = dir.join("big");
    let name = |i: usize| big.join(format!("the entry with number {i:07}"));
    let mount = UextMount::new(&image, &dir, "");
    fs::create_dir(&big).expect("mkdir");
    for i in 0..ENTRIES {
        if i % LINKS == 0 {
            File::create(name(i)).expect("create");
        } else {
            fs::hard_link(name(i / LINKS * LINKS), name(i)).expect("link");
        }
    }
    let count = || fs::read_dir(&big).expect("readdir").filter(|entry| entry.is_ok()).count();
    assert_eq!(count(), ENTRIES);
    mount.unmount();
    assert_clean(&image);
    let mount = KernelMount::new(&image, &dir, "ro");
    assert_eq!(count(), ENTRIES);
    for i in (0..ENTRIES).step_by(997) {
        assert_eq!(fs::metadata(name(i)).expect("stat").nlink(), LINKS as u64);
    }
    mount.unmount();
    let mount = UextMount::new(&image, &dir, "");
    for i in (0..ENTRIES).filter(|i| i % 10 != 0) {
        fs::remove_file(name(i)).expect("unlink");
    }
    assert_eq!(count(), ENTRIES / 10);
    mount.unmount();
    assert_clean(&image);
    let mount = UextMount::new(&image, &dir, "");
    fs::remove_dir_all(&big).expect("remove");
    mount.unmount();
    assert_clean(&image);
}
