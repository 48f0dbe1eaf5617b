//! Space that runs out: told by the call that needs it and never by writeback, with every count
//! exact afterwards.
//!
//! The judges are e2fsck, which counts everything itself, and the contents after a remount.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use uext_blockdev::dm::SnapshotDevice;
use uext_blockdev::{BlockDevice, MemoryDevice};
use uext_ext4::Ext4;
use uext_ondisk::superblock::Superblock;
use uext_tests::run;
use uext_tests::tree::Rng;
use uext_vfs::{Context, Errno, FileHandle, FileSystem, Ino, ReadReply, SetAttr, WriteFlags};

use crate::disk::{Checker, Image, options};
use crate::model::Kind;
use crate::session::{May, ROOT, Session, walk};
use crate::workloads::Profile;

/// An ordinary user.
const USER: Context = Context { uid: 1000, gid: 1000, pid: 0, umask: 0 };
const FH: FileHandle = FileHandle(0);

/// What the superblock says is free: blocks and inodes.
fn free_on_disk(disk: &dyn BlockDevice) -> (u64, u64) {
    let bytes = disk.read_at(1024, 1024).expect("read the superblock");
    let sb = Superblock::parse(&bytes).expect("a superblock");
    (sb.free_blocks_count(), u64::from(sb.free_inodes_count()))
}

fn free_in_memory(fs: &Ext4) -> (u64, u64) {
    let free = fs.statfs(&ROOT).expect("statfs");
    (free.bfree, free.ffree)
}

/// Unmounts a filesystem that is in order: statfs(2) and the disk agree, and e2fsck agrees.
fn end(fs: &Ext4, disk: &Arc<SnapshotDevice>, checker: &Checker) -> Result<(), String> {
    fs.sync().map_err(|errno| format!("sync: {errno}"))?;
    let told = free_in_memory(fs);
    fs.unmount().map_err(|errno| format!("unmount: {errno}"))?;
    let found = free_on_disk(disk.as_ref());
    if told != found {
        return Err(format!("statfs told of {told:?} free blocks and inodes, {found:?} are"));
    }
    checker.clean(disk)
}

/// Runs a workload in which some allocations find no space; afterwards all is as it was told.
fn run_with(
    profile: Profile,
    image: Image,
    base: &Arc<Vec<u8>>,
    which: std::ops::Range<u64>,
    checker: &Checker,
) -> Result<(u64, u64), String> {
    let disk = SnapshotDevice::over_vec(base.clone());
    let fs = Ext4::mount(disk.clone(), "full", &options()).map_err(|error| error.to_string())?;
    let may = if which.is_empty() { May::Nothing } else { May::Enospc };
    let mut session = Session::new(fs.clone(), 1, image.has_journal(), may);
    fs.fail_allocations(which);
    profile.run(&mut session)?;
    let count = fs.allocations();
    fs.fail_allocations(0..0);
    session.model.all_durable();
    end(&fs, &disk, checker)?;
    let again = Ext4::mount(disk, "again", &options()).map_err(|error| error.to_string())?;
    let tree = walk(&*again)?;
    session.model.judge(&tree, false)?;
    again.unmount().map_err(|errno| format!("unmount: {errno}"))?;
    Ok((count, session.failed))
}

/// Each allocation of a run finds no space, alone or with all that follow.
pub fn sweep(name: &str, profile: Profile, image: Image) {
    let base = image.make(12, &["-m", "0", "-N", "1024"]);
    let checker = Checker::new(base.len());
    let (count, _) = run_with(profile, image, &base, 0..0, &checker).expect("a run with space");
    let most = std::env::var("UEXT_FAULT_POINTS").ok().and_then(|text| text.parse().ok());
    let stride = match most.unwrap_or(12u64) {
        0 => 1,
        most => (count / most).max(1),
    };
    let (begin, mut points, mut failed, mut failures) = (Instant::now(), 0, 0, Vec::new());
    for nth in (1..=count).step_by(stride as usize) {
        for which in [nth..nth + 1, nth..u64::MAX] {
            points += 1;
            match run_with(profile, image, &base, which.clone(), &checker) {
                Ok((_, more)) => failed += more,
                Err(error) => failures.push(format!("allocations {which:?}: {error}")),
            }
        }
        assert!(failures.len() < 6, "{name}:\n{}", failures.join("\n"));
    }
    let rate = f64::from(points) / begin.elapsed().as_secs_f64();
    println!(
        "{name}: {count} allocations, {points} points, {failed} calls failed, {rate:.0} points/s"
    );
    assert!(failures.is_empty(), "{name}:\n{}", failures.join("\n"));
}

