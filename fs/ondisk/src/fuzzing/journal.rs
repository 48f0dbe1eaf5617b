//! The journal's blocks and the orphan file.

use zerocopy::FromBytes;

use crate::jbd2::{
    CommitBlock, CsumVersion, DescriptorWriter, Header, JournalSuperblock, RawJournalSuperblock,
    RevokeWriter, TagFormat, descriptor_tags, edit_superblock, needs_escape, revoke_records,
    verify_tail,
};
use crate::orphan_file;
use crate::units::{FsBlock, InodeNumber};

const CSUMS: [CsumVersion; 3] = [CsumVersion::None, CsumVersion::V2, CsumVersion::V3];

fn formats() -> impl Iterator<Item = TagFormat> {
    CSUMS.into_iter().flat_map(|csum| [false, true].map(|wide| TagFormat { csum, wide }))
}

/// Reads any block as every kind of journal block, and writes back what it read.
pub fn fuzz_jbd2(data: &[u8]) {
    let _ = (Header::parse(data), CommitBlock::parse(data), CommitBlock::verify(data, 1));
    let _ = (verify_tail(1, data), needs_escape(data));
    for format in formats() {
        let tags: Vec<_> = descriptor_tags(data, format).collect();
        assert!(tags.len() <= data.len() / 8);
        for tag in &tags {
            let _ = tag.matches(format, 1, 2, data);
        }
        let mut block = vec![0; data.len()];
        if let Ok(mut writer) = DescriptorWriter::new(&mut block, format, 1, [7; 16]) {
            let written = tags.iter().take_while(|tag| writer.push(tag.block, false, 3)).count();
            writer.finish(1);
            assert_eq!(descriptor_tags(&block, format).take(written).count(), written);
        }
        let Ok(records) = revoke_records(data, format) else { continue };
        let records: Vec<FsBlock> = records.collect();
        if let Ok(mut writer) = RevokeWriter::new(&mut block, format, 1) {
            assert!(records.iter().all(|&record| writer.push(record)), "what was read fits");
            writer.finish(1);
            assert_eq!(revoke_records(&block, format).map(Iterator::count), Ok(records.len()));
        }
    }
}

/// Parses a journal superblock as it is and with its checksum repaired.
pub fn fuzz_jbd2_superblock(data: &[u8]) {
    let _ = JournalSuperblock::parse(data);
    let Ok((raw, _)) = RawJournalSuperblock::read_from_prefix(data) else { return };
    let mut raw: RawJournalSuperblock = raw;
    raw.update_checksum();
    let mut bytes = zerocopy::IntoBytes::as_bytes(&raw).to_vec();
    if let Ok(sb) = JournalSuperblock::parse(&bytes) {
        assert!(sb.first < sb.log_end());
        let _ = (sb.tag_format(), sb.csum_seed(), sb.needs_recovery());
        edit_superblock(&mut bytes, 9, 0, 0).expect("it has 1024 bytes");
        assert!(JournalSuperblock::parse(&bytes).is_ok());
    }
}

/// Reads and edits any block as one of the orphan file.
pub fn fuzz_orphan_file(data: &[u8]) {
    let _ = orphan_file::orphans(data).map(Iterator::count);
    let _ = orphan_file::verify_checksum(data, 1, FsBlock(2));
    let mut copy = data.to_vec();
    let slot = orphan_file::slots_per_block(data.len());
    let _ = orphan_file::set_slot(&mut copy, slot, InodeNumber(1));
    let _ = orphan_file::set_slot(&mut copy, slot / 2, InodeNumber(1));
    if orphan_file::set_checksum(&mut copy, 1, FsBlock(2)).is_ok() {
        assert_eq!(orphan_file::verify_checksum(&copy, 1, FsBlock(2)), Ok(()));
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;
    use crate::fuzzing::run_seeded;

    #[test]
    fn journal_blocks_survive_any_bytes() {
        let format = TagFormat { csum: CsumVersion::V3, wide: true };
        let mut block = vec![0; 512];
        let mut writer =
            DescriptorWriter::new(&mut block, format, 1, [7; 16]).expect("the block is large");
        while writer.push(FsBlock(77), true, 5) {}
        writer.finish(1);
        run_seeded(fuzz_jbd2, &block, 1, 2000);
        let mut writer = RevokeWriter::new(&mut block, format, 1).expect("the block is large");
        while writer.push(FsBlock(77)) {}
        writer.finish(1);
        run_seeded(fuzz_jbd2, &block, 2, 2000);
        let sb = RawJournalSuperblock::new(1024, 4096, 1, uuid::Uuid::from_u128(3));
        run_seeded(fuzz_jbd2_superblock, sb.as_bytes(), 3, 3000);
        let mut block = vec![0; 256];
        orphan_file::init(&mut block).expect("the block is large");
        run_seeded(fuzz_orphan_file, &block, 4, 3000);
    }
}
