//! Runs a workload on a mounted filesystem over a recording device, and keeps its history.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use uext_blockdev::MemoryDevice;
use uext_blockdev::dm::{LogWrites, WriteLog};
use uext_ext4::{DataMode, Ext4, MountOptions};
use uext_tests::tree::Rng;
use uext_vfs::{
    Context, Entry, Errno, FileHandle, FileSystem, Ino, RenameFlags, SetAttr, SetTime, Timestamp,
    XattrFlags,
};

use crate::history::{History, Node, Object, Tree};
use crate::image::Image;
use crate::intruder::Intruder;
use crate::look::describe;
use crate::ops::{How, Op, contents};

/// Writes of at least so many bytes may reach the disk in pieces, whatever the mode.
const LARGE_WRITE: usize = 16 << 10;

/// How everything here is mounted: one thread does it all, so that every run is the same.
pub fn options(mode: DataMode, apart: bool) -> MountOptions {
    MountOptions {
        commit_interval: Duration::from_secs(86_400),
        cache_bytes: Some(64 << 20),
        background: false,
        commit_each_handle: apart,
        // What is the default everywhere is not asked for, which ext2 would refuse.
        data_mode: (mode != DataMode::Ordered).then_some(mode),
        ..MountOptions::default()
    }
}

/// Who asks.
pub const ROOT: Context = Context { uid: 0, gid: 0, pid: 0, umask: 0o022 };

/// An object in use.
struct Known {
    ino: Ino,
    /// Lookups that are owed a forget.
    lookups: u64,
    describe: Arc<str>,
    regular: bool,
    /// The step that made it.
    made: usize,
}

/// Why an operation was not done.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop {
    /// It makes no sense where it stands, such as a file to write to that is not there.
    Nonsense,
    /// The filesystem refused it.
    Refused(String),
}

type Done = Result<(), Stop>;

/// What was written, what it should have made, and where in time.
pub struct Recording {
    /// The operations.
    pub ops: Vec<Op>,
    /// All changes of the device.
    pub log: WriteLog,
    /// All that may be found.
    pub history: History,
    /// Cuts before this are of no interest.
    pub from: u64,
}

/// A filesystem at work.
pub struct Recorder {
    fs: Arc<Ext4>,
    device: Arc<LogWrites>,
    intruder: Arc<Intruder>,
    objects: Vec<Known>,
    /// What stands at each path, and at `@path` where a file was held.
    names: BTreeMap<Arc<str>, Object>,
    held: BTreeMap<String, Object>,
    history: History,
    ops: Vec<Op>,
    rng: Rng,
    begun: u64,
    from: u64,
}

fn refused(what: &'static str) -> impl Fn(Errno) -> Stop {
    move |error| Stop::Refused(format!("{what}: {error:?}"))
}

impl Recorder {
    /// Mounts a copy of the image.
    ///
    /// # Errors
    /// Why it does not mount.
    pub fn new(image: &Image, mode: DataMode, apart: bool, seed: u64) -> Result<Self, String> {
        let device = LogWrites::new(MemoryDevice::from_vec(image.bytes.to_vec()));
        let intruder = Intruder::over(device.clone());
        let fs = Ext4::mount(intruder.clone(), "workload", &options(mode, apart))
            .map_err(|error| format!("mount a new image: {error}"))?;
        let root =
            Known { ino: fs.root(), lookups: 0, describe: "".into(), regular: false, made: 0 };
        let mut this = Self {
            fs,
            device,
            intruder,
            objects: vec![root],
            names: BTreeMap::from([("".into(), 0)]),
            held: BTreeMap::new(),
            history: History::new(mode),
            ops: Vec::new(),
            rng: Rng(seed),
            begun: 0,
            from: 0,
        };
        this.refresh(0);
        this.done("mount");
        Ok(this)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.rng.below(end)
    }

    /// A number to make contents from.
    pub fn fill(&mut self) -> u64 {
        self.rng.below(1 << 20)
    }

    /// Cuts before now are of no interest: what was done so far only prepared the rest.
    pub fn begin_here(&mut self) {
        self.from = self.device.mark("begin here");
    }

    fn begin(&mut self) {
        self.begun = self.device.mark("begin");
    }

    /// Ends a step that changed names or attributes.
    fn done(&mut self, what: &str) {
        let node = |object: &Object| {
            let known = &self.objects[*object];
            Node { describe: known.describe.clone(), regular: known.regular }
        };
        let tree: Tree = self.names.iter().map(|(path, o)| (path.clone(), node(o))).collect();
        self.history.step(self.begun, what.to_owned(), tree, self.names.clone());
    }

