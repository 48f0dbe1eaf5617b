//! Directories and names against e2fsck, debugfs and a model.
#![allow(clippy::unwrap_used, missing_docs)]

mod names_common;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use names_common::{Image, ROOT, Random, list, list_some, look, mkdir, touch};
use uext_ext4::Ext4;
use uext_ondisk::dirhash::{DirHasher, HashFunction, HashVersion};
use uext_vfs::{Errno, FileKind, FileSystem, Ino, RenameFlags};

const PLAIN: RenameFlags = RenameFlags::empty();

fn file_name(number: u32) -> Vec<u8> {
    format!("file-{}{number:07}", if number.is_multiple_of(3) { "é" } else { "" }).into_bytes()
}

fn many(fs: &Ext4, dir: Ino, count: u32) {
    for number in 0..count {
        touch(fs, dir, &file_name(number)).unwrap();
    }
}

#[test]
fn names_are_made_found_listed_and_removed_in_every_kind_of_directory() {
    let kinds: [&[&str]; 6] = [
        &["-t", "ext2", "-b", "1024"],
        &["-t", "ext3", "-b", "4096"],
        &["-t", "ext4", "-b", "1024"],
        &["-t", "ext4", "-b", "4096"],
        &["-t", "ext4", "-b", "2048", "-O", "^metadata_csum,^64bit"],
        &["-t", "ext2", "-b", "1024", "-O", "^filetype,^dir_index"],
    ];
    for kind in kinds {
        fill_and_empty(&Image::new(32, &[kind, &["-N", "4000"]].concat()));
    }
}

#[test]
fn every_hash_serves_an_index() {
    for function in ["legacy", "half_md4", "tea"] {
        for unsigned in [false, true] {
            let args = ["-t", "ext4", "-b", "1024", "-N", "4000"];
            fill_and_empty(&Image::hashed(32, &args, function, unsigned));
        }
    }
}

/// Makes, finds, lists and removes names, some of them beyond ASCII.
fn fill_and_empty(image: &Image) {
    {
        let fs = image.mount();
        let dir = mkdir(&fs, fs.root(), b"dir").unwrap().attr.ino;
        many(&fs, dir, 2000);
        assert_eq!(touch(&fs, dir, &file_name(100)).unwrap_err(), Errno::EEXIST);
        let names = list(&fs, dir, 7);
        assert_eq!(names.len(), 2000);
        for (name, ino) in &names {
            assert_eq!(look(&fs, dir, name).unwrap().attr.ino, *ino);
        }
        assert_eq!(look(&fs, dir, b"nothing").unwrap_err(), Errno::ENOENT);
        for number in (0..2000).step_by(2) {
            fs.unlink(&ROOT, dir, &file_name(number)).unwrap();
        }
        assert_eq!(list(&fs, dir, 100).len(), 1000);
        assert_eq!(fs.rmdir(&ROOT, fs.root(), b"dir").unwrap_err(), Errno::ENOTEMPTY);
        for number in (1..2000).step_by(2) {
            fs.unlink(&ROOT, dir, &file_name(number)).unwrap();
        }
        fs.rmdir(&ROOT, fs.root(), b"dir").unwrap();
        assert_eq!(look(&fs, fs.root(), b"dir").unwrap_err(), Errno::ENOENT);
        image.check(&fs);
    }
}

#[test]
fn an_index_grows_by_a_level_and_debugfs_reads_it() {
    let image = Image::new(96, &["-t", "ext4", "-b", "1024", "-N", "70000"]);
    let fs = image.mount();
    let dir = mkdir(&fs, fs.root(), b"dir").unwrap().attr.ino;
    // Long names fill leaves soon; the root of 1 KiB holds 122 of them.
    let name = |number: u32| format!("{number:0100}").into_bytes();
    for number in 0..6000 {
        touch(&fs, dir, &name(number)).unwrap();
    }
    for number in 0..6000 {
        look(&fs, dir, &name(number)).unwrap();
    }
    assert_eq!(list(&fs, dir, 50).len(), 6000);
    image.check(&fs);
    let dump = image.debugfs("htree_dump /dir");
    assert!(dump.contains("Indirect levels: 1"), "{}", &dump[..dump.len().min(500)]);
}

