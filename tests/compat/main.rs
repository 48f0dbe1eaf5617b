//! Both ways between the kernel's ext4 and uext: what one writes the other reads,
//! and `e2fsck -fn` finds nothing after either.

mod external;
mod fast_commit;
mod limits;
mod orphans;

use std::path::Path;

use uext_tests::mounts::{KernelMount, UextMount};
use uext_tests::scratch::{KINDS, Kind, Scratch, assert_clean};
use uext_tests::tree::{Size, assert_same, fill, listing, tools_listing, without_blocks};
use uext_tests::{require, sh};

const IMAGE_BYTES: u64 = 1 << 30;

const FULL: Size = Size { files: 10_000, big_dir: 100_000 };

/// `UEXT_TEST_FULL=1` gives all kinds the full size, both ways.
fn wants_full() -> bool {
    std::env::var_os("UEXT_TEST_FULL").is_some()
}

/// The full size is for the kind that most people have; the others share its shape.
fn size_to_read(kind: Kind) -> Size {
    if wants_full() || (kind.fs, kind.block_size) == ("ext4", 4096) {
        FULL
    } else {
        Size { files: 800, big_dir: 8_000 }
    }
}

/// What is copied in, three times.
fn size_to_write(kind: Kind) -> Size {
    if wants_full() {
        FULL
    } else {
        Size { files: size_to_read(kind).files.min(1_500), big_dir: 6_000 }
    }
}

fn kernel_image_reads_the_same(kind: Kind) {
    let scratch = Scratch::new();
    let image = scratch.mkfs("k.img", kind, IMAGE_BYTES, &[]);
    let dir = scratch.mount_point("mnt");
    let mount = KernelMount::new(&image, &dir, "");
    fill(&dir, size_to_read(kind), 1);
    let (want, want_tools) = (listing(&dir), tools_listing(&dir));
    mount.unmount();

    let mount = UextMount::new(&image, &dir, "ro");
    let (got, got_tools) = (listing(&dir), tools_listing(&dir));
    mount.unmount();

    assert_same(&want, &got);
    assert!(want_tools == got_tools, "find -ls, getfattr or getfacl print something else");
    assert_clean(&image);
}

/// Copies a tree in by three programs, changes it and deletes half of it, the same way on any
/// filesystem.
fn work_on(source: &Path, dir: &Path) {
    let (source, dir) = (source.display(), dir.display());
    sh(&format!(
        "cd '{dir}'; cp -a '{source}' cp; mkdir tar rsync; \
         keep=\"--xattrs --xattrs-include=* --acls\"; set -f; \
         tar -C '{source}' $keep -S -cf - . | tar -C tar $keep -S -xpf -; \
         rsync -aHAXS --exclude /special/far --exclude /special/sparse '{source}/' rsync/"
    ));
    sh(&format!(
        "cd '{dir}'; \
         find cp -type f -name 'file *[05] *' -exec sh -c 'for f; do echo more >> \"$f\"; done' _ {{}} +; \
         find tar -type f -name 'file *[37] *' -exec truncate -s 777 {{}} +; \
         find rsync -type f -name 'file *1 *' -delete; \
         mv rsync/special moved; chmod -R g+w moved; rm -rf tar/special/deep; \
         mkdir -p new/a/b/c; mv cp/big new/a/b/c/; ls -f new/a/b/c/big | grep '^entry-00.*[02468]-' | (cd new/a/b/c/big && xargs rm -f --); \
         ls -f tar/big | grep '[13579]-' | (cd tar/big && xargs rm -f --); \
         find cp -depth -type d -name 'd*[24680]' -exec rm -rf {{}} +; \
         find . -exec touch -h -d '2020-02-02 02:02:02' {{}} +"
    ));
}

fn tree_written_by_uext_is_the_kernels(kind: Kind) {
    let scratch = Scratch::new();
    let image = scratch.mkfs("u.img", kind, 2 * IMAGE_BYTES, &[]);
    let reference = scratch.mkfs("r.img", kind, 2 * IMAGE_BYTES, &[]);
    let source_image =
        scratch.mkfs("s.img", Kind { fs: "ext4", block_size: 4096 }, IMAGE_BYTES, &[]);
    let (dir, source, other) =
        (scratch.mount_point("mnt"), scratch.mount_point("source"), scratch.mount_point("ref"));
    let source_mount = KernelMount::new(&source_image, &source, "");
    fill(&source, size_to_write(kind), 2);

    let mount = UextMount::new(&image, &dir, "");
    work_on(&source, &dir);
    let seen = listing(&dir);
    mount.unmount();
    assert_clean(&image);

    let mount = KernelMount::new(&reference, &other, "");
    work_on(&source, &other);
    let want = listing(&other);
    mount.unmount();
    source_mount.unmount();

    let mount = UextMount::new(&image, &dir, "ro");
    let (again, again_tools) = (listing(&dir), tools_listing(&dir));
    mount.unmount();
    let mount = KernelMount::new(&image, &dir, "ro");
    let (got, got_tools) = (listing(&dir), tools_listing(&dir));
    mount.unmount();
    // Nothing is delayed any more, so the blocks used are the same too.
    assert_same(&again, &got);
    assert!(again_tools == got_tools, "find -ls, getfattr or getfacl print something else");
    // Which blocks a copy takes is the filesystem's business, and delayed data has not taken its
    // mapping blocks yet when it is listed; e2fsck checked the counts.
    let got = without_blocks(got);
    assert_same(&without_blocks(seen), &got);
    assert_same(&without_blocks(want), &got);
}

macro_rules! for_each_kind {
    ($($name:ident = $index:expr),* $(,)?) => {
        mod reads_what_the_kernel_wrote {
            use super::*;
            $(#[test]
            fn $name() {
                require!("e2fsck", "mke2fs", "setfacl", "setfattr");
                kernel_image_reads_the_same(KINDS[$index]);
            })*
        }
        mod writes_what_the_kernel_reads {
            use super::*;
            $(#[test]
            fn $name() {
                require!("e2fsck", "mke2fs", "setfacl", "setfattr", "rsync");
                tree_written_by_uext_is_the_kernels(KINDS[$index]);
            })*
        }
    };
}

for_each_kind!(ext2_1k = 0, ext2_4k = 1, ext3_1k = 2, ext3_4k = 3, ext4_1k = 4, ext4_4k = 5);

#[test]
fn an_image_mounted_read_only_stays_as_it_is() {
    require!("e2fsck", "mke2fs");
    let scratch = Scratch::new();
    let image = scratch.mkfs("ro.img", KINDS[5], 64 << 20, &[]);
    let dirty = scratch.path().join("dirty.img");
    let dir = scratch.mount_point("mnt");
    let mount = KernelMount::new(&image, &dir, "");
    // Copied while it is mounted: the journal needs recovery.
    sh(&format!(
        "cd '{}'; mkdir a; echo text > a/b; sync; cp --sparse=always '{}' '{}'",
        dir.display(),
        image.display(),
        dirty.display()
    ));
    mount.unmount();
    let before = sh(&format!("sha256sum < '{}'", dirty.display()));

    let mount = UextMount::new(&dirty, &dir, "ro");
    let text = std::fs::read_to_string(dir.join("a/b")).expect("read");
    mount.unmount();

    assert_eq!(text, "text\n");
    assert_eq!(before, sh(&format!("sha256sum < '{}'", dirty.display())));
}
