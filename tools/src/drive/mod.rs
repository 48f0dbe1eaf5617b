//! `uext drive`: many clients at once on a filesystem, a file or a device, each byte that
//! they read verified.
//!
//! - [`coordinator`]: one process, one epoll ([`reactor`]); starts clients and counts;
//! - [`client`]: a process with threads ([`worker`]), each with [`files`] and [`ways`];
//! - [`control`]: shared memory where they meet, on the futexes of `uext-drive-sys`;
//! - [`ledger`]: the table of what was written and what was made safe, or `--log`'s file;
//! - [`block`]: what is written; [`verify`]: whether it is there;
//! - [`raw`]: files, devices and NBD exports;
//! - [`workload`], [`plan`]: what is done; [`stats`], [`report`], [`html`]: what came of it.
//!
//! Locks, outermost first: the mutexes of one transfer's pieces in the order of their
//! places (`control`). Nothing else is held by anybody while it waits.

pub mod block;
pub mod client;
pub mod control;
pub mod coordinator;
pub mod files;
pub mod html;
pub mod ledger;
pub mod message;
pub mod plan;
pub mod raw;
pub mod reactor;
pub mod report;
pub mod stats;
pub mod verify;
pub mod ways;
pub mod worker;
pub mod workload;

use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use uext_blockdev::nbd::address::is_address;

use ledger::Ledger;
use plan::{DIRECTORY, Plan, Target};
use report::Report;
use verify::When;
use workload::Workload;

/// Exit status: wrong usage, or nothing could be run.
const EXIT_USAGE: i32 = 1;
/// Exit status: an operation failed, or a client was lost.
const EXIT_FAILED: i32 = 2;
/// Exit status: the data is not what it must be.
const EXIT_WRONG: i32 = 3;
/// Exit status: ended by Ctrl-C, with nothing wrong so far.
const EXIT_INTERRUPTED: i32 = 130;

/// How long it runs when nothing is said.
const DEFAULT_TIME: Duration = Duration::from_secs(10);

/// Arguments of `uext drive`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = HELP)]
pub struct DriveArgs {
    #[command(subcommand)]
    command: Option<DriveCommand>,
    /// A mounted directory, a file, a block device, or nbd://HOST[:PORT][/EXPORT],
    /// nbd+unix:///[EXPORT]?socket=PATH
    #[arg(required_unless_present_any = ["client", "show"])]
    target: Option<PathBuf>,
    /// What is done: metadata, mail, database, build, stream or mixed
    #[arg(long, value_name = "NAME", conflicts_with = "workload", default_value = "mixed")]
    profile: String,
    /// One's own workload (--show prints those of the profiles)
    #[arg(long, value_name = "FILE.toml")]
    workload: Option<PathBuf>,
    /// Processes
    #[arg(long, value_name = "N", default_value_t = 4)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=20_000))]
    clients: u32,
    /// Threads of each
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: u32,
    /// How long, such as 10s, 500ms, 5m (10s)
    #[arg(long, value_parser = workload::duration)]
    time: Option<Duration>,
    /// How many steps of the workload, of all together, such as 10k
    #[arg(long, value_name = "N", value_parser = workload::count)]
    ops: Option<u64>,
    /// Most steps per second, of all together
    #[arg(long, value_name = "N/s", value_parser = workload::rate)]
    rate: Option<f64>,
    /// Start the threads one after the other in this time
    #[arg(long, value_name = "TIME", value_parser = workload::duration)]
    ramp: Option<Duration>,
    /// Where all chance comes from; the last run's to repeat it
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Keep the table of what was written in a file, and the files that were written
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Read all that was written when the run has ended
    #[arg(long)]
    verify_after: bool,
    /// Write the figures to a file (-: standard output, in place of the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with figures and pictures
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// A file or device that holds something may be overwritten
    #[arg(long)]
    destroy: bool,
    /// No progress line
    #[arg(short, long)]
    quiet: bool,
    /// Print a profile as a workload file
    #[arg(long, value_name = "PROFILE")]
    show: Option<String>,
    #[arg(long, hide = true)]
    client: bool,
}