/// A file that one thread writes, and what it must hold.
struct Writer {
    fs: Arc<Ext4>,
    name: String,
    ino: Ino,
    rng: Rng,
    bytes: Vec<u8>,
    refused: u64,
}

impl Writer {
    fn new(fs: &Arc<Ext4>, index: u64, seed: u64) -> Self {
        let name = format!("writer{index}");
        let made = fs.mknod(&USER, fs.root(), name.as_bytes(), libc::S_IFREG | 0o644, 0);
        let ino = made.expect("make a file").attr.ino;
        let rng = Rng(seed ^ index << 32);
        Self { fs: fs.clone(), name, ino, rng, bytes: Vec::new(), refused: 0 }
    }

    /// Writes at random places, far apart and close together, and sometimes cuts the file.
    fn run(&mut self, steps: u32, reach: u64) -> Result<(), String> {
        for _ in 0..steps {
            match self.rng.below(24) {
                0 => self.cut()?,
                1 => self.sync()?,
                _ => self.write(reach)?,
            }
        }
        Ok(())
    }

    fn write(&mut self, reach: u64) -> Result<(), String> {
        let reach = if self.rng.below(3) == 0 { reach } else { reach / 16 };
        let offset = self.rng.below(reach) as usize;
        let len = 1 + self.rng.below(20_000) as usize;
        let data = self.rng.bytes(len);
        let wrote = self.fs.write(&USER, self.ino, FH, offset as u64, &data, WriteFlags::empty());
        let count = match wrote {
            Ok(count) => count,
            Err(Errno::ENOSPC) => {
                self.refused += 1;
                0
            }
            Err(errno) => return Err(format!("{}: write: {errno}", self.name)),
        };
        if count > 0 {
            let end = offset + count;
            self.bytes.resize(self.bytes.len().max(end), 0);
            self.bytes[offset..end].copy_from_slice(&data[..count]);
        }
        Ok(())
    }

    fn cut(&mut self) -> Result<(), String> {
        let size = self.rng.below(self.bytes.len() as u64 + 1);
        let set = SetAttr { size: Some(size), ..SetAttr::default() };
        let done = self.fs.setattr(&USER, self.ino, &set);
        done.map_err(|errno| format!("{}: truncate: {errno}", self.name))?;
        self.bytes.truncate(size as usize);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), String> {
        let done = self.fs.fsync(&USER, self.ino, FH, self.rng.below(2) == 0);
        done.map_err(|errno| format!("{}: fsync: {errno}", self.name))
    }

    fn check(&self, fs: &Ext4) -> Result<(), String> {
        let entry = fs.lookup(&ROOT, fs.root(), self.name.as_bytes());
        let entry = entry.map_err(|errno| format!("{}: lookup: {errno}", self.name))?;
        let mut reply = ReadReply::new();
        fs.read(&ROOT, entry.attr.ino, FH, 0, self.bytes.len() + 1, &mut reply)
            .map_err(|errno| format!("{}: read: {errno}", self.name))?;
        let found = reply.to_vec();
        if found == self.bytes {
            return Ok(());
        }
        let at = found.iter().zip(&self.bytes).position(|(a, b)| a != b);
        let (have, want) = (found.len(), self.bytes.len());
        Err(format!("{}: {have} bytes of {want}, differ at {at:?}", self.name))
    }
}

