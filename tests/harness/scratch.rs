//! Scratch images in a directory of their own.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::run;

/// What an image is made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// `ext2`, `ext3` or `ext4`.
    pub fs: &'static str,
    /// Bytes per block.
    pub block_size: u32,
}

/// The three mkfs defaults with small and large blocks.
pub const KINDS: [Kind; 6] = [
    Kind { fs: "ext2", block_size: 1024 },
    Kind { fs: "ext2", block_size: 4096 },
    Kind { fs: "ext3", block_size: 1024 },
    Kind { fs: "ext3", block_size: 4096 },
    Kind { fs: "ext4", block_size: 1024 },
    Kind { fs: "ext4", block_size: 4096 },
];

/// A directory for one test's images and mount points.
pub struct Scratch {
    dir: TempDir,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// A new one, on a disk and not in memory: direct I/O is part of what is tested.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("uext-test-").tempdir_in("/var/tmp");
        Self { dir: dir.expect("a directory in /var/tmp") }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A sparse file of `bytes` bytes.
    pub fn sparse(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path().join(name);
        let file = std::fs::File::create(&path).expect("create an image");
        file.set_len(bytes).expect("size an image");
        path
    }

    /// An image made by mke2fs with its defaults for the kind; ext4 with today's features.
    pub fn mkfs(&self, name: &str, kind: Kind, bytes: u64, more: &[&str]) -> PathBuf {
        let path = self.sparse(name, bytes);
        let mut mkfs = Command::new("mke2fs");
        mkfs.args(["-q", "-F", "-t", kind.fs, "-b", &kind.block_size.to_string()]);
        if kind.fs == "ext4" {
            mkfs.args(["-O", "metadata_csum_seed,orphan_file"]);
        }
        run(mkfs.args(more).arg(&path));
        path
    }

    /// A new directory to mount on.
    pub fn mount_point(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(&path).expect("create a mount point");
        path
    }
}

/// Asserts that `e2fsck -fn` finds nothing.
#[track_caller]
pub fn assert_clean(image: &Path) {
    let output = Command::new("e2fsck").arg("-fn").arg(image).output().expect("run e2fsck");
    assert!(
        output.status.success(),
        "e2fsck -fn {}: {}\n{}{}",
        image.display(),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
