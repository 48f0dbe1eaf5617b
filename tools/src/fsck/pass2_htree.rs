//! Pass 2, the index of a hashed directory: every block referred to once, at
//! one depth, with hashes between those of its neighbours.

use uext_ondisk::dirhash::{DirHasher, HashVersion};
use uext_ondisk::htree::DxBlock;
use uext_ondisk::superblock::Superblock;

use super::context::Context;
use super::problem::{At, Code};

/// The least and the greatest hash in a leaf.
#[derive(Clone, Copy, Debug)]
pub struct BlockHashes {
    min: u32,
    max: u32,
}

impl Default for BlockHashes {
    fn default() -> Self {
        Self { min: u32::MAX, max: 0 }
    }
}

/// What a block of an indexed directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Root,
    Node,
    Leaf,
}

/// A block of an indexed directory.
#[derive(Clone, Copy, Debug)]
struct Block {
    kind: Kind,
    own: BlockHashes,
    /// The hashes its parent gives it.
    node: BlockHashes,
    parent: u32,
    /// The block before it in its parent; itself when it is the first there.
    previous: Option<u32>,
    references: u32,
    first: bool,
    last: bool,
}

/// The index of one directory.
pub struct Index {
    blocks: Vec<Block>,
    csum: bool,
    unsigned: bool,
    seed: [u32; 4],
    hasher: Option<DirHasher>,
    depth: u32,
}

impl Index {
    /// For a directory of `count` blocks without holes.
    pub fn new(sb: &Superblock, count: usize) -> Self {
        let block = Block {
            kind: Kind::Leaf,
            own: BlockHashes::default(),
            node: BlockHashes { min: 0, max: u32::MAX },
            parent: 0,
            previous: None,
            references: 0,
            first: false,
            last: false,
        };
        Self {
            blocks: vec![block; count],
            csum: sb.features().metadata_csum(),
            unsigned: sb.unsigned_hash(),
            seed: sb.hash_seed(),
            hasher: None,
            depth: 1,
        }
    }

    /// Takes a block in; whether it is a leaf. An index that cannot be followed
    /// is reported and given up.
    pub fn add_block(
        &mut self,
        ctx: &mut Context<'_, '_>,
        ino: u32,
        logical: u32,
        bytes: &[u8],
        csum_seed: u32,
    ) -> Result<bool, ()> {
        if logical as usize >= self.blocks.len() {
            return Err(());
        }
        let place = At::ino(ino).num(logical);
        let view = if logical == 0 {
            let (view, info) = match DxBlock::root(bytes, self.csum) {
                Ok(root) => root,
                Err(error) => {
                    ctx.problem(Code::IndexNode, place.text(error.detail));
                    return Err(());
                }
            };
            let version = HashVersion::from_raw(info.hash_version, self.unsigned).ok();
            self.hasher = version.map(|version| DirHasher { version, seed: self.seed });
            self.depth = u32::from(info.indirect_levels) + 1;
            self.blocks[0].kind = Kind::Root;
            self.blocks[0].references = 1;
            self.blocks[0].first = true;
            self.blocks[0].last = true;
            view
        } else {
            match looks_like_node(bytes, self.csum) {
                false => return Ok(true),
                true => match DxBlock::node(bytes, self.csum) {
                    Ok(view) => {
                        self.blocks[logical as usize].kind = Kind::Node;
                        view
                    }
                    Err(error) => {
                        ctx.problem(Code::IndexNode, place.text(error.detail));
                        return Err(());
                    }
                },
            }
        };
        if self.csum
            && let Err(error) = view.verify_checksum(csum_seed)
        {
            ctx.problem(Code::IndexNode, place.text(error.detail));
        }
        self.add_entries(ctx, ino, logical, view);
        Ok(false)
    }

