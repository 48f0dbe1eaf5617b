//! Extent trees: removing a range, in steps that each fit a handle.
//!
//! Ranges go from their end to their start, so that a truncation that a crash
//! interrupts leaves a shorter file behind, never one with its front missing.

use uext_ondisk::extent::{Extent, ExtentNode};
use uext_ondisk::{Corrupt, FsBlock, LogicalBlock};

use crate::error::Result;
use crate::extents::{Level, Path, make_room};
use crate::map_io::{Budget, MapIo, ROOT_SIZE};

/// Unmaps the end of `from..end` and frees its blocks, as much as one leaf holds and the budget
/// allows. Returns where the rest ends, `None` when nothing is left.
///
/// # Errors
/// `ENOSPC` when a hole in the middle of an extent needs a node; nothing is unmapped then.
pub(crate) fn remove_step(
    io: &impl MapIo,
    from: u32,
    end: u32,
    budget: &mut Budget,
) -> Result<Option<u32>> {
    if from >= end {
        return Ok(None);
    }
    let mut path = Path::find(io, end - 1)?;
    let last = {
        let Level { node, at, .. } = path.leaf();
        at.checked_sub(1).and_then(|at| node.extent(at))
    };
    let Some(last) = last.filter(|extent| extent.end() > u64::from(from)) else {
        return Ok(None);
    };
    let parts = Parts::of(io, last, from, end, &mut budget.clone());
    if parts.head.is_some() && parts.tail.is_some() {
        path = make_room(io, last.logical.0, 1)?;
    }
    let Level { node, at, .. } = path.leaf();
    let first = last_logical(node, 0);
    let mut below: Vec<Extent> = node.extents().take(*at).collect();
    let above: Vec<Extent> = node.extents().skip(*at).collect();
    let (mut freed, mut tail, mut left) = (Vec::new(), None, None);
    while let Some(extent) = below.pop_if(|extent| extent.end() > u64::from(from)) {
        let parts = Parts::of(io, extent, from, end, budget);
        freed.extend(parts.freed);
        tail = tail.or(parts.tail);
        left = parts.left;
        below.extend(parts.head);
        if parts.head.is_some() {
            break;
        }
    }
    if freed.is_empty() {
        return Ok(left);
    }
    let more_below = below.is_empty() && first > from;
    rewrite(io, node, below.into_iter().chain(tail).chain(above))?;
    finish_leaf(io, path)?;
    for (start, len) in freed {
        io.free_data(start, len)?;
    }
    Ok(left.or(more_below.then_some(first)))
}

fn last_logical(node: &ExtentNode<Vec<u8>>, at: usize) -> u32 {
    node.logical(at).map_or(0, |logical| logical.0)
}

/// Replaces the extents of a leaf.
fn rewrite(
    io: &impl MapIo,
    node: &mut ExtentNode<Vec<u8>>,
    extents: impl Iterator<Item = Extent>,
) -> Result<()> {
    node.remove(0..node.len());
    for (at, extent) in extents.enumerate() {
        node.insert_extent(at, extent)
            .map_err(|_| io.place(Corrupt::value("extent tree", "a node did not split"), None))?;
    }
    Ok(())
}

/// What becomes of an extent that a range overlaps.
struct Parts {
    /// Blocks of the device to free.
    freed: Option<(FsBlock, u32)>,
    /// What stays before them.
    head: Option<Extent>,
    /// What stays after them.
    tail: Option<Extent>,
    /// When the budget ended: where what is still to be freed ends.
    left: Option<u32>,
}

impl Parts {
    fn of(io: &impl MapIo, extent: Extent, from: u32, end: u32, budget: &mut Budget) -> Self {
        let sub = |from: u64, to: u64| {
            let len = u32::try_from(to.saturating_sub(from)).unwrap_or(0);
            let first = u32::try_from(from).unwrap_or(u32::MAX);
            let start = extent.start + from.saturating_sub(extent.logical.0.into());
            (len > 0).then_some(Extent { logical: LogicalBlock(first), len, start, ..extent })
        };
        let first = u64::from(extent.logical.0.max(from));
        let stop = extent.end().min(u64::from(end));
        let (start, len) = sub(first, stop).map_or((extent.start, 0), |cut| (cut.start, cut.len));
        let taken = budget.take(io, start, len);
        if taken == 0 {
            // The whole extent stays, for another handle.
            let left = u32::try_from(stop).ok();
            return Self { freed: None, head: Some(extent), tail: None, left };
        }
        let kept = len - taken;
        let cut = first + u64::from(kept);
        Self {
            freed: Some((start + u64::from(kept), taken)),
            head: sub(extent.logical.0.into(), cut),
            tail: sub(stop, extent.end()),
            left: (kept > 0).then(|| u32::try_from(cut).unwrap_or(u32::MAX)),
        }
    }
}

/// Writes a leaf that lost extents; one that is empty goes, with the nodes above that it
/// leaves empty.
fn finish_leaf(io: &impl MapIo, mut path: Path) -> Result<()> {
    let mut level = path.levels.len() - 1;
    let mut emptied = Vec::new();
    while path.levels[level].node.is_empty() && level > 0 {
        emptied.extend(path.levels[level].block);
        level -= 1;
        let Level { node, at, .. } = &mut path.levels[level];
        node.remove(*at..*at + 1);
    }
    if level == 0 && path.levels[0].node.is_empty() {
        path.levels[0].node = ExtentNode::init(vec![0; ROOT_SIZE], 0);
    }
    path.store(io, level)?;
    // When the first entry went, the entries above name the next one.
    path.fix_keys(io, level)?;
    for block in emptied {
        io.free_node(block)?;
    }
    Ok(())
}