#[test]
fn a_large_directory_is_listed_while_it_is_emptied() {
    let image = Image::new(256, &["-t", "ext4", "-b", "4096", "-N", "120000"]);
    let fs = image.mount();
    let dir = mkdir(&fs, fs.root(), b"dir").unwrap().attr.ino;
    many(&fs, dir, 100_000);
    assert_eq!(fs.getattr(&ROOT, dir).unwrap().nlink, 2);
    let (mut offset, mut removed) = (0, 0);
    loop {
        let reply = list_some(&fs, dir, offset, 500);
        let Some(last) = reply.last() else { break };
        offset = last.2;
        for (name, _, _) in &reply {
            if name.starts_with(b"file-") {
                fs.unlink(&ROOT, dir, name).unwrap();
                removed += 1;
            }
        }
    }
    assert_eq!(removed, 100_000);
    fs.rmdir(&ROOT, fs.root(), b"dir").unwrap();
    image.check(&fs);
}

#[test]
fn entries_that_stay_are_listed_once_whatever_happens_around_them() {
    for (args, seed) in [("half_md4", 11u64), ("legacy", 12), ("tea", 13)] {
        let image = Image::hashed(32, &["-t", "ext4", "-b", "1024", "-N", "9000"], args, false);
        let fs = image.mount();
        let dir = mkdir(&fs, fs.root(), b"dir").unwrap().attr.ino;
        let mut random = Random(seed);
        // It begins in one block and becomes indexed while it is listed.
        for number in 0..12 {
            touch(&fs, dir, format!("stay-{number}").as_bytes()).unwrap();
        }
        let (mut offset, mut seen, mut made) = (0, BTreeMap::new(), 0);
        loop {
            let reply = list_some(&fs, dir, offset, 2);
            let Some(last) = reply.last() else { break };
            offset = last.2;
            for (name, _, _) in &reply {
                *seen.entry(name.clone()).or_insert(0) += 1;
            }
            for _ in 0..20 {
                if made < 3000 {
                    touch(&fs, dir, format!("come-{made}").as_bytes()).unwrap();
                    made += 1;
                }
                let gone = random.below(made.max(1));
                let _ = fs.unlink(&ROOT, dir, format!("come-{gone}").as_bytes());
            }
        }
        for number in 0..12 {
            let name = format!("stay-{number}").into_bytes();
            assert_eq!(seen.get(&name), Some(&1), "{args}, seed {seed}, stay-{number}");
        }
        assert!(seen.values().all(|&count| count == 1), "{args}, seed {seed}: listed twice");
        image.check(&fs);
    }
}

/// Names of equal legacy hashes, in pairs, found by search.
fn legacy_collisions(pairs: usize) -> Vec<Vec<u8>> {
    let version = HashVersion { function: HashFunction::Legacy, unsigned: false };
    let hasher = DirHasher { version, seed: [0; 4] };
    let mut random = Random(99);
    let mut letter = || b"abcdefghijklmnopqrstuvwxyz0123456789"[random.below(36) as usize];
    let mut known: HashMap<u32, Vec<u8>> = HashMap::new();
    let mut found = Vec::new();
    while found.len() < 2 * pairs {
        let name: Vec<u8> = (0..10).map(|_| letter()).collect();
        match known.insert(hasher.hash(&name).hash, name.clone()) {
            Some(other) if other != name => found.extend([other, name]),
            _ => {}
        }
    }
    found
}

#[test]
fn names_of_one_hash_are_found_and_listed_across_leaves() {
    let image = Image::hashed(16, &["-t", "ext4", "-b", "1024", "-N", "3000"], "legacy", false);
    let fs = image.mount();
    let dir = mkdir(&fs, fs.root(), b"dir").unwrap().attr.ino;
    let colliding = legacy_collisions(20);
    for name in &colliding {
        touch(&fs, dir, name).unwrap();
    }
    for number in 0..1000 {
        touch(&fs, dir, format!("filler-{number}-{}", "x".repeat(number % 200)).as_bytes())
            .unwrap();
    }
    for name in &colliding {
        look(&fs, dir, name).unwrap();
    }
    assert_eq!(list(&fs, dir, 1).len(), 1040);
    for name in &colliding {
        fs.unlink(&ROOT, dir, name).unwrap();
    }
    assert_eq!(list(&fs, dir, 3).len(), 1000);
    image.check(&fs);
}

