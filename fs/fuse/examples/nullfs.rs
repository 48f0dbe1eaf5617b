//! Mounts the filesystem in memory: `nullfs DIR [--threads N] [--image FILE] [--open] [--wb]`.
//!
//! Measures the transport: whatever time an operation takes, no filesystem took it.

use std::path::PathBuf;
use std::sync::Arc;

use uext_fuse::null::NullFs;
use uext_fuse::{Config, Pending, Source};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = Config::default();
    let mut source = Source::Name("nullfs".into());
    let mut dir = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--threads" => config.threads = Some(args.next().ok_or("--threads N")?.parse()?),
            "--image" => source = Source::Image(args.next().ok_or("--image FILE")?.into()),
            "--open" => config.no_open = Some(false),
            "--wb" => config.writeback_cache = true,
            "--no-permissions" => config.default_permissions = false,
            _ => dir = Some(PathBuf::from(arg)),
        }
    }
    let dir = dir.ok_or("usage: nullfs DIR [options]")?.canonicalize()?;
    let pending = Pending::create(&source, &config)?;
    let session = pending.serve(Arc::new(NullFs::default()), &dir)?;
    println!("mounted");
    session.wait()?;
    Ok(())
}
