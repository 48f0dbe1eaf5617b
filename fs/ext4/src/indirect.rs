//! The block map of ext2 and ext3: finding, mapping and removing.
//!
//! Source: Documentation/filesystems/ext4/blockmap.rst.
//!
//! Invariants: pointer blocks on the way to a block are allocated before any of a run's
//! pointers is set, so a run is mapped whole or not at all; a pointer block whose last
//! pointer goes is freed with it.
//!
//! Locks: `Inode::map`, shared to look, exclusive to change.

use smallvec::SmallVec;
use uext_ondisk::indirect::{
    BlockPath, DIRECT_BLOCKS, Pointers, block_path, indirect_spans, pointers_per_block,
};
use uext_ondisk::{Corrupt, FsBlock, LogicalBlock};
use uext_vfs::Errno;

use crate::error::{Error, Result};
use crate::map_blocks::Mapping;
use crate::map_io::{Budget, MapIo, NodeBytes, ROOT_SIZE};

fn pointers<B: AsRef<[u8]>>(io: &impl MapIo, bytes: B) -> Result<Pointers<B>> {
    Pointers::new(bytes).map_err(|c| io.place(c, None))
}

/// The way to a block of the file, `EFBIG` past what the map reaches.
fn path_to(io: &impl MapIo, logical: u32) -> Result<BlockPath> {
    block_path(LogicalBlock(logical), io.block_size()).ok_or(Error::Errno(Errno::EFBIG))
}

/// Blocks of the file below one pointer that has `below` levels of pointer blocks under it.
fn span(io: &impl MapIo, below: usize) -> u64 {
    u64::from(pointers_per_block(io.block_size())).saturating_pow(below as u32)
}

/// The first block of the file below the pointer that `path` goes by at `step`.
fn span_start(io: &impl MapIo, logical: u32, path: &BlockPath, step: usize) -> u64 {
    let below = path.depth() - step;
    if path.depth() == 0 {
        return logical.into();
    }
    let (root_start, _) = indirect_spans(io.block_size())[path.depth() - 1];
    let inside = u64::from(logical) - root_start;
    root_start + inside / span(io, below) * span(io, below)
}

/// Where the blocks from `logical` on lie, at most `max` and as far as one pointer block goes.
pub(crate) fn lookup(io: &impl MapIo, logical: u32, max: u32) -> Result<Mapping> {
    let Some(path) = block_path(LogicalBlock(logical), io.block_size()) else {
        return Ok(Mapping::hole(max));
    };
    let mut bytes = NodeBytes::from_slice(&io.root());
    for (step, &offset) in path.offsets().iter().enumerate() {
        let node = pointers(io, &bytes[..])?;
        let at = offset as usize;
        let Some(block) = node.get(at) else {
            let below = path.depth() - step;
            if below == 0 {
                let limit = max.min(path.blocks_to_boundary().saturating_add(1));
                let len = node.run(at, limit as usize);
                return Ok(Mapping::hole(u32::try_from(len).unwrap_or(max)));
            }
            let end = span_start(io, logical, &path, step).saturating_add(span(io, below));
            let len = u32::try_from(end - u64::from(logical)).unwrap_or(u32::MAX);
            return Ok(Mapping::hole(len.min(max)));
        };
        if step == path.depth() {
            let limit = max.min(path.blocks_to_boundary().saturating_add(1));
            let len = u32::try_from(node.run(at, limit as usize)).unwrap_or(1);
            io.check_run(block, len)?;
            return Ok(Mapping { start: Some(block), len, unwritten: false });
        }
        bytes = io.read_node(block)?;
    }
    Ok(Mapping::hole(1))
}

/// Where to look for blocks for `logical`: after the block before it, else near the pointers.
pub(crate) fn goal(io: &impl MapIo, logical: u32) -> Result<Option<FsBlock>> {
    if let Some(before) = logical.checked_sub(1)
        && let Some(start) = lookup(io, before, 1)?.start
    {
        return Ok(Some(start + 1));
    }
    let Some(path) = block_path(LogicalBlock(logical), io.block_size()) else { return Ok(None) };
    let mut bytes = NodeBytes::from_slice(&io.root());
    let mut goal = None;
    for &offset in path.offsets() {
        let node = pointers(io, &bytes[..])?;
        let before = (0..offset as usize).rev().take(64).find_map(|at| node.get(at));
        goal = before.map(|block| block + 1).or(goal);
        let Some(block) = node.get(offset as usize) else { break };
        goal = goal.or(Some(block));
        bytes = io.read_node(block)?;
    }
    Ok(goal)
}

