//! From the command line and the device's size to numbers: what to make, not yet where.
//!
//! The defaults are those of e2fsprogs 1.47.4's mke2fs.conf.
//!
//! Invariants of [`Params`]: the features agree with each other and this program can
//! make all of them; block and inode sizes are powers of two in range.

use uext_ondisk::features::{Compat, Features, Incompat, RoCompat};
use uext_ondisk::superblock::{DefaultMountOpts, ErrorsPolicy, GOOD_OLD_INODE_SIZE};
use uuid::Uuid;

use super::error::{MkfsError, Result, usage};
use super::journal_dev::{ExternalJournal, NewJournal};
use super::options::Options;

/// What is known of the device before anything is decided.
#[derive(Clone, Copy, Debug)]
pub struct DeviceFacts {
    /// Bytes of the device or file, 0 when it does not exist yet.
    pub bytes: u64,
    /// The smallest block it takes, bytes.
    pub logical_block_size: u32,
}

/// What comes from outside the command line.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings {
    /// Seconds since 1970.
    pub now: u64,
    /// The UUID when `-U` gives none.
    pub uuid: Uuid,
    /// The seed of directory hashes when `-E hash_seed` gives none.
    pub hash_seed: Uuid,
}

impl Surroundings {
    /// The clock, or `SOURCE_DATE_EPOCH` or `E2FSPROGS_FAKE_TIME`; random UUIDs.
    pub fn from_environment() -> Self {
        let fake = ["SOURCE_DATE_EPOCH", "E2FSPROGS_FAKE_TIME"]
            .into_iter()
            .find_map(|name| std::env::var(name).ok()?.trim().parse().ok());
        let clock = || {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            since.map_or(0, |time| time.as_secs())
        };
        let now = fake.unwrap_or_else(clock);
        Self { now, uuid: Uuid::new_v4(), hash_seed: Uuid::new_v4() }
    }
}

/// A filesystem to make.
#[derive(Clone, Debug)]
pub struct Params {
    /// Its name for messages: ext2, ext3 or ext4.
    pub fs_type: String,
    /// Features.
    pub features: Features,
    /// 0 or 1.
    pub revision: u32,
    /// Bytes per block.
    pub block_size: u32,
    /// Blocks of the device to use.
    pub blocks: u64,
    /// Blocks per group that were asked for.
    pub blocks_per_group: Option<u32>,
    /// log2 of the groups in a flex group.
    pub log_flex: u8,
    /// Bytes per inode.
    pub inode_size: u16,
    /// Inodes wanted at least.
    pub inodes: u32,
    /// Blocks reserved for root, in percent of all.
    pub reserved_percent: f64,
    /// Descriptor blocks reserved for growing when `-E resize` says how far: blocks.
    pub resize_to: Option<u64>,
    /// Journal size asked for, in MiB.
    pub journal_mib: Option<u32>,
    /// First block to try for the journal.
    pub journal_location: Option<u64>,
    /// The journal when it lies on a device of its own.
    pub journal_device: Option<ExternalJournal>,
    /// Blocks of the orphan file asked for.
    pub orphan_blocks: Option<u32>,
    /// Backups under `sparse_super2`: 0 to 2.
    pub backups: u8,
    /// All bitmaps and tables at the start.
    pub packed_meta: bool,
    /// Bytes per group descriptor, under `64bit`.
    pub desc_size: u16,
    /// RAID stride in blocks.
    pub stride: u16,
    /// RAID stripe width in blocks.
    pub stripe_width: u32,
    /// Leave the zeroing of inode tables to the kernel.
    pub lazy_itable_init: bool,
    /// Do not zero the journal.
    pub lazy_journal_init: bool,
    /// The storage is known to hold zeroes.
    pub prezeroed: bool,
    /// Discard the device first.
    pub discard: bool,
    /// Owner of the root directory.
    pub root_owner: (u32, u32),
    /// Permissions of the root directory.
    pub root_perms: u16,
    /// Errors policy.
    pub errors: ErrorsPolicy,
    /// Default mount options.
    pub mount_opts: DefaultMountOpts,
    /// UUID.
    pub uuid: Uuid,
    /// Seed of directory hashes.
    pub hash_seed: Uuid,
    /// Label.
    pub label: Vec<u8>,
    /// Where it was last mounted.
    pub last_mounted: Vec<u8>,
    /// `test_fs`.
    pub test_fs: bool,
    /// Seconds since 1970.
    pub now: u64,
    /// What the user should know, one line each.
    pub warnings: Vec<String>,
}