    fn object(&self, path: &str) -> Result<Object, Stop> {
        let held = path.strip_prefix('@').map(|name| self.held.get(name));
        held.unwrap_or_else(|| self.names.get(path)).copied().ok_or(Stop::Nonsense)
    }

    fn is_dir(&self, object: Object) -> bool {
        self.objects[object].describe.starts_with("Directory")
    }

    /// A regular file.
    fn file(&self, path: &str) -> Result<Object, Stop> {
        let object = self.object(path)?;
        if self.objects[object].regular { Ok(object) } else { Err(Stop::Nonsense) }
    }

    /// A path's directory and last name.
    fn split<'p>(&self, path: &'p str) -> Result<(Ino, &'p [u8]), Stop> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let object = self.object(dir)?;
        if name.is_empty() || !self.is_dir(object) {
            return Err(Stop::Nonsense);
        }
        Ok((self.objects[object].ino, name.as_bytes()))
    }

    /// The directory and name of something that is not there yet.
    fn split_new<'p>(&self, path: &'p str) -> Result<(Ino, &'p [u8]), Stop> {
        if self.names.contains_key(path) { Err(Stop::Nonsense) } else { self.split(path) }
    }

    fn children(&self, path: &str) -> bool {
        let below = format!("{path}/");
        self.names.keys().any(|name| name.starts_with(&below))
    }

    fn refresh(&mut self, object: Object) {
        let known = &mut self.objects[object];
        (known.describe, known.regular) = describe(&*self.fs, known.ino);
    }

    fn made(&mut self, path: &str, entry: &Entry) {
        let object = self.objects.len();
        let made = self.history.len();
        let known =
            Known { ino: entry.attr.ino, lookups: 1, describe: "".into(), regular: false, made };
        self.objects.push(known);
        self.refresh(object);
        self.names.insert(path.into(), object);
        if self.objects[object].regular {
            self.history.version(object, self.begun, Vec::new(), false);
        }
        self.done(&format!("make {path}"));
    }

    /// Does an operation and notes what it did.
    ///
    /// # Errors
    /// Nothing is changed in either case.
    pub fn apply(&mut self, op: &Op) -> Done {
        self.begin();
        self.apply_now(op)?;
        self.ops.push(op.clone());
        Ok(())
    }

    fn apply_now(&mut self, op: &Op) -> Done {
        match op {
            Op::Create(path) => self.mknod(path, libc::S_IFREG | 0o666),
            Op::Mknod(path) => self.mknod(path, libc::S_IFIFO | 0o644),
            Op::Mkdir(path) => {
                let (dir, name) = self.split_new(path)?;
                let entry = self.fs.mkdir(&ROOT, dir, name, 0o777).map_err(refused("mkdir"))?;
                self.made(path, &entry);
                Ok(())
            }
            Op::Symlink(path, len) => {
                let (dir, name) = self.split_new(path)?;
                let target: Vec<u8> = b"long/".iter().copied().cycle().take(*len).collect();
                let entry =
                    self.fs.symlink(&ROOT, dir, name, &target).map_err(refused("symlink"))?;
                self.made(path, &entry);
                Ok(())
            }
            Op::MagicSymlink(path) => {
                let (dir, name) = self.split_new(path)?;
                let mut target = vec![0xC0, 0x3B, 0x39, 0x98];
                target.resize(700, b'm');
                let entry =
                    self.fs.symlink(&ROOT, dir, name, &target).map_err(refused("symlink"))?;
                self.made(path, &entry);
                Ok(())
            }
            Op::During(op, path) => self.during_op(op, path),
            Op::Link(from, to) => self.link_op(from, to),
            Op::Unlink(path) => {
                let object = self.remove_name(path)?;
                self.close_unnamed(object);
                Ok(())
            }
            Op::Hold(path) => {
                let object = self.file(path)?;
                if self.held.contains_key(path) {
                    return Err(Stop::Nonsense);
                }
                self.remove_name(path)?;
                self.held.insert(path.clone(), object);
                Ok(())
            }
            Op::Close(path) => {
                let name = path.strip_prefix('@').ok_or(Stop::Nonsense)?;
                let object = self.held.remove(name).ok_or(Stop::Nonsense)?;
                self.close_unnamed(object);
                Ok(())
            }
            Op::Rmdir(path) => self.rmdir_op(path),
            Op::Rename(from, to) => self.rename_op(from, to),
            Op::Exchange(a, b) => self.exchange_op(a, b),
            Op::Write { how, path, offset, len, fill } => {
                self.write_op(path, *offset, *len, *fill, *how)
            }
            Op::Append { path, len, fill } => {
                let end = self.history.contents(self.file(path)?).len();
                self.write_op(path, end, *len, *fill, How::Plain)
            }
            Op::Truncate(path, size) => self.truncate_op(path, *size),
            Op::Fallocate { path, mode, offset, len } => {
                self.fallocate_op(path, *mode, *offset, *len)
            }
            Op::SetXattr { path, name, len, fill } => {
                self.xattr_op(path, name, &contents(*fill, *len))
            }
            Op::SetAcl { path, default } => {
                let which = if *default { "default" } else { "access" };
                if *default && !self.is_dir(self.object(path)?) {
                    return Err(Stop::Nonsense);
                }
                self.xattr_op(path, &format!("system.posix_acl_{which}"), &acl())
            }
            Op::RemoveXattr(path, name) => {
                let object = self.object(path)?;
                if !self.objects[object].describe.contains(&format!(" {name}=")) {
                    return Err(Stop::Nonsense);
                }
                let ino = self.objects[object].ino;
                self.fs.removexattr(&ROOT, ino, name.as_bytes()).map_err(refused("removexattr"))?;
                self.changed(object, &format!("removexattr {path} {name}"));
                Ok(())
            }
            Op::Chmod(path, mode) => {
                self.setattr_op(path, &SetAttr { mode: Some(*mode), ..SetAttr::default() })
            }
            Op::Utimes(path, sec) => {
                let time = SetTime::At(Timestamp { sec: *sec, nsec: 0 });
                let set = SetAttr { atime: Some(time), mtime: Some(time), ..SetAttr::default() };
                self.setattr_op(path, &set)
            }
            Op::Fsync(path) => self.fsync_op(path, false),
            Op::Fdatasync(path) => self.fsync_op(path, true),
            Op::Sync => {
                let steps = self.history.len();
                self.fs.sync().map_err(refused("sync"))?;
                self.all_durable("sync", steps);
                Ok(())
            }
        }
    }

    fn mknod(&mut self, path: &str, mode: u32) -> Done {
        let (dir, name) = self.split_new(path)?;
        let entry = self.fs.mknod(&ROOT, dir, name, mode, 0).map_err(refused("mknod"))?;
        self.made(path, &entry);
        Ok(())
    }

    /// Makes a directory in another thread while the commit of `op` is about to write its first
    /// block, if it writes any. What a crash must not show of it is its parent's count of links.
    fn during_op(&mut self, op: &Op, path: &str) -> Done {
        let (Op::Fsync(_) | Op::Fdatasync(_) | Op::Sync) = op else { return Err(Stop::Nonsense) };
        let (dir, name) = self.split_new(path)?;
        let (fs, device) = (self.fs.clone(), self.device.clone());
        let name = name.to_vec();
        let intrude = move || {
            let begun = device.mark("meanwhile");
            let made = fs.mkdir(&ROOT, dir, &name, 0o777);
            (begun, made)
        };
        let (give, take) = std::sync::mpsc::channel();
        self.intruder.arm(Box::new(move || {
            // The receiver waits below.
            let _ = give.send(intrude());
        }));
        let done = self.apply_now(op);
        self.intruder.disarm();
        done?;
        let Ok((begun, made)) = take.try_recv() else { return Ok(()) };
        let entry = made.map_err(refused("mkdir during a commit"))?;
        self.begun = begun;
        self.made(path, &entry);
        Ok(())
    }

    fn link_op(&mut self, from: &str, to: &str) -> Done {
        let object = self.object(from)?;
        let (dir, name) = self.split_new(to)?;
        if self.is_dir(object) || from.starts_with('@') {
            return Err(Stop::Nonsense);
        }
        self.fs.link(&ROOT, self.objects[object].ino, dir, name).map_err(refused("link"))?;
        self.objects[object].lookups += 1;
        self.names.insert(to.into(), object);
        self.changed(object, &format!("link {from} {to}"));
        Ok(())
    }

    /// An attribute of the object changed.
    fn changed(&mut self, object: Object, what: &str) {
        self.refresh(object);
        self.done(what);
    }

    fn remove_name(&mut self, path: &str) -> Result<Object, Stop> {
        let object = *self.names.get(path).ok_or(Stop::Nonsense)?;
        if self.is_dir(object) {
            return Err(Stop::Nonsense);
        }
        let (dir, name) = self.split(path)?;
        self.fs.unlink(&ROOT, dir, name).map_err(refused("unlink"))?;
        self.names.remove(path);
        self.changed(object, &format!("unlink {path}"));
        Ok(object)
    }

    /// Lets an object without names go.
    fn close_unnamed(&mut self, object: Object) {
        if self.names.values().chain(self.held.values()).any(|&other| other == object) {
            return;
        }
        let known = &mut self.objects[object];
        self.fs.forget(known.ino, std::mem::take(&mut known.lookups));
    }

    fn rmdir_op(&mut self, path: &str) -> Done {
        let object = self.object(path)?;
        if !self.is_dir(object) || path.is_empty() || self.children(path) {
            return Err(Stop::Nonsense);
        }
        let (dir, name) = self.split(path)?;
        self.fs.rmdir(&ROOT, dir, name).map_err(refused("rmdir"))?;
        self.names.remove(path);
        self.done(&format!("rmdir {path}"));
        self.close_unnamed(object);
        Ok(())
    }

    fn rename_op(&mut self, from: &str, to: &str) -> Done {
        let object = *self.names.get(from).ok_or(Stop::Nonsense)?;
        let replaced = self.names.get(to).copied();
        let dir = self.is_dir(object);
        let fits = replaced.is_none_or(|old| old != object && self.is_dir(old) == dir);
        if from.is_empty()
            || !fits
            || (dir && (self.children(to) || to.starts_with(&format!("{from}/"))))
        {
            return Err(Stop::Nonsense);
        }
        let ((old, old_name), (new, new_name)) = (self.split(from)?, self.split(to)?);
        let flags = RenameFlags::empty();
        self.fs
            .rename(&ROOT, (old, old_name), (new, new_name), flags)
            .map_err(refused("rename"))?;
        self.names.remove(from);
        self.names.insert(to.into(), object);
        self.move_below(from, to);
        if let Some(replaced) = replaced.filter(|_| self.objects[object].regular) {
            self.refresh(replaced);
        }
        self.done(&format!("rename {from} {to}"));
        if let Some(replaced) = replaced {
            if self.objects[object].regular {
                self.history.contents_with_step(object);
            }
            self.close_unnamed(replaced);
        }
        Ok(())
    }

    /// What lies below a directory that moved.
    fn move_below(&mut self, from: &str, to: &str) {
        let below = format!("{from}/");
        let moved: Vec<_> =
            self.names.keys().filter(|path| path.starts_with(&below)).cloned().collect();
        for path in moved {
            let object = self.names.remove(&path).expect("it was just seen");
            self.names.insert(format!("{to}/{}", &path[below.len()..]).into(), object);
        }
    }

    fn exchange_op(&mut self, a: &str, b: &str) -> Done {
        let inside = |outer: &str, inner: &str| inner.starts_with(&format!("{outer}/"));
        if a == b || a.is_empty() || b.is_empty() || inside(a, b) || inside(b, a) {
            return Err(Stop::Nonsense);
        }
        let (first, second) = (self.object(a)?, self.object(b)?);
        let (left, right) = (self.split(a)?, self.split(b)?);
        if first == second {
            return Err(Stop::Nonsense);
        }
        self.fs.rename(&ROOT, left, right, RenameFlags::EXCHANGE).map_err(refused("exchange"))?;
        self.names.insert(a.into(), second);
        self.names.insert(b.into(), first);
        self.move_below(a, "@swap");
        self.move_below(b, a);
        self.move_below("@swap", b);
        self.done(&format!("exchange {a} {b}"));
        Ok(())
    }

    fn write_op(&mut self, path: &str, offset: usize, len: usize, fill: u64, how: How) -> Done {
        let object = self.file(path)?;
        let data = contents(fill, len);
        let mut bytes = self.history.contents(object);
        bytes.resize(bytes.len().max(offset + len), 0);
        bytes[offset..offset + len].copy_from_slice(&data);
        self.history.version(object, self.begun, bytes, len >= LARGE_WRITE);
        let (ino, fh) = (self.objects[object].ino, FileHandle::default());
        let wrote = self
            .fs
            .write(&ROOT, ino, fh, offset as u64, &data, how.flags())
            .map_err(refused("write"))?;
        if wrote != len {
            return Err(Stop::Refused(format!("write: {wrote} bytes of {len}")));
        }
        match how {
            How::Sync => self.synced(object, false, self.history.len()),
            How::Dsync => self.synced(object, true, self.history.len()),
            How::Plain | How::Direct | How::Page => {}
        }
        Ok(())
    }

    fn truncate_op(&mut self, path: &str, size: usize) -> Done {
        let object = self.file(path)?;
        let mut bytes = self.history.contents(object);
        bytes.resize(size, 0);
        self.history.version(object, self.begun, bytes, false);
        let set = SetAttr { size: Some(size as u64), ..SetAttr::default() };
        self.fs.setattr(&ROOT, self.objects[object].ino, &set).map_err(refused("truncate"))?;
        Ok(())
    }

    fn fallocate_op(&mut self, path: &str, mode: i32, offset: usize, len: usize) -> Done {
        let object = self.file(path)?;
        let mut bytes = self.history.contents(object);
        let keeps_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        if !keeps_size {
            bytes.resize(bytes.len().max(offset + len), 0);
        }
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
            let end = bytes.len().min(offset + len);
            bytes[offset.min(end)..end].fill(0);
        }
        let ino = self.objects[object].ino;
        self.fs.fallocate(&ROOT, ino, offset as u64, len as u64, mode).map_err(
            |error| match error {
                // A block map has no unwritten blocks.
                Errno::EOPNOTSUPP => Stop::Nonsense,
                error => refused("fallocate")(error),
            },
        )?;
        self.history.version(object, self.begun, bytes, true);
        Ok(())
    }

    fn setattr_op(&mut self, path: &str, set: &SetAttr) -> Done {
        let object = self.object(path)?;
        self.fs.setattr(&ROOT, self.objects[object].ino, set).map_err(refused("setattr"))?;
        self.changed(object, &format!("setattr {path}"));
        Ok(())
    }

    fn xattr_op(&mut self, path: &str, name: &str, value: &[u8]) -> Done {
        let object = self.object(path)?;
        let ino = self.objects[object].ino;
        let describe = &self.objects[object].describe;
        if !describe.starts_with("Regular") && !describe.starts_with("Directory") {
            return Err(Stop::Nonsense);
        }
        self.fs
            .setxattr(&ROOT, ino, name.as_bytes(), value, XattrFlags::empty())
            .map_err(refused("setxattr"))?;
        self.changed(object, &format!("setxattr {path} {name}"));
        Ok(())
    }

    fn fsync_op(&mut self, path: &str, datasync: bool) -> Done {
        let object = self.object(path)?;
        let ino = self.objects[object].ino;
        let steps = self.history.len();
        self.fs.fsync(&ROOT, ino, FileHandle::default(), datasync).map_err(refused("fsync"))?;
        self.synced(object, datasync, steps);
        Ok(())
    }

    /// An fsync or fdatasync of the object has returned, before which there were so many steps.
    fn synced(&mut self, object: Object, datasync: bool, steps: usize) {
        let time = self.device.mark("synced");
        if datasync {
            // Its data can be read back, so its inode is there; names may come later.
            self.history.step_durable(self.objects[object].made, 0, time);
        } else {
            self.history.step_durable(steps - 1, self.begun, time);
        }
        self.history.contents_durable(object, time);
    }

    fn all_durable(&mut self, what: &str, steps: usize) {
        let time = self.device.mark(what);
        self.history.step_durable(steps - 1, self.begun, time);
        for object in 0..self.objects.len() {
            self.history.contents_durable(object, time);
        }
    }

    /// Ends the workload with an unmount, whose cuts count too.
    ///
    /// # Errors
    /// How the unmount failed.
    pub fn finish(mut self) -> Result<Recording, String> {
        self.fs.unmount().map_err(|error| format!("unmount: {error:?}"))?;
        self.all_durable("unmount", self.history.len());
        Ok(self.into_recording())
    }

    /// Ends the workload where it stands: what the unmount writes is not looked at.
    ///
    /// # Errors
    /// How the unmount failed.
    pub fn stop(self) -> Result<Recording, String> {
        let mut log = self.device.log();
        let fs = self.fs.clone();
        let mut recording = self.into_recording();
        fs.unmount().map_err(|error| format!("unmount: {error:?}"))?;
        // What is still on its way then is no event of the log.
        log.entries.retain(|entry| entry.submitted < log.now);
        recording.log = log;
        Ok(recording)
    }

    fn into_recording(self) -> Recording {
        Recording { ops: self.ops, log: self.device.log(), history: self.history, from: self.from }
    }
}

