//! Journals that e2fsprogs' own tests damage. They are not part of the project;
//! `UEXT_CORPUS` says where they are.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use uext_tests::mounts::{KernelMount, UextMount, unmount};
use uext_tests::require;
use uext_tests::scratch::Scratch;
use uext_tests::tree::{assert_same, listing};

use crate::{EXIT_FAILURE, try_mount};

fn corpus() -> Option<PathBuf> {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/corpus");
    let root = std::env::var_os("UEXT_CORPUS").map_or_else(|| beside.into(), PathBuf::from);
    Some(root.join("journal")).filter(|dir| dir.is_dir())
}

fn unpack(packed: &Path, to: &Path) {
    let program = if packed.extension().is_some_and(|ext| ext == "bz2") { "bzip2" } else { "gzip" };
    let output = Command::new(program).arg("-dc").arg(packed).output().expect("unpack");
    assert!(output.status.success(), "{program} {}", packed.display());
    fs::write(to, output.stdout).expect("write the image");
}

fn e2fsck(image: &Path) -> Option<i32> {
    Command::new("e2fsck").arg("-fy").arg(image).output().expect("run e2fsck").status.code()
}

/// Each image ends with the tree that e2fsck leaves, or is refused in one line and stays as it is.
#[test]
fn damaged_journals_are_replayed_as_by_e2fsck_or_refused() {
    require!("e2fsck", "gzip", "bzip2");
    let Some(dir) = corpus() else {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: no corpus of damaged journals; set UEXT_CORPUS to its directory"
        );
        return;
    };
    let scratch = Scratch::new();
    let mnt = scratch.mount_point("mnt");
    let (ours, theirs) = (scratch.path().join("ours.img"), scratch.path().join("theirs.img"));
    let tree = |image: &Path| -> BTreeMap<PathBuf, String> {
        let mount = KernelMount::new(image, &mnt, "ro");
        let tree = listing(&mnt);
        mount.unmount();
        tree
    };
    let mut packed: Vec<PathBuf> = fs::read_dir(&dir)
        .expect("list the corpus")
        .map(|entry| entry.expect("entry").path())
        .collect();
    packed.sort();
    let (mut same, mut refused) = (0, 0);
    for image in &packed {
        unpack(image, &ours);
        let before = fs::read(&ours).expect("read");
        let output = try_mount(&ours, &mnt, "");
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(EXIT_FAILURE), "{text}");
            assert_eq!(text.lines().count(), 1, "not one line: {text}");
            eprintln!("{}: {}", image.display(), text.trim_end());
            refused += 1;
            continue;
        }
        unmount(Command::new(uext_tests::uext()).arg("umount").arg(&mnt));
        unpack(image, &theirs);
        assert!(e2fsck(&theirs) < Some(2));
        let want = tree(&theirs);
        assert_same(&want, &tree(&ours));
        // What else was wrong with it is there to be found still, and costs nothing.
        assert!(e2fsck(&ours) < Some(2));
        assert_same(&want, &tree(&ours));
        fs::write(&ours, &before).expect("write");
        let mount = UextMount::new(&ours, &mnt, "ro");
        assert_same(&want, &listing(&mnt));
        mount.unmount();
        assert!(before == fs::read(&ours).expect("read"), "a read-only mount wrote");
        same += 1;
    }
    eprintln!("{same} journals replayed as by e2fsck, {refused} refused");
    assert!(same >= 5 && same + refused == packed.len());
}