/// Features this program can make.
const SUPPORTED: &str = "has_journal,ext_attr,resize_inode,dir_index,sparse_super2,fast_commit,\
    stable_inodes,orphan_file,filetype,extent,64bit,meta_bg,flex_bg,ea_inode,metadata_csum_seed,\
    large_dir,inline_data,sparse_super,large_file,huge_file,uninit_bg,dir_nlink,extra_isize,\
    metadata_csum,verity,dir_prealloc";

const BASE_FEATURES: &str = "sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr";
const EXT4_FEATURES: &str = "has_journal,extent,huge_file,flex_bg,metadata_csum,\
    metadata_csum_seed,64bit,dir_nlink,extra_isize,orphan_file";

/// What a usage type changes.
#[derive(Clone, Copy)]
struct Usage {
    name: &'static str,
    block_size: Option<u32>,
    inode_ratio: Option<u32>,
}

const USAGES: &[Usage] = &[
    Usage { name: "default", block_size: None, inode_ratio: None },
    Usage { name: "floppy", block_size: Some(1024), inode_ratio: Some(8192) },
    Usage { name: "small", block_size: Some(1024), inode_ratio: Some(4096) },
    Usage { name: "big", block_size: None, inode_ratio: Some(32768) },
    Usage { name: "huge", block_size: None, inode_ratio: Some(65536) },
    Usage { name: "news", block_size: None, inode_ratio: Some(4096) },
    Usage { name: "largefile", block_size: Some(4096), inode_ratio: Some(1 << 20) },
    Usage { name: "largefile4", block_size: Some(4096), inode_ratio: Some(4 << 20) },
];

const MIB: u64 = 1 << 20;

/// A number with an optional suffix K, M, G, T or s (512-byte sectors). Without a suffix it
/// counts `unit` bytes each.
///
/// # Errors
/// A usage error naming `what`.
pub fn parse_bytes(text: &str, unit: u64, what: &str) -> Result<u64> {
    let bad = || usage(format!("invalid {what} {text:?}"));
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, suffix) = text.split_at(split);
    let factor = match suffix {
        "" => unit,
        "s" => 512,
        "K" | "k" => 1 << 10,
        "M" | "m" => MIB,
        "G" | "g" => 1 << 30,
        "T" | "t" => 1 << 40,
        _ => return Err(bad()),
    };
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(bad)
}

/// The block size of `-b`: exact, or a least value when it began with a minus.
#[derive(Clone, Copy)]
struct AskedBlockSize {
    bytes: u32,
    at_least: bool,
}

fn asked_block_size(options: &Options) -> Result<Option<AskedBlockSize>> {
    let Some(text) = &options.block_size else { return Ok(None) };
    let digits = text.strip_prefix('-');
    let bytes = parse_bytes(digits.unwrap_or(text), 1, "block size")?;
    match u32::try_from(bytes) {
        Ok(bytes) if (1024..=65536).contains(&bytes) && bytes.is_power_of_two() => {
            Ok(Some(AskedBlockSize { bytes, at_least: digits.is_some() }))
        }
        _ => Err(usage(format!("invalid block size {text:?}: a power of two, 1024 to 65536"))),
    }
}

/// The bytes `SIZE` asks for.
///
/// # Errors
/// A usage error.
pub fn asked_size(options: &Options) -> Result<Option<u64>> {
    let Some(text) = &options.size else { return Ok(None) };
    let exact = asked_block_size(options)?.filter(|asked| !asked.at_least);
    let unit = exact.map_or(1024, |asked| u64::from(asked.bytes));
    let bytes = parse_bytes(text, unit, "filesystem size")?;
    if bytes == 0 { Err(usage("a filesystem of 0 bytes")) } else { Ok(Some(bytes)) }
}

