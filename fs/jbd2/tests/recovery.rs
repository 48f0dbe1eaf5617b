//! Recovery against e2fsck: the same image, replayed by both, must hold the same blocks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::*;
use uext_blockdev::{BioFlags, BlockDevice, MemoryDevice, MemoryOptions};
use uext_jbd2::{JournalError, OnDamage, Recovery, RecoveryReport};

/// Replays an image by ourselves; the report and the image afterwards.
fn replay(image: &Path, on_damage: OnDamage) -> (Result<RecoveryReport, JournalError>, Vec<u8>) {
    let bytes = std::fs::read(image).unwrap();
    let block_size = geometry(&bytes).block_size;
    let map = journal_map(image);
    let device = MemoryDevice::from_vec(bytes);
    let recovery = Recovery::open(location(&*device, &map, block_size), &*device);
    let report = recovery.and_then(|recovery| recovery.replay(on_damage));
    (report, device.snapshot())
}

/// Replays by e2fsck on a copy; the image afterwards.
fn judge(image: &Path) -> Vec<u8> {
    let copy = image.with_extension("judged");
    std::fs::copy(image, &copy).unwrap();
    e2fsck_journal_only(&copy);
    std::fs::read(&copy).unwrap()
}

/// Both replays leave the same blocks.
fn assert_same_replay(image: &Path) -> RecoveryReport {
    let block_size = geometry(&std::fs::read(image).unwrap()).block_size;
    let (report, mut ours) = replay(image, OnDamage::Reset);
    let mut theirs = judge(image);
    normalise(&mut ours);
    normalise(&mut theirs);
    let differing = differing_blocks(&ours, &theirs, block_size);
    assert!(differing.is_empty(), "{image:?}: blocks {differing:?}, {report:?}");
    report.unwrap()
}

/// An image of the damaged journals in `UEXT_CORPUS`, unpacked into `dir`; `None`, loudly, when
/// it is not there.
fn corpus(dir: &Path, name: &str) -> Option<PathBuf> {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/corpus");
    let root = std::env::var_os("UEXT_CORPUS").map_or_else(|| beside.into(), PathBuf::from);
    let packed = root.join("journal").join(name);
    if !packed.exists() {
        {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "SKIPPED: {packed:?} is not there");
        }
        return None;
    }
    let tool = if name.ends_with(".gz") { "gzip" } else { "bzip2" };
    let output = Command::new(tool).args(["-dc"]).arg(&packed).output();
    let Ok(output) = output.inspect_err(|error| {
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "SKIPPED: {tool}: {error}");
    }) else {
        return None;
    };
    let path = dir.join("image");
    std::fs::write(&path, output.stdout).unwrap();
    Some(path)
}

#[test]
fn journals_of_the_corpus_replay_as_e2fsck_replays_them() {
    if !have_e2fsprogs() {
        return;
    }
    for name in [
        "recover_csum2_64bit.img.bz2",
        "recover_csum3_64bit.img.bz2",
        "corrupt_commit_csum.img.gz",
        "corrupt_commit_tid.img.gz",
        "corrupt_descr_tid.img.gz",
        "corrupt_journal_block.img.gz",
        "corrupt_revoke_csum.img.gz",
        "corrupt_revoke_rcount.img.gz",
    ] {
        let dir = scratch();
        let Some(image) = corpus(dir.path(), name) else { continue };
        let report = assert_same_replay(&image);
        println!("{name}: {report:?}");
    }
}

#[test]
fn damaged_logs_are_kept_and_refused_by_a_mount() {
    if !have_e2fsprogs() {
        return;
    }
    type Expected = fn(&JournalError) -> bool;
    let cases: [(&str, Expected); 3] = [
        ("corrupt_commit_csum.img.gz", |e| matches!(e, JournalError::DamagedTransaction(3))),
        ("corrupt_journal_block.img.gz", |e| matches!(e, JournalError::Corrupt(_))),
        ("corrupt_revoke_rcount.img.gz", |e| matches!(e, JournalError::Corrupt(_))),
    ];
    for (name, expected) in cases {
        let dir = scratch();
        let Some(image) = corpus(dir.path(), name) else { continue };
        let (report, bytes) = replay(&image, OnDamage::Keep);
        let error = report.unwrap_err();
        assert!(expected(&error), "{name}: {error:?}");
        assert!(bytes == std::fs::read(&image).unwrap(), "{name}: refused, and yet written");
        std::fs::write(&image, bytes).unwrap();
        let (again, _) = replay(&image, OnDamage::Keep);
        assert_eq!(again.unwrap_err(), error, "{name}: the log is still there");
    }
}

