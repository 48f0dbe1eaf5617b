//! Superblock, descriptors, inodes, bitmaps, extents, block maps and features.

use zerocopy::FromBytes;

use crate::extent::{Extent, ExtentNode, NodeLimits};
use crate::features::Features;
use crate::group_desc::GroupDesc;
use crate::indirect::{Pointers, block_path};
use crate::inode::{Inode, Timestamp};
use crate::superblock::{ErrorRecord, RawSuperblock, State, Superblock};
use crate::units::{FsBlock, GroupNumber, InodeNumber, LogicalBlock};
use crate::{bitmap, geometry};

/// Parses a superblock as it is and with magic and checksum repaired; then all geometry and
/// all edits of what parses.
pub fn fuzz_superblock(data: &[u8]) {
    let _ = Superblock::parse(data);
    let Ok((raw, _)) = RawSuperblock::read_from_prefix(data) else { return };
    let Ok(mut sb) = Superblock::from_raw(raw) else { return };
    walk_geometry(&sb);
    edit_superblock(&mut sb);
    let sealed = sb.sealed_bytes().to_vec();
    if sb.raw().s_magic.get() == crate::superblock::MAGIC {
        let again = Superblock::parse(&sealed).expect("what was sealed parses");
        assert_eq!(again.features(), sb.features());
        assert_eq!(again.blocks_count(), sb.blocks_count());
    }
    let _ = sb.set_features(Features::from_bits(!0, !0, !0));
    let _ = sb.sealed_copy(GroupNumber(u32::MAX));
}

/// Asks every geometry question about the first, some middle and the last group.
fn walk_geometry(sb: &Superblock) {
    let last = sb.groups_count() - 1;
    for group in [0, 1, 3, last / 2, last.saturating_sub(1), last].map(GroupNumber) {
        if group.0 > last {
            continue;
        }
        let first = sb.group_first_block(group);
        assert_eq!(sb.group_and_offset(first), Some((group, 0)));
        let blocks = sb.blocks_in_group(group);
        assert!((1..=sb.blocks_per_group()).contains(&blocks));
        assert!(sb.is_fs_range(first, u64::from(blocks)));
        assert!(sb.clusters_in_group(group) <= sb.clusters_per_group());
        let (n, offset) = sb.descriptor_at(group);
        assert!(n < sb.gdt_blocks() && offset < sb.block_size());
        let _ = (sb.descriptor_block(n), sb.descriptor_backup_block(n, group));
        let _ = (sb.has_super(group), sb.base_meta_blocks(group));
        let inode = sb.inode_number(group, sb.inodes_per_group() - 1);
        let at = sb.inode_location(inode).expect("the group's last inode exists");
        assert_eq!((at.group, at.index), (group, sb.inodes_per_group() - 1));
        assert!(at.table_block < sb.inode_table_blocks());
        assert!(at.offset + u32::from(sb.inode_size()) <= sb.block_size());
    }
    assert_eq!(sb.group_of_block(FsBlock(sb.blocks_count())), None);
    assert_eq!(sb.inode_location(InodeNumber(0)), None);
    let _ = (sb.free_blocks_count(), sb.reserved_blocks_count(), sb.want_extra_isize());
    let _ = (sb.label(), sb.last_mounted(), sb.mount_opts(), sb.first_error(), sb.last_error());
    let _ = (sb.journal_backup_blocks(), sb.journal_backup_size(), sb.log_groups_per_flex());
    let _ = geometry::backup_places(1 << 40, 4);
}

fn edit_superblock(sb: &mut Superblock) {
    sb.set_free_blocks_count(u64::MAX);
    sb.set_free_inodes_count(u32::MAX);
    sb.set_state(State::VALID);
    sb.set_mount_time(u64::MAX);
    sb.set_last_orphan(Some(InodeNumber(12)));
    sb.set_label(b"a label that is longer than sixteen bytes");
    sb.set_journal_backup([7; 15], 1 << 40);
    let func = "a function with a name of more than thirty-two bytes".to_owned();
    sb.record_error(&ErrorRecord { time: 1 << 33, func, ..ErrorRecord::default() });
    sb.clear_errors();
    sb.set_needs_recovery(true);
}

