//! The daemon's memory: its resident size is what `cache_size` says and at most 64 MiB for
//! itself, whatever was read, written, mapped, made, looked at and removed, and however large
//! the filesystem is; a large image mounts at once.
//!
//! `make memory` does it with 1,000,000 files and 8 GiB on a release build.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use uext_tests::mapping::Mapping;
use uext_tests::mounts::UextMount;
use uext_tests::scratch::{Kind, Scratch, assert_clean};
use uext_tests::tree::Rng;
use uext_tests::{require, run};

const EXT4: Kind = Kind { fs: "ext4", block_size: 4096 };
/// What the daemon may take beside its cache, MiB.
const OWN_MIB: u64 = 64;
/// Longest mount of a large image; a debug build is some ten times slower.
const MOUNT: Duration = Duration::from_millis(if cfg!(debug_assertions) { 3000 } else { 300 });
/// Files in each directory.
const EACH: u32 = 1000;
/// Threads that read and write at the same time.
const THREADS: u64 = 16;

struct Sizes {
    cache_mib: u64,
    /// Written in small pieces, and again in large ones.
    data_mib: u64,
    files: u32,
}

fn sizes() -> Sizes {
    if std::env::var_os("UEXT_TEST_FULL").is_some() {
        Sizes { cache_mib: 64, data_mib: 2048, files: 1_000_000 }
    } else {
        Sizes { cache_mib: 16, data_mib: 64, files: 20_000 }
    }
}

/// The daemon's largest resident size so far, MiB.
fn most_resident(mount: &UextMount) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", mount.daemon()));
    let status = status.expect("the daemon's status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).expect("a size in kB");
    kib.trim().parse::<u64>().expect("a number").div_ceil(1024)
}

fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").expect("drop the kernel's caches");
}

/// A mount that is asked for its size after each piece of work.
struct Watched {
    mount: UextMount,
    cache_mib: u64,
}

impl Watched {
    fn new(image: &Path, dir: &Path, cache_mib: u64, more: &str) -> Self {
        let mount = UextMount::new(image, dir, &format!("cache_size={cache_mib}M{more}"));
        Self { mount, cache_mib }
    }

    fn keeps_to_it(&self, after: &str) {
        let most = most_resident(&self.mount);
        eprintln!("{after}: {most} MiB with a cache of {} MiB", self.cache_mib);
        assert!(most <= self.cache_mib + OWN_MIB, "{most} MiB after {after}");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.mount.path().join(name)
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).expect("open a file")
}

fn write(path: &Path, piece: usize, mib: u64) {
    let piece = vec![7; piece];
    let mut file = File::create(path).expect("create a file");
    for _ in 0..(mib << 20) / piece.len() as u64 {
        file.write_all(&piece).expect("write");
    }
    file.sync_all().expect("fsync");
}

fn read(path: &Path, piece: usize) {
    let (mut file, mut piece) = (File::open(path).expect("open a file"), vec![0; piece]);
    while file.read(&mut piece).expect("read") > 0 {}
}

fn one_after_the_other(mount: &Watched, data_mib: u64) {
    let (small, large) = (mount.path("small"), mount.path("large"));
    write(&small, 4096, data_mib);
    mount.keeps_to_it("small writes");
    write(&large, 1 << 20, data_mib);
    mount.keeps_to_it("large writes");
    drop_caches();
    read(&small, 1 << 20);
    read(&large, 4096);
    mount.keeps_to_it("reads");
    let (file, mut rng, mut block) = (open(&large), Rng(1), [0; 4096]);
    for _ in 0..data_mib * 64 {
        let at = rng.below(data_mib << 8) << 12;
        file.read_exact_at(&mut block, at).expect("read");
        file.write_all_at(&block, at).expect("write");
    }
    file.sync_all().expect("fsync");
    mount.keeps_to_it("random reads and writes");
}

fn mapped(mount: &Watched, data_mib: u64) {
    drop_caches();
    let map = Mapping::new(&open(&mount.path("small")), data_mib << 20);
    let mut piece = vec![0; 1 << 20];
    for mib in 0..usize::try_from(data_mib).expect("fits") {
        map.read(mib << 20, &mut piece);
        piece[..8192].fill(9);
        map.write(mib << 20, &piece[..8192]);
    }
    map.sync();
    mount.keeps_to_it("a mapping read and written");
}