/// Maps a hole to a run of blocks that are the caller's.
///
/// # Errors
/// `ENOSPC` for a pointer block that could not be allocated, `EFBIG` past what the map
/// reaches; nothing is mapped then.
pub(crate) fn insert(io: &impl MapIo, logical: u32, start: FsBlock, len: u32) -> Result<()> {
    let end = logical.checked_add(len).ok_or(Error::Errno(Errno::EFBIG))?;
    if u32::try_from(start.0 + u64::from(len)).is_err() {
        return Err(Error::Errno(Errno::EFBIG));
    }
    // First the way to every part of the run, then its pointers.
    let mut parts: SmallVec<[(BlockPath, u32, u32); 4]> = SmallVec::new();
    let mut at = logical;
    while at < end {
        let path = path_to(io, at)?;
        let here = (end - at).min(path.blocks_to_boundary().saturating_add(1));
        parts.push((path, at, here));
        at += here;
    }
    let mut near = start;
    for (path, ..) in &parts {
        near = make_way(io, path, near)?;
    }
    for (path, at, here) in parts {
        set_run(io, &path, start + u64::from(at - logical), here)?;
    }
    Ok(())
}

/// Allocates the pointer blocks on the way that are not there.
fn make_way(io: &impl MapIo, path: &BlockPath, near: FsBlock) -> Result<FsBlock> {
    let mut near = near;
    let mut parent: Option<FsBlock> = None;
    let mut bytes = NodeBytes::from_slice(&io.root());
    for &offset in &path.offsets()[..path.depth()] {
        let at = offset as usize;
        let found = pointers(io, &bytes[..])?.get(at);
        let block = match found {
            Some(block) => block,
            None => {
                let block = io.alloc_node(near)?;
                if u32::try_from(block.0).is_err() {
                    io.free_node(block)?;
                    return Err(Error::Errno(Errno::ENOSPC));
                }
                io.create_node(block, &mut NodeBytes::from_elem(0, io.block_size() as usize))?;
                pointers(io, &mut bytes[..])?.set(at, Some(block));
                store(io, parent, &mut bytes)?;
                near = block + 1;
                block
            }
        };
        bytes = io.read_node(block)?;
        parent = Some(block);
    }
    Ok(near)
}

/// Sets the pointers of a run in the last node of a path that is there.
fn set_run(io: &impl MapIo, path: &BlockPath, start: FsBlock, len: u32) -> Result<()> {
    let (mut bytes, block) = last_node(io, path)?
        .ok_or_else(|| io.place(Corrupt::value("block map", "changed while it was read"), None))?;
    let first = path.offsets()[path.depth()] as usize;
    let mut node = pointers(io, &mut bytes[..])?;
    for index in 0..len {
        let at = first + index as usize;
        if node.get(at).is_some() {
            let corrupt = Corrupt::value("block map", "a block is in the way");
            return Err(io.place(corrupt, block));
        }
        node.set(at, Some(start + u64::from(index)));
    }
    store(io, block, &mut bytes)
}

fn store(io: &impl MapIo, block: Option<FsBlock>, bytes: &mut [u8]) -> Result<()> {
    match block {
        Some(block) => io.write_node(block, bytes),
        None => {
            let mut root = [0; ROOT_SIZE];
            root.copy_from_slice(bytes);
            io.set_root(&root);
            Ok(())
        }
    }
}

/// The node that holds a path's last pointer and where it lies, `None` when the way is not
/// there.
#[allow(clippy::type_complexity, reason = "a node and its place")]
fn last_node(io: &impl MapIo, path: &BlockPath) -> Result<Option<(NodeBytes, Option<FsBlock>)>> {
    let mut bytes = NodeBytes::from_slice(&io.root());
    let mut block = None;
    for &offset in &path.offsets()[..path.depth()] {
        let Some(child) = pointers(io, &bytes[..])?.get(offset as usize) else { return Ok(None) };
        bytes = io.read_node(child)?;
        block = Some(child);
    }
    Ok(Some((bytes, block)))
}

