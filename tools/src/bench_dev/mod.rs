//! `uext bench-dev`: the engines of the block layer on one file or device, side by side.
//!
//! Every cell of the table (engine, operation, block size, depth, plugged or not) runs
//! for a while in each round, the cells in turn, so that a machine whose speed drifts
//! is unfair to none; what is shown are medians of the rounds. A cell is a closed loop
//! ([`load`]): so many bios in flight, and each one's end submits the next, as
//! `fio --iodepth` does with the same engine.

mod load;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use uext_blockdev::BlockDevice;
use uext_blockdev::file::{Engine, FileDevice, OpenOptions};

use crate::mount_options::size;
use load::{Figures, Load};

/// Arguments of `uext bench-dev`.
#[derive(Debug, Args)]
pub struct BenchDevArgs {
    /// File or block device; a file is made with --size if there is none
    path: PathBuf,
    /// Engines: uring, aio, sync
    #[arg(long, value_delimiter = ',', default_value = "sync,aio,uring")]
    engine: Vec<EngineName>,
    /// Operations: read, write, randread, randwrite; writing takes --destroy
    #[arg(long, value_delimiter = ',', default_value = "read,randread")]
    rw: Vec<Operation>,
    /// Bytes per bio, such as 4k
    #[arg(long, value_delimiter = ',', default_value = "4k,128k", value_parser = size)]
    block_size: Vec<u64>,
    /// Bios in flight
    #[arg(long, value_delimiter = ',', default_value = "1,32",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    depth: Vec<u32>,
    /// Whether bios are gathered in a plug, half the depth at a time
    #[arg(long, value_delimiter = ',', default_value = "off,on")]
    plug: Vec<OnOff>,
    /// Seconds for each cell and round
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Rounds; medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Use only so much from the start; makes a file of this size, filled, if there is none
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Go through the page cache
    #[arg(long)]
    buffered: bool,
    /// What is there may be overwritten
    #[arg(long)]
    destroy: bool,
    /// Write the figures as JSON to a file (-: standard output, in place of the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EngineName {
    Uring,
    Aio,
    Sync,
}

impl EngineName {
    fn engine(self) -> Engine {
        match self {
            Self::Uring => Engine::IoUring,
            Self::Aio => Engine::Aio,
            Self::Sync => Engine::Sync,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Operation {
    Read,
    Write,
    Randread,
    Randwrite,
}

impl Operation {
    fn is_write(self) -> bool {
        matches!(self, Self::Write | Self::Randwrite)
    }

    fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnOff {
    Off,
    On,
}

/// One line of the table.
struct Cell {
    engine: EngineName,
    operation: Operation,
    block_size: u64,
    depth: u32,
    plug: bool,
    rounds: Vec<Figures>,
}

/// Runs it.
///
/// # Errors
/// One line.
pub fn run(args: &BenchDevArgs) -> Result<(), String> {
    let seconds = Duration::try_from_secs_f64(args.seconds).map_err(|error| error.to_string())?;
    let writes = args.rw.iter().any(|operation| operation.is_write());
    let made = prepare_file(args)?;
    if writes && !(args.destroy || made) {
        return Err("writing destroys what is there: say --destroy".into());
    }
    let mut cells = cells(args);
    for round in 0..args.rounds {
        for cell in &mut cells {
            let options = OpenOptions {
                read_only: !writes,
                engine: cell.engine.engine(),
                direct: !args.buffered,
                ..OpenOptions::default()
            };
            let dev = FileDevice::open(&args.path, options).map_err(|error| error.to_string())?;
            let area = dev.limits().capacity.byte_offset().min(args.size.unwrap_or(u64::MAX));
            let load = Load {
                write: cell.operation.is_write(),
                random: cell.operation.is_random(),
                block_size: cell.block_size,
                depth: cell.depth,
                plug: cell.plug,
                area,
                seed: u64::from(round) + 1,
            };
            cell.rounds.push(load.run(dev, seconds)?);
        }
    }
    report::write(args, &cells)
}

/// All combinations; unplugged and plugged side by side.
fn cells(args: &BenchDevArgs) -> Vec<Cell> {
    let mut cells = Vec::new();
    for &operation in &args.rw {
        for &block_size in &args.block_size {
            for &depth in &args.depth {
                for &engine in &args.engine {
                    for plug in &args.plug {
                        let plug = *plug == OnOff::On;
                        // Half of one is nothing to gather.
                        if plug && depth == 1 && args.plug.len() > 1 {
                            continue;
                        }
                        let rounds = Vec::new();
                        cells.push(Cell { engine, operation, block_size, depth, plug, rounds });
                    }
                }
            }
        }
    }
    cells
}

/// Makes the file, filled so that reads find blocks and no holes; whether it did.
fn prepare_file(args: &BenchDevArgs) -> Result<bool, String> {
    let Some(size) = args.size.filter(|_| !args.path.exists()) else { return Ok(false) };
    let fail = |error: std::io::Error| format!("{}: {error}", args.path.display());
    let mut file = std::fs::File::create_new(&args.path).map_err(fail)?;
    let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    let mut left = size;
    while left > 0 {
        let len = left.min(block.len() as u64);
        // At most a block's length.
        std::io::Write::write_all(&mut file, &block[..len as usize]).map_err(fail)?;
        left -= len;
    }
    file.sync_all().map_err(fail)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: BenchDevArgs,
    }

    fn args(words: &str) -> BenchDevArgs {
        let words = std::iter::once("bench-dev").chain(words.split(' '));
        <Cli as clap::Parser>::try_parse_from(words).unwrap_or_else(|error| panic!("{error}")).args
    }

    fn file() -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
        let path = dir.path().join("file").display().to_string();
        (dir, path)
    }

    #[test]
    fn every_engine_moves_bytes_and_writes_only_when_told() {
        let (dir, path) = file();
        let json = dir.path().join("json").display().to_string();
        let words = format!("{path} --size 4M --seconds 0.05 --rounds 1 --depth 1,8 --json {json}");
        run(&args(&words)).expect("a run");
        let text = std::fs::read_to_string(&json).expect("figures");
        let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let cells = report["cells"].as_array().expect("cells");
        // 2 operations, 2 sizes, 3 engines; unplugged at both depths, plugged at one.
        assert_eq!(cells.len(), 2 * 2 * 3 * 3);
        assert!(cells.iter().all(|cell| cell["iops"].as_f64() > Some(1.0)), "{text}");

        let before = std::fs::read(&path).expect("the file");
        let refused = run(&args(&format!("{path} --rw write"))).expect_err("it has contents");
        assert!(refused.contains("--destroy"));
        assert!(std::fs::read(&path).expect("the file") == before);
        let words = format!("{path} --rw write,randwrite --destroy --seconds 0.05 --rounds 1");
        run(&args(&words)).expect("a run");
        assert!(std::fs::read(&path).expect("the file") != before);
    }

    #[test]
    fn an_area_smaller_than_a_bio_is_refused() {
        let (_dir, path) = file();
        let words = format!("{path} --size 64k --block-size 128k --seconds 0.05 --rounds 1");
        assert!(run(&args(&words)).expect_err("too small").contains("smaller"));
    }
}