/// Writes until nothing goes any more, then gives so many blocks back.
fn fill(fs: &Ext4, leave: u64) {
    let made = fs.mknod(&ROOT, fs.root(), b"ballast", libc::S_IFREG | 0o644, 0).expect("mknod");
    let (ino, chunk) = (made.attr.ino, vec![7; 64 << 10]);
    let mut size = 0;
    while let Ok(count) = fs.write(&ROOT, ino, FH, size, &chunk, WriteFlags::empty()) {
        size += count as u64;
    }
    let give = leave * u64::from(fs.statfs(&ROOT).expect("statfs").bsize);
    let set = SetAttr { size: Some(size.saturating_sub(give)), ..SetAttr::default() };
    fs.setattr(&ROOT, ino, &set).expect("truncate");
    fs.sync().expect("sync");
}

/// Several writers on a filesystem with little space left: what was accepted is there after a
/// remount, and writeback told of no error.
fn nearly_full(image: Image, seed: u64) -> Result<u64, String> {
    let base = image.make(12, &["-m", "2", "-N", "128"]);
    let checker = Checker::new(base.len());
    let disk = SnapshotDevice::over_vec(base);
    let fs = Ext4::mount(disk.clone(), "full", &options()).map_err(|error| error.to_string())?;
    let mut rng = Rng(seed);
    let mut writers: Vec<Writer> = (0..3).map(|index| Writer::new(&fs, index, seed)).collect();
    fill(&fs, 40 + rng.below(300));
    let reach = 1 << (18 + rng.below(8));
    let results: Vec<Result<(), String>> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            writers.iter_mut().map(|writer| scope.spawn(move || writer.run(120, reach))).collect();
        for step in 0..60 {
            // Names and attributes take their space from the same pool.
            let name = format!("dir{}", step % 7);
            match fs.mkdir(&USER, fs.root(), name.as_bytes(), 0o755) {
                Ok(entry) => fs.forget(entry.attr.ino, 1),
                Err(_) => drop(fs.rmdir(&USER, fs.root(), name.as_bytes())),
            }
        }
        threads.into_iter().map(|thread| thread.join().expect("a writer ends")).collect()
    });
    results.into_iter().collect::<Result<(), String>>()?;
    for writer in &mut writers {
        writer.sync()?;
        writer.check(&fs)?;
    }
    end(&fs, &disk, &checker)?;
    let again = Ext4::mount(disk, "again", &options()).map_err(|error| error.to_string())?;
    writers.iter().try_for_each(|writer| writer.check(&again))?;
    again.unmount().map_err(|errno| format!("unmount: {errno}"))?;
    Ok(writers.iter().map(|writer| writer.refused).sum())
}

/// [`nearly_full`] for many seeds.
pub fn nearly_full_property(name: &str, image: Image) {
    let only: Option<u64> = std::env::var("UEXT_SEED").ok().and_then(|text| text.parse().ok());
    let runs: u64 = std::env::var("UEXT_FULL_RUNS").ok().and_then(|t| t.parse().ok()).unwrap_or(6);
    let first = only.unwrap_or(1);
    let mut refused = 0;
    for seed in first..first + if only.is_some() { 1 } else { runs } {
        refused += nearly_full(image, seed).unwrap_or_else(|error| {
            panic!("UEXT_SEED={seed} cargo test -p uext-tests --test fault {name}\n    {error}")
        });
    }
    println!("{name}: {runs} runs, {refused} writes refused");
    assert!(only.is_some() || refused > 0, "space never ran out");
}

