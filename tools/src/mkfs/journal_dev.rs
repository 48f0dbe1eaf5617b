//! Journals on a device of their own: making one (`-O journal_dev`), and finding and joining one
//! (`-J device=`).
//!
//! The device begins with a superblock that says it is a journal; the journal's own lies in the
//! block behind it and lists who uses it.
//!
//! Invariants: nothing is a journal until the last write of [`make`], and what was on the device is
//! no filesystem any more before anything else of it changes. A filesystem joins a
//! journal before it exists itself, so that a cut in between leaves a journal that names a
//! filesystem which is not there, and never a filesystem that can be mounted without its journal.

use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uext_blockdev::file::{FileDevice, OpenOptions};
use uext_blockdev::{BioFlags, BlkStatus, BlockDevice};
use uext_ondisk::features::Incompat;
use uext_ondisk::jbd2::{
    JournalSuperblock, MIN_BLOCKS, RawJournalSuperblock, SUPERBLOCK_SIZE as JOURNAL_BYTES,
    edit_superblock_with,
};
use uext_ondisk::superblock::{
    JournalDevice, MAGIC, RawSuperblock, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE,
};
use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::error::{MkfsError, Result, usage};

/// Bytes zeroed by one write.
const ZERO_BYTES: usize = 1 << 20;
/// Bytes of a label.
const LABEL_BYTES: usize = 16;

/// A journal to make.
#[derive(Clone, Debug)]
pub struct NewJournal {
    /// Bytes per block: those of the filesystem that will use it.
    pub block_size: u32,
    /// Blocks, all of them.
    pub blocks: u64,
    /// UUID, which the filesystem will name.
    pub uuid: Uuid,
    /// Label.
    pub label: Vec<u8>,
    /// Seconds since 1970.
    pub now: u64,
}

fn failed(what: &'static str) -> impl Fn(BlkStatus) -> MkfsError {
    move |status| MkfsError::Device { what, status }
}

/// Makes a journal of a whole device.
///
/// # Errors
/// A usage error for an impossible size; `Device`, and then there is no journal.
pub fn make(dev: &dyn BlockDevice, new: &NewJournal) -> Result<()> {
    let size = u64::from(new.block_size);
    let count = u32::try_from(new.blocks).ok().filter(|&count| count >= MIN_BLOCKS);
    let count = count.ok_or_else(|| {
        usage(format!("a journal of {} blocks: {MIN_BLOCKS} to {}", new.blocks, u32::MAX))
    })?;
    let zeroes = vec![0; ZERO_BYTES];
    dev.write_at(SUPERBLOCK_OFFSET, &zeroes[..SUPERBLOCK_SIZE], BioFlags::META)
        .map_err(failed("wiping the old superblock"))?;
    dev.flush().map_err(failed("flushing the device"))?;
    let end = new.blocks * size;
    let mut at = 0;
    while at < end {
        let len = (end - at).min(ZERO_BYTES as u64);
        // At most ZERO_BYTES.
        let part = &zeroes[..len as usize];
        dev.write_at(at, part, BioFlags::empty()).map_err(failed("zeroing the journal"))?;
        at += len;
    }
    let sb = superblock(new, count);
    let own = JournalDevice { block_size: new.block_size, blocks_count: count, uuid: new.uuid };
    let home = own.superblock();
    let mut journal = RawJournalSuperblock::new(new.block_size, count, home + 1, new.uuid);
    journal.s_nr_users = 0.into();
    let mut bytes = journal.as_bytes().to_vec();
    bytes.resize(new.block_size as usize, 0);
    let what = "writing the journal's superblock";
    dev.write_at(u64::from(home) * size, &bytes, BioFlags::META).map_err(failed(what))?;
    dev.flush().map_err(failed("flushing the device"))?;
    dev.write_at(SUPERBLOCK_OFFSET, sb.as_bytes(), BioFlags::META).map_err(failed(what))?;
    dev.flush().map_err(failed("flushing the device"))
}

/// The superblock of the device: a filesystem's with most fields unused.
fn superblock(new: &NewJournal, count: u32) -> RawSuperblock {
    let mut sb = RawSuperblock::new_zeroed();
    // The lower half; the upper one lies elsewhere and is not needed before 2106.
    let now = (new.now & 0xFFFF_FFFF) as u32;
    let log = new.block_size.ilog2() - 10;
    let per_group = 8 * new.block_size;
    sb.s_blocks_count_lo = count.into();
    sb.s_first_data_block = u32::from(new.block_size == 1024).into();
    sb.s_log_block_size = log.into();
    sb.s_log_cluster_size = log.into();
    sb.s_blocks_per_group = per_group.into();
    sb.s_clusters_per_group = per_group.into();
    sb.s_wtime = now.into();
    sb.s_max_mnt_count = 0xFFFF.into();
    sb.s_magic = MAGIC.into();
    sb.s_state = 1.into();
    sb.s_errors = 1.into();
    sb.s_lastcheck = now.into();
    sb.s_rev_level = 1.into();
    sb.s_first_ino = 11.into();
    sb.s_inode_size = 256.into();
    sb.s_feature_incompat = Incompat::JOURNAL_DEV.bits().into();
    sb.s_uuid = new.uuid.into_bytes();
    let len = new.label.len().min(LABEL_BYTES);
    sb.s_volume_name[..len].copy_from_slice(&new.label[..len]);
    sb.s_mkfs_time = now.into();
    sb
}

