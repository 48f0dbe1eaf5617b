//! Feature bits of the superblock, spelled as `mke2fs -O` and `tune2fs -O` spell them.
//!
//! Source: Documentation/filesystems/ext4/super.rst and e2p's feature list.
//!
//! Invariant: unknown bits are kept. They print as `FEATURE_C5`, `FEATURE_I31`,
//! `FEATURE_R17` (set and bit number), as `dumpe2fs` prints them, and parse back.

use std::fmt;
use std::str::FromStr;

use bitflags::bitflags;

bitflags! {
    /// Features an old implementation may ignore (`s_feature_compat`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
    pub struct Compat: u32 {
        /// Directory blocks are preallocated; never implemented.
        const DIR_PREALLOC = 0x0001;
        /// AFS "imagic" inodes exist.
        const IMAGIC_INODES = 0x0002;
        /// There is a journal.
        const HAS_JOURNAL = 0x0004;
        /// Extended attributes may exist.
        const EXT_ATTR = 0x0008;
        /// Reserved descriptor blocks belong to inode 7.
        const RESIZE_INODE = 0x0010;
        /// Directories may be hash trees.
        const DIR_INDEX = 0x0020;
        /// Lazy block groups; never merged.
        const LAZY_BG = 0x0040;
        /// Snapshot exclude bitmap; never merged.
        const EXCLUDE_BITMAP = 0x0100;
        /// Two backups at most, in the groups of `s_backup_bgs`.
        const SPARSE_SUPER2 = 0x0200;
        /// The journal may hold fast commits.
        const FAST_COMMIT = 0x0400;
        /// Inode numbers and the UUID may not change (encryption keys derive from them).
        const STABLE_INODES = 0x0800;
        /// Orphans are listed in a file.
        const ORPHAN_FILE = 0x1000;
        const _ = !0;
    }
}

bitflags! {
    /// Features without which the filesystem must not be mounted (`s_feature_incompat`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
    pub struct Incompat: u32 {
        /// Compressed files; never merged.
        const COMPRESSION = 0x0001;
        /// Directory entries carry the file type.
        const FILETYPE = 0x0002;
        /// The journal holds transactions to replay.
        const RECOVER = 0x0004;
        /// This is an external journal.
        const JOURNAL_DEV = 0x0008;
        /// Group descriptors are spread over the device.
        const META_BG = 0x0010;
        /// Files may be mapped by extents.
        const EXTENTS = 0x0040;
        /// Block numbers of 64 bits, wide descriptors.
        const BIT64 = 0x0080;
        /// Multiple mount protection.
        const MMP = 0x0100;
        /// Bitmaps and inode tables may lie in other groups.
        const FLEX_BG = 0x0200;
        /// Attribute values may live in inodes.
        const EA_INODE = 0x0400;
        /// Data in directory entries; never merged.
        const DIRDATA = 0x1000;
        /// The checksum seed is in the superblock.
        const CSUM_SEED = 0x2000;
        /// Directories over 2 GiB or with three hash tree levels.
        const LARGEDIR = 0x4000;
        /// Small files and directories live in the inode.
        const INLINE_DATA = 0x8000;
        /// Encrypted files may exist.
        const ENCRYPT = 0x1_0000;
        /// Directories may ignore case.
        const CASEFOLD = 0x2_0000;
        const _ = !0;
    }
}

