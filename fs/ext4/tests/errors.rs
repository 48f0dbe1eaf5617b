//! Errors of the device and of the image: what is refused afterwards, what goes on, and what
//! the superblock keeps, as e2fsprogs read it.
#![allow(clippy::unwrap_used, missing_docs)]

mod modes_common;

use std::process::Command;

use modes_common::*;
use uext_blockdev::dm::flakey::{Action, Ops, Rule, When};
use uext_blockdev::{BlkStatus, MemoryDevice};
use uext_ext4::{DataMode, ErrorsPolicy, Ext4, MountOptions};
use uext_vfs::{Errno, FileSystem, ReadReply, WriteFlags};

const EXT4: &[&str] = &["-t", "ext4", "-b", "4096", "-J", "size=4"];
const MODES: [Option<DataMode>; 3] =
    [Some(DataMode::Ordered), Some(DataMode::Journal), Some(DataMode::Writeback)];

/// A value of dumpe2fs.
fn dumpe2fs(bytes: &[u8], key: &str) -> Option<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let (_, text) = run(Command::new("dumpe2fs").arg("-h").arg(file.path()));
    text.lines().find_map(|line| Some(line.strip_prefix(key)?.trim().to_owned()))
}

/// Everything that writes is refused, and reads go on.
fn refuses_changes(disk: &Disk, name: &str, contents: &[u8]) {
    let fs = &disk.fs;
    let made = disk.ino(name);
    assert_eq!(fs.fsync(&ROOT, made, FH, false), Err(Errno::EROFS));
    assert_eq!(fs.fsync(&ROOT, made, FH, true), Err(Errno::EROFS));
    assert_eq!(fs.sync(), Err(Errno::EROFS));
    assert_eq!(disk.write(made, 0, b"x"), Err(Errno::EROFS));
    assert_eq!(fs.write(&ROOT, made, FH, 0, b"x", WriteFlags::SYNC), Err(Errno::EROFS));
    let root = fs.root();
    assert_eq!(fs.mkdir(&ROOT, root, b"dir", 0o755).err(), Some(Errno::EROFS));
    assert_eq!(fs.unlink(&ROOT, root, name.as_bytes()), Err(Errno::EROFS));
    assert!(read(fs, made) == contents, "reads go on");
}

/// A write of the log or a flush fails once; the device is well again, and still nothing may
/// be believed any more.
#[test]
fn after_an_abort_every_fsync_fails_and_reads_go_on() {
    for mode in MODES {
        for ops in [Ops::WRITE, Ops::FLUSH] {
            let disk = Disk::new(image(16, EXT4, &[]), &options(mode));
            let made = disk.create("file");
            disk.write(made, 0, &[1; 5000]).unwrap();
            disk.fsync(made);
            let before = disk.create("unsynced");
            disk.write(before, 0, b"new").unwrap();
            // The data's own write is the first where data does not go through the journal.
            let skip = u64::from(ops == Ops::WRITE && mode != Some(DataMode::Journal));
            disk.fail(ops, When::Nth(1 + skip));
            assert!(disk.fs.fsync(&ROOT, before, FH, false).is_err(), "{mode:?} {ops:?}");
            refuses_changes(&disk, "file", &[1; 5000]);
            assert!(disk.fs.unmount().is_err(), "an unmount after an abort is not clean");
            // What was promised before is there, and the image says what happened.
            let bytes = disk.memory.snapshot();
            assert_eq!(dumpe2fs(&bytes, "FS Error count:").as_deref(), Some("1"), "{ops:?}");
            assert_eq!(dumpe2fs(&bytes, "First error function:").as_deref(), Some("journal"));
            assert_eq!(dumpe2fs(&bytes, "Last error err:").as_deref(), Some("EIO"));
            let path = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(path.path(), disk.power_cut()).unwrap();
            let (code, text) = run(Command::new("e2fsck").arg("-fy").arg(path.path()));
            assert!(code <= 1, "{text}");
            let fixed = MemoryDevice::from_vec(std::fs::read(path.path()).unwrap());
            let fs = Ext4::mount(fixed, "fixed", &options(None)).unwrap();
            assert!(read(&fs, ino(&fs, "file")) == [1; 5000]);
            fs.unmount().unwrap();
        }
    }
}

#[test]
fn without_a_journal_a_failed_flush_is_final_too() {
    let disk = Disk::new(image(16, &["-t", "ext2"], &[]), &options(None));
    let made = disk.create("file");
    disk.write(made, 0, &[1; 5000]).unwrap();
    disk.fsync(made);
    disk.write(made, 0, &[1; 5000]).unwrap();
    disk.fail(Ops::FLUSH, When::Nth(1));
    assert_eq!(disk.fs.fsync(&ROOT, made, FH, false), Err(Errno::EIO));
    refuses_changes(&disk, "file", &[1; 5000]);
    let bytes = disk.memory.snapshot();
    assert_eq!(dumpe2fs(&bytes, "First error function:").as_deref(), Some("flush"));
}

