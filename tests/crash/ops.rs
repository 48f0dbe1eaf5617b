//! The calls that workloads are made of, and how they are written in a line that
//! repeats a failure: `creat A/foo; append A/foo 9000 #7; fsync A/foo`.
//!
//! An operation says all that it does, contents included, so a workload is the same
//! when others of its operations are left out. A path that begins with `@` is the file
//! that had that name when its last name was removed under `hold`.

use std::fmt;

use uext_tests::tree::Rng;
use uext_vfs::WriteFlags;

/// How a write comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// write(2).
    Plain,
    /// With `O_DIRECT`.
    Direct,
    /// A page of the kernel's cache: mmap(2), or its writeback.
    Page,
    /// With `O_SYNC`.
    Sync,
    /// With `O_DSYNC`.
    Dsync,
}

impl How {
    const ALL: [(Self, &str); 5] = [
        (Self::Plain, "write"),
        (Self::Direct, "direct"),
        (Self::Page, "page"),
        (Self::Sync, "osync"),
        (Self::Dsync, "odsync"),
    ];

    /// The flags of the call.
    pub fn flags(self) -> WriteFlags {
        match self {
            Self::Plain => WriteFlags::empty(),
            Self::Direct => WriteFlags::DIRECT,
            Self::Page => WriteFlags::CACHE,
            Self::Sync => WriteFlags::SYNC,
            Self::Dsync => WriteFlags::DSYNC,
        }
    }
}

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// An empty file.
    Create(String),
    /// A directory.
    Mkdir(String),
    /// A FIFO.
    Mknod(String),
    /// A hard link.
    Link(String, String),
    /// A symbolic link to a target of so many bytes.
    Symlink(String, usize),
    /// A symbolic link whose block begins as one of the journal's own does.
    MagicSymlink(String),
    /// The first, a sync of some kind, and the making of a file while the commit is on its way.
    During(Box<Op>, String),
    /// Removes a name, and the file with its last one.
    Unlink(String),
    /// Removes the last name and keeps the file in use, as `@` and the name.
    Hold(String),
    /// Ends the use of a file that was held.
    Close(String),
    /// Removes an empty directory.
    Rmdir(String),
    /// Renames, replacing what is there.
    Rename(String, String),
    /// Swaps two names.
    Exchange(String, String),
    /// Writes bytes made from a number at an offset.
    Write { how: How, path: String, offset: usize, len: usize, fill: u64 },
    /// Writes at the end.
    Append { path: String, len: usize, fill: u64 },
    /// Sets the size.
    Truncate(String, usize),
    /// fallocate(2) with a mode.
    Fallocate { path: String, mode: i32, offset: usize, len: usize },
    /// Sets an attribute to bytes made from a number.
    SetXattr { path: String, name: String, len: usize, fill: u64 },
    /// Sets an ACL: `system.posix_acl_access`, or the default one.
    SetAcl { path: String, default: bool },
    /// Removes an attribute.
    RemoveXattr(String, String),
    /// Sets the permission bits.
    Chmod(String, u32),
    /// Sets the access time, in seconds since 1970; a small number, so that no clock sets it.
    Utimes(String, i64),
    /// fsync(2), of a file or directory.
    Fsync(String),
    /// fdatasync(2).
    Fdatasync(String),
    /// sync(2).
    Sync,
}

/// Bytes without a zero, so that a hole is no part of a version.
pub fn contents(fill: u64, len: usize) -> Vec<u8> {
    Rng(fill).bytes(len).into_iter().map(|byte| byte.max(1)).collect()
}

/// A path, or `/` for the root.
fn shown(path: &str) -> &str {
    if path.is_empty() { "/" } else { path }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create(path) => write!(f, "creat {path}"),
            Self::Mkdir(path) => write!(f, "mkdir {path}"),
            Self::Mknod(path) => write!(f, "mknod {path}"),
            Self::Link(from, to) => write!(f, "link {from} {to}"),
            Self::Symlink(path, len) => write!(f, "symlink {path} {len}"),
            Self::MagicSymlink(path) => write!(f, "magic-symlink {path}"),
            Self::During(op, path) => write!(f, "during {path} {op}"),
            Self::Unlink(path) => write!(f, "unlink {path}"),
            Self::Hold(path) => write!(f, "hold {path}"),
            Self::Close(path) => write!(f, "close {path}"),
            Self::Rmdir(path) => write!(f, "rmdir {path}"),
            Self::Rename(from, to) => write!(f, "rename {from} {to}"),
            Self::Exchange(a, b) => write!(f, "exchange {a} {b}"),
            Self::Write { how, path, offset, len, fill } => {
                let word = How::ALL.iter().find(|(one, _)| one == how).map_or("write", |(_, w)| w);
                write!(f, "{word} {path} {offset} {len} #{fill}")
            }
            Self::Append { path, len, fill } => write!(f, "append {path} {len} #{fill}"),
            Self::Truncate(path, size) => write!(f, "truncate {path} {size}"),
            Self::Fallocate { path, mode, offset, len } => {
                write!(f, "fallocate {path} {mode} {offset} {len}")
            }
            Self::SetXattr { path, name, len, fill } => {
                write!(f, "setxattr {path} {name} {len} #{fill}")
            }
            Self::SetAcl { path, default } => {
                write!(f, "setacl {path} {}", if *default { "default" } else { "access" })
            }
            Self::RemoveXattr(path, name) => write!(f, "removexattr {path} {name}"),
            Self::Chmod(path, mode) => write!(f, "chmod {} {mode:o}", shown(path)),
            Self::Utimes(path, sec) => write!(f, "utimes {path} {sec}"),
            Self::Fsync(path) => write!(f, "fsync {}", shown(path)),
            Self::Fdatasync(path) => write!(f, "fdatasync {path}"),
            Self::Sync => f.write_str("sync"),
        }
    }
}

