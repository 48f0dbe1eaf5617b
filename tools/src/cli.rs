//! The command line: `uext COMMAND …`, and the same program by another name.
//!
//! Exit codes are those of the programs it stands in for: mount(8) 1 for usage and
//! 32 for failure, mkfs and fsck their own.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use std::sync::Arc;

use clap::{Args, Parser, Subcommand};

use uext_blockdev::BlockDevice;
use uext_ext4::{Ext4, MountOptions};
use uext_vfs::FileSystem;

use crate::bench_dev::{self, BenchDevArgs};
use crate::drive::{self, DriveArgs};
use crate::mount::{self, Mount};
use crate::mount_options::{self, MountRequest};
use crate::remount::Remount;
use crate::umount::{self, UmountOptions};

/// Exit code of mount(8): wrong usage.
const EXIT_USAGE: i32 = 1;
/// Exit code of mount(8): it failed.
const EXIT_FAILURE: i32 = 32;

/// ext2, ext3 and ext4 in userspace: make, check and mount them.
#[derive(Debug, Parser)]
#[command(name = "uext", version, max_term_width = 100, subcommand_required = true)]
#[command(arg_required_else_help = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a filesystem on a device or image
    #[command(disable_help_flag = true)]
    Mkfs(PassedOn),
    /// Check a filesystem without changing it (-n)
    #[command(disable_help_flag = true)]
    Fsck(PassedOn),
    /// Mount an image or device; returns when the mount can be used
    Mount(MountArgs),
    /// Unmount; returns when the image is clean
    Umount(UmountArgs),
    /// Compare the engines of the block layer on a file or device
    BenchDev(BenchDevArgs),
    /// Load a filesystem, file or device with many clients, and verify all they read
    Drive(Box<DriveArgs>),
}

/// Arguments that another part of the program reads.
#[derive(Debug, Args)]
struct PassedOn {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    args: Vec<OsString>,
}

#[derive(Debug, Args)]
#[command(after_help = MOUNT_OPTIONS)]
struct MountArgs {
    /// Image file or block device, or UUID=… or LABEL=…
    source: OsString,
    /// Where to mount it: an existing directory
    dir: PathBuf,
    /// Mount options, separated by commas (see below)
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Stay in the foreground, with messages on standard error
    #[arg(short, long)]
    foreground: bool,
    /// Mount read-only: the same as -o ro
    #[arg(short, long)]
    read_only: bool,
    /// Memory for cached pages, such as 512M
    #[arg(long, value_name = "SIZE", value_parser = mount_options::size)]
    cache_size: Option<u64>,
    /// Write messages to a file (else to syslog)
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Threads that serve requests (default: one per CPU, 2 to 8)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// How the image is read and written: auto, uring, aio or sync
    #[arg(long, value_name = "ENGINE", value_parser = mount_options::engine)]
    engine: Option<uext_blockdev::file::Engine>,
    /// More messages (RUST_LOG sets them one by one)
    #[arg(short, long)]
    verbose: bool,
}

