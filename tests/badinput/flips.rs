//! Bytes of each structure are changed: a mount is refused or works, and the work ends.
//!
//! The filesystem is mounted in this process, so a panic of any thread of it is seen. After
//! a read-write mount, e2fsck must be able to repair the image. `UEXT_SEED` (with
//! `UEXT_STRUCTURE`) replays one image, `UEXT_SEEDS` says how many seeds each structure of each shape gets.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use tempfile::TempDir;
use uext_blockdev::file::{FileDevice, OpenOptions as DeviceOptions};
use uext_ext4::{Ext4, MountOptions};
use uext_tests::require;
use uext_tests::scratch::Scratch;
use uext_tests::tree::Rng;
use uext_vfs::FileSystem;

use crate::bases::{Base, SHAPES, Shape, Structure};
use crate::work;

/// Seeds of each structure of each shape, if `UEXT_SEEDS` does not say.
const SEEDS: u64 = 3;
/// Longest that mount, work and unmount may take together.
const PATIENCE: Duration = Duration::from_secs(60);

/// Panics of all threads of this process.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(info);
        }));
    });
}

/// Changes up to four places of a structure.
fn flip(image: &Path, base: &Base, structure: Structure, rng: &mut Rng) {
    let file = OpenOptions::new().write(true).open(image).expect("open the image");
    let ranges = &base.places[&structure];
    let blocks = base.bytes.len() as u64 / base.shape.block_size;
    for _ in 0..=rng.below(4) {
        let range = &ranges[usize::try_from(rng.below(ranges.len() as u64)).expect("small")];
        // Most of what matters stands at the beginning of a structure.
        let within =
            [64, 256, range.end - range.start][usize::try_from(rng.below(3)).expect("small")];
        let at = range.start + rng.below(within.min(range.end - range.start));
        let byte = base.bytes[usize::try_from(at).expect("small")];
        let word = |value: u64| value.to_le_bytes()[..4].to_vec();
        let (at, bytes) = match rng.below(8) {
            0..4 => (at, vec![byte ^ (1 << rng.below(8))]),
            4 => (at, rng.bytes(1)),
            5 => (at & !3, word(rng.below(blocks))),
            6 => (
                at & !3,
                word(
                    [0, 1, u64::MAX, blocks, blocks - 1]
                        [usize::try_from(rng.below(5)).expect("small")],
                ),
            ),
            _ => (at & !3, rng.bytes(4)),
        };
        file.write_all_at(&bytes, at).expect("patch the image");
    }
}

fn mount(image: &Path, read_only: bool) -> Result<std::sync::Arc<Ext4>, String> {
    let how = DeviceOptions { read_only, direct: false, ..DeviceOptions::default() };
    let device = FileDevice::open(image, how).expect("open the image");
    let options =
        MountOptions { read_only, cache_bytes: Some(16 << 20), ..MountOptions::default() };
    Ext4::mount(device, "damaged", &options).map_err(|error| error.to_string())
}

/// Mounts, works and unmounts, in time. Whether the mount was let in.
///
/// # Errors
/// A panic, no end, a refusal in other than one line.
fn use_image(image: &Path, read_only: bool, seed: u64) -> Result<bool, String> {
    let (sender, receiver) = mpsc::channel();
    let path = image.to_owned();
    let panics = PANICS.load(Ordering::SeqCst);
    let worker = std::thread::spawn(move || {
        let refusal = match mount(&path, read_only) {
            Err(line) => Some(line),
            Ok(fs) => {
                if read_only {
                    work::read_everything(&*fs);
                } else {
                    work::work(&*fs, &mut Rng(seed));
                }
                // An image with errors need not unmount well.
                let _ = fs.unmount();
                None
            }
        };
        let _ = sender.send(refusal);
    });
    let how = if read_only { "read-only" } else { "read-write" };
    let refusal = match receiver.recv_timeout(PATIENCE) {
        Ok(refusal) => refusal,
        Err(mpsc::RecvTimeoutError::Disconnected) => return Err(format!("{how}: a panic")),
        Err(mpsc::RecvTimeoutError::Timeout) => return Err(format!("{how}: it does not end")),
    };
    worker.join().map_err(|_| format!("{how}: a panic"))?;
    if PANICS.load(Ordering::SeqCst) != panics {
        return Err(format!("{how}: another thread panicked"));
    }
    match refusal {
        Some(line) if line.lines().count() != 1 => Err(format!("{how}: not one line: {line}")),
        refusal => Ok(refusal.is_none()),
    }
}

