//! Superblocks that are torn, zeroed, damaged or foreign.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use uext_tests::mounts::{KernelMount, UextMount};
use uext_tests::scratch::{KINDS, Kind, Scratch, assert_clean};
use uext_tests::tree::{Size, assert_same, fill, listing};
use uext_tests::{require, run, sh, uext};

use crate::{MIB, assert_refused, patch};

const SUPERBLOCK: u64 = 1024;
const SECTOR: usize = 512;

fn superblock(image: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    let file = OpenOptions::new().read(true).open(image).expect("open the image");
    file.read_exact_at(&mut bytes, SUPERBLOCK).expect("read the superblock");
    bytes
}

fn copy(from: &Path, name: &str) -> PathBuf {
    let to = from.with_file_name(name);
    run(Command::new("cp").arg("--sparse=always").arg(from).arg(&to));
    to
}

/// The tree of an image, as the kernel sees it.
fn tree(image: &Path, dir: &Path) -> BTreeMap<PathBuf, String> {
    let mount = KernelMount::new(image, dir, "ro");
    let tree = listing(dir);
    mount.unmount();
    tree
}

/// An image in the middle of the kernel's work, which must be replayed, and the superblock that
/// it was made with.
fn in_use(scratch: &Scratch, kind: Kind, bytes: u64, dir: &Path) -> (PathBuf, Vec<u8>) {
    let image = scratch.mkfs("made.img", kind, bytes, &[]);
    let made = superblock(&image);
    let mount = KernelMount::new(&image, dir, "");
    fill(&dir.join("."), Size { files: 60, big_dir: 300 }, 5);
    sh(&format!(
        "cd '{}'; mkdir late; echo text > late/file; sync; rm special/large",
        dir.display()
    ));
    sh(&format!("sync -f '{}'", dir.display()));
    let dirty = copy(&image, "dirty.img");
    mount.unmount();
    fs::remove_file(&image).expect("remove");
    (dirty, made)
}

fn torn_superblock_stops_no_mount(kind: Kind, bytes: u64, has_backup: bool) {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let (dirty, made) = in_use(&scratch, kind, bytes, &dir);
    let judged = copy(&dirty, "judged.img");
    assert!(
        Command::new("e2fsck").arg("-fy").arg(&judged).output().expect("e2fsck").status.code()
            < Some(2)
    );
    let want = tree(&judged, &dir);
    for half in [0, 1] {
        let torn = copy(&dirty, "torn.img");
        let place = half * SECTOR;
        patch(&torn, SUPERBLOCK + place as u64, &made[place..place + SECTOR]);
        let before = fs::read(&torn).expect("read");
        if has_backup {
            let theirs = copy(&torn, "theirs.img");
            let fixed = Command::new("e2fsck").arg("-fy").arg(&theirs).output().expect("e2fsck");
            assert!(fixed.status.code() < Some(2), "{}", String::from_utf8_lossy(&fixed.stdout));
            assert_same(&want, &tree(&theirs, &dir));
        }
        let checked = Command::new(uext()).args(["fsck", "-n"]).arg(&torn).output().expect("fsck");
        let text = String::from_utf8_lossy(&checked.stdout).into_owned();
        assert!(!checked.status.success() && text.contains("superblock"), "{text}");

        let mount = UextMount::new(&torn, &dir, "ro");
        assert_same(&want, &listing(&dir));
        mount.unmount();
        assert!(before == fs::read(&torn).expect("read"), "a read-only mount wrote");

        let mount = UextMount::new(&torn, &dir, "");
        assert_same(&want, &listing(&dir));
        assert!(mount.log().contains("the superblock was"), "{}", mount.log());
        mount.unmount();
        assert_clean(&torn);
        assert_same(&want, &tree(&torn, &dir));
    }
}

#[test]
fn a_torn_superblock_stops_no_mount_1k() {
    require!("mke2fs", "e2fsck", "setfacl", "setfattr");
    torn_superblock_stops_no_mount(KINDS[4], 128 * MIB, true);
}

