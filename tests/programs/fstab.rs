//! mount(8), umount(8) and fstab(5) with uext's helpers where an installation puts them.

use std::fs;
use std::os::unix::fs::symlink;

use uext_tests::scratch::{Scratch, assert_clean};
use uext_tests::{require, run, uext};

use crate::{EXT4, limited};

const HELPERS: [&str; 3] = ["mount.fuse.uext", "umount.fuse.uext", "mount.fuseblk.uext"];

/// Runs a script in a mount namespace of its own, in which the helpers are installed, in a
/// directory with an ext4 in `image` and an empty `mnt`; the image must be clean after it.
fn installed(script: &str) -> String {
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", EXT4, 32 << 20, &[]);
    scratch.mount_point("mnt");
    let helpers = scratch.path().join("helpers");
    fs::create_dir(&helpers).expect("mkdir");
    for name in HELPERS {
        symlink(uext(), helpers.join(name)).expect("symlink");
    }
    // /sbin is replaced by links to what it holds and to the helpers.
    let install = "sbin=$(readlink -f /sbin); mkdir \"$1/sbin\"; mount --bind $sbin \"$1/sbin\"; \
                   mount -t tmpfs tmpfs $sbin; cp -as \"$1\"/sbin/. \"$1\"/helpers/. $sbin; \
                   cd \"$1\"; shown() { grep \" $PWD/mnt \" /proc/mounts; }; ";
    let mut shell = limited(120, "unshare");
    shell.args(["-m", "bash", "-euo", "pipefail", "-c", &(install.to_owned() + script), "bash"]);
    let said = run(shell.arg(scratch.path()));
    assert_clean(&image);
    said
}

#[test]
fn an_entry_of_fstab_is_mounted_remounted_and_unmounted() {
    require!("mke2fs", "e2fsck", "unshare");
    let said = installed(
        "echo \"$PWD/image $PWD/mnt fuse.uext rw,noatime,nodev,noauto,commit=9,x-some.thing 0 2\" >fstab; \
         mount -T fstab \"$PWD/mnt\"; shown; echo text >mnt/file; \
         mount -T fstab -o remount,ro \"$PWD/mnt\"; shown; ! touch mnt/other; \
         mount -o remount,rw \"$PWD/mnt\"; touch mnt/other; \
         ! mount -o remount,commit=8 mnt; shown; \
         accessed() { stat -c %x mnt/file; }; touch -a -d 2001-01-01 mnt/file; cat mnt/file; \
         accessed; mount -o remount,relatime mnt; shown; cat mnt/file; accessed; \
         umount mnt; ! shown",
    );
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("fuseblk.uext")).collect();
    let [first, second, third, fourth] = lines[..] else { panic!("{said}") };
    let expected = [
        (first, "rw,", "noatime"),
        (second, "ro,", "noatime"),
        (third, "rw,", "noatime"),
        (fourth, "rw,", "relatime"),
    ];
    for (line, state, atime) in expected {
        for option in [state, "nodev", atime] {
            assert!(line.contains(option), "{line}");
        }
    }
    // A read did not change it, and did after the remount.
    assert_eq!(said.lines().filter(|line| line.starts_with("2001-01-01")).count(), 1, "{said}");
    assert_eq!(said.lines().filter(|line| line.starts_with("20")).count(), 2, "{said}");
    assert!(said.contains("commit=8: cannot be changed"), "{said}");
}

#[test]
fn mount_by_type_takes_an_image_and_a_device_and_says_why_it_refuses() {
    require!("mke2fs", "e2fsck", "unshare", "losetup");
    let said = installed(
        "mount -t fuse.uext image mnt; echo text >mnt/file; umount mnt; \
         mount -t fuse.uext -o ro image mnt; cat mnt/file; ! touch mnt/file; umount mnt; \
         loop=$(losetup -f --show image); trap 'losetup -d $loop' EXIT; \
         mount -t fuse.uext $loop mnt; cat mnt/file; umount mnt; \
         mount -t fuse.uext -o nonsense $loop mnt || echo \"status $?\"; ! shown",
    );
    assert_eq!(said.matches("text\n").count(), 2, "{said}");
    assert!(said.contains("status 32"), "{said}");
    assert!(said.contains("nonsense"), "{said}");
}

/// A mount that begins read-only and becomes writable, as the root filesystem does: nothing that
/// is open or known is lost by it, files without a name neither.
#[test]
fn a_mount_that_began_read_only_is_made_writable_and_clean_again() {
    require!("mke2fs", "e2fsck", "unshare", "losetup");
    let said = installed(
        "mount -t fuse.uext image mnt; mkdir mnt/d; echo text >mnt/d/file; echo more >mnt/d/gone; \
         umount mnt; \
         loop=$(losetup -f --show image); trap 'losetup -d $loop' EXIT; \
         sum=$(md5sum <image); mount -t fuse.uext -o ro,nodev $loop mnt; cd mnt/d; exec 4<gone 5<file; \
         ls -l >/dev/null; ! touch new; sync; [ \"$sum\" = \"$(md5sum <../../image)\" ]; \
         mount -o remount,rw \"$(dirname \"$PWD\")\"; echo changed >>file; rm gone; \
         for i in $(seq 200); do echo $i >fill-$i; done; sync; \
         cat <&4; cat <&5; exec 4<&- 5<&-; cd ../..; shown; \
         mount -o remount,ro mnt; ! touch mnt/d/new; e2fsck -fn $loop >/dev/null; \
         mount -o remount,rw mnt; rm mnt/d/fill-*; umount mnt",
    );
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("fuseblk.uext")).collect();
    let [line] = lines[..] else { panic!("{said}") };
    assert!(line.contains(" rw,nodev"), "{said}");
    assert_eq!(
        (said.matches("more\n").count(), said.matches("text\nchanged\n").count()),
        (1, 1),
        "{said}"
    );
}

/// Why it cannot become writable is said, and the mount goes on as it was.
#[test]
fn a_mount_that_cannot_be_made_writable_says_why() {
    require!("mke2fs", "e2fsck", "unshare", "debugfs", "losetup");
    let said = installed(
        "mount -t fuse.uext image mnt; echo text >mnt/file; umount mnt; \
         refused() { mount -t fuse.uext -o $1 $2 mnt; ! mount -o remount,rw mnt; ! touch mnt/new; \
             cat mnt/file; shown; umount mnt; }; \
         refused ro image; loop=$(losetup -f --show image); trap 'losetup -d $loop' EXIT; \
         refused ro,norecovery $loop; debugfs -w -R 'feature quota' image; refused ro $loop; \
         mount.fuse.uext $loop mnt; ! mount -o remount,rw mnt; cat mnt/file; umount mnt; \
         debugfs -w -R 'feature -quota' image",
    );
    assert_eq!(said.matches("text\n").count(), 4, "{said}");
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("fuseblk.uext")).collect();
    assert!(lines.iter().all(|line| line.contains(" ro,")), "{said}");
    for reason in ["an image that was mounted", "norecovery", "quota"] {
        assert!(said.contains(reason), "{reason}: {said}");
    }
    assert!(!said.contains("an error made it"), "{said}");
}
