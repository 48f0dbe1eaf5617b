//! Images to damage, and where in them each structure lies, as dumpe2fs and debugfs say.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use uext_tests::mounts::KernelMount;
use uext_tests::scratch::Scratch;
use uext_tests::tree::Rng;
use uext_tests::{run, sh};

/// What the bytes that are changed belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Structure {
    Superblock,
    GroupDescriptors,
    BlockBitmaps,
    InodeBitmaps,
    InodeTables,
    Directories,
    Htree,
    ExtentNodes,
    IndirectBlocks,
    XattrBlocks,
    JournalSuperblock,
    LogBlocks,
}

/// How an image is made.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub name: &'static str,
    pub block_size: u64,
    mkfs: &'static [&'static str],
    /// Whether the journal holds what must be replayed.
    pub dirty: bool,
}

const EXT4: &[&str] = &["-t", "ext4", "-J", "size=4", "-O", "metadata_csum_seed,orphan_file"];
const PLAIN: &[&str] = &["-t", "ext4", "-J", "size=1", "-O", "^metadata_csum,uninit_bg"];
const EXT3: &[&str] = &["-t", "ext3", "-J", "size=1"];
const EXT2: &[&str] = &["-t", "ext2"];

/// With checksums damage is found by them, without by what looks at the values.
pub const SHAPES: [Shape; 7] = [
    Shape { name: "ext4", block_size: 4096, mkfs: EXT4, dirty: false },
    Shape { name: "ext4-without-checksums", block_size: 1024, mkfs: PLAIN, dirty: false },
    Shape { name: "ext3", block_size: 1024, mkfs: EXT3, dirty: false },
    Shape { name: "ext2", block_size: 1024, mkfs: EXT2, dirty: false },
    Shape { name: "ext4-to-replay", block_size: 4096, mkfs: EXT4, dirty: true },
    Shape { name: "ext4-without-checksums-to-replay", block_size: 1024, mkfs: PLAIN, dirty: true },
    Shape { name: "ext3-to-replay", block_size: 1024, mkfs: EXT3, dirty: true },
];

/// An image without damage.
pub struct Base {
    pub shape: Shape,
    pub bytes: Vec<u8>,
    /// Byte ranges; none is empty.
    pub places: BTreeMap<Structure, Vec<Range<u64>>>,
}

impl Base {
    /// Makes the image by mke2fs and fills it by the kernel's ext4.
    pub fn new(scratch: &Scratch, shape: Shape) -> Self {
        const MIB: u64 = 1 << 20;
        let image = scratch.sparse("base.img", 24 * MIB);
        let block_size = shape.block_size.to_string();
        let mut mkfs = Command::new("mke2fs");
        mkfs.args(["-q", "-F", "-m", "0", "-N", "1024", "-b", &block_size]);
        // The same image each time, but for its times.
        mkfs.args(["-U", "0123abcd-4567-89ab-cdef-0123456789ab"]);
        mkfs.args(["-E", "hash_seed=01234567-89ab-cdef-0123-456789abcdef"]);
        run(mkfs.args(shape.mkfs).arg(&image));
        let dir = scratch.mount_point("base");
        let mount = KernelMount::new(&image, &dir, "");
        fill(&dir, shape.block_size);
        let mut bytes = Vec::new();
        if shape.dirty {
            sh(&format!("sync -f '{}'", dir.display()));
            churn(&dir);
            bytes = fs::read(&image).expect("read the image");
        }
        mount.unmount();
        if shape.dirty {
            fs::write(&image, &bytes).expect("write the image");
        } else {
            bytes = fs::read(&image).expect("read the image");
        }
        let places = places(&image, &bytes, shape);
        Self { shape, bytes, places }
    }
}

/// Every structure of the format, in little space.
fn fill(dir: &Path, block_size: u64) {
    let mut rng = Rng(block_size);
    for d in 0..6 {
        let sub = dir.join(format!("d{d}"));
        fs::create_dir(&sub).expect("mkdir");
        for f in 0..6 {
            let len = usize::try_from(rng.below(20_000)).expect("small");
            fs::write(sub.join(format!("file-{f}")), rng.bytes(len)).expect("write");
        }
    }
    let pieces = File::create(dir.join("pieces")).expect("create");
    for i in 0..400 {
        pieces.write_all_at(b"piece", i * 2 * block_size).expect("write");
    }
    let far = File::create(dir.join("far")).expect("create");
    let pointers = block_size / 4;
    for at in [0, 13, 12 + pointers + 5, 12 + pointers + pointers * pointers + 7] {
        far.write_all_at(b"far", at * block_size).expect("write");
    }
    let big = dir.join("big");
    fs::create_dir(&big).expect("mkdir");
    File::create(big.join("anchor")).expect("create");
    // With 1 KiB blocks more than one level of index.
    for i in 0..if block_size == 1024 { 3_600 } else { 500 } {
        let name = big.join(format!("a-name-that-is-long-{i:05}"));
        fs::hard_link(big.join("anchor"), name).expect("link");
    }
    sh(&format!(
        "cd '{}'; ln -s short fast; ln -s \"$(printf '%0200d' 7)\" slow; mkfifo fifo; \
         mknod null c 1 3; touch a1 a2 a3 acl; setfacl -m u:1234:rw acl; \
         for f in a1 a2 a3; do setfattr -n user.long -v \"$(printf '%0500d' 3)\" $f; \
         setfattr -n user.$f -v $f $f; done; sync -f .",
        dir.display()
    ));
}

