//! Far more groups than bitmaps are kept for: whatever is dropped and loaded again, no block
//! is given away twice, and none is lost. e2fsck judges.
#![allow(clippy::unwrap_used, missing_docs)]

mod names_common;

use names_common::{Image, ROOT, Random};
use uext_ext4::{Ext4, MountOptions};
use uext_vfs::{Errno, FileHandle, FileSystem, Ino, WriteFlags};

/// Blocks of 1 KiB.
const BLOCK: u64 = 1024;

/// Makes a file of so many blocks; the data of half of them is left to writeback.
fn make(fs: &Ext4, name: &str, blocks: u64) -> Result<Ino, Errno> {
    let mode = libc::S_IFREG | 0o644;
    let ino = fs.mknod(&ROOT, fs.root(), name.as_bytes(), mode, 0)?.attr.ino;
    let data = vec![blocks as u8; (blocks * BLOCK) as usize];
    let written = fs.write(&ROOT, ino, FileHandle::default(), 0, &data, WriteFlags::empty())?;
    if blocks.is_multiple_of(2) {
        fs.fsync(&ROOT, ino, FileHandle::default(), false)?;
    }
    // As much as there is room for.
    if written == data.len() { Ok(ino) } else { Err(Errno::ENOSPC) }
}

fn remove(fs: &Ext4, name: &str, ino: Ino) {
    fs.unlink(&ROOT, fs.root(), name.as_bytes()).unwrap();
    fs.forget(ino, 1);
}

/// Fills and empties the filesystem at random, twice to the last block.
fn fill_and_empty(journal: &str) {
    // 256 groups; the least cache has bitmaps of 64.
    let features = format!("^64bit,^resize_inode,{journal}");
    let args = ["-t", "ext4", "-b", "1024", "-g", "256", "-m", "0", "-N", "8192", "-O", &features];
    let image = Image::new(64, &args);
    let options = MountOptions { cache_bytes: Some(4 << 20), ..MountOptions::default() };
    let fs = image.mount_with(&options);
    let (mut random, mut files, mut number) = (Random(5), Vec::new(), 0);
    for round in 0..2 {
        loop {
            number += 1;
            let name = format!("file{number}");
            match make(&fs, &name, 1 + random.below(if round == 1 { 40 } else { 400 })) {
                Ok(ino) => files.push((name, ino)),
                Err(error) => break assert_eq!(error, Errno::ENOSPC, "{name}"),
            }
            if random.below(4) == 0 && files.len() > 1 {
                let (name, ino) = files.swap_remove(random.below(files.len() as u64) as usize);
                remove(&fs, &name, ino);
            }
        }
        while files.len() > 50 {
            let (name, ino) = files.swap_remove(random.below(files.len() as u64) as usize);
            remove(&fs, &name, ino);
        }
    }
    image.check(&fs);
}

#[test]
fn groups_whose_bitmaps_come_and_go_lose_no_block_with_a_journal() {
    fill_and_empty("has_journal");
}

#[test]
fn groups_whose_bitmaps_come_and_go_lose_no_block_without_a_journal() {
    fill_and_empty("^has_journal");
}
