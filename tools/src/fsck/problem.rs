//! Every problem the checker can find: a number, a weight and a message.
//!
//! A message names its place by fields in braces, filled from an [`At`]. The
//! number's high byte is the pass. Weights follow `e2fsck -n`: what it reports
//! without counting it against the filesystem is a [`Weight::Warning`] here, so
//! that the exit status of both agree; `-E strict` counts warnings too.

use std::fmt;

/// What a problem does to the verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// The filesystem has errors.
    Error,
    /// Reported, and harmless enough for e2fsck to call the filesystem clean.
    Warning,
}

/// One row of the table.
#[derive(Debug)]
pub struct Row {
    /// Stable number: pass in the high byte.
    pub number: u32,
    /// What it does to the verdict.
    pub weight: Weight,
    /// The message, with `{fields}` of [`At`].
    pub message: &'static str,
}

macro_rules! problems {
    ($($name:ident = $number:literal, $weight:ident, $message:literal;)*) => {
        /// A kind of problem; see its message in the table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs)] // The messages of the table say it.
        pub enum Code { $($name,)* }

        impl Code {
            /// Every kind, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its row.
            pub fn row(self) -> &'static Row {
                match self {
                    $(Self::$name => {
                        const ROW: Row =
                            Row { number: $number, weight: Weight::$weight, message: $message };
                        &ROW
                    })*
                }
            }
        }
    };
}

