//! The parsers against images that mke2fs made: what it wrote must parse, every checksum must
//! match, and the numbers must be those dumpe2fs prints.
//!
//! Without e2fsprogs each test says so on stderr and passes.

#![allow(clippy::unwrap_used, reason = "a test's helpers may panic like the tests")]

use std::path::Path;
use std::process::Command;

use uext_ondisk::extent::{ExtentNode, NodeLimits};
use uext_ondisk::group_desc::{GroupDesc, GroupFlags};
use uext_ondisk::inode::{FileType, Inode, InodeFlags, InodeRef};
use uext_ondisk::superblock::Superblock;
use uext_ondisk::{FsBlock, GroupNumber, InodeNumber, bitmap};

/// A filesystem made by mke2fs, read whole.
struct Image {
    bytes: Vec<u8>,
    sb: Superblock,
    dumpe2fs: String,
}

impl Image {
    /// `None`, said loudly, when there is no mke2fs.
    fn make(args: &[&str], size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        Self::make_in(dir.path(), args, size)
    }

    fn make_in(dir: &Path, args: &[&str], size: &str) -> Option<Self> {
        let path = dir.join("image");
        let made =
            Command::new("mke2fs").args(["-q", "-F"]).args(args).arg(&path).arg(size).output();
        let Ok(made) = made else {
            {
                use std::io::Write as _;
                let _ = writeln!(std::io::stderr(), "SKIPPED: mke2fs is not installed");
            }
            return None;
        };
        assert!(
            made.status.success(),
            "mke2fs {args:?}: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        let shown = Command::new("dumpe2fs").arg(&path).output().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let sb = Superblock::parse(&bytes[1024..]).unwrap();
        let dumpe2fs = String::from_utf8_lossy(&shown.stdout).into_owned();
        Some(Self { bytes, sb, dumpe2fs })
    }

    fn block(&self, block: FsBlock) -> &[u8] {
        let start = (block.0 << self.sb.block_size_bits()) as usize;
        &self.bytes[start..start + self.sb.block_size() as usize]
    }

    fn desc(&self, group: GroupNumber) -> GroupDesc<&[u8]> {
        let (n, offset) = self.sb.descriptor_at(group);
        let block = self.block(self.sb.descriptor_block(n));
        let end = offset as usize + usize::from(self.sb.desc_size());
        GroupDesc::new(&block[offset as usize..end]).unwrap()
    }

    fn inode(&self, number: InodeNumber) -> InodeRef<'_> {
        let at = self.sb.inode_location(number).unwrap();
        let block = self.desc(at.group).inode_table() + u64::from(at.table_block);
        let end = at.offset as usize + usize::from(self.sb.inode_size());
        Inode::new(&self.block(block)[at.offset as usize..end]).unwrap()
    }

    /// The value dumpe2fs prints after `name:`.
    fn shown(&self, name: &str) -> &str {
        let line = self.dumpe2fs.lines().find(|line| line.starts_with(&format!("{name}:")));
        line.unwrap_or_else(|| panic!("dumpe2fs prints no {name}"))[name.len() + 1..].trim()
    }

    fn check_superblock(&self) {
        let sb = &self.sb;
        assert_eq!(sb.features().to_string(), self.shown("Filesystem features"));
        assert_eq!(sb.uuid().to_string(), self.shown("Filesystem UUID"));
        let numbers = [
            ("Inode count", u64::from(sb.inodes_count())),
            ("Block count", sb.blocks_count()),
            ("Reserved block count", sb.reserved_blocks_count()),
            ("Free blocks", sb.free_blocks_count()),
            ("Free inodes", u64::from(sb.free_inodes_count())),
            ("First block", sb.first_data_block().0),
            ("Block size", u64::from(sb.block_size())),
            ("Blocks per group", u64::from(sb.blocks_per_group())),
            ("Inodes per group", u64::from(sb.inodes_per_group())),
            ("Inode blocks per group", u64::from(sb.inode_table_blocks())),
            ("Inode size", u64::from(sb.inode_size())),
        ];
        // dumpe2fs prints no inode size for revision 0.
        let shown = numbers.iter().filter(|(name, _)| *name != "Inode size" || !sb.is_rev0());
        for (name, ours) in shown {
            assert_eq!(ours.to_string(), self.shown(name), "{name}");
        }
        assert_eq!(self.sb.clone().sealed_bytes(), &self.bytes[1024..2048]);
    }

