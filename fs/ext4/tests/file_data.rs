//! File data against a model: random writes, truncations, reads, fsyncs and remounts on
//! every kind of filesystem, each judged by e2fsck after its unmount.

#![allow(clippy::unwrap_used, missing_docs)]

mod model_common;

use std::process::Command;
use std::sync::Arc;

use model_common::{Random, write_model};
use uext_blockdev::MemoryDevice;
use uext_ext4::{DataMode, Ext4, MountOptions};
use uext_vfs::{Context, Errno, FileHandle, FileSystem, Ino, ReadReply, SetAttr, WriteFlags};

const FH: FileHandle = FileHandle(0);
/// An ordinary user, who does not get root's reserved blocks.
const USER: Context = Context { uid: 1000, gid: 1000, pid: 1, umask: 0 };
const ROOT: Context = Context { uid: 0, gid: 0, pid: 1, umask: 0 };

const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE;

struct Image {
    dev: Arc<MemoryDevice>,
    fs: Arc<Ext4>,
    ino: Ino,
    block_mapped: bool,
    options: MountOptions,
}

impl Image {
    /// A new filesystem of `kib` KiB with one empty file.
    fn new(args: &[&str], kib: u32) -> Self {
        Self::with_options(args, kib, &options(8 << 20))
    }

    fn with_options(args: &[&str], kib: u32, options: &MountOptions) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let made = Command::new("mke2fs")
            .args(["-q", "-F"])
            .args(args)
            .arg(file.path())
            .arg(format!("{kib}k"))
            .status();
        assert!(made.expect("mke2fs is installed").success());
        let dev = MemoryDevice::from_vec(std::fs::read(file.path()).unwrap());
        let fs = Ext4::mount(dev.clone(), "test", options).unwrap();
        let entry = fs.mknod(&ROOT, fs.root(), b"file", 0o100_644, 0).unwrap();
        let block_mapped = !args.contains(&"ext4");
        Self { dev, fs, ino: entry.attr.ino, block_mapped, options: options.clone() }
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut reply = ReadReply::new();
        self.fs.read(&ROOT, self.ino, FH, offset, len, &mut reply).unwrap();
        reply.to_vec()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        self.fs.write(&ROOT, self.ino, FH, offset, data, WriteFlags::empty())
    }

    fn truncate(&self, size: u64) {
        let set = SetAttr { size: Some(size), ..SetAttr::default() };
        self.fs.setattr(&ROOT, self.ino, &set).unwrap();
    }

    fn unmount(&self) {
        self.fs.unmount().unwrap();
        fsck(&self.dev);
    }

    fn remount(&mut self) {
        self.unmount();
        self.fs = Ext4::mount(self.dev.clone(), "test", &self.options).unwrap();
        self.ino = self.fs.lookup(&ROOT, self.fs.root(), b"file").unwrap().attr.ino;
    }
}

/// With a cache so small that reclaim and the flusher are busy.
fn mount(dev: &Arc<MemoryDevice>) -> Arc<Ext4> {
    mount_with_cache(dev, 8 << 20)
}

fn mount_with_cache(dev: &Arc<MemoryDevice>, bytes: usize) -> Arc<Ext4> {
    Ext4::mount(dev.clone(), "test", &options(bytes)).unwrap()
}

fn options(cache_bytes: usize) -> MountOptions {
    MountOptions { cache_bytes: Some(cache_bytes), ..MountOptions::default() }
}

/// e2fsck finds nothing to repair.
fn fsck(dev: &MemoryDevice) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), dev.snapshot()).unwrap();
    let out = Command::new("e2fsck").arg("-fn").arg(file.path()).output().unwrap();
    assert!(out.status.success(), "e2fsck:\n{}", String::from_utf8_lossy(&out.stdout));
}

