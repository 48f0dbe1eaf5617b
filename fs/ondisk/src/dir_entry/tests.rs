//! Blocks that are searched and changed, against a map and a walk by entries.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const FORMAT: DirFormat = DirFormat { filetype: true, csum: true, inodes_count: 1000 };

fn names(block: &[u8], format: DirFormat) -> BTreeMap<Vec<u8>, u32> {
    DirBlock::new(block, format)
        .entries()
        .map(|entry| entry.expect("the block is sound"))
        .filter(DirEntry::in_use)
        .map(|entry| (entry.name.to_vec(), entry.inode.0))
        .collect()
}

#[test]
fn rec_len_covers_blocks_of_64_kib() {
    for (len, block, raw) in [(12, 4096, 12), (4096, 4096, 4096), (65536, 65536, 65535)] {
        assert_eq!(rec_len_to_disk(len, block), raw);
        assert_eq!(rec_len_from_disk(raw, block), len);
    }
    for len in (12..=65536).step_by(4) {
        assert_eq!(rec_len_from_disk(rec_len_to_disk(len, 65536), 65536), len);
    }
}

#[test]
fn a_new_directory_has_dot_and_dot_dot_and_a_good_checksum() {
    let mut bytes = vec![0xFF; 1024];
    let mut block = DirBlockMut::new(&mut bytes, FORMAT);
    block.init_dot(InodeNumber(12), InodeNumber(2));
    block.set_checksum(7).unwrap();
    assert_eq!(block.view().verify_checksum(7), Ok(()));
    assert_eq!(block.view().verify_checksum(8).unwrap_err().kind, CorruptKind::Checksum);
    let expected = BTreeMap::from([(b".".to_vec(), 12), (b"..".to_vec(), 2)]);
    assert_eq!(names(&bytes, FORMAT), expected);
}

#[test]
fn a_block_without_a_tail_keeps_its_last_bytes() {
    let mut bytes = vec![0x11; 1024];
    let mut block = DirBlockMut::new(&mut bytes, FORMAT);
    assert_eq!(block.set_checksum(7).unwrap_err().kind, CorruptKind::Magic);
    assert!(bytes.iter().all(|&byte| byte == 0x11));
}

#[test]
fn an_entry_may_not_leave_a_gap_too_small_for_another() {
    let format = DirFormat { csum: false, ..FORMAT };
    let mut bytes = vec![0; 64];
    DirBlockMut::new(&mut bytes, format).init_empty();
    bytes[4..6].copy_from_slice(&56u16.to_le_bytes());
    let error = DirBlock::new(&bytes, format).entries().next().unwrap().unwrap_err();
    assert!(error.detail.contains("leaves 8 bytes"), "{error}");
}

#[derive(Clone, Debug)]
enum Step {
    Insert(Vec<u8>, u32),
    Remove(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = prop::collection::vec(any::<u8>(), 1..40);
    let insert = (name, 1u32..1000).prop_map(|(name, inode)| Step::Insert(name, inode));
    let remove = any::<usize>().prop_map(Step::Remove);
    prop::collection::vec(prop_oneof![3 => insert, 1 => remove], 0..120)
}

/// What [`DirBlock::search`] promises, by the entries one by one.
fn search_by_entries<'a>(block: DirBlock<'a>, name: &[u8], room: usize) -> Result<Search<'a>> {
    let mut room_at = None;
    for entry in block.entries() {
        let entry = entry?;
        if entry.in_use() && entry.name == name {
            return Ok(Search { found: Some(entry), room_at });
        }
        room_at = room_at.or_else(|| (entry.free_space() >= room).then_some(entry.offset));
    }
    Ok(Search { found: None, room_at })
}

proptest! {
    #[test]
    fn a_search_is_a_walk_by_entries(
        steps in steps(), damage: Option<(usize, u8)>, room in 12usize..300, csum: bool,
    ) {
        let format = DirFormat { csum, ..FORMAT };
        let mut bytes = vec![0; 1024];
        let mut block = DirBlockMut::new(&mut bytes, format);
        block.init_empty();
        let mut all = vec![b"none".to_vec()];
        for (at, step) in steps.into_iter().enumerate() {
            let Step::Insert(name, inode) = step else { continue };
            let place = block.insert(&name, InodeNumber(inode), FileType::Regular).unwrap();
            if let Some(offset) = place.filter(|_| at % 3 == 0) {
                block.remove(offset).unwrap();
            }
            all.push(name);
        }
        if let Some((at, value)) = damage {
            bytes[at % 1024] = value;
        }
        let block = DirBlock::new(&bytes, format);
        for name in all {
            let wanted = search_by_entries(block, &name, room);
            prop_assert_eq!(block.search(&name, room), wanted.clone());
            prop_assert_eq!(block.find(&name), wanted.map(|search| search.found));
        }
        let nowhere = search_by_entries(block, b"", room);
        prop_assume!(!nowhere.as_ref().is_ok_and(|search| search.found.is_some()));
        prop_assert_eq!(block.find_room(room), nowhere.map(|search| search.room_at));
    }

    #[test]
    fn a_block_behaves_like_a_map(steps in steps(), csum: bool, filetype: bool) {
        let format = DirFormat { csum, filetype, ..FORMAT };
        let mut bytes = vec![0xEE; 1024];
        let mut model = BTreeMap::new();
        let mut block = DirBlockMut::new(&mut bytes, format);
        block.init_empty();
        for step in steps {
            match step {
                Step::Insert(name, inode) if !model.contains_key(&name) => {
                    let number = InodeNumber(inode);
                    if block.insert(&name, number, FileType::Regular).unwrap().is_some() {
                        model.insert(name, inode);
                    }
                }
                Step::Remove(pick) if !model.is_empty() => {
                    let name = model.keys().nth(pick % model.len()).unwrap().clone();
                    let offset = block.view().find(&name).unwrap().unwrap().offset;
                    block.remove(offset).unwrap();
                    model.remove(&name);
                }
                _ => {}
            }
        }
        block.set_checksum(3).unwrap();
        prop_assert!(!csum || block.view().verify_checksum(3).is_ok());
        prop_assert_eq!(names(&bytes, format), model);
    }

    #[test]
    fn any_bytes_are_walked_within_bounds(
        bytes in prop::collection::vec(any::<u8>(), 0..200), csum: bool,
    ) {
        let format = DirFormat { csum, ..FORMAT };
        let count = DirBlock::new(&bytes, format).entries().count();
        prop_assert!(count <= bytes.len() / MIN_ENTRY + 1);
    }
}
