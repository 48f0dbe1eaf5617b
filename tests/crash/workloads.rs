//! What is done before the power fails. Each is short, so that most of its cuts are tested.

use crate::recorder::Recorder;

/// A workload.
type Work = fn(&mut Recorder);

/// The workload of a name.
pub fn find(name: &str) -> Option<Work> {
    ALL.iter().find(|(one, _)| *one == name).map(|(_, work)| *work)
}

/// All of them.
const ALL: &[(&str, Work)] = &[
    ("create_and_fsync", create_and_fsync),
    ("rename_across_directories", rename_across_directories),
    ("replace_by_rename", replace_by_rename),
    ("unlink_while_open", unlink_while_open),
    ("truncate_and_extend", truncate_and_extend),
    ("append_and_fsync", append_and_fsync),
    ("many_small_files", many_small_files),
    ("attributes_and_acls", attributes_and_acls),
    ("growing_directory", growing_directory),
    ("links", links),
    ("delete_and_reuse", delete_and_reuse),
    ("deep_extents", deep_extents),
    ("made_during_commits", made_during_commits),
    ("written_in_place", written_in_place),
    ("blocks_like_the_journals", blocks_like_the_journals),
    ("delete_and_reuse_small", delete_and_reuse_small),
    ("log_that_wraps", log_that_wraps),
    ("long_extents", long_extents),
    ("large_writes", large_writes),
];

/// Files that are made, written and synced one by one.
pub fn create_and_fsync(fs: &mut Recorder) {
    fs.mkdir("d");
    for i in 0..12 {
        let path = format!("d/file-{i}");
        fs.create(&path);
        fs.write(&path, 0, 500 + i * 1700);
        fs.create(&format!("d/unsynced-{i}"));
        fs.append(&format!("d/unsynced-{i}"), 3000);
        if i % 3 == 2 {
            fs.fdatasync(&path);
        } else {
            fs.fsync(&path);
        }
    }
}

/// Directories and files that move between directories.
pub fn rename_across_directories(fs: &mut Recorder) {
    for i in 0..4 {
        fs.mkdir(&format!("d{i}"));
        fs.mkdir(&format!("d{i}/sub"));
        fs.create(&format!("d{i}/sub/file"));
        fs.append(&format!("d{i}/sub/file"), 5000);
    }
    fs.sync();
    for round in 0..6 {
        let (a, b) = (round % 4, (round + 1) % 4);
        fs.rename(&format!("d{a}/sub"), &format!("d{b}/moved-{round}"));
        fs.rename(&format!("d{b}/moved-{round}/file"), &format!("d{a}/file-{round}"));
        fs.fsync(&format!("d{a}/file-{round}"));
        fs.rename(&format!("d{b}/moved-{round}"), &format!("d{a}/sub"));
        fs.create(&format!("d{a}/sub/file"));
        fs.append(&format!("d{a}/sub/file"), 100 + round * 1000);
        fs.mkdir(&format!("d{a}/gone-{round}"));
        fs.sync();
        fs.rmdir(&format!("d{a}/gone-{round}"));
    }
}

/// A file replaced by a new one that was never synced.
pub fn replace_by_rename(fs: &mut Recorder) {
    fs.create("config");
    fs.append("config", 9000);
    fs.sync();
    for i in 0..10 {
        fs.create("config.new");
        fs.append("config.new", 3000 + i * 2500);
        fs.rename("config.new", "config");
        if i % 4 == 1 {
            fs.sync();
        }
        fs.create(&format!("log-{i}"));
        fs.fsync(&format!("log-{i}"));
    }
}

/// Files that are used after their last name is gone.
pub fn unlink_while_open(fs: &mut Recorder) {
    fs.create("journal");
    let mut open = Vec::new();
    for i in 0..8 {
        let path = format!("tmp-{i}");
        fs.create(&path);
        fs.append(&path, 4096 * (i + 1) + 7);
        fs.fsync(&path);
        fs.hold(&path);
        fs.append("journal", 100);
        fs.fsync("journal");
        let held = format!("@{path}");
        fs.write(&held, 2000, 6000);
        fs.fsync(&held);
        open.push(held);
        if i % 2 == 1 {
            fs.close(&open.remove(0));
            fs.append("journal", 10);
            fs.fsync("journal");
        }
    }
    open.iter().for_each(|held| fs.close(held));
    fs.sync();
}

/// Sizes that go up and down.
pub fn truncate_and_extend(fs: &mut Recorder) {
    for path in ["a", "b"] {
        fs.create(path);
        fs.append(path, 90_000);
    }
    fs.sync();
    let sizes = [50_000, 4096, 120_000, 119_999, 1, 0, 70_001, 8192];
    for (i, size) in sizes.into_iter().enumerate() {
        fs.truncate("a", size);
        fs.append("b", 300);
        fs.fsync(if i % 2 == 0 { "b" } else { "a" });
        fs.append("a", 6000);
        fs.truncate("b", size / 2 + 1);
        if i % 3 == 0 {
            fs.sync();
        }
    }
    // Past the direct blocks, and back.
    fs.write("a", 5_000_000, 9000);
    fs.fsync("a");
    fs.truncate("a", 10_000);
    fs.sync();
}