/// Random operations on one file; the model is its bytes.
fn run_model(args: &[&str], seed: u64, options: &MountOptions) {
    println!("mke2fs {args:?}, seed {seed}, {:?}", options.data_mode);
    let mut random = Random(seed);
    let mut image = Image::with_options(args, 24 * 1024, options);
    let mut model: Vec<u8> = Vec::new();
    const MOST: u64 = 3 << 20;
    for step in 0..400u64 {
        match random.below(125) {
            100..=124 => allocate_model(&image, &mut random, &mut model, step),
            0..=54 => {
                let offset = random.below(MOST);
                let len =
                    if random.below(4) == 0 { random.below(200_000) } else { random.below(9000) }
                        + 1;
                let byte = (step % 255) as u8 + 1;
                let data: Vec<u8> = (0..len).map(|at| byte ^ (at / 512) as u8).collect();
                assert_eq!(image.write(offset, &data), Ok(data.len()), "step {step}");
                write_model(&mut model, offset as usize, &data);
            }
            55..=64 => {
                let data = vec![step as u8 | 1; random.below(5000) as usize + 1];
                let flags = WriteFlags::APPEND;
                let done = image.fs.write(&ROOT, image.ino, FH, 0, &data, flags);
                assert_eq!(done, Ok(data.len()));
                model.extend_from_slice(&data);
            }
            65..=74 => {
                let size = if random.below(8) == 0 { 0 } else { random.below(MOST) };
                image.truncate(size);
                model.resize(size as usize, 0);
            }
            75..=89 => {
                let offset = random.below(MOST) as usize;
                let len = random.below(300_000) as usize;
                let end = (offset + len).min(model.len());
                let want = model.get(offset..end).unwrap_or(&[]);
                assert!(
                    image.read(offset as u64, len) == want,
                    "step {step}: read {offset} +{len}"
                );
            }
            90..=95 => image.fs.fsync(&ROOT, image.ino, FH, random.below(2) == 0).unwrap(),
            96..=97 => image.fs.sync().unwrap(),
            _ => image.remount(),
        }
        let attr = image.fs.getattr(&ROOT, image.ino).unwrap();
        assert_eq!(attr.size, model.len() as u64, "step {step}");
    }
    image.remount();
    assert!(image.read(0, 16 << 20) == model, "after the last remount");
    image.truncate(0);
    assert_eq!(image.fs.getattr(&ROOT, image.ino).unwrap().blocks, 0);
    image.unmount();
}

/// A random fallocate(2) within 3 MiB, also on the model.
fn allocate_model(image: &Image, random: &mut Random, model: &mut Vec<u8>, step: u64) {
    let modes = [0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE];
    let mode = modes[random.below(modes.len() as u64) as usize];
    let offset = random.below(3 << 20);
    let most = if random.below(4) == 0 { 600_000 } else { 9000 };
    let len = random.below(most) + 1;
    let done = image.fs.fallocate(&ROOT, image.ino, offset, len, mode);
    if done == Err(Errno::EOPNOTSUPP) {
        assert!(image.block_mapped && mode & PUNCH_HOLE == 0, "step {step}: mode {mode}");
        return;
    }
    assert_eq!(done, Ok(()), "step {step}: fallocate {offset} +{len} mode {mode}");
    let (offset, end) = (offset as usize, (offset + len) as usize);
    if mode & KEEP_SIZE == 0 && model.len() < end {
        model.resize(end, 0);
    }
    if mode & (PUNCH_HOLE | ZERO_RANGE) != 0 && offset < model.len() {
        let end = end.min(model.len());
        model[offset..end].fill(0);
    }
}

macro_rules! model_tests {
    ($($name:ident: $args:expr;)*) => { $(
        #[test]
        fn $name() {
            for seed in [1, 7, 0x9E37_79B9] {
                run_model(&$args, seed, &options(8 << 20));
            }
        }
    )* };
}

/// Through the smallest journals, and with a cache that loses pages before their blocks are home.
macro_rules! journal_model_tests {
    ($($name:ident: $args:expr;)*) => { $(
        #[test]
        fn $name() {
            let options =
                MountOptions { data_mode: Some(DataMode::Journal), ..options(2 << 20) };
            for seed in [2, 0x9E37_79B9] {
                run_model(&$args, seed, &options);
            }
        }
    )* };
}

journal_model_tests! {
    journalled_data_of_ext4_with_1k_blocks_holds_what_the_model_holds:
        ["-t", "ext4", "-b", "1024", "-J", "size=1"];
    journalled_data_of_ext4_with_4k_blocks_holds_what_the_model_holds:
        ["-t", "ext4", "-b", "4096", "-J", "size=4"];
    journalled_data_of_ext3_with_1k_blocks_holds_what_the_model_holds:
        ["-t", "ext3", "-b", "1024", "-J", "size=1"];
    journalled_data_of_ext3_with_4k_blocks_holds_what_the_model_holds:
        ["-t", "ext3", "-b", "4096", "-J", "size=4"];
}

model_tests! {
    ext4_of_1k_blocks_holds_what_the_model_holds: ["-t", "ext4", "-b", "1024"];
    ext4_of_2k_blocks_holds_what_the_model_holds: ["-t", "ext4", "-b", "2048"];
    ext4_of_4k_blocks_holds_what_the_model_holds: ["-t", "ext4", "-b", "4096"];
    ext3_of_1k_blocks_holds_what_the_model_holds: ["-t", "ext3", "-b", "1024"];
    ext3_of_4k_blocks_holds_what_the_model_holds: ["-t", "ext3", "-b", "4096"];
    ext2_of_1k_blocks_holds_what_the_model_holds: ["-t", "ext2", "-b", "1024"];
    ext2_of_4k_blocks_holds_what_the_model_holds: ["-t", "ext2", "-b", "4096"];
}

