//! The command line of `uext fsck`, as fsck(8) calls a checker.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Parser;
use uext_blockdev::file::{FileDevice, OpenOptions};

use super::{EXIT_CLEAN, EXIT_OPERATIONAL, EXIT_USAGE, Options, Progress, check};

/// Checks an ext2, ext3 or ext4 filesystem.
#[derive(Debug, Parser)]
#[command(name = "fsck.uext", disable_help_flag = true)]
struct Cli {
    /// Only report; change nothing.
    #[arg(short = 'n')]
    no: bool,
    /// Answer yes to all questions: not available yet.
    #[arg(short = 'y')]
    yes: bool,
    /// Repair what is safe: not available yet.
    #[arg(short = 'p', short_alias = 'a')]
    preen: bool,
    /// Check even when the filesystem says that it is clean.
    #[arg(short = 'f')]
    force: bool,
    /// Print what was counted.
    #[arg(short = 'v')]
    verbose: bool,
    /// Print progress: 0 a bar, else lines into this file descriptor.
    #[arg(short = 'C', value_name = "FD")]
    progress: Option<i32>,
    /// Use the superblock in this block.
    #[arg(short = 'b', value_name = "BLOCK")]
    superblock: Option<u64>,
    /// The block size that goes with -b.
    #[arg(short = 'B', value_name = "BYTES")]
    block_size: Option<u32>,
    /// The device or image of the external journal, to check with the filesystem.
    #[arg(short = 'j', value_name = "JOURNAL")]
    journal: Option<PathBuf>,
    /// Extended options: strict counts warnings as errors.
    #[arg(short = 'E', value_name = "OPTIONS")]
    extended: Option<String>,
    /// Print this help.
    #[arg(short = 'h', long = "help", action = clap::ArgAction::Help)]
    help: Option<bool>,
    /// The device or image.
    device: PathBuf,
}

/// Runs the command with its arguments, the program's name first; the exit
/// status of fsck(8).
pub fn main(args: impl IntoIterator<Item = OsString>) -> i32 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let status = if error.use_stderr() { EXIT_USAGE } else { EXIT_CLEAN };
            // Nothing better can be done when the terminal is gone.
            let _ = error.print();
            return status;
        }
    };
    match options(&cli) {
        Ok(options) => run(&cli, &options),
        Err(message) => {
            eprintln!("fsck.uext: {message}");
            EXIT_USAGE
        }
    }
}

fn options(cli: &Cli) -> Result<Options, String> {
    if cli.yes || cli.preen || !cli.no {
        return Err("repair is not available yet; use -n".into());
    }
    if let Some(size) = cli.block_size
        && (!size.is_power_of_two() || !(1024..=65536).contains(&size))
    {
        return Err(format!("{size} is no block size"));
    }
    let mut strict = false;
    for word in cli.extended.iter().flat_map(|list| list.split(',')) {
        match word {
            "strict" => strict = true,
            other => return Err(format!("unknown extended option {other:?}")),
        }
    }
    Ok(Options {
        force: cli.force,
        verbose: cli.verbose,
        superblock: cli.superblock,
        block_size: cli.block_size,
        strict,
        journal: cli.journal.clone(),
    })
}

fn run(cli: &Cli, options: &Options) -> i32 {
    // Metadata is read in small pieces and often twice, which the page cache is for.
    let open = OpenOptions { read_only: true, direct: false, ..OpenOptions::default() };
    let device = match FileDevice::open(&cli.device, open) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("fsck.uext: {error}");
            return EXIT_OPERATIONAL;
        }
    };
    let name = cli.device.display().to_string();
    let mut progress = match cli.progress {
        Some(fd) => Progress::to(fd, &name),
        None => Progress::off(),
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let outcome = check(&*device, options, &mut progress, &mut out);
    // A reader that went away does not change the verdict.
    let _ = out.flush();
    outcome.exit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(args: &[&str]) -> i32 {
        main(std::iter::once("fsck.uext").chain(args.iter().copied()).map(OsString::from))
    }

    #[test]
    fn repair_is_refused_with_the_usage_status() {
        for args in [&["-y", "x"][..], &["-p", "x"], &["-a", "x"], &["x"], &["-f", "x"]] {
            assert_eq!(status(args), EXIT_USAGE, "{args:?}");
        }
        assert_eq!(status(&["-n", "-B", "1000", "x"]), EXIT_USAGE);
        assert_eq!(status(&["-n"]), EXIT_USAGE);
        assert_eq!(status(&["-n", "/nonexistent/image"]), EXIT_OPERATIONAL);
    }
}