#[test]
fn subdirectories_beyond_the_link_limit_stop_being_counted() {
    let image = Image::new(512, &["-t", "ext4", "-b", "1024", "-N", "70000"]);
    let fs = image.mount();
    let dir = mkdir(&fs, fs.root(), b"dir").unwrap().attr.ino;
    for number in 0..65_010 {
        mkdir(&fs, dir, number.to_string().as_bytes()).unwrap();
    }
    assert_eq!(fs.getattr(&ROOT, dir).unwrap().nlink, 1);
    for number in 0..65_010 {
        fs.rmdir(&ROOT, dir, number.to_string().as_bytes()).unwrap();
    }
    image.check(&fs);
}

#[test]
fn errors_are_those_of_the_kernel() {
    let image = Image::new(16, &["-t", "ext4", "-b", "1024"]);
    let fs = image.mount();
    let root = fs.root();
    let dir = mkdir(&fs, root, b"dir").unwrap().attr.ino;
    let file = touch(&fs, root, b"file").unwrap().attr.ino;
    let long = [b'n'; 256];

    assert_eq!(touch(&fs, root, &long).unwrap_err(), Errno::ENAMETOOLONG);
    touch(&fs, root, &long[..255]).unwrap();
    assert_eq!(touch(&fs, file, b"x").unwrap_err(), Errno::ENOTDIR);
    assert_eq!(look(&fs, file, b"x").unwrap_err(), Errno::ENOTDIR);
    assert_eq!(mkdir(&fs, root, b".").unwrap_err(), Errno::EEXIST);
    assert_eq!(fs.unlink(&ROOT, root, b"dir").unwrap_err(), Errno::EISDIR);
    assert_eq!(fs.rmdir(&ROOT, root, b"file").unwrap_err(), Errno::ENOTDIR);
    assert_eq!(fs.link(&ROOT, dir, root, b"x").unwrap_err(), Errno::EPERM);
    assert_eq!(look(&fs, dir, b"..").unwrap().attr.ino, root);
    let too_long = vec![b't'; 1024];
    assert_eq!(fs.symlink(&ROOT, root, b"s", &too_long).unwrap_err(), Errno::ENAMETOOLONG);
    let rename = |from: &[u8], to: &[u8], flags| fs.rename(&ROOT, (root, from), (root, to), flags);
    assert_eq!(rename(b"file", b"dir", PLAIN).unwrap_err(), Errno::EISDIR);
    assert_eq!(rename(b"dir", b"file", PLAIN).unwrap_err(), Errno::ENOTDIR);
    assert_eq!(rename(b"dir", b"file", RenameFlags::NOREPLACE).unwrap_err(), Errno::EEXIST);
    assert_eq!(rename(b"none", b"x", PLAIN).unwrap_err(), Errno::ENOENT);
    assert_eq!(rename(b"file", b"x", RenameFlags::EXCHANGE).unwrap_err(), Errno::ENOENT);
    assert_eq!(
        fs.rename(&ROOT, (root, b"dir"), (dir, b"below"), PLAIN).unwrap_err(),
        Errno::EINVAL
    );
    let below = mkdir(&fs, dir, b"below").unwrap().attr.ino;
    assert_eq!(fs.rename(&ROOT, (root, b"dir"), (below, b"x"), PLAIN).unwrap_err(), Errno::EINVAL);
    mkdir(&fs, below, b"x").unwrap();
    assert_eq!(
        fs.rename(&ROOT, (below, b"x"), (root, b"dir"), PLAIN).unwrap_err(),
        Errno::ENOTEMPTY
    );
    image.check(&fs);
}