const MOUNT_OPTIONS: &str = "\
Options of -o, as for the kernel's ext4 where not said otherwise:
  ro rw noatime relatime strictatime nodiratime nodev nosuid noexec sync dirsync
  data=ordered|journal|writeback  commit=SECONDS  errors=continue|remount-ro|panic
  barrier[=0|1] nobarrier acl noacl user_xattr nouser_xattr sb=BLOCK norecovery
  journal_path=PATH journal_dev=NUMBER
  context=LABEL
  remount            with ro, rw, nodev, nosuid, noexec or *atime: change a live mount (SOURCE is
                     then not looked at)
  force              mount read-write although the filesystem has errors
  cache_size=SIZE  threads=N  engine=ENGINE  log_file=FILE   as the long options
  writeback_cache    let the kernel delay writes: faster small writes
  allow_other        let other users in (as root the default; noallow_other: not)
  read_ahead_kb=N    how far the kernel reads ahead (1024)
  max_ratio=PERCENT  share of dirty pages the mount may have (100 with writeback_cache)
  transport=devfuse|uring|auto   how requests come (devfuse); uring needs the kernel's
                     enable_uring, which the option enable_uring switches on for all
  cpu_latency=auto|off|MICROSECONDS   how quickly idle CPUs must wake while the mount is
                     busy (auto: they don't halt on a virtual machine)
  spin=MICROSECONDS  how long a worker looks for the next request before it sleeps (50)
  no_open, open      whether the kernel leaves opens out (no_open)
  splice             reply to large reads by splice (nosplice)
  portable           mount through fusermount3, as for users without root

Exit status: 0 the mount is live, 1 usage, 32 failure (said in one line).";

#[derive(Debug, Args)]
struct UmountArgs {
    /// Mount point, or the image or device that is mounted
    target: PathBuf,
    /// Detach now and unmount when it is no longer used; does not wait
    #[arg(short, long)]
    lazy: bool,
    /// Abort the connection: programs that use the mount get errors; the image ends clean
    #[arg(short, long)]
    force: bool,
}

/// How mount(8) calls a mount helper.
#[derive(Debug, Parser)]
#[command(name = "mount.fuse.uext", version, about = "Mount an ext2, ext3 or ext4 filesystem")]
#[command(after_help = MOUNT_OPTIONS)]
struct MountHelper {
    /// Image file or block device
    source: OsString,
    /// Mount point
    dir: PathBuf,
    /// Mount options
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Tolerate unknown options
    #[arg(short)]
    sloppy: bool,
    /// Do everything but mount
    #[arg(short)]
    fake: bool,
    /// Do not write /etc/mtab (never done)
    #[arg(short)]
    no_mtab: bool,
    /// More messages
    #[arg(short)]
    verbose: bool,
    /// Filesystem type (only one is known)
    #[arg(short = 't', value_name = "TYPE")]
    fstype: Option<String>,
    /// Mount namespace, which mount(8) has entered already
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<OsString>,
}

/// How umount(8) calls a umount helper.
#[derive(Debug, Parser)]
#[command(name = "umount.fuse.uext", version, about = "Unmount and wait for a clean image")]
struct UmountHelper {
    /// Mount point
    dir: PathBuf,
    /// Abort the connection
    #[arg(short)]
    force: bool,
    /// Detach now, do not wait
    #[arg(short)]
    lazy: bool,
    /// Do not write /etc/mtab (never done)
    #[arg(short)]
    no_mtab: bool,
    /// Remount read-only when busy (not done: it stays as it is)
    #[arg(short)]
    remount: bool,
    /// More messages
    #[arg(short)]
    verbose: bool,
    /// Filesystem type (only one is known)
    #[arg(short = 't', value_name = "TYPE")]
    fstype: Option<String>,
    /// Mount namespace, which mount(8) has entered already
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<OsString>,
}

/// Runs the program and gives its exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> i32 {
    let args: Vec<OsString> = args.into_iter().collect();
    let name = args.first().map(Path::new).and_then(Path::file_name).unwrap_or_default();
    match name.to_str().unwrap_or_default() {
        "mkfs.uext" => mkfs(args),
        "fsck.uext" => fsck(args),
        "mount.fuse.uext" | "mount.uext" | "mount.fuseblk.uext" => match parse(&args) {
            Ok(helper) => report(mount_helper(helper)),
            Err(code) => code,
        },
        "umount.fuse.uext" | "umount.uext" | "umount.fuseblk.uext" => match parse(&args) {
            Ok(helper) => report(umount_helper(&helper)),
            Err(code) => code,
        },
        _ => match parse::<Cli>(&args) {
            Ok(cli) => run(cli.command),
            Err(code) => code,
        },
    }
}

/// Parses, or prints why not and gives the exit code.
fn parse<P: Parser>(args: &[OsString]) -> Result<P, i32> {
    P::try_parse_from(args).map_err(|error| {
        // There is nowhere to say that standard error is closed.
        let _ = error.print();
        if error.use_stderr() { EXIT_USAGE } else { 0 }
    })
}

fn run(command: Command) -> i32 {
    match command {
        Command::Mkfs(passed) => mkfs(named("uext mkfs", passed.args)),
        Command::Fsck(passed) => fsck(named("uext fsck", passed.args)),
        Command::Mount(args) => report(mount_command(args)),
        Command::Umount(args) => {
            let options = UmountOptions { lazy: args.lazy, force: args.force };
            report(umount::umount(&args.target, options).map_err(Failure::Failed))
        }
        Command::Drive(args) => drive::main(&args),
        Command::BenchDev(args) => report(bench_dev::run(&args).map_err(Failure::Failed)),
    }
}

fn named(name: &str, args: Vec<OsString>) -> Vec<OsString> {
    std::iter::once(OsStr::new(name).to_owned()).chain(args).collect()
}

