//! The search of a lookup is kept for the change that follows: it must not outlive any change of
//! the directory, nor serve another. Judged by the answers, e2fsck and a listing.
#![allow(clippy::unwrap_used, missing_docs)]

mod names_common;

use std::collections::BTreeSet;
use std::sync::Arc;

use names_common::{Image, ROOT, Random, list, look, mkdir, touch};
use uext_ext4::Ext4;
use uext_vfs::{Errno, FileSystem, Ino, RenameFlags};

const PLAIN: RenameFlags = RenameFlags::empty();
/// Enough names for an index, with blocks of 1 KiB.
const SIZES: [u32; 2] = [3, 500];

struct Dirs {
    image: Image,
    fs: Arc<Ext4>,
    dir: Ino,
    other: Ino,
}

/// Two directories, of one place in the table of searches or not, with names of their own, and
/// files `there` in the first and `file`, `from` in the second.
fn dirs(names: u32) -> Dirs {
    let image = Image::new(32, &["-t", "ext4", "-b", "1024", "-N", "4000"]);
    let fs = image.mount();
    let [dir, other] = [b"a", b"b"].map(|name| mkdir(&fs, fs.root(), name).unwrap().attr.ino);
    for dir in [dir, other] {
        for n in 0..names {
            touch(&fs, dir, format!("own-{n}").as_bytes()).unwrap();
        }
    }
    touch(&fs, dir, b"there").unwrap();
    mkdir(&fs, dir, b"below").unwrap();
    touch(&fs, other, b"file").unwrap();
    touch(&fs, other, b"from").unwrap();
    Dirs { image, fs, dir, other }
}

type Change = fn(&Dirs) -> uext_vfs::Result<()>;

#[test]
fn a_name_made_after_it_was_not_found_is_there() {
    let changes: [Change; 7] = [
        |d| touch(&d.fs, d.dir, b"x").map(drop),
        |d| mkdir(&d.fs, d.dir, b"x").map(drop),
        |d| d.fs.symlink(&ROOT, d.dir, b"x", b"target").map(drop),
        |d| {
            let file = look(&d.fs, d.other, b"file")?.attr.ino;
            d.fs.link(&ROOT, file, d.dir, b"x").map(drop)
        },
        |d| d.fs.rename(&ROOT, (d.dir, b"there"), (d.dir, b"x"), PLAIN),
        |d| d.fs.rename(&ROOT, (d.other, b"from"), (d.dir, b"x"), PLAIN),
        |d| {
            let whiteout = RenameFlags::WHITEOUT;
            d.fs.rename(&ROOT, (d.dir, b"there"), (d.dir, b"x"), whiteout)
        },
    ];
    for (n, change) in changes.into_iter().enumerate() {
        for names in SIZES {
            let d = dirs(names);
            assert_eq!(look(&d.fs, d.dir, b"x").unwrap_err(), Errno::ENOENT);
            change(&d).unwrap();
            assert_eq!(touch(&d.fs, d.dir, b"x").unwrap_err(), Errno::EEXIST, "change {n}");
            d.image.check(&d.fs);
        }
    }
}

#[test]
fn a_name_that_went_after_it_was_found_is_gone() {
    let changes: [Change; 4] = [
        |d| d.fs.unlink(&ROOT, d.dir, b"there").map(drop),
        |d| d.fs.rename(&ROOT, (d.dir, b"there"), (d.dir, b"y"), PLAIN),
        |d| d.fs.rename(&ROOT, (d.dir, b"there"), (d.other, b"y"), PLAIN),
        |d| d.fs.rename(&ROOT, (d.dir, b"there"), (d.other, b"from"), PLAIN),
    ];
    for (n, change) in changes.into_iter().enumerate() {
        for names in SIZES {
            let d = dirs(names);
            look(&d.fs, d.dir, b"there").unwrap();
            change(&d).unwrap();
            let again = d.fs.unlink(&ROOT, d.dir, b"there");
            assert_eq!(again.map(drop), Err(Errno::ENOENT), "change {n}");
            d.image.check(&d.fs);
        }
    }
    let d = dirs(3);
    look(&d.fs, d.dir, b"below").unwrap();
    d.fs.rmdir(&ROOT, d.dir, b"below").unwrap();
    assert_eq!(d.fs.rmdir(&ROOT, d.dir, b"below").map(drop), Err(Errno::ENOENT));
    d.image.check(&d.fs);
}