/// A write error of data is told once, the page stays, and when the device is well again the
/// data gets there.
#[test]
fn a_data_error_is_told_once_and_the_page_is_written_again() {
    for mode in [None, Some(DataMode::Writeback)] {
        let disk = Disk::new(image(16, EXT4, &[]), &options(mode));
        let made = disk.create("file");
        disk.write(made, 0, &[1; 5000]).unwrap();
        disk.fsync(made);
        disk.write(made, 0, &[2; 5000]).unwrap();
        disk.fail(Ops::WRITE, When::From(1));
        assert_eq!(disk.fs.fsync(&ROOT, made, FH, false), Err(Errno::EIO));
        assert!(read(&disk.fs, made) == [2; 5000], "the page keeps what was written");
        assert_eq!(disk.fs.fsync(&ROOT, made, FH, false), Err(Errno::EIO), "still not written");
        disk.flakey.clear();
        disk.fsync(made);
        let seen = recovered(disk.power_cut(), |fs| read(fs, ino(fs, "file")));
        assert!(seen == [2; 5000], "told of success without it");
        disk.check();
    }
}

/// Pages that are about to be read have what their memory held before, which may be somebody
/// else's; when the read fails nothing may build on that.
#[test]
fn a_failed_read_leaves_nothing_of_other_files_to_be_read_or_written() {
    let disk = Disk::new(image(16, EXT4, &[]), &options(None));
    let (len, other) = (300_001, vec![9; 1 << 20]);
    let [made, secret] = ["file", "secret"].map(|name| disk.create(name));
    // Large writes leave nothing in the cache; what is read does, until its file is gone.
    disk.write(made, 0, &vec![3; len]).unwrap();
    disk.write(secret, 0, &other).unwrap();
    disk.fs.sync().unwrap();
    assert!(read(&disk.fs, secret) == other);
    disk.unlink("secret");
    disk.fail(Ops::READ, When::From(1));
    let mut reply = ReadReply::new();
    assert_eq!(disk.fs.read(&ROOT, made, FH, 0, 1 << 17, &mut reply), Err(Errno::EIO));
    assert!(reply.is_empty());
    assert_eq!(disk.write(made, 100, b"x"), Err(Errno::EIO), "a part of a page");
    disk.write(made, 8192, &[5; 4096]).unwrap();
    disk.flakey.clear();
    disk.truncate(made, len as u64 + 10_000);
    let mut expected = vec![3; len];
    expected[8192..12_288].fill(5);
    expected.resize(len + 10_000, 0);
    assert!(read(&disk.fs, made) == expected);
    disk.fsync(made);
    let seen = recovered(disk.power_cut(), |fs| read(fs, ino(fs, "file")));
    assert!(seen == expected);
    disk.check();
}

#[test]
fn data_err_abort_makes_a_data_error_final() {
    let strict = MountOptions { data_err_abort: true, ..options(None) };
    let disk = Disk::new(image(16, EXT4, &[]), &strict);
    let made = disk.create("file");
    disk.write(made, 0, &[1; 5000]).unwrap();
    disk.fsync(made);
    let other = disk.create("other");
    disk.write(other, 0, &[1; 5000]).unwrap();
    disk.fail(Ops::WRITE, When::Nth(1));
    assert!(disk.fs.fsync(&ROOT, other, FH, false).is_err());
    refuses_changes(&disk, "file", &[1; 5000]);
}

/// An image with a file whose extent root is damaged, under a checksum that is right: debugfs
/// makes it again.
fn damaged(more: &[&[&str]]) -> Vec<u8> {
    let damage: [&[&str]; 3] = [
        &["debugfs", "-w", "-R", "write /etc/hostname bad"],
        &["debugfs", "-w", "-R", "write /etc/hostname good"],
        &["debugfs", "-w", "-R", "set_inode_field /bad block[0] 0x12345678"],
    ];
    image(16, EXT4, &[&damage[..], more].concat())
}

fn read_bad(disk: &Disk) -> Result<(), Errno> {
    let mut reply = uext_vfs::ReadReply::new();
    disk.fs.read(&ROOT, disk.ino("bad"), FH, 0, 100, &mut reply)
}