#[test]
fn a_journal_without_its_magic_is_corrupt() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let Some(image) = corpus(dir.path(), "corrupt_sb_magic.img.gz") else { return };
    let (report, bytes) = replay(&image, OnDamage::Reset);
    assert!(matches!(report, Err(JournalError::Corrupt(_))), "{report:?}");
    assert_eq!(bytes, std::fs::read(&image).unwrap());
}

/// How debugfs is to write a journal.
struct Variant {
    name: &'static str,
    mkfs: &'static [&'static str],
    open: &'static str,
}

const VARIANTS: [Variant; 5] = [
    Variant { name: "v1 tags", mkfs: &["-b", "1024", "-O", "^64bit,^metadata_csum"], open: "jo" },
    Variant {
        name: "64-bit tags",
        mkfs: &["-b", "4096", "-O", "64bit,^metadata_csum"],
        open: "jo",
    },
    Variant {
        name: "csum v2",
        mkfs: &["-b", "1024", "-O", "64bit,metadata_csum"],
        open: "jo -c -v 2",
    },
    Variant {
        name: "csum v3",
        mkfs: &["-b", "4096", "-O", "64bit,metadata_csum"],
        open: "jo -c -v 3",
    },
    Variant {
        name: "csum v3, 32 bits, block-mapped journal",
        mkfs: &["-b", "1024", "-O", "^64bit,metadata_csum,^extent"],
        open: "jo -c -v 3",
    },
];

/// Free blocks of an image that tests may overwrite.
const FREE: u64 = 6000;

#[test]
fn journals_that_debugfs_writes_replay_as_e2fsck_replays_them() {
    if !have_e2fsprogs() {
        return;
    }
    for variant in &VARIANTS {
        let dir = scratch();
        let mut options = variant.mkfs.to_vec();
        options.extend_from_slice(&["-J", "size=4"]);
        let image = mkfs(dir.path(), &options, "16384");
        let block_size = geometry(&std::fs::read(&image).unwrap()).block_size as usize;
        // Long enough for several descriptors; the tenth block must be escaped.
        let mut data = pattern(7, 300 * block_size);
        data[10 * block_size..][..4].copy_from_slice(&0xC03B_3998u32.to_be_bytes());
        let file = dir.path().join("data");
        std::fs::write(&file, &data).unwrap();
        let file = file.to_str().unwrap();
        let open = variant.open;
        debugfs(
            &image,
            &format!(
                "{open}\njw -b {FREE}-{} {file}\njc\n\
                 {open}\njw -r {}-{}\njc\n\
                 {open}\njw -b {} {file}\njc\n",
                FREE + 299,
                FREE + 20,
                FREE + 29,
                FREE + 25
            ),
        );
        let report = assert_same_replay(&image);
        assert_eq!(report.transactions, 3, "{}: {report:?}", variant.name);
        assert_eq!(report.revoke_records, 10, "{}: {report:?}", variant.name);
        assert_eq!(report.blocks_revoked, 10, "{}: {report:?}", variant.name);
        assert_eq!(report.blocks_replayed, 291, "{}: {report:?}", variant.name);
        let (_, ours) = replay(&image, OnDamage::Keep);
        let block = |n: u64| &ours[n as usize * block_size..][..block_size];
        assert_eq!(block(FREE + 10), &data[10 * block_size..11 * block_size]);
        assert!(block(FREE + 20).iter().all(|&byte| byte == 0), "revoked");
        assert_eq!(block(FREE + 25), &data[..block_size], "revoked, then written again");
    }
}

#[test]
fn uncommitted_transactions_are_not_replayed() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let image = mkfs(dir.path(), &["-b", "1024", "-O", "64bit,metadata_csum"], "8192");
    let file = dir.path().join("data");
    std::fs::write(&file, pattern(3, 1024)).unwrap();
    let file = file.to_str().unwrap();
    debugfs(&image, &format!("jo -c\njw -b {FREE} {file}\njw -b {} {file} -c\njc\n", FREE + 1));
    let report = assert_same_replay(&image);
    println!("{report:?}");
}

/// An image with a journal of two transactions, and its block size.
fn journalled_image(dir: &Path) -> (PathBuf, u32) {
    let image = mkfs(dir, &["-b", "1024", "-O", "64bit,metadata_csum"], "8192");
    let file = dir.join("data");
    std::fs::write(&file, pattern(9, 40 * 1024)).unwrap();
    let file = file.to_str().unwrap();
    debugfs(
        &image,
        &format!(
            "jo -c -v 3\njw -b {FREE}-{} {file}\njc\njo -c -v 3\njw -b {}-{} {file}\njc\n",
            FREE + 9,
            FREE + 5,
            FREE + 19
        ),
    );
    (image, 1024)
}