const HELP: &str = "\
Every block that is written says what it is, and every one that is read is verified. With
--log, what was written can be verified after a crash or a remount:

  uext drive /mnt --profile mail --clients 100 --time 30s --log /var/tmp/log
  (crash, mount again)
  uext drive verify /mnt --log /var/tmp/log

The files are in TARGET/uext-drive, which is removed at the end without --log.

Exit status: 0 nothing failed and everything verified; 1 usage, or nothing was run;
2 an operation failed or a client was lost; 3 wrong data; 130 interrupted.";

#[derive(Debug, Subcommand)]
enum DriveCommand {
    /// Check a target against the log of a run, after a crash or a remount
    Verify(VerifyArgs),
}

#[derive(Debug, Args)]
struct VerifyArgs {
    /// What was driven
    target: PathBuf,
    /// The run's log
    #[arg(long, value_name = "FILE")]
    log: PathBuf,
    /// Write the result as JSON (-: standard output, in place of the text)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs it; its exit status.
pub fn main(args: &DriveArgs) -> i32 {
    if args.client {
        return client::main();
    }
    let result = match (&args.command, &args.show) {
        (Some(DriveCommand::Verify(args)), _) => verify_command(args),
        (None, Some(name)) => show(name),
        (None, None) => drive(args),
    };
    result.unwrap_or_else(|problem| {
        eprintln!("uext drive: {problem}");
        EXIT_USAGE
    })
}

fn show(name: &str) -> Result<i32, String> {
    Workload::profile(name)?;
    let text = workload::PROFILES.iter().find(|(profile, _)| *profile == name);
    print!("{}", text.map_or("", |(_, text)| text));
    Ok(0)
}

fn verify_command(args: &VerifyArgs) -> Result<i32, String> {
    let (ledger, plan) = Ledger::open(&args.log)?;
    let verdict = verify::verify(&plan, &ledger, &args.target, When::Later)?;
    if let Some(path) = &args.json {
        write(path, &format!("{:#}\n", report::verdict_json(&verdict)))?;
    }
    if args.json.as_deref() != Some(Path::new("-")) {
        report::print_verdict(&verdict);
    }
    Ok(if verdict.count == 0 { 0 } else { EXIT_WRONG })
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    if path == Path::new("-") {
        print!("{text}");
        return Ok(());
    }
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn drive(args: &DriveArgs) -> Result<i32, String> {
    let target = args.target.as_deref().ok_or("what is to be driven?")?;
    let mut workload = match &args.workload {
        Some(path) => Workload::read(path)?,
        None => Workload::profile(&args.profile)?,
    };
    let target = match target.to_str().filter(|text| is_address(text)) {
        Some(address) => {
            let (target, export) = raw::find_export(address)?;
            workload = workload.for_export(&export)?;
            target
        }
        None => find_target(target)?,
    };
    if matches!(target, Target::Device(..)) {
        workload = workload.for_device()?;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Whatever the bits: they are printed.
    let fresh = now.as_nanos() as u64 ^ u64::from(std::process::id()) << 32;
    let mut plan = Plan {
        target,
        workload,
        run: fresh,
        seed: args.seed.unwrap_or(fresh % 1_000_000_000),
        clients: args.clients as usize,
        threads: args.threads as usize,
        ops: args.ops.unwrap_or(0),
        rate: args.rate.unwrap_or(0.0),
        ramp: args.ramp.unwrap_or_default().as_secs_f64(),
    };
    if plan.workers() > uext_drive_sys::Barrier::MAX {
        return Err(format!(
            "{} threads are more than {}",
            plan.workers(),
            uext_drive_sys::Barrier::MAX
        ));
    }
    fit(&mut plan)?;
    let _claim = raw::claim(&plan.target, args.destroy)?;
    prepare_target(&plan)?;
    let (ledger, table) = Ledger::create(&plan, args.log.as_deref())?;
    let time = args.time.or(if args.ops.is_some() { None } else { Some(DEFAULT_TIME) });
    let run = coordinator::run(&plan, &table, time, args.quiet)?;
    let path = match &plan.target {
        Target::Directory(path) | Target::Device(path, _) => path.clone(),
        Target::Nbd(address, _) => PathBuf::from(address),
    };
    let broken = !run.failures.is_empty() || run.stuck > 0;
    let verdict =
        (args.verify_after && !broken).then(|| verify::verify(&plan, &ledger, &path, When::Now));
    let report = Report { plan: &plan, run: &run, verdict: verdict.as_ref() };
    let code = report.exit_code();
    if let Some(path) = &args.html {
        write(path, &html::page(&report))?;
    }
    if let Some(path) = &args.json {
        write(path, &format!("{:#}\n", report.json()))?;
    }
    if args.json.as_deref() != Some(Path::new("-")) {
        report.print();
    }
    // What is wrong stays to be looked at; what hangs would take this along.
    if args.log.is_none() && code != EXIT_WRONG && run.stuck == 0 {
        clean_up(&plan);
    }
    Ok(code)
}

fn find_target(path: &Path) -> Result<Target, String> {
    let fail = |error: std::io::Error| format!("{}: {error}", path.display());
    let metadata = std::fs::metadata(path).map_err(fail)?;
    let path = std::fs::canonicalize(path).map_err(fail)?;
    if metadata.is_dir() {
        return Ok(Target::Directory(path));
    }
    let bytes = if metadata.file_type().is_block_device() {
        let file = std::fs::File::open(&path).map_err(fail)?;
        rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|error| fail(error.into()))?
    } else if metadata.is_file() {
        metadata.len()
    } else {
        return Err(format!("{}: neither a directory, a file nor a block device", path.display()));
    };
    Ok(Target::Device(path, bytes))
}

/// Makes files as long as all fit in what there is.
fn fit(plan: &mut Plan) -> Result<(), String> {
    let sets = plan.sets();
    match &plan.target {
        Target::Directory(path) => {
            // Files, logs and what the filesystem itself needs: a part of what is free.
            let space = rustix::fs::statvfs(path).map_err(|error| error.to_string())?;
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            plan.workload.total = plan.workload.total.min(free / 10 * 7);
        }
        Target::Device(_, bytes) | Target::Nbd(_, bytes) => {
            plan.workload.total = plan.workload.total.min(*bytes);
        }
    }
    plan.workload.fit(sets);
    match &plan.target {
        Target::Device(_, bytes) | Target::Nbd(_, bytes) if plan.device_bytes() > *bytes => {
            Err(format!("{bytes} bytes are too few for so many clients"))
        }
        _ => Ok(()),
    }
}

/// Makes the directory of the files anew; other targets are ready as they are.
fn prepare_target(plan: &Plan) -> Result<(), String> {
    let Target::Directory(path) = &plan.target else { return Ok(()) };
    let path = path.join(DIRECTORY);
    let fail = |error: std::io::Error| format!("{}: {error}", path.display());
    if path.exists() {
        for entry in std::fs::read_dir(&path).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            if !name.to_str().is_some_and(plan::is_client_dir) {
                let name = name.display();
                return Err(format!("{}: has {name}, which no run made", path.display()));
            }
        }
        std::fs::remove_dir_all(&path).map_err(fail)?;
    }
    std::fs::create_dir(&path).map_err(fail)?;
    // An earlier run's files must not come back by a crash.
    let parent = path.parent().unwrap_or(&path);
    let target = std::fs::File::open(parent).map_err(fail)?;
    target.sync_all().map_err(fail)?;
    rustix::fs::syncfs(&target).map_err(|error| fail(error.into()))
}

fn clean_up(plan: &Plan) {
    if let Target::Directory(path) = &plan.target {
        let path = path.join(DIRECTORY);
        if let Err(error) = std::fs::remove_dir_all(&path) {
            eprintln!("uext drive: {} stays: {error}", path.display());
        }
    }
}
