//! The command line, with mke2fs's letters.

use std::path::PathBuf;

use clap::{ArgAction, Parser};

/// Makes an ext2, ext3 or ext4 filesystem.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "uext mkfs", disable_version_flag = true, args_override_self = false)]
pub struct Options {
    /// Type: ext2, ext3 or ext4 (the default).
    #[arg(short = 't', value_name = "TYPE")]
    pub fs_type: Option<String>,

    /// Usage types, comma-separated: small, floppy, big, huge, news, largefile, largefile4, default.
    #[arg(short = 'T', value_name = "USAGE")]
    pub usage: Option<String>,

    /// Block size in bytes: 1024 to 65536.
    #[arg(short = 'b', value_name = "BYTES", allow_hyphen_values = true)]
    pub block_size: Option<String>,

    /// Blocks per group.
    #[arg(short = 'g', value_name = "BLOCKS")]
    pub blocks_per_group: Option<u32>,

    /// Groups packed together under flex_bg: a power of two.
    #[arg(short = 'G', value_name = "GROUPS")]
    pub flex_groups: Option<u32>,

    /// Bytes per inode.
    #[arg(short = 'i', value_name = "BYTES")]
    pub inode_ratio: Option<String>,

    /// Inode size in bytes: 128 or more.
    #[arg(short = 'I', value_name = "BYTES")]
    pub inode_size: Option<u32>,

    /// Number of inodes.
    #[arg(short = 'N', value_name = "COUNT")]
    pub inodes: Option<u64>,

    /// Label, at most 16 bytes.
    #[arg(short = 'L', value_name = "LABEL")]
    pub label: Option<String>,

    /// Where it was last mounted.
    #[arg(short = 'M', value_name = "DIR")]
    pub last_mounted: Option<String>,

    /// UUID, or clear, random or time.
    #[arg(short = 'U', value_name = "UUID")]
    pub uuid: Option<String>,

    /// Percent of the blocks reserved for root: 0 to 50, 5 by default.
    #[arg(short = 'm', value_name = "PERCENT")]
    pub reserved_percent: Option<f64>,

    /// Features, comma-separated; ^ clears; journal_dev alone makes a journal device.
    #[arg(short = 'O', value_name = "FEATURES", allow_hyphen_values = true)]
    pub features: Vec<String>,

    /// Extended options, comma-separated.
    #[arg(short = 'E', value_name = "OPTIONS")]
    pub extended: Vec<String>,

    /// What the kernel does on corruption: continue, remount-ro or panic.
    #[arg(short = 'e', value_name = "POLICY")]
    pub errors: Option<String>,

    /// With a journal.
    #[arg(short = 'j')]
    pub journal: bool,

    /// Journal options: size=MEGABYTES, location=BLOCK, device=DEVICE|UUID=…|LABEL=….
    #[arg(short = 'J', value_name = "OPTIONS")]
    pub journal_options: Vec<String>,

    /// Revision; only 1 (see -E revision=0).
    #[arg(short = 'r', value_name = "REVISION")]
    pub revision: Option<u32>,

    /// Creator's system; only Linux.
    #[arg(short = 'o', value_name = "SYSTEM")]
    pub creator: Option<String>,

    /// Only say what would be made.
    #[arg(short = 'n')]
    pub dry_run: bool,

    /// Say nothing but errors.
    #[arg(short = 'q')]
    pub quiet: bool,

    /// Say more.
    #[arg(short = 'v')]
    pub verbose: bool,

    /// Overwrite what the target holds.
    #[arg(short = 'F', action = ArgAction::Count)]
    pub force: u8,

    /// Print the version.
    #[arg(short = 'V')]
    pub version: bool,

    /// Direct I/O: always so.
    #[arg(short = 'D', hide = true)]
    pub direct: bool,

    /// Keep the device's contents where nothing is written; see -E nodiscard.
    #[arg(short = 'K', hide = true)]
    pub keep: bool,

    /// Bad block search.
    #[arg(short = 'c', action = ArgAction::Count, hide = true)]
    pub check: u8,

    /// Bad block list.
    #[arg(short = 'l', hide = true)]
    pub bad_blocks: Option<String>,

    /// Cluster size.
    #[arg(short = 'C', hide = true)]
    pub cluster_size: Option<String>,

    /// Directory to copy in.
    #[arg(short = 'd', hide = true)]
    pub populate: Option<PathBuf>,

    /// Superblock and descriptors only.
    #[arg(short = 'S', hide = true)]
    pub super_only: bool,

    /// Undo file.
    #[arg(short = 'z', hide = true)]
    pub undo: Option<PathBuf>,

    /// Image or device.
    #[arg(value_name = "IMG|DEV", required_unless_present = "version")]
    pub target: Option<PathBuf>,

    /// Size: blocks (KiB without -b), or with a suffix K, M, G, T or s (sectors).
    #[arg(value_name = "SIZE")]
    pub size: Option<String>,
}

impl Options {
    /// The first option given that this program does not have.
    pub(super) fn unsupported(&self) -> Option<&'static str> {
        let given = [
            (self.check > 0, "-c (bad block search)"),
            (self.bad_blocks.is_some(), "-l (bad block list)"),
            (self.cluster_size.is_some(), "-C (clusters)"),
            (self.populate.is_some(), "-d (copying a directory in)"),
            (self.super_only, "-S (superblocks only)"),
            (self.undo.is_some(), "-z (undo file)"),
        ];
        given.into_iter().find(|(is_given, _)| *is_given).map(|(_, name)| name)
    }
}
