//! The daemon's memory: its resident size is what `cache_size` says and at most 64 MiB for
//! itself, whatever was read, written, made and looked at; a large image mounts at once.
//!
//! `make memory` does it with 1,000,000 files and 8 GiB on a release build.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use uext_tests::mounts::UextMount;
use uext_tests::require;
use uext_tests::scratch::{Kind, Scratch, assert_clean};
use uext_tests::tree::Rng;

const EXT4: Kind = Kind { fs: "ext4", block_size: 4096 };
/// What the daemon may take beside its cache, MiB.
const OWN_MIB: u64 = 64;
/// Longest mount of a large image; a debug build is some ten times slower.
const MOUNT: Duration = Duration::from_millis(if cfg!(debug_assertions) { 3000 } else { 300 });

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
        Sizes { cache_mib: 16, data_mib: 64, files: 40_000 }
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
    most: u64,
    cache_mib: u64,
}

impl Watched {
    fn new(image: &Path, dir: &Path, cache_mib: u64, more: &str) -> Self {
        let mount = UextMount::new(image, dir, &format!("cache_size={cache_mib}M{more}"));
        Self { mount, most: 0, cache_mib }
    }

    fn holds(&mut self, after: &str) {
        self.most = most_resident(&self.mount);
        eprintln!("{after}: {} MiB with a cache of {} MiB", self.most, self.cache_mib);
        assert!(self.most <= self.cache_mib + OWN_MIB, "{} MiB after {after}", self.most);
    }

    fn path(&self) -> &Path {
        self.mount.path()
    }
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

fn read_and_write(mount: &mut Watched, data_mib: u64) {
    let (small, large) = (mount.path().join("small"), mount.path().join("large"));
    write(&small, 4096, data_mib);
    mount.holds("small writes");
    write(&large, 1 << 20, data_mib);
    mount.holds("large writes");
    drop_caches();
    read(&small, 1 << 20);
    read(&large, 4096);
    mount.holds("reads");
    let file = File::options().read(true).write(true).open(&large).expect("open a file");
    let (mut rng, mut block) = (Rng(1), [0; 4096]);
    for _ in 0..data_mib * 64 {
        let at = rng.below(data_mib << 8) << 12;
        file.read_exact_at(&mut block, at).expect("read");
        file.write_all_at(&block, at).expect("write");
    }
    file.sync_all().expect("fsync");
    mount.holds("random reads and writes");
}

fn make_and_look(mount: &mut Watched, files: u32) {
    const EACH: u32 = 1000;
    let dir = |n: u32| mount.mount.path().join(format!("d{}", n / EACH));
    for n in 0..files {
        if n % EACH == 0 {
            fs::create_dir(dir(n)).expect("make a directory");
        }
        drop(File::create(dir(n).join(n.to_string())).expect("make a file"));
    }
    mount.holds("files made");
    for round in ["files looked at", "files looked at again"] {
        let mut seen = 0;
        for n in (0..files).step_by(EACH as usize) {
            let dir = mount.mount.path().join(format!("d{}", n / EACH));
            for entry in fs::read_dir(dir).expect("read a directory") {
                entry.expect("an entry").metadata().expect("attributes");
                seen += 1;
            }
        }
        assert_eq!(seen, files);
        mount.holds(round);
        drop_caches();
    }
}

fn all(engine: &str) {
    let sizes = sizes();
    let scratch = Scratch::new();
    let inodes = (sizes.files + 10_000).to_string();
    let image = scratch.mkfs("image", EXT4, (2 * sizes.data_mib) << 21, &["-N", &inodes]);
    let more = format!(",engine={engine}");
    let mut mount = Watched::new(&image, &scratch.mount_point("m"), sizes.cache_mib, &more);
    read_and_write(&mut mount, sizes.data_mib);
    make_and_look(&mut mount, sizes.files);
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
