//! Looks at a mounted filesystem: what is there, in a form that two can be compared by.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use uext_vfs::{DirEntry, DirSink, FileHandle, FileKind, FileSystem, Ino, ReadReply};

use crate::history::{Node, Tree};
use crate::recorder::ROOT;

/// Times below this were set by a workload.
const CHOSEN_TIMES_END: i64 = 1_000_000;

/// All that can be said of an inode in one line but contents and times; whether it is a
/// regular file.
pub fn describe(fs: &dyn FileSystem, ino: Ino) -> (Arc<str>, bool) {
    let attr = fs.getattr(&ROOT, ino).unwrap_or_else(|e| panic!("getattr {ino}: {e:?}"));
    let regular = attr.kind == FileKind::Regular;
    let mut line = format!("{:?} {:o}", attr.kind, attr.perm);
    if attr.kind != FileKind::Directory {
        let _ = write!(line, " {} links", attr.nlink);
    }
    if attr.atime.sec < CHOSEN_TIMES_END {
        let _ = write!(line, " read at {}", attr.atime.sec);
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
