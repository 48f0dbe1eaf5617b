//! Extent trees: moving all that lies behind a block to other places in the file.
//!
//! Nothing is allocated or freed on the device, and no node is needed but the one that
//! splitting an extent at the block may take. Each step changes one leaf and the keys that
//! lead to it, so that the tree is whole after every one: towards the front the leaves go
//! from the first to the last, into a hole; towards the end from the last to the first.

use uext_ondisk::extent::Extent;
use uext_ondisk::{Corrupt, LogicalBlock};

use crate::error::Result;
use crate::extents::{Level, MAX_BLOCKS, Path, make_room};
use crate::map_io::MapIo;

/// Moves the extents of one leaf that begin at `from` or later `by` blocks to the front, where
/// nothing is mapped. Returns where the next leaf begins, `None` after the last.
pub(crate) fn shift_left_step(io: &impl MapIo, from: u32, by: u32) -> Result<Option<u32>> {
    let mut path = Path::find(io, from)?;
    let next = (path.limit < MAX_BLOCKS).then_some(path.limit);
    let node = &mut path.leaf().node;
    let begin = begin_of(node.extents(), from);
    if begin == node.len() {
        return Ok(next);
    }
    for at in begin..node.len() {
        let moved = node.logical(at).and_then(|logical| logical.0.checked_sub(by));
        let Some(moved) = moved else { return Err(out_of_place(io, from)) };
        node.set_logical(at, LogicalBlock(moved));
    }
    // What was one extent before something was put in between may be one again.
    if let Some(before) = begin.checked_sub(1)
        && let (Some(one), Some(other)) = (node.extent(before), node.extent(begin))
        && one.can_merge(&other)
    {
        node.set_extent(before, Extent { len: one.len + other.len, ..one });
        node.remove(begin..begin + 1);
    }
    path.store_leaf(io)?;
    Ok(next)
}

/// Moves the extents of the leaf that maps the end of `from..end` and begin in that range `by`
/// blocks to the end. Returns where the rest of the range ends, `None` when nothing is left.
pub(crate) fn shift_right_step(
    io: &impl MapIo,
    from: u32,
    end: u32,
    by: u32,
) -> Result<Option<u32>> {
    if from >= end {
        return Ok(None);
    }
    let mut path = Path::find(io, end - 1)?;
    let Level { node, at, .. } = path.leaf();
    let (begin, stop) = (begin_of(node.extents(), from), *at);
    if begin >= stop {
        return Ok(None);
    }
    let first = node.logical(begin).map_or(0, |logical| logical.0);
    for at in begin..stop {
        let moved = node.logical(at).and_then(|logical| logical.0.checked_add(by));
        let Some(moved) = moved else { return Err(out_of_place(io, from)) };
        node.set_logical(at, LogicalBlock(moved));
    }
    path.store_leaf(io)?;
    Ok((begin == 0 && first > from).then_some(first))
}

/// Splits the extent that holds `logical` and begins before it, so that one begins there.
///
/// # Errors
/// `ENOSPC` for a node that could not be allocated; nothing is changed then.
pub(crate) fn split_at(io: &impl MapIo, logical: u32) -> Result<()> {
    let mut path = Path::find(io, logical)?;
    let Level { node, at, .. } = path.leaf();
    let found = at.checked_sub(1).and_then(|at| node.extent(at));
    let Some(extent) = found.filter(|e| e.logical.0 < logical && e.end() > logical.into()) else {
        return Ok(());
    };
    let mut path = make_room(io, logical, 1)?;
    let Level { node, at, .. } = path.leaf();
    let len = logical - extent.logical.0;
    let tail = Extent {
        logical: LogicalBlock(logical),
        len: extent.len - len,
        start: extent.start + u64::from(len),
        ..extent
    };
    let Some(before) = at.checked_sub(1) else { return Err(out_of_place(io, logical)) };
    node.set_extent(before, Extent { len, ..extent });
    let place = *at;
    node.insert_extent(place, tail).map_err(|_| out_of_place(io, logical))?;
    path.store_leaf(io)
}

/// The end of the last extent, 0 when there is none.
pub(crate) fn end_of_last(io: &impl MapIo) -> Result<u64> {
    let mut path = Path::find(io, MAX_BLOCKS - 1)?;
    Ok(path.leaf().node.extents().next_back().map_or(0, |extent| extent.end()))
}

/// How many extents of a leaf begin before a block.
fn begin_of(extents: impl Iterator<Item = Extent>, from: u32) -> usize {
    extents.take_while(|extent| extent.logical.0 < from).count()
}

fn out_of_place(io: &impl MapIo, logical: u32) -> crate::error::Error {
    let corrupt = Corrupt::value("extent tree", "an extent is out of place");
    io.place(corrupt.at_logical(LogicalBlock(logical)), None)
}