fn e2fsck(image: &Path, arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new("timeout");
    let output = command.args(["60", "e2fsck"]).args(arguments).arg(image).output();
    let output = output.expect("run e2fsck");
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether e2fsck can repair an image, in at most three runs.
fn repaired(image: &Path) -> Result<(), String> {
    // A directory block that lost its second entry is what e2fsck never mends.
    const BEYOND_IT: &str = "Couldn't find parent directory entry";
    let mut text = String::new();
    for _ in 0..3 {
        let (exit, said) = e2fsck(image, &["-fy"]);
        text = said;
        if exit >= 8 {
            break;
        }
        if e2fsck(image, &["-fn"]).0 == 0 || text.contains(BEYOND_IT) {
            return Ok(());
        }
    }
    Err(text)
}

struct Bench {
    base: Base,
    dir: TempDir,
}

impl Bench {
    fn image(&self, structure: Structure, seed: u64) -> PathBuf {
        // A name of its own: one that hung still holds its image.
        let image = self.dir.path().join(format!("{structure:?}-{seed}"));
        fs::write(&image, &self.base.bytes).expect("write the image");
        flip(&image, &self.base, structure, &mut Rng(seed));
        image
    }

    /// Whether it worked read-only, and read-write.
    ///
    /// # Errors
    /// What should not have happened.
    fn check(&self, structure: Structure, seed: u64) -> Result<[bool; 2], String> {
        let image = self.image(structure, seed);
        let before = fs::read(&image).expect("read the image");
        let read_only = use_image(&image, true, seed)?;
        if before != fs::read(&image).expect("read the image") {
            return Err("a read-only mount wrote".into());
        }
        let read_write = use_image(&image, false, seed)?;
        let changed = before != fs::read(&image).expect("read the image");
        if !read_write && changed {
            return Err("a refused mount wrote".into());
        }
        if changed && let Err(text) = repaired(&image) {
            // Some damage is more than e2fsck repairs, whoever works on it.
            let image = self.image(structure, seed);
            if repaired(&image).is_ok() {
                return Err(format!("e2fsck cannot repair it after the work:\n{text}"));
            }
        }
        fs::remove_file(&image).expect("remove the image");
        Ok([read_only, read_write])
    }
}

fn flips_are_survived(shape: Shape) {
    require!("mke2fs", "e2fsck", "setfattr", "setfacl", "debugfs");
    count_panics();
    let dir = tempfile::Builder::new().prefix("uext-flips-").tempdir_in("/dev/shm");
    let bench = Bench { base: Base::new(&Scratch::new(), shape), dir: dir.expect("a directory") };
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let seeds: Vec<u64> = match number("UEXT_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("UEXT_SEEDS").unwrap_or(SEEDS)).collect(),
    };
    let only = std::env::var("UEXT_STRUCTURE").ok();
    let mut failures = Vec::new();
    for &structure in bench.base.places.keys() {
        let name = format!("{structure:?}");
        if only.as_ref().is_some_and(|only| *only != name) {
            continue;
        }
        let mut counts = [0; 2];
        for &seed in &seeds {
            match bench.check(structure, seed) {
                Ok(worked) => {
                    counts.iter_mut().zip(worked).for_each(|(n, it)| *n += usize::from(it));
                }
                Err(what) => failures.push(format!(
                    "UEXT_STRUCTURE={name} UEXT_SEED={seed} of {}: {what}",
                    shape.name
                )),
            }
        }
        println!(
            "{}, {name}: of {} images {} mounted read-only, {} read-write",
            shape.name,
            seeds.len(),
            counts[0],
            counts[1]
        );
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

macro_rules! for_each_shape {
    ($($name:ident = $index:expr),* $(,)?) => {
        $(#[test]
        fn $name() {
            flips_are_survived(SHAPES[$index]);
        })*
    };
}

for_each_shape!(
    ext4 = 0,
    ext4_without_checksums = 1,
    ext3 = 2,
    ext2 = 3,
    ext4_to_replay = 4,
    ext4_without_checksums_to_replay = 5,
    ext3_to_replay = 6,
);
