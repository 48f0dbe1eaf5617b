//! A file that is being deleted when something else happens.
#![allow(clippy::unwrap_used, missing_docs)]

mod modes_common;

use std::sync::Arc;
use std::time::Duration;

use modes_common::{FH, ROOT, fsck, image, ino, options};
use uext_blockdev::{Bio, BioOp, BlkResult, BlockDevice, MemoryDevice, QueueLimits};
use uext_ext4::Ext4;
use uext_vfs::{FileSystem, Ino, WriteFlags};

/// A disk that takes its time over each read.
struct Slow(Arc<MemoryDevice>);

impl Slow {
    fn delay(bio: &Bio) {
        if bio.op() == BioOp::Read {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl BlockDevice for Slow {
    fn limits(&self) -> &QueueLimits {
        self.0.limits()
    }

    fn submit_bio(&self, bio: Bio) {
        Self::delay(&bio);
        self.0.submit_bio(bio);
    }

    fn submit_bio_wait(&self, bio: Bio) -> BlkResult<Bio> {
        Self::delay(&bio);
        self.0.submit_bio_wait(bio)
    }
}

/// A disk with a file that takes long to delete, mounted, and the file, which is unlinked.
fn slow_deletion() -> (Arc<MemoryDevice>, Arc<Ext4>, Ino) {
    // Each of these blocks of data has an indirect block of its own.
    const BLOCKS: u64 = 400;
    const STEP: u64 = 256 << 10;
    let memory = MemoryDevice::from_vec(image(16, &["-t", "ext3", "-b", "1024"], &[]));
    let fs = Ext4::mount(memory.clone(), "test", &options(None)).unwrap();
    let file = fs.mknod(&ROOT, fs.root(), b"file", 0o100_644, 0).unwrap().attr.ino;
    for n in 0..BLOCKS {
        fs.write(&ROOT, file, FH, n * STEP, b"data", WriteFlags::empty()).unwrap();
    }
    fs.unmount().unwrap();
    drop(fs);

    let slow = Arc::new(Slow(memory.clone()));
    let fs = Ext4::mount(slow, "test", &options(None)).unwrap();
    let file = ino(&fs, "file");
    fs.unlink(&ROOT, fs.root(), b"file").unwrap();
    (memory, fs, file)
}

/// The kernel's last forget deletes the file, and its goodbye may come to another worker
/// meanwhile.
#[test]
fn an_unmount_waits_for_a_deletion_that_has_begun() {
    let (memory, fs, file) = slow_deletion();
    std::thread::scope(|scope| {
        let deletion = scope.spawn(|| fs.forget(file, 1));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!deletion.is_finished(), "there is nothing to wait for");
        fs.unmount().unwrap();
    });
    fsck(&memory.snapshot());
}

/// `rm file; sync; fstrim` found the file's blocks in use.
#[test]
fn a_sync_waits_for_a_deletion_that_has_begun() {
    let (memory, fs, file) = slow_deletion();
    let before = fs.statfs(&ROOT).unwrap().bfree;
    std::thread::scope(|scope| {
        let deletion = scope.spawn(|| fs.forget(file, 1));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!deletion.is_finished(), "there is nothing to wait for");
        fs.sync().unwrap();
        assert!(fs.statfs(&ROOT).unwrap().bfree >= before + 2 * 400, "it is not gone");
    });
    fs.unmount().unwrap();
    fsck(&memory.snapshot());
}