impl Params {
    /// Decides everything that does not depend on the layout.
    ///
    /// # Errors
    /// A usage error, an unsupported feature or option, or a device too small or too large.
    pub fn resolve(options: &Options, facts: &DeviceFacts, around: &Surroundings) -> Result<Self> {
        if let Some(option) = options.unsupported() {
            return Err(MkfsError::Unsupported(option.to_owned()));
        }
        let fs_type = checked_type(options)?;
        let external = external_journal(options)?;
        let asked_block = match (asked_block_size(options)?, &external) {
            (Some(asked), Some(journal))
                if !asked.at_least && asked.bytes != journal.own.block_size =>
            {
                let (ours, theirs) = (asked.bytes, journal.own.block_size);
                return Err(usage(format!("-b {ours}: the journal has blocks of {theirs} bytes")));
            }
            (_, Some(journal)) => {
                Some(AskedBlockSize { bytes: journal.own.block_size, at_least: false })
            }
            (asked, None) => asked,
        };
        let asked_bytes = asked_size(options)?;
        let bytes = asked_bytes.unwrap_or(facts.bytes);
        let usages = usages(options, bytes)?;
        let block_size = block_size(asked_block, &usages, facts)?;
        let features = features(options, &fs_type)?;
        let mut params = Self {
            fs_type,
            features,
            revision: 1,
            block_size,
            blocks: bytes / u64::from(block_size),
            blocks_per_group: None,
            log_flex: 0,
            inode_size: 256,
            inodes: 0,
            reserved_percent: 5.0,
            resize_to: None,
            journal_mib: None,
            journal_location: None,
            journal_device: external,
            orphan_blocks: None,
            backups: 2,
            packed_meta: false,
            desc_size: 64,
            stride: 0,
            stripe_width: 0,
            lazy_itable_init: true,
            lazy_journal_init: false,
            prezeroed: false,
            discard: !options.keep,
            root_owner: (0, 0),
            root_perms: 0o755,
            errors: errors_policy(options)?,
            mount_opts: DefaultMountOpts::XATTR_USER | DefaultMountOpts::ACL,
            uuid: uuid(options, around)?,
            hash_seed: around.hash_seed,
            label: options.label.clone().unwrap_or_default().into_bytes(),
            last_mounted: options.last_mounted.clone().unwrap_or_default().into_bytes(),
            test_fs: false,
            now: around.now,
            warnings: Vec::new(),
        };
        params.check_simple_options(options)?;
        // Without -b mke2fs takes the size in whole pages, so that a kernel can map it.
        if asked_bytes.is_none() && block_size < 4096 {
            params.blocks &= !u64::from(4096 / block_size - 1);
        }
        params.take_journal_options(options)?;
        params.take_extended_options(options)?;
        params.apply_revision(options)?;
        params.reconcile_features(options)?;
        params.take_group_sizes(options)?;
        params.take_inodes(options, &usages)?;
        Ok(params)
    }

    fn check_simple_options(&mut self, options: &Options) -> Result<()> {
        if options.revision.is_some_and(|revision| revision != 1) {
            return Err(usage("-r takes only 1; -E revision=0 makes the old revision"));
        }
        if let Some(creator) = &options.creator
            && !creator.eq_ignore_ascii_case("linux")
            && creator != "0"
        {
            return Err(MkfsError::Unsupported(format!("-o {creator}")));
        }
        if let Some(percent) = options.reserved_percent {
            if !(0.0..=50.0).contains(&percent) {
                return Err(usage(format!("-m {percent} is not in 0..=50")));
            }
            self.reserved_percent = percent;
        }
        if self.label.len() > 16 {
            self.label.truncate(16);
            let kept = String::from_utf8_lossy(&self.label).into_owned();
            self.warnings.push(format!("the label is too long; it is cut to {kept:?}"));
        }
        Ok(())
    }

