//! Power cuts: fixed workloads run over a recording device, and every disk that a cut
//! may leave is mounted, compared with what was promised, and checked.
//!
//! Judged are all moments at which something is about to become durable, with all,
//! none and chosen subsets of what is volatile then, and the prefixes of the completed
//! writes, evenly sampled where they are too many. Each state is replayed by our mount
//! and checked by our fsck; what is durable alone at each flush boundary and a part of the
//! rest also by e2fsck, with its own replay.
//!
//! A failure prints the line that repeats it, such as
//! `UEXT_CRASH_CUT=prefix:17 cargo test -p uext-tests --test crash rename`.
//! `UEXT_CRASH_STATES` sets how many prefixes a workload tests (all: 0). With
//! `UEXT_CRASH_KERNEL=all` every prefix is tested, and every state goes to e2fsck as well.

mod cuts;
mod history;
mod identity;
mod judges;
mod recorder;
mod workloads;

use std::process::Command;
use std::sync::Arc;

use uext_tests::{require, run};

use crate::recorder::Recorder;

/// An image to start with.
#[derive(Clone, Copy)]
enum Image {
    /// ext4 as mke2fs makes it today, 4 KiB blocks.
    Ext4,
    /// ext4 with 1 KiB blocks.
    Small,
    /// ext3, 4 KiB blocks.
    Ext3,
}

impl Image {
    fn make(self) -> Vec<u8> {
        const BYTES: u64 = 16 << 20;
        let file = tempfile::Builder::new().prefix("uext-crash-").tempfile_in("/dev/shm");
        let file = file.expect("a file in /dev/shm");
        file.as_file().set_len(BYTES).expect("size an image");
        let mut mkfs = Command::new("mke2fs");
        mkfs.args(["-q", "-F", "-m", "0", "-N", "2048"]);
        mkfs.args(["-U", "0123abcd-4567-89ab-cdef-0123456789ab"]);
        mkfs.args(["-E", "hash_seed=01234567-89ab-cdef-0123-456789abcdef"]);
        match self {
            Self::Ext4 => mkfs.args(["-t", "ext4", "-b", "4096", "-J", "size=4"]),
            Self::Small => mkfs.args(["-t", "ext4", "-b", "1024", "-J", "size=1"]),
            Self::Ext3 => mkfs.args(["-t", "ext3", "-b", "4096", "-J", "size=4"]),
        };
        if !matches!(self, Self::Ext3) {
            mkfs.args(["-O", "metadata_csum_seed,orphan_file"]);
        }
        run(mkfs.arg(file.path()));
        std::fs::read(file.path()).expect("read an image")
    }
}

/// Runs a workload and judges its cuts.
fn crash(name: &str, image: Image, work: impl FnOnce(&mut Recorder)) {
    let base = Arc::new(image.make());
    let mut recorder = Recorder::new(&base, 1);
    work(&mut recorder);
    let (log, history) = recorder.finish();
    cuts::judge_all(name, &base, &log, &history);
}

/// Runs a workload and compares what three replays make of its cuts.
fn identity(name: &str, image: Image, work: impl FnOnce(&mut Recorder)) -> usize {
    let base = Arc::new(image.make());
    let mut recorder = Recorder::new(&base, 1);
    work(&mut recorder);
    let (log, _) = recorder.finish();
    identity::compare(name, &base, &log)
}

macro_rules! crash_tests {
    ($($name:ident: $image:ident;)*) => {
        $(
            #[test]
            fn $name() {
                require!("mke2fs", "e2fsck");
                crash(stringify!($name), Image::$image, workloads::$name);
            }
        )*

        #[test]
        fn replays_leave_the_same_blocks() {
            require!("mke2fs", "e2fsck", "debugfs", "losetup");
            let mut same = 0;
            $(same += identity(stringify!($name), Image::$image, workloads::$name);)*
            println!("{same} states: uext, e2fsck and the kernel leave the same blocks");
            assert!(same > 20);
        }
    };
}

crash_tests! {
    create_and_fsync: Ext4;
    rename_across_directories: Small;
    replace_by_rename: Ext4;
    unlink_while_open: Ext4;
    truncate_and_extend: Ext3;
    append_and_fsync: Small;
    many_small_files: Small;
    attributes_and_acls: Ext4;
    growing_directory: Small;
    links: Ext3;
    delete_and_reuse: Ext3;
    delete_and_reuse_small: Small;
    long_extents: Ext4;
    log_that_wraps: Small;
}