problems! {
    // Superblock, descriptors and journal.
    SuperUnusable = 0x000001, Warning, "the superblock cannot be used: {text}";
    SuperFromBackup = 0x000002, Warning, "using the backup superblock in block {blk}";
    SuperNoBackup = 0x000003, Error, "no backup superblock can be used either";
    SuperField = 0x000004, Error, "superblock: {text}; cannot go on";
    SizeWrong = 0x000005, Error,
        "the superblock says {num} blocks, the device has {num2}; cannot go on";
    ExtraIsize = 0x000006, Warning, "superblock: {text} is {num}, which no inode can have";
    BothCsums = 0x000007, Warning, "superblock: metadata_csum and uninit_bg are both set";
    SeedWithoutCsum = 0x000008, Warning, "superblock: metadata_csum_seed without metadata_csum";
    WideWithoutExtents = 0x000009, Warning, "superblock: 64bit without extent";
    DescUnusable = 0x00000A, Warning, "the descriptor of group {group} cannot be used: {text}";
    DescFromBackup = 0x00000B, Warning, "using the descriptors of the backup in block {blk}";
    BlockBitmapPlace = 0x00000C, Warning,
        "group {group}: the block bitmap at block {blk} is outside the group";
    InodeBitmapPlace = 0x00000D, Warning,
        "group {group}: the inode bitmap at block {blk} is outside the group";
    InodeTablePlace = 0x00000E, Error,
        "group {group}: the inode table at block {blk} is outside the group";
    DescCsum = 0x00000F, Warning,
        "group {group}: the descriptor's checksum is {num:x}, computed {num2:x}";
    UninitWithoutCsum = 0x000010, Warning,
        "group {group}: marked uninitialised without the feature for it";
    LastGroupUninit = 0x000011, Warning,
        "group {group}: the last group's block bitmap is marked uninitialised";
    ItableUnused = 0x000012, Warning, "group {group}: {num} unused inodes are too many";
    DescCounts = 0x000013, Warning, "group {group}: {text} is {num}, more than there can be";
    SuperCounts = 0x000014, Warning, "superblock: {text} is {num}, more than there are";
    FutureTime = 0x000015, Warning, "superblock: {text} lies in the future";
    ReservedGdtWithoutFeature = 0x000016, Warning,
        "superblock: {num} reserved descriptor blocks without resize_inode";
    ResizeWithMetaBg = 0x000017, Warning, "superblock: resize_inode and meta_bg are both set";
    ResizeInodeNotClear = 0x000018, Warning, "inode {ino}: the resize inode is not empty";
    ResizeInodeBad = 0x000019, Warning, "inode {ino}: the resize inode is invalid: {text}";
    QuotaInode = 0x00001A, Error, "superblock: {num} cannot be a quota inode";
    JournalInode = 0x00001B, Error, "inode {ino}: the journal's inode is invalid: {text}";
    JournalSuper = 0x00001C, Error, "the journal's superblock in block {blk}: {text}";
    JournalFlags = 0x00001D, Warning, "superblock: journal fields are set without has_journal";
    JournalStartSet = 0x00001E, Warning,
        "the journal holds transactions, but needs_recovery is not set";
    JournalNotReplayed = 0x00001F, Warning,
        "the journal needs recovery and cannot be looked through: {text}";
    JournalExternal = 0x000020, Warning, "the journal is on another device and not checked";
    TablesTooLarge = 0x000021, Error,
        "superblock: tables of {num} inodes do not fit the device; cannot go on";
    Feature = 0x000022, Error, "superblock: unsupported feature {text}";
    SuperInJournal = 0x000025, Error,
        "the superblock cannot be used: {text}; the journal has it whole";
    JournalDamaged = 0x000024, Error, "the journal cannot be replayed whole: {text}";
    FirstMetaBg = 0x000023, Warning, "superblock: s_first_meta_bg is {num}, {num2} at most";

    // Pass 1: inodes and blocks.
    InodeTableConflict = 0x010001, Error,
        "group {group}: block {blk} of the inode table is used for other metadata";
    BlockBitmapConflict = 0x010002, Error,
        "group {group}: the block bitmap's block {blk} is used for other metadata";
    InodeBitmapConflict = 0x010003, Error,
        "group {group}: the inode bitmap's block {blk} is used for other metadata";
    LowDtime = 0x010004, Error,
        "inode {ino} was on the orphan list or has a damaged deletion time ({num})";
    ZeroDtime = 0x010005, Error, "inode {ino} is deleted, but its deletion time is 0";
    CasefoldNotDir = 0x010006, Error, "inode {ino} has the casefold flag and is no directory";
    CasefoldFeature = 0x010007, Error,
        "inode {ino} has the casefold flag without the feature";
    EaInodeNotRegular = 0x010008, Error, "inode {ino} has the ea_inode flag and is no file";
    InlineAndExtents = 0x010009, Error, "inode {ino} has both inline data and extents";
    InlineFeature = 0x01000A, Error, "inode {ino} has inline data without the feature";
    InlineNoAttribute = 0x01000B, Error, "inode {ino} has inline data without its attribute";
    ExtentFeature = 0x01000C, Error, "inode {ino} has extents without the feature";
    ExtentFlagMissing = 0x01000D, Error, "inode {ino} holds extents without the flag";
    BadBlocksInode = 0x01000E, Error, "inode {ino}, the bad block list, is invalid";
    BadBlockIllegal = 0x01000F, Error, "inode {ino}: bad block {blk} is outside the filesystem";
    BadBlockMetadata = 0x010010, Error, "inode {ino}: bad block {blk} is used for {text}";
    RootNotDir = 0x010011, Error, "inode {ino}: the root is no directory";
    RootDtime = 0x010012, Error, "inode {ino}: the root has a deletion time";
    JournalMode = 0x010013, Error, "inode {ino}: the journal is no regular file";
    ReservedNotClear = 0x010014, Error, "inode {ino} should be empty: {text}";
    QuotaMode = 0x010015, Error, "inode {ino}: the quota file is no regular file";
    OrphanFileMode = 0x010016, Error, "inode {ino}: the orphan file is no regular file";
    ReservedMode = 0x010017, Error, "inode {ino} is reserved and has mode {num:o}";
    InUseDtime = 0x010018, Error, "inode {ino} is in use, but has a deletion time";
    BadField = 0x010019, Error, "inode {ino}: {text}";
    Imagic = 0x01001A, Error, "inode {ino} has the imagic flag";
    InodeExtraIsize = 0x01001B, Error, "inode {ino}: i_extra_isize is {num}";
    TimeRange = 0x01001C, Warning, "inode {ino}: a time lies beyond 2310";
    ReallyDirectory = 0x01001D, Error, "inode {ino} looks like a directory with mode {num:o}";
    FastSymlinkExtents = 0x01001E, Error, "inode {ino} is a short symlink with the extents flag";
    SpecialFlags = 0x01001F, Warning, "inode {ino} is a special file with flags {num:x}";
    SpecialSize = 0x010020, Error, "inode {ino} is a special file of {num} bytes";
    Immutable = 0x010021, Warning,
        "inode {ino} is a special file or symlink and immutable or append-only";
    InodeCsum = 0x010022, Error, "inode {ino}: the checksum is {num:x}, computed {num2:x}";
    XattrBlockBad = 0x010023, Error,
        "inode {ino}: attribute block {blk} is invalid: {text}";
    XattrInodeBad = 0x010024, Error, "inode {ino}: attributes are invalid: {text}";
    XattrCsum = 0x010025, Error, "inode {ino}: attribute block {blk}: {text}";
    XattrHash = 0x010026, Error, "inode {ino}: an attribute's hash is {num:x}, computed {num2:x}";
    XattrRefcount = 0x010027, Error,
        "attribute block {blk} has {num} as its reference count, {num2} refer to it";
    XattrValueInode = 0x010028, Error,
        "inode {ino}: inode {num} cannot hold an attribute's value";
    XattrValueFeature = 0x010044, Warning,
        "inode {ino}: inode {num} holds an attribute's value without the ea_inode feature";
    NoEncryptionContext = 0x010045, Error, "inode {ino} is encrypted without a policy";
    BadBlockSpare = 0x010046, Warning,
        "inode {ino}: bad block {blk} lies in a backup or spare metadata";
    ReservedField = 0x010047, Warning, "inode {ino} is reserved: {text}";
    IllegalBlock = 0x010029, Error,
        "inode {ino}: block {blk} (block {num} of the file) is outside the filesystem";
    TooBig = 0x01002A, Error, "inode {ino}: block {num} is beyond what its type can have";
    MetadataCollision = 0x01002B, Error,
        "inode {ino}: block {blk}, which maps others, lies in metadata";
    MapBlockShared = 0x01002C, Error,
        "inode {ino}: block {blk}, which maps others, is already in use; not followed";
    ExtentHeader = 0x01002D, Error, "inode {ino}: extent node in block {blk}: {text}";
    ExtentCsum = 0x01002E, Error, "inode {ino}: extent node in block {blk}: {text}";
    ExtentStart = 0x01002F, Error,
        "inode {ino}: extent at {num} begins at block {blk}, outside the filesystem";
    ExtentOrder = 0x010030, Error, "inode {ino}: extent at {num} in block {blk} is out of order";
    ExtentLength = 0x010031, Error, "inode {ino}: extent at {num} has length {num2}";
    ExtentEnd = 0x010032, Error,
        "inode {ino}: extent at {num} of {num2} blocks from {blk} leaves the filesystem";
    ExtentOutOfParent = 0x010033, Error,
        "inode {ino}: extent at {num} of {num2} blocks leaves what its parent maps";
    ExtentCollision = 0x010034, Error, "inode {ino}: extent at {num} overlaps the one before";
    ExtentIndexStart = 0x010035, Error,
        "inode {ino}: index entry at {num} leads to a node that begins at {num2}";
    UnwrittenDir = 0x010036, Error, "inode {ino}: directory block {num} is unwritten";
    DirHoleExtent = 0x010037, Error, "inode {ino}: directory blocks {num} to {num2} are missing";
    ZeroLengthDir = 0x010038, Error, "inode {ino} is a directory without blocks";
    BadSize = 0x010039, Error, "inode {ino}: i_size is {num}, which {num2} blocks contradict";
    BadBlocks = 0x01003A, Error, "inode {ino}: i_blocks is {num}, counted {num2}";
    IndexNotDir = 0x01003B, Error, "inode {ino} has the index flag and is no directory";
    IndexFeature = 0x01003C, Error, "inode {ino} has the index flag without the feature";
    IndexRoot = 0x01003D, Error, "inode {ino}: the index root is invalid: {text}";
    DuplicateBlock = 0x01003E, Error, "inode {ino}: block {blk} is claimed more than once";
    TooManyDuplicates = 0x01003F, Error,
        "inode {ino}: too many blocks are claimed more than once; no further block is followed";
    BigallocMap = 0x010040, Error, "inode {ino} has a block map on a bigalloc filesystem";
    MisalignedCluster = 0x010041, Warning,
        "inode {ino}: block {blk} does not lie in its cluster as block {num} of the file does";
    ReadInodes = 0x010042, Error, "group {group}: inode table block {blk} cannot be read";
    ReadBlock = 0x010043, Error, "inode {ino}: block {blk} cannot be read";

    // Pass 2: directories.
    DirCsum = 0x020001, Error, "directory {ino}, block {num}: {text}";
    DirNoTail = 0x020002, Error, "directory {ino}, block {num}: no room for a checksum";
    DirHole = 0x020003, Error, "directory {ino}, block {num}: not allocated";
    DirCorrupt = 0x020004, Error, "directory {ino}, block {num}: {text}";
    MissingDot = 0x020005, Error, "directory {ino} does not begin with `.`";
    DotTerminator = 0x020006, Error, "directory {ino}: `{name}` is not followed by a zero byte";
    BadDotInode = 0x020007, Error, "directory {ino}: `.` leads to inode {num}";
    BigDot = 0x020008, Warning, "directory {ino}: `.` is too long an entry";
    MissingDotDot = 0x020009, Error, "directory {ino}: the second entry is not `..`";
    LinkSelf = 0x02000A, Error, "directory {ino}: `{name}` leads to the directory itself";
    EntryInode = 0x02000B, Error, "directory {ino}: `{name}` leads to the bad inode {num}";
    DuplicateDot = 0x02000C, Error, "directory {ino}: `{name}` a second time";
    LinkRoot = 0x02000D, Error, "directory {ino}: `{name}` leads to the root";
    NullName = 0x02000E, Error, "directory {ino}: an entry without a name leads to {num}";
    EntryUninit = 0x02000F, Error,
        "directory {ino}: `{name}` leads to inode {num} in uninitialised group {group}";
    EntryUnusedArea = 0x020010, Error,
        "directory {ino}: `{name}` leads to inode {num} in the unused part of group {group}";
    EntryUnused = 0x020011, Error, "directory {ino}: `{name}` leads to the unused inode {num}";
    FiletypeWithoutFeature = 0x020012, Error,
        "directory {ino}: `{name}` has a file type without the feature";
    Filetype = 0x020013, Error,
        "directory {ino}: `{name}` has file type {num}, should be {num2}";
    FiletypeUnset = 0x020014, Warning,
        "directory {ino}: `{name}` has no file type, should have {num2}";
    BadName = 0x020015, Error, "directory {ino}: `{name}` has illegal characters";
    ShortEncryptedName = 0x020016, Error, "directory {ino}: an encrypted name is too short";
    DirLinkedTwice = 0x020017, Error,
        "directory {ino}: `{name}` leads to directory {num}, whose parent is {num2}";
    DuplicateName = 0x020018, Error, "directory {ino}: `{name}` twice";
    IndexNode = 0x020019, Error, "directory {ino}, index block {num}: {text}";
    IndexBadBlock = 0x02001A, Error, "directory {ino}, index block {num}: leads to block {num2}";
    IndexOrder = 0x02001B, Error, "directory {ino}, index block {num}: hashes out of order";
    IndexMinHash = 0x02001C, Error, "directory {ino}, block {num}: a hash is below its index's";
    IndexMaxHash = 0x02001D, Error, "directory {ino}, block {num}: a hash is above its index's";
    IndexDepth = 0x02001E, Error, "directory {ino}, block {num}: depth {num2} in the index";
    IndexUnreferenced = 0x02001F, Error, "directory {ino}, block {num}: not in the index";
    IndexTwice = 0x020020, Error, "directory {ino}, block {num}: twice in the index";
    LargeFile = 0x020021, Error, "superblock: files of 2 GiB and more without large_file";
    EntryEaInode = 0x020022, Error,
        "directory {ino}: `{name}` leads to inode {num}, which holds an attribute's value";
    LargeDir = 0x020023, Error, "superblock: large directories without large_dir";

    // Pass 3: connectivity.
    NoRoot = 0x030001, Error, "there is no root directory";
    Unconnected = 0x030002, Error, "directory {ino} is not connected (`..` leads to {num})";
    Loop = 0x030003, Error, "directory {ino} is its own ancestor";
    BadDotDot = 0x030004, Error, "directory {ino}: `..` leads to {num}, should be {num2}";

    // Pass 4: links.
    Unattached = 0x040001, Error, "inode {ino} has no name";
    LinkCount = 0x040002, Error, "inode {ino} has link count {num}, counted {num2}";
    DirNlink = 0x040003, Error, "inode {ino} has too many subdirectories without dir_nlink";

    // Pass 5: bitmaps and counts.
    BlockMapDiff = 0x050001, Error, "group {group}: block bitmap: {text}";
    InodeMapDiff = 0x050002, Error, "group {group}: inode bitmap: {text}";
    FreeBlocksGroup = 0x050003, Error, "group {group}: {num} free blocks, counted {num2}";
    FreeInodesGroup = 0x050004, Error, "group {group}: {num} free inodes, counted {num2}";
    DirsGroup = 0x050005, Error, "group {group}: {num} directories, counted {num2}";
    FreeBlocks = 0x050006, Warning, "superblock: {num} free blocks, counted {num2}";
    FreeInodes = 0x050007, Warning, "superblock: {num} free inodes, counted {num2}";
    BlockMapPadding = 0x050008, Error, "group {group}: the block bitmap's padding is not set";
    InodeMapPadding = 0x050009, Error, "group {group}: the inode bitmap's padding is not set";
    BlockMapCsum = 0x05000A, Error, "group {group}: {text}";
    InodeMapCsum = 0x05000B, Error, "group {group}: {text}";
    ReadMap = 0x05000C, Error, "group {group}: the bitmap in block {blk} cannot be read";

    // The orphan file.
    OrphanWithoutJournal = 0x060001, Error, "superblock: orphan_file without has_journal";
    OrphanFileBad = 0x060002, Error, "inode {ino}: the orphan file is invalid: {text}";
    OrphanPresentClean = 0x060003, Error, "superblock: orphan_present, and no orphan";
    OrphanPresentNoFile = 0x060004, Error, "superblock: orphan_present without orphan_file";
}