#[test]
fn a_torn_superblock_stops_no_mount_4k() {
    require!("mke2fs", "e2fsck", "setfacl", "setfattr");
    torn_superblock_stops_no_mount(KINDS[5], 300 * MIB, true);
}

/// With one group there is no backup; the group's descriptor confirms the superblock.
#[test]
fn a_torn_superblock_stops_no_mount_without_backups() {
    require!("mke2fs", "e2fsck", "setfacl", "setfattr");
    torn_superblock_stops_no_mount(KINDS[5], 100 * MIB, false);
}

#[test]
fn a_damaged_or_foreign_superblock_is_no_torn_one() {
    require!("mke2fs");
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let image = scratch.mkfs("flipped.img", KINDS[5], 300 * MIB, &[]);
    let whole = superblock(&image);
    let foreign = superblock(&scratch.mkfs("foreign.img", KINDS[5], 300 * MIB, &[]));
    // A byte of the UUID, of the block count, of the seed.
    for place in [0x68, 0x04, 0x270] {
        patch(&image, SUPERBLOCK + place, &[whole[place as usize] ^ 1]);
        assert_refused(&image, &dir, "", "e2fsck");
        patch(&image, SUPERBLOCK, &whole);
    }
    for half in [0, SECTOR] {
        patch(&image, SUPERBLOCK + half as u64, &foreign[half..half + SECTOR]);
        assert_refused(&image, &dir, "", "e2fsck");
        patch(&image, SUPERBLOCK, &whole);
    }
}

/// Without backups a wrong superblock is told by what depends on it.
#[test]
fn a_foreign_half_is_noticed_without_backups() {
    require!("mke2fs");
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let image = scratch.mkfs("image.img", KINDS[5], 64 * MIB, &[]);
    let foreign = superblock(&scratch.mkfs("foreign.img", KINDS[5], 64 * MIB, &[]));
    patch(&image, SUPERBLOCK + SECTOR as u64, &foreign[SECTOR..]);
    assert_refused(&image, &dir, "", "e2fsck");
}

#[test]
fn a_zeroed_superblock_is_refused_and_a_backup_can_be_named() {
    require!("mke2fs", "e2fsck", "setfacl", "setfattr");
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let (dirty, _) = in_use(&scratch, KINDS[4], 128 * MIB, &dir);
    let judged = copy(&dirty, "judged.img");
    let _ = Command::new("e2fsck").arg("-fy").arg(&judged).output().expect("e2fsck");
    let want = tree(&judged, &dir);
    patch(&dirty, SUPERBLOCK, &[0; 1024]);
    assert_refused(&dirty, &dir, "", "sb=8193");
    assert_refused(&dirty, &dir, "sb=4000", "magic");

    let before = fs::read(&dirty).expect("read");
    let mount = UextMount::new(&dirty, &dir, "ro,sb=8193");
    assert_same(&want, &listing(&dir));
    mount.unmount();
    assert!(before == fs::read(&dirty).expect("read"), "a read-only mount wrote");

    let mount = UextMount::new(&dirty, &dir, "sb=8193");
    assert_same(&want, &listing(&dir));
    mount.unmount();
    assert_clean(&dirty);
    assert_same(&want, &tree(&dirty, &dir));
}

/// What the backup cannot know is for a check to find, so the image does not say clean.
#[test]
fn an_image_mounted_by_a_backup_is_checked_afterwards() {
    require!("mke2fs", "e2fsck");
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let image = scratch.mkfs("zeroed.img", KINDS[5], 300 * MIB, &[]);
    patch(&image, SUPERBLOCK, &[0; 1024]);
    let mount = UextMount::new(&image, &dir, "sb=131072");
    fs::write(dir.join("new"), "text").expect("write");
    mount.unmount();
    let fixed = Command::new("e2fsck").arg("-p").arg(&image).output().expect("e2fsck");
    let text = String::from_utf8_lossy(&fixed.stdout).into_owned();
    assert!(fixed.status.code() < Some(2) && !text.contains("clean,"), "{text}");
    assert_clean(&image);
    assert!(tree(&image, &dir).contains_key(Path::new("new")));
}
