//! Directories, their index and attributes against images that e2fsprogs made:
//! every checksum and hash must match, and what is edited here must please e2fsck.
//!
//! Without e2fsprogs each test says so on stderr and passes.

#![allow(clippy::unwrap_used, reason = "a test's helpers may panic like the tests")]

use std::path::{Path, PathBuf};
use std::process::Command;

use uext_ondisk::dir_entry::{DirBlock, DirBlockMut, DirFormat, FileType};
use uext_ondisk::dirhash::{DirHasher, HashVersion};
use uext_ondisk::htree::{DxBlock, leaf_map};
use uext_ondisk::inode::inode_csum_seed;
use uext_ondisk::superblock::Superblock;
use uext_ondisk::xattr::{
    NameIndex, OwnedValue, XattrArea, XattrSet, XattrValue, entry_hash, set_block_checksum,
};
use uext_ondisk::{FsBlock, InodeNumber};

const BLOCK: usize = 1024;

struct Image {
    dir: tempfile::TempDir,
    path: PathBuf,
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Image {
    /// A directory of 400 files, hashed by e2fsck; `None`, said loudly, without the tools.
    fn make() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (source, path) = (dir.path().join("source"), dir.path().join("image"));
        std::fs::create_dir_all(source.join("big")).unwrap();
        std::fs::create_dir_all(source.join("small")).unwrap();
        std::fs::write(source.join("file"), "content").unwrap();
        for number in 0..400 {
            std::fs::write(source.join(format!("big/a-longer-name-{number}")), "").unwrap();
        }
        let mut mkfs = Command::new("mke2fs");
        mkfs.args(["-q", "-F", "-t", "ext4", "-b", "1024", "-O", "^has_journal", "-N", "600"]);
        if mkfs.arg("-d").arg(&source).arg(&path).arg("8M").output().is_err() {
            {
                use std::io::Write as _;
                let _ = writeln!(std::io::stderr(), "SKIPPED: mke2fs is not installed");
            }
            return None;
        }
        output(Command::new("e2fsck").arg("-fyD").arg(&path));
        Some(Self { dir, path })
    }

    fn debugfs(&self, request: &str) -> String {
        output(Command::new("debugfs").args(["-w", "-R", request]).arg(&self.path))
    }

    /// The number after a word in what debugfs says of a file.
    fn stat(&self, file: &str, word: &str) -> u64 {
        let text = self.debugfs(&format!("stat {file}"));
        let rest = text.split_once(word).unwrap().1.trim_start();
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    }

    fn superblock(&self) -> Superblock {
        Superblock::parse(&std::fs::read(&self.path).unwrap()[1024..]).unwrap()
    }

    /// The seed of a file's checksums.
    fn seed(&self, file: &str) -> u32 {
        let number = u32::try_from(self.stat(file, "Inode: ")).unwrap();
        let generation = u32::try_from(self.stat(file, "Generation: ")).unwrap();
        inode_csum_seed(self.superblock().csum_seed(), InodeNumber(number), generation)
    }

    fn contents(&self, file: &str) -> Vec<u8> {
        let out = self.dir.path().join("dumped");
        self.debugfs(&format!("dump {file} {}", out.display()));
        std::fs::read(out).unwrap()
    }

    fn edit_block(&self, block: u64, edit: impl FnOnce(&mut [u8])) {
        let mut bytes = std::fs::read(&self.path).unwrap();
        let at = usize::try_from(block).unwrap() * BLOCK;
        edit(&mut bytes[at..at + BLOCK]);
        std::fs::write(&self.path, bytes).unwrap();
    }
}

fn assert_clean(path: &Path) {
    let output = Command::new("e2fsck").arg("-fn").arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

fn format(sb: &Superblock) -> DirFormat {
    DirFormat { filetype: true, csum: true, inodes_count: sb.inodes_count() }
}

#[test]
fn the_index_e2fsck_made_leads_to_every_name() {
    let Some(image) = Image::make() else { return };
    let (sb, seed, bytes) = (image.superblock(), image.seed("/big"), image.contents("/big"));
    let mut blocks = bytes.chunks_exact(BLOCK);
    let (root, info) = DxBlock::root(blocks.next().unwrap(), true).unwrap();
    assert_eq!(root.verify_checksum(seed), Ok(()));
    assert_eq!(info.indirect_levels, 0);
    let version = HashVersion::from_raw(info.hash_version, sb.unsigned_hash()).unwrap();
    let hasher = DirHasher { version, seed: sb.hash_seed() };
    let mut names = 0;
    for (number, block) in (1..).zip(blocks) {
        let leaf = DirBlock::new(block, format(&sb));
        assert_eq!(leaf.verify_checksum(seed), Ok(()), "block {number}");
        for entry in leaf_map(leaf, &hasher).unwrap() {
            let found = root.entry(root.lookup(entry.hash)).block.0;
            assert_eq!(found, number, "the entry at {}", entry.offset);
            names += 1;
        }
    }
    assert_eq!(names, 400);
}

#[test]
fn entries_inserted_and_removed_here_please_e2fsck() {
    let Some(image) = Image::make() else { return };
    let (sb, seed) = (image.superblock(), image.seed("/small"));
    let file = u32::try_from(image.stat("/file", "Inode: ")).unwrap();
    let block = image.debugfs("blocks /small").trim().parse().unwrap();
    image.edit_block(block, |bytes| {
        let mut block = DirBlockMut::new(bytes, format(&sb));
        let names: [&[u8]; 3] = [b"one", b"a name to remove", "größer".as_bytes()];
        let offsets = names
            .map(|name| block.insert(name, InodeNumber(file), FileType::Regular).unwrap().unwrap());
        block.remove(offsets[1]).unwrap();
        block.set_checksum(seed).unwrap();
    });
    image.debugfs("sif /file links_count 3");
    assert_clean(&image.path);
    assert!(image.debugfs("cat /small/größer").contains("content"));
}

#[test]
fn attributes_debugfs_wrote_are_read_and_those_written_here_please_it() {
    let Some(image) = Image::make() else { return };
    let sb = image.superblock();
    let long = "v".repeat(300);
    for (name, value) in [("user.zz", long.as_str()), ("user.b", "12345"), ("user.aaa", "")] {
        image.debugfs(&format!("ea_set /file {name} {long}{value}"));
    }
    let number = image.stat("/file", "File ACL: ");
    assert_ne!(number, 0, "the attributes are too large for the inode");
    image.edit_block(number, |bytes| {
        let area = XattrArea::block(bytes).unwrap();
        assert_eq!(area.verify_checksum(sb.csum_seed(), FsBlock(number)), Ok(()));
        assert_eq!(area.check_overlap(), Ok(()));
        for entry in area.entries() {
            let XattrValue::Inline(value) = entry.value else { panic!("no value is an inode") };
            assert_eq!(entry.hash, entry_hash(entry.name, value));
        }
        let mut set = XattrSet::from(area);
        assert!(set.remove(NameIndex::USER, b"b").is_some() || set.entries().len() < 3);
        set.set(NameIndex::TRUSTED, b"added", OwnedValue::Inline(b"here".to_vec())).unwrap();
        set.write_block(bytes, 1).unwrap();
        set_block_checksum(bytes, sb.csum_seed(), FsBlock(number)).unwrap();
    });
    assert_clean(&image.path);
    assert!(image.debugfs("ea_get /file trusted.added").contains("here"));
}
