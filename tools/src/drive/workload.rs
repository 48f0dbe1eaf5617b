//! Workloads: what clients do, as a table of steps with weights.
//!
//! The named profiles are TOML files of the same form that `--workload` takes; they stand
//! beside this file and show in `uext drive --show NAME`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use uext_blockdev::nbd::Export;
use uext_blockdev::nbd::protocol::{CAN_MULTI_CONN, SEND_FLUSH, SEND_FUA};

use super::block::MIN_BLOCK;
use super::raw::works_on_exports;
use crate::mount_options;

/// The profiles, by name.
pub const PROFILES: [(&str, &str); 6] = [
    ("metadata", include_str!("profiles/metadata.toml")),
    ("mail", include_str!("profiles/mail.toml")),
    ("database", include_str!("profiles/database.toml")),
    ("build", include_str!("profiles/build.toml")),
    ("stream", include_str!("profiles/stream.toml")),
    ("mixed", include_str!("profiles/mixed.toml")),
];

/// Longest file, blocks: a version table that fits in memory.
const MAX_BLOCKS: u64 = 1 << 24;

/// One thing that a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// Makes a file and fills it; syncs it as `sync` says.
    Create,
    /// Writes some blocks at a file's end; syncs it.
    Append,
    /// Writes blocks of a file at random; syncs it every `sync_every` times.
    Write,
    /// Reads blocks of a file at random.
    Read,
    /// Writes a file again from its beginning to its end, in pieces of `io`.
    Rewrite,
    /// Reads a file from its beginning to its end.
    Scan,
    /// Writes a record at the end of the thread's log, and syncs it.
    Log,
    /// Deletes a file.
    Delete,
    /// Gives a file another name, in another directory as it comes.
    Rename,
    /// Cuts a file.
    Truncate,
    /// Looks at a file's attributes.
    Stat,
    /// Makes a second name, and takes it away.
    Link,
    /// Makes a symbolic link, reads it, and takes it away.
    Symlink,
    /// Lists a directory.
    List,
    /// Makes a directory, and takes it away.
    Mkdir,
    /// Changes a file's mode and times.
    Setattr,
    /// Sets an extended attribute, and reads it.
    Xattr,
    /// Has the directories that changed written to the disk.
    Dirsync,
}

impl Step {
    /// Whether it needs no names: what a device and a plain file can do.
    pub fn is_data(self) -> bool {
        matches!(self, Self::Write | Self::Read | Self::Rewrite | Self::Scan)
    }

    /// Whether it changes names or lengths, which files that are shared keep.
    fn needs_own_files(self) -> bool {
        matches!(self, Self::Create | Self::Append | Self::Delete | Self::Rename | Self::Truncate)
    }
}

/// How a file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// pread and pwrite.
    Rw,
    /// preadv and pwritev, a block in two pieces.
    Vector,
    /// preadv2 and pwritev2 with flags: NOWAIT reads that are done again, DSYNC writes.
    Flags,
    /// O_DIRECT.
    Direct,
    /// Linux AIO, with O_DIRECT.
    Aio,
    /// io_uring.
    Uring,
    /// A mapping of the file.
    Mmap,
    /// Through a pipe; what goes in is duplicated with tee and compared.
    Splice,
    /// From a file beside it, and to a socket.
    Sendfile,
    /// From and to a file beside it.
    Copy,
}

impl Way {
    /// All.
    pub const ALL: [Self; 10] = [
        Self::Rw,
        Self::Vector,
        Self::Flags,
        Self::Direct,
        Self::Aio,
        Self::Uring,
        Self::Mmap,
        Self::Splice,
        Self::Sendfile,
        Self::Copy,
    ];

    /// Whether blocks must be pages.
    pub fn is_aligned(self) -> bool {
        matches!(self, Self::Direct | Self::Aio | Self::Mmap)
    }

    /// Whether it works on a device.
    pub fn works_on_devices(self) -> bool {
        !matches!(self, Self::Sendfile | Self::Copy)
    }
}

/// How what is written is made safe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sync {
    /// Not at all.
    #[default]
    None,
    /// fsync.
    Fsync,
    /// fdatasync.
    Fdatasync,
    /// The file is opened with O_DSYNC.
    Dsync,
}

