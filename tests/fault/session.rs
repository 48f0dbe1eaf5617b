//! Calls on a filesystem whose device may fail, each followed by the model.
//!
//! What is checked at once: reads give what was written or an error; a failed call says EIO or
//! EROFS, or ENOSPC where the run allows it; and after the first EROFS nothing is changed and no
//! sync is acknowledged any more.

use std::collections::BTreeMap;
use std::sync::Arc;

use uext_ext4::Ext4;
use uext_tests::tree::Rng;
use uext_vfs::{
    Context, DirEntry, DirSink, Errno, FileHandle, FileKind, FileSystem, Ino, ReadReply,
    RenameFlags, SetAttr, WriteFlags, XattrFlags,
};

use crate::model::{Found, Kind, Model, Object};

/// Who asks.
pub const ROOT: Context = Context { uid: 0, gid: 0, pid: 0, umask: 0o022 };

/// Which failures a run may meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum May {
    /// None: the clean run.
    Nothing,
    /// The device fails.
    Eio,
    /// Space runs out.
    Enospc,
}

/// A run.
pub struct Session {
    /// The filesystem.
    pub fs: Arc<Ext4>,
    /// What it owes.
    pub model: Model,
    /// Chance, by seed.
    pub rng: Rng,
    /// Whether there is a journal, whose commits cover all names.
    pub journal: bool,
    may: May,
    inos: BTreeMap<Object, Ino>,
    lookups: BTreeMap<Ino, u64>,
    /// A call was refused with EROFS.
    refused: bool,
    /// `UEXT_FAULT_TRACE`: each call is printed.
    trace: bool,
    /// Calls so far, and how many of them failed.
    pub calls: u64,
    /// Calls that failed.
    pub failed: u64,
}

type Done<T> = Result<T, String>;

impl Session {
    /// Begins a run on a new filesystem.
    pub fn new(fs: Arc<Ext4>, seed: u64, journal: bool, may: May) -> Self {
        let mut model = Model::default();
        let root = model.add(Kind::Dir);
        model.set_name("", Some(root));
        model.all_durable();
        let inos = BTreeMap::from([(root, fs.root())]);
        Self {
            fs,
            model,
            rng: Rng(seed),
            journal,
            may,
            inos,
            lookups: BTreeMap::new(),
            refused: false,
            trace: std::env::var_os("UEXT_FAULT_TRACE").is_some(),
            calls: 0,
            failed: 0,
        }
    }

    /// Looks at how a call ended: `None` when it failed as it may.
    fn outcome<T>(
        &mut self,
        what: &str,
        changes: bool,
        result: uext_vfs::Result<T>,
    ) -> Done<Option<T>> {
        self.calls += 1;
        if self.trace {
            let how = result.as_ref().err().map_or("ok".to_owned(), Errno::to_string);
            eprintln!("{}: {what}: {how}", self.calls);
        }
        match result {
            Ok(_) if changes && self.refused => Err(format!("{what} succeeds after EROFS")),
            Ok(value) => Ok(Some(value)),
            Err(errno) => {
                self.failed += 1;
                let may = match self.may {
                    May::Nothing => false,
                    May::Eio => matches!(errno, Errno::EIO | Errno::EROFS),
                    May::Enospc => errno == Errno::ENOSPC,
                };
                if !may {
                    return Err(format!("{what}: {errno}"));
                }
                self.refused |= changes && errno == Errno::EROFS;
                Ok(None)
            }
        }
    }

    fn ino(&self, path: &str) -> Option<Ino> {
        self.model.at(path).and_then(|object| self.inos.get(&object).copied())
    }