#[test]
fn an_exchanged_name_is_removed_with_its_new_inode() {
    for names in SIZES {
        let d = dirs(names);
        let there = look(&d.fs, d.dir, b"there").unwrap().attr.ino;
        let exchange = RenameFlags::EXCHANGE;
        d.fs.rename(&ROOT, (d.dir, b"there"), (d.other, b"from"), exchange).unwrap();
        d.fs.unlink(&ROOT, d.dir, b"there").unwrap();
        let left = look(&d.fs, d.other, b"from").unwrap().attr;
        assert_eq!((left.ino, left.nlink), (there, 1));
        d.image.check(&d.fs);
    }
}

/// What room a search saw may be taken, moved or in another directory's block by the time a
/// name is made: each name is looked up, others are made and removed, then it is made.
#[test]
fn room_that_was_taken_meanwhile_is_not_used() {
    let mut random = Random(7);
    let d = dirs(3);
    let mut there = [BTreeSet::new(), BTreeSet::new()];
    for (set, dir) in there.iter_mut().zip([d.dir, d.other]) {
        set.extend(list(&d.fs, dir, 100).into_keys());
    }
    for n in 0..2000 {
        let at = random.below(2) as usize;
        let dir = [d.dir, d.other][at];
        let name = format!("{n}-{}", "n".repeat(random.below(40) as usize)).into_bytes();
        assert_eq!(look(&d.fs, dir, &name).unwrap_err(), Errno::ENOENT);
        for m in 0..random.below(4) {
            let at = random.below(2) as usize;
            let dir = [d.dir, d.other][at];
            if random.below(2) == 0 {
                let other = format!("{n}+{m}").into_bytes();
                touch(&d.fs, dir, &other).unwrap();
                there[at].insert(other);
            } else if let Some(victim) = there[at].iter().find(|name| name[0] != b'b').cloned() {
                look(&d.fs, dir, &victim).unwrap();
                d.fs.unlink(&ROOT, dir, &victim).unwrap();
                there[at].remove(&victim);
            }
        }
        touch(&d.fs, dir, &name).unwrap();
        there[at].insert(name);
    }
    for (set, dir) in there.iter().zip([d.dir, d.other]) {
        assert!(list(&d.fs, dir, 100).into_keys().eq(set.iter().cloned()));
    }
    d.image.check(&d.fs);
}

/// The number of a removed directory is given out again: what was kept for the old one is not
/// the new one's.
#[test]
fn a_new_directory_with_an_old_number_has_no_search() {
    let d = dirs(3);
    let old = mkdir(&d.fs, d.fs.root(), b"old").unwrap().attr.ino;
    touch(&d.fs, old, b"name").unwrap();
    d.fs.unlink(&ROOT, old, b"name").unwrap();
    assert_eq!(look(&d.fs, old, b"name").unwrap_err(), Errno::ENOENT);
    d.fs.rmdir(&ROOT, d.fs.root(), b"old").unwrap();
    d.fs.forget(old, 1);
    let new = mkdir(&d.fs, d.fs.root(), b"new").unwrap().attr.ino;
    assert_eq!(new, old, "the number is the old one's, or the test shows nothing");
    touch(&d.fs, new, b"name").unwrap();
    assert_eq!(touch(&d.fs, new, b"name").unwrap_err(), Errno::EEXIST);
    d.image.check(&d.fs);
}
