//! Directories and their index, attributes and ACLs.

use crate::acl::Acl;
use crate::dir_entry::{DirBlock, DirBlockMut, DirFormat, FileType};
use crate::dirhash::{DirHasher, HashVersion};
use crate::htree::{DxBlock, DxBlockMut, convert_to_index, leaf_map, split_leaf};
use crate::units::{FsBlock, InodeNumber, LogicalBlock};
use crate::xattr::{NameIndex, OwnedValue, XattrArea, XattrSet, set_block_checksum};

/// Splits the first byte off as switches.
fn switches(data: &[u8]) -> Option<(u8, &[u8])> {
    data.split_first().map(|(&first, rest)| (first, rest))
}

fn format(switches: u8) -> DirFormat {
    let inodes_count = if switches & 4 == 0 { u32::MAX } else { 1000 };
    DirFormat { filetype: switches & 1 == 0, csum: switches & 2 == 0, inodes_count }
}

fn sound_names(block: &[u8], format: DirFormat) -> Option<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in DirBlock::new(block, format).entries() {
        let entry = entry.ok()?;
        if entry.in_use() {
            names.push(entry.name.to_vec());
        }
    }
    names.sort();
    Some(names)
}

/// Walks a linear block; on one that is sound, inserts, removes and checks that
/// the other entries stay.
pub fn fuzz_dir_entry(data: &[u8]) {
    let Some((switches, bytes)) = switches(data) else { return };
    let format = format(switches);
    let view = DirBlock::new(bytes, format);
    assert!(view.entries().count() <= bytes.len() / 12 + 1);
    let _ = (view.verify_checksum(1), view.find(b"name"));
    let Some(names) = sound_names(bytes, format) else { return };
    if bytes.len() < 64 || !bytes.len().is_multiple_of(4) {
        return;
    }
    let mut copy = bytes.to_vec();
    let mut block = DirBlockMut::new(&mut copy, format);
    if let Ok(Some(offset)) = block.insert(b"inserted", InodeNumber(12), FileType::Regular) {
        block.set_target(offset, InodeNumber(13), FileType::Directory).expect("it was inserted");
        block.remove(offset).expect("it was inserted");
    }
    let _ = block.set_checksum(1);
    assert_eq!(sound_names(&copy, format), Some(names));
}

/// Reads index blocks, and edits those that are sound.
pub fn fuzz_htree(data: &[u8]) {
    let Some((switches, bytes)) = switches(data) else { return };
    let csum = switches & 2 == 0;
    let hash = u32::from(switches) << 24;
    if let Ok((root, _)) = DxBlock::root(bytes, csum) {
        let _ = (root.entry(root.lookup(hash)), root.verify_checksum(1));
        let mut copy = bytes.to_vec();
        let mut new = vec![0; bytes.len()];
        if let Ok(mut root) = DxBlockMut::root(&mut copy, csum) {
            let at = root.view().lookup(hash);
            let _ = root.insert_after(at, hash, LogicalBlock(1));
            let _ = root.push_level(&mut new, LogicalBlock(2));
            root.set_checksum(1);
        }
    }
    if let Ok(node) = DxBlock::node(bytes, csum) {
        let _ = (node.entry(node.lookup(hash)), node.verify_checksum(1), node.entries().count());
        let mut copy = bytes.to_vec();
        let mut new = vec![0; bytes.len()];
        if let Ok(mut node) = DxBlockMut::node(&mut copy, csum) {
            let _ = node.split_into(&mut new);
            node.set_checksum(1);
        }
    }
    fuzz_leaf(switches, bytes);
}

/// Splits a block as a leaf and turns it into an index: no name may get lost.
fn fuzz_leaf(switches: u8, bytes: &[u8]) {
    let format = format(switches);
    let Ok(version) = HashVersion::from_raw(switches >> 5, switches & 8 == 0) else { return };
    let hasher = DirHasher { version, seed: [1, 2, 3, u32::from(switches)] };
    if bytes.len() < 256 || !bytes.len().is_multiple_of(4) {
        return;
    }
    let _ = leaf_map(DirBlock::new(bytes, format), &hasher);
    let Some(names) = sound_names(bytes, format) else { return };
    let (mut leaf, mut new) = (bytes.to_vec(), vec![0; bytes.len()]);
    if split_leaf(&mut leaf, &mut new, format, &hasher).is_ok() {
        let parts = [&leaf, &new].map(|part| sound_names(part, format).expect("a leaf is sound"));
        let mut both = parts.concat();
        both.sort();
        assert_eq!(both, names);
    }
    let (mut root, mut leaf) = (bytes.to_vec(), vec![0; bytes.len()]);
    if convert_to_index(&mut root, &mut leaf, LogicalBlock(1), format, version).is_ok() {
        assert!(DxBlock::root(&root, format.csum).is_ok());
        assert_eq!(sound_names(&leaf, format).map(|kept| kept.len() + 2), Some(names.len()));
    }
}