/// The superblock the other bodies lean on: 4 KiB blocks, 1 GiB, today's ext4.
pub fn sample_superblock() -> Superblock {
    let mut raw = RawSuperblock::zeroed();
    raw.s_magic = crate::superblock::MAGIC.into();
    raw.s_rev_level = 1.into();
    raw.s_log_block_size = 2.into();
    raw.s_log_cluster_size = 2.into();
    raw.s_blocks_per_group = 32768.into();
    raw.s_clusters_per_group = 32768.into();
    raw.s_inodes_per_group = 8192.into();
    raw.s_blocks_count_lo = (262_144 - 100).into();
    raw.s_inodes_count = 65536.into();
    raw.s_first_ino = 11.into();
    raw.s_inode_size = 256.into();
    raw.s_desc_size = 64.into();
    raw.s_reserved_gdt_blocks = 127.into();
    raw.s_log_groups_per_flex = 4;
    raw.s_checksum_type = 1;
    raw.s_min_extra_isize = 32.into();
    raw.s_want_extra_isize = 32.into();
    raw.s_uuid = *b"0123456789abcdef";
    let list = "has_journal,ext_attr,resize_inode,dir_index,orphan_file,filetype,extent,64bit,\
                flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
    let features: Features = list.parse().expect("known features");
    raw.s_feature_compat = features.compat.bits().into();
    raw.s_feature_incompat = features.incompat.bits().into();
    raw.s_feature_ro_compat = features.ro_compat.bits().into();
    Superblock::from_raw(raw).expect("a valid superblock")
}

/// Checks and edits a descriptor.
pub fn fuzz_group_desc(data: &[u8]) {
    let sb = sample_superblock();
    let group = GroupNumber(3);
    let Ok(desc) = GroupDesc::new(data) else { return };
    let _ = desc.verify(sb.desc_checksum(), group);
    let _ = desc.check(&sb, group);
    let _ = desc.verify_block_bitmap(&sb, group, data);
    let _ = desc.verify_inode_bitmap(&sb, group, data);
    let mut bytes = data.to_vec();
    let mut desc = GroupDesc::new(&mut bytes[..]).expect("the length was enough");
    desc.set_free_blocks_count(0xFFFF);
    desc.set_block_bitmap(FsBlock(0xFFFF_FFFF));
    desc.seal_block_bitmap(&sb, data);
    desc.seal_inode_bitmap(&sb, data);
    desc.seal(sb.desc_checksum(), group);
    assert!(desc.verify(sb.desc_checksum(), group).is_ok());
    assert!(desc.verify_block_bitmap(&sb, group, data).is_ok());
    assert!(desc.verify_inode_bitmap(&sb, group, data).is_ok());
    assert_eq!((desc.free_blocks_count(), desc.block_bitmap().0), (0xFFFF, 0xFFFF_FFFF));
}

/// Reads every field of an inode, edits it, and checks that the edits read back.
pub fn fuzz_inode(data: &[u8]) {
    let sb = sample_superblock();
    let number = InodeNumber(12);
    let Ok(inode) = Inode::new(data) else { return };
    let _ = inode.verify(&sb, number);
    let _ = inode.check_extra_isize();
    let _ = (inode.file_type(), inode.uid(), inode.gid(), inode.size(sb.features()));
    let _ = (inode.sectors(sb.features(), sb.block_size()), inode.file_acl(sb.features()));
    let _ = (inode.atime(), inode.ctime(), inode.mtime(), inode.crtime(), inode.device());
    let _ = (inode.version(), inode.project(), inode.xattr_area().len());
    let mut bytes = data.to_vec();
    let mut inode = Inode::new(&mut bytes[..]).expect("the length was enough");
    let time = Timestamp { secs: 5_000_000_000, nanos: 7 };
    let small = inode.extra_isize() < 12;
    inode.set_mtime(time);
    assert_eq!(inode.mtime(), if small { Timestamp::MAX_SMALL } else { time });
    inode.set_crtime(time);
    let _ = inode.set_sectors(u64::MAX, sb.features(), sb.block_size());
    inode.set_size(u64::MAX);
    inode.xattr_area_mut().fill(1);
    inode.seal(&sb, number);
    assert!(inode.verify(&sb, number).is_ok());
}

/// Checks a node, searches it, and edits it at the place the last byte says.
pub fn fuzz_extent(data: &[u8]) {
    let sb = sample_superblock();
    let limits = NodeLimits::root(&sb);
    let Ok(node) = ExtentNode::new(data) else { return };
    let valid = node.check(&limits).is_ok();
    let _ = (node.verify(1), node.extents().count(), node.indexes().count());
    let want = LogicalBlock(u32::from(data[data.len() - 1]) << 3);
    let found = node.search(want);
    if valid && let Some(extent) = found.and_then(|at| node.extent(at)) {
        assert!(extent.logical <= want);
    }
    let mut bytes = data.to_vec();
    let mut node = ExtentNode::new(&mut bytes[..]).expect("the header was good");
    let before = node.len();
    let extent = Extent { logical: want, len: 1, start: FsBlock(100), unwritten: true };
    if node.is_leaf() {
        let at = found.map_or(0, |at| at + 1);
        if node.insert_extent(at, extent).is_ok() {
            assert_eq!(node.extent(at), Some(extent));
            node.remove(at..at + 1);
        }
    }
    assert_eq!(node.len(), before);
    node.remove(0..before / 2);
    let mut other = ExtentNode::init(vec![0; 4096], node.depth());
    let _ = node.move_tail(0, &mut other);
    other.seal(9);
    assert!(other.verify(9).is_ok());
}

