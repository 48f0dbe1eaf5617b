//! Damage in the log: a copy that does not match its checksum is never replayed.
//!
//! On a disk that keeps its promises no committed block is damaged, so no cut shows whether
//! the checksums are looked at. Here a bit of each block of the log that a commit wrote is
//! flipped; the mount refuses the disk, or what it shows is some moment of the history, and
//! nothing on it is broken.

use std::sync::Arc;

use uext_blockdev::dm::{CrashOptions, SnapshotDevice, UnitSet};
use uext_blockdev::{BioFlags, BlockDevice};

use crate::case::Case;
use crate::image::image;
use crate::judges;
use crate::quiet::quietly;

/// How many disks were refused, of how many.
///
/// # Errors
/// Which damage was used.
pub fn flip_bits(case: &Case) -> Result<(usize, usize), String> {
    let image = image(case.kind, case.large);
    let recording = quietly(|| case.record())??;
    let start = SnapshotDevice::over_vec(image.bytes.clone());
    let (mut refused, mut tried) = (0, 0);
    let points = recording.log.crash_points(&start, CrashOptions::default());
    for point in points.filter(|point| point.time > recording.from) {
        let disk = point.state(&UnitSet::none(point.units().len()));
        let changed = disk.changed_blocks();
        for page in changed.into_iter().filter(|page| image.journal_pages.contains(page)) {
            let damaged = flipped(&disk, page * 4096 + 700 + page % 300);
            tried += 1;
            let history = &recording.history;
            match quietly(|| judges::any_moment(&damaged, case.mode, history)) {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => refused += 1,
                Ok(Err(why)) | Err(why) => {
                    return Err(format!("{case}: {point:?}, page {page} damaged: {why}"));
                }
            }
        }
    }
    Ok((refused, tried))
}

fn flipped(disk: &SnapshotDevice, offset: u64) -> Arc<SnapshotDevice> {
    let copy = disk.fork();
    let device: &dyn BlockDevice = &*copy;
    let byte = device.read_at(offset, 1).expect("a snapshot can be read")[0];
    device.write_at(offset, &[byte ^ 0x10], BioFlags::empty()).expect("a snapshot can be written");
    copy
}