    fn split<'p>(&self, path: &'p str) -> Option<(Ino, &'p [u8])> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        Some((self.ino(dir)?, name.as_bytes()))
    }

    fn adopt(&mut self, path: &str, kind: Kind, ino: Ino) -> Object {
        let object = self.model.add(kind);
        self.inos.insert(object, ino);
        *self.lookups.entry(ino).or_default() += 1;
        self.model.set_name(path, Some(object));
        object
    }

    /// Whether the filesystem has refused a change.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// Looks at what stands at a path after a call on it failed.
    fn look(&mut self, path: &str) -> Done<()> {
        self.model.lose_name(path);
        let Some((dir, name)) = self.split(path) else { return Ok(()) };
        match self.fs.lookup(&ROOT, dir, name) {
            Err(Errno::ENOENT) => {
                self.model.set_name(path, None);
                Ok(())
            }
            Err(Errno::EIO | Errno::EROFS) => Ok(()),
            Err(errno) => Err(format!("lookup {path}: {errno}")),
            Ok(entry) => {
                *self.lookups.entry(entry.attr.ino).or_default() += 1;
                let old = self.inos.iter().find(|(_, ino)| **ino == entry.attr.ino);
                if let Some((&object, _)) = old {
                    self.model.set_name(path, Some(object));
                    return Ok(());
                }
                let kind = match entry.attr.kind {
                    FileKind::Regular => Kind::File,
                    FileKind::Directory => Kind::Dir,
                    // Its target was never acknowledged.
                    _ => return Ok(()),
                };
                self.adopt(path, kind, entry.attr.ino);
                Ok(())
            }
        }
    }

    /// Looks again at all that could not be looked at.
    pub fn look_again(&mut self) -> Done<()> {
        for path in self.model.unsure_paths() {
            self.look(&path)?;
        }
        Ok(())
    }

    /// Makes a file, directory or link, where nothing is.
    pub fn make(&mut self, path: &str, kind: Kind) -> Done<()> {
        if self.model.at(path).is_some() || !self.model.is_sure(path) {
            return Ok(());
        }
        let Some((dir, name)) = self.split(path) else { return Ok(()) };
        let made = match &kind {
            Kind::File => self.fs.mknod(&ROOT, dir, name, libc::S_IFREG | 0o644, 0),
            Kind::Dir => self.fs.mkdir(&ROOT, dir, name, 0o755),
            Kind::Link(target) => self.fs.symlink(&ROOT, dir, name, target),
        };
        match self.outcome(&format!("make {path}"), true, made)? {
            Some(entry) => {
                self.adopt(path, kind, entry.attr.ino);
                Ok(())
            }
            None => self.look(path),
        }
    }

    /// Removes a name; the last one takes its object along.
    pub fn remove(&mut self, path: &str) -> Done<()> {
        let Some(object) = self.model.at(path) else { return Ok(()) };
        let Some((dir, name)) = self.split(path) else { return Ok(()) };
        if !self.model.is_sure(path) || self.model.names_below(path).len() > 1 {
            return Ok(());
        }
        let gone = match self.model.kind(object) {
            Kind::Dir => self.fs.rmdir(&ROOT, dir, name),
            _ => self.fs.unlink(&ROOT, dir, name),
        };
        match self.outcome(&format!("remove {path}"), true, gone)? {
            Some(()) => {
                self.model.set_name(path, None);
                self.forget(object);
                Ok(())
            }
            None => self.look(path),
        }
    }

    /// The kernel lets go of an object that has no name left.
    fn forget(&mut self, object: Object) {
        if self.model.links(object) == 0
            && let Some(ino) = self.inos.remove(&object)
        {
            self.fs.forget(ino, self.lookups.remove(&ino).unwrap_or(0));
        }
    }

    /// Adds a name to a file.
    pub fn link(&mut self, from: &str, to: &str) -> Done<()> {
        let (Some(object), Some(ino)) = (self.model.at(from), self.ino(from)) else {
            return Ok(());
        };
        let Some((dir, name)) = self.split(to) else { return Ok(()) };
        if self.model.at(to).is_some() || !self.model.is_sure(to) {
            return Ok(());
        }
        let made = self.fs.link(&ROOT, ino, dir, name);
        match self.outcome(&format!("link {from} {to}"), true, made)? {
            Some(_) => {
                *self.lookups.entry(ino).or_default() += 1;
                self.model.set_name(to, Some(object));
                Ok(())
            }
            None => self.look(to),
        }
    }

    /// Renames, over what is there.
    pub fn rename(&mut self, from: &str, to: &str) -> Done<()> {
        let (Some(old), Some(new)) = (self.split(from), self.split(to)) else { return Ok(()) };
        if self.model.at(from).is_none() || !self.model.is_sure(from) || !self.model.is_sure(to) {
            return Ok(());
        }
        let replaced = self.model.at(to);
        let done = self.fs.rename(&ROOT, old, new, RenameFlags::empty());
        match self.outcome(&format!("rename {from} {to}"), true, done)? {
            Some(()) => {
                self.model.move_name(from, to);
                if let Some(replaced) = replaced {
                    self.forget(replaced);
                }
                Ok(())
            }
            None => {
                // What moves with a directory is not followed by looking.
                let below = self.model.names_below(from);
                for (path, _) in below.into_iter().skip(1) {
                    self.model.lose_name(&path);
                    self.model.lose_name(&format!("{to}{}", &path[from.len()..]));
                }
                self.look(from)?;
                self.look(to)
            }
        }
    }

    /// A file's bytes for a change; reads them where they are not known. `None`: cannot be.
    fn known_bytes(&mut self, object: Object) -> Done<Option<Vec<u8>>> {
        if self.model.bytes(object).is_none()
            && let Some(ino) = self.inos.get(&object)
            && let Some(bytes) = read_all(&*self.fs, *ino)?
        {
            self.model.found_bytes(object, bytes)?;
        }
        Ok(self.model.bytes(object).map(<[u8]>::to_vec))
    }

    /// Writes at an offset.
    pub fn write(&mut self, path: &str, offset: usize, data: &[u8]) -> Done<usize> {
        let (Some(object), Some(ino)) = (self.model.at(path), self.ino(path)) else { return Ok(0) };
        let Some(old) = self.known_bytes(object)? else { return Ok(0) };
        let with = |data: &[u8]| {
            let mut bytes = old.clone();
            bytes.resize(bytes.len().max(offset + data.len()), 0);
            bytes[offset..offset + data.len()].copy_from_slice(data);
            bytes
        };
        let wrote = self.fs.write(
            &ROOT,
            ino,
            FileHandle::default(),
            offset as u64,
            data,
            WriteFlags::empty(),
        );
        match self.outcome(&format!("write {path} {offset}+{}", data.len()), true, wrote)? {
            Some(count) => {
                self.model.set_bytes(object, with(&data[..count]));
                Ok(count)
            }
            None => {
                self.model.tried(object, with(data));
                self.known_bytes(object)?;
                Ok(0)
            }
        }
    }

    /// Sets the size.
    pub fn truncate(&mut self, path: &str, size: usize) -> Done<()> {
        let (Some(object), Some(ino)) = (self.model.at(path), self.ino(path)) else {
            return Ok(());
        };
        let Some(mut bytes) = self.known_bytes(object)? else { return Ok(()) };
        bytes.resize(size, 0);
        let set = SetAttr { size: Some(size as u64), ..SetAttr::default() };
        let done = self.fs.setattr(&ROOT, ino, &set);
        match self.outcome(&format!("truncate {path} {size}"), true, done)? {
            Some(_) => self.model.set_bytes(object, bytes),
            None => {
                self.model.tried(object, bytes);
                self.known_bytes(object)?;
            }
        }
        Ok(())
    }

    /// Sets an attribute, which the model does not follow.
    pub fn set_xattr(&mut self, path: &str, len: usize) -> Done<()> {
        let Some(ino) = self.ino(path) else { return Ok(()) };
        let value = self.rng.bytes(len);
        let done = self.fs.setxattr(&ROOT, ino, b"user.fault", &value, XattrFlags::empty());
        self.outcome(&format!("setxattr {path}"), true, done)?;
        Ok(())
    }

    /// Reads a file and compares.
    pub fn read(&mut self, path: &str) -> Done<()> {
        let (Some(object), Some(ino)) = (self.model.at(path), self.ino(path)) else {
            return Ok(());
        };
        let Some(wanted) = self.known_bytes(object)? else { return Ok(()) };
        let mut reply = ReadReply::new();
        let len = wanted.len() + 1;
        let done = self.fs.read(&ROOT, ino, FileHandle::default(), 0, len, &mut reply);
        if self.outcome(&format!("read {path}"), false, done)?.is_some() {
            let found = reply.to_vec();
            if found != wanted {
                let at = found.iter().zip(&wanted).position(|(a, b)| a != b);
                let (have, want) = (found.len(), wanted.len());
                return Err(format!("read {path}: {have} bytes of {want}, differ at {at:?}"));
            }
        }
        Ok(())
    }

    /// fsync(2) or fdatasync(2); whether it was acknowledged.
    pub fn fsync(&mut self, path: &str, datasync: bool) -> Done<bool> {
        let (Some(object), Some(ino)) = (self.model.at(path), self.ino(path)) else {
            return Ok(false);
        };
        let done = self.fs.fsync(&ROOT, ino, FileHandle::default(), datasync);
        let acknowledged = self.outcome(&format!("fsync {path}"), true, done)?.is_some();
        if acknowledged {
            self.model.bytes_durable(object);
            if self.journal && !datasync {
                self.model.names_durable();
            }
        }
        Ok(acknowledged)
    }

    /// sync(2); whether it was acknowledged.
    pub fn sync(&mut self) -> Done<bool> {
        let done = self.fs.sync();
        let acknowledged = self.outcome("sync", true, done)?.is_some();
        if acknowledged {
            self.model.all_durable();
        }
        Ok(acknowledged)
    }

    /// Unmounts; whether it was acknowledged.
    pub fn unmount(&mut self) -> Done<bool> {
        let done = self.fs.unmount();
        let acknowledged = self.outcome("unmount", true, done)?.is_some();
        if acknowledged {
            self.model.all_durable();
        }
        Ok(acknowledged)
    }
}