/// What the fixed workloads call; each must be possible where it stands.
impl Recorder {
    fn must(&mut self, op: Op) {
        if let Err(stop) = self.apply(&op) {
            panic!("{op}: {stop:?}");
        }
    }

    /// Makes an empty file.
    pub fn create(&mut self, path: &str) {
        self.must(Op::Create(path.into()));
    }

    /// Makes a directory.
    pub fn mkdir(&mut self, path: &str) {
        self.must(Op::Mkdir(path.into()));
    }

    /// Makes a symbolic link to a target of so many bytes.
    pub fn symlink(&mut self, path: &str, len: usize) {
        self.must(Op::Symlink(path.into(), len));
    }

    /// Makes a symbolic link whose block looks like one of the journal's.
    pub fn magic_symlink(&mut self, path: &str) {
        self.must(Op::MagicSymlink(path.into()));
    }

    /// An fsync of `synced`, and the making of a file while it is on its way.
    pub fn during(&mut self, path: &str, synced: &str) {
        self.must(Op::During(Box::new(Op::Fsync(synced.into())), path.into()));
    }

    /// Makes a hard link.
    pub fn link(&mut self, from: &str, to: &str) {
        self.must(Op::Link(from.into(), to.into()));
    }

    /// Removes the last name of a file that stays open, as `@` and the name.
    pub fn hold(&mut self, path: &str) {
        self.must(Op::Hold(path.into()));
    }