bitflags! {
    /// Features without which the filesystem must not be written (`s_feature_ro_compat`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
    pub struct RoCompat: u32 {
        /// Backups only in groups 0, 1 and powers of 3, 5, 7.
        const SPARSE_SUPER = 0x0001;
        /// A file of 2 GiB or more exists or may exist.
        const LARGE_FILE = 0x0002;
        /// Directories as B-trees; never implemented.
        const BTREE_DIR = 0x0004;
        /// `i_blocks` has 48 bits and may count filesystem blocks.
        const HUGE_FILE = 0x0008;
        /// Descriptors carry a CRC-16; groups may be uninitialised.
        const GDT_CSUM = 0x0010;
        /// A directory may have more than 65,000 subdirectories.
        const DIR_NLINK = 0x0020;
        /// `s_min_extra_isize` and `s_want_extra_isize` hold.
        const EXTRA_ISIZE = 0x0040;
        /// Snapshots; never merged.
        const HAS_SNAPSHOT = 0x0080;
        /// Quota files are hidden inodes.
        const QUOTA = 0x0100;
        /// Allocation in clusters of blocks.
        const BIGALLOC = 0x0200;
        /// All metadata carries CRC-32C.
        const METADATA_CSUM = 0x0400;
        /// Replicas; never merged.
        const REPLICA = 0x0800;
        /// The filesystem is marked read-only.
        const READONLY = 0x1000;
        /// Project quotas.
        const PROJECT = 0x2000;
        /// Blocks may be shared between files.
        const SHARED_BLOCKS = 0x4000;
        /// Files with fs-verity exist.
        const VERITY = 0x8000;
        /// The orphan file may hold orphans.
        const ORPHAN_PRESENT = 0x1_0000;
        const _ = !0;
    }
}

/// Names of a set in bit order; a later entry of the same bit is an alias.
type Names = &'static [(u32, &'static str)];

const COMPAT_NAMES: Names = &[
    (0x0001, "dir_prealloc"),
    (0x0002, "imagic_inodes"),
    (0x0004, "has_journal"),
    (0x0008, "ext_attr"),
    (0x0010, "resize_inode"),
    (0x0020, "dir_index"),
    (0x0040, "lazy_bg"),
    (0x0100, "snapshot_bitmap"),
    (0x0200, "sparse_super2"),
    (0x0400, "fast_commit"),
    (0x0800, "stable_inodes"),
    (0x1000, "orphan_file"),
];

const INCOMPAT_NAMES: Names = &[
    (0x0001, "compression"),
    (0x0002, "filetype"),
    (0x0004, "needs_recovery"),
    (0x0008, "journal_dev"),
    (0x0010, "meta_bg"),
    (0x0040, "extent"),
    (0x0040, "extents"),
    (0x0080, "64bit"),
    (0x0100, "mmp"),
    (0x0200, "flex_bg"),
    (0x0400, "ea_inode"),
    (0x1000, "dirdata"),
    (0x2000, "metadata_csum_seed"),
    (0x4000, "large_dir"),
    (0x8000, "inline_data"),
    (0x1_0000, "encrypt"),
    (0x2_0000, "casefold"),
    (0x2_0000, "fname_encoding"),
];

const RO_COMPAT_NAMES: Names = &[
    (0x0001, "sparse_super"),
    (0x0002, "large_file"),
    (0x0008, "huge_file"),
    (0x0010, "uninit_bg"),
    (0x0010, "uninit_groups"),
    (0x0010, "gdt_csum"),
    (0x0020, "dir_nlink"),
    (0x0040, "extra_isize"),
    (0x0080, "snapshot"),
    (0x0100, "quota"),
    (0x0200, "bigalloc"),
    (0x0400, "metadata_csum"),
    (0x0800, "replica"),
    (0x1000, "read-only"),
    (0x2000, "project"),
    (0x4000, "shared_blocks"),
    (0x8000, "verity"),
    (0x1_0000, "orphan_present"),
];

/// The three sets together: what most code passes around.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub struct Features {
    /// May be ignored.
    pub compat: Compat,
    /// Needed to mount.
    pub incompat: Incompat,
    /// Needed to write.
    pub ro_compat: RoCompat,
}

/// A feature name nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown feature {0:?}")]
pub struct UnknownFeature(pub String);

impl Features {
    /// From the three words of the superblock.
    pub fn from_bits(compat: u32, incompat: u32, ro_compat: u32) -> Self {
        Self {
            compat: Compat::from_bits_retain(compat),
            incompat: Incompat::from_bits_retain(incompat),
            ro_compat: RoCompat::from_bits_retain(ro_compat),
        }
    }