    /// Follows the elements of a root or node.
    fn add_entries(
        &mut self,
        ctx: &mut Context<'_, '_>,
        ino: u32,
        logical: u32,
        view: DxBlock<'_>,
    ) {
        let place = || At::ino(ino).num(logical);
        let (mut own, mut before, mut previous) = (BlockHashes::default(), 0, None);
        for (at, entry) in view.entries().enumerate() {
            let hash = entry.hash & !1;
            let target = entry.block.0;
            let is_last = at + 1 == view.count();
            let next = if is_last { u32::MAX - 1 } else { view.entry(at + 1).hash & !1 };
            let Some(block) = self.blocks.get_mut(target as usize) else {
                ctx.problem(Code::IndexBadBlock, place().num2(target));
                continue;
            };
            if hash < before {
                ctx.problem(Code::IndexOrder, place());
            }
            before = hash;
            if block.references == 0 {
                block.parent = logical;
            }
            block.references += 1;
            block.previous = previous;
            block.node = BlockHashes { min: hash, max: next };
            block.first |= at == 0;
            block.last |= is_last;
            own = BlockHashes { min: own.min.min(hash), max: own.max.max(hash) };
            previous = Some(target);
        }
        self.blocks[logical as usize].own = own;
    }

    /// Adds a name to the hashes of a leaf.
    pub fn hash(&self, name: &[u8], hashes: &mut BlockHashes) {
        if let Some(hasher) = &self.hasher {
            let hash = hasher.hash(name).hash;
            *hashes = BlockHashes { min: hashes.min.min(hash), max: hashes.max.max(hash) };
        }
    }

    /// Sets the hashes of a leaf.
    pub fn set_hashes(&mut self, logical: u32, hashes: BlockHashes) {
        if let Some(block) = self.blocks.get_mut(logical as usize) {
            block.own = hashes;
        }
    }

    /// Gives the bounds of the first and last blocks of one kind to their parents.
    fn bound_parents(&mut self, kind: Kind) {
        for at in 0..self.blocks.len() {
            let block = self.blocks[at];
            if block.kind != kind {
                continue;
            }
            let parent = block.parent as usize;
            if block.first {
                self.blocks[parent].own.min = block.own.min;
                if let Some(previous) = self.blocks[parent].previous {
                    self.blocks[previous as usize].node.max = block.own.min;
                }
            }
            if block.last {
                self.blocks[parent].own.max = block.own.max;
            }
        }
    }

    /// How many steps a block is from the root; `None` when it never gets there.
    fn depth_of(&self, at: usize) -> Option<u32> {
        let (mut at, mut depth) = (at, 0);
        while self.blocks[at].kind != Kind::Root {
            // Deeper than any tree the root may announce.
            if depth > 8 {
                return None;
            }
            at = self.blocks[at].parent as usize;
            depth += 1;
        }
        Some(depth)
    }

    /// Judges the whole index once all blocks were taken in.
    pub fn judge(mut self, ctx: &mut Context<'_, '_>, ino: u32) {
        // Hashes of the level below are its own; only then can two levels be compared.
        self.bound_parents(Kind::Leaf);
        self.bound_parents(Kind::Node);
        for (at, block) in self.blocks.iter().enumerate() {
            let place = || At::ino(ino).num(at as u64);
            if block.references == 0 {
                ctx.problem(Code::IndexUnreferenced, place());
                continue;
            }
            if block.references > 1 {
                ctx.problem(Code::IndexTwice, place());
            }
            if self.hasher.is_some() {
                if !block.first && block.own.min < block.node.min {
                    ctx.problem(Code::IndexMinHash, place());
                }
                if at != 0 && block.own.max > block.node.max {
                    ctx.problem(Code::IndexMaxHash, place());
                }
            }
            if block.kind == Kind::Leaf && self.depth_of(at) != Some(self.depth) {
                let depth = self.depth_of(at).unwrap_or(u32::MAX);
                ctx.problem(Code::IndexDepth, place().num2(depth));
            }
        }
    }
}

/// Whether a block has the form of an inner node: one unused entry over the
/// whole block, and the limit a node has.
fn looks_like_node(bytes: &[u8], csum: bool) -> bool {
    let limit = bytes.len().saturating_sub(8 + if csum { 8 } else { 0 }) / 8;
    let word = |at: usize| bytes.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let rec_len = word(4).map(|raw| uext_ondisk::dir_entry::rec_len_from_disk(raw, bytes.len()));
    bytes.get(..4) == Some(&[0; 4])
        && rec_len == Some(bytes.len())
        && bytes.get(6) == Some(&0)
        && word(8).map(usize::from) == Some(limit)
}
