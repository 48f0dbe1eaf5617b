//! What a mount's daemon leaves for `uext umount`: a locked file per mount.
//!
//! The file is named for the filesystem's device number and lies in `/run/uext`, or
//! for a user's mount in `$XDG_RUNTIME_DIR/uext`. Its daemon holds an exclusive flock
//! on it for as long as it lives, and appends how the unmount went as its last act.
//! Between, it says with which options the mount was made, for a remount that repeats them.
//! Who waits opens the file before it unmounts, takes a shared lock, which comes
//! when the daemon has gone, however it went, and reads the outcome.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use uext_fuse::mount_table::MountEntry;

/// The daemon's side.
pub struct MountState {
    file: Flock<File>,
    path: PathBuf,
    directory: File,
}

const CLEAN: &str = "clean";
const FAILED: &str = "failed";

impl MountState {
    /// Leaves word of a mount.
    ///
    /// # Errors
    /// Those of the file; the mount works without it, only nobody can wait for it.
    pub fn create(
        device: (u32, u32),
        source: &Path,
        dir: &Path,
        options: &[String],
    ) -> io::Result<Self> {
        let base = own_directory()?;
        let path = base.join(file_name(device));
        let directory = File::open(&base)?;
        let _alone = alone_in(&directory)?;
        // What a daemon that was killed, or lingers, has left is not ours.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new().append(true).create_new(true).mode(0o644).open(&path)?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| io::Error::from(e))?;
        let (pid, source, dir) = (std::process::id(), source.display(), dir.display());
        let options = options.iter().map(|option| format!("option {option}\n"));
        let text = format!("pid {pid}\nsource {source}\nmount {dir}\n");
        file.write_all((text + &options.collect::<String>()).as_bytes())?;
        Ok(Self { file, path, directory })
    }

    /// Says how the unmount went; the lock goes with the process.
    pub fn finish(mut self, result: Result<(), String>) {
        let line = match result {
            Ok(()) => format!("{CLEAN}\n"),
            Err(problem) => format!("{FAILED} {}\n", problem.replace('\n', " ")),
        };
        // Nobody may be waiting, and then nobody misses it.
        let _ = self.file.write_all(line.as_bytes());
        let _alone = alone_in(&self.directory);
        // A next mount of the same device may have left its own word there.
        let ours = self.file.metadata().map(|meta| (meta.dev(), meta.ino()));
        let there = fs::symlink_metadata(&self.path).map(|meta| (meta.dev(), meta.ino()));
        if matches!((ours, there), (Ok(ours), Ok(there)) if ours == there) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The waiter's side.
pub struct MountWaiter(File);

impl MountWaiter {
    /// Finds the daemon of a mount; `None` when it left no word that can be trusted.
    pub fn find(mount: &MountEntry, user: u32) -> Option<Self> {
        directories(user).into_iter().find_map(|base| {
            let path = base.join(file_name(mount.device));
            let mut options = OpenOptions::new();
            let file = options.read(true).custom_flags(libc::O_NOFOLLOW).open(path).ok()?;
            let meta = file.metadata().ok()?;
            (meta.is_file() && (meta.uid() == user || meta.uid() == 0)).then_some(Self(file))
        })
    }

    /// The options of the mount.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn options(&mut self) -> io::Result<Vec<String>> {
        let mut text = String::new();
        self.0.read_to_string(&mut text)?;
        Ok(text
            .lines()
            .filter_map(|line| line.strip_prefix("option "))
            .map(str::to_owned)
            .collect())
    }

    /// Waits until the daemon has gone.
    ///
    /// # Errors
    /// What the daemon said of its unmount, or that it said nothing.
    pub fn wait(self) -> Result<(), String> {
        let mut file = Flock::lock(self.0, FlockArg::LockShared)
            .map_err(|(_, errno)| format!("waiting for the daemon: {errno}"))?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|error| error.to_string())?;
        let last = text.lines().last().unwrap_or_default();
        if last == CLEAN {
            return Ok(());
        }
        Err(match last.strip_prefix(FAILED) {
            Some(problem) => problem.trim().to_owned(),
            None => "the daemon died; run `uext fsck` before the next mount".to_owned(),
        })
    }
}

/// Keeps other daemons from making and removing files in a directory.
fn alone_in(directory: &File) -> io::Result<Flock<File>> {
    // A lock belongs to an open file, so another daemon's lock is not ours.
    let directory = directory.try_clone()?;
    Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

fn file_name(device: (u32, u32)) -> String {
    format!("{}:{}", device.0, device.1)
}

/// Where a user's daemons leave word, best first.
fn directories(user: u32) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if user == 0 {
        found.push(PathBuf::from("/run/uext"));
    } else {
        if user == nix::unistd::getuid().as_raw()
            && let Some(base) = std::env::var_os("XDG_RUNTIME_DIR")
        {
            found.push(Path::new(&base).join("uext"));
        }
        found.push(PathBuf::from(format!("/run/user/{user}/uext")));
        found.push(PathBuf::from(format!("/tmp/uext-{user}")));
    }
    found
}

/// The directory for our own daemons, made when it is not there. One that somebody
/// else could write to is not used.
fn own_directory() -> io::Result<PathBuf> {
    let user = nix::unistd::getuid().as_raw();
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for base in directories(user) {
        let made = DirBuilder::new().mode(0o755).create(&base);
        match made {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => last = error,
            _ => {
                let meta = fs::symlink_metadata(&base)?;
                if meta.is_dir() && meta.uid() == user && meta.mode() & 0o022 == 0 {
                    return Ok(base);
                }
                last = io::Error::other(format!("{} is not ours alone", base.display()));
            }
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The daemon of an unmounted device may end after the next mount of it has begun.
    #[test]
    fn a_daemon_that_ends_late_leaves_the_word_of_the_next_mount() {
        let device = (u32::MAX, std::process::id());
        let word = || MountState::create(device, Path::new("a"), Path::new("b"), &[]).unwrap();
        let there = || own_directory().unwrap().join(file_name(device)).exists();
        let (first, second) = (word(), word());
        first.finish(Ok(()));
        assert!(there());
        second.finish(Ok(()));
        assert!(!there());
    }
}
