//! A tree that uses what the format offers, and the listing two trees are compared by.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{run, sh};

/// A small generator with a printable seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// Bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.next().to_le_bytes());
        }
        out.truncate(len);
        out
    }
}

/// How large a tree becomes.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Regular files in the forest of directories.
    pub files: u64,
    /// Entries of the one large directory.
    pub big_dir: u64,
}

/// Fills `root` with files, hard links, symlinks, sparse files, devices, attributes, ACLs, deep
/// paths and one large directory.
pub fn fill(root: &Path, size: Size, seed: u64) {
    let mut rng = Rng(seed);
    fill_forest(root, size.files, &mut rng);
    fill_special(root, &mut rng);
    let big = root.join("big");
    fs::create_dir(&big).expect("mkdir");
    for i in 0..size.big_dir {
        // Mostly names of one inode: what is large is the directory.
        let path = big.join(format!("entry-{i:07}-{:x}", rng.below(1 << 20)));
        if i % 10_000 == 0 {
            File::create(&path).expect("create");
            fs::rename(&path, big.join(format!("anchor-{i}"))).expect("rename");
        }
        let anchor = big.join(format!("anchor-{}", i / 10_000 * 10_000));
        fs::hard_link(&anchor, &path).expect("link");
    }
    // The kernel counts mapping blocks into st_blocks only when delayed data has its place.
    nix::unistd::sync();
}

fn fill_forest(root: &Path, files: u64, rng: &mut Rng) {
    let mut dirs = vec![root.to_owned()];
    for i in 0..files {
        if i % 25 == 0 {
            let parent = dirs[rng.below(dirs.len() as u64) as usize].clone();
            let dir = parent.join(format!("d{i}"));
            fs::create_dir(&dir).expect("mkdir");
            dirs.push(dir);
        }
        let dir = &dirs[rng.below(dirs.len() as u64) as usize];
        let path = dir.join(format!("file {i} ä"));
        let len = match rng.below(20) {
            0 => 0,
            1..=14 => rng.below(9_000),
            15..=18 => rng.below(70_000),
            _ => rng.below(400_000),
        };
        fs::write(&path, rng.bytes(len as usize)).expect("write");
        match rng.below(12) {
            0 => fs::hard_link(&path, dir.join(format!("link {i}"))).expect("link"),
            1 => symlink(&format!("../file {i} ä"), &dir.join(format!("fast {i}"))),
            2 => symlink(
                &format!("slow/{}", "x".repeat(60 + i as usize % 900)),
                &dir.join(format!("slow {i}")),
            ),
            3 => {
                let name = format!("user.key{}", i % 7);
                let len = rng.below(300) as usize;
                xattr::set(&path, name, &rng.bytes(len)).expect("setxattr");
            }
            _ => {}
        }
    }
}

fn symlink(target: &str, path: &Path) {
    std::os::unix::fs::symlink(target, path).expect("symlink");
}

fn fill_special(root: &Path, rng: &mut Rng) {
    let dir = root.join("special");
    fs::create_dir(&dir).expect("mkdir");
    let sparse = File::create(dir.join("sparse")).expect("create");
    for i in 0..300u64 {
        sparse.write_all_at(&rng.bytes(1500), i * i * 4096 + 100).expect("write");
    }
    sparse.set_len(3 << 30).expect("truncate");
    let far = File::create(dir.join("far")).expect("create");
    far.write_all_at(b"end", (13 << 30) + 5).expect("write");
    let dense = File::create(dir.join("every-second-block")).expect("create");
    for i in 0..700u64 {
        dense.write_all_at(&rng.bytes(4096), i * 8192).expect("write");
    }
    fs::write(dir.join("large"), rng.bytes(24 << 20)).expect("write");
    sh(&format!(
        "cd '{}'; mkfifo fifo; mknod char c 5 1; mknod block b 259 70000; \
         install -m 6755 /dev/null setid; chmod 1777 .; \
         touch acl; setfacl -m u:1234:rw,g:77:r,m::rw acl; \
         mkdir acldir; setfacl -d -m u:1234:rwx,g:77:rx acldir; touch acldir/heir; mkdir acldir/sub; \
         touch -d '2300-01-02 03:04:05.678901234' future 2>/dev/null || touch future; \
         touch -d '1950-06-07 08:09:10.5' past; chown 100000:70000 past; \
         touch attrs; for i in $(seq 1 20); do setfattr -n user.attribute$i -v value$i attrs; done; \
         setfattr -n trusted.t -v secret attrs; setfattr -n security.s -v label attrs; \
         printf x > '{}'; chattr +d acl",
        dir.display(),
        "n".repeat(255)
    ));
    let mut deep = dir.join("deep");
    for i in 0..60 {
        deep.push(format!("level-{i}"));
    }
    fs::create_dir_all(&deep).expect("mkdir");
    fs::write(deep.join("bottom"), b"here").expect("write");
}