    /// Closes a file that was held.
    pub fn close(&mut self, path: &str) {
        self.must(Op::Close(path.into()));
    }

    /// Removes a name, and the object with its last one.
    pub fn unlink(&mut self, path: &str) {
        self.must(Op::Unlink(path.into()));
    }

    /// Removes an empty directory.
    pub fn rmdir(&mut self, path: &str) {
        self.must(Op::Rmdir(path.into()));
    }

    /// Renames, replacing what is there.
    pub fn rename(&mut self, from: &str, to: &str) {
        self.must(Op::Rename(from.into(), to.into()));
    }

    /// Writes new bytes at an offset.
    pub fn write(&mut self, path: &str, offset: usize, len: usize) {
        let fill = self.fill();
        self.must(Op::Write { how: How::Plain, path: path.into(), offset, len, fill });
    }

    /// Writes new bytes at the end.
    pub fn append(&mut self, path: &str, len: usize) {
        let fill = self.fill();
        self.must(Op::Append { path: path.into(), len, fill });
    }

    /// Sets the size.
    pub fn truncate(&mut self, path: &str, size: usize) {
        self.must(Op::Truncate(path.into(), size));
    }

    /// Sets the mode.
    pub fn chmod(&mut self, path: &str, mode: u32) {
        self.must(Op::Chmod(path.into(), mode));
    }