#[test]
fn views_show_what_a_replay_leaves_and_write_nothing() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let (image, block_size) = journalled_image(dir.path());
    let bytes = std::fs::read(&image).unwrap();
    let options = MemoryOptions { read_only: true, ..MemoryOptions::default() };
    let device = MemoryDevice::from_vec_with(bytes.clone(), &options);
    let map = journal_map(&image);
    let recovery = Recovery::open(location(&*device, &map, block_size), &*device).unwrap();
    let plan = recovery.plan().unwrap();
    let view: Arc<dyn BlockDevice> = plan.views(device, None).fs;
    let (written, replayed) = replay(&image, OnDamage::Keep);
    assert_eq!(written.unwrap(), plan.report());
    let shown = view.read_at(0, bytes.len()).unwrap();
    assert!(differing_blocks(&shown, &replayed, block_size).is_empty());
    // In pieces that begin and end anywhere.
    let pieces = [(0, 512), (FREE * 1024 - 512, 2048), (FREE * 1024 + 512, 20 * 1024)];
    for (offset, len) in pieces {
        let want = &replayed[offset as usize..][..len];
        assert!(view.read_at(offset, len).unwrap() == want, "{len} bytes at {offset}");
    }
    assert!(view.write_at(0, &[0; 512], BioFlags::empty()).is_err());
}

/// A log that writes into itself has no result that a second replay would repeat.
#[test]
fn a_tag_that_names_the_journals_own_block_is_damage() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let image = mkfs(dir.path(), &["-b", "1024", "-O", "^64bit,^metadata_csum"], "8192");
    let own = journal_map(&image).map(30).unwrap();
    let file = dir.path().join("data");
    std::fs::write(&file, pattern(9, 1024)).unwrap();
    debugfs(&image, &format!("jo\njw -b {own} {}\njc\n", file.to_str().unwrap()));
    let before = std::fs::read(&image).unwrap();
    let (report, bytes) = replay(&image, OnDamage::Keep);
    assert!(matches!(report, Err(JournalError::Corrupt(_))), "{report:?}");
    assert!(bytes == before, "refused, and yet written");
}

#[test]
fn a_replayed_journal_is_clean_and_replays_nothing_again() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let (image, _) = journalled_image(dir.path());
    let (first, bytes) = replay(&image, OnDamage::Keep);
    assert_eq!(first.unwrap().transactions, 2);
    std::fs::write(&image, &bytes).unwrap();
    let (second, again) = replay(&image, OnDamage::Keep);
    assert!(!second.unwrap().was_dirty);
    assert_eq!(bytes, again);
    e2fsck_journal_only(&image);
    e2fsck_check(&image).unwrap();
}

#[test]
fn every_single_damaged_byte_is_judged_as_e2fsck_judges_it() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let (image, block_size) = journalled_image(dir.path());
    let clean = std::fs::read(&image).unwrap();
    let map = journal_map(&image);
    // Superblock, descriptor, data, commit, and the second transaction's blocks.
    for logical in [1u32, 2, 11, 12, 13, 28, 29] {
        for at in [0usize, 3, 5, 8, 11, 13, 17, 40, 57, 300, 1020, 1023] {
            if [12, 29].contains(&logical) && at >= 64 {
                // Behind the header of a commit block nothing counts for newer kernels, whose
                // commit block may be torn there; e2fsck 1.47.0 does not know that yet.
                continue;
            }
            let place = map.map(logical).unwrap() as usize * 1024 + at;
            let mut bytes = clean.clone();
            bytes[place] ^= 0x41;
            std::fs::write(&image, &bytes).unwrap();
            let (report, mut ours) = replay(&image, OnDamage::Reset);
            let mut theirs = judge(&image);
            normalise(&mut ours);
            normalise(&mut theirs);
            let differing = differing_blocks(&ours, &theirs, block_size);
            assert!(differing.is_empty(), "block {logical} byte {at}: {differing:?} {report:?}");
        }
    }
}

#[test]
fn no_journal_bytes_make_recovery_panic_or_loop() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let (image, block_size) = journalled_image(dir.path());
    let clean = std::fs::read(&image).unwrap();
    let map = journal_map(&image);
    for seed in 0..400u64 {
        let noise = pattern(seed + 1, 64);
        let mut bytes = clean.clone();
        for part in noise.chunks(8) {
            let block = map.map(u32::from(part[0]) % 32).unwrap() as usize;
            let at = block * 1024 + usize::from(u16::from_le_bytes([part[1], part[2]])) % 64;
            bytes[at] = part[3];
        }
        if seed.is_multiple_of(2) {
            fix_superblock(&mut bytes, map.map(0).unwrap() as usize * 1024, seed);
        }
        let device = MemoryDevice::from_vec(bytes);
        if let Ok(recovery) = Recovery::open(location(&*device, &map, block_size), &*device) {
            let _ = recovery.plan();
            let _ = recovery.replay(OnDamage::Reset);
        }
    }
}