    /// The feature of that name alone. Also takes `FEATURE_C5` and its kin.
    ///
    /// # Errors
    /// [`UnknownFeature`] with the name.
    pub fn by_name(name: &str) -> Result<Self, UnknownFeature> {
        let find =
            |names: Names| names.iter().find(|(_, n)| n.eq_ignore_ascii_case(name)).map(|n| n.0);
        if let Some(bit) = find(COMPAT_NAMES) {
            return Ok(Self::from_bits(bit, 0, 0));
        }
        if let Some(bit) = find(INCOMPAT_NAMES) {
            return Ok(Self::from_bits(0, bit, 0));
        }
        if let Some(bit) = find(RO_COMPAT_NAMES) {
            return Ok(Self::from_bits(0, 0, bit));
        }
        Self::by_number(name).ok_or_else(|| UnknownFeature(name.to_owned()))
    }

    /// `FEATURE_C5`, `FEATURE_I31`, `FEATURE_R17`.
    fn by_number(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("FEATURE_")?;
        let (set, number) = rest.split_at_checked(1)?;
        let bit = 1u32.checked_shl(number.parse().ok()?)?;
        match set {
            "C" => Some(Self::from_bits(bit, 0, 0)),
            "I" => Some(Self::from_bits(0, bit, 0)),
            "R" => Some(Self::from_bits(0, 0, bit)),
            _ => None,
        }
    }

    /// Applies a list as `-O` takes it: names separated by commas or blanks, `^name`
    /// clears, `none` clears all.
    ///
    /// # Errors
    /// [`UnknownFeature`] for the first unknown name; `self` is then unchanged.
    pub fn apply(&mut self, list: &str) -> Result<(), UnknownFeature> {
        let mut result = *self;
        for word in list.split([',', ' ', '\t', '\n']).filter(|word| !word.is_empty()) {
            if word.eq_ignore_ascii_case("none") {
                result = Self::default();
            } else if let Some(name) = word.strip_prefix(['^', '-']) {
                result = result.without(Self::by_name(name)?);
            } else {
                result = result.with(Self::by_name(word.strip_prefix('+').unwrap_or(word))?);
            }
        }
        *self = result;
        Ok(())
    }

    /// The features of either.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self {
            compat: self.compat | other.compat,
            incompat: self.incompat | other.incompat,
            ro_compat: self.ro_compat | other.ro_compat,
        }
    }

    /// The features of `self` that are not in `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self {
            compat: self.compat.difference(other.compat),
            incompat: self.incompat.difference(other.incompat),
            ro_compat: self.ro_compat.difference(other.ro_compat),
        }
    }

    /// Whether every feature of `other` is set.
    pub fn contains(self, other: Self) -> bool {
        other.without(self).is_empty()
    }

    /// Whether no feature is set.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Every single feature set, in the order `dumpe2fs` prints them.
    pub fn names(self) -> Vec<String> {
        let sets = [
            (self.compat.bits(), COMPAT_NAMES, 'C'),
            (self.incompat.bits(), INCOMPAT_NAMES, 'I'),
            (self.ro_compat.bits(), RO_COMPAT_NAMES, 'R'),
        ];
        let mut names = Vec::new();
        for (bits, table, letter) in sets {
            for number in (0..u32::BITS).filter(|n| bits >> n & 1 == 1) {
                let known = table.iter().find(|(bit, _)| *bit == 1 << number);
                names.push(match known {
                    Some((_, name)) => (*name).to_owned(),
                    None => format!("FEATURE_{letter}{number}"),
                });
            }
        }
        names
    }

    /// Has a journal of its own or elsewhere.
    pub fn has_journal(self) -> bool {
        self.compat.contains(Compat::HAS_JOURNAL)
    }

    /// Files may be mapped by extents.
    pub fn extents(self) -> bool {
        self.incompat.contains(Incompat::EXTENTS)
    }

    /// Block numbers of 64 bits.
    pub fn bit64(self) -> bool {
        self.incompat.contains(Incompat::BIT64)
    }

    /// Directory entries carry the file type.
    pub fn filetype(self) -> bool {
        self.incompat.contains(Incompat::FILETYPE)
    }

    /// Bitmaps and inode tables may lie in other groups.
    pub fn flex_bg(self) -> bool {
        self.incompat.contains(Incompat::FLEX_BG)
    }

    /// Group descriptors are spread over the device from `s_first_meta_bg` on.
    pub fn meta_bg(self) -> bool {
        self.incompat.contains(Incompat::META_BG)
    }

    /// All metadata carries CRC-32C.
    pub fn metadata_csum(self) -> bool {
        self.ro_compat.contains(RoCompat::METADATA_CSUM)
    }

    /// Descriptors carry a CRC-16. `metadata_csum` takes precedence when both are set.
    pub fn gdt_csum(self) -> bool {
        self.ro_compat.contains(RoCompat::GDT_CSUM) && !self.metadata_csum()
    }

    /// Descriptors carry a checksum of either kind, so groups may be uninitialised.
    pub fn group_desc_csum(self) -> bool {
        self.ro_compat.intersects(RoCompat::GDT_CSUM.union(RoCompat::METADATA_CSUM))
    }

    /// `i_blocks` has 48 bits.
    pub fn huge_file(self) -> bool {
        self.ro_compat.contains(RoCompat::HUGE_FILE)
    }

    /// Allocation in clusters.
    pub fn bigalloc(self) -> bool {
        self.ro_compat.contains(RoCompat::BIGALLOC)
    }

    /// Directories use the high half of their size.
    pub fn large_dir(self) -> bool {
        self.incompat.contains(Incompat::LARGEDIR)
    }

    /// Directories may be hash trees.
    pub fn dir_index(self) -> bool {
        self.compat.contains(Compat::DIR_INDEX)
    }

    /// Small files and directories may live in the inode.
    pub fn inline_data(self) -> bool {
        self.incompat.contains(Incompat::INLINE_DATA)
    }

    /// Orphans are listed in a file.
    pub fn orphan_file(self) -> bool {
        self.compat.contains(Compat::ORPHAN_FILE)
    }
}