/// Each thread has a file of its own, and they share one.
fn all_at_once(mount: &Watched, data_mib: u64) {
    let shared = mount.path("large");
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (mine, shared) = (mount.path(&format!("of-{thread}")), &shared);
            scope.spawn(move || {
                write(&mine, 1 << 20, data_mib / THREADS);
                read(shared, 1 << 20);
                read(&mine, 128 << 10);
            });
        }
    });
    mount.keeps_to_it("16 threads");
    for thread in 0..THREADS {
        fs::remove_file(mount.path(&format!("of-{thread}"))).expect("remove a file");
    }
}

fn directory(mount: &Watched, n: u32) -> PathBuf {
    mount.path(&format!("d{}", n / EACH))
}

fn many_files(mount: &Watched, files: u32) {
    for n in 0..files {
        let dir = directory(mount, n);
        if n % EACH == 0 {
            fs::create_dir(&dir).expect("make a directory");
        }
        drop(File::create(dir.join(n.to_string())).expect("make a file"));
    }
    mount.keeps_to_it("files made");
    for round in ["files looked at", "files looked at again"] {
        let mut seen = 0;
        for n in (0..files).step_by(EACH as usize) {
            for entry in fs::read_dir(directory(mount, n)).expect("read a directory") {
                entry.expect("an entry").metadata().expect("attributes");
                seen += 1;
            }
        }
        assert_eq!(seen, files);
        mount.keeps_to_it(round);
        drop_caches();
    }
    for n in (0..files).step_by(EACH as usize).skip(1) {
        fs::remove_dir_all(directory(mount, n)).expect("remove a directory");
    }
    mount.keeps_to_it("files removed");
}

fn all(engine: &str) {
    let sizes = sizes();
    let scratch = Scratch::new();
    let inodes = (sizes.files + 10_000).to_string();
    let image = scratch.mkfs("image", EXT4, (2 * sizes.data_mib) << 21, &["-N", &inodes]);
    let more = format!(",engine={engine}");
    let mount = Watched::new(&image, &scratch.mount_point("m"), sizes.cache_mib, &more);
    one_after_the_other(&mount, sizes.data_mib);
    mapped(&mount, sizes.data_mib);
    all_at_once(&mount, sizes.data_mib);
    many_files(&mount, sizes.files);
    mount.mount.unmount();
    assert_clean(&image);
}

/// With a cache of 64 MiB 200,000 files took the daemon to 134: what was kept about pages and
/// inodes was not counted, and inodes were kept by number alone.
#[test]
fn a_daemon_with_io_uring_keeps_to_its_cache_and_64_mib() {
    require!("mke2fs", "e2fsck");
    all("uring");
}

#[test]
fn a_daemon_with_linux_aio_keeps_to_its_cache_and_64_mib() {
    require!("mke2fs", "e2fsck");
    all("aio");
}

#[test]
fn an_image_of_a_tebibyte_mounts_at_once_and_in_64_mib() {
    require!("mke2fs", "e2fsck");
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", EXT4, 1 << 40, &["-E", "lazy_itable_init=1"]);
    let dir = scratch.mount_point("m");
    // Warm: what the first mount reads is the program itself.
    UextMount::new(&image, &dir, "").unmount();
    let mut fastest = Duration::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        let mount = UextMount::new(&image, &dir, "");
        fastest = fastest.min(start.elapsed());
        fs::write(mount.path().join("file"), "contents").expect("write a file");
        nix::sys::statvfs::statvfs(mount.path()).expect("statfs");
        let most = most_resident(&mount);
        mount.unmount();
        assert!(most <= OWN_MIB, "{most} MiB");
    }
    eprintln!("mounted in {fastest:?}");
    assert!(fastest < MOUNT, "{fastest:?}");
    assert_clean(&image);
}

/// The bitmap of each group that was once allocated from stayed in memory, and the journal kept
/// metadata as its log had room for: a cache of 16 MiB became 180.
#[test]
fn a_filesystem_of_20000_groups_takes_no_more_when_all_are_used() {
    require!("mke2fs", "e2fsck", "fallocate");
    let scratch = Scratch::new();
    let groups = ["-g", "2048", "-N", "65536", "-O", "^resize_inode,^64bit"];
    let image = scratch.mkfs("image", EXT4, 160 << 30, &groups);
    let mount = Watched::new(&image, &scratch.mount_point("m"), 16, "");
    let allocate = || {
        run(Command::new("fallocate").args(["-l", "150G"]).arg(mount.path("file")));
        mount.keeps_to_it("150 GiB allocated");
    };
    allocate();
    // Blocks that were freed come back into the bitmaps.
    fs::remove_file(mount.path("file")).expect("remove the file");
    allocate();
    mount.mount.unmount();
    assert_clean(&image);
}
