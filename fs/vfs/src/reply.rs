//! Where answers of variable length go: read data by pieces that are not
//! copied, and directory entries until the front end's buffer is full.

use std::ops::Range;

use uext_pagecache::FolioReadGuard;

use crate::ops::{FileKind, Ino};

/// A piece of read data.
pub enum ReadSegment {
    /// A range of a cached page, held shared until the reply has gone.
    Folio(FolioReadGuard, Range<usize>),
    /// Memory of its own.
    Bytes(Vec<u8>),
    /// A hole of this many bytes.
    Zeroes(usize),
}

impl ReadSegment {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Folio(_, range) => range.len(),
            Self::Bytes(bytes) => bytes.len(),
            Self::Zeroes(len) => *len,
        }
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a read found, in order.
#[derive(Default)]
pub struct ReadReply {
    segments: Vec<ReadSegment>,
    len: usize,
}

impl ReadReply {
    /// An empty reply.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a piece.
    pub fn push(&mut self, segment: ReadSegment) {
        self.len += segment.len();
        self.segments.push(segment);
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was read: the end of the file.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces.
    pub fn segments(&self) -> &[ReadSegment] {
        &self.segments
    }

    /// A copy in one piece.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.len);
        for segment in &self.segments {
            match segment {
                ReadSegment::Folio(folio, range) => out.extend_from_slice(&folio[range.clone()]),
                ReadSegment::Bytes(bytes) => out.extend_from_slice(bytes),
                ReadSegment::Zeroes(len) => out.resize(out.len() + len, 0),
            }
        }
        out
    }
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub struct DirEntry<'a> {
    /// Its inode.
    pub ino: Ino,
    /// Its type, when the directory says it.
    pub kind: Option<FileKind>,
    /// The name's bytes.
    pub name: &'a [u8],
    /// Where listing goes on after this entry; never 0, stable while the entry lives.
    pub next_offset: u64,
}

/// Takes directory entries.
pub trait DirSink {
    /// Takes an entry, or says `false`: full, and the entry was not taken.
    fn add(&mut self, entry: &DirEntry<'_>) -> bool;
}
