//! Shared mappings: two processes, msync, holes, and read(2) beside them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use uext_tests::scratch::Kind;
use uext_tests::tree::Rng;
use uext_tests::{require, run, uext};

use crate::{EXT4, Mounted, limited};
use uext_tests::mapping::Mapping;

const LEN: u64 = 6 << 20;
const PAGE: usize = 4096;

fn open(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).open(path).expect("open")
}

/// A python process that writes its byte into every second page through a mapping.
fn other_writer(path: &Path) -> Child {
    let program = "import mmap,sys\n\
        f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0)\n\
        for page in range(1, len(m) // 4096, 2):\n\
        \x20   m[page * 4096 + 100 : page * 4096 + 200] = b'p' * 100\n\
        \x20   if page % 401 == 0: m.flush()\n\
        m.flush(); m.close()\n";
    limited(60, "python3").args(["-c", program]).arg(path).spawn().expect("start python3")
}

fn two_processes_write(kind: Kind) {
    let mut mounted = Mounted::new(kind, 64);
    let path = mounted.path().join("shared");
    let file = open(&path);
    // A hole: the pages come to be by being written.
    file.set_len(LEN).expect("truncate");
    let mut child = other_writer(&path);
    let mapping = Mapping::new(&file, LEN);
    let mut rng = Rng(3);
    let mut expected = vec![0u8; usize::try_from(LEN).expect("fits")];
    for page in (0..expected.len() / PAGE).step_by(2) {
        let bytes = rng.bytes(100);
        let at = page * PAGE + 100;
        mapping.write(at, &bytes);
        expected[at..at + 100].copy_from_slice(&bytes);
        expected[at + PAGE..at + PAGE + 100].fill(b'p');
        if page % 500 == 0 {
            mapping.sync();
        }
    }
    mapping.sync();
    assert!(child.wait().expect("wait").success(), "the other process failed");
    let mut seen = vec![0u8; expected.len()];
    file.read_exact_at(&mut seen, 0).expect("read");
    assert!(seen == expected, "read(2) differs from what was mapped");
    mapping.read(0, &mut seen);
    assert!(seen == expected, "the mapping differs");
    drop((mapping, file));
    mounted.check_and_remount();
    assert!(std::fs::read(&path).expect("read") == expected, "it differs after a remount");
    mounted.finish();
}

#[test]
fn two_processes_write_one_shared_mapping() {
    require!("python3", "mke2fs", "e2fsck");
    two_processes_write(EXT4);
}

#[test]
fn two_processes_write_one_shared_mapping_on_ext2_with_small_blocks() {
    require!("python3", "mke2fs", "e2fsck");
    two_processes_write(Kind { fs: "ext2", block_size: 1024 });
}

#[test]
fn a_mapping_outlives_the_name_and_the_descriptor() {
    require!("mke2fs", "e2fsck");
    let mounted = Mounted::new(EXT4, 64);
    let path = mounted.path().join("gone");
    let file = open(&path);
    file.set_len(1 << 20).expect("truncate");
    let mapping = Mapping::new(&file, 1 << 20);
    std::fs::remove_file(&path).expect("unlink");
    drop(file);
    mapping.write(5000, b"still here");
    let mut seen = [0; 10];
    mapping.read(5000, &mut seen);
    assert_eq!(&seen, b"still here");
    mapping.sync();
    drop(mapping);
    mounted.finish();
}

/// Its only thread served the ioctl and, by telling the kernel what it had done, waited for the
/// write of a page that it had to serve.
#[test]
fn taking_a_range_out_beside_a_dirty_mapping_does_not_wait_for_itself() {
    require!("python3", "mke2fs", "e2fsck");
    let mounted = Mounted::with_options(EXT4, 64, "threads=1");
    let program = "import fcntl,mmap,os,struct,sys\n\
        f = open(sys.argv[1], 'w+b'); f.write(b'a' * 65536); f.flush(); os.fsync(f.fileno())\n\
        m = mmap.mmap(f.fileno(), 65536); m[40000:40003] = b'new'\n\
        fcntl.ioctl(f.fileno(), 0x40105503, struct.pack('QQ', 4096, 4096))\n\
        assert os.fstat(f.fileno()).st_size == 61440\n";
    let mut child = limited(60, "python3")
        .args(["-c", program])
        .arg(mounted.path().join("file"))
        .spawn()
        .expect("start python3");
    let end = Instant::now() + Duration::from_secs(30);
    let ended = loop {
        match child.try_wait().expect("wait") {
            None if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            ended => break ended,
        }
    };
    if ended.is_none() {
        // Nobody can kill it, but its connection can be aborted.
        run(Command::new(uext()).args(["umount", "--force"]).arg(mounted.path()));
    }
    assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
    mounted.finish();
}