/// Where a problem is, and its numbers: what a message may name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct At {
    /// `{ino}`.
    pub ino: u32,
    /// `{blk}`.
    pub blk: u64,
    /// `{group}`.
    pub group: u32,
    /// `{num}`, `{num:x}`, `{num:o}`.
    pub num: u64,
    /// `{num2}`, `{num2:x}`.
    pub num2: u64,
    /// `{name}`, printed with escapes.
    pub name: Vec<u8>,
    /// `{text}`.
    pub text: String,
}

impl At {
    /// Nowhere in particular.
    pub fn fs() -> Self {
        Self::default()
    }

    /// An inode.
    pub fn ino(ino: u32) -> Self {
        Self { ino, ..Self::default() }
    }

    /// A group.
    pub fn group(group: u32) -> Self {
        Self { group, ..Self::default() }
    }

    /// With a block.
    #[must_use]
    pub fn blk(self, blk: u64) -> Self {
        Self { blk, ..self }
    }

    /// With a group.
    #[must_use]
    pub fn in_group(self, group: u32) -> Self {
        Self { group, ..self }
    }

    /// With a number.
    #[must_use]
    pub fn num(self, num: impl Into<u64>) -> Self {
        Self { num: num.into(), ..self }
    }

    /// With a second number.
    #[must_use]
    pub fn num2(self, num2: impl Into<u64>) -> Self {
        Self { num2: num2.into(), ..self }
    }

