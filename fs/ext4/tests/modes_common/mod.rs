//! What the tests of the journal's modes share: images whose writes are recorded, crashes of
//! them, and the judges.
#![allow(dead_code, clippy::unwrap_used, missing_docs)] // Each test uses its part of it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use uext_blockdev::dm::flakey::{Action, Ops, Rule, When};
use uext_blockdev::dm::log_writes::LogOp;
use uext_blockdev::dm::{CrashOptions, Flakey, LogWrites, SnapshotDevice, UnitSet};
use uext_blockdev::{BlkStatus, BlockDevice, MemoryDevice};
use uext_ext4::{DataMode, Ext4, MountOptions};
use uext_vfs::{
    Context, Errno, FileHandle, FileSystem, Ino, ReadReply, RenameFlags, SetAttr, WriteFlags,
};

pub const FH: FileHandle = FileHandle(0);
pub const ROOT: Context = Context { uid: 0, gid: 0, pid: 1, umask: 0 };

pub fn run(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), text)
}

/// No timer fires during a test, and the flusher writes nothing by itself.
pub fn options(mode: Option<DataMode>) -> MountOptions {
    MountOptions {
        data_mode: mode,
        commit_interval: Duration::from_secs(86_400),
        cache_bytes: Some(64 << 20),
        ..MountOptions::default()
    }
}

/// The bytes of a new image of `mib` MiB; `more` are further commands on it.
pub fn image(mib: u64, args: &[&str], more: &[&[&str]]) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(mib << 20).unwrap();
    let (code, text) = run(Command::new("mke2fs").args(["-q", "-F"]).args(args).arg(file.path()));
    assert_eq!(code, 0, "mke2fs {args:?}: {text}");
    for command in more {
        let (code, text) = run(Command::new(command[0]).args(&command[1..]).arg(file.path()));
        assert_eq!(code, 0, "{command:?}: {text}");
    }
    std::fs::read(file.path()).unwrap()
}

/// A filesystem at work, over a device that fails when told to and records what it did.
pub struct Disk {
    pub base: Arc<SnapshotDevice>,
    pub memory: Arc<MemoryDevice>,
    pub flakey: Arc<Flakey>,
    pub log: Arc<LogWrites>,
    pub fs: Arc<Ext4>,
}

impl Disk {
    pub fn new(bytes: Vec<u8>, options: &MountOptions) -> Self {
        let base = SnapshotDevice::over_vec(Arc::new(bytes.clone()));
        let memory = MemoryDevice::from_vec(bytes);
        let log = LogWrites::new(memory.clone());
        let flakey = Flakey::new(log.clone(), 1);
        let fs = Ext4::mount(flakey.clone(), "test", options).unwrap();
        Self { base, memory, flakey, log, fs }
    }

    pub fn create(&self, name: &str) -> Ino {
        let root = self.fs.root();
        self.fs.mknod(&ROOT, root, name.as_bytes(), 0o100_644, 0).unwrap().attr.ino
    }

    pub fn ino(&self, name: &str) -> Ino {
        ino(&self.fs, name)
    }

    pub fn write(&self, ino: Ino, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        self.fs.write(&ROOT, ino, FH, offset, data, WriteFlags::empty())
    }

    pub fn truncate(&self, ino: Ino, size: u64) {
        let set = SetAttr { size: Some(size), ..SetAttr::default() };
        self.fs.setattr(&ROOT, ino, &set).unwrap();
    }

    pub fn fsync(&self, ino: Ino) {
        self.fs.fsync(&ROOT, ino, FH, false).unwrap();
    }

    pub fn rename(&self, from: &str, to: &str) -> Result<(), Errno> {
        let root = self.fs.root();
        self.fs.rename(&ROOT, (root, from.as_bytes()), (root, to.as_bytes()), RenameFlags::empty())
    }

    pub fn unlink(&self, name: &str) {
        let ino = self.ino(name);
        self.fs.unlink(&ROOT, self.fs.root(), name.as_bytes()).unwrap();
        self.fs.forget(ino, u64::MAX);
    }

    /// The disk as a power cut now leaves it, when its cache lost nothing. Of one moment, also
    /// while the journal's thread writes.
    pub fn crash(&self) -> Vec<u8> {
        let log = self.log.log();
        log.prefix(&self.base, log.completed_changes()).unwrap().to_vec().unwrap()
    }