/// Unmaps the end of `from..end` and frees its blocks, as much as one pointer block holds and the
/// budget allows. Returns where the rest ends, `None` when nothing is left.
pub(crate) fn remove_step(
    io: &impl MapIo,
    from: u32,
    end: u32,
    budget: &mut Budget,
) -> Result<Option<u32>> {
    if from >= end {
        return Ok(None);
    }
    let Some(path) = block_path(LogicalBlock(end - 1), io.block_size()) else {
        // Past the end of the map nothing is mapped.
        let reach = indirect_spans(io.block_size())[2];
        let reach = u32::try_from(reach.0.saturating_add(reach.1)).unwrap_or(u32::MAX);
        return Ok((reach > from && reach < end).then_some(reach));
    };
    let mut levels: Vec<(Option<FsBlock>, NodeBytes)> =
        vec![(None, NodeBytes::from_slice(&io.root()))];
    for (step, &offset) in path.offsets()[..path.depth()].iter().enumerate() {
        let (_, bytes) = &levels[step];
        let node = pointers(io, &bytes[..])?;
        let Some(child) = node.get(offset as usize) else {
            // A hole as wide as the pointer: skip to the last pointer before it in this node.
            let start = span_start(io, end - 1, &path, step);
            let below = path.depth() - step;
            let lowest = if step == 0 { offset as usize } else { 0 };
            let holes = (lowest..offset as usize).rev().take_while(|&at| node.get(at).is_none());
            let skip = span(io, below).saturating_mul(holes.count() as u64);
            let rest = u32::try_from(start.saturating_sub(skip)).unwrap_or(0);
            return Ok((rest > from).then_some(rest));
        };
        let bytes = io.read_node(child)?;
        levels.push((Some(child), bytes));
    }
    let offset = path.offsets()[path.depth()];
    // How many blocks of the range lie in this node, up to the path's own.
    let count = (end - from).min(offset + 1);
    let (left, freed) = clear_run(io, &mut levels, offset as usize, count, budget)?;
    if !freed.is_empty() {
        store_cleared(io, &path, levels)?;
        for (start, len) in freed {
            io.free_data(start, len)?;
        }
    }
    let rest = end - (count - left);
    Ok((rest > from).then_some(rest))
}

/// Clears `count` pointers of the last node, from `last` downwards. Returns how many are left
/// when the budget ended, and the runs to free.
#[allow(clippy::type_complexity, reason = "a count and runs")]
fn clear_run(
    io: &impl MapIo,
    levels: &mut [(Option<FsBlock>, NodeBytes)],
    last: usize,
    count: u32,
    budget: &mut Budget,
) -> Result<(u32, Vec<(FsBlock, u32)>)> {
    let mut freed: Vec<(FsBlock, u32)> = Vec::new();
    let Some((_, bytes)) = levels.last_mut() else { return Ok((0, freed)) };
    let mut node = pointers(io, &mut bytes[..])?;
    for done in 0..count {
        let at = last - done as usize;
        let Some(block) = node.get(at) else { continue };
        io.check_run(block, 1)?;
        if budget.take(io, block, 1) == 0 {
            return Ok((count - done, freed));
        }
        node.set(at, None);
        match freed.last_mut() {
            Some((start, len)) if block.0 + 1 == start.0 => (*start, *len) = (block, *len + 1),
            _ => freed.push((block, 1)),
        }
    }
    Ok((0, freed))
}

/// Writes the nodes of a path whose last one lost pointers; those left empty are freed.
fn store_cleared(
    io: &impl MapIo,
    path: &BlockPath,
    mut levels: Vec<(Option<FsBlock>, NodeBytes)>,
) -> Result<()> {
    let mut emptied = Vec::new();
    while let Some((block, mut bytes)) = levels.pop() {
        let is_empty = pointers(io, &bytes[..])?.is_all_holes();
        let above = levels.len();
        match (block, levels.last_mut()) {
            (Some(block), Some((_, parent))) if is_empty => {
                let at = path.offsets()[above - 1] as usize;
                pointers(io, &mut parent[..])?.set(at, None);
                emptied.push(block);
            }
            _ => {
                store(io, block, &mut bytes)?;
                break;
            }
        }
    }
    for block in emptied {
        io.free_node(block)?;
    }
    Ok(())
}

/// Most pointer blocks that mapping every block of a range can need.
pub(crate) fn nodes_needed(from: u32, end: u32, block_size: u32) -> u64 {
    let per_block = u64::from(pointers_per_block(block_size));
    let (from, end) = (u64::from(from), u64::from(end));
    if from >= end || end <= u64::from(DIRECT_BLOCKS) {
        return 0;
    }
    let mut total = 0u64;
    for (level, (start, len)) in (1u32..).zip(indirect_spans(block_size)) {
        let first = from.max(start);
        let stop = end.min(start.saturating_add(len));
        if first >= stop {
            continue;
        }
        for height in 1..=level {
            let span = per_block.saturating_pow(height);
            let (low, high) = ((first - start) / span, (stop - 1 - start) / span);
            total += high - low + 1;
        }
    }
    total
}

#[cfg(test)]
type Blocks = std::collections::BTreeSet<u64>;

