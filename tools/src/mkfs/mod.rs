//! `uext mkfs`: makes ext2, ext3 and ext4.
//!
//! - [`options`] is the command line, with mke2fs's letters;
//! - [`params`] decides numbers and features, [`layout`] and [`files`] decide places,
//!   without I/O;
//! - [`writer`] writes, and nothing is a filesystem until its last write;
//! - [`journal_dev`] makes and joins journals on devices of their own;
//! - [`guard`] keeps it from what is in use or holds something.
//!
//! It uses the format and the block layer, never the filesystem's own allocator, so that
//! each can test the other.

mod error;
pub mod files;
pub mod guard;
pub mod journal_dev;
pub mod layout;
pub mod options;
pub mod params;
mod progress;
pub mod space;
pub mod writer;

use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Write as _};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use clap::Parser;
use uext_blockdev::BlockDevice;
use uext_blockdev::file::{FileDevice, OpenOptions};
use uext_ondisk::GroupNumber;
use uext_ondisk::superblock::Superblock;

pub use error::{MkfsError, Result};
use files::FirstFiles;
use layout::Layout;
use options::Options;
use params::{DeviceFacts, Params, Surroundings};
use progress::Progress;

/// The program: `args` begin with its name. Gives the exit code, 0 or 1.
pub fn main(args: impl IntoIterator<Item = OsString>) -> i32 {
    let options = match Options::try_parse_from(args) {
        Ok(options) => options,
        Err(error) => {
            // There is nowhere to say that standard error is closed.
            let _ = error.print();
            return i32::from(error.use_stderr());
        }
    };
    if options.version {
        eprintln!("uext mkfs {}, with the defaults of mke2fs 1.47.4", env!("CARGO_PKG_VERSION"));
        return 0;
    }
    let around = Surroundings::from_environment();
    let made = match params::wants_journal_dev(&options) {
        Ok(false) => run(&options, &around).map(|_| ()),
        Ok(true) => run_journal_dev(&options, &around),
        Err(error) => Err(error),
    };
    match made {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("uext mkfs: {error}");
            1
        }
    }
}

/// Makes the filesystem the options ask for, or with `-n` only says what it would be.
///
/// # Errors
/// Why it was not made.
pub fn run(options: &Options, around: &Surroundings) -> Result<Superblock> {
    let target = options.target.as_deref().ok_or_else(|| error::usage("no image or device"))?;
    let wanted = params::asked_size(options)?;
    let kind = TargetKind::of(target, wanted)?;
    if !options.dry_run
        && options.force < 2
        && let Some(user) = guard::user_of(target)
    {
        let text = format!("{} is {user}; nothing was done", target.display());
        return Err(MkfsError::Refused(text));
    }
    let facts = kind.facts(target)?;
    let params = Params::resolve(options, &facts, around)?;
    let mut layout = Layout::plan(&params)?;
    let files = FirstFiles::plan(&params, &mut layout)?;
    let quiet = options.quiet && !options.dry_run;
    for warning in params.warnings.iter().chain(&files.warnings) {
        eprintln!("uext mkfs: warning: {warning}");
    }
    if !quiet {
        say_what(target, &params, &layout.sb, &files, options.verbose);
    }
    if options.dry_run {
        return Ok(layout.sb);
    }
    let bytes = params.blocks * u64::from(params.block_size);
    let target = PreparedTarget::new(target, &kind, bytes)?;
    let dev = FileDevice::open(target.path, OpenOptions::default())?;
    let dev: &dyn BlockDevice = &*dev;
    let bytes = layout.sb.blocks_count() << layout.sb.block_size_bits();
    if bytes > dev.size() {
        let text = format!("the device has {} bytes, the filesystem {bytes}", dev.size());
        return Err(error::usage(text));
    }
    if !target.is_new {
        refuse_contents(dev, target.path, options)?;
    }
    if let Some(journal) = &params.journal_device {
        let device = journal.open(options.force > 0)?;
        journal.join(&*device, params.uuid)?;
    }
    let progress = Progress::new(!quiet);
    let punched = kind != TargetKind::Block;
    writer::write(dev, &params, &mut layout, &files, punched, &progress)?;
    target.keep();
    drop(progress);
    if !quiet {
        println!("Done.");
    }
    Ok(layout.sb)
}

/// Makes a journal device (`-O journal_dev`).
fn run_journal_dev(options: &Options, around: &Surroundings) -> Result<()> {
    let target = options.target.as_deref().ok_or_else(|| error::usage("no image or device"))?;
    let kind = TargetKind::of(target, params::asked_size(options)?)?;
    if !options.dry_run
        && options.force < 2
        && let Some(user) = guard::user_of(target)
    {
        let text = format!("{} is {user}; nothing was done", target.display());
        return Err(MkfsError::Refused(text));
    }
    let new = params::new_journal(options, &kind.facts(target)?, around)?;
    let size = u64::from(new.block_size);
    if !options.quiet || options.dry_run {
        println!("journal of {} blocks of {size} bytes on {}", new.blocks, target.display());
        println!("  UUID {}", new.uuid);
    }
    if options.dry_run {
        return Ok(());
    }
    let target = PreparedTarget::new(target, &kind, new.blocks * size)?;
    let dev = FileDevice::open(target.path, OpenOptions::default())?;
    let dev: &dyn BlockDevice = &*dev;
    if new.blocks * size > dev.size() {
        let text =
            format!("the device has {} bytes, the journal {}", dev.size(), new.blocks * size);
        return Err(error::usage(text));
    }
    if !target.is_new {
        refuse_contents(dev, target.path, options)?;
    }
    journal_dev::make(dev, &new)?;
    target.keep();
    Ok(())
}