    fn take_journal_options(&mut self, options: &Options) -> Result<()> {
        let has_journal = Features { compat: Compat::HAS_JOURNAL, ..Features::default() };
        if options.journal {
            self.features = self.features.with(has_journal);
        }
        for (key, value) in pairs(&options.journal_options) {
            match (key, value) {
                ("size", Some(value)) => {
                    let mib = value.parse().ok().filter(|&mib| mib > 0);
                    self.journal_mib =
                        Some(mib.ok_or_else(|| usage(format!("invalid journal size {value:?}")))?);
                }
                ("location", Some(value)) => {
                    let unit = u64::from(self.block_size);
                    let bytes = parse_bytes(value, unit, "journal location")?;
                    self.journal_location = Some(bytes / unit);
                }
                ("device", Some(_)) => {} // See `external_journal`.
                ("v1_superblock" | "fast_commit_size", _) => {
                    return Err(MkfsError::Unsupported(format!("-J {key}")));
                }
                _ => return Err(usage(format!("-J does not know {key:?}"))),
            }
        }
        if self.journal_mib.is_some() || self.journal_device.is_some() {
            self.features = self.features.with(has_journal);
        }
        if let Some(journal) = &self.journal_device {
            if self.journal_mib.is_some() || self.journal_location.is_some() {
                return Err(usage("-J device= excludes size= and location="));
            }
            if journal.number == 0 {
                let text = "the journal is an image: mounts must name it with journal_path=";
                self.warnings.push(text.into());
            }
        }
        Ok(())
    }

    fn take_extended_options(&mut self, options: &Options) -> Result<()> {
        for (key, value) in pairs(&options.extended) {
            let flag = || match value {
                None | Some("1") => Ok(true),
                Some("0") => Ok(false),
                Some(value) => Err(usage(format!("-E {key}={value}: 0 or 1"))),
            };
            let need = || value.ok_or_else(|| usage(format!("-E {key} needs a value")));
            match key {
                "stride" => self.stride = number(key, need()?)?,
                "stripe_width" | "stripe-width" => self.stripe_width = number(key, need()?)?,
                "lazy_itable_init" => self.lazy_itable_init = flag()?,
                "lazy_journal_init" => self.lazy_journal_init = flag()?,
                "assume_storage_prezeroed" => self.prezeroed = flag()?,
                "packed_meta_blocks" => self.packed_meta = flag()?,
                "discard" => self.discard = true,
                "nodiscard" => self.discard = false,
                "test_fs" => self.test_fs = true,
                "root_owner" => self.root_owner = root_owner(value)?,
                "root_perms" => self.root_perms = root_perms(need()?)?,
                "num_backup_sb" => {
                    self.backups = number(key, need()?)?;
                    if self.backups > 2 {
                        return Err(usage("-E num_backup_sb is 0, 1 or 2"));
                    }
                }
                "hash_seed" => {
                    let value = need()?;
                    self.hash_seed = Uuid::parse_str(value)
                        .map_err(|_| usage(format!("-E hash_seed={value} is no UUID")))?;
                }
                "revision" => self.revision = number(key, need()?)?,
                "desc_size" | "desc-size" => self.desc_size = number(key, need()?)?,
                "resize" => {
                    let unit = u64::from(self.block_size);
                    self.resize_to = Some(parse_bytes(need()?, unit, "resize limit")? / unit);
                }
                "orphan_file_size" => {
                    let unit = u64::from(self.block_size);
                    let blocks = parse_bytes(need()?, unit, "orphan file size")? / unit;
                    self.orphan_blocks = Some(blocks.clamp(1, 512) as u32);
                }
                "quotatype"
                | "mmp_update_interval"
                | "encoding"
                | "encoding_flags"
                | "offset"
                | "root_selinux"
                | "android_sparse"
                | "no_copy_xattrs" => {
                    return Err(MkfsError::Unsupported(format!("-E {key}")));
                }
                _ => return Err(usage(format!("-E does not know {key:?}"))),
            }
        }
        if self.stride != 0 && !self.stripe_width.is_multiple_of(u32::from(self.stride)) {
            self.warnings.push("the stripe width is no multiple of the stride".to_owned());
        }
        Ok(())
    }