impl fmt::Display for Features {
    /// Names separated by blanks, or `(none)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("(none)");
        }
        f.write_str(&self.names().join(" "))
    }
}

impl FromStr for Features {
    type Err = UnknownFeature;

    fn from_str(list: &str) -> Result<Self, UnknownFeature> {
        let mut features = Self::default();
        if list != "(none)" {
            features.apply(list)?;
        }
        Ok(features)
    }
}

macro_rules! set_display {
    ($set:ident, $field:ident) => {
        impl fmt::Display for $set {
            /// Names separated by blanks, or `(none)`.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                Features { $field: *self, ..Features::default() }.fmt(f)
            }
        }
    };
}
set_display!(Compat, compat);
set_display!(Incompat, incompat);
set_display!(RoCompat, ro_compat);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn todays_ext4_list_parses_and_prints_in_dumpe2fs_order() {
        let list = "has_journal ext_attr resize_inode dir_index orphan_file filetype extent 64bit \
                    flex_bg metadata_csum_seed sparse_super large_file huge_file dir_nlink \
                    extra_isize metadata_csum";
        let features: Features = list.parse().unwrap();
        assert_eq!(features.to_string(), list);
    }

    #[test]
    fn caret_clears_and_none_clears_all() {
        let mut features: Features = "extent,64bit,has_journal".parse().unwrap();
        features.apply("^64bit,^has_journal").unwrap();
        assert_eq!(features.to_string(), "extent");
        features.apply("none,uninit_bg").unwrap();
        assert_eq!(features.ro_compat, RoCompat::GDT_CSUM);
    }

    #[test]
    fn unknown_name_changes_nothing() {
        let mut features: Features = "extent".parse().unwrap();
        assert_eq!(features.apply("64bit,nonsense").unwrap_err().0, "nonsense");
        assert_eq!(features.to_string(), "extent");
    }

    #[test]
    fn both_checksum_features_mean_crc32c() {
        let features: Features = "uninit_bg,metadata_csum".parse().unwrap();
        assert!(!features.gdt_csum() && features.metadata_csum() && features.group_desc_csum());
    }

    proptest! {
        #[test]
        fn any_bits_survive_printing_and_parsing(c: u32, i: u32, r: u32) {
            let features = Features::from_bits(c, i, r);
            prop_assert_eq!(features.to_string().parse::<Features>().unwrap(), features);
        }

        #[test]
        fn any_text_parses_or_fails_without_a_panic(text: String) {
            let _ = text.parse::<Features>();
        }
    }
}
