//! `uext fsck`: checks a filesystem; for now it only reports.
//!
//! It reads by the block layer and the format's codecs alone, never by the
//! filesystem, so that it does not share the filesystem's mistakes. The passes
//! are e2fsck's: superblock and descriptors (0), inodes and blocks (1),
//! directories (2), connectivity (3), links (4), bitmaps and counts (5).
//!
//! Invariants:
//! - The device is opened read-only and never written. A log that needs recovery is looked
//!   through, see [`replay`]: the verdict is about the filesystem that the next mount finds.
//! - Memory is bounded by the size of the device, and so is work, whatever the
//!   image says: see [`pass0`] for sizes, [`pass1_blocks`] for maps.
//! - The verdict is that of `e2fsck -fn`: see [`problem::Weight`].

mod cli;
mod context;
mod orphans;
mod pass0;
mod pass1;
mod pass1_blocks;
mod pass1_xattr;
mod pass2;
mod pass2_htree;
mod pass3;
mod pass4;
mod pass5;
pub mod problem;
mod progress;
mod replay;
mod reserved;
mod walk;

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use uext_blockdev::BlockDevice;
use uext_blockdev::file::{FileDevice, OpenOptions};
use uext_ondisk::features::Incompat;
use uext_ondisk::superblock::{State, Superblock};

pub use cli::main;
pub use progress::Progress;

use context::{BitSet, Context, InodeState, Reporter, Stop};
use problem::Code;

/// Exit status: the filesystem is clean.
pub const EXIT_CLEAN: i32 = 0;
/// Exit status bit: errors were left.
pub const EXIT_ERRORS: i32 = 4;
/// Exit status bit: the check could not be done.
pub const EXIT_OPERATIONAL: i32 = 8;
/// Exit status: the command line is wrong.
pub const EXIT_USAGE: i32 = 16;

/// How to check.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Check even what says that it is clean (`-f`).
    pub force: bool,
    /// Print what was counted (`-v`).
    pub verbose: bool,
    /// Use the superblock in this block (`-b`).
    pub superblock: Option<u64>,
    /// Block size for `-b` (`-B`).
    pub block_size: Option<u32>,
    /// Count warnings as errors (`-E strict`).
    pub strict: bool,
    /// The external journal (`-j`).
    pub journal: Option<PathBuf>,
}

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The exit status of fsck(8).
    pub exit: i32,
    /// Problems that count against the filesystem.
    pub errors: u64,
    /// Problems that do not.
    pub warnings: u64,
    /// How many of each kind.
    pub counts: BTreeMap<Code, u64>,
    /// The check was skipped, since the filesystem says that it is clean.
    pub skipped: bool,
}

/// Checks the filesystem on a device; messages go to `out`. Nothing is written
/// to the device.
pub fn check(
    dev: &dyn BlockDevice,
    options: &Options,
    progress: &mut Progress,
    out: &mut dyn Write,
) -> Outcome {
    let external = options.journal.as_deref().and_then(|path| {
        let open = OpenOptions { read_only: true, direct: false, ..OpenOptions::default() };
        // Why it cannot be opened the check of the journal says.
        FileDevice::open(path, open).ok()
    });
    let external = external.as_deref().map(|device| device as &dyn BlockDevice);
    let view;
    let mut report = Reporter::new(out);
    // Who names a superblock wants to see the disk as that one has it.
    let through = match options.superblock {
        None => replay::look_through(dev, external, &mut report),
        Some(_) => None,
    };
    let looked = through.is_some();
    let dev = match through {
        Some(through) => {
            view = through;
            &view as &dyn BlockDevice
        }
        None => dev,
    };
    let stopped = match pass0::open(dev, options, &mut report) {
        Err(Stop) => true,
        Ok(opened) if !looked && !options.force && may_skip(&opened.sb) && report.errors == 0 => {
            summary(&mut report, &opened.sb, "clean");
            return Outcome { skipped: true, ..outcome(&report, false, options) };
        }
        Ok(mut opened) => {
            if looked {
                replay::count_free(&mut opened);
            }
            run_passes(dev, looked, opened, options, progress, &mut report);
            false
        }
    };
    progress.finish();
    let outcome = outcome(&report, stopped, options);
    if outcome.exit != EXIT_CLEAN {
        report.say("The filesystem has errors.");
    }
    outcome
}