    /// Sets an attribute to bytes made from a number.
    pub fn set_xattr(&mut self, path: &str, name: &str, len: usize, fill: u64) {
        self.must(Op::SetXattr { path: path.into(), name: name.into(), len, fill });
    }

    /// Sets an ACL.
    pub fn set_acl(&mut self, path: &str, default: bool) {
        self.must(Op::SetAcl { path: path.into(), default });
    }

    /// Removes an attribute.
    pub fn remove_xattr(&mut self, path: &str, name: &str) {
        self.must(Op::RemoveXattr(path.into(), name.into()));
    }

    /// fsync(2): the file's contents, and every step before.
    pub fn fsync(&mut self, path: &str) {
        self.must(Op::Fsync(path.into()));
    }

    /// fdatasync(2).
    pub fn fdatasync(&mut self, path: &str) {
        self.must(Op::Fdatasync(path.into()));
    }

    /// sync(2).
    pub fn sync(&mut self) {
        self.must(Op::Sync);
    }
}

/// An ACL with entries for one user more than the mode has.
fn acl() -> Vec<u8> {
    let none = u32::MAX;
    let list = [(1u16, 7u16, none), (2, 6, 1234), (4, 5, none), (16, 7, none), (32, 4, none)];
    let mut out = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in list {
        out.extend(tag.to_le_bytes());
        out.extend(perm.to_le_bytes());
        out.extend(id.to_le_bytes());
    }
    out
}