#[test]
fn an_unlinked_file_lives_until_it_is_forgotten() {
    let image = Image::new(16, &["-t", "ext4"]);
    let fs = image.mount();
    let free = fs.statfs(&ROOT).unwrap().ffree;
    let entry = fs.mknod(&ROOT, fs.root(), b"open", libc::S_IFREG | 0o600, 0).unwrap();
    fs.unlink(&ROOT, fs.root(), b"open").unwrap();
    assert_eq!(fs.getattr(&ROOT, entry.attr.ino).unwrap().nlink, 0);
    assert_eq!(fs.statfs(&ROOT).unwrap().ffree, free - 1);
    fs.forget(entry.attr.ino, 1);
    assert_eq!(fs.statfs(&ROOT).unwrap().ffree, free);
    image.check(&fs);
}

#[test]
fn links_of_every_length_and_devices_are_read_back() {
    for args in [&["-t", "ext4", "-b", "1024"][..], &["-t", "ext2", "-b", "1024"]] {
        let image = Image::new(16, args);
        let fs = image.mount();
        for len in [1, 58, 59, 60, 61, 500, 1023] {
            let target = vec![b't'; len];
            let name = format!("link-{len}");
            let entry = fs.symlink(&ROOT, fs.root(), name.as_bytes(), &target).unwrap();
            assert_eq!(fs.readlink(&ROOT, entry.attr.ino).unwrap(), target);
            assert_eq!(entry.attr.size, len as u64);
            fs.forget(entry.attr.ino, 1);
        }
        for (name, kind, rdev) in [
            (&b"chr"[..], libc::S_IFCHR, 0x0102),
            (b"blk", libc::S_IFBLK, 0x0012_3400 | 0x56),
            (b"fifo", libc::S_IFIFO, 0),
            (b"sock", libc::S_IFSOCK, 0),
        ] {
            let entry = fs.mknod(&ROOT, fs.root(), name, kind | 0o600, rdev).unwrap();
            assert_eq!(entry.attr.rdev, rdev);
            assert_eq!(Some(entry.attr.kind), FileKind::from_mode(kind));
            fs.forget(entry.attr.ino, 1);
        }
        for len in [1, 60, 1023] {
            fs.unlink(&ROOT, fs.root(), format!("link-{len}").as_bytes()).unwrap();
        }
        image.check(&fs);
        let fs = image.mount();
        let entry = look(&fs, fs.root(), b"link-500").unwrap();
        assert_eq!(fs.readlink(&ROOT, entry.attr.ino).unwrap(), vec![b't'; 500]);
        fs.unmount().unwrap();
    }
}

#[test]
fn a_full_filesystem_refuses_and_stays_sound() {
    let image = Image::new(2, &["-t", "ext4", "-b", "1024", "-N", "3000", "-O", "^has_journal"]);
    let fs = image.mount();
    let mut made = Vec::new();
    let refusal = loop {
        match mkdir(&fs, fs.root(), format!("dir-{}-{}", made.len(), "n".repeat(150)).as_bytes()) {
            Ok(entry) => made.push(entry.attr.ino),
            Err(errno) => break errno,
        }
    };
    assert_eq!(refusal, Errno::ENOSPC);
    // lost+found is there too.
    assert_eq!(list(&fs, fs.root(), 64).len(), made.len() + 1);
    image.check(&fs);
}

/// The tree as it should be: directories with their names.
#[derive(Default)]
struct Model {
    dirs: BTreeMap<Ino, BTreeMap<Vec<u8>, Ino>>,
    parents: BTreeMap<Ino, Ino>,
}

impl Model {
    fn is_below(&self, mut dir: Ino, top: Ino) -> bool {
        loop {
            if dir == top {
                return true;
            }
            match self.parents.get(&dir) {
                Some(&parent) if parent != dir => dir = parent,
                _ => return false,
            }
        }
    }

    fn check(&self, fs: &Arc<Ext4>) {
        for (dir, names) in &self.dirs {
            assert_eq!(&list(fs, *dir, 10), names, "directory {dir}");
            assert_eq!(look(fs, *dir, b"..").unwrap().attr.ino, self.parents[dir]);
            let subdirs = names.values().filter(|ino| self.dirs.contains_key(ino)).count();
            assert_eq!(fs.getattr(&ROOT, *dir).unwrap().nlink as usize, subdirs + 2);
        }
    }