fn outcome(report: &Reporter<'_>, stopped: bool, options: &Options) -> Outcome {
    let bad = report.errors > 0 || (options.strict && report.warnings > 0);
    let mut exit = if bad { EXIT_ERRORS } else { EXIT_CLEAN };
    if stopped {
        exit |= EXIT_OPERATIONAL;
    }
    Outcome {
        exit,
        errors: report.errors,
        warnings: report.warnings,
        counts: report.counts.clone(),
        skipped: false,
    }
}

fn run_passes<'a>(
    dev: &'a dyn BlockDevice,
    looked_through: bool,
    opened: pass0::Opened,
    options: &Options,
    progress: &mut Progress,
    report: &mut Reporter<'a>,
) {
    let clusters = opened.sb.blocks_count() >> opened.sb.cluster_ratio_bits();
    let inodes = opened.sb.inodes_count() as usize;
    let orphans = if looked_through { replay::orphans(dev, &opened.sb) } else { HashSet::new() };
    let mut ctx = Context {
        dev,
        looked_through,
        orphans,
        used: BitSet::new(clusters + 1),
        metadata: BitSet::new(opened.sb.blocks_count()),
        inodes: vec![InodeState::default(); inodes + 1],
        descs: opened.descs,
        bad_tables: opened.bad_tables,
        sb: opened.sb,
        report,
        progress,
        dir_blocks: Vec::new(),
        dirs: Vec::new(),
        large_files: 0,
        large_dirs: 0,
    };
    reserved::check_times(&mut ctx, now());
    reserved::check_quota_inodes(&mut ctx);
    reserved::check_journal(&mut ctx, options.journal.as_deref());
    reserved::check_resize_inode(&mut ctx);
    let say = |ctx: &mut Context<'_, '_>, line: &str| ctx.report.say(line);
    say(&mut ctx, "Pass 1: inodes, blocks and sizes");
    pass1::run(&mut ctx);
    say(&mut ctx, "Pass 2: directories");
    pass2::run(&mut ctx);
    say(&mut ctx, "Pass 3: connectivity");
    pass3::run(&mut ctx);
    say(&mut ctx, "Pass 4: link counts");
    pass4::run(&mut ctx);
    say(&mut ctx, "Pass 5: bitmaps and counts");
    pass5::run(&mut ctx);
    orphans::run(&mut ctx);
    if !ctx.orphans.is_empty() {
        let count = ctx.orphans.len();
        ctx.report.say(&format!("{count} orphan inodes wait for the next mount."));
    }
    if options.verbose {
        let dirs = ctx.dirs.len();
        let files = ctx.inodes.iter().filter(|state| state.is(InodeState::REG)).count();
        let used = ctx.inodes.iter().filter(|state| state.is(InodeState::USED)).count();
        ctx.report.say(&format!("{used} inodes in use: {dirs} directories, {files} files"));
    }
    let sb = ctx.sb.clone();
    summary(ctx.report, &sb, "checked");
}

fn summary(report: &mut Reporter<'_>, sb: &Superblock, word: &str) {
    let (inodes, blocks) = (sb.inodes_count(), sb.blocks_count());
    let used_inodes = inodes.saturating_sub(sb.free_inodes_count());
    let used_blocks = blocks.saturating_sub(sb.free_blocks_count());
    report.say(&format!(
        "{word}: {used_inodes}/{inodes} inodes, {used_blocks}/{blocks} blocks in use"
    ));
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Whether a filesystem that says it is clean may be believed.
fn may_skip(sb: &Superblock) -> bool {
    let raw = sb.raw();
    let state = sb.state();
    let clean = state.contains(State::VALID) && !state.contains(State::ERROR);
    let recover = sb.features().incompat.contains(Incompat::RECOVER);
    let (mounts, most) = (raw.s_mnt_count.get(), raw.s_max_mnt_count.get());
    let often = most.cast_signed() > 0 && mounts >= most;
    let interval = u64::from(raw.s_checkinterval.get());
    let long = interval > 0 && now().saturating_sub(sb.last_check_time()) >= interval;
    clean && !recover && !often && !long
}