/// One line per file: path, type, mode, owner, links, size, times, device, content, target,
/// attributes. Inode numbers are left out: two trees that are equal give equal listings.
pub fn listing(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut out = BTreeMap::new();
    let mut stack = vec![root.to_owned()];
    while let Some(path) = stack.pop() {
        let meta =
            fs::symlink_metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let relative = path.strip_prefix(root).expect("below the root").to_owned();
        if meta.is_dir() {
            for entry in fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())) {
                let entry = entry.expect("readdir");
                if entry.file_name() != "lost+found" {
                    stack.push(entry.path());
                }
            }
        }
        out.insert(relative, describe(&path, &meta));
    }
    out
}

fn describe(path: &Path, meta: &fs::Metadata) -> String {
    let mut line = format!(
        "mode={:o} uid={} gid={} nlink={} rdev={:x} mtime={}.{:09}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.nlink(),
        meta.rdev(),
        meta.mtime(),
        meta.mtime_nsec(),
    );
    if !meta.is_dir() {
        let _ = write!(line, " size={}", meta.size());
    }
    if meta.is_file() {
        let _ = write!(
            line,
            " blocks={} content={:016x}",
            meta.blocks(),
            content_hash(path, meta.size())
        );
    }
    if meta.is_symlink() {
        let target = fs::read_link(path).expect("readlink");
        let _ = write!(line, " target={}", target.as_os_str().as_bytes().escape_ascii());
    }
    let mut attributes: Vec<(String, Vec<u8>)> = xattr::list(path)
        .unwrap_or_else(|e| panic!("listxattr {}: {e}", path.display()))
        .map(|name| {
            let value = xattr::get(path, &name).expect("getxattr").unwrap_or_default();
            (name.to_string_lossy().into_owned(), value)
        })
        .collect();
    attributes.sort();
    for (name, value) in attributes {
        let _ = write!(line, " {name}={}", value.escape_ascii());
    }
    line
}

/// A hash of a file's bytes that reads holes as what they are without reading all of them twice.
fn content_hash(path: &Path, size: u64) -> u64 {
    use std::io::Read;
    const HOLE_BYTES: u64 = 64 << 20;
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut hash = 0xCBF2_9CE4_8422_2325_u64;
    let mut mix = |bytes: &[u8]| {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            hash = (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01B3).rotate_left(23);
        }
    };
    if size <= HOLE_BYTES {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        mix(&bytes);
    } else {
        // Enough of a large sparse file: every data block of `fill`, and the end.
        let mut block = vec![0; 8192];
        for i in 0..320u64 {
            let n = file.read_at(&mut block, i * i * 4096).expect("read");
            mix(&block[..n]);
        }
        let n = file.read_at(&mut block, size.saturating_sub(100)).expect("read");
        mix(&block[..n]);
    }
    hash
}

/// Asserts that two listings are equal, showing the first differences.
#[track_caller]
pub fn assert_same(left: &BTreeMap<PathBuf, String>, right: &BTreeMap<PathBuf, String>) {
    let mut differences = Vec::new();
    for path in left.keys().chain(right.keys().filter(|path| !left.contains_key(*path))) {
        let (a, b) = (left.get(path), right.get(path));
        if a != b {
            differences.push(format!("{}\n  left  {a:?}\n  right {b:?}", path.display()));
        }
    }
    let total = differences.len();
    differences.truncate(10);
    assert!(total == 0, "{total} differences:\n{}", differences.join("\n"));
}

/// Without what another filesystem may do differently: blocks used.
pub fn without_blocks(listing: BTreeMap<PathBuf, String>) -> BTreeMap<PathBuf, String> {
    listing
        .into_iter()
        .map(|(path, line)| {
            let kept: Vec<&str> =
                line.split(' ').filter(|word| !word.starts_with("blocks=")).collect();
            (path, kept.join(" "))
        })
        .collect()
}

/// `find -ls` without inode numbers, and what getfattr and getfacl print, as users see them.
pub fn tools_listing(root: &Path) -> String {
    let mut find = Command::new("bash");
    find.arg("-c").arg(format!(
        "cd '{}' && find . -not -path './lost+found*' -ls | awk '{{$1=\"\"; print}}' | LC_ALL=C sort && \
         getfattr -R -P -d -m - . 2>/dev/null | head -5000 && \
         find . \\( -name special -o -name moved \\) -prune -exec getfacl -R -P -n {{}} +",
        root.display()
    ));
    run(&mut find)
}