#[test]
fn damage_under_errors_continue_is_recorded_and_work_goes_on() {
    let options = MountOptions { errors: Some(ErrorsPolicy::Continue), ..options(None) };
    let disk = Disk::new(damaged(&[]), &options);
    let bad = disk.ino("bad");
    assert_eq!(read_bad(&disk), Err(Errno::EUCLEAN));
    let made = disk.create("new");
    disk.write(made, 0, b"new").unwrap();
    disk.fsync(made);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), disk.power_cut()).unwrap();
    // As the replay has it.
    run(Command::new("e2fsck").args(["-y", "-E", "journal_only"]).arg(file.path()));
    let bytes = std::fs::read(file.path()).unwrap();
    assert_eq!(dumpe2fs(&bytes, "FS Error count:").as_deref(), Some("1"));
    assert_eq!(dumpe2fs(&bytes, "Last error inode #:"), Some(bad.to_string()));
    assert!(dumpe2fs(&bytes, "Filesystem state:").unwrap().contains("with errors"));
    disk.fs.unmount().unwrap();
    let bytes = disk.memory.snapshot();
    assert_eq!(dumpe2fs(&bytes, "FS Error count:").as_deref(), Some("1"));
    assert!(dumpe2fs(&bytes, "Filesystem state:").unwrap().contains("with errors"));
}

#[test]
fn damage_under_errors_remount_ro_stops_every_change() {
    let by_superblock: &[&[&str]] = &[&["tune2fs", "-e", "remount-ro"]];
    for (more, errors) in [(by_superblock, None), (&[][..], Some(ErrorsPolicy::RemountRo))] {
        let options = MountOptions { errors, ..options(None) };
        let disk = Disk::new(damaged(more), &options);
        let contents = read(&disk.fs, disk.ino("good"));
        let told = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let tell = told.clone();
        disk.fs.on_read_only(Box::new(move || {
            tell.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }));
        assert_eq!(read_bad(&disk), Err(Errno::EUCLEAN));
        refuses_changes(&disk, "good", &contents);
        assert_eq!(told.load(std::sync::atomic::Ordering::Relaxed), 1);
        let bytes = disk.memory.snapshot();
        assert_eq!(dumpe2fs(&bytes, "FS Error count:").as_deref(), Some("1"));
        assert_eq!(dumpe2fs(&bytes, "Last error err:").as_deref(), Some("EFSCORRUPTED"));
    }
}

/// In a child, which is this test again.
#[test]
fn damage_under_errors_panic_ends_the_daemon() {
    const CHILD: &str = "UEXT_TEST_PANIC_CHILD";
    if std::env::var_os(CHILD).is_some() {
        let options = MountOptions { errors: Some(ErrorsPolicy::Panic), ..options(None) };
        let disk = Disk::new(damaged(&[]), &options);
        let _ = read_bad(&disk);
        std::process::exit(0);
    }
    use std::os::unix::process::ExitStatusExt;
    let test = std::env::current_exe().unwrap();
    let name = "damage_under_errors_panic_ends_the_daemon";
    let ended = Command::new(test).args(["--exact", name]).env(CHILD, "1").output().unwrap();
    assert_eq!(ended.status.signal(), Some(libc::SIGABRT), "{:?}", ended.status);
}

/// The image remembers: it is mounted read-only until somebody has checked it.
#[test]
fn an_image_with_recorded_errors_is_mounted_read_only() {
    let options = options(None);
    let disk = Disk::new(image(16, EXT4, &[]), &options);
    let made = disk.create("file");
    disk.fail(Ops::FLUSH, When::Nth(1));
    assert!(disk.fs.fsync(&ROOT, made, FH, false).is_err());
    let memory = MemoryDevice::from_vec(disk.memory.snapshot());
    let fs = Ext4::mount(memory, "again", &options).unwrap();
    assert!(fs.capabilities().read_only);
}

/// A bitmap is read when its group is first looked at, and again after it was dropped: one
/// that cannot be read failed every allocation for which its group was next.
#[test]
fn bitmaps_that_cannot_be_read_leave_the_other_groups() {
    let features = "^flex_bg,^resize_inode,^metadata_csum,^uninit_bg";
    let args = ["-t", "ext4", "-b", "1024", "-g", "1024", "-O", features];
    let disk = Disk::new(image(64, &args, &[]), &options(None));
    let files: Vec<_> = (0..32).map(|n| disk.create(&format!("file{n}"))).collect();
    let group_sectors = 1024 * 2;
    let groups = 2 + 4 * group_sectors..2 + 16 * group_sectors;
    let action = Action::Fail(BlkStatus::IoErr);
    disk.flakey.add(Rule::new(Ops::READ, When::From(1), action).within(groups));
    for (n, &ino) in (0..).zip(&files) {
        assert_eq!(disk.write(ino, 0, &pattern(n, 1 << 20)), Ok(1 << 20), "file {n}");
        assert_eq!(disk.fs.fsync(&ROOT, ino, FH, false), Ok(()), "file {n}");
    }
    assert!(disk.flakey.counts().struck > 0, "no bitmap was read there");
    disk.flakey.clear();
    disk.check();
}
