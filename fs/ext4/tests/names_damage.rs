//! Damaged directories: what is left of them is shown, and nothing hangs.
#![allow(clippy::unwrap_used, missing_docs)]

mod names_common;

use std::process::Command;

use names_common::{Collector, Image, ROOT, list, look, mkdir, touch};
use uext_vfs::{Errno, FileHandle, FileSystem, Ino, RenameFlags};

const COUNT: usize = 500;

/// An image with an indexed directory, as a file's bytes, and where the root of the index lies.
fn indexed(args: &[&str]) -> (Vec<u8>, usize) {
    let image = Image::new(16, args);
    let fs = image.mount();
    let dir = mkdir(&fs, fs.root(), b"dir").unwrap().attr.ino;
    for number in 0..COUNT {
        touch(&fs, dir, format!("name-{number}").as_bytes()).unwrap();
    }
    image.check(&fs);
    let blocks = image.debugfs("blocks /dir");
    let first = blocks.lines().next().unwrap().split_whitespace().next().unwrap();
    let at = first.parse::<usize>().unwrap() * 1024;
    (std::fs::read(image.file()).unwrap(), at)
}

#[test]
fn a_damaged_index_is_done_without() {
    for (args, csum) in
        [(&["-t", "ext4", "-b", "1024"][..], true), (&["-t", "ext3", "-b", "1024"], false)]
    {
        let (mut bytes, root) = indexed(args);
        bytes[root + 28] = 9; // hash_version
        let image = Image::from_bytes(bytes);
        let fs = image.mount();
        let dir = look(&fs, fs.root(), b"dir").unwrap().attr.ino;
        for number in 0..COUNT {
            look(&fs, dir, format!("name-{number}").as_bytes()).unwrap();
        }
        assert_eq!(look(&fs, dir, b"none").unwrap_err(), Errno::ENOENT);
        if csum {
            // `.` and `..` are in the damaged block, the names are not.
            let mut sink = Collector { room: 4 * COUNT, entries: Vec::new() };
            fs.readdir(&ROOT, dir, FileHandle(0), 0, &mut sink).unwrap();
            assert_eq!(sink.entries.len(), COUNT);
            assert_eq!(look(&fs, dir, b"..").unwrap_err(), Errno::EBADMSG);
            assert_eq!(touch(&fs, dir, b"new").unwrap_err(), Errno::EBADMSG);
        } else {
            assert_eq!(list(&fs, dir, 10).len(), COUNT);
            touch(&fs, dir, b"new").unwrap();
            assert_eq!(list(&fs, dir, 10).len(), COUNT + 1);
        }
        fs.unmount().unwrap();
        let path = image.file();
        let fixed = Command::new("e2fsck").arg("-fy").arg(&path).status().unwrap();
        assert!(matches!(fixed.code(), Some(0 | 1)), "e2fsck -fy: {fixed}");
        let fs = Image::from_file(&path);
        let fs = fs.mount();
        assert_eq!(list(&fs, dir, 100).len(), COUNT + usize::from(!csum));
        fs.unmount().unwrap();
    }
}

#[test]
fn an_index_that_leads_anywhere_neither_hangs_nor_panics() {
    let (bytes, root) = indexed(&["-t", "ext3", "-b", "1024"]);
    // Every field of the index's first elements, with values that lead back, nowhere, or far.
    for at in (24..64).step_by(2) {
        for value in [0u16, 1, 2, 0xFFFF, 0x8000] {
            let mut bytes = bytes.clone();
            bytes[root + at..root + at + 2].copy_from_slice(&value.to_le_bytes());
            let image = Image::from_bytes(bytes);
            let fs = image.mount();
            let dir = look(&fs, fs.root(), b"dir").unwrap().attr.ino;
            let _ = look(&fs, dir, b"name-77");
            let mut sink = Collector { room: 4 * COUNT, entries: Vec::new() };
            let _ = fs.readdir(&ROOT, dir, FileHandle(0), 0, &mut sink);
            let _ = touch(&fs, dir, b"new");
            let _ = fs.unlink(&ROOT, dir, b"name-3");
            let _ = fs.unmount();
        }
    }
}

fn debugfs_write(image: &Image, requests: &[&str]) -> Image {
    let path = image.file();
    for request in requests {
        let done = Command::new("debugfs").args(["-w", "-R", request]).arg(&path).output().unwrap();
        assert!(done.status.success());
    }
    Image::from_file(&path)
}

#[test]
fn a_directory_inside_itself_is_refused() {
    let image = Image::new(16, &["-t", "ext4", "-b", "1024"]);
    let image = debugfs_write(
        &image,
        &["mkdir a", "mkdir a/b", "mkdir c", "ln a a/self", "ln a a/b/up", "ln c a/b/away"],
    );
    let fs = image.mount();
    let find = |dir: Ino, name: &[u8]| look(&fs, dir, name).unwrap().attr.ino;
    let root = fs.root();
    let (a, b) = (find(root, b"a"), find(find(root, b"a"), b"b"));
    let c = find(root, b"c");
    let plain = RenameFlags::empty();

    assert_eq!(fs.rmdir(&ROOT, a, b"self").unwrap_err(), Errno::EUCLEAN);
    assert_eq!(fs.rmdir(&ROOT, b, b"up").unwrap_err(), Errno::ENOTEMPTY);
    assert!(fs.rename(&ROOT, (a, b"self"), (a, b"other"), plain).is_ok());
    assert!(fs.rename(&ROOT, (a, b"other"), (b, b"x"), plain).is_err());
    assert!(fs.rename(&ROOT, (b, b"up"), (c, b"x"), plain).is_err());
    assert!(fs.rename(&ROOT, (b, b"up"), (a, b"b"), plain).is_err());
    // Many at once, in opposite directions.
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let fs = &fs;
            scope.spawn(move || {
                for _ in 0..200 {
                    let _ = match thread % 2 {
                        0 => fs.rmdir(&ROOT, b, b"up"),
                        _ => fs.rmdir(&ROOT, a, b"b"),
                    };
                }
            });
        }
    });
    let _ = fs.unmount();
}