/// Some steps that all threads do before all go on to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// Steps and their weights.
    pub steps: BTreeMap<Step, u32>,
    /// How many steps each thread does; 0: until the end.
    #[serde(default)]
    pub count: u64,
}

/// The table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// What it is called.
    pub name: String,
    /// One line about it.
    #[serde(default)]
    pub about: String,
    /// Files of a thread, or of those that share.
    pub files: usize,
    /// Shortest and longest file, bytes.
    #[serde(with = "sizes")]
    pub file_size: [u64; 2],
    /// The unit that is written, checked and remembered, bytes.
    #[serde(with = "size")]
    pub block: u64,
    /// Bytes of one read or write.
    #[serde(with = "size", default)]
    pub io: u64,
    /// Most bytes of all files together; files are made shorter to fit.
    #[serde(with = "size", default = "default_total")]
    pub total: u64,
    /// Directories of a client.
    #[serde(default = "one")]
    pub dirs: usize,
    /// How many threads share files; 1: each has its own.
    #[serde(default = "one")]
    pub share: usize,
    /// Ways to read and write; each file has one, in turn.
    #[serde(default = "rw")]
    pub ways: Vec<Way>,
    /// Blocks read or written at once.
    #[serde(default = "one")]
    pub depth: usize,
    /// How what is written is made safe.
    #[serde(default)]
    pub sync: Sync,
    /// A sync for every so many writes.
    #[serde(default = "one")]
    pub sync_every: usize,
    /// Part of the files that are there at the start, percent.
    #[serde(default = "hundred")]
    pub full: u8,
    /// Steps and their weights, when there are no phases.
    #[serde(default)]
    pub steps: BTreeMap<Step, u32>,
    /// Phases, gone through again and again.
    #[serde(default, rename = "phase", skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<Phase>,
}

fn one() -> usize {
    1
}
fn hundred() -> u8 {
    100
}
fn rw() -> Vec<Way> {
    vec![Way::Rw]
}
fn default_total() -> u64 {
    2 << 30
}

/// A size as `"4k"` or a number.
mod size {
    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    pub(super) enum Size {
        Number(u64),
        Text(String),
    }

    impl Size {
        pub(super) fn bytes<E: serde::de::Error>(self) -> Result<u64, E> {
            match self {
                Self::Number(bytes) => Ok(bytes),
                Self::Text(text) => crate::mount_options::size(&text).map_err(E::custom),
            }
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        Size::deserialize(from)?.bytes()
    }

    pub(super) fn serialize<S: Serializer>(bytes: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(*bytes)
    }
}

/// A size, or two: the least and the most.
mod sizes {
    use serde::{Deserialize, Deserializer, Serialize as _, Serializer};

    use super::size::Size;

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Sizes {
        One(Size),
        Two([Size; 2]),
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u64; 2], D::Error> {
        match Sizes::deserialize(from)? {
            Sizes::One(size) => Ok([size.bytes()?; 2]),
            Sizes::Two([least, most]) => Ok([least.bytes()?, most.bytes()?]),
        }
    }

    pub(super) fn serialize<S: Serializer>(bytes: &[u64; 2], to: S) -> Result<S::Ok, S::Error> {
        bytes.serialize(to)
    }
}

impl Workload {
    /// A named profile.
    ///
    /// # Errors
    /// The names there are.
    pub fn profile(name: &str) -> Result<Self, String> {
        let text = PROFILES.iter().find(|(profile, _)| *profile == name).map(|(_, text)| text);
        let names = PROFILES.map(|(name, _)| name).join(", ");
        Self::parse(text.ok_or_else(|| format!("no profile {name}: there are {names}"))?)
    }

