//! The images that workloads start with.
//!
//! Free blocks hold junk and not zeroes: a block that is shown without having been
//! written must not look like a hole.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::{Arc, Mutex};

use uext_ext4::DataMode;
use uext_jbd2::{JournalMap, JournalRun};
use uext_tests::run;

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// ext4 as mke2fs makes it today, 4 KiB blocks.
    Ext4,
    /// ext4 with 1 KiB blocks.
    Small,
    /// ext3, 4 KiB blocks: no checksums, block maps.
    Ext3,
    /// ext2, 4 KiB blocks: no journal.
    Ext2,
}

impl Kind {
    /// All of them.
    pub const ALL: [(Self, &str); 4] = [
        (Self::Ext4, "ext4"),
        (Self::Small, "ext4-1k"),
        (Self::Ext3, "ext3"),
        (Self::Ext2, "ext2"),
    ];

    /// Its word in a line that repeats a failure.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }

    /// The kind that a word names.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, word)| *word == name).map(|(kind, _)| *kind)
    }
}

/// The words for the modes.
pub const MODES: [(DataMode, &str); 3] = [
    (DataMode::Ordered, "ordered"),
    (DataMode::Journal, "journal"),
    (DataMode::Writeback, "writeback"),
];

/// The modes of a filesystem with a journal that are tested.
pub const JOURNALLED: &[DataMode] = &[DataMode::Ordered, DataMode::Journal];

/// The word for a mode.
pub fn mode_name(mode: DataMode) -> &'static str {
    MODES.iter().find(|(one, _)| *one == mode).map_or("", |(_, name)| name)
}

/// An image to start with.
pub struct Image {
    pub bytes: Arc<Vec<u8>>,
    pub block_size: u32,
    /// Where its journal lies; `None` without one.
    pub journal: Option<JournalMap>,
    /// Blocks of 4096 bytes that hold nothing but the journal.
    pub journal_pages: BTreeSet<u64>,
}

/// Bytes of an image: small, since every state is checked as a whole.
const BYTES: u64 = 9 << 20;
/// A large one, for workloads that need it.
const LARGE_BYTES: u64 = 16 << 20;

/// An image, made once in a run.
pub fn image(kind: Kind, large: bool) -> Arc<Image> {
    type Made = Vec<((Kind, bool), Arc<Image>)>;
    static MADE: Mutex<Made> = Mutex::new(Vec::new());
    let mut made = MADE.lock().expect("no maker panicked");
    if let Some((_, image)) = made.iter().find(|(key, _)| *key == (kind, large)) {
        return image.clone();
    }
    let image = Arc::new(make(kind, large));
    made.push(((kind, large), image.clone()));
    image
}

fn make(kind: Kind, large: bool) -> Image {
    let file = tempfile::Builder::new().prefix("uext-crash-").tempfile_in("/dev/shm");
    let file = file.expect("a file in /dev/shm");
    let bytes = if large { LARGE_BYTES } else { BYTES };
    file.as_file().set_len(bytes).expect("size an image");
    let mut mkfs = Command::new("mke2fs");
    mkfs.args(["-q", "-F", "-m", "0", "-N", if large { "2048" } else { "256" }]);
    mkfs.args(["-U", "0123abcd-4567-89ab-cdef-0123456789ab"]);
    mkfs.args(["-E", "hash_seed=01234567-89ab-cdef-0123-456789abcdef"]);
    let block_size = if kind == Kind::Small { 1024 } else { 4096 };
    match kind {
        Kind::Ext4 => mkfs.args(["-t", "ext4", "-b", "4096", "-J", "size=4"]),
        Kind::Small => mkfs.args(["-t", "ext4", "-b", "1024", "-J", "size=1"]),
        Kind::Ext3 => mkfs.args(["-t", "ext3", "-b", "4096", "-J", "size=4"]),
        Kind::Ext2 => mkfs.args(["-t", "ext2", "-b", "4096"]),
    };
    if matches!(kind, Kind::Ext4 | Kind::Small) {
        mkfs.args(["-O", "metadata_csum_seed,orphan_file"]);
    }
    run(mkfs.arg(file.path()));
    let mut bytes = std::fs::read(file.path()).expect("read an image");
    let path = file.path().to_str().expect("a plain path");
    for block in free_blocks(path) {
        let start = block as usize * block_size;
        bytes[start..start + block_size].fill(0xE5);
    }
    let journal = (kind != Kind::Ext2).then(|| journal_blocks(path));
    let journal_pages = journal.iter().flat_map(|blocks| whole_pages(blocks, block_size)).collect();
    let journal = journal.map(|blocks| {
        let runs = (0u32..).zip(&blocks);
        let runs = runs.map(|(logical, &physical)| JournalRun { logical, physical, count: 1 });
        JournalMap::from_runs(joined(runs)).expect("the journal's blocks are a map")
    });
    // Below 2^32.
    let block_size = block_size as u32;
    Image { bytes: Arc::new(bytes), block_size, journal, journal_pages }
}

/// Runs that follow each other as one.
fn joined(runs: impl Iterator<Item = JournalRun>) -> Vec<JournalRun> {
    let mut out: Vec<JournalRun> = Vec::new();
    for run in runs {
        match out.last_mut() {
            Some(last) if last.physical + u64::from(last.count) == run.physical => last.count += 1,
            _ => out.push(run),
        }
    }
    out
}

/// Pages all of whose blocks are in the list.
fn whole_pages(blocks: &[u64], block_size: usize) -> Vec<u64> {
    let per_page = (4096 / block_size) as u64;
    let set: BTreeSet<u64> = blocks.iter().copied().collect();
    let pages: BTreeSet<u64> = blocks.iter().map(|block| block / per_page).collect();
    let whole = |page: &u64| (page * per_page..(page + 1) * per_page).all(|b| set.contains(&b));
    pages.into_iter().filter(whole).collect()
}

/// The free blocks, as dumpe2fs lists them.
fn free_blocks(path: &str) -> Vec<u64> {
    let text = run(Command::new("dumpe2fs").arg(path));
    let lists = text.lines().filter_map(|line| line.strip_prefix("  Free blocks: "));
    let ranges = lists.flat_map(|list| list.split(", ")).filter(|range| !range.is_empty());
    ranges
        .flat_map(|range| {
            let number = |text: &str| text.parse::<u64>().expect("dumpe2fs prints numbers");
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            number(first)..=number(last)
        })
        .collect()
}

/// The journal's blocks in order, as debugfs lists them, without those that map it.
fn journal_blocks(path: &str) -> Vec<u64> {
    let size = run(Command::new("dumpe2fs").args(["-h", path]));
    let total = size.lines().find_map(|line| line.strip_prefix("Total journal blocks:"));
    let text = match total {
        Some(total) => total.trim().to_owned(),
        None => {
            let line = size.lines().find_map(|line| line.strip_prefix("Journal length:"));
            line.expect("dumpe2fs tells of the journal").trim().to_owned()
        }
    };
    let count: u64 = text.parse().expect("dumpe2fs prints a number");
    let request: Vec<String> = (0..count).map(|block| format!("bmap <8> {block}")).collect();
    let script = tempfile::NamedTempFile::new().expect("a scratch file");
    std::fs::write(script.path(), request.join("\n")).expect("write a scratch file");
    let output = Command::new("debugfs").arg("-f").arg(script.path()).arg(path).output();
    let output = output.expect("run debugfs");
    let text = String::from_utf8_lossy(&output.stdout);
    let blocks: Vec<u64> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    assert_eq!(blocks.len() as u64, count, "debugfs maps the journal:\n{text}");
    blocks
}