    /// Revision 0 has no features and only small inodes.
    fn apply_revision(&mut self, options: &Options) -> Result<()> {
        match self.revision {
            1 => return Ok(()),
            0 => {}
            other => return Err(usage(format!("there is no revision {other}"))),
        }
        let refused = [
            (!options.features.is_empty(), "features"),
            (options.journal || self.journal_mib.is_some(), "a journal"),
            (options.inode_size.is_some_and(|size| size != 128), "inodes over 128 bytes"),
            (self.resize_to.is_some(), "growing while mounted"),
        ];
        if let Some((_, what)) = refused.iter().find(|(refused, _)| *refused) {
            return Err(usage(format!("revision 0 does not have {what}")));
        }
        self.features = Features::default();
        self.mount_opts = DefaultMountOpts::empty();
        self.inode_size = GOOD_OLD_INODE_SIZE;
        Ok(())
    }

    /// What one feature asks of the others, as mke2fs settles it.
    fn reconcile_features(&mut self, options: &Options) -> Result<()> {
        let named = |name: &str| {
            let words = options.features.iter().flat_map(|list| list.split([',', ' ']));
            words.into_iter().any(|word| word == name)
        };
        let features = &mut self.features;
        if !features.has_journal() && !named("orphan_file") {
            features.compat.remove(Compat::ORPHAN_FILE);
        }
        if !features.metadata_csum() && !named("metadata_csum_seed") {
            features.incompat.remove(Incompat::CSUM_SEED);
        }
        if features.metadata_csum() {
            features.ro_compat.remove(RoCompat::GDT_CSUM);
        }
        if self.resize_to.is_some() {
            features.compat.insert(Compat::RESIZE_INODE);
        }
        if self.blocks > u64::from(u32::MAX) {
            if !features.bit64() {
                return Err(usage(format!("{} blocks need -O 64bit", self.blocks)));
            }
            // The resize inode is a block map, which cannot reach so far.
            features.compat.remove(Compat::RESIZE_INODE);
        }
        let resize = features.compat.contains(Compat::RESIZE_INODE);
        let rules = [
            (features.orphan_file() && !features.has_journal(), "orphan_file needs has_journal"),
            (
                features.incompat.contains(Incompat::CSUM_SEED) && !features.metadata_csum(),
                "metadata_csum_seed needs metadata_csum",
            ),
            (features.bit64() && !features.extents(), "64bit needs extent"),
            (
                features.ro_compat.contains(RoCompat::VERITY) && !features.extents(),
                "verity needs extent",
            ),
            (features.meta_bg() && resize, "meta_bg and resize_inode exclude each other"),
            (
                resize && !features.ro_compat.contains(RoCompat::SPARSE_SUPER),
                "resize_inode needs sparse_super",
            ),
            (
                features.compat.contains(Compat::FAST_COMMIT) && !features.has_journal(),
                "fast_commit needs has_journal",
            ),
        ];
        match rules.iter().find(|(broken, _)| *broken) {
            Some((_, rule)) => Err(usage(format!("the feature {rule}"))),
            None => Ok(()),
        }
    }

    fn take_group_sizes(&mut self, options: &Options) -> Result<()> {
        if let Some(blocks) = options.blocks_per_group {
            if blocks < 256 || blocks > 8 * self.block_size || !blocks.is_multiple_of(8) {
                let most = 8 * self.block_size;
                return Err(usage(format!("-g {blocks}: a multiple of 8, 256 to {most}")));
            }
            self.blocks_per_group = Some(blocks);
        }
        if options.flex_groups.is_some() && !self.features.flex_bg() {
            return Err(usage("-G needs the feature flex_bg"));
        }
        let flex = options.flex_groups.unwrap_or(16);
        if !flex.is_power_of_two() {
            return Err(usage(format!("-G {flex} is no power of two")));
        }
        if self.features.flex_bg() {
            self.log_flex = flex.ilog2() as u8;
        } else if self.packed_meta {
            return Err(usage("-E packed_meta_blocks needs the feature flex_bg"));
        }
        let valid_desc = self.desc_size.is_power_of_two() && (64..=1024).contains(&self.desc_size);
        if !valid_desc || (self.desc_size != 64 && !self.features.bit64()) {
            return Err(usage(format!("-E desc_size={}: needs 64bit, 64 to 1024", self.desc_size)));
        }
        Ok(())
    }

