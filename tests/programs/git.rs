//! git: clone, fsck, gc, many small files and renames.

use std::fs;

use uext_tests::require;
use uext_tests::scratch::Kind;
use uext_tests::tree::Rng;

use crate::{EXT4, Mounted, run_git, workspace};

fn clone_check_and_collect(kind: Kind) {
    let mut mounted = Mounted::new(kind, 256);
    let source = mounted.outside().join("source");
    if workspace().join(".git").exists() {
        let from = workspace().to_string_lossy();
        run_git(mounted.outside(), &["clone", "-q", "--bare", &from, "source"]);
    } else {
        make_repository(&source);
    }
    let from = source.to_string_lossy();
    // The transport copies objects; a plain local clone would only try to link them.
    run_git(mounted.path(), &["clone", "-q", "--no-local", &from, "clone"]);
    let clone = mounted.path().join("clone");
    let head = run_git(&clone, &["rev-parse", "HEAD"]);
    run_git(&clone, &["fsck", "--full"]);
    fs::write(clone.join("a new file"), "text").expect("write");
    run_git(&clone, &["add", "-A"]);
    run_git(&clone, &["commit", "-q", "-m", "More"]);
    run_git(&clone, &["gc", "-q", "--prune=now"]);
    mounted.check_and_remount();
    run_git(&clone, &["fsck", "--full"]);
    assert_eq!(run_git(&clone, &["rev-parse", "HEAD~1"]), head);
    assert_eq!(run_git(&clone, &["status", "--porcelain"]), "");
    mounted.finish();
}

/// A repository of some hundred files and a few commits.
fn make_repository(dir: &std::path::Path) {
    fs::create_dir(dir).expect("mkdir");
    run_git(dir, &["init", "-q"]);
    let mut rng = Rng(11);
    for commit in 0..5 {
        for i in 0..60 {
            let below = dir.join(format!("dir-{}", i % 7));
            fs::create_dir_all(&below).expect("mkdir");
            let len = rng.below(20_000) as usize;
            fs::write(below.join(format!("file-{i}")), rng.bytes(len)).expect("write");
        }
        run_git(dir, &["add", "-A"]);
        run_git(dir, &["commit", "-q", "-m", &format!("Commit {commit}")]);
    }
}

#[test]
fn git_clones_checks_and_collects_on_ext4() {
    require!("git", "mke2fs", "e2fsck");
    clone_check_and_collect(EXT4);
}

#[test]
fn git_clones_checks_and_collects_on_ext3_with_small_blocks() {
    require!("git", "mke2fs", "e2fsck");
    clone_check_and_collect(Kind { fs: "ext3", block_size: 1024 });
}
