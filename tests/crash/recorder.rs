//! Runs a workload on a mounted filesystem over a recording device, and keeps its history.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use uext_blockdev::dm::{LogWrites, WriteLog};

use uext_blockdev::MemoryDevice;
use uext_ext4::{Ext4, MountOptions};
use uext_tests::tree::Rng;
use uext_vfs::{
    Context, DirEntry, DirSink, FileHandle, FileKind, FileSystem, Ino, ReadReply, RenameFlags,
    SetAttr, WriteFlags, XattrFlags,
};

use crate::history::{History, Node, Object, Tree};

/// How everything here is mounted: no timer fires during a test.
pub fn options() -> MountOptions {
    MountOptions {
        commit_interval: Duration::from_secs(86_400),
        cache_bytes: Some(16 << 20),
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
}

/// A filesystem at work.
pub struct Recorder {
    fs: Arc<Ext4>,
    device: Arc<LogWrites>,
    objects: Vec<Known>,
    names: BTreeMap<Arc<str>, Object>,
    history: History,
    rng: Rng,
    begun: u64,
}

impl Recorder {
    /// Mounts a copy of the image.
    pub fn new(image: &[u8], seed: u64) -> Self {
        let device = LogWrites::new(MemoryDevice::from_vec(image.to_vec()));
        let fs = Ext4::mount(device.clone(), "workload", &options()).expect("mount a new image");
        let root = Known { ino: fs.root(), lookups: 0, describe: "".into(), regular: false };
        let mut this = Self {
            fs,
            device,
            objects: vec![root],
            names: BTreeMap::from([("".into(), 0)]),
            history: History::default(),
            rng: Rng(seed),
            begun: 0,
        };
        this.refresh(0);
        this.done("mount");
        this
    }

    /// Bytes without a zero, so that a hole is no part of a version.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        self.rng.bytes(len).into_iter().map(|byte| byte.max(1)).collect()
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.rng.below(end)
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

    fn object(&self, path: &str) -> Object {
        *self.names.get(path).unwrap_or_else(|| panic!("the workload knows no {path}"))
    }

    fn ino(&self, path: &str) -> Ino {
        self.objects[self.object(path)].ino
    }

    /// A path's directory and last name.
    fn split<'p>(&self, path: &'p str) -> (Ino, &'p [u8]) {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        (self.ino(dir), name.as_bytes())
    }

    fn refresh(&mut self, object: Object) {
        let known = &mut self.objects[object];
        (known.describe, known.regular) = describe(&*self.fs, known.ino);
    }

    fn made(&mut self, path: &str, ino: Ino) {
        let object = self.objects.len();
        self.objects.push(Known { ino, lookups: 1, describe: "".into(), regular: false });
        self.refresh(object);
        self.names.insert(path.into(), object);
        if self.objects[object].regular {
            self.history.version(object, self.begun, Vec::new());
        }
        self.done(&format!("make {path}"));
    }

    /// Makes an empty file.
    pub fn create(&mut self, path: &str) {
        self.begin();
        let (dir, name) = self.split(path);
        let made = self.fs.mknod(&ROOT, dir, name, libc::S_IFREG | 0o666, 0).expect("mknod");
        self.made(path, made.attr.ino);
    }

    /// Makes a directory.
    pub fn mkdir(&mut self, path: &str) {
        self.begin();
        let (dir, name) = self.split(path);
        let made = self.fs.mkdir(&ROOT, dir, name, 0o777).expect("mkdir");
        self.made(path, made.attr.ino);
    }

    /// Makes a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.begin();
        let (dir, name) = self.split(path);
        let made = self.fs.symlink(&ROOT, dir, name, target.as_bytes()).expect("symlink");
        self.made(path, made.attr.ino);
    }

    /// Makes a hard link.
    pub fn link(&mut self, from: &str, to: &str) {
        self.begin();
        let object = self.object(from);
        let (dir, name) = self.split(to);
        self.fs.link(&ROOT, self.objects[object].ino, dir, name).expect("link");
        self.objects[object].lookups += 1;
        self.names.insert(to.into(), object);
        self.refresh(object);
        self.done(&format!("link {from} {to}"));
    }

    /// Removes a name; the object stays open.
    pub fn unlink_open(&mut self, path: &str) -> Object {
        self.begin();
        let (dir, name) = self.split(path);
        self.fs.unlink(&ROOT, dir, name).expect("unlink");
        let object = self.names.remove(path).expect("the name is known");
        self.refresh(object);
        self.done(&format!("unlink {path}"));
        object
    }

    /// Lets an object without names go.
    pub fn close(&mut self, object: Object) {
        let known = &mut self.objects[object];
        self.fs.forget(known.ino, std::mem::take(&mut known.lookups));
    }

    /// Removes a name, and the object with its last one.
    pub fn unlink(&mut self, path: &str) {
        let object = self.unlink_open(path);
        if !self.names.values().any(|&other| other == object) {
            self.close(object);
        }
    }

    /// Removes an empty directory.
    pub fn rmdir(&mut self, path: &str) {
        self.begin();
        let (dir, name) = self.split(path);
        self.fs.rmdir(&ROOT, dir, name).expect("rmdir");
        let object = self.names.remove(path).expect("the name is known");
        self.done(&format!("rmdir {path}"));
        self.close(object);
    }

    /// Renames, replacing what is there.
    pub fn rename(&mut self, from: &str, to: &str) {
        self.begin();
        let ((old, old_name), (new, new_name)) = (self.split(from), self.split(to));
        self.fs
            .rename(&ROOT, (old, old_name), (new, new_name), RenameFlags::empty())
            .expect("rename");
        let object = self.names.remove(from).expect("the name is known");
        let replaced = self.names.insert(to.into(), object);
        let below = format!("{from}/");
        let moved: Vec<_> =
            self.names.keys().filter(|path| path.starts_with(&below)).cloned().collect();
        for path in moved {
            let object = self.names.remove(&path).expect("it was just seen");
            self.names.insert(format!("{to}/{}", &path[below.len()..]).into(), object);
        }
        if let Some(replaced) = replaced.filter(|_| self.objects[object].regular) {
            self.refresh(replaced);
        }
        self.done(&format!("rename {from} {to}"));
        if let Some(replaced) = replaced {
            if self.objects[object].regular {
                self.history.contents_with_step(object);
            }
            if !self.names.values().any(|&other| other == replaced) {
                self.close(replaced);
            }
        }
    }

    /// Writes at an offset.
    pub fn write(&mut self, path: &str, offset: usize, data: &[u8]) {
        let object = self.object(path);
        self.write_object(object, offset, data);
    }

    /// Writes into an object that may have no name.
    pub fn write_object(&mut self, object: Object, offset: usize, data: &[u8]) {
        self.begin();
        let mut bytes = self.history.contents(object);
        bytes.resize(bytes.len().max(offset + data.len()), 0);
        bytes[offset..offset + data.len()].copy_from_slice(data);
        self.history.version(object, self.begun, bytes);
        let (ino, fh) = (self.objects[object].ino, FileHandle::default());
        let wrote = self.fs.write(&ROOT, ino, fh, offset as u64, data, WriteFlags::empty());
        assert_eq!(wrote, Ok(data.len()));
    }

    /// Writes new bytes at the end.
    pub fn append(&mut self, path: &str, len: usize) {
        let data = self.bytes(len);
        let end = self.history.contents(self.object(path)).len();
        self.write(path, end, &data);
    }

    /// Sets the size.
    pub fn truncate(&mut self, path: &str, size: usize) {
        self.begin();
        let object = self.object(path);
        let mut bytes = self.history.contents(object);
        bytes.resize(size, 0);
        self.history.version(object, self.begun, bytes);
        let set = SetAttr { size: Some(size as u64), ..SetAttr::default() };
        self.fs.setattr(&ROOT, self.objects[object].ino, &set).expect("truncate");
    }

    /// Sets the mode.
    pub fn chmod(&mut self, path: &str, mode: u32) {
        self.begin();
        let object = self.object(path);
        let set = SetAttr { mode: Some(mode), ..SetAttr::default() };
        self.fs.setattr(&ROOT, self.objects[object].ino, &set).expect("chmod");
        self.refresh(object);
        self.done(&format!("chmod {path}"));
    }

    /// Sets an attribute.
    pub fn set_xattr(&mut self, path: &str, name: &str, value: &[u8]) {
        self.begin();
        let object = self.object(path);
        let ino = self.objects[object].ino;
        self.fs
            .setxattr(&ROOT, ino, name.as_bytes(), value, XattrFlags::empty())
            .unwrap_or_else(|error| panic!("setxattr {name} of {}: {error}", value.len()));
        self.refresh(object);
        self.done(&format!("setxattr {path} {name}"));
    }

    /// Removes an attribute.
    pub fn remove_xattr(&mut self, path: &str, name: &str) {
        self.begin();
        let object = self.object(path);
        self.fs.removexattr(&ROOT, self.objects[object].ino, name.as_bytes()).expect("removexattr");
        self.refresh(object);
        self.done(&format!("removexattr {path} {name}"));
    }

    /// fsync(2): the file's contents, and every step before.
    pub fn fsync(&mut self, path: &str) {
        self.fsync_object(self.object(path));
    }

    /// fsync(2) of an object that may have no name.
    pub fn fsync_object(&mut self, object: Object) {
        let ino = self.objects[object].ino;
        self.fs.fsync(&ROOT, ino, FileHandle::default(), false).expect("fsync");
        let time = self.device.mark("fsync");
        self.history.steps_durable(time);
        self.history.contents_durable(object, time);
    }

    /// fdatasync(2).
    pub fn fdatasync(&mut self, path: &str) {
        let object = self.object(path);
        let ino = self.objects[object].ino;
        self.fs.fsync(&ROOT, ino, FileHandle::default(), true).expect("fdatasync");
        let time = self.device.mark("fdatasync");
        self.history.contents_durable(object, time);
    }

    /// sync(2).
    pub fn sync(&mut self) {
        self.fs.sync().expect("sync");
        self.all_durable("sync");
    }

    fn all_durable(&mut self, what: &str) {
        let time = self.device.mark(what);
        self.history.steps_durable(time);
        for object in 0..self.objects.len() {
            self.history.contents_durable(object, time);
        }
    }

    /// Unmounts; what was written, and what it should have made.
    pub fn finish(mut self) -> (WriteLog, History) {
        self.fs.unmount().expect("unmount");
        self.all_durable("unmount");
        (self.device.log(), self.history)
    }
}

