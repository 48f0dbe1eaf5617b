//! One defect at a time, planted by debugfs: the checker names it, and its
//! verdict is e2fsck's.

use std::path::Path;
use std::process::Command;

use uext_tests::scratch::Scratch;
use uext_tests::{run, sh};
use uext_tools::fsck::problem::Code;

use crate::{assert_agree, ours, theirs};

/// Layouts the defects are planted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    /// ext2 with block maps.
    Ext2,
    /// ext4 without checksums, so that raw pokes stay what they are.
    Plain,
    /// ext4 with checksums, which debugfs keeps right for what it edits.
    Csum,
    /// ext4 with journal and orphan file.
    Journal,
    /// ext4 with uninitialised groups.
    Uninit,
}

impl Base {
    const ALL: [Self; 5] = [Self::Ext2, Self::Plain, Self::Csum, Self::Journal, Self::Uninit];

    fn options(self) -> &'static str {
        match self {
            Self::Ext2 => "-t ext2 -b 1024",
            Self::Plain => "-t ext4 -b 1024 -O ^metadata_csum,^has_journal",
            Self::Csum => "-t ext4 -b 1024 -O ^has_journal",
            Self::Journal => "-t ext4 -b 1024 -O metadata_csum_seed,orphan_file -J size=4",
            Self::Uninit => "-t ext4 -b 1024 -g 4096 -O ^metadata_csum,uninit_bg,^has_journal",
        }
    }
}