/// A file's bytes; `None` when they cannot be read.
fn read_all(fs: &dyn FileSystem, ino: Ino) -> Done<Option<Vec<u8>>> {
    let Ok(attr) = fs.getattr(&ROOT, ino) else { return Ok(None) };
    let size = usize::try_from(attr.size).map_err(|error| error.to_string())?;
    let mut reply = ReadReply::new();
    match fs.read(&ROOT, ino, FileHandle::default(), 0, size + 1, &mut reply) {
        Ok(()) if reply.len() == size => Ok(Some(reply.to_vec())),
        Ok(()) => Err(format!("inode {ino}: {} bytes read of {size}", reply.len())),
        Err(_) => Ok(None),
    }
}

#[derive(Default)]
struct Names(Vec<Vec<u8>>);

impl DirSink for Names {
    fn add(&mut self, entry: &DirEntry<'_>) -> bool {
        self.0.push(entry.name.to_owned());
        true
    }
}

/// Walks a healthy filesystem.
///
/// # Errors
/// What cannot be read.
pub fn walk(fs: &dyn FileSystem) -> Done<BTreeMap<String, Found>> {
    let mut tree = BTreeMap::new();
    let mut stack = vec![(String::new(), fs.root())];
    while let Some((path, ino)) = stack.pop() {
        let say = |errno: Errno| format!("{path}: {errno}");
        let attr = fs.getattr(&ROOT, ino).map_err(say)?;
        let (mut bytes, mut kind) = (Vec::new(), Kind::File);
        match attr.kind {
            FileKind::Regular => {
                bytes = read_all(fs, ino)?.ok_or_else(|| format!("{path}: cannot be read"))?;
            }
            FileKind::Directory => {
                kind = Kind::Dir;
                let mut names = Names::default();
                fs.readdir(&ROOT, ino, FileHandle::default(), 0, &mut names).map_err(say)?;
                for name in names.0 {
                    let text = String::from_utf8_lossy(&name).into_owned();
                    let is_own = matches!(text.as_str(), "." | "..");
                    if is_own || path.is_empty() && text == "lost+found" {
                        continue;
                    }
                    let entry = fs.lookup(&ROOT, ino, &name);
                    let entry = entry.map_err(|errno| format!("lookup {path}/{text}: {errno}"))?;
                    let child = if path.is_empty() { text } else { format!("{path}/{text}") };
                    stack.push((child, entry.attr.ino));
                }
            }
            FileKind::Symlink => kind = Kind::Link(fs.readlink(&ROOT, ino).map_err(say)?),
            other => return Err(format!("{path}: a {other:?}")),
        }
        tree.insert(path, Found { kind, bytes });
    }
    Ok(tree)
}