/// Makes a damaged journal superblock pass its checks again, with other features.
fn fix_superblock(bytes: &mut [u8], at: usize, seed: u64) {
    let features = [0x13u32, 0x3, 0xB, 0x1, 0x0][seed as usize / 2 % 5];
    uext_ondisk::jbd2::edit_superblock_with(&mut bytes[at..at + 1024], |raw| {
        raw.s_header.h_magic = uext_ondisk::jbd2::MAGIC.into();
        raw.s_header.h_blocktype = 4.into();
        raw.s_blocksize = 1024.into();
        raw.s_feature_incompat = features.into();
        raw.s_feature_compat = u32::from(seed % 4 == 2 && features & 0x18 == 0).into();
        raw.s_feature_ro_compat = 0.into();
        raw.s_nr_users = 1.into();
        raw.s_maxlen = 1024.into();
        raw.s_first = 1.into();
        raw.s_start = 1.into();
    })
    .unwrap();
}

#[test]
fn a_full_device_error_keeps_the_log() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let (image, block_size) = journalled_image(dir.path());
    let options = MemoryOptions { read_only: true, ..MemoryOptions::default() };
    let device = MemoryDevice::from_vec_with(std::fs::read(&image).unwrap(), &options);
    let device: &dyn BlockDevice = &*device;
    let map = journal_map(&image);
    let recovery = Recovery::open(location(device, &map, block_size), device).unwrap();
    let error = recovery.replay(OnDamage::Reset).unwrap_err();
    assert!(matches!(error, JournalError::Io { .. }), "{error:?}");
    assert!(Recovery::open(location(device, &map, block_size), device).unwrap().needs_recovery());
}

#[test]
fn journals_that_the_kernel_writes_replay_as_e2fsck_replays_them() {
    let dir = scratch();
    if !have_e2fsprogs() || !have_kernel_mounts(dir.path()) {
        return;
    }
    for features in ["64bit,metadata_csum", "^64bit,^metadata_csum"] {
        let image = mkfs(dir.path(), &["-b", "1024", "-O", features], "16384");
        let copy = dir.path().join("copy");
        let mount = KernelMount::new(&image, ",commit=1").unwrap();
        for round in 0..40 {
            let sub = mount.path().join(format!("dir{round}"));
            std::fs::create_dir(&sub).unwrap();
            for file in 0..30 {
                std::fs::write(sub.join(format!("file{file}")), pattern(file + 1, 700)).unwrap();
            }
            if round % 3 == 2 {
                std::fs::remove_dir_all(mount.path().join(format!("dir{}", round - 1))).unwrap();
            }
            run("sync", &["-f", mount.path().to_str().unwrap()]);
        }
        std::fs::copy(&image, &copy).unwrap();
        drop(mount);
        let report = assert_same_replay(&copy);
        assert!(report.blocks_replayed > 0, "{features}: {report:?}");
        println!("{features}: {report:?}");
        let (_, ours) = replay(&copy, OnDamage::Keep);
        std::fs::write(&copy, ours).unwrap();
        e2fsck_journal_only(&copy);
        e2fsck_check(&copy).unwrap();
    }
}

#[test]
fn a_commit_block_torn_behind_its_header_counts_as_it_does_for_the_kernel() {
    let dir = scratch();
    if !have_e2fsprogs() || !have_kernel_mounts(dir.path()) {
        return;
    }
    let (image, _) = journalled_image(dir.path());
    let mut bytes = std::fs::read(&image).unwrap();
    let place = journal_map(&image).map(12).unwrap() as usize * 1024 + 300;
    bytes[place] ^= 0x41;
    std::fs::write(&image, &bytes).unwrap();
    let (report, ours) = replay(&image, OnDamage::Keep);
    match KernelMount::new(&image, "") {
        Ok(mount) => drop(mount),
        Err(error) => {
            {
                use std::io::Write as _;
                let _ = writeln!(
                    std::io::stderr(),
                    "SKIPPED: this kernel is older than the rule: {error}"
                );
            }
            return;
        }
    }
    assert_eq!(report.unwrap().transactions, 2);
    let theirs = std::fs::read(&image).unwrap();
    let blocks = FREE as usize * 1024..(FREE as usize + 20) * 1024;
    assert!(ours[blocks.clone()] == theirs[blocks]);
}
