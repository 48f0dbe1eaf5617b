//! More inodes than are kept in memory: what was dropped comes back as it was, and no
//! promise goes with it.

mod names_common;

use std::time::Duration;

use names_common::{Image, ROOT, look, touch};
use uext_ext4::{Ext4, MountOptions};
use uext_vfs::{FileHandle, FileSystem, Ino, SetAttr};

/// More than the bound, so that every inode that is left alone has had to go.
const MANY: u32 = 70_000;

fn image() -> Image {
    // A log that takes all of it as one transaction, so that nothing commits by itself.
    Image::new(400, &["-t", "ext4", "-J", "size=128", "-N", "80000"])
}

fn mount(image: &Image) -> std::sync::Arc<Ext4> {
    let options = MountOptions {
        cache_bytes: Some(256 << 20),
        commit_interval: Duration::from_secs(3600),
        ..MountOptions::default()
    };
    image.mount_with(&options)
}

fn name(n: u32) -> Vec<u8> {
    format!("f{n}").into_bytes()
}

/// Makes files whose lookups stay counted, as the kernel does.
fn known_files(fs: &Ext4, dir: Ino) -> Vec<Ino> {
    (0..MANY)
        .map(|n| {
            let made = fs.mknod(&ROOT, dir, &name(n), libc::S_IFREG | 0o644, 0);
            made.expect("a file").attr.ino
        })
        .collect()
}

/// An inode that was dropped and read again forgot which transaction had changed it, so
/// fsync had nothing to wait for, and a power cut after it lost the change.
#[test]
fn fsync_of_an_inode_that_came_back_covers_what_was_changed_before() {
    let image = image();
    let fs = mount(&image);
    let root = fs.root();
    let first = touch(&fs, root, b"first").expect("a file").attr.ino;
    fs.fsyncdir(&ROOT, root, FileHandle(0), false).expect("fsync");
    let set = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    fs.setattr(&ROOT, first, &set).expect("chmod");
    for n in 0..MANY {
        touch(&fs, root, &name(n)).expect("a file");
    }
    assert_eq!(look(&fs, root, b"first").expect("it is there").attr.perm, 0o600);
    fs.fsync(&ROOT, first, FileHandle(0), false).expect("fsync");
    // The power goes; e2fsck replays the journal.
    let (code, text) = image.replayed("stat first");
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("Mode:  0600"), "{text}");
    image.check(&fs);
}

#[test]
fn a_file_the_front_end_knows_lives_without_its_inode_in_memory() {
    let image = image();
    let fs = mount(&image);
    let root = fs.root();
    let inodes = known_files(&fs, root);
    // Known, no longer in memory: it is found, and an unlinked one lives until its forget.
    for (n, ino) in (0..MANY).zip(&inodes).step_by(997) {
        assert_eq!(fs.getattr(&ROOT, *ino).expect("attributes").nlink, 1);
        fs.unlink(&ROOT, root, &name(n)).expect("unlink");
        assert_eq!(fs.getattr(&ROOT, *ino).expect("attributes").nlink, 0);
    }
    // Others come and go meanwhile; no number of one that lives is given out.
    for n in 0..5000 {
        let made = fs.mknod(&ROOT, root, &name(MANY + n), libc::S_IFREG | 0o644, 0);
        let made = made.expect("a file").attr.ino;
        assert!(!inodes.contains(&made));
        fs.forget(made, 1);
    }
    let free = fs.statfs(&ROOT).expect("statfs").ffree;
    for ino in &inodes {
        fs.forget(*ino, 1);
    }
    let gone = u64::from(MANY.div_ceil(997));
    assert_eq!(fs.statfs(&ROOT).expect("statfs").ffree, free + gone);
    image.check(&fs);
}
