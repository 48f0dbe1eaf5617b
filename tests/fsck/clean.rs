//! What mke2fs makes and the kernel fills is clean.

use std::path::Path;
use std::process::Command;

use uext_tests::mounts::KernelMount;
use uext_tests::scratch::{KINDS, Kind, Scratch};
use uext_tests::{run, tree};
use uext_tools::fsck::problem::Code;

use crate::{assert_agree, ours, theirs};

#[track_caller]
fn assert_both_clean(image: &Path, what: &str) {
    let outcome = assert_agree(image, what);
    assert_eq!(outcome.exit, 0, "{what}: {:?}", outcome.counts);
}

const LAYOUTS: [&[&str]; 24] = [
    &["-t", "ext4", "-O", "^metadata_csum,uninit_bg"],
    &["-t", "ext4", "-O", "^flex_bg"],
    &["-t", "ext4", "-O", "^resize_inode"],
    &["-t", "ext4", "-O", "meta_bg,^resize_inode"],
    &["-t", "ext4", "-O", "bigalloc", "-C", "16384"],
    &["-t", "ext4", "-O", "inline_data"],
    &["-t", "ext4", "-O", "quota,project"],
    &["-t", "ext4", "-O", "ea_inode,large_dir"],
    &["-t", "ext4", "-O", "^has_journal"],
    &["-t", "ext4", "-O", "^64bit"],
    &["-t", "ext4", "-O", "sparse_super2"],
    &["-t", "ext4", "-O", "casefold"],
    &["-t", "ext4", "-O", "encrypt"],
    &["-t", "ext4", "-O", "fast_commit"],
    &["-t", "ext4", "-O", "mmp"],
    &["-t", "ext4", "-b", "1024", "-g", "1024"],
    &["-t", "ext4", "-E", "lazy_itable_init=0"],
    &["-t", "ext4", "-E", "packed_meta_blocks=1"],
    &["-t", "ext4", "-I", "512", "-N", "50000"],
    &["-t", "ext4", "-b", "65536"],
    &["-t", "ext2", "-b", "2048", "-I", "128"],
    &["-t", "ext2", "-r", "0"],
    &["-t", "ext2", "-O", "^filetype"],
    &["-t", "ext2", "-O", "^sparse_super,^resize_inode"],
];

#[test]
fn every_layout_of_mke2fs_is_clean() {
    uext_tests::require!("mke2fs", "e2fsck");
    let scratch = Scratch::new();
    for layout in LAYOUTS {
        let image = scratch.sparse("image", 200 << 20);
        run(Command::new("mke2fs").args(["-q", "-F"]).args(layout).arg(&image));
        assert_both_clean(&image, &layout.join(" "));
    }
}

fn kernel_fills(kind: Kind, more: &[&str], size: tree::Size) {
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", kind, 1 << 30, more);
    let mount = KernelMount::new(&image, &scratch.mount_point("mnt"), "");
    tree::fill(mount.path(), size, 7);
    run(Command::new("sync").arg("-f").arg(mount.path()));
    // An image whose journal must be replayed is checked as the replay leaves it.
    let live = scratch.path().join("live");
    run(Command::new("cp").arg("--sparse=always").arg(&image).arg(&live));
    mount.unmount();
    let (outcome, text) = ours(&live);
    let replay = Command::new("e2fsck").args(["-y", "-E", "journal_only"]).arg(&live).output();
    assert!(replay.expect("run e2fsck").status.code() < Some(2));
    // Every mount of an orphan file leaves its mark, which is no defect then.
    run(Command::new("debugfs").args(["-w", "-R", "feature -orphan_present"]).arg(&live));
    assert_eq!(outcome.exit == 0, theirs(&live).0, "{kind:?} {more:?} live: {text}");
    assert_both_clean(&image, &format!("{kind:?} {more:?}"));
}

#[test]
fn what_the_kernel_fills_is_clean() {
    uext_tests::require!("mke2fs", "e2fsck", "mount");
    for kind in KINDS {
        kernel_fills(kind, &[], tree::Size { files: 300, big_dir: 4000 });
    }
}

