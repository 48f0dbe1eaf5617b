//! Which images mount, and how (the table of the design): features are an allow-list.

use thiserror::Error;
use uext_jbd2::JournalError;
use uext_ondisk::Corrupt;
use uext_ondisk::features::{Compat, Features, Incompat, RoCompat};
use uext_ondisk::superblock::{State, Superblock};

use crate::error::Error;
use crate::options::MountOptions;

/// Why an image is not mounted: one line that says what was found and what to do.
#[derive(Debug, Error)]
pub enum MountError {
    /// There is no superblock to read.
    #[error(
        "no ext2, ext3 or ext4 filesystem found: {corrupt}{}",
        if hint.is_empty() { "; if there was one, try `e2fsck -b 32768`" } else { hint }
    )]
    NoSuperblock {
        /// What is there.
        corrupt: Corrupt,
        /// Where a backup lies, when there is one.
        hint: String,
    },
    /// The superblock is damaged.
    #[error("{corrupt}{}", if hint.is_empty() { "; run e2fsck" } else { hint })]
    BadSuperblock {
        /// What is wrong.
        corrupt: Corrupt,
        /// Where a backup lies, when there is one.
        hint: String,
    },
    /// The image is shorter than the filesystem in it.
    #[error("the image is truncated: {have} bytes of {need}; restore it, or run e2fsck on a copy")]
    Truncated {
        /// Bytes there are.
        have: u64,
        /// Bytes the superblock tells of.
        need: u64,
    },
    /// A feature nobody here can handle.
    #[error("unsupported feature {features}; {advice}")]
    Unsupported {
        /// Names as tune2fs has them.
        features: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// Read-write was asked for, and only read-only is possible.
    #[error("only a read-only mount is possible: {0}; mount with `-o ro`")]
    ReadOnlyOnly(String),
    /// The external journal is missing or another's.
    #[error("the external journal {uuid} {why}; name its device with `-o journal_path=PATH`")]
    ExternalJournal {
        /// Its UUID.
        uuid: String,
        /// What is wrong.
        why: String,
    },
    /// Options that do not go together.
    #[error("{0}")]
    Options(&'static str),
    /// The journal cannot be used.
    #[error("journal: {0}; run e2fsck")]
    Journal(#[from] JournalError),
    /// Something else in the image or the device is broken.
    #[error("{0}; run e2fsck")]
    Filesystem(#[from] Error),
}

const COMPAT: Compat = Compat::all();
const INCOMPAT_RW: Incompat = Incompat::FILETYPE
    .union(Incompat::RECOVER)
    .union(Incompat::EXTENTS)
    .union(Incompat::BIT64)
    .union(Incompat::FLEX_BG)
    .union(Incompat::CSUM_SEED);
/// What can be read but not yet written.
const INCOMPAT_RO: Incompat = INCOMPAT_RW
    .union(Incompat::META_BG)
    .union(Incompat::MMP)
    .union(Incompat::EA_INODE)
    .union(Incompat::LARGEDIR);
const RO_COMPAT_RW: RoCompat = RoCompat::SPARSE_SUPER
    .union(RoCompat::LARGE_FILE)
    .union(RoCompat::HUGE_FILE)
    .union(RoCompat::GDT_CSUM)
    .union(RoCompat::DIR_NLINK)
    .union(RoCompat::EXTRA_ISIZE)
    .union(RoCompat::METADATA_CSUM)
    .union(RoCompat::ORPHAN_PRESENT);

/// How an image may be mounted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Nothing may be written.
    pub read_only: bool,
    /// Why, when the options did not ask for it.
    pub reason: Option<String>,
}

fn names(features: Features) -> String {
    features.names().join(", ")
}

/// Decides about an image.
///
/// # Errors
/// A refusal, in one line.
pub(crate) fn check(sb: &Superblock, options: &MountOptions) -> Result<Verdict, MountError> {
    let features = sb.features();
    if features.incompat.contains(Incompat::JOURNAL_DEV) {
        return Err(MountError::Unsupported {
            features: "journal_dev".into(),
            advice: "this is an external journal, mount the filesystem it belongs to",
        });
    }
    let refused = Features {
        compat: Compat::empty(),
        incompat: features.incompat - INCOMPAT_RO,
        ro_compat: RoCompat::empty(),
    };
    if !refused.is_empty() {
        return Err(MountError::Unsupported {
            features: names(refused),
            advice: "mount it with the kernel's ext4",
        });
    }
    let reason = read_only_reason(sb, options);
    match reason {
        Some(reason) if options.rw_explicit => Err(MountError::ReadOnlyOnly(reason)),
        reason => Ok(Verdict { read_only: options.read_only || reason.is_some(), reason }),
    }
}

/// Why an image may only be read.
fn read_only_reason(sb: &Superblock, options: &MountOptions) -> Option<String> {
    let features = sb.features();
    let unknown = Features {
        compat: (features.compat & Compat::SPARSE_SUPER2) | (features.compat - COMPAT),
        incompat: features.incompat - INCOMPAT_RW,
        ro_compat: features.ro_compat - RO_COMPAT_RW,
    };
    // Unknown compatible features are harmless by definition; sparse_super2 moves the backups.
    let unknown = Features { compat: unknown.compat & Compat::SPARSE_SUPER2, ..unknown };
    if !unknown.is_empty() {
        return Some(format!("feature {} is not written yet", names(unknown)));
    }
    if sb.block_size() > 4096 {
        return Some(format!("blocks of {} bytes are not written yet", sb.block_size()));
    }
    if options.force {
        return None;
    }
    if sb.state().contains(State::ERROR) {
        return Some(
            "the filesystem has recorded errors (run e2fsck, or mount with `-o force`)".into(),
        );
    }
    if !features.has_journal() && !sb.state().contains(State::VALID) {
        return Some("it was not unmounted cleanly (run e2fsck, or mount with `-o force`)".into());
    }
    None
}