    /// The disk as a power cut now leaves it, when its cache lost everything it may lose.
    pub fn power_cut(&self) -> Vec<u8> {
        let log = self.log.log();
        let end = log.crash_points(&self.base, CrashOptions::default()).last().unwrap();
        end.state(&UnitSet::none(end.units().len())).to_vec().unwrap()
    }

    /// Transactions whose commit block was written, and flushes of the device.
    pub fn commits_and_flushes(&self) -> (usize, usize) {
        let log = self.log.log();
        let is_commit = |data: &[u8]| data.starts_with(&[0xC0, 0x3B, 0x39, 0x98, 0, 0, 0, 2]);
        let commits = log.entries.iter().filter(|entry| is_commit(&entry.data)).count();
        (commits, log.entries.iter().filter(|entry| entry.op == LogOp::Flush).count())
    }

    /// From the nth of these operations on, the device fails.
    pub fn fail(&self, ops: Ops, when: When) {
        self.flakey.add(Rule::new(ops, when, Action::Fail(BlkStatus::IoErr)));
    }

    /// Unmounts, and lets e2fsck judge.
    pub fn check(&self) {
        self.fs.unmount().unwrap();
        fsck(&self.memory.snapshot());
    }
}

pub fn ino(fs: &Ext4, name: &str) -> Ino {
    fs.lookup(&ROOT, fs.root(), name.as_bytes()).unwrap().attr.ino
}

pub fn read(fs: &Ext4, ino: Ino) -> Vec<u8> {
    let size = fs.getattr(&ROOT, ino).unwrap().size;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < size {
        let mut reply = ReadReply::new();
        fs.read(&ROOT, ino, FH, bytes.len() as u64, 1 << 17, &mut reply).unwrap();
        bytes.extend(reply.to_vec());
    }
    bytes
}

/// e2fsck finds nothing to repair.
pub fn fsck(bytes: &[u8]) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let (code, text) = run(Command::new("e2fsck").arg("-fn").arg(file.path()));
    assert_eq!(code, 0, "e2fsck:\n{text}");
}

/// A crashed disk, replayed by our mount; e2fsck judges it after the unmount.
pub fn recovered<T>(crashed: Vec<u8>, look: impl FnOnce(&Ext4) -> T) -> T {
    let memory = MemoryDevice::from_vec(crashed);
    let dev: Arc<dyn BlockDevice> = memory.clone();
    let fs = Ext4::mount(dev, "after the cut", &options(None)).unwrap();
    let seen = look(&fs);
    fs.unmount().unwrap();
    fsck(&memory.snapshot());
    seen
}

/// A file's bytes after the kernel's ext4 has replayed a crashed disk; `None` (said loudly)
/// where nothing can be mounted.
pub fn kernel_reads(crashed: &[u8], name: &str) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, crashed).unwrap();
    let mount = KernelMount::new(&path)?;
    Some(std::fs::read(mount.0.join(name)).unwrap())
}

/// A loop mount of the kernel's ext4; unmounted when dropped.
pub struct KernelMount(pub PathBuf);

impl KernelMount {
    pub fn new(image: &Path) -> Option<Self> {
        let root = Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout == b"0\n");
        if !root || !Path::new("/dev/loop-control").exists() {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "SKIPPED: needs root and loop devices");
            return None;
        }
        let at = image.with_extension("mnt");
        std::fs::create_dir_all(&at).unwrap();
        let (code, text) = run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(&at));
        assert_eq!(code, 0, "{text}");
        Some(Self(at))
    }
}

impl Drop for KernelMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Bytes of a seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The writes of the log whose data holds `needle`, as (byte offset, index in the log).
pub fn writes_of(log: &LogWrites, needle: &[u8]) -> Vec<(u64, usize)> {
    let log = log.log();
    let entries = log.entries.iter().enumerate();
    let found = entries.filter_map(|(index, entry)| {
        let data = &entry.data;
        let at = data.windows(needle.len()).position(|window| window == needle)?;
        Some((entry.sector.0 * 512 + at as u64, index))
    });
    found.collect()
}
