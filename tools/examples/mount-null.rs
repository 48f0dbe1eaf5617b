//! `uext mount` and `uext umount` around the filesystem in memory: what the daemon
//! does, without ext4. With `cache_size=1` there is no filesystem to be found.
//! `mount-null mount IMG DIR OPTIONS` and `mount-null umount DIR`.
//!

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use uext_blockdev::BlockDevice;
use uext_ext4::MountOptions;
use uext_fuse::null::NullFs;
use uext_tools::mount::{Mount, mount};
use uext_tools::mount_options::MountRequest;
use uext_tools::umount::{UmountOptions, umount};
use uext_vfs::FileSystem;

fn opener(
    _dev: Arc<dyn BlockDevice>,
    _name: &str,
    options: &MountOptions,
) -> Result<Arc<dyn FileSystem>, String> {
    // A size no real mount has stands for a damaged image.
    if options.cache_bytes == Some(1) {
        return Err("no filesystem found".into());
    }
    log::warn!("everything will be lost");
    Ok(Arc::new(NullFs::default()))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let result = match args.iter().map(String::as_str).collect::<Vec<_>>()[1..] {
        ["mount", source, dir, options] => run_mount(source, dir, options),
        ["umount", dir] => umount(Path::new(dir), UmountOptions::default()),
        _ => Err("usage: mount-null mount IMG DIR OPTIONS | umount DIR".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            if !problem.is_empty() {
                eprintln!("uext: {problem}");
            }
            ExitCode::from(32)
        }
    }
}

fn run_mount(source: &str, dir: &str, options: &str) -> Result<(), String> {
    let mut request = MountRequest::new(nix::unistd::geteuid().is_root());
    request.add(options)?;
    let mount_it = Mount {
        source: source.into(),
        dir: PathBuf::from(dir),
        request,
        foreground: false,
        verbose: false,
    };
    mount(mount_it, opener)
}
