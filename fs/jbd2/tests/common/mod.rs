//! Images made by e2fsprogs, and e2fsck and debugfs as judges.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use uext_blockdev::{BlockDevice, MemoryDevice};
use uext_jbd2::{JournalLocation, JournalMap, JournalRun};

/// Whether the tools are there; says loudly what is skipped when not.
pub fn have_e2fsprogs() -> bool {
    let found = ["mke2fs", "e2fsck", "debugfs"].iter().all(|tool| {
        Command::new(tool).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    });
    if !found {
        {
            use std::io::Write as _;
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: e2fsprogs (mke2fs, e2fsck, debugfs) is not installed"
            );
        }
    }
    found
}

/// A scratch directory.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Runs a tool to its end; its output is in the panic when it fails.
pub fn run(tool: &str, args: &[&str]) -> Output {
    let output = Command::new(tool)
        .args(args)
        .env("MKE2FS_FIRST_META_BG", "0")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Makes an image; `options` go to mke2fs.
pub fn mkfs(dir: &Path, options: &[&str], blocks: &str) -> PathBuf {
    let path = dir.join("image");
    let name = path.to_str().unwrap();
    let mut args = vec!["-F", "-q", "-t", "ext4"];
    args.extend_from_slice(options);
    args.extend_from_slice(&[name, blocks]);
    run("mke2fs", &args);
    path
}

/// Runs debugfs commands on an image, writing to it.
pub fn debugfs(image: &Path, commands: &str) -> String {
    let script = image.with_extension("cmd");
    std::fs::write(&script, commands).unwrap();
    let output = run("debugfs", &["-w", "-f", script.to_str().unwrap(), image.to_str().unwrap()]);
    std::fs::remove_file(&script).unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Replays an image's journal with e2fsck; its exit code.
pub fn e2fsck_journal_only(image: &Path) -> i32 {
    let name = image.to_str().unwrap();
    let output = Command::new("e2fsck")
        .args(["-y", "-E", "journal_only", name])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    output.status.code().unwrap_or(-1)
}

/// The judge's full check of an image; its output when it is not clean.
pub fn e2fsck_check(image: &Path) -> Result<(), String> {
    let output = Command::new("e2fsck")
        .args(["-fn", image.to_str().unwrap()])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() { Ok(()) } else { Err(text) }
}

/// An image's superblock fields this crate needs.
pub struct Geometry {
    pub block_size: u32,
    pub uuid: [u8; 16],
    pub csum: bool,
    pub wide: bool,
}

pub fn geometry(image: &[u8]) -> Geometry {
    let sb = &image[1024..2048];
    let word = |at: usize| u32::from_le_bytes(sb[at..at + 4].try_into().unwrap());
    Geometry {
        block_size: 1024 << word(0x18),
        uuid: sb[0x68..0x78].try_into().unwrap(),
        csum: word(0x64) & 0x400 != 0,
        wide: word(0x60) & 0x80 != 0,
    }
}

/// The map of an image's journal inode, as debugfs sees it.
pub fn journal_map(image: &Path) -> JournalMap {
    let output = run("debugfs", &["-R", "stat <8>", image.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let list = text.split("EXTENTS:").nth(1).or_else(|| text.split("BLOCKS:").nth(1)).unwrap();
    let runs = list
        .split(|c: char| c == ',' || c.is_whitespace())
        .filter_map(|token| {
            let (logical, physical) = token.strip_prefix('(')?.split_once("):")?;
            let (first, last) = logical.split_once('-').unwrap_or((logical, logical));
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            let physical = physical.split('-').next()?.parse().ok()?;
            Some(JournalRun { logical: first, physical, count: last - first + 1 })
        })
        .collect();
    JournalMap::from_runs(runs).unwrap()
}

pub fn memory(image: &Path) -> Arc<MemoryDevice> {
    MemoryDevice::from_vec(std::fs::read(image).unwrap())
}

pub fn location<'a>(
    device: &'a dyn BlockDevice,
    map: &'a JournalMap,
    block_size: u32,
) -> JournalLocation<'a> {
    JournalLocation { device, map, block_size }
}

/// Blanks what two replays of one image may differ in: in the filesystem's superblock
/// the times, the state, the counter of written bytes, needs_recovery and the checksum.
pub fn normalise(image: &mut [u8]) {
    let sb = &mut image[1024..2048];
    for field in [0x2C..0x34, 0x3A..0x3C, 0x178..0x180, 0x3FC..0x400] {
        sb[field].fill(0);
    }
    sb[0x60] &= !0x04;
}

/// The blocks in which two images differ.
pub fn differing_blocks(a: &[u8], b: &[u8], block_size: u32) -> Vec<usize> {
    assert_eq!(a.len(), b.len());
    let size = block_size as usize;
    let pairs = a.chunks(size).zip(b.chunks(size)).enumerate();
    pairs.filter(|(_, (a, b))| a != b).map(|(block, _)| block).collect()
}

/// Bytes that a seed gives, for contents that nobody else wrote.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The kernel's ext4 on an image, by a loop device; unmounted when dropped.
pub struct KernelMount {
    point: tempfile::TempDir,
}

impl KernelMount {
    /// `Err` with the kernel's refusal.
    pub fn new(image: &Path, options: &str) -> Result<Self, String> {
        let point = scratch();
        let options = format!("loop{options}");
        let output = Command::new("mount")
            .args(["-t", "ext4", "-o", &options])
            .args([image, point.path()])
            .output()
            .map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(Self { point })
    }

    pub fn path(&self) -> &Path {
        self.point.path()
    }
}

impl Drop for KernelMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.point.path()).status();
    }
}

/// Whether this machine lets us mount ext4 on a loop device; says loudly when not.
pub fn have_kernel_mounts(dir: &Path) -> bool {
    let probe = dir.join("probe");
    std::fs::create_dir_all(&probe).unwrap();
    let image = mkfs(&probe, &[], "4M");
    match KernelMount::new(&image, "") {
        Ok(_) => true,
        Err(error) => {
            {
                use std::io::Write as _;
                let _ =
                    writeln!(std::io::stderr(), "SKIPPED: the kernel mounts nothing here: {error}");
            }
            false
        }
    }
}