/// What went wrong with a mount.
enum Failure {
    Usage(String),
    Failed(String),
}

fn report(result: Result<(), Failure>) -> i32 {
    let (code, problem) = match result {
        Ok(()) => return 0,
        Err(Failure::Usage(problem)) => (EXIT_USAGE, problem),
        Err(Failure::Failed(problem)) => (EXIT_FAILURE, problem),
    };
    // Empty: it was said already.
    if !problem.is_empty() {
        eprintln!("uext: {problem}");
    }
    code
}

fn request(options: &[String], sloppy: bool) -> Result<MountRequest, Failure> {
    let mut request = MountRequest::new(nix::unistd::geteuid().is_root());
    request.sloppy = sloppy;
    for list in options {
        request.add(list).map_err(Failure::Failed)?;
    }
    Ok(request)
}

/// Serves `-o remount`; whether it was asked for.
fn remounted(options: &[String], dir: &Path) -> Result<bool, Failure> {
    match Remount::parse(options) {
        Some(remount) => remount.apply(dir).map_err(Failure::Failed).map(|()| true),
        None => Ok(false),
    }
}

fn mount_command(args: MountArgs) -> Result<(), Failure> {
    if remounted(&args.options, &args.dir)? {
        return Ok(());
    }
    let mut request = request(&args.options, false)?;
    if args.read_only {
        request.ext4.rw_explicit = false;
        request.set_read_only(true);
    }
    if let Some(bytes) = args.cache_size {
        let bytes = usize::try_from(bytes).map_err(|_| Failure::Usage("cache size".into()))?;
        request.ext4.cache_bytes = Some(bytes);
    }
    request.log_file = args.log_file.or(request.log_file);
    request.fuse.threads = args.threads.map(usize::from).or(request.fuse.threads);
    request.engine = args.engine.unwrap_or(request.engine);
    let mount = Mount {
        source: args.source,
        dir: args.dir,
        request,
        foreground: args.foreground,
        verbose: args.verbose,
    };
    mount::mount(mount, open_ext4).map_err(Failure::Failed)
}

fn mount_helper(args: MountHelper) -> Result<(), Failure> {
    if !args.fake && remounted(&args.options, &args.dir)? {
        return Ok(());
    }
    let request = request(&args.options, args.sloppy)?;
    if args.fake {
        return Ok(());
    }
    let mount = Mount {
        source: args.source,
        dir: args.dir,
        request,
        foreground: false,
        verbose: args.verbose,
    };
    mount::mount(mount, open_ext4).map_err(Failure::Failed)
}

fn umount_helper(args: &UmountHelper) -> Result<(), Failure> {
    let options = UmountOptions { lazy: args.lazy, force: args.force };
    umount::umount(&args.dir, options).map_err(Failure::Failed)
}

/// The filesystem that is mounted.
fn open_ext4(
    dev: Arc<dyn BlockDevice>,
    name: &str,
    options: &MountOptions,
) -> Result<Arc<dyn FileSystem>, String> {
    let fs = Ext4::mount(dev, name, options).map_err(|error| error.to_string())?;
    Ok(fs)
}

fn mkfs(args: Vec<OsString>) -> i32 {
    crate::mkfs::main(args)
}

fn fsck(args: Vec<OsString>) -> i32 {
    crate::fsck::main(args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_commands_are_consistent() {
        Cli::command().debug_assert();
        MountHelper::command().debug_assert();
        UmountHelper::command().debug_assert();
    }

    /// As mount(8) and umount(8) call them: util-linux' `mnt_context_exec_helper`.
    #[test]
    fn the_helpers_take_what_mount_gives_them() {
        let all = ["-s", "-f", "-n", "-v", "-N", "/proc/1/ns/mnt", "-o", "rw", "-t", "fuse.uext"];
        let names = ["mount.fuse.uext", "image", "dir"];
        let args = MountHelper::try_parse_from(names.into_iter().chain(all)).expect("it parses");
        assert!(args.sloppy && args.fake && args.no_mtab && args.verbose);
        let all = ["-f", "-l", "-n", "-r", "-v", "-N", "1", "-t", "fuse.uext"];
        let names = ["umount.fuse.uext", "dir"];
        let args = UmountHelper::try_parse_from(names.into_iter().chain(all)).expect("it parses");
        assert!(args.force && args.lazy && args.no_mtab && args.remount && args.verbose);
    }
}