/// All that can be said of an inode in one line but contents and times; whether it is a
/// regular file.
pub fn describe(fs: &dyn FileSystem, ino: Ino) -> (Arc<str>, bool) {
    let attr = fs.getattr(&ROOT, ino).unwrap_or_else(|e| panic!("getattr {ino}: {e:?}"));
    let regular = attr.kind == FileKind::Regular;
    let mut line = format!("{:?} {:o}", attr.kind, attr.perm);
    if attr.kind != FileKind::Directory {
        let _ = write!(line, " {} links", attr.nlink);
    }
    if attr.kind == FileKind::Symlink {
        let target = fs.readlink(&ROOT, ino).unwrap_or_else(|e| panic!("readlink {ino}: {e:?}"));
        let _ = write!(line, " to {}", String::from_utf8_lossy(&target));
        return (line.into(), regular);
    }
    let list = fs.listxattr(&ROOT, ino).unwrap_or_else(|e| panic!("listxattr {ino}: {e:?}"));
    let mut names: Vec<&[u8]> = list.split(|&byte| byte == 0).filter(|n| !n.is_empty()).collect();
    names.sort_unstable();
    for name in names {
        let value = fs.getxattr(&ROOT, ino, name).unwrap_or_else(|e| panic!("xattr {ino}: {e:?}"));
        let _ = write!(line, " {}=", String::from_utf8_lossy(name));
        value.iter().for_each(|byte| {
            let _ = write!(line, "{byte:02x}");
        });
    }
    (line.into(), regular)
}