/// A log file.
pub fn append_and_fsync(fs: &mut Recorder) {
    fs.create("log");
    for i in 0..40 {
        fs.append("log", 17 + i * 61 % 2900);
        if i % 5 == 4 { fs.fdatasync("log") } else { fs.fsync("log") }
    }
}

/// Small files in a few directories, all synced together.
pub fn many_small_files(fs: &mut Recorder) {
    for round in 0..4 {
        fs.mkdir(&format!("r{round}"));
        for i in 0..40 {
            let path = format!("r{round}/{i}");
            fs.create(&path);
            let len = fs.below(3000) as usize;
            fs.append(&path, len);
        }
        fs.sync();
        for i in (0..40).step_by(3) {
            fs.unlink(&format!("r{round}/{i}"));
        }
    }
    fs.sync();
}

/// Attributes in the inode, in a block, shared blocks, and ACLs that are inherited.
pub fn attributes_and_acls(fs: &mut Recorder) {
    fs.mkdir("d");
    fs.set_acl("d", true);
    for i in 0..8 {
        let path = format!("d/f{i}");
        fs.create(&path);
        fs.set_xattr(&path, "user.small", 20, i);
        // The same large value: one block for several files.
        fs.set_xattr(&path, "user.large", 700, 99);
        fs.fsync(&path);
        fs.set_xattr(&path, "user.own", 100, 100 + i);
        fs.set_acl(&path, false);
        fs.chmod(&path, 0o640 + i as u32);
        if i > 2 {
            fs.remove_xattr(&format!("d/f{}", i - 1), "user.large");
            fs.unlink(&format!("d/f{}", i - 3));
        }
        if i % 3 == 0 {
            fs.sync();
        }
    }
    fs.mkdir("d/heir");
    fs.fsync("d/heir");
}

/// A directory that becomes an index, of more than one level of blocks, and shrinks.
pub fn growing_directory(fs: &mut Recorder) {
    fs.mkdir("big");
    fs.create("anchor");
    for i in 0..260 {
        fs.link("anchor", &format!("big/{i:03}-{}", "n".repeat(60)));
        if i % 40 == 39 {
            fs.fsync("big");
        }
    }
    for i in (0..260).step_by(2) {
        fs.unlink(&format!("big/{i:03}-{}", "n".repeat(60)));
    }
    fs.fsync("big");
}

/// Hard links and symbolic links, short and long.
pub fn links(fs: &mut Recorder) {
    fs.mkdir("d");
    for i in 0..8 {
        let file = format!("file-{i}");
        fs.create(&file);
        fs.append(&file, 5000);
        fs.link(&file, &format!("d/link-{i}"));
        fs.symlink(&format!("d/short-{i}"), 9);
        fs.symlink(&format!("d/long-{i}"), 100 + i * 450);
        fs.fsync(&file);
        fs.unlink(&file);
        fs.rename(&format!("d/long-{i}"), "d/long");
        fs.fsync(&format!("d/link-{i}"));
        if i % 2 == 0 {
            fs.unlink(&format!("d/link-{i}"));
        }
    }
    fs.sync();
}

/// Metadata blocks (directories, mapping, attributes) that are freed and become data.
pub fn delete_and_reuse(fs: &mut Recorder) {
    for round in 0..5 {
        let dir = format!("dir-{round}");
        fs.mkdir(&dir);
        for i in 0..6 {
            fs.mkdir(&format!("{dir}/{i}"));
        }
        fs.create(&format!("{dir}/sparse"));
        for i in 0..6 {
            fs.write(&format!("{dir}/sparse"), i * 900_000, 2000);
        }
        fs.sync();
        for i in 0..6 {
            fs.rmdir(&format!("{dir}/{i}"));
        }
        fs.unlink(&format!("{dir}/sparse"));
        fs.rmdir(&dir);
        fs.create(&format!("data-{round}"));
        fs.fsync(&format!("data-{round}"));
        fs.append(&format!("data-{round}"), 150_000);
        fs.fsync(&format!("data-{round}"));
        if round > 1 {
            fs.unlink(&format!("data-{}", round - 2));
        }
    }
    fs.sync();
}

/// A tree of extents with two levels of blocks, and back.
pub fn deep_extents(fs: &mut Recorder) {
    fs.create("deep");
    for i in 0..380 {
        fs.write("deep", i * 2048, 1000);
        if i % 95 == 94 {
            fs.fsync("deep");
        }
    }
    for i in (0..380).step_by(19) {
        fs.write("deep", i * 2048 + 1024, 1000);
    }
    fs.fsync("deep");
    fs.truncate("deep", 300_000);
    fs.sync();
    fs.truncate("deep", 2000);
    fs.append("deep", 5000);
    fs.fsync("deep");
}