/// Changes that are in the journal and not yet at home.
fn churn(dir: &Path) {
    sh(&format!(
        "cd '{}'; for i in $(seq 1 12); do mkdir new$i; echo text > new$i/file; sync -f .; \
         rm -rf d1/file-$i; mv new$i moved$i; setfattr -n user.n -v $i moved$i; done; \
         rm -r d2; truncate -s 0 pieces; sync -f .",
        dir.display()
    ));
}

fn places(image: &Path, bytes: &[u8], shape: Shape) -> BTreeMap<Structure, Vec<Range<u64>>> {
    let disk = Disk { image, bytes, block_size: shape.block_size };
    let mut found: Vec<(Structure, Vec<u64>)> = Vec::new();
    let groups = run(Command::new("dumpe2fs").arg(image));
    for (words, structure) in [
        ("Group descriptors at ", Structure::GroupDescriptors),
        ("Block bitmap at ", Structure::BlockBitmaps),
        ("Inode bitmap at ", Structure::InodeBitmaps),
        ("Inode table at ", Structure::InodeTables),
    ] {
        for (at, _) in groups.match_indices(words) {
            found.push((structure, range_of(&groups[at + words.len()..]).collect()));
        }
    }
    for dir in ["/", "/d0", "/d1", "/d3"] {
        found.push((Structure::Directories, disk.blocks(dir, is_data)));
    }
    let big = disk.blocks("/big", is_data);
    let (index, leaves): (Vec<u64>, Vec<u64>) =
        big[1..].iter().partition(|&&block| disk.is_index_node(block));
    found.push((Structure::Directories, leaves));
    found.push((Structure::Htree, [&big[..1], &index].concat()));
    for path in ["/pieces", "/far", "/big"] {
        found.push((Structure::ExtentNodes, disk.blocks(path, |label| label.starts_with("ETB"))));
        found.push((Structure::IndirectBlocks, disk.blocks(path, |label| label.ends_with("IND"))));
    }
    for path in ["/a1", "/a2", "/a3", "/acl"] {
        let stat = disk.stat(path);
        let at = stat.find("File ACL: ").expect("debugfs says it") + "File ACL: ".len();
        found.push((Structure::XattrBlocks, range_of(&stat[at..]).collect()));
    }
    if shape.dirty {
        let log = disk.blocks("<8>", is_data);
        found.push((Structure::JournalSuperblock, vec![log[0]]));
        found.push((Structure::LogBlocks, log[1..].to_vec()));
    }
    let mut places: BTreeMap<Structure, Vec<Range<u64>>> = BTreeMap::new();
    places.entry(Structure::Superblock).or_default().push(1024..2048);
    for (structure, blocks) in found {
        let used = blocks.into_iter().filter(|&block| block != 0 && disk.is_used(block));
        let ranges = used.map(|block| block * shape.block_size..(block + 1) * shape.block_size);
        places.entry(structure).or_default().extend(ranges);
    }
    places.retain(|_, ranges| !ranges.is_empty());
    places
}

fn is_data(label: &str) -> bool {
    label.starts_with(|first: char| first.is_ascii_digit())
}

/// The numbers of `12` or `12-15` at the start of a text.
fn range_of(text: &str) -> impl Iterator<Item = u64> + use<> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '-').unwrap_or(text.len());
    let (first, last) = text[..end].split_once('-').unwrap_or((&text[..end], &text[..end]));
    let number = |text: &str| text.parse::<u64>().expect("a block number");
    number(first)..=number(last)
}

struct Disk<'a> {
    image: &'a Path,
    bytes: &'a [u8],
    block_size: u64,
}

impl Disk<'_> {
    fn stat(&self, path: &str) -> String {
        run(Command::new("debugfs").args(["-R", &format!("stat {path}")]).arg(self.image))
    }

    /// A file's blocks whose labels are of a kind, such as `(0-3)`, `(IND)` and `(ETB0)`.
    fn blocks(&self, path: &str, kind: fn(&str) -> bool) -> Vec<u64> {
        let stat = self.stat(path);
        let list = stat.split_once("EXTENTS:\n").or_else(|| stat.split_once("BLOCKS:\n"));
        let list = list.expect("debugfs lists the blocks").1.lines().next().unwrap_or("");
        let pieces = list.split(", ").filter_map(|piece| piece.strip_prefix('(')?.split_once("):"));
        pieces.filter(|(label, _)| kind(label)).flat_map(|(_, range)| range_of(range)).collect()
    }

    fn block(&self, block: u64) -> &[u8] {
        let at = usize::try_from(block * self.block_size).expect("small");
        let len = usize::try_from(self.block_size).expect("small");
        &self.bytes[at..at + len]
    }

    fn is_used(&self, block: u64) -> bool {
        self.block(block).iter().any(|&byte| byte != 0)
    }

    /// An index block looks like a directory block with one unused entry.
    fn is_index_node(&self, block: u64) -> bool {
        let block = self.block(block);
        let entry_len = u64::from(u16::from_le_bytes([block[4], block[5]]));
        block[..4] == [0; 4] && entry_len == self.block_size
    }
}