/// Hashes any name by any function.
pub fn fuzz_dirhash(data: &[u8]) {
    let Some((switches, name)) = switches(data) else { return };
    let Ok(version) = HashVersion::from_raw(switches & 7, switches & 8 != 0) else { return };
    let name = &name[..name.len().min(255)];
    let hash = DirHasher { version, seed: [0, 0, 0, u32::from(switches >> 4)] }.hash(name);
    assert_eq!(hash.hash & 1, 0);
    assert_ne!(hash.hash, u32::MAX - 1);
}

/// Reads attributes of both areas; what can be read survives a rewrite.
pub fn fuzz_xattr(data: &[u8]) {
    if let Ok(Some(area)) = XattrArea::ibody(data) {
        let set = exercise(area);
        let mut copy = data.to_vec();
        if set.write_ibody(&mut copy).is_ok() && !set.is_empty() {
            let again = XattrArea::ibody(&copy).ok().flatten().expect("what was written parses");
            assert_eq!(XattrSet::from(again), set);
        }
    }
    if let Ok(area) = XattrArea::block(data) {
        let _ = area.verify_checksum(1, FsBlock(2));
        let set = exercise(area);
        let mut copy = data.to_vec();
        if set.write_block(&mut copy, 1).is_ok() {
            let again = XattrArea::block(&copy).expect("what was written parses");
            assert_eq!(again.entries().count(), set.entries().len());
            assert_eq!(again.check_overlap(), Ok(()));
        }
        let _ = set_block_checksum(&mut copy, 1, FsBlock(2));
    }
}

fn exercise(area: XattrArea<'_>) -> XattrSet {
    let _ = (area.check_overlap(), area.get(NameIndex::USER, b"a"), area.header().is_some());
    let mut set = XattrSet::from(area);
    let _ = set.set(NameIndex::USER, b"fuzz", OwnedValue::Inline(vec![1, 2, 3]));
    let _ = set.remove(NameIndex::USER, b"a");
    set
}

/// Reads both forms of an ACL; what is valid survives both.
pub fn fuzz_acl(data: &[u8]) {
    let forms = [Acl::from_disk(data).ok(), Acl::from_xattr(data).ok().flatten()];
    for acl in forms.into_iter().flatten() {
        let _ = acl.mode();
        assert_eq!(Acl::from_disk(&acl.to_disk()), Ok(acl.clone()));
        assert_eq!(Acl::from_xattr(&acl.to_xattr()), Ok(Some(acl)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::run_seeded;

    fn linear_block() -> Vec<u8> {
        let mut bytes = vec![0; 1025];
        let mut block = DirBlockMut::new(&mut bytes[1..], format(0));
        block.init_dot(InodeNumber(12), InodeNumber(2));
        for number in 0..30 {
            let name = format!("file-{number}");
            let _ = block.insert(name.as_bytes(), InodeNumber(13), FileType::Regular);
        }
        bytes
    }

    #[test]
    fn directories_survive_any_bytes() {
        let sample = linear_block();
        run_seeded(fuzz_dir_entry, &sample, 1, 3000);
        run_seeded(fuzz_htree, &sample, 2, 3000);
        run_seeded(fuzz_dirhash, b"\x09a name of some length", 3, 2000);
        let mut root = sample;
        let (block, mut leaf) = (&mut root[1..], vec![0; 1024]);
        let version = HashVersion::from_raw(1, false).expect("half MD4 is known");
        convert_to_index(block, &mut leaf, LogicalBlock(1), format(0), version)
            .expect("the block is full of names");
        run_seeded(fuzz_htree, &root, 4, 3000);
    }

    #[test]
    fn attributes_and_acls_survive_any_bytes() {
        let mut set = XattrSet::new();
        for name in ["a", "bb", "ccc"] {
            let value = OwnedValue::Inline(vec![7; name.len() * 5]);
            set.set(NameIndex::USER, name.as_bytes(), value).expect("the name is short");
        }
        let mut block = vec![0; 256];
        set.write_block(&mut block, 1).expect("they fit");
        run_seeded(fuzz_xattr, &block, 5, 5000);
        let mut body = vec![0; 128];
        set.write_ibody(&mut body).expect("they fit");
        run_seeded(fuzz_xattr, &body, 6, 5000);
        let acl = Acl::from_mode(0o754);
        run_seeded(fuzz_acl, &acl.to_disk(), 7, 3000);
        run_seeded(fuzz_acl, &acl.to_xattr(), 8, 3000);
    }
}
