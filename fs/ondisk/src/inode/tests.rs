//! Fields, times and checksums of inodes of several sizes.

use super::*;
use proptest::prelude::*;

fn features(list: &str) -> Features {
    list.parse().unwrap()
}

/// The table of the format's documentation: the extra bits move the 32-bit range up.
#[test]
fn timestamps_decode_as_the_documentation_lists() {
    let at = |secs: u32, epoch| Timestamp::decode(secs, epoch).secs;
    assert_eq!(at(0x8000_0000, 0), -0x8000_0000);
    assert_eq!(at(0x7FFF_FFFF, 0), 0x7FFF_FFFF);
    assert_eq!(at(0x8000_0000, 1), 0x8000_0000);
    assert_eq!(at(0x7FFF_FFFF, 1), 0x1_7FFF_FFFF);
    assert_eq!(at(0x8000_0000, 3), 0x2_8000_0000);
    assert_eq!(at(0x7FFF_FFFF, 3), 0x3_7FFF_FFFF);
    assert_eq!(Timestamp::MAX.secs, 0x3_7FFF_FFFF);
}

#[test]
fn a_time_out_of_range_becomes_the_nearest() {
    let far = Timestamp { secs: i64::MAX, nanos: 3 };
    let (secs, extra) = far.encode();
    assert_eq!(Timestamp::decode(secs, extra), Timestamp::MAX);
    let before = Timestamp { secs: i64::MIN, nanos: 3 };
    let (secs, extra) = before.encode();
    assert_eq!(Timestamp::decode(secs, extra), Timestamp::MIN);
    assert_eq!(far.encode_small(), 0x7FFF_FFFF);
}

#[test]
fn a_small_inode_has_no_creation_time_and_a_short_checksum() {
    let mut bytes = [0u8; 128];
    let mut inode = Inode::new(&mut bytes[..]).unwrap();
    inode.set_crtime(Timestamp { secs: 5, nanos: 5 });
    inode.set_mtime(Timestamp { secs: 5, nanos: 5 });
    assert_eq!((inode.crtime(), inode.mtime()), (None, Timestamp { secs: 5, nanos: 0 }));
    assert!(inode.computed_checksum(1, InodeNumber(12)) <= 0xFFFF);
    assert!(inode.xattr_area().is_empty());
}

#[test]
fn fields_past_extra_isize_are_not_touched() {
    let mut bytes = [0xEEu8; 256];
    let mut inode = Inode::new(&mut bytes[..]).unwrap();
    inode.raw_extra_mut().unwrap().i_extra_isize = 8.into();
    inode.set_ctime(Timestamp { secs: 1, nanos: 1 });
    inode.set_mtime(Timestamp { secs: 1, nanos: 1 });
    inode.set_project(9);
    inode.set_checksum(0x1234_5678);
    assert_eq!((inode.ctime().nanos, inode.mtime().nanos, inode.project()), (1, 0, 0));
    assert_eq!(inode.checksum(), 0x1234_5678);
    assert!(bytes[0x88..].iter().all(|&byte| byte == 0xEE));
}

#[test]
fn impossible_extra_isize_is_refused_and_harmless() {
    let mut bytes = [0u8; 256];
    for (extra, good) in [(0, true), (32, true), (128, true), (30, false), (132, false)] {
        bytes[0x80..0x82].copy_from_slice(&u16::to_le_bytes(extra));
        let inode = Inode::new(&bytes[..]).unwrap();
        assert_eq!(inode.check_extra_isize().is_ok(), good, "{extra}");
        let _ = (inode.xattr_area(), inode.crtime());
    }
}

#[test]
fn blocks_change_their_unit_only_when_they_must() {
    let mut bytes = [0u8; 256];
    let mut inode = Inode::new(&mut bytes[..]).unwrap();
    let (small, huge) = (features("extent"), features("huge_file"));
    assert_eq!(inode.set_sectors(1 << 32, small, 4096), None);
    assert_eq!(inode.set_sectors(1 << 32, huge, 4096), Some(()));
    assert_eq!((inode.sectors(huge, 4096), inode.sectors(small, 4096)), (1 << 32, 0));
    assert_eq!(inode.set_sectors(1 << 48, huge, 4096), Some(()));
    assert!(inode.flags().contains(InodeFlags::HUGE_FILE));
    assert_eq!(inode.sectors(huge, 4096), 1 << 48);
    assert_eq!(inode.set_sectors(8, huge, 4096), Some(()));
    assert!(!inode.flags().contains(InodeFlags::HUGE_FILE));
}

