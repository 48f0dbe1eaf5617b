//! One file against a model: random reads, writes, truncates, mappings and syncs.
//!
//! The own model test runs always, fsx (crates.io) with 100,000 operations when
//! `UEXT_FSX` names its program, or `UEXT_LONG` is set and cargo can install it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use uext_tests::scratch::Kind;
use uext_tests::tree::Rng;
use uext_tests::{require, run};

use crate::{EXT4, Mounted, limited};
use uext_tests::mapping::Mapping;

const MOST_BYTES: u64 = 400_000;
const MOST_AT_ONCE: u64 = 40_000;

/// A file and what it must hold.
struct Model {
    path: PathBuf,
    file: File,
    bytes: Vec<u8>,
    rng: Rng,
    op: u32,
    seed: u64,
}

impl Model {
    fn new(path: &Path, seed: u64) -> Self {
        let file = Self::open(path);
        Self { path: path.into(), file, bytes: Vec::new(), rng: Rng(seed), op: 0, seed }
    }

    fn open(path: &Path) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).open(path).expect("open")
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Where an operation begins and how long it is, within `end`.
    fn range(&mut self, end: u64) -> (u64, usize) {
        let start = self.rng.below(end);
        let len = 1 + self.rng.below(MOST_AT_ONCE.min(end - start));
        (start, usize::try_from(len).expect("small"))
    }

    fn step(&mut self) {
        self.op += 1;
        match self.rng.below(1000) {
            0..250 => self.read(),
            250..550 => self.write(),
            550..640 => self.truncate(),
            640..780 => self.map_read(),
            780..960 => self.map_write(),
            960..985 => self.reopen(),
            985..990 => self.drop_caches(),
            990..995 => self.file.sync_data().expect("fdatasync"),
            _ => self.file.sync_all().expect("fsync"),
        }
        let len = self.file.metadata().expect("stat").len();
        assert_eq!(len, self.len(), "size, seed {} operation {}", self.seed, self.op);
    }

    fn compare(&self, start: u64, seen: &[u8], how: &str) {
        let from = usize::try_from(start).expect("small");
        let expected = &self.bytes[from..from + seen.len()];
        if let Some(at) = seen.iter().zip(expected).position(|(a, b)| a != b) {
            let bad = seen.iter().zip(expected).filter(|(a, b)| a != b).count();
            panic!(
                "{how} of {} at {start}: byte {} is {:#x}, not {:#x}; {bad} differ; \
                 size {}, seed {} operation {}",
                seen.len(),
                from + at,
                seen[at],
                expected[at],
                self.len(),
                self.seed,
                self.op
            );
        }
    }

    fn read(&mut self) {
        let (start, len) = self.range(MOST_BYTES);
        let mut seen = vec![0; len];
        let want = self.len().saturating_sub(start).min(len as u64);
        let mut got = 0;
        while got < len {
            let n = self.file.read_at(&mut seen[got..], start + got as u64).expect("read");
            got += n;
            if n == 0 {
                break;
            }
        }
        assert_eq!(got as u64, want, "short read, seed {} operation {}", self.seed, self.op);
        if got > 0 {
            self.compare(start, &seen[..got], "read");
        }
    }

    fn put(&mut self, start: u64, bytes: &[u8]) {
        let start = usize::try_from(start).expect("small");
        let end = start + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[start..end].copy_from_slice(bytes);
    }

    fn write(&mut self) {
        let (start, len) = self.range(MOST_BYTES);
        let bytes = self.rng.bytes(len);
        self.file.write_all_at(&bytes, start).expect("write");
        self.put(start, &bytes);
    }

    fn truncate(&mut self) {
        let len = self.rng.below(MOST_BYTES);
        self.file.set_len(len).expect("truncate");
        self.bytes.resize(usize::try_from(len).expect("small"), 0);
    }

    fn map_read(&mut self) {
        if self.bytes.is_empty() {
            return;
        }
        let (start, len) = self.range(self.len());
        let mut seen = vec![0; len];
        let mapping = Mapping::new(&self.file, self.len());
        mapping.read(usize::try_from(start).expect("small"), &mut seen);
        self.compare(start, &seen, "mapped read");
    }

    fn map_write(&mut self) {
        if self.bytes.is_empty() {
            return;
        }
        let (start, len) = self.range(self.len());
        let bytes = self.rng.bytes(len);
        let mapping = Mapping::new(&self.file, self.len());
        mapping.write(usize::try_from(start).expect("small"), &bytes);
        if self.rng.below(100) == 0 {
            mapping.sync();
        }
        self.put(start, &bytes);
    }

    fn reopen(&mut self) {
        self.file = Self::open(&self.path);
    }

    /// What is clean goes from the kernel's cache, so that it is asked for again.
    fn drop_caches(&mut self) {
        self.file.sync_data().expect("fdatasync");
        use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("fadvise");
    }

    fn check_all(&mut self) {
        let seen = std::fs::read(&self.path).expect("read");
        assert_eq!(seen.len() as u64, self.len(), "size, seed {}", self.seed);
        self.compare(0, &seen, "whole read");
    }
}