    /// Every descriptor, bitmap and backup, and the counts against the bitmaps.
    fn check_groups(&self) {
        let sb = &self.sb;
        let how = sb.desc_checksum();
        let mut free_blocks = 0;
        for group in sb.groups() {
            let desc = self.desc(group);
            desc.verify(how, group).unwrap();
            desc.check(sb, group).unwrap();
            let counted = !desc.flags().contains(GroupFlags::BLOCK_UNINIT)
                || !sb.features().group_desc_csum();
            let map = self.block(desc.block_bitmap());
            if counted {
                desc.verify_block_bitmap(sb, group, map).unwrap();
                assert_eq!(
                    bitmap::count_zero(map, sb.clusters_in_group(group)),
                    desc.free_blocks_count()
                );
            }
            if !desc.flags().contains(GroupFlags::INODE_UNINIT) || !sb.features().group_desc_csum()
            {
                let map = self.block(desc.inode_bitmap());
                desc.verify_inode_bitmap(sb, group, map).unwrap();
                assert_eq!(
                    bitmap::count_zero(map, sb.inodes_per_group()),
                    desc.free_inodes_count()
                );
            }
            free_blocks += u64::from(desc.free_blocks_count()) * u64::from(sb.cluster_ratio());
            if group.0 != 0 && sb.has_super(group) {
                let backup = self.block(sb.group_first_block(group));
                Superblock::parse(backup).unwrap();
                assert_eq!(sb.sealed_copy(group)[0x5A..0x5C], backup[0x5A..0x5C]);
            }
            self.check_group_line(group, &desc);
        }
        assert_eq!(free_blocks, sb.free_blocks_count());
    }

    /// The places dumpe2fs prints for a group.
    fn check_group_line(&self, group: GroupNumber, desc: &GroupDesc<&[u8]>) {
        let from =
            self.dumpe2fs.find(&format!("Group {group}:")).expect("dumpe2fs lists the group");
        let text = &self.dumpe2fs[from..];
        let text = &text[..text[1..].find("\nGroup ").map_or(text.len(), |end| end + 1)];
        assert!(text.contains(&format!("Block bitmap at {}", desc.block_bitmap())), "{text}");
        assert!(text.contains(&format!("Inode bitmap at {}", desc.inode_bitmap())), "{text}");
        assert!(text.contains(&format!("Inode table at {}-", desc.inode_table())), "{text}");
        assert_eq!(text.contains("superblock at"), self.sb.has_super(group), "{text}");
        let unit = if self.sb.features().bigalloc() { "clusters" } else { "blocks" };
        let (blocks, inodes) = (desc.free_blocks_count(), desc.free_inodes_count());
        let counts = format!("{blocks} free {unit}, {inodes} free inodes");
        assert!(text.contains(&counts), "{counts} not in {text}");
    }

    /// Every inode in use: its checksum, and its extent tree with all checksums.
    fn check_inodes(&self) -> u32 {
        let mut deepest = 0;
        for group in self.sb.groups() {
            let desc = self.desc(group);
            let uninit = self.sb.features().group_desc_csum()
                && desc.flags().contains(GroupFlags::INODE_UNINIT);
            let used = if uninit { &[][..] } else { self.block(desc.inode_bitmap()) };
            for run in bitmap::set_runs(used, 0, self.sb.inodes_per_group()) {
                for index in run.start..run.end() {
                    let number = self.sb.inode_number(group, index);
                    let inode = self.inode(number);
                    inode.verify(&self.sb, number).unwrap();
                    inode.check_extra_isize().unwrap();
                    if inode.flags().contains(InodeFlags::EXTENTS) {
                        let root =
                            ExtentNode::checked(&inode.i_block()[..], &NodeLimits::root(&self.sb))
                                .unwrap();
                        deepest = deepest.max(u32::from(root.depth()));
                        let seed = inode.csum_seed(self.sb.csum_seed(), number);
                        self.check_below(&root, NodeLimits::root(&self.sb), seed);
                    }
                }
            }
        }
        deepest
    }

