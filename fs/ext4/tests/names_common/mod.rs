//! What the tests of names share: images in memory and the judges.
#![allow(dead_code)] // Each test uses its part of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;
use uext_blockdev::MemoryDevice;
use uext_ext4::{Ext4, MountOptions};
use uext_vfs::{Context, DirEntry, DirSink, Entry, FileHandle, FileSystem, Ino};

/// The superuser, without a umask.
pub const ROOT: Context = Context { uid: 0, gid: 0, pid: 0, umask: 0 };

/// A filesystem in memory, made by mke2fs.
pub struct Image {
    dir: TempDir,
    dev: Arc<MemoryDevice>,
}

fn run(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), text)
}

impl Image {
    /// An image of `mib` MiB; `args` are mke2fs's.
    pub fn new(mib: u64, args: &[&str]) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
        let path = dir.path().join("image");
        let file = std::fs::File::create(&path).expect("an image");
        file.set_len(mib << 20).expect("its size");
        let (code, text) = run(Command::new("mke2fs").args(["-q", "-F"]).args(args).arg(&path));
        assert_eq!(code, 0, "mke2fs {args:?}: {text}");
        let dev = MemoryDevice::from_vec(std::fs::read(&path).expect("the image"));
        Self { dir, dev }
    }

    /// A copy of an image.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
        Self { dir, dev: MemoryDevice::from_vec(bytes) }
    }

    /// A copy of an image that another program wrote.
    pub fn from_file(path: &Path) -> Self {
        Self::from_bytes(std::fs::read(path).expect("the image"))
    }

    /// An image whose directories are hashed by `function`, with bytes taken as `unsigned`.
    pub fn hashed(mib: u64, args: &[&str], function: &str, unsigned: bool) -> Self {
        let mut image = Self::new(mib, args);
        let path = image.file();
        let option = format!("hash_alg={function}");
        let (code, text) = run(Command::new("tune2fs").args(["-E", &option]).arg(&path));
        assert_eq!(code, 0, "tune2fs: {text}");
        let flags = format!("set_super_value flags {}", if unsigned { 2 } else { 1 });
        let (code, text) = run(Command::new("debugfs").args(["-w", "-R", &flags]).arg(&path));
        assert_eq!(code, 0, "debugfs: {text}");
        image.dev = MemoryDevice::from_vec(std::fs::read(&path).expect("the image"));
        image
    }

    /// Mounts it.
    pub fn mount(&self) -> Arc<Ext4> {
        let options = MountOptions { cache_bytes: Some(64 << 20), ..MountOptions::default() };
        self.mount_with(&options)
    }

    /// Mounts it with these options.
    pub fn mount_with(&self, options: &MountOptions) -> Arc<Ext4> {
        Ext4::mount(self.dev.clone(), "test", options).expect("it mounts")
    }

    /// What debugfs answers of the image as it is now, after e2fsck has replayed its
    /// journal; e2fsck's exit code, 0 when it found nothing else to do.
    pub fn replayed(&self, request: &str) -> (i32, String) {
        let path = self.file();
        let journal_only = ["-y", "-E", "journal_only"];
        let (_, replay) = run(Command::new("e2fsck").args(journal_only).arg(&path));
        let (code, check) = run(Command::new("e2fsck").arg("-fn").arg(&path));
        let (_, text) = run(Command::new("debugfs").args(["-R", request]).arg(&path));
        (code, format!("{replay}{check}{text}"))
    }

    /// A copy as a file, for other programs.
    pub fn file(&self) -> PathBuf {
        let path = self.dir.path().join("image");
        std::fs::write(&path, self.dev.snapshot()).expect("a copy");
        path
    }

    /// Unmounts and lets e2fsck judge the image.
    pub fn check(&self, fs: &Arc<Ext4>) {
        fs.unmount().expect("it unmounts");
        let (code, text) = run(Command::new("e2fsck").arg("-fn").arg(self.file()));
        assert_eq!(code, 0, "e2fsck: {text}");
    }

    /// What debugfs answers.
    pub fn debugfs(&self, request: &str) -> String {
        run(Command::new("debugfs").args(["-R", request]).arg(self.file())).1
    }
}

/// Collects entries; full after `room` of them.
pub struct Collector {
    pub room: usize,
    pub entries: Vec<(Vec<u8>, Ino, u64)>,
}

impl DirSink for Collector {
    fn add(&mut self, entry: &DirEntry<'_>) -> bool {
        if self.entries.len() == self.room {
            return false;
        }
        assert_ne!(entry.next_offset, 0);
        assert!(i64::try_from(entry.next_offset).is_ok(), "offset {:#x}", entry.next_offset);
        self.entries.push((entry.name.to_vec(), entry.ino, entry.next_offset));
        true
    }
}

/// One reply of at most `room` entries.
pub fn list_some(fs: &Ext4, dir: Ino, offset: u64, room: usize) -> Vec<(Vec<u8>, Ino, u64)> {
    let mut sink = Collector { room, entries: Vec::new() };
    fs.readdir(&ROOT, dir, FileHandle(0), offset, &mut sink).expect("it lists");
    sink.entries
}

/// All names but the dots, by replies of `room` entries.
pub fn list(fs: &Ext4, dir: Ino, room: usize) -> BTreeMap<Vec<u8>, Ino> {
    let (mut offset, mut names) = (0, BTreeMap::new());
    loop {
        let reply = list_some(fs, dir, offset, room);
        let Some(last) = reply.last() else { break };
        offset = last.2;
        for (name, ino, _) in reply {
            let twice = names.insert(name.clone(), ino);
            assert_eq!(twice, None, "{:?} is listed twice", String::from_utf8_lossy(&name));
        }
    }
    assert!(names.remove(&b"."[..]).is_some() && names.remove(&b".."[..]).is_some(), "the dots");
    names
}

/// Makes a file and gives its lookup back.
pub fn touch(fs: &Ext4, dir: Ino, name: &[u8]) -> uext_vfs::Result<Entry> {
    let entry = fs.mknod(&ROOT, dir, name, libc::S_IFREG | 0o644, 0)?;
    fs.forget(entry.attr.ino, 1);
    Ok(entry)
}

/// Makes a directory and gives its lookup back.
pub fn mkdir(fs: &Ext4, dir: Ino, name: &[u8]) -> uext_vfs::Result<Entry> {
    let entry = fs.mkdir(&ROOT, dir, name, 0o755)?;
    fs.forget(entry.attr.ino, 1);
    Ok(entry)
}

/// Looks a name up and gives the lookup back.
pub fn look(fs: &Ext4, dir: Ino, name: &[u8]) -> uext_vfs::Result<Entry> {
    let entry = fs.lookup(&ROOT, dir, name)?;
    fs.forget(entry.attr.ino, 1);
    Ok(entry)
}

/// A generator of numbers that one seed replays (xorshift64*).
pub struct Random(pub u64);

impl Random {
    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % end
    }
}
