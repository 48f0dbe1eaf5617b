//! Refusals, seals and records of the superblock.

use super::*;
use crate::error::Result;
use crate::fuzzing::sample_superblock;

type Edit = fn(&mut RawSuperblock);

/// The sample with one edit, sealed, parsed again.
fn parse_with(edit: impl FnOnce(&mut RawSuperblock)) -> Result<Superblock> {
    let mut sb = sample_superblock();
    edit(sb.raw_mut());
    let bytes = sb.sealed_bytes().to_vec();
    Superblock::parse(&bytes)
}

fn refusal(edit: impl FnOnce(&mut RawSuperblock)) -> String {
    parse_with(edit).unwrap_err().to_string()
}

#[test]
fn a_refusal_says_what_was_found() {
    let magic = refusal(|raw| raw.s_magic = 0x1234.into());
    assert_eq!(magic, "superblock: magic is 0x1234, not 0xef53");
    let rev = refusal(|raw| raw.s_rev_level = 7.into());
    assert_eq!(rev, "superblock: s_rev_level 7 is newer than 1");
    let short = Superblock::parse(&[0; 100]).unwrap_err();
    assert_eq!(short.to_string(), "superblock: 100 bytes, 1024 needed");
}

#[test]
fn every_field_out_of_range_is_refused() {
    let edits: &[(&str, Edit)] = &[
        ("s_log_block_size", |raw| raw.s_log_block_size = 7.into()),
        ("s_log_cluster_size", |raw| raw.s_log_cluster_size = 4.into()),
        ("s_inode_size", |raw| raw.s_inode_size = 300.into()),
        ("s_inode_size", |raw| raw.s_inode_size = 8192.into()),
        ("s_inode_size", |raw| raw.s_inode_size = 64.into()),
        ("s_first_ino", |raw| raw.s_first_ino = 10.into()),
        ("s_desc_size", |raw| raw.s_desc_size = 32.into()),
        ("s_desc_size", |raw| raw.s_desc_size = 96.into()),
        ("s_desc_size", |raw| raw.s_desc_size = 2048.into()),
        ("s_blocks_per_group", |raw| raw.s_blocks_per_group = 0.into()),
        ("s_blocks_per_group", |raw| raw.s_blocks_per_group = 32776.into()),
        ("s_inodes_per_group", |raw| raw.s_inodes_per_group = 0.into()),
        ("s_inodes_per_group", |raw| raw.s_inodes_per_group = 32769.into()),
        ("s_inodes_count", |raw| raw.s_inodes_count = 65535.into()),
        ("s_first_data_block", |raw| raw.s_first_data_block = 1.into()),
        ("blocks count", |raw| raw.s_blocks_count_lo = 0.into()),
        ("blocks count", |raw| raw.s_blocks_count_hi = 0x8000_0000.into()),
        ("s_reserved_gdt_blocks", |raw| raw.s_reserved_gdt_blocks = 1025.into()),
        ("s_first_meta_bg", |raw| {
            raw.s_feature_incompat = (raw.s_feature_incompat.get() | 0x10).into();
            raw.s_first_meta_bg = 3.into();
        }),
    ];
    for (field, edit) in edits {
        let message = refusal(edit);
        assert!(message.contains(field), "{field}: {message}");
    }
}

#[test]
fn seals_with_a_checksum_that_parses() {
    let mut sb = sample_superblock();
    sb.set_free_blocks_count(1 << 33);
    sb.set_label(b"a label of more than 16 bytes");
    sb.set_mount_time(5_000_000_000);
    let bytes = sb.sealed_bytes().to_vec();
    let again = Superblock::parse(&bytes).unwrap();
    assert_eq!(again.free_blocks_count(), 1 << 33);
    assert_eq!(again.label(), b"a label of more ");
    assert_eq!(again.mount_time(), 5_000_000_000);
}

#[test]
fn the_first_error_is_kept_and_the_last_replaced() {
    let mut sb = sample_superblock();
    let error = |line| ErrorRecord { time: 9, line, func: "f".into(), ..Default::default() };
    (1..=3).for_each(|line| sb.record_error(&error(line)));
    assert_eq!((sb.first_error(), sb.last_error()), (Some(error(1)), Some(error(3))));
    assert!(sb.error_count() == 3 && sb.state().contains(State::ERROR));
    sb.clear_errors();
    assert_eq!((sb.first_error(), sb.state()), (None, State::empty()));
}

#[test]
fn the_seed_is_the_stored_one_under_its_feature() {
    let mut sb = sample_superblock();
    assert_eq!(sb.csum_seed(), checksum::crc32c(!0, b"0123456789abcdef"));
    sb.raw_mut().s_checksum_seed = 77.into();
    let features = sb.features().with(Features::by_name("metadata_csum_seed").unwrap());
    sb.set_features(features).unwrap();
    sb.set_uuid(uuid::Uuid::nil());
    assert_eq!(sb.csum_seed(), 77);
}

#[test]
fn impossible_features_change_nothing() {
    let mut sb = sample_superblock();
    let before = sb.features();
    sb.raw_mut().s_desc_size = 0.into();
    assert!(sb.set_features(before).is_err());
    assert_eq!(sb.features(), before);
}