    fn rename(&mut self, from: (Ino, &[u8]), to: (Ino, &[u8]), exchange: bool) {
        let source = self.dirs.get_mut(&from.0).unwrap().remove(from.1).unwrap();
        let target = self.dirs.get_mut(&to.0).unwrap().insert(to.1.to_vec(), source);
        if self.dirs.contains_key(&source) {
            self.parents.insert(source, to.0);
        }
        let Some(target) = target else { return };
        if exchange {
            self.dirs.get_mut(&from.0).unwrap().insert(from.1.to_vec(), target);
            if self.dirs.contains_key(&target) {
                self.parents.insert(target, from.0);
            }
        } else {
            self.dirs.remove(&target);
        }
    }

    fn expect_rename(
        &self,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        exchange: bool,
    ) -> Result<bool, Errno> {
        let Some(&source) = self.dirs[&from.0].get(from.1) else { return Err(Errno::ENOENT) };
        let target = self.dirs[&to.0].get(to.1).copied();
        if exchange && target.is_none() {
            return Err(Errno::ENOENT);
        }
        let is_dir = |ino| self.dirs.contains_key(&ino);
        if is_dir(source) && from.0 != to.0 && self.is_below(to.0, source) {
            return Err(Errno::EINVAL);
        }
        let Some(target) = target else { return Ok(true) };
        if from.0 != to.0 && is_dir(target) && self.is_below(from.0, target) {
            return Err(if exchange { Errno::EINVAL } else { Errno::ENOTEMPTY });
        }
        if source == target {
            return Ok(false);
        }
        match (is_dir(source), is_dir(target)) {
            _ if exchange => Ok(true),
            (true, false) => Err(Errno::ENOTDIR),
            (false, true) => Err(Errno::EISDIR),
            (true, true) if !self.dirs[&target].is_empty() => Err(Errno::ENOTEMPTY),
            _ => Ok(true),
        }
    }
}

fn random_operations(image: &Image, seed: u64, steps: u32) {
    let fs = image.mount();
    let mut random = Random(seed);
    let mut model = Model::default();
    fs.rmdir(&ROOT, fs.root(), b"lost+found").unwrap();
    let top = mkdir(&fs, fs.root(), b"top").unwrap().attr.ino;
    model.dirs.insert(top, BTreeMap::new());
    model.parents.insert(top, fs.root());
    for step in 0..steps {
        let context = format!("seed {seed}, step {step}");
        let dirs: Vec<Ino> = model.dirs.keys().copied().collect();
        let mut pick_dir = || dirs[random.below(dirs.len() as u64) as usize];
        let (dir, other) = (pick_dir(), pick_dir());
        let mut pick_name = || {
            let number = random.below(60);
            format!("{number}-{}", "n".repeat((number * 4) as usize)).into_bytes()
        };
        let (name, second) = (pick_name(), pick_name());
        let there = model.dirs[&dir].get(&name).copied();
        match random.below(8) {
            0 | 1 => match touch(&fs, dir, &name) {
                Ok(entry) => {
                    assert_eq!(there, None, "{context}");
                    model.dirs.get_mut(&dir).unwrap().insert(name, entry.attr.ino);
                }
                Err(errno) => {
                    assert_eq!((errno, there.is_some()), (Errno::EEXIST, true), "{context}")
                }
            },
            2 => match mkdir(&fs, dir, &name) {
                Ok(entry) => {
                    assert_eq!(there, None, "{context}");
                    model.dirs.get_mut(&dir).unwrap().insert(name, entry.attr.ino);
                    model.dirs.insert(entry.attr.ino, BTreeMap::new());
                    model.parents.insert(entry.attr.ino, dir);
                }
                Err(errno) => {
                    assert_eq!((errno, there.is_some()), (Errno::EEXIST, true), "{context}")
                }
            },
            3 => {
                let expected = match there {
                    None => Err(Errno::ENOENT),
                    Some(ino) if model.dirs.contains_key(&ino) => Err(Errno::EISDIR),
                    Some(_) => Ok(()),
                };
                assert_eq!(fs.unlink(&ROOT, dir, &name), expected, "{context}");
                if expected.is_ok() {
                    model.dirs.get_mut(&dir).unwrap().remove(&name);
                }
            }
            4 => {
                let expected = match there {
                    None => Err(Errno::ENOENT),
                    Some(ino) => match model.dirs.get(&ino) {
                        None => Err(Errno::ENOTDIR),
                        Some(names) if !names.is_empty() => Err(Errno::ENOTEMPTY),
                        Some(_) => Ok(()),
                    },
                };
                assert_eq!(fs.rmdir(&ROOT, dir, &name), expected, "{context}");
                if let (Ok(()), Some(ino)) = (expected, there) {
                    model.dirs.get_mut(&dir).unwrap().remove(&name);
                    model.dirs.remove(&ino);
                }
            }
            5 => {
                let Some(&ino) = model.dirs[&other].get(&second) else { continue };
                let linked = fs.link(&ROOT, ino, dir, &name);
                if model.dirs.contains_key(&ino) {
                    assert_eq!(linked.unwrap_err(), Errno::EPERM, "{context}");
                } else if there.is_some() {
                    assert_eq!(linked.unwrap_err(), Errno::EEXIST, "{context}");
                } else {
                    fs.forget(linked.unwrap().attr.ino, 1);
                    model.dirs.get_mut(&dir).unwrap().insert(name, ino);
                }
            }
            choice => {
                let exchange = choice == 7;
                let flags = if exchange { RenameFlags::EXCHANGE } else { PLAIN };
                let (from, to) = ((dir, &name[..]), (other, &second[..]));
                let expected = model.expect_rename(from, to, exchange);
                let done = fs.rename(&ROOT, from, to, flags);
                assert_eq!(done, expected.map(|_| ()), "{context}");
                if expected == Ok(true) {
                    model.rename(from, to, exchange);
                }
            }
        }
    }
    model.check(&fs);
    image.check(&fs);
    let fs = image.mount();
    model.check(&fs);
    fs.unmount().unwrap();
}

