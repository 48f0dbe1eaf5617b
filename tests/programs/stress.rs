//! Parallel load: several processes do random things to one tree.
//!
//! Each worker is a process of its own (this test's program, started again), names
//! collide on purpose, and errors that collisions explain are expected.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use uext_tests::require;
use uext_tests::scratch::Kind;
use uext_tests::tree::{Rng, assert_same, listing, without_blocks};

use crate::{EXT4, Mounted};

const ROOT: &str = "UEXT_STRESS_ROOT";
const SEED: &str = "UEXT_STRESS_SEED";
const WORKERS: u64 = 4;
const DIRS: u64 = 6;
const NAMES: u64 = 40;

/// What a collision with another worker, or a full disk, may come to.
const EXPECTED: [i32; 14] = [
    libc::ENOENT,
    libc::EEXIST,
    libc::ENOTDIR,
    libc::EISDIR,
    libc::ENOTEMPTY,
    libc::EINVAL,
    libc::ELOOP,
    libc::ENOSPC,
    libc::EXDEV,
    libc::EMLINK,
    libc::ENODATA,
    libc::EPERM,
    libc::ESTALE,
    libc::ENXIO,
];

struct Worker {
    root: PathBuf,
    rng: Rng,
}

impl Worker {
    fn name(&mut self) -> PathBuf {
        let mut path = self.root.clone();
        for _ in 0..self.rng.below(3) {
            path.push(format!("dir{}", self.rng.below(DIRS)));
        }
        let n = self.rng.below(NAMES);
        // Some names are long, so that directories have several blocks.
        path.push(format!("f{n}{}", "-".repeat(if n.is_multiple_of(5) { 200 } else { 0 })));
        path
    }

    fn dir(&mut self) -> PathBuf {
        let mut path = self.root.clone();
        for _ in 0..=self.rng.below(3) {
            path.push(format!("dir{}", self.rng.below(DIRS)));
        }
        path
    }

    fn write(&mut self) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).open(self.name())?;
        let len = self.rng.below(50_000) as usize;
        file.write_all_at(&self.rng.bytes(len), self.rng.below(300_000))
    }

    fn read(&mut self) -> io::Result<()> {
        fs::read(self.name()).map(drop)
    }

    fn truncate(&mut self) -> io::Result<()> {
        let len = self.rng.below(400_000);
        OpenOptions::new().write(true).open(self.name())?.set_len(len)
    }

    fn rename(&mut self) -> io::Result<()> {
        let (from, to) = if self.rng.below(4) == 0 {
            (self.dir(), self.dir())
        } else {
            (self.name(), self.name())
        };
        fs::rename(from, to)
    }

    fn attribute(&mut self) -> io::Result<()> {
        let name = format!("user.a{}", self.rng.below(4));
        let path = self.name();
        if self.rng.below(4) == 0 {
            return xattr::remove(path, name);
        }
        let len = self.rng.below(700) as usize;
        xattr::set(path, name, &self.rng.bytes(len))
    }

    /// A file is used after its name has gone: somebody's, whom others may be writing to,
    /// or one that only this worker knows and that has to hold what was written.
    fn orphan(&mut self) -> io::Result<()> {
        let shared = self.rng.below(2) == 0;
        let own = self.root.join(format!("own{}", std::process::id()));
        let path = if shared { self.name() } else { own };
        let file = File::options().read(true).write(true).create_new(!shared).open(&path)?;
        fs::remove_file(&path)?;
        file.write_all_at(b"orphan", 10_000)?;
        file.set_len(12_345)?;
        let mut bytes = [0; 6];
        file.read_exact_at(&mut bytes, 10_000)?;
        assert!(shared || &bytes == b"orphan", "another's bytes: {bytes:?}");
        Ok(())
    }

    fn step(&mut self) -> io::Result<()> {
        match self.rng.below(100) {
            0..26 => self.write(),
            26..40 => self.read(),
            40..48 => self.truncate(),
            48..60 => fs::remove_file(self.name()),
            60..70 => self.rename(),
            70..75 => fs::hard_link(self.name(), self.name()),
            75..79 => {
                let len = self.rng.below(120) as usize + 1;
                symlink("t".repeat(len), self.name())
            }
            79..84 => fs::create_dir_all(self.dir()),
            84..86 => fs::remove_dir(self.dir()),
            86..91 => self.attribute(),
            91..93 => self.orphan(),
            93..95 => {
                let mode = 0o600 | self.rng.below(0o100) as u32;
                fs::set_permissions(self.name(), fs::Permissions::from_mode(mode))
            }
            95..99 => fs::read_dir(self.dir())?.try_for_each(|entry| entry.map(drop)),
            _ => File::open(self.name())?.sync_all(),
        }
    }
}