    /// One's own.
    ///
    /// # Errors
    /// One line.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|error| format!("{}: {error}", path.display()))?;
        Self::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Of TOML text.
    ///
    /// # Errors
    /// One line, or some that point at the place.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut workload: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if workload.io == 0 {
            workload.io = workload.block;
        }
        workload.check()?;
        Ok(workload)
    }

    fn check(&self) -> Result<(), String> {
        let problem = |wrong: bool, text: &str| if wrong { Err(text.to_owned()) } else { Ok(()) };
        problem(self.files == 0, "files: at least one")?;
        problem(self.block < MIN_BLOCK as u64, "block: 64 bytes at least")?;
        problem(self.block > 1 << 24, "block: 16 MiB at most")?;
        problem(!self.io.is_multiple_of(self.block), "io: a multiple of block")?;
        problem(self.io > 1 << 26, "io: 64 MiB at most")?;
        problem(self.file_size[0] > self.file_size[1], "file_size: the shorter one first")?;
        problem(self.file_size[1] < self.block, "file_size: a block at least")?;
        problem(self.file_size[1] / self.block > MAX_BLOCKS, "file_size: 16777216 blocks at most")?;
        problem(self.dirs == 0 || self.dirs > 10_000, "dirs: 1 to 10,000")?;
        problem(self.share == 0, "share: 1 or more")?;
        problem(self.depth == 0 || self.depth > 1024, "depth: 1 to 1024")?;
        problem(self.sync_every == 0, "sync_every: 1 or more")?;
        problem(self.full > 100, "full: a percentage")?;
        problem(self.ways.is_empty(), "ways: at least one")?;
        let aligned = self.block.is_multiple_of(4096);
        let way = self.ways.iter().find(|way| way.is_aligned() && !aligned);
        if let Some(way) = way {
            return Err(format!("ways: {way:?} needs blocks of whole pages").to_lowercase());
        }
        let phases = self.phases();
        for phase in &phases {
            problem(phase.steps.values().all(|&weight| weight == 0), "steps: none has a weight")?;
            let step = phase.steps.keys().find(|step| step.needs_own_files());
            if let Some(step) = step.filter(|_| self.share > 1) {
                return Err(format!("steps: {step:?} needs files of its own (share = 1)"));
            }
        }
        problem(phases.len() > 1 && phases.iter().any(|p| p.count == 0), "phase: give each a count")
    }

    /// Its phases; one, when it has none.
    pub fn phases(&self) -> Vec<Phase> {
        if self.phases.is_empty() {
            vec![Phase { steps: self.steps.clone(), count: 0 }]
        } else {
            self.phases.clone()
        }
    }

    /// Leaves what needs names out; what is left can run on a device.
    ///
    /// # Errors
    /// Nothing is left.
    pub fn for_device(mut self) -> Result<Self, String> {
        self.steps.retain(|step, _| step.is_data());
        for phase in &mut self.phases {
            phase.steps.retain(|step, _| step.is_data());
        }
        self.phases.retain(|phase| !phase.steps.is_empty());
        self.ways.retain(|way| way.works_on_devices());
        let steps = self.phases().into_iter().flat_map(|phase| phase.steps);
        let writes = |(step, weight)| matches!(step, Step::Write | Step::Rewrite) && weight > 0;
        // What only reads is what is left of a workload of names.
        if self.ways.is_empty() || !steps.into_iter().any(writes) {
            return Err(format!("the workload {} needs a directory", self.name));
        }
        // Sectors are the least that a device writes.
        self.block = self.block.next_multiple_of(4096);
        self.io = self.io.next_multiple_of(self.block);
        self.file_size = [self.file_size[1].max(self.block); 2];
        self.full = 100;
        Ok(self)
    }

    /// As [`Workload::for_device`], and what an NBD export can do.
    ///
    /// # Errors
    /// Nothing is left.
    pub fn for_export(mut self, export: &Export) -> Result<Self, String> {
        self.ways.retain(|&way| works_on_exports(way) && (way == Way::Rw || export.has(SEND_FUA)));
        if self.ways.is_empty() {
            self.ways = rw();
        }
        self = self.for_device()?;
        let least = u64::from(export.least);
        self.block = self.block.next_multiple_of(least);
        self.io = self.io.next_multiple_of(self.block);
        self.file_size = self.file_size.map(|size| size.max(self.block));
        if !export.has(SEND_FLUSH) {
            eprintln!("uext drive: the server has no flush: nothing it writes is promised");
            self.sync = Sync::None;
        } else if self.sync == Sync::Dsync && !export.has(SEND_FUA) {
            self.sync = Sync::Fdatasync;
        }
        if self.share > 1 && !export.has(CAN_MULTI_CONN) {
            eprintln!(
                "uext drive: the server's connections may each see other data: no files are shared"
            );
            self.share = 1;
        }
        Ok(self)
    }

    /// Makes files shorter until those of so many sets fit in `total`.
    pub fn fit(&mut self, sets: usize) {
        let most = self.total / (sets.max(1) * self.files) as u64;
        let most = (most / self.block * self.block).max(self.block);
        self.file_size = self.file_size.map(|size| size.min(most));
        let longest = self.file_size[1] / self.block * self.block;
        self.io = self.io.min(longest).max(self.block) / self.block * self.block;
    }

    /// Blocks of the longest file.
    pub fn most_blocks(&self) -> usize {
        // Checked: at most 2^24.
        (self.file_size[1] / self.block) as usize
    }

    /// Blocks of the shortest file, at least one.
    pub fn least_blocks(&self) -> usize {
        ((self.file_size[0] / self.block) as usize).max(1)
    }
}