#[test]
fn random_operations_agree_with_a_model() {
    random_operations(&Image::new(32, &["-t", "ext4", "-b", "1024", "-N", "8000"]), 1, 8000);
    random_operations(&Image::new(32, &["-t", "ext4", "-b", "4096", "-N", "8000"]), 2, 4000);
    random_operations(&Image::new(32, &["-t", "ext2", "-b", "1024", "-N", "8000"]), 3, 4000);
    random_operations(
        &Image::new(32, &["-t", "ext3", "-b", "1024", "-N", "8000", "-O", "^dir_index"]),
        4,
        4000,
    );
    let image = Image::hashed(32, &["-t", "ext4", "-b", "1024", "-N", "8000"], "legacy", true);
    random_operations(&image, 5, 4000);
}

#[test]
fn threads_rename_between_directories_without_a_deadlock() {
    let image = Image::new(32, &["-t", "ext4", "-b", "1024", "-N", "4000"]);
    let fs = image.mount();
    let dirs: Vec<Ino> = (0..4)
        .map(|n| mkdir(&fs, fs.root(), format!("d{n}").as_bytes()).unwrap().attr.ino)
        .collect();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (fs, dirs) = (&fs, &dirs);
            scope.spawn(move || {
                let mut random = Random(thread + 1);
                for _ in 0..1500 {
                    let name = format!("n{}", random.below(6));
                    let other = format!("n{}", random.below(6));
                    let from = dirs[random.below(4) as usize];
                    let to = dirs[random.below(4) as usize];
                    let _ = match random.below(6) {
                        0 => touch(fs, from, name.as_bytes()).map(drop),
                        1 => mkdir(fs, from, name.as_bytes()).map(drop),
                        2 => fs.rmdir(&ROOT, from, name.as_bytes()),
                        3 => fs.unlink(&ROOT, from, name.as_bytes()),
                        4 => {
                            fs.rename(&ROOT, (from, name.as_bytes()), (to, other.as_bytes()), PLAIN)
                        }
                        _ => fs.rename(
                            &ROOT,
                            (from, name.as_bytes()),
                            (to, other.as_bytes()),
                            RenameFlags::EXCHANGE,
                        ),
                    };
                }
            });
        }
    });
    image.check(&fs);
}