fn one_file_equals_its_model(kind: Kind, options: &'static str, operations: u32, seed: u64) {
    let mut mounted = Mounted::with_options(kind, 32, options);
    let mut model = Model::new(&mounted.path().join("file"), seed);
    for _ in 0..operations {
        model.step();
    }
    model.check_all();
    // The file is closed for the unmount.
    model.file = File::open("/dev/null").expect("open");
    mounted.check_and_remount();
    model.check_all();
    mounted.finish();
}

#[test]
fn a_file_equals_its_model_after_random_operations_on_ext4() {
    require!("mke2fs", "e2fsck");
    one_file_equals_its_model(EXT4, "", 20_000, 0x5EED_0001);
}

#[test]
fn a_file_equals_its_model_with_the_kernels_writeback_cache() {
    require!("mke2fs", "e2fsck");
    one_file_equals_its_model(EXT4, "writeback_cache", 6_000, 0x5EED_0002);
}

#[test]
fn a_file_equals_its_model_on_ext4_with_small_blocks_and_cache() {
    require!("mke2fs", "e2fsck");
    let kind = Kind { fs: "ext4", block_size: 1024 };
    one_file_equals_its_model(kind, "cache_size=4M", 6_000, 0x5EED_0003);
}

#[test]
fn a_file_equals_its_model_on_ext3_with_small_blocks() {
    require!("mke2fs", "e2fsck");
    one_file_equals_its_model(Kind { fs: "ext3", block_size: 1024 }, "", 6_000, 0x5EED_0004);
}

#[test]
fn a_file_equals_its_model_on_ext2() {
    require!("mke2fs", "e2fsck");
    one_file_equals_its_model(Kind { fs: "ext2", block_size: 4096 }, "", 6_000, 0x5EED_0005);
}

/// The fsx program, installed into this build's directory when it is missing.
fn fsx_program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("UEXT_FSX") {
        return Some(path.into());
    }
    if std::env::var_os("UEXT_LONG").is_none() {
        {
            use std::io::Write as _;
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED fsx: set UEXT_LONG=1, or UEXT_FSX to the program (it takes minutes)"
            );
        }
        return None;
    }
    let exe = std::env::current_exe().expect("the test has a path");
    let root = exe.ancestors().nth(3).expect("the test lies in a target directory").join("fsx");
    let program = root.join("bin/fsx");
    if !program.exists() {
        let mut install = limited(600, "cargo");
        install.args(["install", "-q", "fsx", "--root"]).arg(&root);
        install.arg("--target-dir").arg(root.join("target"));
        let status = install.status();
        if !status.is_ok_and(|status| status.success()) {
            {
                use std::io::Write as _;
                let _ = writeln!(std::io::stderr(), "SKIPPED fsx: cargo install fsx failed");
            }
            return None;
        }
    }
    Some(program)
}

/// By itself fsx waits for the disk after each mapped write; here at random, and every
/// way to read and write takes part.
const MIXED: &str = "nomsyncafterwrite = true\n[weights]\nclose_open = 1.0\ninvalidate = 1.0\n\
                     fsync = 0.1\nfdatasync = 0.1\ntruncate = 5.0\nposix_fadvise = 1.0\n\
                     sendfile = 2.0\ncopy_file_range = 5.0\n";

fn fsx_finds_nothing(kind: Kind, options: &'static str, config: Option<&str>) {
    require!("mke2fs", "e2fsck");
    let Some(program) = fsx_program() else { return };
    let mounted = Mounted::with_options(kind, 64, options);
    let mut fsx = limited(3_600, program.to_str().expect("a path of text"));
    fsx.args(["-N", "100000", "-S", "7"]);
    if let Some(config) = config {
        let path = mounted.outside().join("fsx.toml");
        std::fs::write(&path, config).expect("write");
        fsx.arg("-f").arg(path);
    }
    run(fsx.arg("-P").arg(mounted.outside()).arg(mounted.path().join("file")));
    mounted.finish();
}

macro_rules! fsx_tests {
    ($($name:ident: $fs:literal $block_size:literal $options:literal $config:expr;)*) => {
        mod fsx_finds_nothing_in_a_hundred_thousand_operations {
            use super::{Kind, MIXED, fsx_finds_nothing};
            $(#[test]
            fn $name() {
                fsx_finds_nothing(Kind { fs: $fs, block_size: $block_size }, $options, $config);
            })*
        }
    };
}

fsx_tests! {
    on_ext4: "ext4" 4096 "" Some(MIXED);
    on_ext4_waiting_for_each_mapped_write: "ext4" 4096 "" None;
    on_ext4_with_the_kernels_writeback_cache: "ext4" 4096 "writeback_cache" Some(MIXED);
    on_ext4_with_small_blocks: "ext4" 1024 "" Some(MIXED);
    on_ext3: "ext3" 4096 "" Some(MIXED);
    on_ext3_with_small_blocks: "ext3" 1024 "" Some(MIXED);
    on_ext2: "ext2" 4096 "" Some(MIXED);
    on_ext2_with_small_blocks: "ext2" 1024 "" Some(MIXED);
}