    /// With a name from a directory.
    #[must_use]
    pub fn name(self, name: &[u8]) -> Self {
        Self { name: name.to_vec(), ..self }
    }

    /// With words.
    #[must_use]
    pub fn text(self, text: impl Into<String>) -> Self {
        Self { text: text.into(), ..self }
    }
}

/// A problem found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its kind.
    pub code: Code,
    /// Its place.
    pub at: At,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.code.row().message;
        while let Some((before, after)) = rest.split_once('{') {
            f.write_str(before)?;
            let (field, after) = after.split_once('}').unwrap_or((after, ""));
            match field {
                "ino" => write!(f, "{}", self.at.ino)?,
                "blk" => write!(f, "{}", self.at.blk)?,
                "group" => write!(f, "{}", self.at.group)?,
                "num" => write!(f, "{}", self.at.num)?,
                "num:x" => write!(f, "{:#x}", self.at.num)?,
                "num:o" => write!(f, "{:#o}", self.at.num)?,
                "num2" => write!(f, "{}", self.at.num2)?,
                "num2:x" => write!(f, "{:#x}", self.at.num2)?,
                "name" => write!(f, "{}", self.at.name.escape_ascii())?,
                "text" => f.write_str(&self.at.text)?,
                _ => f.write_str(field)?,
            }
            rest = after;
        }
        f.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn numbers_are_unique() {
        let numbers: HashSet<_> = Code::ALL.iter().map(|code| code.row().number).collect();
        assert_eq!(numbers.len(), Code::ALL.len());
    }

    #[test]
    fn every_message_names_only_fields_there_are() {
        let fields =
            ["ino", "blk", "group", "num", "num:x", "num:o", "num2", "num2:x", "name", "text"];
        for code in Code::ALL {
            for part in code.row().message.split('{').skip(1) {
                let field = part.split('}').next().unwrap_or_default();
                assert!(fields.contains(&field), "{code:?} names {field}");
            }
        }
    }

    #[test]
    fn a_message_says_its_place() {
        let at = At::ino(12).num(3u32).num2(4u32).name(b"a\n");
        let problem = Problem { code: Code::Filetype, at };
        assert_eq!(problem.to_string(), r"directory 12: `a\n` has file type 3, should be 4");
    }
}