/// Walks the pointers of a block and the paths its words name.
pub fn fuzz_indirect(data: &[u8]) {
    let sb = sample_superblock();
    let Ok(map) = Pointers::new(data) else { return };
    let _ = map.check(0, &sb);
    let _ = (map.iter().count(), map.is_all_holes());
    let mut at = 0;
    while at < map.len() {
        let run = map.run(at, usize::MAX);
        assert!(run > 0 && at + run <= map.len());
        at += run;
    }
    for (_, block) in map.iter().take(16) {
        for block_size in [1024, 4096, 65536] {
            if let Some(path) = block_path(LogicalBlock(block.0 as u32), block_size) {
                assert!(path.offsets()[1..].iter().all(|&offset| offset < block_size / 4));
            }
        }
    }
}

/// Searches and edits a bitmap; the first bytes say where.
pub fn fuzz_bitmap(data: &[u8]) {
    let Some((head, map)) = data.split_first_chunk::<4>() else { return };
    let start = u32::from(u16::from_le_bytes([head[0], head[1]]));
    let end = u32::from(u16::from_le_bytes([head[2], head[3]]));
    let zeros: u32 = bitmap::zero_runs(map, 0, end).map(|run| run.len).sum();
    assert_eq!(zeros, bitmap::count_zero(map, end));
    if let Some(bit) = bitmap::find_next_zero(map, start, end) {
        assert!((start..end).contains(&bit) && !bitmap::test(map, bit));
        let mut copy = map.to_vec();
        assert!(!bitmap::set(&mut copy, bit));
        assert_ne!(bitmap::find_next_zero(&copy, start, end), Some(bit));
    }
    let _ = bitmap::find_prev_zero(map, start, end);
    let _ = bitmap::find_zero_run(map, start, end, 9);
}

/// Parses a feature list; what parses prints and parses back to the same.
pub fn fuzz_features(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(features) = text.parse::<Features>() {
        assert_eq!(features.to_string().parse::<Features>(), Ok(features));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::run_seeded;

    #[test]
    fn superblock_body_survives_noise() {
        let bytes = sample_superblock().sealed_bytes().to_vec();
        run_seeded(fuzz_superblock, &bytes, 1, 20_000);
    }

    #[test]
    fn group_desc_body_survives_noise() {
        let sample: Vec<u8> = (0..64).collect();
        run_seeded(fuzz_group_desc, &sample, 2, 2_000);
        run_seeded(fuzz_group_desc, &sample[..32], 3, 2_000);
    }

    #[test]
    fn inode_body_survives_noise() {
        let mut bytes = vec![0; 256];
        Inode::new(&mut bytes[..]).unwrap().init(32);
        run_seeded(fuzz_inode, &bytes, 4, 5_000);
        run_seeded(fuzz_inode, &bytes[..128], 5, 5_000);
    }

    #[test]
    fn extent_body_survives_noise() {
        let mut node = ExtentNode::init(vec![0u8; 1024], 0);
        for at in 0..40u32 {
            let start = FsBlock(u64::from(at) * 77 + 5000);
            let extent =
                Extent { logical: LogicalBlock(at * 9), len: 5, start, unwritten: at % 3 == 0 };
            node.insert_extent(at as usize, extent).unwrap();
        }
        run_seeded(fuzz_extent, node.bytes(), 6, 5_000);
        run_seeded(fuzz_extent, &node.bytes()[..60], 7, 5_000);
        node.set_depth(2);
        run_seeded(fuzz_extent, node.bytes(), 8, 5_000);
    }

    #[test]
    fn indirect_body_survives_noise() {
        let sample: Vec<u8> = (0..1024u32).flat_map(|at| (at + 3000).to_le_bytes()).collect();
        run_seeded(fuzz_indirect, &sample, 9, 500);
        run_seeded(fuzz_indirect, &sample[..60], 10, 2_000);
    }

    #[test]
    fn bitmap_body_survives_noise() {
        run_seeded(
            fuzz_bitmap,
            &[0, 0, 255, 3, 0, 0, 255, 255, 255, 255, 255, 255, 255, 1, 0],
            11,
            5_000,
        );
    }

    #[test]
    fn features_body_survives_noise() {
        run_seeded(fuzz_features, b"has_journal,^extent,none,FEATURE_C5,uninit_bg", 12, 5_000);
    }
}