/// Not a test by itself: the body of a worker process, nothing without its environment.
#[test]
fn worker() {
    let (Ok(root), Ok(seed)) = (std::env::var(ROOT), std::env::var(SEED)) else { return };
    let mut worker = Worker { root: root.into(), rng: Rng(seed.parse().expect("a seed")) };
    let end = Instant::now() + Duration::from_secs(seconds());
    let mut steps = 0u64;
    while Instant::now() < end {
        steps += 1;
        if let Err(error) = worker.step() {
            let code = error.raw_os_error().unwrap_or(0);
            assert!(EXPECTED.contains(&code), "seed {seed} step {steps}: {error}");
        }
    }
    println!("seed {seed}: {steps} steps");
}

fn seconds() -> u64 {
    std::env::var("UEXT_STRESS_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

/// Starts the workers and waits for all of them.
fn load(root: &Path, seed: u64) {
    let exe: OsString = std::env::current_exe().expect("the test has a path").into();
    let limit = (seconds() * 4 + 60).to_string();
    let workers: Vec<_> = (0..WORKERS)
        .map(|index| {
            let mut command = Command::new("timeout");
            command.args(["-k", "5", &limit]).arg(&exe).args([
                "--exact",
                "--nocapture",
                "stress::worker",
            ]);
            command.env(ROOT, root).env(SEED, (seed + index).to_string());
            command.stdout(std::process::Stdio::null()).spawn().expect("start a worker")
        })
        .collect();
    let mut failed = 0;
    for mut worker in workers {
        failed += u32::from(!worker.wait().expect("wait").success());
    }
    assert_eq!(failed, 0, "workers failed; seed {seed}");
}

fn parallel_load(kind: Kind, mib: u64, options: &'static str, seed: u64) {
    let mut mounted = Mounted::with_options(kind, mib, options);
    let root = mounted.path().join("tree");
    fs::create_dir(&root).expect("mkdir");
    load(&root, seed);
    // Blocks of the mapping come with the data, which may be delayed yet.
    let before = without_blocks(listing(&root));
    mounted.check_and_remount();
    assert_same(&before, &without_blocks(listing(&root)));
    // The same names once more, now found on the disk.
    fs::remove_dir_all(&root).expect("remove everything");
    mounted.finish();
}

#[test]
fn parallel_load_leaves_a_clean_ext4_with_all_its_files() {
    require!("mke2fs", "e2fsck");
    parallel_load(EXT4, 128, "", 0xABCD_0000);
}

#[test]
fn parallel_load_leaves_a_clean_ext4_with_small_blocks_that_was_full() {
    require!("mke2fs", "e2fsck");
    let kind = Kind { fs: "ext4", block_size: 1024 };
    parallel_load(kind, 12, "commit=1,cache_size=4M", 0xABCD_1000);
}

#[test]
fn parallel_load_leaves_a_clean_ext3() {
    require!("mke2fs", "e2fsck");
    parallel_load(Kind { fs: "ext3", block_size: 1024 }, 64, "", 0xABCD_2000);
}

#[test]
fn parallel_load_leaves_a_clean_ext2() {
    require!("mke2fs", "e2fsck");
    parallel_load(Kind { fs: "ext2", block_size: 4096 }, 64, "", 0xABCD_3000);
}
