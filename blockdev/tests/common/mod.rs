//! Where file devices are tested: a file on a disk, one on tmpfs, a loop device.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::NamedTempFile;

/// A file or loop device that goes away with its value.
pub struct Place {
    pub what: &'static str,
    file: NamedTempFile,
    loop_dev: Option<PathBuf>,
}

impl Place {
    pub fn path(&self) -> &Path {
        self.loop_dev.as_deref().unwrap_or(self.file.path())
    }

    /// Sets the size; a loop device is told.
    pub fn resize(&self, bytes: u64) {
        self.file.as_file().set_len(bytes).unwrap();
        if let Some(dev) = &self.loop_dev {
            assert!(Command::new("losetup").arg("-c").arg(dev).status().unwrap().success());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(dev) = &self.loop_dev {
            let _ = Command::new("losetup").arg("-d").arg(dev).status();
        }
    }
}

/// An empty file in `dir`.
pub fn file_in(what: &'static str, dir: &Path) -> Place {
    Place { what, file: NamedTempFile::new_in(dir).unwrap(), loop_dev: None }
}

/// A file on the disk that the build directory is on.
pub fn disk_file() -> Place {
    file_in("disk file", Path::new(env!("CARGO_TARGET_TMPDIR")))
}

/// A file in memory, where there is no direct I/O.
pub fn tmpfs_file() -> Option<Place> {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        eprintln!("SKIP: no tmpfs at /dev/shm");
        return None;
    }
    Some(file_in("tmpfs file", shm))
}

/// A loop device over a file of `bytes` bytes.
pub fn loop_device(bytes: u64) -> Option<Place> {
    let mut place = disk_file();
    place.what = "loop device";
    place.resize(bytes);
    let out = Command::new("losetup").args(["-f", "--show"]).arg(place.file.path()).output();
    match out {
        Ok(out) if out.status.success() => {
            place.loop_dev = Some(PathBuf::from(String::from_utf8(out.stdout).unwrap().trim()));
            Some(place)
        }
        other => {
            eprintln!("SKIP: no loop device (root and losetup are needed): {other:?}");
            None
        }
    }
}

/// All of them.
pub fn places(_test: &str) -> Vec<Place> {
    let mut places = vec![disk_file()];
    places.extend(tmpfs_file());
    places.extend(loop_device(1 << 20));
    places
}

/// Opens the file below a place directly, past any device.
pub fn raw(place: &Place) -> std::fs::File {
    OpenOptions::new().read(true).write(true).open(place.file.path()).unwrap()
}