#[test]
fn a_directory_uses_the_high_size_only_with_large_dir() {
    let mut bytes = [0u8; 128];
    let mut inode = Inode::new(&mut bytes[..]).unwrap();
    inode.set_mode(0o040755);
    inode.set_size(1 << 33 | 4096);
    assert_eq!(inode.size(features("extent")), 4096);
    assert_eq!(inode.size(features("large_dir")), 1 << 33 | 4096);
    inode.set_mode(0o100644);
    assert_eq!(inode.size(features("extent")), 1 << 33 | 4096);
}

proptest! {
    #[test]
    fn times_in_range_survive(secs in Timestamp::MIN.secs..=Timestamp::MAX.secs, nanos in 0u32..1_000_000_000) {
        let time = Timestamp { secs, nanos };
        let (low, extra) = time.encode();
        prop_assert_eq!(Timestamp::decode(low, extra), time);
    }

    #[test]
    fn what_is_set_reads_back(uid: u32, gid: u32, size: u64, version: u64, links: u16,
            major in 0u32..4096, minor in 0u32..1 << 20, acl in 0u64..1 << 48, small: bool) {
        let mut bytes = vec![0u8; if small { 128 } else { 512 }];
        let mut inode = Inode::new(&mut bytes[..]).unwrap();
        inode.init(32);
        inode.set_uid(uid);
        inode.set_gid(gid);
        inode.set_mode(0o100600);
        inode.set_size(size);
        inode.set_version(version);
        inode.set_links_count(links);
        inode.set_device(DeviceNumber { major, minor });
        inode.set_file_acl(FsBlock(acl));
        let features = features("64bit,extent");
        prop_assert_eq!((inode.uid(), inode.gid(), inode.size(features)), (uid, gid, size));
        prop_assert_eq!(inode.version(), if small { version & 0xFFFF_FFFF } else { version });
        prop_assert_eq!(inode.links_count(), links);
        prop_assert_eq!(inode.device(), DeviceNumber { major, minor });
        prop_assert_eq!(inode.file_acl(features), FsBlock(acl));
        prop_assert_eq!(inode.file_type(), Some(FileType::Regular));
    }

    #[test]
    fn the_checksum_of_a_copy_is_that_of_the_pieces(
        bytes in proptest::collection::vec(any::<u8>(), 256),
        small: bool, extra in 0u16..40, seed: u32,
    ) {
        let mut bytes = if small { bytes[..128].to_vec() } else { bytes };
        if let Some(field) = bytes.get_mut(0x80..0x82) {
            field.copy_from_slice(&extra.to_le_bytes());
        }
        let inode = Inode::new(&bytes[..]).unwrap();
        let short = if inode.has_checksum_hi() { u32::MAX } else { 0xFFFF };
        prop_assert_eq!(inode.seeded_checksum(seed), inode.checksum_in_pieces(seed) & short);
    }

    #[test]
    fn any_changed_bit_changes_the_checksum(mut bytes in proptest::collection::vec(any::<u8>(), 256), bit in 0usize..2048) {
        bytes[0x80..0x82].copy_from_slice(&32u16.to_le_bytes());
        let mut inode = Inode::new(&mut bytes[..]).unwrap();
        let csum = inode.computed_checksum(7, InodeNumber(12));
        inode.set_checksum(csum);
        prop_assert_eq!(inode.checksum(), csum);
        let changed = bit / 8;
        prop_assume!(!(0x80..0x82).contains(&changed));
        inode.bytes_mut()[changed] ^= 1 << (bit % 8);
        prop_assert_ne!(inode.checksum(), inode.computed_checksum(7, InodeNumber(12)));
    }
}
