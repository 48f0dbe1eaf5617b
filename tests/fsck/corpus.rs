//! The damaged images of e2fsprogs' own tests. They are not part of the
//! project; `UEXT_CORPUS` says where they are.

use std::path::PathBuf;
use std::process::Command;

use uext_tests::scratch::Scratch;

use crate::{ours, theirs};

fn corpus() -> Option<PathBuf> {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/corpus");
    let root = std::env::var_os("UEXT_CORPUS").map_or_else(|| beside.into(), PathBuf::from);
    Some(root.join("fsck")).filter(|dir| dir.join("INDEX.md").exists())
}

/// Kind and name of every image of the index.
fn images(index: &str) -> Vec<(&str, &str)> {
    let rows = index.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| ")?.split('|').map(str::trim);
        Some((cells.next()?, cells.next()?))
    });
    rows.filter(|(kind, _)| matches!(*kind, "ext2" | "ext3" | "ext4" | "exotic")).collect()
}

#[test]
fn verdicts_on_damaged_images_are_those_of_e2fsck() {
    uext_tests::require!("e2fsck", "gzip");
    let Some(dir) = corpus() else {
        {
            use std::io::Write as _;
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: no corpus of damaged images; set UEXT_CORPUS to its directory"
            );
        }
        return;
    };
    let index = std::fs::read_to_string(dir.join("INDEX.md")).expect("read the index");
    let scratch = Scratch::new();
    let image = scratch.path().join("image");
    let (mut differ, mut exotic, mut judged) = (Vec::new(), Vec::new(), 0);
    for (kind, name) in images(&index) {
        let packed = dir.join(format!("{name}.img.gz"));
        let unpack = Command::new("gzip").arg("-dc").arg(packed).output().expect("run gzip");
        std::fs::write(&image, unpack.stdout).expect("write the image");
        let before = std::fs::read(&image).expect("read the image");
        let (outcome, _) = ours(&image);
        assert!(std::fs::read(&image).expect("read the image") == before, "{name} was changed");
        judged += 1;
        if (outcome.exit == 0) != theirs(&image).0 {
            if kind == "exotic" { &mut exotic } else { &mut differ }.push(name);
        }
    }
    eprintln!("{judged} images, other verdicts: {differ:?}, on exotic ones: {exotic:?}");
    assert!(judged > 100, "the index lists {judged} images");
    assert!(differ.is_empty(), "{differ:?}");
}
