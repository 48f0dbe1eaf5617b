//! Files that were open without a name when the kernel's machine stopped: a mount deletes
//! them, from the list in the superblock and from the orphan file.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use uext_tests::mounts::{KernelMount, UextMount};
use uext_tests::scratch::{KINDS, Kind, Scratch, assert_clean};
use uext_tests::{require, run, sh};

const FILES: usize = 30;

fn orphans_of_the_kernel_are_deleted(kind: Kind) {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let image = scratch.mkfs("live.img", kind, 64 << 20, &[]);
    let stopped = scratch.path().join("stopped.img");
    let mount = KernelMount::new(&image, &dir, "");
    fs::write(dir.join("stays"), b"text").expect("write");
    sh(&format!("sync -f '{}'", dir.display()));
    let free = |dir: &std::path::Path| {
        let stat = nix::sys::statvfs::statvfs(dir).expect("statvfs");
        (stat.blocks_free(), stat.files_free())
    };
    let before = free(&dir);
    let open: Vec<File> = (0..FILES)
        .map(|i| {
            let path = dir.join(format!("orphan-{i}"));
            let file = File::create(&path).expect("create");
            file.write_all_at(&vec![1; 50_000], 0).expect("write");
            file.sync_all().expect("fsync");
            fs::remove_file(path).expect("unlink");
            file
        })
        .collect();
    sh(&format!("sync -f '{}'", dir.display()));
    // A copy now is what is left when the machine stops.
    fs::copy(&image, &stopped).expect("copy");
    drop(open);
    mount.unmount();
    let superblock = run(Command::new("dumpe2fs").arg("-h").arg(&stopped));
    assert!(superblock.contains("needs_recovery"), "{superblock}");

    let mount = UextMount::new(&stopped, &dir, "");
    assert_eq!(free(&dir), before, "{kind:?}: the orphans are gone");
    assert_eq!(fs::read(dir.join("stays")).expect("read"), b"text");
    mount.unmount();
    assert_clean(&stopped);
}

#[test]
fn on_the_list() {
    require!("mke2fs", "e2fsck", "dumpe2fs");
    orphans_of_the_kernel_are_deleted(KINDS[3]);
    orphans_of_the_kernel_are_deleted(KINDS[2]);
}

#[test]
fn in_the_orphan_file() {
    require!("mke2fs", "e2fsck", "dumpe2fs");
    orphans_of_the_kernel_are_deleted(KINDS[5]);
    orphans_of_the_kernel_are_deleted(KINDS[4]);
}
