//! `uext mkfs` judged by e2fsck, compared with mke2fs, and cut off at every flush.
//!
//! Without e2fsprogs the judged tests say so on stderr and pass.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic like the tests")]

use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use clap::Parser as _;
use uext_blockdev::dm::{CrashOptions, LogWrites, SnapshotDevice, UnitSet};
use uext_blockdev::memory::MemoryDevice;
use uext_blockdev::{Bio, BioOp, BlkStatus, BlockDevice, QueueLimits};
use uext_ondisk::jbd2::JournalSuperblock;
use uext_ondisk::superblock::{JournalDevice, Superblock};
use uext_tools::mkfs::journal_dev::{self, NewJournal};
use uext_tools::mkfs::options::Options;
use uext_tools::mkfs::params::{DeviceFacts, Params, Surroundings};
use uext_tools::mkfs::{MkfsError, format, run};

fn around() -> Surroundings {
    let uuid = uuid::Uuid::from_u128(0x1234_5678_9abc_def0_1122_3344_5566_7788);
    Surroundings { now: 1_700_000_000, uuid, hash_seed: uuid }
}

fn options(args: &str, image: &Path, size: &str) -> Options {
    let words = ["mkfs", "-q"].into_iter().chain(args.split_whitespace());
    let words = words.map(str::to_owned).chain([image.to_str().unwrap().to_owned(), size.into()]);
    Options::try_parse_from(words.filter(|word| !word.is_empty())).unwrap()
}

/// A program's output; `None`, said loudly, when it is not installed.
fn judge(program: &str, args: &[&str]) -> Option<Output> {
    let output = Command::new(program).args(args).output();
    if output.is_err() {
        {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "SKIPPED: {program} is not installed");
        }
    }
    output.ok()
}

/// Makes a filesystem and lets e2fsck judge it.
fn make_clean(args: &str, size: &str) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    run(&options(args, &image, size), &around()).unwrap();
    let Some(output) = judge("e2fsck", &["-fn", image.to_str().unwrap()]) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{args} {size}: {text}");
}

#[test]
fn all_types_and_block_sizes_are_clean() {
    for fs_type in ["ext2", "ext3", "ext4"] {
        for block_size in [1024, 2048, 4096] {
            for inode_size in [128, 256] {
                for size in ["1M", "9M", "300M"] {
                    make_clean(&format!("-t {fs_type} -b {block_size} -I {inode_size}"), size);
                }
            }
        }
    }
}

#[test]
fn feature_toggles_are_clean() {
    for features in [
        "^64bit",
        "^metadata_csum",
        "uninit_bg,^metadata_csum",
        "^flex_bg",
        "meta_bg,^resize_inode",
        "sparse_super2",
        "^extent,^64bit",
        "^has_journal",
        "^sparse_super,^resize_inode",
        "^filetype",
        "fast_commit",
        "inline_data,ea_inode,large_dir",
    ] {
        make_clean(&format!("-O {features}"), "300M");
        make_clean(&format!("-b 1024 -O {features}"), "300M");
    }
}

#[test]
fn extended_options_are_clean() {
    for args in [
        "-E packed_meta_blocks=1",
        "-E lazy_itable_init=0,nodiscard",
        "-O ^flex_bg -E stride=16,stripe_width=64",
        "-E resize=100G",
        "-E root_owner=1000:1001,root_perms=700",
        "-E orphan_file_size=1M",
        "-E desc_size=128",
        "-t ext2 -E revision=0",
        "-J size=8 -N 5000 -m 0 -G 4",
        "-g 8192",
        "-b 65536",
    ] {
        make_clean(args, "300M");
    }
}

#[test]
fn sparse_images_of_a_tebibyte_are_clean() {
    make_clean("-t ext4", "1T");
}

/// What dumpe2fs prints after `name:`.
fn shown(dumped: &str, name: &str) -> String {
    let line = dumped.lines().find(|line| line.starts_with(&format!("{name}:")));
    line.map(|line| line[name.len() + 1..].trim().to_owned()).unwrap_or_default()
}

#[test]
fn counts_and_features_are_those_of_mke2fs() {
    let dir = tempfile::tempdir().unwrap();
    // The local mke2fs may be older than the defaults it is compared with.
    let today = "-O orphan_file,metadata_csum_seed";
    for (fs_type, extra, size) in [
        ("ext4", today, "300M"),
        ("ext4", today, "3G"),
        ("ext3", "", "300M"),
        ("ext2", "-b 4096", "300M"),
        ("ext2", "-b 1024 -I 128", "9M"),
        ("ext4", "-O meta_bg,^resize_inode,orphan_file,metadata_csum_seed", "1G"),
        ("ext4", "-O sparse_super2,orphan_file,metadata_csum_seed", "3G"),
    ] {
        let args = format!("-t {fs_type} {extra}");
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        run(&options(&format!("{args} -F"), &ours, size), &around()).unwrap();
        let mut words: Vec<&str> = vec!["-q", "-F"];
        words.extend(args.split_whitespace());
        words.extend([theirs.to_str().unwrap(), size]);
        let Some(made) = judge("mke2fs", &words) else { return };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let dump = |path: &Path| {
            let output = judge("dumpe2fs", &["-h", path.to_str().unwrap()]).unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let (our_dump, their_dump) = (dump(&ours), dump(&theirs));
        for name in [
            "Filesystem features",
            "Inode count",
            "Block count",
            "Reserved block count",
            "Free blocks",
            "Free inodes",
            "Reserved GDT blocks",
            "Blocks per group",
            "Inodes per group",
            "Flex block group size",
            "Total journal blocks",
            "Overhead clusters",
            "Default mount options",
            "Required extra isize",
            "Default directory hash",
            "Journal inode",
            "Orphan file inode",
            "Maximum mount count",
        ] {
            assert_eq!(shown(&our_dump, name), shown(&their_dump, name), "{args} {size}: {name}");
        }
    }
}

#[test]
fn the_same_surroundings_make_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let image = dir.path().join(name);
        run(&options("-t ext4", &image, "16M"), &around()).unwrap();
        std::fs::read(image).unwrap()
    };
    assert!(make("a") == make("b"));
}

