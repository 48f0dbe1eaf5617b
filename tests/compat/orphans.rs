//! Files that were open without a name when the machine stopped: a mount deletes
//! them, from the list in the superblock and from the orphan file. The kernel's by us, and ours
//! by the kernel and e2fsck.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use uext_blockdev::{BlockDevice, MemoryDevice};
use uext_ext4::{Ext4, MountOptions};
use uext_ondisk::features::RoCompat;
use uext_ondisk::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};
use uext_tests::mounts::{KernelMount, UextMount};
use uext_tests::scratch::{KINDS, Kind, Scratch, assert_clean};
use uext_tests::{has_repairs, require, run, sh};
use uext_vfs::{Context, FileHandle, FileSystem, StatFs, WriteFlags};

const ROOT: Context = Context { uid: 0, gid: 0, pid: 0, umask: 0 };

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

/// Ours, of a file of one block and of a list when that is full: what is left when the machine
/// stops is for e2fsck, the kernel and ourselves to clean.
fn our_orphans_are_deleted(kind: Kind, slots: usize) {
    let scratch = Scratch::new();
    let dir = scratch.mount_point("mnt");
    let image = scratch.mkfs("image", kind, 64 << 20, &["-E", "orphan_file_size=1"]);
    let disk = MemoryDevice::from_vec(fs::read(&image).expect("read the image"));
    let superblock = || {
        let device: &dyn BlockDevice = &*disk;
        let bytes = device.read_at(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE).expect("read");
        Superblock::parse(&bytes).expect("a superblock")
    };
    let options = MountOptions { background: false, ..MountOptions::default() };
    let mounted = Ext4::mount(disk.clone(), "ours", &options).expect("mount");
    let make = |name: String| {
        let mode = libc::S_IFREG | 0o644;
        let ino = mounted.mknod(&ROOT, mounted.root(), name.as_bytes(), mode, 0);
        let ino = ino.expect("mknod").attr.ino;
        let flags = WriteFlags::empty();
        let data = [7; 5000];
        mounted.write(&ROOT, ino, FileHandle::default(), 0, &data, flags).expect("write");
        ino
    };
    let unlink = |i: usize| {
        let name = format!("orphan-{i}");
        mounted.unlink(&ROOT, mounted.root(), name.as_bytes()).expect("unlink");
    };
    make("stays".into());
    // The directory has its size before anything is counted.
    let inos: Vec<u64> = (0..slots + 40).map(|i| make(format!("orphan-{i}"))).collect();
    (0..slots + 40).for_each(unlink);
    inos.iter().for_each(|&ino| mounted.forget(ino, 1));
    mounted.sync().expect("sync");
    let before = mounted.statfs(&ROOT).expect("statfs");
    let inos: Vec<u64> = (0..slots + 40).map(|i| make(format!("orphan-{i}"))).collect();
    (0..inos.len()).for_each(unlink);
    // Freed slots are used again.
    inos[..20].iter().for_each(|&ino| mounted.forget(ino, 1));
    mounted.sync().expect("sync");
    fs::write(&image, disk.snapshot()).expect("write the image");

    let copy = scratch.path().join("copy");
    fs::copy(&image, &copy).expect("copy");
    let fsck = Command::new("e2fsck").arg("-fy").arg(&copy).output().expect("run e2fsck");
    let text = String::from_utf8_lossy(&fsck.stdout).into_owned();
    assert!(fsck.status.code() < Some(2) && !has_repairs(&text), "{kind:?}: {text}");
    assert!(text.contains("Clearing orphaned inode"), "{kind:?}: {text}");
    assert_clean(&copy);

    let free = |dir: &std::path::Path| {
        let stat = nix::sys::statvfs::statvfs(dir).expect("statvfs");
        (stat.blocks_free(), stat.files_free())
    };
    fs::copy(&image, &copy).expect("copy");
    let mount = KernelMount::new(&copy, &dir, "");
    assert_eq!(free(&dir), (before.bfree, before.ffree), "{kind:?}: by the kernel");
    mount.unmount();
    assert_clean(&copy);

    fs::copy(&image, &copy).expect("copy");
    let again = MemoryDevice::from_vec(fs::read(&image).expect("read"));
    let ours = Ext4::mount(again.clone(), "again", &options).expect("mount");
    let after = ours.statfs(&ROOT).expect("statfs");
    let counts = |stat: &StatFs| (stat.bfree, stat.ffree);
    assert_eq!(counts(&after), counts(&before), "{kind:?}: by ourselves");
    ours.unmount().expect("unmount");
    fs::write(&copy, again.snapshot()).expect("write");
    assert_clean(&copy);

    inos[20..].iter().for_each(|&ino| mounted.forget(ino, 1));
    assert!(superblock().features().ro_compat.contains(RoCompat::ORPHAN_PRESENT));
    mounted.unmount().expect("unmount");
    assert!(!superblock().features().ro_compat.contains(RoCompat::ORPHAN_PRESENT));
    fs::write(&copy, disk.snapshot()).expect("write");
    assert_clean(&copy);
}

#[test]
fn ours_in_the_file_and_on_the_list_when_it_is_full() {
    require!("mke2fs", "e2fsck", "mount");
    our_orphans_are_deleted(KINDS[5], 1022);
    our_orphans_are_deleted(KINDS[4], 254);
}
