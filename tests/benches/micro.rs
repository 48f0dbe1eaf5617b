//! The hot parts, each alone and without a disk: `make bench-micro`.
//!
//! Images are made by mke2fs and live in memory. What is compared are two versions of
//! the code on one machine (`cargo bench -- --save-baseline NAME`), not machines.

#![allow(missing_docs, reason = "criterion's macro makes a public function")]

use std::hint::black_box;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use uext_blockdev::MemoryDevice;
use uext_ext4::{Ext4, MountOptions};
use uext_ondisk::checksum::crc32c;
use uext_ondisk::extent::{Extent, ExtentNode};
use uext_ondisk::{FsBlock, LogicalBlock};
use uext_pagecache::{
    AddressSpace, AddressSpaceOps, CacheConfig, PageCache, WritebackControl, WritebackError,
};
use uext_tests::run;
use uext_tests::scratch::{Kind, Scratch};
use uext_tests::tree::Rng;
use uext_vfs::{Context, FileHandle, FileSystem, Ino};

const ROOT: Context = Context { uid: 0, gid: 0, pid: 0, umask: 0 };

fn checksums(c: &mut Criterion) {
    let mut group = c.benchmark_group("crc32c");
    for size in [64, 1024, 4096] {
        let data = Rng(1).bytes(size);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(BenchmarkId::from_parameter(size), &data, |b, data| {
            b.iter(|| crc32c(!0, black_box(data)));
        });
    }
}

fn extents(c: &mut Criterion) {
    let mut group = c.benchmark_group("extent lookup");
    // In the inode; a full block of 4 KiB.
    for (bytes, count) in [(60, 4), (4096, 340)] {
        let mut node = ExtentNode::init(vec![0; bytes], 0);
        for n in 0..count {
            let extent = Extent {
                logical: LogicalBlock(n * 10),
                start: FsBlock(u64::from(n) * 20 + 1000),
                len: 8,
                unwritten: false,
            };
            node.insert_extent(n as usize, extent).expect("room for it");
        }
        let mut rng = Rng(2);
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| {
                let logical = LogicalBlock(rng.below(u64::from(count) * 10) as u32);
                let at = node.search(black_box(logical));
                at.and_then(|at| node.extent(at)).and_then(|extent| extent.map(logical))
            });
        });
    }
}

/// An inode whose pages nobody writes.
struct Nothing;

impl AddressSpaceOps for Nothing {
    fn writepages(
        &self,
        _space: &Arc<AddressSpace>,
        _control: &WritebackControl,
    ) -> Result<u64, WritebackError> {
        Ok(0)
    }
}

fn folios(c: &mut Criterion) {
    const PAGES: u64 = 10_000;
    let cache = PageCache::new(CacheConfig::default());
    let ops: Arc<dyn AddressSpaceOps> = Arc::new(Nothing);
    let weak: Weak<dyn AddressSpaceOps> = Arc::downgrade(&ops);
    let space = AddressSpace::new(&cache, 1, weak);
    for index in 0..PAGES {
        drop(space.find_or_create(index));
    }
    let mut rng = Rng(3);
    c.bench_function("folio lookup", |b| b.iter(|| space.find(rng.below(PAGES)).is_some()));
    c.bench_function("folio range of 32", |b| {
        b.iter(|| {
            let start = rng.below(PAGES - 32);
            space.find_range(start..start + 32).len()
        });
    });
}

/// A filesystem in memory.
fn filesystem() -> Arc<Ext4> {
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", Kind { fs: "ext4", block_size: 4096 }, 256 << 20, &[]);
    let dev = MemoryDevice::from_vec(std::fs::read(&image).expect("the image"));
    Ext4::mount(dev, "bench", &MountOptions::default()).expect("a mount")
}

fn names(c: &mut Criterion) {
    let fs = filesystem();
    let root = fs.root();
    let dir = fs.mkdir(&ROOT, root, b"dir", 0o755).expect("mkdir").attr.ino;
    let create = |name: &[u8]| -> Ino {
        fs.mknod(&ROOT, dir, name, libc::S_IFREG | 0o644, 0).expect("mknod").attr.ino
    };
    for n in 0..20_000 {
        let ino = create(format!("entry-{n:08}").as_bytes());
        fs.forget(ino, 1);
    }
    let mut n = 0u64;
    c.bench_function("name in and out of a directory of 20000", |b| {
        b.iter(|| {
            let name = format!("another-{n:010}");
            n += 1;
            let ino = create(name.as_bytes());
            fs.unlink(&ROOT, dir, name.as_bytes()).expect("unlink");
            fs.forget(ino, 1);
        });
    });
    let file = create(b"linked");
    c.bench_function("htree insert into a directory of 20000", |b| {
        // Only insertions are timed; in between the directory is emptied again of them, since
        // a file has 65,000 links at most.
        b.iter_custom(|times| {
            let name = |n: u64| format!("link-{n:012}").into_bytes();
            let (mut took, mut left) = (Duration::ZERO, times);
            while left > 0 {
                let some = left.min(1000);
                let start = Instant::now();
                for n in 0..some {
                    fs.link(&ROOT, file, dir, &name(n)).expect("link");
                    fs.forget(file, 1);
                }
                took += start.elapsed();
                for n in 0..some {
                    fs.unlink(&ROOT, dir, &name(n)).expect("unlink");
                }
                left -= some;
            }
            took
        });
    });
    let mut rng = Rng(4);
    c.bench_function("lookup in a directory of 20000", |b| {
        b.iter(|| {
            let name = format!("entry-{:08}", rng.below(20_000));
            let ino = fs.lookup(&ROOT, dir, name.as_bytes()).expect("lookup").attr.ino;
            fs.forget(ino, 1);
        });
    });
    c.bench_function("commit of one name", |b| {
        b.iter(|| {
            let name = format!("committed-{n:010}");
            n += 1;
            let ino = create(name.as_bytes());
            fs.fsyncdir(&ROOT, dir, FileHandle(0), false).expect("fsync");
            fs.unlink(&ROOT, dir, name.as_bytes()).expect("unlink");
            fs.forget(ino, 1);
        });
    });
    fs.unmount().expect("unmount");
}

fn all(c: &mut Criterion) {
    // Whoever has no mke2fs hears it before the long part.
    run(std::process::Command::new("mke2fs").arg("-V"));
    checksums(c);
    extents(c);
    folios(c);
    names(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
