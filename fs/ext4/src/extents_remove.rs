//! Extent trees: removing a range, in steps that each fit a handle.
//!
//! Ranges go from their end to their start, so that a truncation that a crash
//! interrupts leaves a shorter file behind, never one with its front missing.

use smallvec::SmallVec;
use uext_ondisk::extent::{Extent, ExtentNode};
use uext_ondisk::{Corrupt, FsBlock, LogicalBlock};

use crate::error::Result;
use crate::extents::{Level, Path, RootLeaf, make_room};
use crate::map_io::{Budget, MapIo, NodeBytes, ROOT_SIZE};

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
    if let Some(mut leaf) = RootLeaf::find(io, end - 1)? {
        let Some(cut) = cut(io, &mut leaf.node, leaf.at, (from, end), budget)? else {
            return remove_in_tree(io, from, end, budget);
        };
        if !cut.freed.is_empty() {
            leaf.store(io);
        }
        return cut.finish(io);
    }
    remove_in_tree(io, from, end, budget)
}

/// [`remove_step`] for a tree with blocks, or one that needs a block.
fn remove_in_tree(
    io: &impl MapIo,
    from: u32,
    end: u32,
    budget: &mut Budget,
) -> Result<Option<u32>> {
    let mut path = Path::find(io, end - 1)?;
    let Level { node, at, .. } = path.leaf();
    let first = node.extent(at.saturating_sub(1));
    let mut done = cut(io, node, *at, (from, end), budget)?;
    if done.is_none() {
        let first = first.map_or(end - 1, |extent| extent.logical.0);
        path = make_room(io, first, 1)?;
        let Level { node, at, .. } = path.leaf();
        done = cut(io, node, *at, (from, end), budget)?;
    }
    let Some(cut) = done else {
        return Err(io.place(Corrupt::value("extent tree", "a node did not split"), None));
    };
    if !cut.freed.is_empty() {
        finish_leaf(io, path)?;
    }
    cut.finish(io)
}

/// What was taken out of a leaf.
#[derive(Default)]
struct Cut {
    /// Blocks of the device to free.
    freed: SmallVec<[(FsBlock, u32); 4]>,
    /// Where what is still to be unmapped ends.
    left: Option<u32>,
}

impl Cut {
    /// Frees the blocks.
    fn finish(self, io: &impl MapIo) -> Result<Option<u32>> {
        for (start, len) in self.freed {
            io.free_data(start, len)?;
        }
        Ok(self.left)
    }
}

/// Takes the end of a range out of a leaf, in which `at` extents begin before the range ends.
/// Nothing is changed, and `None` given, when a hole in the middle of an extent needs room that
/// the leaf does not have.
fn cut<B: AsRef<[u8]> + AsMut<[u8]>>(
    io: &impl MapIo,
    node: &mut ExtentNode<B>,
    at: usize,
    (from, end): (u32, u32),
    budget: &mut Budget,
) -> Result<Option<Cut>> {
    let last = at.checked_sub(1).and_then(|at| node.extent(at));
    let Some(last) = last.filter(|extent| extent.end() > u64::from(from)) else {
        return Ok(Some(Cut::default()));
    };
    let parts = Parts::of(io, last, from, end, &mut budget.clone());
    if parts.head.is_some() && parts.tail.is_some() && node.is_full() {
        return Ok(None);
    }
    let first = node.logical(0).map_or(0, |logical| logical.0);
    let mut below: SmallVec<[Extent; 4]> = node.extents().take(at).collect();
    let above: SmallVec<[Extent; 4]> = node.extents().skip(at).collect();
    let (mut done, mut tail) = (Cut::default(), None);
    while let Some(extent) = below.pop() {
        if extent.end() <= u64::from(from) {
            below.push(extent);
            break;
        }
        let parts = Parts::of(io, extent, from, end, budget);
        done.freed.extend(parts.freed);
        tail = tail.or(parts.tail);
        done.left = parts.left;
        below.extend(parts.head);
        if parts.head.is_some() {
            break;
        }
    }
    if done.freed.is_empty() {
        return Ok(Some(done));
    }
    let more_below = below.is_empty() && first > from;
    rewrite(io, node, below.into_iter().chain(tail).chain(above))?;
    done.left = done.left.or(more_below.then_some(first));
    Ok(Some(done))
}

