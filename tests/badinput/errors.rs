//! Damage that a mounted filesystem meets, and what shows of it outside.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use uext_tests::mounts::{UextMount, try_unmount, unmount};
use uext_tests::scratch::{KINDS, Scratch};
use uext_tests::{require, run};

use crate::{MIB, try_mount};

/// Whether the kernel's table of mounts shows it as read-only.
fn shown_read_only(dir: &std::path::Path) -> bool {
    let table = fs::read_to_string("/proc/mounts").expect("read /proc/mounts");
    let dir = dir.to_str().expect("a name in UTF-8");
    let line = table.lines().find(|line| line.split(' ').nth(1) == Some(dir));
    let options = line.and_then(|line| line.split(' ').nth(3)).expect("it is mounted");
    options.split(',').any(|option| option == "ro")
}

#[test]
fn errors_remount_ro_shows_in_proc_mounts_and_at_the_next_mount() {
    require!("mke2fs", "debugfs");
    let scratch = Scratch::new();
    let image = scratch.mkfs("damaged.img", KINDS[5], 64 * MIB, &[]);
    for command in ["write /etc/hostname bad", "set_inode_field /bad block[0] 0x12345678"] {
        run(Command::new("debugfs").args(["-w", "-R", command]).arg(&image));
    }
    let dir = scratch.mount_point("mnt");
    let mount = UextMount::new(&image, &dir, "errors=remount-ro,nosuid,nodev");
    let open = fs::File::create(dir.join("open")).expect("create a file");
    assert!(!shown_read_only(&dir));

    let error = fs::read(dir.join("bad")).expect_err("the file is damaged");

    assert_eq!(error.raw_os_error(), Some(libc::EUCLEAN), "{error}");
    let refused = fs::create_dir(dir.join("dir")).expect_err("read-only by now");
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    // As long as a file is open for writing the kernel refuses to show it.
    drop(open);
    let since = Instant::now();
    while !shown_read_only(&dir) {
        assert!(since.elapsed() < Duration::from_secs(30), "{}", mount.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let table = fs::read_to_string("/proc/mounts").expect("read /proc/mounts");
    let line = table.lines().find(|line| line.contains(dir.to_str().expect("UTF-8")));
    assert!(line.is_some_and(|line| line.contains("nosuid") && line.contains("nodev")), "{line:?}");
    // The unmount says that it is not clean, which is what `run` of the harness refuses.
    let _ = try_unmount(Command::new("umount").arg(&dir));
    drop(mount);

    let since = Instant::now();
    let again = loop {
        let again = try_mount(&image, &dir, "ro");
        if again.status.success() || since.elapsed() > Duration::from_secs(30) {
            break String::from_utf8_lossy(&again.stderr).into_owned();
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    unmount(Command::new("umount").arg(&dir));
    assert!(again.contains("errors recorded earlier: 1, first"), "{again:?}");
}