/// Fills the filesystem; what write(2) took must all reach the disk.
fn fill(args: &[&str]) {
    let mut image = Image::new(args, 4 * 1024);
    let (mut written, step) = (0u64, 3000usize);
    loop {
        let data = vec![(written / step as u64) as u8 | 1; step];
        match image.fs.write(&USER, image.ino, FH, written * 2, &data, WriteFlags::empty()) {
            Ok(done) => {
                written += done as u64;
                if done < step {
                    break;
                }
            }
            Err(error) => {
                assert_eq!(error, Errno::ENOSPC);
                break;
            }
        }
    }
    assert!(written > 1 << 20, "only {written} bytes fitted");
    image.fs.fsync(&ROOT, image.ino, FH, false).expect("no ENOSPC after write(2)");
    let before = image.read(0, 16 << 20);
    image.remount();
    assert!(image.read(0, 16 << 20) == before);
    image.truncate(0);
    let again = vec![5u8; 1 << 20];
    assert_eq!(image.write(0, &again), Ok(again.len()), "space comes back");
    image.unmount();
}

#[test]
fn running_out_of_space_is_the_error_of_write_alone() {
    fill(&["-t", "ext4", "-b", "1024", "-O", "^has_journal"]);
    fill(&["-t", "ext2", "-b", "1024"]);
    fill(&["-t", "ext4", "-b", "4096", "-O", "^has_journal"]);
}

#[test]
fn a_file_of_every_second_block_has_a_deep_tree_and_goes_again() {
    for kind in ["ext4", "ext2"] {
        let mut image = Image::new(&["-t", kind, "-b", "1024"], 40 * 1024);
        for at in 0..8000u64 {
            assert_eq!(image.write(at * 2048, &[at as u8 | 1; 1024]), Ok(1024));
        }
        image.remount();
        for at in (0..8000u64).step_by(97) {
            assert_eq!(image.read(at * 2048 + 1000, 48), {
                let mut want = vec![at as u8 | 1; 24];
                want.resize(if at == 7999 { 24 } else { 48 }, 0);
                want
            });
        }
        image.truncate(5000 * 2048 + 10);
        image.remount();
        image.truncate(0);
        image.unmount();
    }
}

#[test]
fn seek_tells_data_from_holes_also_when_it_is_delayed() {
    let mut image = Image::new(&["-t", "ext4", "-b", "4096"], 24 * 1024);
    image.write(1 << 20, &[1; 4096]).unwrap();
    image.truncate(4 << 20);
    for _ in 0..2 {
        let seek = |offset, whence| image.fs.lseek(&ROOT, image.ino, offset, whence);
        assert_eq!(seek(0, libc::SEEK_DATA), Ok(1 << 20));
        assert_eq!(seek(0, libc::SEEK_HOLE), Ok(0));
        assert_eq!(seek(1 << 20, libc::SEEK_HOLE), Ok((1 << 20) + 4096));
        assert_eq!(seek(2 << 20, libc::SEEK_DATA), Err(Errno::ENXIO));
        assert_eq!(seek(4 << 20, libc::SEEK_HOLE), Err(Errno::ENXIO));
        image.remount();
    }
    image.unmount();
}

#[test]
fn a_deleted_file_gives_back_every_block() {
    for kind in ["ext4", "ext3", "ext2"] {
        let image = Image::new(&["-t", kind, "-b", "1024"], 24 * 1024);
        image.fs.sync().unwrap();
        let before = image.fs.statfs(&ROOT).unwrap().bfree;
        image.write(0, &vec![3; 2 << 20]).unwrap();
        image.write(9 << 20, &[4; 5000]).unwrap();
        image.fs.fsync(&ROOT, image.ino, FH, false).unwrap();
        image.write(11 << 20, &[4; 70_000]).unwrap();
        image.fs.unlink(&ROOT, image.fs.root(), b"file").unwrap();
        // All lookups, however many were counted on the way.
        image.fs.forget(image.ino, u64::MAX);
        image.fs.sync().unwrap();
        assert_eq!(image.fs.statfs(&ROOT).unwrap().bfree, before);
        image.unmount();
    }
}

/// Whole batches of writeback at once, across groups and into double indirect blocks.
#[test]
fn a_long_sequential_write_comes_back_whole() {
    for kind in ["ext4", "ext3", "ext2"] {
        let mut image = Image::new(&["-t", kind, "-b", "1024"], 40 * 1024);
        image.unmount();
        // Room for all of it, so that writeback sees long runs.
        image.fs = mount_with_cache(&image.dev, 256 << 20);
        let data: Vec<u8> = (0..16u32 << 20).map(|at| (at / 1000) as u8).collect();
        assert_eq!(image.write(0, &data), Ok(data.len()));
        image.fs.fsync(&ROOT, image.ino, FH, false).unwrap();
        image.remount();
        // In pieces: what a reply lends cannot leave the cache, which is smaller than the file.
        let pieces = data.chunks(1 << 20).enumerate();
        for (at, piece) in pieces {
            assert!(image.read((at as u64) << 20, 1 << 20) == piece, "{kind}: MiB {at}");
        }
        image.truncate(100);
        image.unmount();
    }
}