/// Replaces the extents of a leaf.
fn rewrite<B: AsRef<[u8]> + AsMut<[u8]>>(
    io: &impl MapIo,
    node: &mut ExtentNode<B>,
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
        path.levels[0].node = ExtentNode::init(NodeBytes::from_elem(0, ROOT_SIZE), 0);
    }
    path.store(io, level)?;
    // When the first entry went, the entries above name the next one.
    path.fix_keys(io, level)?;
    for block in emptied {
        io.free_node(block)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Trees against a map of single blocks, with nodes of 1 KiB so that they get deep.

    use super::*;
    use crate::extents::{MAX_BLOCKS, empty_root, insert, lookup, mark_written};
    use crate::extents_shift::{end_of_last, shift_left_step, shift_right_step, split_at};
    use crate::map_io::tests::{FIRST_NODE, MemIo};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};
    use uext_ondisk::extent::NodeLimits;
    use uext_vfs::Errno;

    fn tree() -> MemIo {
        MemIo::new(1024, empty_root())
    }

    fn extent(logical: u32, start: u64, len: u32, unwritten: bool) -> Extent {
        Extent { logical: LogicalBlock(logical), len, start: FsBlock(start), unwritten }
    }

    /// Every block of the file, checking that the tree is whole and names each node once.
    fn walk(io: &MemIo) -> BTreeMap<u32, (u64, bool)> {
        fn visit(
            io: &MemIo,
            bytes: &[u8],
            limits: &NodeLimits,
            nodes: &mut BTreeSet<u64>,
            blocks: &mut BTreeMap<u32, (u64, bool)>,
        ) {
            let node = ExtentNode::checked(bytes, limits).expect("a whole node");
            for e in node.extents() {
                for at in 0..e.len {
                    let place = (e.start.0 + u64::from(at), e.unwritten);
                    assert_eq!(blocks.insert(e.logical.0 + at, place), None);
                }
            }
            for (at, entry) in node.indexes().enumerate() {
                assert!(nodes.insert(entry.child.0), "a node is named twice");
                let child = io.read_node(entry.child).expect("a node that exists");
                visit(io, &child, &limits.child(&node, at), nodes, blocks);
            }
        }
        let (mut nodes, mut blocks) = (BTreeSet::new(), BTreeMap::new());
        visit(io, &io.root(), &io.limits(), &mut nodes, &mut blocks);
        let kept: BTreeSet<u64> = io.nodes.borrow().keys().copied().collect();
        assert_eq!(nodes, kept, "nodes that nothing names");
        blocks
    }

    fn remove_all(io: &MemIo, from: u32, end: u32, groups: usize) -> Result<()> {
        let mut rest = Some(end);
        while let Some(end) = rest {
            let next = remove_step(io, from, end, &mut Budget::new(groups))?;
            assert!(next.is_none_or(|n| n < end), "a step that goes nowhere");
            rest = next;
        }
        Ok(())
    }

    #[test]
    fn every_second_block_makes_a_deep_tree_and_removal_leaves_nothing() {
        let io = tree();
        let count = 84 * 84 * 4;
        for at in 0..count {
            insert(&io, extent(at * 2, 8 + u64::from(at) * 2, 1, false)).unwrap();
        }
        assert!(io.root()[6] >= 2, "depth {}", io.root()[6]);
        assert_eq!(walk(&io).len(), count as usize);
        remove_all(&io, 0, u32::MAX, 8).unwrap();
        assert!(io.nodes.borrow().is_empty());
        assert_eq!(io.freed.borrow().len(), count as usize);
        assert_eq!(io.root(), empty_root());
    }

    #[test]
    fn appending_leaves_full_nodes_behind() {
        let io = tree();
        for at in 0..840 {
            insert(&io, extent(at * 2, 8 + u64::from(at) * 2, 1, false)).unwrap();
        }
        assert!(io.nodes.borrow().len() <= 13, "{} nodes", io.nodes.borrow().len());
    }

    #[test]
    fn runs_that_continue_each_other_stay_one_extent() {
        let io = tree();
        for at in [0u32, 2, 1, 3] {
            insert(&io, extent(at * 10, 100 + u64::from(at) * 10, 10, false)).unwrap();
        }
        let found = lookup(&io, 5).unwrap();
        assert_eq!((found.start, found.len), (Some(FsBlock(105)), 35));
    }

    #[test]
    fn an_insert_without_room_changes_nothing() {
        let io = tree();
        for at in 0..4 {
            insert(&io, extent(at * 2, 8 + u64::from(at) * 2, 1, false)).unwrap();
        }
        let before = walk(&io);
        io.room.set(0);
        assert!(insert(&io, extent(100, 900, 1, false)).unwrap_err().is(Errno::ENOSPC));
        assert_eq!(walk(&io), before);
    }

    #[test]
    fn a_large_extent_goes_in_steps_of_few_groups() {
        let io = tree();
        insert(&io, extent(0, 8192, 32768, false)).unwrap();
        let rest = remove_step(&io, 0, u32::MAX, &mut Budget::new(1)).unwrap();
        assert_eq!(rest, Some(3 * 8192));
        remove_all(&io, 0, 3 * 8192, 1).unwrap();
        assert_eq!(io.freed.borrow().len(), 32768);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert {
            at: u32,
            len: u32,
            unwritten: bool,
        },
        Remove {
            from: u32,
            len: u32,
            groups: usize,
        },
        Write {
            from: u32,
            len: u32,
        },
        /// What follows moves to the front, over what the range held.
        TakeOut {
            from: u32,
            len: u32,
        },
        /// What follows moves to the end.
        PutIn {
            from: u32,
            len: u32,
        },
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            6 => (0u32..3000, 1u32..6, any::<bool>())
                .prop_map(|(at, len, unwritten)| Op::Insert { at, len, unwritten }),
            1 => (0u32..3000, 1u32..400, 1usize..4)
                .prop_map(|(from, len, groups)| Op::Remove { from, len, groups }),
            1 => (0u32..3000, 1u32..60).prop_map(|(from, len)| Op::Write { from, len }),
            1 => (0u32..3000, 1u32..90).prop_map(|(from, len)| Op::TakeOut { from, len }),
            1 => (0u32..3000, 1u32..90).prop_map(|(from, len)| Op::PutIn { from, len }),
        ];
        prop::collection::vec(op, 1..900)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_tree_maps_what_a_map_of_blocks_maps(ops in ops()) {
            let io = tree();
            let mut model: BTreeMap<u32, (u64, bool)> = BTreeMap::new();
            let mut next = 8u64;
            for op in ops {
                match op {
                    Op::Insert { at, len, unwritten } => {
                        if (at..at + len).any(|b| model.contains_key(&b)) {
                            continue;
                        }
                        // Now and then the run continues the one before on the device too.
                        let before = at.checked_sub(1).and_then(|b| model.get(&b));
                        let start = before.map_or(next, |(block, _)| block + 1);
                        let taken = |s: u64| model.values().any(|(b, _)| (s..s + u64::from(len)).contains(b));
                        let start = if taken(start) { next } else { start };
                        next = next.max(start + u64::from(len)) + u64::from(at % 3) * 4000;
                        insert(&io, extent(at, start, len, unwritten)).unwrap();
                        for index in 0..len {
                            model.insert(at + index, (start + u64::from(index), unwritten));
                        }
                    }
                    Op::Remove { from, len, groups } => {
                        remove_all(&io, from, from + len, groups).unwrap();
                        let gone: Vec<u32> = model.range(from..from + len).map(|(b, _)| *b).collect();
                        for block in gone {
                            let (place, _) = model.remove(&block).unwrap();
                            prop_assert!(io.freed.borrow_mut().remove(&place));
                        }
                        prop_assert!(io.freed.borrow().is_empty(), "freed what is still mapped");
                    }
                    Op::Write { from, len } => {
                        let end = (from..from + len).find(|b| !model.contains_key(b)).unwrap_or(from + len);
                        if end > from {
                            mark_written(&io, from, end).unwrap();
                            model.range_mut(from..end).for_each(|(_, place)| place.1 = false);
                        }
                    }
                    Op::TakeOut { from, len } => {
                        remove_all(&io, from, from + len, 8).unwrap();
                        io.freed.borrow_mut().clear();
                        let mut moved = model.split_off(&from).into_iter();
                        model.extend(
                            moved.by_ref().filter(|(b, _)| *b >= from + len).map(|(b, p)| (b - len, p)),
                        );
                        let mut next = Some(from + len);
                        while let Some(at) = next {
                            next = shift_left_step(&io, at, len).unwrap();
                            walk(&io);
                        }
                    }
                    Op::PutIn { from, len } => {
                        split_at(&io, from).unwrap();
                        let moved = model.split_off(&from);
                        let last = moved.last_key_value().map_or(0, |(b, _)| u64::from(*b) + 1);
                        prop_assert!(last == 0 || end_of_last(&io).unwrap() == last);
                        model.extend(moved.into_iter().map(|(b, p)| (b + len, p)));
                        let mut rest = Some(MAX_BLOCKS);
                        while let Some(end) = rest {
                            rest = shift_right_step(&io, from, end, len).unwrap();
                            walk(&io);
                        }
                    }
                }
            }
            prop_assert_eq!(&walk(&io), &model);
            for block in (0..3100).step_by(7) {
                let found = lookup(&io, block).unwrap();
                prop_assert_eq!(found.start.map(|s| s.0), model.get(&block).map(|p| p.0));
                if found.start.is_none() {
                    prop_assert_eq!(model.range(block..block.saturating_add(found.len)).next(), None);
                }
            }
            remove_all(&io, 0, u32::MAX, 2).unwrap();
            prop_assert!(io.nodes.borrow().is_empty());
            prop_assert!(io.next_node.get() >= FIRST_NODE);
        }
    }
}