#[test]
fn what_the_kernel_fills_on_older_layouts_is_clean() {
    uext_tests::require!("mke2fs", "e2fsck", "mount");
    let size = tree::Size { files: 200, big_dir: 2000 };
    let ext4 = Kind { fs: "ext4", block_size: 4096 };
    kernel_fills(ext4, &["-O", "^metadata_csum,uninit_bg,^metadata_csum_seed"], size);
    kernel_fills(ext4, &["-I", "128"], size);
    kernel_fills(Kind { fs: "ext2", block_size: 1024 }, &["-I", "128", "-O", "^filetype"], size);
}

#[test]
fn a_directory_of_100_000_entries_is_clean() {
    uext_tests::require!("mke2fs", "e2fsck", "mount");
    for block_size in [1024, 4096] {
        let size = tree::Size { files: 1, big_dir: 100_000 };
        kernel_fills(Kind { fs: "ext4", block_size }, &["-N", "120000"], size);
    }
}

#[test]
fn a_file_open_while_the_machine_stops_is_an_orphan() {
    uext_tests::require!("mke2fs", "e2fsck", "mount");
    for kind in [Kind { fs: "ext2", block_size: 4096 }, Kind { fs: "ext3", block_size: 1024 }] {
        let scratch = Scratch::new();
        let image = scratch.mkfs("image", kind, 64 << 20, &[]);
        let mount = KernelMount::new(&image, &scratch.mount_point("mnt"), "");
        let path = mount.path().join("unlinked");
        let file = std::fs::File::create(&path).expect("create a file");
        file.set_len(1 << 20).expect("size the file");
        std::fs::remove_file(&path).expect("unlink the file");
        // Freezing writes everything to its place, as a checkpoint would.
        run(Command::new("fsfreeze").arg("-f").arg(mount.path()));
        let live = scratch.path().join("live");
        let copied = Command::new("cp").arg(&image).arg(&live).status();
        run(Command::new("fsfreeze").arg("-u").arg(mount.path()));
        assert!(copied.expect("run cp").success());
        drop(file);
        mount.unmount();
        let outcome = assert_agree(&live, kind.fs);
        assert_ne!(outcome.exit, 0, "{:?}", outcome.counts);
    }
}

#[test]
fn a_torn_superblock_is_replaced_by_a_backup() {
    uext_tests::require!("mke2fs", "e2fsck");
    let scratch = Scratch::new();
    for kind in KINDS {
        let image = scratch.mkfs("image", kind, 300 << 20, &[]);
        let mut bytes = std::fs::OpenOptions::new().write(true).open(&image).expect("open");
        use std::io::{Seek, SeekFrom, Write};
        bytes.seek(SeekFrom::Start(1024)).expect("seek");
        bytes.write_all(&[0; 1024]).expect("write");
        drop(bytes);
        let outcome = assert_agree(&image, &format!("{kind:?}"));
        assert!(outcome.counts.contains_key(&Code::SuperFromBackup), "{:?}", outcome.counts);
    }
}

#[test]
fn a_clean_filesystem_is_believed_without_force() {
    uext_tests::require!("mke2fs");
    use uext_blockdev::file::{FileDevice, OpenOptions};
    use uext_tools::fsck::{Options, Progress, check};
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", KINDS[5], 64 << 20, &[]);
    let open = || {
        let options = OpenOptions { read_only: true, direct: false, ..OpenOptions::default() };
        FileDevice::open(&image, options).expect("open the image")
    };
    let mut text = Vec::new();
    let quick = check(&*open(), &Options::default(), &mut Progress::off(), &mut text);
    assert!(quick.skipped && quick.exit == 0, "{quick:?}");
    run(Command::new("debugfs").args(["-w", "-R", "ssv state 0"]).arg(&image));
    let full = check(&*open(), &Options::default(), &mut Progress::off(), &mut text);
    assert!(!full.skipped && full.exit == 0, "{full:?}");
    assert_eq!(ours(&image).0.exit, 0);
}
