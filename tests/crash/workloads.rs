//! What is done before the power fails. Each is short, so that most of its cuts are tested.

use crate::recorder::Recorder;

/// Files that are made, written and synced one by one.
pub fn create_and_fsync(fs: &mut Recorder) {
    fs.mkdir("d");
    for i in 0..12 {
        let path = format!("d/file-{i}");
        fs.create(&path);
        let data = fs.bytes(500 + i * 1700);
        fs.write(&path, 0, &data);
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
        let object = fs.unlink_open(&path);
        fs.append("journal", 100);
        fs.fsync("journal");
        let data = fs.bytes(6000);
        fs.write_object(object, 2000, &data);
        fs.fsync_object(object);
        open.push(object);
        if i % 2 == 1 {
            fs.close(open.remove(0));
            fs.append("journal", 10);
            fs.fsync("journal");
        }
    }
    open.into_iter().for_each(|object| fs.close(object));
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
    let data = fs.bytes(9000);
    fs.write("a", 5_000_000, &data);
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

/// An ACL of these entries: tag, permissions, id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut out = 2u32.to_le_bytes().to_vec();
    for &(tag, perm, id) in entries {
        out.extend(tag.to_le_bytes());
        out.extend(perm.to_le_bytes());
        out.extend(id.to_le_bytes());
    }
    out
}

/// Attributes in the inode, in a block, shared blocks, and ACLs that are inherited.
pub fn attributes_and_acls(fs: &mut Recorder) {
    let none = u32::MAX;
    let list = [(1, 7, none), (2, 6, 1234), (4, 5, none), (16, 7, none), (32, 4, none)];
    fs.mkdir("d");
    fs.set_xattr("d", "system.posix_acl_default", &acl(&list));
    for i in 0..8 {
        let path = format!("d/f{i}");
        fs.create(&path);
        fs.set_xattr(&path, "user.small", &[i as u8; 20]);
        // The same large value: one block for several files.
        fs.set_xattr(&path, "user.large", &[b'x'; 700]);
        fs.fsync(&path);
        fs.set_xattr(&path, "user.own", format!("{i}").repeat(100).as_bytes());
        fs.set_xattr(&path, "system.posix_acl_access", &acl(&list));
        fs.chmod(&path, 0o640 + i);
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
        fs.symlink(&format!("d/short-{i}"), "../target");
        fs.symlink(&format!("d/long-{i}"), &"long/".repeat(20 + i * 90));
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
            let data = fs.bytes(2000);
            fs.write(&format!("{dir}/sparse"), i * 900_000, &data);
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
        let data = fs.bytes(3000);
        fs.write("pieces", i * 12_288, &data);
        if i % 10 == 9 {
            fs.fsync("pieces");
        }
    }
    for i in 0..20 {
        let data = fs.bytes(4096);
        fs.write("pieces", i * 24_576 + 4096, &data);
    }
    fs.fsync("pieces");
    fs.truncate("pieces", 100_000);
    fs.append("large", 400_000);
    fs.fsync("large");
    fs.unlink("pieces");
    fs.sync();
}