/// One defect: where, how, and what it is called.
type Plant = (Base, &'static str, Code);

#[rustfmt::skip]
const PLANTS: &[Plant] = &[
    // Superblock and descriptors.
    (Base::Plain, "ssv free_blocks_count 5", Code::FreeBlocks),
    (Base::Plain, "ssv free_inodes_count 5", Code::FreeInodes),
    (Base::Plain, "ssv min_extra_isize 1", Code::ExtraIsize),
    (Base::Plain, "ssv want_extra_isize 1000", Code::ExtraIsize),
    (Base::Plain, "ssv blocks_count 90000000", Code::SuperUnusable),
    (Base::Plain, "ssv first_ino 5", Code::SuperUnusable),
    (Base::Plain, "ssv r_blocks_count 16000", Code::SuperField),
    (Base::Plain, "ssv reserved_gdt_blocks 300", Code::SuperUnusable),
    (Base::Plain, "ssv mtime 20380101000000", Code::FutureTime),
    (Base::Plain, "ssv feature_ro_compat 0x79", Code::LargeFile),
    (Base::Plain, "ssv journal_inum 8", Code::JournalFlags),
    (Base::Csum, "set_bg 0 checksum 1", Code::DescCsum),
    (Base::Plain, "set_bg 0 flags 2", Code::UninitWithoutCsum),
    (Base::Plain, "set_bg 0 free_blocks_count 1", Code::FreeBlocksGroup),
    (Base::Plain, "set_bg 0 free_inodes_count 1", Code::FreeInodesGroup),
    (Base::Plain, "set_bg 0 used_dirs_count 77", Code::DirsGroup),
    (Base::Uninit, "set_bg 0 itable_unused 4000\nset_bg 0 checksum calc", Code::ItableUnused),
    (Base::Plain, "ssv hash_seed clear", Code::IndexMinHash),
    // Inodes.
    (Base::Plain, "sif /f1 mode 0", Code::BadField),
    (Base::Plain, "sif /f1 dtime 5", Code::LowDtime),
    (Base::Plain, "sif /f1 dtime 1700000000", Code::InUseDtime),
    (Base::Plain, "sif / dtime 1700000000", Code::RootDtime),
    (Base::Plain, "sif /f1 links_count 0", Code::ZeroDtime),
    (Base::Plain, "sif /f1 links_count 9", Code::LinkCount),
    (Base::Plain, "sif /f1 faddr 1", Code::BadField),
    (Base::Plain, "sif /f1 flags 0x82000", Code::Imagic),
    (Base::Plain, "sif /f1 flags 0x81000", Code::IndexNotDir),
    (Base::Plain, "sif /f1 flags 0x40080000", Code::CasefoldNotDir),
    (Base::Plain, "sif /f1 flags 0x0", Code::ExtentFlagMissing),
    (Base::Plain, "sif /f1 flags 0x10080000", Code::InlineAndExtents),
    (Base::Plain, "sif /f1 flags 0x80800", Code::NoEncryptionContext),
    (Base::Plain, "sif /f1 extra_isize 3", Code::InodeExtraIsize),
    (Base::Plain, "sif /f1 file_acl 99999999", Code::BadField),
    (Base::Plain, "sif /data size 10", Code::BadSize),
    (Base::Plain, "sif /data blocks 77", Code::BadBlocks),
    (Base::Plain, "sif /dir size 1000", Code::BadSize),
    (Base::Plain, "sif /dir size 102400", Code::BadSize),
    (Base::Plain, "sif /fifo size 5", Code::SpecialSize),
    (Base::Plain, "sif /fifo flags 0x80000", Code::BadField),
    (Base::Plain, "sif /link size 3", Code::BadField),
    (Base::Plain, "sif /link mode 0120777\nsif /link flags 0x80000", Code::FastSymlinkExtents),
    (Base::Plain, "sif <2> mode 0100644", Code::RootNotDir),
    (Base::Plain, "sif <5> mode 040755", Code::ReservedMode),
    (Base::Plain, "sif <8> links_count 1", Code::ReservedNotClear),
    (Base::Plain, "sif <7> block[0] 500", Code::ResizeInodeBad),
    (Base::Ext2, "sif <1> mode 0100644", Code::BadBlocksInode),
    (Base::Ext2, "sif <1> block[0] 1", Code::BadBlockMetadata),
    (Base::Ext2, "sif <1> block[0] 99999999", Code::BadBlockIllegal),
    // Block maps and extents.
    (Base::Ext2, "sif /data block[IND] 99999999", Code::IllegalBlock),
    (Base::Ext2, "sif /data block[1] 99999999", Code::IllegalBlock),
    (Base::Ext2, "sif /data block[1] 1", Code::DuplicateBlock),
    (Base::Ext2, "sif /data block[IND] 3", Code::MetadataCollision),
    (Base::Ext2, "sif /long block[3] 900", Code::BadField),
    (Base::Ext2, "sif /dir block[0] 0", Code::DirHole),
    (Base::Ext2, "sif /empty block[0] 0\nsif /empty blocks 0", Code::ZeroLengthDir),
    (Base::Ext2, "sif /f1 flags 0x80000", Code::ExtentFeature),
    (Base::Plain, "sif /f1 block[0] 0", Code::ExtentHeader),
    (Base::Plain, "sif /data block[5] 99999999", Code::ExtentStart),
    (Base::Plain, "sif /data block[4] 0", Code::ExtentLength),
    (Base::Plain, "sif /data block[4] 100\nsif /data block[5] 16380", Code::ExtentEnd),
    (Base::Plain, "sif /data block[5] 3", Code::DuplicateBlock),
    (Base::Plain, "sif /dir block[3] 7", Code::DirHoleExtent),
    (Base::Plain, "sif /empty block[4] 0x8001", Code::UnwrittenDir),
    // Attributes.
    (Base::Plain, "sif /x1 file_acl 3", Code::XattrBlockBad),
    (Base::Plain, "copy_inode /x1 /f1", Code::XattrRefcount),
    // Directories.
    (Base::Plain, "clri /f1", Code::EntryUnused),
    (Base::Plain, "unlink /f1", Code::Unattached),
    (Base::Plain, "unlink /empty", Code::Unconnected),
    (Base::Plain, "ln /f1 /g1", Code::LinkCount),
    (Base::Plain, "ln /empty /empty/self", Code::LinkSelf),
    (Base::Plain, "ln / /empty/root", Code::LinkRoot),
    (Base::Plain, "ln /dir /empty/twice", Code::DirLinkedTwice),
    (Base::Plain, "ln <7> /empty/reserved", Code::EntryInode),
    (Base::Plain, "ln <450> /empty/unused", Code::EntryUnused),
    (Base::Plain, "zap_block -f /two -o 4 -l 2 -p 3 0", Code::DirCorrupt),
    (Base::Plain, "zap_block -f /two -o 0 -l 1 -p 2 0", Code::BadDotInode),
    (Base::Plain, "zap_block -f /two -o 8 -l 1 -p 97 0", Code::MissingDot),
    (Base::Plain, "zap_block -f /two -o 9 -l 1 -p 97 0", Code::DotTerminator),
    (Base::Plain, "zap_block -f /two -o 12 -l 1 -p 14 0", Code::BadDotDot),
    (Base::Plain, "zap_block -f /two -o 20 -l 1 -p 97 0", Code::MissingDotDot),
    (Base::Plain, "zap_block -f /two -o 31 -l 1 -p 2 0", Code::Filetype),
    (Base::Plain, "zap_block -f /two -o 31 -l 1 -p 0 0", Code::FiletypeUnset),
    (Base::Plain, "zap_block -f /two -o 32 -l 1 -p 47 0", Code::BadName),
    (Base::Plain, "zap_block -f /two -o 33 -l 1 -p 98 0", Code::DuplicateName),
    (Base::Plain, "zap_block -f /two -o 30 -l 1 -p 0 0", Code::NullName),
    (Base::Plain, "ssv feature_incompat 0x2C0", Code::FiletypeWithoutFeature),
    // The index.
    (Base::Plain, "zap_block -f /big -o 24 -l 1 -p 1 0", Code::IndexRoot),
    (Base::Plain, "zap_block -f /big -o 28 -l 1 -p 9 0", Code::IndexRoot),
    (Base::Plain, "zap_block -f /big -o 30 -l 1 -p 9 0", Code::IndexRoot),
    (Base::Plain, "zap_block -f /big -o 34 -l 1 -p 1 0", Code::IndexUnreferenced),
    (Base::Plain, "zap_block -f /big -o 44 -l 1 -p 99 0", Code::IndexBadBlock),
    (Base::Plain, "zap_block -f /big -o 44 -l 1 -p 1 0", Code::IndexTwice),
    (Base::Plain, "zap_block -f /big -o 40 -l 4 -p 255 0", Code::IndexOrder),
    (Base::Plain, "zap_block -f /big -o 40 -l 3 -p 255 0", Code::IndexMinHash),
    (Base::Ext2, "ssv feature_compat 0x18", Code::IndexFeature),
    // Checksums.
    (Base::Csum, "zap_block -f /two -o 40 -l 1 -p 1 0", Code::DirCsum),
    (Base::Csum, "zap_block -f /two -o 1012 -l 12 -p 0 0", Code::DirNoTail),
    (Base::Csum, "zap_block -f /big -o 1016 -l 8 -p 1 0", Code::IndexNode),
    // Bitmaps.
    (Base::Plain, "setb 15000", Code::BlockMapDiff),
    (Base::Plain, "setb 15000 8", Code::BlockMapDiff),
    (Base::Plain, "freeb 1 4", Code::BlockMapDiff),
    (Base::Plain, "seti <450>", Code::InodeMapDiff),
    (Base::Plain, "freei /f1", Code::InodeMapDiff),
    (Base::Csum, "setb 15000", Code::BlockMapDiff),
    // Journal and orphan file.
    (Base::Journal, "zap_block -f <8> -o 0 -l 4 -p 0 0", Code::JournalSuper),
    (Base::Journal, "zap_block -f <8> -o 16 -l 4 -p 1 0", Code::JournalSuper),
    (Base::Journal, "sif <8> mode 040755", Code::JournalMode),
    (Base::Journal, "sif <8> links_count 0", Code::JournalInode),
    (Base::Journal, "ssv feature_incompat 0x22C6\nsif <8> links_count 0", Code::JournalInode),
    (
        Base::Journal,
        "ssv feature_incompat 0x22C6\nzap_block -f <8> -o 16 -l 4 -p 1 0",
        Code::JournalNotReplayed,
    ),
    (Base::Journal, "ssv feature_ro_compat 0x1046B", Code::OrphanPresentClean),
    (Base::Plain, "ssv feature_ro_compat 0x1007B", Code::OrphanPresentNoFile),
];

/// Makes the image of a base with a tree that has what the defects need.
fn build(scratch: &Scratch, base: Base) -> Vec<u8> {
    let dir = scratch.path().display();
    let options = base.options();
    sh(&format!(
        "rm -rf {dir}/src {dir}/base; mkdir -p {dir}/src/dir {dir}/src/big; cd {dir}/src
         echo one > f1; echo two > f2; mkfifo fifo; ln -s short link; mkdir empty two
         touch two/aa two/ab; ln -s $(printf 'x%.0s' $(seq 100)) long
         head -c 50000 /dev/zero | tr '\\0' a > data; truncate -s 5G sparse
         touch x1; setfattr -n user.a -v $(printf 'v%.0s' $(seq 300)) x1
         for i in $(seq 9); do echo > dir/file$i; done
         for i in $(seq 300); do echo > big/file-number-$i; done
         cd ..; truncate -s 16M base; mke2fs -q -F {options} -N 512 -d src base
         e2fsck -fyD base > /dev/null || true; e2fsck -fn base > /dev/null"
    ));
    std::fs::read(scratch.path().join("base")).expect("read the image")
}

fn plant(scratch: &Scratch, image: &Path, script: &str) {
    let commands = scratch.path().join("commands");
    std::fs::write(&commands, script).expect("write the commands");
    run(Command::new("debugfs").arg("-w").arg("-f").arg(commands).arg(image));
}

#[test]
fn every_planted_defect_is_named_and_judged_as_e2fsck_judges() {
    uext_tests::require!("mke2fs", "e2fsck", "debugfs", "setfattr");
    let scratch = Scratch::new();
    let image = scratch.path().join("image");
    let (mut unnamed, mut differ) = (Vec::new(), Vec::new());
    for base in Base::ALL {
        let sound = build(&scratch, base);
        std::fs::write(&image, &sound).expect("write the image");
        assert_eq!(assert_agree(&image, &format!("{base:?}")).warnings, 0, "{base:?}");
        for (_, script, code) in PLANTS.iter().filter(|plant| plant.0 == base) {
            std::fs::write(&image, &sound).expect("write the image");
            plant(&scratch, &image, script);
            let (outcome, _) = ours(&image);
            let (clean, text) = theirs(&image);
            if (outcome.exit == 0) != clean {
                let counts = &outcome.counts;
                differ.push(format!("{base:?}: {script}: {counts:?}, e2fsck says {text}"));
            }
            if !outcome.counts.contains_key(code) {
                unnamed.push(format!("{base:?}: {script}: no {code:?} in {:?}", outcome.counts));
            }
        }
    }
    assert!(unnamed.is_empty() && differ.is_empty(), "{unnamed:#?}\n{}", differ.join("\n"));
}
