//! What stands between a device as it was found and a filesystem that can be mounted: the
//! journal's replay, and the superblock made whole.
//!
//! Both are first done where nothing is written: the image as the replay would leave it is a
//! device of its own ([`ReplayPlan::views`]). A read-only mount stays there. Before anything is
//! written for another, the whole mount is rehearsed on it, since a log without checksums may
//! bring home what nobody can mount.
//!
//! Invariants: a refusal has written nothing; memory does not grow with the length of the log
//! but by a few words per block.
//!
//! [`ReplayPlan::views`]: uext_jbd2::ReplayPlan::views

use std::sync::Arc;

use uext_blockdev::BlockDevice;
use uext_blockdev::dm::snapshot::SnapshotDevice;
use uext_jbd2::{JournalLocation, OnDamage, Recovery, RecoveryReport};
use uext_ondisk::features::{Compat, Incompat};

use crate::fs::Ext4;
use crate::gate::{self, MountError};
use crate::journal_place::JournalPlace;
use crate::options::MountOptions;
use crate::super_source::{self, Found, Origin};

type Device = Arc<dyn BlockDevice>;
type Refused<T> = std::result::Result<T, MountError>;

/// Memory for the pages of a rehearsal, bytes.
const REHEARSAL_CACHE: usize = 4 << 20;

/// Replays the journal when the superblock says so, or when it cannot be believed the journal's
/// own; then makes the primary superblock whole. Onto the device, or on a read-only mount into
/// memory, so that the image stays as it is.
///
/// # Errors
/// A refusal. Nothing was written, unless it is the device that failed.
pub(crate) fn recover(
    dev: Device,
    name: &str,
    found: &Found,
    options: &MountOptions,
    read_only: bool,
) -> Refused<(Device, Option<JournalPlace>)> {
    let features = found.sb.features();
    let has_journal = features.compat.contains(Compat::HAS_JOURNAL);
    let whole = found.origin == Origin::Primary;
    let flagged = has_journal && features.incompat.contains(Incompat::RECOVER);
    let replays = has_journal && !options.norecovery && (flagged || !whole);
    let place = if replays || (has_journal && !read_only) {
        Some(JournalPlace::find(dev.as_ref(), &found.sb, options, read_only)?)
    } else {
        None
    };
    if whole && !flagged {
        return Ok((dev, place));
    }
    if options.norecovery {
        log::warn!("{name}: journal not replayed (norecovery): what you see may be inconsistent");
        if whole {
            return Ok((dev, None));
        }
    }
    let Some(place) = place else {
        let trial = trial(dev.clone(), name, found, None)?;
        if read_only {
            return Ok((trial, None));
        }
        rehearse(trial, None, name, options)?;
        super_source::mend(dev.as_ref(), found, None, true)?;
        return Ok((dev, None));
    };
    if !replays {
        let trial = trial(dev, name, found, None)?;
        return Ok((trial, Some(place)));
    }
    replay(dev, place, name, found, options, read_only)
}

fn replay(
    dev: Device,
    place: JournalPlace,
    name: &str,
    found: &Found,
    options: &MountOptions,
    read_only: bool,
) -> Refused<(Device, Option<JournalPlace>)> {
    let journal = place.external.as_ref().unwrap_or(&dev);
    let block_size = found.sb.block_size();
    let location = JournalLocation { device: journal.as_ref(), map: &place.map, block_size };
    let recovery = Recovery::open(location, dev.as_ref())?;
    let plan = recovery.plan()?;
    if let Some(damage) = plan.damage() {
        return Err(damage.clone().into());
    }
    let views = plan.views(dev.clone(), place.external.clone());
    let trial = trial(views.fs, name, found, Some(&plan.report()))?;
    if read_only {
        log_replay(name, &plan.report());
        return Ok((trial, None));
    }
    let external = views.journal.map(|view| SnapshotDevice::over_device(view) as Device);
    let rehearsed = JournalPlace { external, map: place.map.clone() };
    rehearse(trial, Some(rehearsed), name, options)?;
    let report = recovery.replay_planned(&plan, OnDamage::Keep)?;
    log_replay(name, &report);
    super_source::mend(dev.as_ref(), found, Some(&report), true)?;
    Ok((dev, Some(place)))
}

fn log_replay(name: &str, report: &RecoveryReport) {
    log::info!(
        "{name}: journal replayed: {} transactions, {} blocks, {} fast commits",
        report.transactions,
        report.blocks_replayed,
        report.fast_commits
    );
}

/// A device to try things on, with the primary superblock made whole.
fn trial(
    below: Device,
    name: &str,
    found: &Found,
    report: Option<&RecoveryReport>,
) -> Refused<Device> {
    let trial = SnapshotDevice::over_device(below);
    if let Some(mended) = super_source::mend(trial.as_ref(), found, report, false)? {
        log::warn!("{name}: {mended}");
    }
    Ok(trial)
}

/// Does on a trial device what the mount will do.
fn rehearse(
    trial: Device,
    journal: Option<JournalPlace>,
    name: &str,
    options: &MountOptions,
) -> Refused<()> {
    let cache_bytes = Some(REHEARSAL_CACHE);
    let options = MountOptions { background: false, cache_bytes, ..options.clone() };
    let sb = super_source::read_primary(trial.as_ref())?;
    let verdict = gate::check(&sb, &options)?;
    Ext4::prepare(trial, journal, name, sb, options, verdict.read_only)?;
    Ok(())
}