    fn take_inodes(&mut self, options: &Options, usages: &[Usage]) -> Result<()> {
        if let Some(size) = options.inode_size {
            let fits = (128..=self.block_size).contains(&size) && size.is_power_of_two();
            let size = u16::try_from(size).ok().filter(|_| fits);
            let most = self.block_size;
            self.inode_size =
                size.ok_or_else(|| usage(format!("-I: a power of two, 128 to {most}")))?;
        }
        if self.inode_size == GOOD_OLD_INODE_SIZE {
            if self.features.inline_data() {
                return Err(usage("128-byte inodes have no room for inline data"));
            }
            let text = "128-byte inodes cannot hold times after January 2038";
            self.warnings.push(text.to_owned());
        }
        let from_usage = usages.iter().rev().find_map(|usage| usage.inode_ratio);
        let ratio = match &options.inode_ratio {
            None => u64::from(from_usage.unwrap_or(16384).max(self.block_size)),
            Some(text) => {
                let ratio = parse_bytes(text, 1, "inode ratio")?;
                if !(1024..=65536 * 1024).contains(&ratio) {
                    return Err(usage(format!("-i {text}: 1024 to 64 MiB")));
                }
                ratio
            }
        };
        let bytes = self.blocks.saturating_mul(u64::from(self.block_size));
        let wanted = options.inodes.unwrap_or(bytes / ratio);
        self.inodes = match u32::try_from(wanted) {
            Ok(wanted) => wanted.max(1),
            Err(_) if options.inodes.is_none() && self.features.bit64() => u32::MAX,
            Err(_) => return Err(usage(format!("{wanted} inodes are too many; see -i and -N"))),
        };
        if u64::from(self.inodes) * u64::from(self.inode_size) >= bytes {
            let (inodes, size) = (self.inodes, self.inode_size);
            return Err(usage(format!(
                "{inodes} inodes of {size} bytes do not fit {} blocks; see -i and -N",
                self.blocks
            )));
        }
        Ok(())
    }
}

/// `key=value` and `key`, of lists separated by commas.
fn pairs(lists: &[String]) -> impl Iterator<Item = (&str, Option<&str>)> {
    let words = lists.iter().flat_map(|list| list.split(',')).filter(|word| !word.is_empty());
    words.map(|word| match word.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (word, None),
    })
}

fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| usage(format!("-E {key}={value} is no number in range")))
}

fn root_owner(value: Option<&str>) -> Result<(u32, u32)> {
    let Some(value) = value else {
        return Ok((nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw()));
    };
    let parsed = value.split_once(':').and_then(|(u, g)| Some((u.parse().ok()?, g.parse().ok()?)));
    parsed.ok_or_else(|| usage(format!("-E root_owner={value}: uid:gid")))
}

fn root_perms(value: &str) -> Result<u16> {
    let perms = u16::from_str_radix(value, 8).ok().filter(|perms| *perms <= 0o7777);
    perms.ok_or_else(|| usage(format!("-E root_perms={value}: octal permissions")))
}

fn checked_type(options: &Options) -> Result<String> {
    let fs_type = options.fs_type.as_deref().unwrap_or("ext4");
    if ["ext2", "ext3", "ext4"].contains(&fs_type) {
        Ok(fs_type.to_owned())
    } else {
        Err(usage(format!("-t {fs_type}: ext2, ext3 or ext4")))
    }
}

fn features(options: &Options, fs_type: &str) -> Result<Features> {
    let mut features = Features::default();
    let defaults = match fs_type {
        "ext2" => "",
        "ext3" => "has_journal",
        _ => EXT4_FEATURES,
    };
    let lists = [BASE_FEATURES, defaults].into_iter().chain(options.features.iter().map(|s| &**s));
    for list in lists {
        features.apply(list).map_err(|error| usage(format!("-O: {error}")))?;
    }
    let supported: Features = SUPPORTED.parse().map_err(|error| usage(format!("{error}")))?;
    match features.without(supported).names().first() {
        Some(name) => Err(MkfsError::Unsupported(format!("-O {name}"))),
        None => Ok(features),
    }
}