    fn check_below(&self, node: &ExtentNode<&[u8]>, limits: NodeLimits, seed: u32) {
        for (at, entry) in node.indexes().enumerate() {
            let limits = limits.child(node, at);
            let child = ExtentNode::checked(self.block(entry.child), &limits).unwrap();
            if self.sb.features().metadata_csum() {
                child.verify(seed).unwrap();
            }
            self.check_below(&child, limits, seed);
        }
    }

    fn check_all(&self) {
        self.check_superblock();
        self.check_groups();
        self.check_inodes();
        let root = self.inode(InodeNumber::ROOT);
        assert_eq!(root.file_type(), Some(FileType::Directory));
        assert_eq!(root.links_count(), 3);
    }
}

macro_rules! image_tests {
    ($($name:ident: $args:expr, $size:expr;)*) => {$(
        #[test]
        fn $name() {
            if let Some(image) = Image::make(&$args, $size) {
                image.check_all();
            }
        }
    )*};
}

image_tests! {
    ext4_default_parses_as_dumpe2fs_shows_it: ["-t", "ext4"], "600M";
    ext4_1k_blocks_parses: ["-t", "ext4", "-b", "1024"], "64M";
    ext4_2k_blocks_parses: ["-t", "ext4", "-b", "2048", "-O", "metadata_csum_seed,orphan_file"], "64M";
    ext4_without_64bit_parses: ["-t", "ext4", "-b", "1024", "-O", "^64bit"], "64M";
    ext4_gdt_csum_parses: ["-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg"], "64M";
    ext4_gdt_csum_without_64bit_parses: ["-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^64bit,uninit_bg"], "64M";
    ext4_meta_bg_parses: ["-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode"], "300M";
    ext4_sparse_super2_parses: ["-t", "ext4", "-b", "1024", "-O", "sparse_super2"], "100M";
    ext4_bigalloc_parses: ["-t", "ext4", "-b", "4096", "-O", "bigalloc", "-C", "16384"], "512M";
    ext4_bigalloc_1k_parses: ["-t", "ext4", "-b", "1024", "-O", "bigalloc", "-C", "8192"], "128M";
    ext4_64k_blocks_parses: ["-t", "ext4", "-b", "65536"], "128M";
    ext4_512_byte_inodes_parse: ["-t", "ext4", "-I", "512"], "64M";
    ext4_128_byte_inodes_parse: ["-t", "ext4", "-I", "128"], "64M";
    ext3_default_parses: ["-t", "ext3"], "64M";
    ext2_default_parses: ["-t", "ext2"], "64M";
    ext2_revision_0_parses: ["-t", "ext2", "-r", "0", "-O", "none", "-b", "1024"], "32M";
    ext2_without_sparse_super_parses: ["-t", "ext2", "-O", "^sparse_super,^resize_inode", "-b", "1024"], "64M";
}

#[test]
fn a_deep_extent_tree_checks_out_level_by_level() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    let file = std::fs::File::create(tree.join("holes")).unwrap();
    for block in 0..3000u64 {
        std::os::unix::fs::FileExt::write_at(&file, b"data", block * 8192).unwrap();
    }
    let from = tree.to_str().unwrap();
    let args = ["-t", "ext4", "-b", "1024", "-O", "metadata_csum", "-d", from];
    if let Some(image) = Image::make_in(dir.path(), &args, "64M") {
        assert_eq!(image.check_inodes(), 2);
    }
}

#[test]
fn a_changed_byte_is_found_by_each_checksum() {
    let Some(image) = Image::make(&["-t", "ext4", "-b", "1024"], "32M") else { return };
    let mut sb = image.bytes[1024..2048].to_vec();
    sb[0x78] ^= 1;
    let error = Superblock::parse(&sb).unwrap_err();
    assert!(error.to_string().starts_with("superblock: checksum is 0x"), "{error}");

    let mut desc = image.desc(GroupNumber(1)).bytes().to_vec();
    desc[12] ^= 1;
    let desc = GroupDesc::new(&desc[..]).unwrap();
    assert!(desc.verify(image.sb.desc_checksum(), GroupNumber(1)).is_err());

    let mut inode = image.inode(InodeNumber::ROOT).bytes().to_vec();
    inode[200] ^= 1;
    assert!(Inode::new(&inode[..]).unwrap().verify(&image.sb, InodeNumber::ROOT).is_err());
    assert!(image.inode(InodeNumber::ROOT).verify(&image.sb, InodeNumber(3)).is_err());
}
