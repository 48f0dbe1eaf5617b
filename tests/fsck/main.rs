//! `uext fsck -n` against e2fsck: the same verdict on damaged images, on clean
//! ones, on planted defects and on random damage.

mod clean;
mod corpus;
mod damage;
mod dirty;
mod planted;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use uext_blockdev::file::{FileDevice, OpenOptions};
use uext_tools::fsck::{Options, Outcome, Progress, check};

/// Longest a check of a test image may take.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// What our check says of an image, and what it printed.
#[track_caller]
fn ours(image: &Path) -> (Outcome, String) {
    let options = OpenOptions { read_only: true, direct: false, ..OpenOptions::default() };
    let device = FileDevice::open(image, options).expect("open the image");
    let mut text = Vec::new();
    let begin = Instant::now();
    let force = Options { force: true, ..Options::default() };
    let outcome = check(&*device, &force, &mut Progress::off(), &mut text);
    let took = begin.elapsed();
    assert!(took < TIME_LIMIT, "{} took {took:?}", image.display());
    (outcome, String::from_utf8_lossy(&text).into_owned())
}

/// Whether `e2fsck -fn` calls an image clean, and what it printed. An e2fsck
/// that does not end is no clean verdict.
fn theirs(image: &Path) -> (bool, String) {
    let output = Command::new("timeout")
        .args(["10", "e2fsck", "-fn"])
        .arg(image)
        .output()
        .expect("run e2fsck");
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asserts that both give the same verdict; ours.
#[track_caller]
fn assert_agree(image: &Path, what: &str) -> Outcome {
    let (outcome, text) = ours(image);
    let (clean, their_text) = theirs(image);
    assert_eq!(
        outcome.exit == 0,
        clean,
        "{what}: ours says {}\n{text}\ne2fsck says clean: {clean}\n{their_text}",
        outcome.exit
    );
    outcome
}