/// Makes a filesystem on an open device: for tests and other programs. Nothing is asked and
/// nothing is printed; `params.discard` discards first.
///
/// # Errors
/// Why it was not made.
pub fn format(dev: &dyn BlockDevice, params: &Params) -> Result<Superblock> {
    let mut layout = Layout::plan(params)?;
    let files = FirstFiles::plan(params, &mut layout)?;
    writer::write(dev, params, &mut layout, &files, false, &Progress::new(false))?;
    Ok(layout.sb)
}

/// What the target is before anything is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TargetKind {
    /// To be created.
    New,
    /// An image.
    Image,
    /// A block device.
    Block,
}

impl TargetKind {
    fn of(target: &Path, wanted: Option<u64>) -> Result<Self> {
        match std::fs::metadata(target) {
            Ok(meta) if meta.file_type().is_block_device() => Ok(Self::Block),
            Ok(meta) if meta.is_file() => Ok(Self::Image),
            Ok(_) => {
                let text = format!("{} is neither a file nor a block device", target.display());
                Err(MkfsError::Refused(text))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && wanted.is_some() => {
                Ok(Self::New)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let text = format!("{} does not exist and no size was given", target.display());
                Err(error::usage(text))
            }
            Err(source) => Err(MkfsError::File { path: target.to_owned(), source }),
        }
    }

    fn facts(self, target: &Path) -> Result<DeviceFacts> {
        match self {
            Self::New => Ok(DeviceFacts { bytes: 0, logical_block_size: 512 }),
            Self::Image => {
                let meta = std::fs::metadata(target)
                    .map_err(|source| MkfsError::File { path: target.to_owned(), source })?;
                Ok(DeviceFacts { bytes: meta.len(), logical_block_size: 512 })
            }
            Self::Block => {
                let options = OpenOptions { read_only: true, ..OpenOptions::default() };
                let dev = FileDevice::open(target, options)?;
                let logical_block_size = dev.limits().logical_block_size;
                let dev: &dyn BlockDevice = &*dev;
                Ok(DeviceFacts { bytes: dev.size(), logical_block_size })
            }
        }
    }
}

/// A target that exists and is long enough. One that was created goes away again unless kept.
struct PreparedTarget<'a> {
    path: &'a Path,
    is_new: bool,
    kept: std::cell::Cell<bool>,
}

impl<'a> PreparedTarget<'a> {
    fn new(path: &'a Path, kind: &TargetKind, bytes: u64) -> Result<Self> {
        let failed = |source| MkfsError::File { path: path.to_owned(), source };
        let is_new = *kind == TargetKind::New;
        let prepared = Self { path, is_new, kept: std::cell::Cell::new(!is_new) };
        if is_new {
            File::create_new(path).and_then(|file| file.set_len(bytes)).map_err(failed)?;
        } else if *kind == TargetKind::Image {
            let file = File::options().write(true).open(path).map_err(failed)?;
            if file.metadata().map_err(failed)?.len() < bytes {
                file.set_len(bytes).map_err(failed)?;
            }
        }
        Ok(prepared)
    }

    fn keep(&self) {
        self.kept.set(true);
    }
}

impl Drop for PreparedTarget<'_> {
    fn drop(&mut self) {
        if !self.kept.get() {
            // The error that led here is the one to tell.
            let _ = std::fs::remove_file(self.path);
        }
    }
}

/// A target that holds something needs `-F`, or a yes from who sits there.
fn refuse_contents(dev: &dyn BlockDevice, target: &Path, options: &Options) -> Result<()> {
    if options.force > 0 {
        return Ok(());
    }
    let read = guard::contents(dev);
    let found = read.map_err(|status| MkfsError::Device { what: "reading the target", status })?;
    let Some(found) = found else { return Ok(()) };
    let text = format!("{} holds {found}", target.display());
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        print!("{text}. Overwrite it? (y/N) ");
        let mut answer = String::new();
        let asked =
            std::io::stdout().flush().and_then(|()| std::io::stdin().read_line(&mut answer));
        if asked.is_ok() && answer.trim().eq_ignore_ascii_case("y") {
            return Ok(());
        }
    }
    Err(MkfsError::Refused(format!("{text}; -F overwrites it")))
}

/// Says what is made.
fn say_what(target: &Path, params: &Params, sb: &Superblock, files: &FirstFiles, verbose: bool) {
    let label = String::from_utf8_lossy(&params.label);
    let named = if label.is_empty() { String::new() } else { format!(" {label:?}") };
    println!("{}{named} on {}", params.fs_type, target.display());
    println!(
        "  {} blocks of {} bytes in {} groups, {} inodes of {} bytes",
        sb.blocks_count(),
        sb.block_size(),
        sb.groups_count(),
        sb.inodes_count(),
        sb.inode_size()
    );
    println!("  UUID {}", sb.uuid());
    if files.journal_blocks > 0 {
        println!("  journal of {} blocks", files.journal_blocks);
    }
    if let Some(journal) = &params.journal_device {
        println!("  journal on {}, UUID {}", journal.path.display(), journal.own.uuid);
    }
    let backups: Vec<String> = sb
        .backup_groups()
        .map(|group: GroupNumber| sb.group_first_block(group).to_string())
        .collect();
    if !backups.is_empty() {
        println!("  backup superblocks at blocks {}", backups.join(", "));
    }
    if verbose {
        println!("  features: {}", sb.features());
        println!(
            "  {} blocks and {} inodes per group, {} reserved for root, {} descriptor blocks, {} more reserved",
            sb.blocks_per_group(),
            sb.inodes_per_group(),
            sb.reserved_blocks_count(),
            sb.gdt_blocks(),
            sb.reserved_gdt_blocks()
        );
    }
}
