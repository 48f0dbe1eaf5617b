//! Work on a filesystem of which nothing is known: list and read all of it, then
//! write, rename and delete in all of it. Errors are what is expected; each count is bounded.

use std::collections::BTreeSet;

use uext_tests::tree::Rng;
use uext_vfs::{
    Context, DirEntry, DirSink, Entry, FileHandle, FileKind, FileSystem, Ino, ReadReply,
    RenameFlags, SetAttr, WriteFlags, XattrFlags,
};

const ROOT: Context = Context { uid: 0, gid: 0, pid: 0, umask: 0o022 };
const NO_HANDLE: FileHandle = FileHandle(0);
/// Damage can make a listing endless and a file as long as the format allows.
const MOST_NAMES: usize = 5_000;
const MOST_READ: u64 = 1 << 20;
const AT_ONCE: usize = 1 << 17;

/// A name that was found: its directory, the name and its inode.
struct Found {
    dir: Ino,
    name: Vec<u8>,
    ino: Ino,
    kind: FileKind,
}

#[derive(Default)]
struct Names {
    names: Vec<Vec<u8>>,
    next: u64,
}

impl DirSink for Names {
    fn add(&mut self, entry: &DirEntry<'_>) -> bool {
        if self.names.len() >= 100 {
            return false;
        }
        self.names.push(entry.name.to_vec());
        self.next = entry.next_offset;
        true
    }
}

/// Whatever a call answers is good; that it answers is what is asked.
fn try_it<T>(_: uext_vfs::Result<T>) {}

fn list(fs: &dyn FileSystem, dir: Ino) -> Vec<Vec<u8>> {
    let (mut all, mut offset) = (Vec::new(), 0);
    while all.len() < MOST_NAMES {
        let mut names = Names { next: offset, ..Names::default() };
        let read = fs.readdir(&ROOT, dir, NO_HANDLE, offset, &mut names);
        if names.names.is_empty() {
            break;
        }
        all.append(&mut names.names);
        if read.is_err() {
            break;
        }
        offset = names.next;
    }
    all
}

fn read(fs: &dyn FileSystem, entry: &Entry) {
    let mut offset = 0;
    // The end too: what lies behind holes.
    let tail = entry.attr.size.saturating_sub(10);
    while offset < entry.attr.size.min(MOST_READ) {
        try_it(fs.read(&ROOT, entry.attr.ino, NO_HANDLE, offset, AT_ONCE, &mut ReadReply::new()));
        offset += AT_ONCE as u64;
    }
    try_it(fs.read(&ROOT, entry.attr.ino, NO_HANDLE, tail, 4096, &mut ReadReply::new()));
}

fn look(fs: &dyn FileSystem) -> Vec<Found> {
    let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
    let mut dirs = vec![fs.root()];
    while let Some(dir) = dirs.pop() {
        for name in list(fs, dir) {
            if name == b"." || name == b".." || found.len() >= MOST_NAMES {
                continue;
            }
            let Ok(entry) = fs.lookup(&ROOT, dir, &name) else { continue };
            let (ino, kind) = (entry.attr.ino, entry.attr.kind);
            found.push(Found { dir, name, ino, kind });
            if !seen.insert(ino) {
                continue;
            }
            if let Ok(names) = fs.listxattr(&ROOT, ino) {
                names.split(|&byte| byte == 0).filter(|name| !name.is_empty()).for_each(|name| {
                    try_it(fs.getxattr(&ROOT, ino, name));
                });
            }
            match kind {
                FileKind::Directory => dirs.push(ino),
                FileKind::Regular => read(fs, &entry),
                FileKind::Symlink => try_it(fs.readlink(&ROOT, ino)),
                _ => {}
            }
        }
    }
    found
}

fn create_in(fs: &dyn FileSystem, dir: Ino, data: &[u8]) {
    let mode = libc::S_IFREG | 0o644;
    if let Ok(entry) = fs.mknod(&ROOT, dir, b"new file", mode, 0) {
        let ino = entry.attr.ino;
        try_it(fs.write(&ROOT, ino, NO_HANDLE, 0, data, WriteFlags::empty()));
        try_it(fs.setxattr(&ROOT, ino, b"user.new", &data[..400], XattrFlags::empty()));
        try_it(fs.link(&ROOT, ino, dir, b"new link"));
    }
    try_it(fs.symlink(&ROOT, dir, b"new symlink", b"target"));
    try_it(fs.mkdir(&ROOT, dir, b"new directory", 0o755));
    for i in 0..20 {
        try_it(fs.mknod(&ROOT, dir, format!("new-{i}").as_bytes(), mode, 0));
    }
}

fn change(fs: &dyn FileSystem, found: &Found, root: Ino, rng: &mut Rng) {
    let Found { dir, name, ino, .. } = found;
    let (dir, ino) = (*dir, *ino);
    let size = fs.getattr(&ROOT, ino).map_or(0, |attr| attr.size);
    let bytes = rng.bytes(5_000);
    let to = |size| SetAttr { size: Some(size), ..SetAttr::default() };
    match rng.below(10) {
        0 => try_it(fs.write(&ROOT, ino, NO_HANDLE, size, &bytes, WriteFlags::empty())),
        1 => {
            let at = rng.below(size.max(1));
            try_it(fs.write(&ROOT, ino, NO_HANDLE, at, &bytes, WriteFlags::empty()));
        }
        2 => try_it(fs.setattr(&ROOT, ino, &to(size / 2))),
        3 => try_it(fs.setattr(&ROOT, ino, &to(0))),
        4 => {
            let new = format!("renamed-{ino}");
            try_it(fs.rename(&ROOT, (dir, name), (root, new.as_bytes()), RenameFlags::empty()));
        }
        5 => {
            let value = &bytes[..700];
            try_it(fs.setxattr(&ROOT, ino, b"user.changed", value, XattrFlags::empty()));
        }
        6 => try_it(fs.fsync(&ROOT, ino, NO_HANDLE, false)),
        _ => {
            let gone = match found.kind {
                FileKind::Directory => fs.rmdir(&ROOT, dir, name),
                _ => fs.unlink(&ROOT, dir, name),
            };
            try_it(gone);
            fs.forget(ino, 1);
        }
    }
}

/// Reads everything, then works everywhere.
pub fn work(fs: &dyn FileSystem, rng: &mut Rng) {
    let found = look(fs);
    let data = rng.bytes(30_000);
    create_in(fs, fs.root(), &data);
    let dirs = found.iter().filter(|found| found.kind == FileKind::Directory);
    dirs.for_each(|found| create_in(fs, found.ino, &data));
    try_it(fs.sync());
    // A large directory has many names of the same kind.
    let step = found.len().div_ceil(600).max(1);
    found.iter().step_by(step).for_each(|found| change(fs, found, fs.root(), rng));
    try_it(fs.statfs(&ROOT));
    drop(look(fs));
}

/// Only reads.
pub fn read_everything(fs: &dyn FileSystem) {
    drop(look(fs));
    try_it(fs.statfs(&ROOT));
}