/// What the kernel preallocated reads as zeroes, also beside what was written into it.
#[test]
fn unwritten_extents_read_as_zeroes_and_are_converted_by_parts() {
    let mut image = Image::new(&["-t", "ext4", "-b", "1024"], 24 * 1024);
    image.write(0, &[9; 1024]).unwrap();
    image.unmount();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image.dev.snapshot()).unwrap();
    // debugfs preallocates as fallocate(1) does: unwritten extents.
    let command = "fallocate /file 1 2000";
    let out =
        Command::new("debugfs").args(["-w", "-R", command]).arg(file.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let size = "set_inode_field /file size 2049024";
    assert!(
        Command::new("debugfs")
            .args(["-w", "-R", size])
            .arg(file.path())
            .status()
            .unwrap()
            .success()
    );
    image.dev = MemoryDevice::from_vec(std::fs::read(file.path()).unwrap());
    image.fs = mount(&image.dev);
    image.ino = image.fs.lookup(&ROOT, image.fs.root(), b"file").unwrap().attr.ino;
    let mut model = vec![0u8; 2_049_024];
    model[..1024].fill(9);
    let blocks = image.fs.getattr(&ROOT, image.ino).unwrap().blocks;
    assert!(blocks >= 4000, "{blocks} sectors: nothing was preallocated");
    assert!(image.read(0, 4 << 20) == model);
    for (at, len) in
        [(500_000, 3000), (40_000, 1), (2_048_000, 1024), (600_000, 200_000), (1024, 1024)]
    {
        image.write(at, &vec![7; len]).unwrap();
        model[at as usize..at as usize + len].fill(7);
        image.fs.fsync(&ROOT, image.ino, FH, true).unwrap();
    }
    image.remount();
    assert!(image.read(0, 4 << 20) == model);
    image.truncate(0);
    image.unmount();
}

/// Space that was allocated ahead is there when it is written, also when every second block is,
/// which splits extents, and nothing else is free: what write(2) takes reaches the disk.
#[test]
fn preallocated_space_takes_its_data_on_a_full_disk() {
    for block_size in ["1024", "4096"] {
        let mut image = Image::new(&["-t", "ext4", "-m", "0", "-b", block_size], 16 * 1024);
        let block: u64 = block_size.parse().unwrap();
        let stat = || image.fs.statfs(&ROOT).unwrap();
        let size = stat().bfree * block * 3 / 4;
        image.fs.fallocate(&USER, image.ino, 0, size, 0).unwrap();
        let filler = image.fs.mknod(&ROOT, image.fs.root(), b"filler", 0o100_644, 0).unwrap();
        let filler = filler.attr.ino;
        let data = vec![7; block as usize];
        let mut at = 0;
        while image.fs.write(&USER, filler, FH, at, &data, WriteFlags::empty()).is_ok() {
            at += block;
        }
        image.fs.fsync(&ROOT, filler, FH, false).unwrap();

        let mut written = Vec::new();
        for at in (0..size / block).step_by(2) {
            match image.fs.write(&USER, image.ino, FH, at * block, &data, WriteFlags::empty()) {
                Ok(_) => written.push(at),
                Err(error) => {
                    // Nodes for so many extents may not fit, but write(2) has to say it.
                    assert_eq!(error, Errno::ENOSPC);
                    break;
                }
            }
        }
        image.fs.fsync(&ROOT, image.ino, FH, false).expect("no ENOSPC after write(2)");
        image.remount();

        for &at in &written {
            assert!(image.read(at * block, block as usize) == data, "block {at}");
            assert!(image.read((at + 1) * block, block as usize).iter().all(|&b| b == 0));
        }
        image.unmount();
    }
}

/// An allocation that does not fit changes nothing.
#[test]
fn an_allocation_without_space_leaves_size_and_space() {
    let image = Image::new(&["-t", "ext4", "-b", "1024"], 8 * 1024);
    let before = image.fs.statfs(&ROOT).unwrap();

    let done = image.fs.fallocate(&USER, image.ino, 0, 64 << 20, 0);

    assert_eq!(done, Err(Errno::ENOSPC));
    let attr = image.fs.getattr(&ROOT, image.ino).unwrap();
    assert_eq!((attr.size, attr.blocks), (0, 0));
    assert_eq!(image.fs.statfs(&ROOT).unwrap(), before);
    image.unmount();
}
