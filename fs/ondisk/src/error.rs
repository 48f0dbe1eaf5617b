//! What is wrong with a structure, and where.

use crate::units::{FsBlock, GroupNumber, InodeNumber, LogicalBlock};

/// The result of every parser in this crate.
pub type Result<T> = std::result::Result<T, Corrupt>;

/// How a structure fails its checks; callers match on it for control flow
/// (a bad checksum is `EBADMSG`, the rest is `EUCLEAN`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CorruptKind {
    /// A magic number is not there: this is not the structure it should be.
    Magic,
    /// The stored checksum is not the computed one.
    Checksum,
    /// A value lies outside what the format allows.
    Value,
    /// The bytes end before the structure does.
    Truncated,
    /// The structure uses a feature this program does not know.
    Unsupported,
}

/// A structure that cannot be used: what it is, what is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corrupt {
    /// What callers match on.
    pub kind: CorruptKind,
    /// The structure, in the field's words ("group descriptor", "extent header").
    pub what: &'static str,
    /// The field and the value found, in one short phrase.
    pub detail: String,
    /// The inode it belongs to, when known.
    pub inode: Option<InodeNumber>,
    /// The block it lies in, when known.
    pub block: Option<FsBlock>,
    /// The block of the file or directory, when known.
    pub logical: Option<LogicalBlock>,
    /// The group, when known.
    pub group: Option<GroupNumber>,
}

impl Corrupt {
    /// A new error without a place; [`Corrupt::inode`] and its kin add it.
    pub fn new(kind: CorruptKind, what: &'static str, detail: impl Into<String>) -> Self {
        Self {
            kind,
            what,
            detail: detail.into(),
            inode: None,
            block: None,
            logical: None,
            group: None,
        }
    }

    /// A value outside what the format allows.
    pub fn value(what: &'static str, detail: impl Into<String>) -> Self {
        Self::new(CorruptKind::Value, what, detail)
    }

    /// A checksum that does not match.
    pub fn checksum(what: &'static str, stored: u32, computed: u32) -> Self {
        let detail = format!("checksum is {stored:#010x}, computed {computed:#010x}");
        Self::new(CorruptKind::Checksum, what, detail)
    }

    /// Fewer bytes than the structure needs.
    pub fn truncated(what: &'static str, have: usize, need: usize) -> Self {
        Self::new(CorruptKind::Truncated, what, format!("{have} bytes, {need} needed"))
    }

    /// Adds the inode.
    #[must_use]
    pub fn in_inode(mut self, inode: InodeNumber) -> Self {
        self.inode = Some(inode);
        self
    }

    /// Adds the block of the filesystem.
    #[must_use]
    pub fn in_block(mut self, block: FsBlock) -> Self {
        self.block = Some(block);
        self
    }

    /// Adds the block of the file.
    #[must_use]
    pub fn at_logical(mut self, logical: LogicalBlock) -> Self {
        self.logical = Some(logical);
        self
    }

    /// Adds the group.
    #[must_use]
    pub fn in_group(mut self, group: GroupNumber) -> Self {
        self.group = Some(group);
        self
    }
}

impl std::error::Error for Corrupt {}

impl std::fmt::Display for Corrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.what)?;
        if let Some(inode) = self.inode {
            write!(f, " of inode {inode}")?;
        }
        if let Some(group) = self.group {
            write!(f, " of group {group}")?;
        }
        if let Some(logical) = self.logical {
            write!(f, " at logical block {logical}")?;
        }
        if let Some(block) = self.block {
            write!(f, " in block {block}")?;
        }
        write!(f, ": {}", self.detail)
    }
}