/// Every data block and every pointer block a map names.
#[cfg(test)]
pub(crate) fn all_blocks(io: &impl MapIo) -> Result<(Blocks, Blocks)> {
    fn walk(
        io: &impl MapIo,
        block: FsBlock,
        below: usize,
        found: &mut (Blocks, Blocks),
    ) -> Result<()> {
        if below == 0 {
            assert!(found.0.insert(block.0), "a block is mapped twice");
            return Ok(());
        }
        assert!(found.1.insert(block.0), "a node is used twice");
        let bytes = io.read_node(block)?;
        for (_, child) in pointers(io, &bytes[..])?.iter() {
            walk(io, child, below - 1, found)?;
        }
        Ok(())
    }
    let mut found = (Blocks::new(), Blocks::new());
    let root = io.root();
    for (at, block) in pointers(io, &root[..])?.iter() {
        walk(io, block, at.saturating_sub(DIRECT_BLOCKS as usize - 1), &mut found)?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map_io::tests::MemIo;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn remove_all(io: &MemIo, from: u32, end: u32) {
        let mut rest = Some(end);
        while let Some(end) = rest {
            let next = remove_step(io, from, end, &mut Budget::new(4)).unwrap();
            assert!(next.is_none_or(|n| n < end), "a step that goes nowhere");
            rest = next;
        }
    }

    fn check_nodes(io: &MemIo) -> usize {
        let (data, nodes) = all_blocks(io).unwrap();
        let kept: Blocks = io.nodes.borrow().keys().copied().collect();
        assert_eq!(nodes, kept, "pointer blocks that nothing names");
        data.len()
    }

    #[test]
    fn a_run_across_all_levels_is_found_and_removed() {
        let io = MemIo::new(1024, [0; ROOT_SIZE]);
        // Direct, single, double and into triple indirect blocks.
        let starts = [0u32, 10, 266, 12 + 256 + 65536 - 3];
        for (index, &at) in starts.iter().enumerate() {
            insert(&io, at, FsBlock(100 + 1000 * index as u64), 6).unwrap();
        }
        for (index, &at) in starts.iter().enumerate() {
            for block in 0..6 {
                let found = lookup(&io, at + block, 1).unwrap();
                assert_eq!(
                    found.start,
                    Some(FsBlock(100 + 1000 * index as u64 + u64::from(block)))
                );
            }
        }
        assert_eq!(check_nodes(&io), 24);
        remove_all(&io, 0, u32::MAX);
        assert!(io.nodes.borrow().is_empty());
        assert_eq!(io.freed.borrow().len(), 24);
        assert_eq!(io.root(), [0; ROOT_SIZE]);
    }

    #[test]
    fn a_run_past_the_map_is_refused() {
        let io = MemIo::new(1024, [0; ROOT_SIZE]);
        let reach = 12 + 256 + 65536 + 16_777_216;
        assert!(insert(&io, reach - 1, FsBlock(100), 2).unwrap_err().is(Errno::EFBIG));
        assert!(io.nodes.borrow().is_empty());
    }

    #[test]
    fn an_insert_without_room_maps_nothing() {
        let io = MemIo::new(1024, [0; ROOT_SIZE]);
        io.room.set(1);
        // The second part needs two pointer blocks.
        assert!(insert(&io, 266, FsBlock(100), 4).unwrap_err().is(Errno::ENOSPC));
        assert_eq!(lookup(&io, 266, 4).unwrap().start, None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_map_maps_what_a_map_of_blocks_maps(
            ops in prop::collection::vec((0u32..5, 0u32..700, 1u32..30, any::<bool>()), 1..120)
        ) {
            let io = MemIo::new(1024, [0; ROOT_SIZE]);
            let mut model: BTreeMap<u32, u64> = BTreeMap::new();
            let mut next = 100u64;
            for (region, at, len, add) in ops {
                let at = at + region * 33_000;
                if add {
                    if (at..at + len).any(|b| model.contains_key(&b)) {
                        continue;
                    }
                    insert(&io, at, FsBlock(next), len).unwrap();
                    model.extend((0..len).map(|i| (at + i, next + u64::from(i))));
                    next += u64::from(len) + 3;
                } else {
                    let end = at + len * 20;
                    remove_all(&io, at, end);
                    let gone: Vec<u32> = model.range(at..end).map(|(b, _)| *b).collect();
                    for block in gone {
                        prop_assert!(io.freed.borrow_mut().remove(&model.remove(&block).unwrap()));
                    }
                    prop_assert!(io.freed.borrow().is_empty());
                }
            }
            prop_assert_eq!(check_nodes(&io), model.len());
            for (&block, &place) in &model {
                prop_assert_eq!(lookup(&io, block, 1).unwrap().start, Some(FsBlock(place)));
            }
            for block in (0..140_000).step_by(61) {
                let found = lookup(&io, block, 5000).unwrap();
                if found.start.is_none() {
                    prop_assert_eq!(model.range(block..block + found.len).next(), None);
                }
            }
        }
    }
}