/// Collects a directory.
#[derive(Default)]
struct Names {
    found: Vec<(Ino, Vec<u8>)>,
    next: u64,
}

impl DirSink for Names {
    fn add(&mut self, entry: &DirEntry<'_>) -> bool {
        self.next = entry.next_offset;
        self.found.push((entry.ino, entry.name.to_owned()));
        true
    }
}

/// Walks a mounted filesystem; the tree, and each path's inode.
pub fn walk(fs: &dyn FileSystem) -> (Tree, BTreeMap<Arc<str>, Ino>) {
    let (mut tree, mut inos) = (Tree::new(), BTreeMap::new());
    let mut stack: Vec<(Arc<str>, Ino)> = vec![("".into(), fs.root())];
    while let Some((path, ino)) = stack.pop() {
        let (line, regular) = describe(fs, ino);
        if line.starts_with("Directory") {
            let mut names = Names::default();
            fs.readdir(&ROOT, ino, FileHandle::default(), 0, &mut names)
                .unwrap_or_else(|e| panic!("readdir {path}: {e:?}"));
            for (_, name) in names.found {
                let text = String::from_utf8_lossy(&name).into_owned();
                if matches!(text.as_str(), "." | "..") || (path.is_empty() && text == "lost+found")
                {
                    continue;
                }
                // By name and not by what the listing says: both must lead to the inode.
                let entry = fs
                    .lookup(&ROOT, ino, &name)
                    .unwrap_or_else(|e| panic!("lookup {path}/{text}: {e:?}"));
                let child = if path.is_empty() { text } else { format!("{path}/{text}") };
                stack.push((child.into(), entry.attr.ino));
            }
        }
        tree.insert(path.clone(), Node { describe: line, regular });
        inos.insert(path, ino);
    }
    (tree, inos)
}

/// All bytes of a file.
pub fn read_all(fs: &dyn FileSystem, ino: Ino) -> Vec<u8> {
    let size = fs.getattr(&ROOT, ino).expect("getattr").size;
    let mut out = Vec::new();
    while (out.len() as u64) < size {
        let mut reply = ReadReply::new();
        fs.read(&ROOT, ino, FileHandle::default(), out.len() as u64, 1 << 17, &mut reply)
            .unwrap_or_else(|e| panic!("read {ino}: {e:?}"));
        assert!(!reply.is_empty(), "inode {ino} ends at {} of {size}", out.len());
        out.extend(reply.to_vec());
    }
    out
}