fn usages(options: &Options, bytes: u64) -> Result<Vec<Usage>> {
    let by_size = match bytes / MIB {
        0..3 => "floppy",
        3..512 => "small",
        mib if mib < 4 << 20 => "default",
        mib if mib < 16 << 20 => "big",
        _ => "huge",
    };
    let names = options.usage.as_deref().unwrap_or(by_size).split(',');
    names
        .filter(|name| !name.is_empty())
        .map(|name| {
            let found = USAGES.iter().find(|usage| usage.name == name).copied();
            found.ok_or_else(|| usage(format!("-T does not know {name:?}")))
        })
        .collect()
}

fn block_size(asked: Option<AskedBlockSize>, usages: &[Usage], facts: &DeviceFacts) -> Result<u32> {
    let sector = facts.logical_block_size;
    match asked {
        Some(AskedBlockSize { bytes, at_least: false }) if bytes < sector => {
            Err(usage(format!("the device takes no blocks below {sector} bytes")))
        }
        Some(AskedBlockSize { bytes, at_least: false }) => Ok(bytes),
        other => {
            let usual = usages.iter().rev().find_map(|usage| usage.block_size).unwrap_or(4096);
            let least = other.map_or(0, |asked| asked.bytes);
            Ok(usual.max(sector).max(least))
        }
    }
}

/// The journal that `-J device=` names.
fn external_journal(options: &Options) -> Result<Option<ExternalJournal>> {
    let mut devices = pairs(&options.journal_options).filter(|(key, _)| *key == "device");
    match devices.next() {
        None => Ok(None),
        Some((_, None)) => Err(usage("-J device needs a value")),
        Some((_, Some(spec))) => ExternalJournal::find(spec).map(Some),
    }
}

/// Whether a journal device is asked for and no filesystem.
///
/// # Errors
/// A usage error for other features besides.
pub fn wants_journal_dev(options: &Options) -> Result<bool> {
    let words = || options.features.iter().flat_map(|list| list.split([',', ' ']));
    if !words().any(|word| word == "journal_dev") {
        return Ok(false);
    }
    match words().find(|word| !word.is_empty() && *word != "journal_dev") {
        Some(other) => Err(usage(format!("-O journal_dev: a journal has no feature {other}"))),
        None => Ok(true),
    }
}

/// The journal device that is asked for.
///
/// # Errors
/// A usage error.
pub fn new_journal(
    options: &Options,
    facts: &DeviceFacts,
    around: &Surroundings,
) -> Result<NewJournal> {
    let bytes = asked_size(options)?.unwrap_or(facts.bytes);
    let usages = usages(options, bytes)?;
    let block_size = block_size(asked_block_size(options)?, &usages, facts)?;
    Ok(NewJournal {
        block_size,
        blocks: bytes / u64::from(block_size),
        uuid: uuid(options, around)?,
        label: options.label.clone().unwrap_or_default().into_bytes(),
        now: around.now,
    })
}

fn errors_policy(options: &Options) -> Result<ErrorsPolicy> {
    match options.errors.as_deref() {
        None | Some("continue") => Ok(ErrorsPolicy::Continue),
        Some("remount-ro") => Ok(ErrorsPolicy::RemountRo),
        Some("panic") => Ok(ErrorsPolicy::Panic),
        Some(other) => Err(usage(format!("-e {other}: continue, remount-ro or panic"))),
    }
}

fn uuid(options: &Options, around: &Surroundings) -> Result<Uuid> {
    match options.uuid.as_deref() {
        // Nobody is helped by a UUID that tells when and where it was made.
        None | Some("random" | "time") => Ok(around.uuid),
        Some("clear" | "null") => Ok(Uuid::nil()),
        Some(text) => Uuid::parse_str(text).map_err(|_| usage(format!("-U {text} is no UUID"))),
    }
}