/// The words of one operation.
struct Words<'a> {
    line: &'a str,
    words: std::str::SplitWhitespace<'a>,
}

impl Words<'_> {
    fn path(&mut self) -> Result<String, String> {
        let word = self.words.next().ok_or_else(|| format!("`{}` lacks a word", self.line))?;
        Ok(if word == "/" { String::new() } else { word.to_owned() })
    }

    fn number(&mut self) -> Result<u64, String> {
        let word = self.path()?;
        word.trim_start_matches('#').parse().map_err(|_| format!("`{}`: {word}", self.line))
    }

    fn size(&mut self) -> Result<usize, String> {
        usize::try_from(self.number()?).map_err(|error| error.to_string())
    }
}

/// Reads one operation.
///
/// # Errors
/// What is wrong with it.
pub fn parse(line: &str) -> Result<Op, String> {
    let mut words = Words { line, words: line.split_whitespace() };
    let w = &mut words;
    let op = match w.path()?.as_str() {
        "creat" => Op::Create(w.path()?),
        "mkdir" => Op::Mkdir(w.path()?),
        "mknod" => Op::Mknod(w.path()?),
        "link" => Op::Link(w.path()?, w.path()?),
        "symlink" => Op::Symlink(w.path()?, w.size()?),
        "magic-symlink" => Op::MagicSymlink(w.path()?),
        "during" => {
            let path = w.path()?;
            let rest: Vec<&str> = words.words.collect();
            Op::During(Box::new(parse(&rest.join(" "))?), path)
        }
        "unlink" => Op::Unlink(w.path()?),
        "hold" => Op::Hold(w.path()?),
        "close" => Op::Close(w.path()?),
        "rmdir" => Op::Rmdir(w.path()?),
        "rename" => Op::Rename(w.path()?, w.path()?),
        "exchange" => Op::Exchange(w.path()?, w.path()?),
        "append" => Op::Append { path: w.path()?, len: w.size()?, fill: w.number()? },
        "truncate" => Op::Truncate(w.path()?, w.size()?),
        "fallocate" => Op::Fallocate {
            path: w.path()?,
            mode: i32::try_from(w.number()?).map_err(|error| error.to_string())?,
            offset: w.size()?,
            len: w.size()?,
        },
        "setxattr" => {
            let (path, name) = (w.path()?, w.path()?);
            Op::SetXattr { path, name, len: w.size()?, fill: w.number()? }
        }
        "setacl" => Op::SetAcl { path: w.path()?, default: w.path()? == "default" },
        "removexattr" => Op::RemoveXattr(w.path()?, w.path()?),
        "chmod" => {
            let (path, mode) = (w.path()?, w.path()?);
            Op::Chmod(path, u32::from_str_radix(&mode, 8).map_err(|error| error.to_string())?)
        }
        "utimes" => Op::Utimes(w.path()?, w.number()?.cast_signed()),
        "fsync" => Op::Fsync(w.path()?),
        "fdatasync" => Op::Fdatasync(w.path()?),
        "sync" => Op::Sync,
        word => {
            let how = How::ALL.iter().find(|(_, name)| *name == word).map(|(how, _)| *how);
            let how = how.ok_or_else(|| format!("no operation is called `{word}`"))?;
            let (path, offset) = (w.path()?, w.size()?);
            Op::Write { how, path, offset, len: w.size()?, fill: w.number()? }
        }
    };
    Ok(op)
}

/// Reads a workload.
///
/// # Errors
/// What is wrong with it.
pub fn parse_all(text: &str) -> Result<Vec<Op>, String> {
    text.split(';').map(str::trim).filter(|line| !line.is_empty()).map(parse).collect()
}

/// Writes a workload.
pub fn format_all(ops: &[Op]) -> String {
    ops.iter().map(Op::to_string).collect::<Vec<_>>().join("; ")
}

#[test]
fn what_is_written_reads_as_it_was() {
    let text = "mkdir A; creat A/foo; page A/foo 4096 4096 #3; append A/foo 9000 #7; \
                link A/foo B/bar; rename A/foo A/bar; exchange A/bar B/bar; hold A/bar; \
                odsync @A/bar 0 10 #1; close @A/bar; symlink s 700; setxattr B user.a 20 #2; \
                setacl B default; magic-symlink m; during A/x fsync A; removexattr B user.a; chmod B 640; utimes B 1000; \
                fallocate B/bar 3 0 4096; truncate B/bar 0; fsync /; fdatasync B/bar; sync";
    let ops = parse_all(text).expect("a workload");
    assert_eq!(format_all(&ops), text);
    assert!(parse_all("creat").is_err() && parse_all("leap A").is_err());
}