/// A length of time: `90`, `90s`, `500ms`, `5m`, `2h`.
///
/// # Errors
/// One line.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        unit => return Err(format!("{unit} is no unit of time: use ms, s, m or h")),
    };
    let number: f64 = digits.parse().map_err(|_| format!("{digits:?} is no number"))?;
    Duration::try_from_secs_f64(number * unit).map_err(|error| error.to_string())
}

/// A rate: `100/s`, `100`, `2k/s`.
///
/// # Errors
/// One line.
pub fn rate(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix("/s").unwrap_or(text);
    let (digits, factor) = match number.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1000.0),
        None => (number, 1.0),
    };
    let rate: f64 = digits.parse().map_err(|_| format!("{text:?} is no rate, such as 100/s"))?;
    if rate > 0.0 && rate.is_finite() { Ok(rate * factor) } else { Err("more than none".into()) }
}

/// For clap: a number of operations, such as `10k`.
///
/// # Errors
/// One line.
pub fn count(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    for (suffix, factor) in [("k", 1000), ("m", 1_000_000), ("g", 1_000_000_000)] {
        if let Some(digits) = lower.strip_suffix(suffix) {
            let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no number"))?;
            return number.checked_mul(factor).ok_or_else(|| "too large".into());
        }
    }
    mount_options::size(&lower).map_err(|_| format!("{text:?} is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_parses_and_comes_back_the_same() {
        for (name, _) in PROFILES {
            let workload =
                Workload::profile(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(workload.name, name);
            assert!(!workload.about.is_empty());
            let json = serde_json::to_string(&workload).expect("as text");
            assert_eq!(serde_json::from_str::<Workload>(&json).expect("back"), workload);
        }
        assert!(Workload::profile("nail").expect_err("none").contains("mail"));
    }

    #[test]
    fn a_mistake_is_said_and_where() {
        let mail = PROFILES[1].1;
        for (from, to, said) in [
            ("block = \"4k\"", "block = \"4q\"", "no unit"),
            ("files = ", "flies = 1\nfiles = ", "unknown field"),
            ("[steps]", "ways = [\"rw\", \"telepathy\"]\n[steps]", "telepathy"),
            ("[steps]", "share = 2\n[steps]", "files of its own"),
            ("block = \"4k\"", "block = \"2k\"\nways = [\"direct\"]", "whole pages"),
        ] {
            assert!(mail.contains(from), "{from}");
            let error = Workload::parse(&mail.replacen(from, to, 1)).expect_err(to);
            assert!(error.contains(said), "{to}: {error}");
        }
    }

    #[test]
    fn times_rates_and_counts_are_read() {
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert!(duration("5 parsecs").is_err() && duration("-1s").is_err());
        assert_eq!(rate("2k/s"), Ok(2000.0));
        assert!(rate("0/s").is_err() && rate("fast").is_err());
        assert_eq!(count("10k"), Ok(10_000));
        assert!(count("many").is_err());
    }

    #[test]
    fn files_shrink_until_all_fit() {
        let mut workload = Workload::profile("stream").expect("a profile");
        workload.total = 1 << 30;
        workload.fit(1000);
        assert!(workload.file_size[1] * 1000 * workload.files as u64 <= 1 << 30);
        assert!(workload.io <= workload.file_size[1] && workload.most_blocks() >= 1);
    }
}