/// An existing journal that a filesystem is to use.
#[derive(Clone, Debug)]
pub struct ExternalJournal {
    /// Its device or image.
    pub path: PathBuf,
    /// What its superblock says.
    pub own: JournalDevice,
    /// The device's number as a superblock keeps it; 0 for an image, which has none.
    pub number: u32,
}

impl ExternalJournal {
    /// Finds the journal of `-J device=`: a path, `UUID=` or `LABEL=`.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(spec: &str) -> Result<Self> {
        let by_mark = |wanted: &dyn Fn(&RawSuperblock) -> bool| {
            let found = block_devices().into_iter().find(|path| {
                let raw = read_superblock(path);
                raw.is_some_and(|raw| JournalDevice::parse(raw.as_bytes()).is_ok() && wanted(&raw))
            });
            found.ok_or_else(|| usage(format!("-J device={spec}: no journal device has it")))
        };
        let path = if let Some(text) = spec.strip_prefix("UUID=") {
            let uuid: Uuid =
                text.parse().map_err(|_| usage(format!("-J device={spec}: no UUID")))?;
            by_mark(&|raw| raw.s_uuid == *uuid.as_bytes())?
        } else if let Some(label) = spec.strip_prefix("LABEL=") {
            by_mark(&|raw| {
                let name = raw.s_volume_name.split(|&byte| byte == 0).next().unwrap_or_default();
                !label.is_empty() && name == label.as_bytes()
            })?
        } else {
            PathBuf::from(spec)
        };
        let meta = std::fs::metadata(&path)
            .map_err(|source| MkfsError::File { path: path.clone(), source })?;
        let number = if meta.file_type().is_block_device() { encode(meta.rdev()) } else { 0 };
        let raw = read_superblock(&path)
            .ok_or_else(|| usage(format!("-J device={}: cannot be read", path.display())))?;
        let own = JournalDevice::parse(raw.as_bytes()).map_err(|error| {
            usage(format!(
                "{} is no journal ({error}); make one with -O journal_dev",
                path.display()
            ))
        })?;
        Ok(Self { path, own, number })
    }

    /// Opens it and makes sure that it may be taken: its log is empty, and nobody else uses it
    /// unless `force`.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn open(&self, force: bool) -> Result<Arc<dyn BlockDevice>> {
        let dev: Arc<dyn BlockDevice> = FileDevice::open(&self.path, OpenOptions::default())?;
        let bytes = self.read(&*dev)?;
        let journal = JournalSuperblock::parse(&bytes)?;
        let refuse = |why: String| {
            Err(MkfsError::Refused(format!("the journal on {} {why}", self.path.display())))
        };
        if journal.needs_recovery() {
            return refuse("holds transactions: replay it first with e2fsck".into());
        }
        if journal.user_count > 0 && !force {
            let raw = RawJournalSuperblock::ref_from_prefix(&bytes).ok();
            let user = raw.and_then(|(raw, _)| raw.s_users.first().copied()).unwrap_or_default();
            return refuse(format!("is used by {}; -F takes it", Uuid::from_bytes(user)));
        }
        Ok(dev)
    }

    fn place(&self) -> u64 {
        u64::from(self.own.superblock()) * u64::from(self.own.block_size)
    }

    fn read(&self, dev: &dyn BlockDevice) -> Result<Vec<u8>> {
        let len = JOURNAL_BYTES.max(self.own.block_size as usize);
        dev.read_at(self.place(), len).map_err(failed("reading the journal"))
    }

    /// Makes a filesystem the journal's only user.
    ///
    /// # Errors
    /// `Device`.
    pub fn join(&self, dev: &dyn BlockDevice, user: Uuid) -> Result<()> {
        let mut bytes = self.read(dev)?;
        edit_superblock_with(&mut bytes, |raw| {
            raw.s_users = [[0; 16]; 48];
            raw.s_users[0] = user.into_bytes();
            raw.s_nr_users = 1.into();
        })?;
        let what = "writing the journal's superblock";
        dev.write_at(self.place(), &bytes, BioFlags::META).map_err(failed(what))?;
        dev.flush().map_err(failed("flushing the journal"))
    }
}

/// A device's number as the kernel keeps it in 32 bits.
fn encode(rdev: u64) -> u32 {
    let (major, minor) = (nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev));
    // 12 bits of major, 20 of minor.
    ((minor & 0xFF) | ((major & 0xFFF) << 8) | ((minor & 0xF_FF00) << 12)) as u32
}

fn read_superblock(path: &Path) -> Option<RawSuperblock> {
    let mut bytes = [0; SUPERBLOCK_SIZE];
    std::fs::File::open(path).ok()?.read_exact_at(&mut bytes, SUPERBLOCK_OFFSET).ok()?;
    RawSuperblock::read_from_bytes(&bytes).ok()
}

/// All block devices of the machine, partitions included.
fn block_devices() -> Vec<PathBuf> {
    let names = std::fs::read_dir("/sys/class/block").into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> =
        names.map(|entry| Path::new("/dev").join(entry.file_name())).collect();
    paths.sort();
    paths
}