/// Everything that needs space, tried with exactly so many blocks free.
fn with_blocks_free(image: Image, free: u64) -> Result<(), String> {
    let base = image.make(12, &["-m", "0", "-N", "128"]);
    let checker = Checker::new(base.len());
    let disk = SnapshotDevice::over_vec(base);
    let fs = Ext4::mount(disk.clone(), "full", &options()).map_err(|error| error.to_string())?;
    let mut session = Session::new(fs.clone(), free, image.has_journal(), May::Enospc);
    session.make("old", Kind::File)?;
    session.write("old", 0, &[1; 3000])?;
    session.make("dir", Kind::Dir)?;
    for at in 0..14 {
        session.make(&format!("dir/{at}{}", "x".repeat(60)), Kind::File)?;
    }
    fill(&fs, free);
    session.write("old", 40_000_000, &[2; 5000])?;
    session.write("old", 1000, &[3; 9000])?;
    session.make("file", Kind::File)?;
    session.make("link", Kind::Link(vec![b'l'; 200]))?;
    session.make("dir/sub", Kind::Dir)?;
    for at in 0..30 {
        session.make(&format!("dir/{at}{}", "y".repeat(120)), Kind::File)?;
    }
    session.set_xattr("old", 700)?;
    session.write("file", 0, &[4; 300])?;
    session.truncate("old", 100)?;
    session.rename("file", &format!("dir/{}", "z".repeat(200)))?;
    session.write("old", 0, &[5; 4000])?;
    session.model.all_durable();
    let tree_of = |fs: &Ext4| {
        let mut tree = walk(fs)?;
        tree.remove("ballast");
        Ok::<BTreeMap<_, _>, String>(tree)
    };
    session.model.judge(&tree_of(&fs)?, false)?;
    end(&fs, &disk, &checker)?;
    let again = Ext4::mount(disk, "again", &options()).map_err(|error| error.to_string())?;
    session.model.judge(&tree_of(&again)?, false)?;
    again.unmount().map_err(|errno| format!("unmount: {errno}"))
}

/// [`with_blocks_free`] from none to a few.
pub fn few_blocks(image: Image) {
    for free in 0..9 {
        with_blocks_free(image, free)
            .unwrap_or_else(|error| panic!("{image:?} with {free} blocks free: {error}"));
    }
}

/// The reserved blocks are for root, the user and the group that the superblock names.
pub fn reserve(image: Image) {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file in /dev/shm");
    std::fs::write(file.path(), &*image.make(12, &["-m", "10", "-N", "128"])).expect("write it");
    run(Command::new("tune2fs").args(["-u", "77"]).arg(file.path()));
    let base = std::fs::read(file.path()).expect("read it");
    let disk = MemoryDevice::from_vec(base.clone());
    let fs = Ext4::mount(disk.clone(), "reserve", &options()).expect("mount");
    let file = fs.mknod(&USER, fs.root(), b"user", libc::S_IFREG | 0o666, 0).expect("mknod");
    let (ino, chunk) = (file.attr.ino, vec![7; 16 << 10]);
    let mut size = 0;
    while let Ok(count) = fs.write(&USER, ino, FH, size, &chunk, WriteFlags::empty()) {
        size += count as u64;
    }
    fs.sync().expect("sync");
    let kept = fs.statfs(&ROOT).expect("statfs");
    let reserved = Superblock::parse(&base[1024..2048]).expect("parse").reserved_blocks_count();
    // The worst case of a block map is three blocks of pointers.
    assert!(kept.bavail <= 3, "{} blocks are left that an ordinary user may use", kept.bavail);
    assert!(kept.bfree >= reserved, "{} blocks are left of {reserved} reserved", kept.bfree);
    let mkdir = |ctx: &Context, name: &str| fs.mkdir(ctx, fs.root(), name.as_bytes(), 0o755);
    let made = (0..4).find_map(|n| mkdir(&USER, &format!("user{n}")).err());
    assert_eq!(made, Some(Errno::ENOSPC), "a directory needs a block");
    assert!(fs.statfs(&ROOT).expect("statfs").bfree >= reserved, "metadata took reserved blocks");
    let named = Context { uid: 77, ..USER };
    let other = Context { uid: 78, ..USER };
    let write = |ctx: &Context| fs.write(ctx, ino, FH, size, &[1; 4096], WriteFlags::empty());
    assert_eq!(write(&other), Err(Errno::ENOSPC));
    assert_eq!(write(&named), Ok(4096), "the user that the superblock names");
    mkdir(&named, "named").expect("mkdir by the user that the superblock names");
    mkdir(&ROOT, "root").expect("mkdir by root");
    fs.unmount().expect("unmount");
}