/// Blocks that are written again between changes of names: with journalled data both are of
/// one moment. The log goes round first, so that no replay writes them as they were.
pub fn written_in_place(fs: &mut Recorder) {
    for path in ["a", "b"] {
        fs.create(path);
        fs.append(path, 9000);
    }
    for i in 0..6 {
        fs.create(&format!("round-{i}"));
        fs.append(&format!("round-{i}"), 250_000);
        fs.sync();
    }
    for i in 0..5 {
        fs.mkdir(&format!("d{i}"));
        fs.write("a", 1000, 5000);
        fs.create(&format!("d{i}/f"));
        fs.write("b", 4096, 4096);
        if i % 2 == 0 { fs.fsync("a") } else { fs.sync() }
    }
}

/// Directories made by one thread while another's commit is on its way.
pub fn made_during_commits(fs: &mut Recorder) {
    // The first commit of a mount writes a block before it copies any: what changes
    // then must not reach the log with it.
    fs.chmod("", 0o750);
    fs.during("meanwhile", "");
    fs.mkdir("d");
    for i in 0..3 {
        fs.create(&format!("d/old-{i}"));
        fs.append(&format!("d/old-{i}"), 3000);
    }
    fs.sync();
    for i in 0..6 {
        fs.rename(&format!("d/old-{}", i % 3), &format!("d/other-{i}"));
        fs.during(&format!("d/meanwhile-{i}"), "d");
        fs.rename(&format!("d/other-{i}"), &format!("d/old-{}", i % 3));
        fs.append(&format!("d/old-{}", i % 3), 2000);
        fs.fsync(&format!("d/old-{}", i % 3));
    }
}

/// Blocks that look like the journal's own.
pub fn blocks_like_the_journals(fs: &mut Recorder) {
    for i in 0..4 {
        fs.magic_symlink(&format!("like-{i}"));
        fs.create(&format!("file-{i}"));
        fs.fsync(&format!("file-{i}"));
    }
}

/// The same with small blocks.
pub fn delete_and_reuse_small(fs: &mut Recorder) {
    delete_and_reuse(fs);
}

/// More metadata than the log holds: checkpoints move its tail while work goes on.
pub fn log_that_wraps(fs: &mut Recorder) {
    for round in 0..36 {
        let dir = format!("w{round}");
        fs.mkdir(&dir);
        for i in 0..30 {
            fs.mkdir(&format!("{dir}/{i}"));
        }
        fs.create(&format!("{dir}/file"));
        fs.append(&format!("{dir}/file"), 3000);
        fs.fsync(&format!("{dir}/file"));
        if round > 2 {
            let old = format!("w{}", round - 3);
            for i in 0..30 {
                fs.rmdir(&format!("{old}/{i}"));
            }
            fs.rename(&format!("{old}/file"), &format!("kept-{round}"));
            fs.rmdir(&old);
        }
    }
    fs.sync();
}

/// A file of many extents, one large one, and holes that are filled.
pub fn long_extents(fs: &mut Recorder) {
    fs.create("large");
    fs.append("large", 1_500_000);
    fs.fsync("large");
    fs.create("pieces");
    for i in 0..40 {
        fs.write("pieces", i * 12_288, 3000);
        if i % 10 == 9 {
            fs.fsync("pieces");
        }
    }
    for i in 0..20 {
        fs.write("pieces", i * 24_576 + 4096, 4096);
    }
    fs.fsync("pieces");
    fs.truncate("pieces", 100_000);
    fs.append("large", 400_000);
    fs.fsync("large");
    fs.unlink("pieces");
    fs.sync();
}

/// Writes of many pages, which go past the cache, between small ones, which do not: behind the
/// end, over it, over what is there, over holes and cached pages, and into freed blocks.
pub fn large_writes(fs: &mut Recorder) {
    fs.create("log");
    for i in 0..3 {
        fs.create(&format!("big-{i}"));
        fs.write(&format!("big-{i}"), 0, 262_144);
        if i == 1 {
            fs.fsync("big-1");
        }
        fs.append("log", 300);
        fs.fsync("log");
    }
    fs.append("big-0", 5000);
    fs.write("big-0", 274_432, 266_240);
    fs.fdatasync("big-0");
    fs.write("big-0", 4096, 262_144);
    fs.write("big-1", 524_288, 270_000);
    fs.append("log", 200);
    fs.sync();
    fs.write("big-1", 262_144, 262_144);
    fs.truncate("big-1", 300_000);
    fs.fsync("log");
    fs.unlink("big-2");
    fs.sync();
    fs.create("again");
    fs.append("again", 3000);
    fs.write("again", 4096, 262_144);
    fs.fsync("log");
    fs.write("again", 0, 266_240);
    fs.fsync("again");
}