#[test]
fn what_is_held_or_in_use_needs_force() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    run(&options("", &image, "8M"), &around()).unwrap();
    let before = std::fs::read(&image).unwrap();
    let error = run(&options("", &image, "8M"), &around()).unwrap_err();
    assert!(error.to_string().ends_with("-F overwrites it"), "{error}");
    assert!(std::fs::read(&image).unwrap() == before);
    run(&options("-F -b 4096", &image, "8M"), &around()).unwrap();
    let held = std::fs::File::open(&image).unwrap();
    held.lock_shared().unwrap();
    assert!(matches!(run(&options("-F", &image, "8M"), &around()), Err(MkfsError::Open(_))));
}

#[test]
fn a_refusal_is_one_line_and_creates_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    for (args, text) in [
        ("-O quota", "-O quota is not supported by uext mkfs"),
        ("-E quotatype=usrquota", "-E quotatype is not supported by uext mkfs"),
        ("-d /tmp", "-d (copying a directory in) is not supported by uext mkfs"),
        ("-O nonsense", "-O: unknown feature \"nonsense\""),
        ("-O meta_bg", "the feature meta_bg and resize_inode exclude each other"),
        ("-b 3000", "invalid block size \"3000\": a power of two, 1024 to 65536"),
    ] {
        let error = run(&options(args, &image, "8M"), &around()).unwrap_err();
        assert_eq!(error.to_string(), text);
        assert!(!image.exists(), "{args}");
    }
}

/// Fails every bio from the nth write or flush on.
struct CutDevice {
    below: Arc<MemoryDevice>,
    left: Mutex<u32>,
}

impl BlockDevice for CutDevice {
    fn limits(&self) -> &QueueLimits {
        self.below.limits()
    }

    fn submit_bio(&self, bio: Bio) {
        if bio.op() != BioOp::Read {
            let mut left = self.left.lock().unwrap();
            if *left == 0 {
                return bio.end_io(Err(BlkStatus::IoErr));
            }
            *left -= 1;
        }
        self.below.submit_bio(bio);
    }
}

/// The old filesystem must be gone with the first flush and the new one appear only with the
/// last write: in between, what is mounted would be a mixture.
#[test]
fn a_cut_at_any_write_leaves_no_filesystem_or_a_whole_one() {
    let facts = DeviceFacts { bytes: 8 << 20, logical_block_size: 512 };
    let old = Options::try_parse_from(["mkfs", "-text2", "image"]).unwrap();
    let new = Options::try_parse_from(["mkfs", "-text4", "image"]).unwrap();
    let old = Params::resolve(&old, &facts, &around()).unwrap();
    let new = Params::resolve(&new, &facts, &around()).unwrap();
    let fresh = MemoryDevice::new(facts.bytes);
    format(&*fresh, &old).unwrap();
    let old_bytes = fresh.snapshot();
    let mut made = false;
    for cut in 1..1000 {
        let below = MemoryDevice::from_vec(old_bytes.clone());
        let dev = CutDevice { below: below.clone(), left: Mutex::new(cut) };
        made = format(&dev, &new).is_ok();
        let after = below.snapshot();
        match Superblock::parse(&after[1024..2048]) {
            Ok(sb) => assert!(sb.features().extents(), "the old superblock after {cut} writes"),
            Err(_) => assert!(!made),
        }
        if made {
            break;
        }
    }
    assert!(made);
}

/// A cut at any moment leaves what was there, or nothing, or a whole journal.
#[test]
fn a_journal_device_cut_short_is_the_old_filesystem_or_a_journal_or_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("old");
    std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let args = ["-q", "-F", "-t", "ext4", "-b", "1024", path.to_str().unwrap()];
    let Some(made) = judge("mke2fs", &args) else { return };
    assert!(made.status.success());
    let old = Arc::new(std::fs::read(&path).unwrap());
    let device = LogWrites::new(MemoryDevice::from_vec(old.as_ref().clone()));
    let new = NewJournal {
        block_size: 1024,
        blocks: 4096,
        uuid: uuid::Uuid::from_u128(77),
        label: b"log".to_vec(),
        now: 1_700_000_000,
    };
    journal_dev::make(&*device, &new).unwrap();
    let start = SnapshotDevice::over_vec(old.clone());
    let (mut as_before, mut nothing, mut journal) = (0, 0, 0);
    for point in device.log().crash_points(&start, CrashOptions::default()) {
        for set in UnitSet::choose(point.units().len(), 3, 8, point.index as u64) {
            let state = point.state(&set).to_vec().unwrap();
            let sb = &state[1024..2048];
            if let Ok(own) = JournalDevice::parse(sb) {
                let home = own.superblock() as usize * 1024;
                let found = JournalSuperblock::parse(&state[home..home + 1024]).unwrap();
                assert_eq!((own.uuid, found.block_count), (new.uuid, 4096));
                let rest = state[home + 1024..].iter().all(|&byte| byte == 0);
                assert!(rest, "point {}: the log is not empty", point.index);
                journal += 1;
            } else if Superblock::parse(sb).is_ok() {
                assert!(state == *old, "point {}: half of it is gone", point.index);
                as_before += 1;
            } else {
                nothing += 1;
            }
        }
    }
    println!("{as_before} as before, {nothing} nothing, {journal} a journal");
    assert!(as_before > 0 && nothing > 0 && journal > 0);
}
