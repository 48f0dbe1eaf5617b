//! The reverse map: who maps a frame.
//!
//! A frame almost always has one mapping, which is stored in place; only a
//! shared frame pays for a vector. An owner is held weakly, so a frame never
//! keeps an address space alive.
//!
//! Locks: a frame's map has its own mutex, innermost of all: nothing else is
//! taken under it. Owners are called after it is released.

use std::sync::Weak;

/// Something that maps frames: an address space or a buffer cache.
pub(crate) trait FrameOwner: Send + Sync {
    /// Drops its mapping at `key` when that is clean and unused.
    /// Returns whether the mapping is gone.
    fn try_evict(&self, key: u64) -> bool;
}

/// One mapping of a frame.
#[derive(Clone)]
pub(crate) struct Mapping {
    /// Who maps it.
    pub(crate) owner: Weak<dyn FrameOwner>,
    /// Where: a page index, or the number of a group of blocks.
    pub(crate) key: u64,
}

impl Mapping {
    fn is(&self, other: &Mapping) -> bool {
        self.key == other.key && std::ptr::addr_eq(self.owner.as_ptr(), other.owner.as_ptr())
    }
}

/// All mappings of one frame.
#[derive(Clone, Default)]
pub(crate) enum Rmap {
    /// Not mapped.
    #[default]
    None,
    /// The usual case.
    One(Mapping),
    /// A shared frame.
    Many(Vec<Mapping>),
}

impl Rmap {
    /// Adds a mapping.
    pub(crate) fn add(&mut self, mapping: Mapping) {
        *self = match std::mem::take(self) {
            Self::None => Self::One(mapping),
            Self::One(first) => Self::Many(vec![first, mapping]),
            Self::Many(mut all) => {
                all.push(mapping);
                Self::Many(all)
            }
        };
    }

    /// Removes a mapping, when it is there; once, when it is there twice: while a page is
    /// taken out of its file, the frame may be mapped at the same place again.
    pub(crate) fn remove(&mut self, mapping: &Mapping) {
        *self = match std::mem::take(self) {
            Self::One(one) if !one.is(mapping) => Self::One(one),
            Self::None | Self::One(_) => Self::None,
            Self::Many(mut all) => {
                if let Some(at) = all.iter().position(|m| m.is(mapping)) {
                    all.remove(at);
                }
                match all.len() {
                    0 => Self::None,
                    1 => all.pop().map_or(Self::None, Self::One),
                    _ => Self::Many(all),
                }
            }
        };
    }

    /// The mappings.
    pub(crate) fn as_slice(&self) -> &[Mapping] {
        match self {
            Self::None => &[],
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(all) => all,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    struct Nobody;
    impl FrameOwner for Nobody {
        fn try_evict(&self, _key: u64) -> bool {
            false
        }
    }

    fn keys(rmap: &Rmap) -> Vec<u64> {
        rmap.as_slice().iter().map(|m| m.key).collect()
    }

    #[test]
    fn one_mapping_needs_no_list_and_a_removed_one_is_gone() {
        // `Weak::new` has no dyn form, so real owners are made; they are zero-sized
        // and would share an address, hence the distinct keys.
        let owner: Arc<dyn FrameOwner> = Arc::new(Nobody);
        let at = |key| Mapping { owner: Arc::downgrade(&owner), key };
        let mut rmap = Rmap::default();

        rmap.add(at(1));
        assert!(matches!(rmap, Rmap::One(_)));
        rmap.add(at(2));
        rmap.add(at(3));
        assert_eq!(keys(&rmap), [1, 2, 3]);
        rmap.remove(&at(2));
        rmap.remove(&at(9));
        assert_eq!(keys(&rmap), [1, 3]);
        rmap.remove(&at(1));
        assert!(matches!(rmap, Rmap::One(_)));
        rmap.remove(&at(9));
        assert_eq!(keys(&rmap), [3]);
        rmap.remove(&at(3));
        assert!(rmap.as_slice().is_empty());
    }

    /// Truncate took a page out of its file and had not unmapped the frame yet when a
    /// reader mapped it there again from a file that shares it; then both mappings went,
    /// and reclaim never saw the frame again. (Found by the model of shared frames.)
    #[test]
    fn a_mapping_made_again_before_the_old_one_went_stays() {
        let owner: Arc<dyn FrameOwner> = Arc::new(Nobody);
        let at = |key| Mapping { owner: Arc::downgrade(&owner), key };
        let mut rmap = Rmap::default();
        [1, 2, 1].into_iter().for_each(|key| rmap.add(at(key)));
        rmap.remove(&at(1));
        assert_eq!(keys(&rmap), [2, 1]);
    }
}
