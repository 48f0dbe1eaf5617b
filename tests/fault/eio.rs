//! A device that fails: each read, write and flush of a run, once or from then on.
//!
//! A run is recorded once without faults, which says how many of each there are. Then it runs
//! again for each, failing that one: mount, work, sync, unmount, all of which may fail. What is
//! durable at the end is the disk a power cut leaves; that disk, on a healthy device, must hold
//! all that was acknowledged, and e2fsck must find it good. The same with all that was volatile.
//!
//! A failure prints the line that repeats it, such as
//! `UEXT_FAULT=write:17:once cargo test -p uext-tests --test fault eio_names_ext4_4096`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use uext_blockdev::BlkStatus;
use uext_blockdev::dm::flakey::{Action, Flakey, Ops, Rule, When};
use uext_blockdev::dm::{CrashOptions, LogWrites, SnapshotDevice, UnitSet};
use uext_ext4::{Ext4, MountOptions};
use uext_vfs::FileSystem;

use crate::disk::{Checker, Image, has_error_flag, options};
use crate::session::{May, Session, walk};
use crate::workloads::Profile;

/// A run that takes longer hangs.
const TOO_LONG: Duration = Duration::from_secs(120);
/// Points of one run in `make test`.
const POINTS: usize = 30;

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Point {
    ops: Ops,
    nth: u64,
    how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// This one.
    Once,
    /// This one and all after it.
    Sticky,
    /// This one, after half of it was written.
    Torn,
}

impl Point {
    fn rule(self) -> Rule {
        let fail = Action::Fail(BlkStatus::IoErr);
        match self.how {
            How::Once => Rule::new(self.ops, When::Nth(self.nth), fail),
            How::Sticky => Rule::new(self.ops, When::From(self.nth), fail),
            How::Torn => {
                let torn = Action::Tear { sectors: 4, status: Err(BlkStatus::IoErr) };
                Rule::new(self.ops, When::Nth(self.nth), torn)
            }
        }
    }

    fn name(self) -> String {
        let op = match self.ops {
            Ops::READ => "read",
            Ops::WRITE => "write",
            _ => "flush",
        };
        let how = match self.how {
            How::Once => "once",
            How::Sticky => "sticky",
            How::Torn => "torn",
        };
        format!("{op}:{}:{how}", self.nth)
    }
}

/// What one run came to.
struct Ran {
    counts: (u64, u64, u64),
    failed: u64,
}

/// The runs of one workload on one image.
struct Sweep {
    profile: Profile,
    image: Image,
    base: Arc<Vec<u8>>,
    checker: Checker,
}

impl Sweep {
    fn options(&self) -> MountOptions {
        MountOptions { force: true, ..options() }
    }

    /// Runs the workload with a fault, or without, and judges the disks it leaves.
    fn run(&self, point: Option<Point>) -> Result<Ran, String> {
        let start = SnapshotDevice::over_vec(self.base.clone());
        let recorder = LogWrites::new(start.fork());
        let device = Flakey::new(recorder.clone(), 1);
        if let Some(point) = point {
            device.add(point.rule());
        }
        let may = if point.is_some() { May::Eio } else { May::Nothing };
        let mounted = Ext4::mount(device.clone(), "faulty", &self.options());
        let mut session = match (mounted, point) {
            (Ok(fs), _) => Session::new(fs, 1, self.image.has_journal(), may),
            (Err(error), None) => return Err(format!("mount: {error}")),
            // Refused: nothing was promised, and the image must still be good.
            (Err(_), Some(_)) => {
                let healthy = MemorySession::new(&start);
                self.judge(&recorder, &start, healthy.session(), false)?;
                return Ok(Ran { counts: (0, 0, 0), failed: 1 });
            }
        };
        self.profile.run(&mut session)?;
        if point.is_some_and(|point| point.how != How::Sticky) {
            device.clear();
            self.recover(&mut session)?;
        }
        let unmounted = session.unmount()?;
        if point.is_none() && session.failed > 0 {
            return Err("calls failed without a fault".into());
        }
        let counts = device.counts();
        self.judge(&recorder, &start, &session, unmounted)?;
        let counts = (counts.reads, counts.writes, counts.flushes);
        Ok(Ran { counts, failed: session.failed })
    }

    /// The device is well again: what is dirty was kept, so that a second sync, which nobody is
    /// told of earlier errors by, takes it to the disk; unless the journal was aborted.
    fn recover(&self, session: &mut Session) -> Result<(), String> {
        session.look_again()?;
        let first = session.sync()?;
        if session.is_refused() {
            return Ok(());
        }
        let second = session.sync()?;
        if !first && !second && !session.is_refused() {
            return Err("the device is well and sync still fails".into());
        }
        for path in session.model.paths(|kind| *kind == crate::model::Kind::File) {
            // An error of before is told once to each file.
            let told = session.fsync(&path, false)?;
            if !told && !session.is_refused() && !session.fsync(&path, false)? {
                return Err(format!("the device is well and fsync of {path} fails twice"));
            }
            session.read(&path)?;
        }
        Ok(())
    }

    fn judge(
        &self,
        recorder: &LogWrites,
        start: &SnapshotDevice,
        session: &Session,
        unmounted: bool,
    ) -> Result<(), String> {
        let log = recorder.log();
        let last = log.crash_points(start, CrashOptions::default()).last();
        let last = last.expect("a log has an end");
        let count = last.units().len();
        for (which, set) in [("durable", UnitSet::none(count)), ("all", UnitSet::all(count))] {
            let say = |error: String| format!("with what is {which}: {error}");
            self.judge_disk(&last.state(&set), session, unmounted).map_err(say)?;
        }
        Ok(())
    }

    fn judge_disk(
        &self,
        disk: &Arc<SnapshotDevice>,
        session: &Session,
        unmounted: bool,
    ) -> Result<(), String> {
        let mut disk = disk.clone();
        if unmounted && !has_error_flag(&disk) {
            self.checker.clean(&disk)?;
        } else if !self.image.has_journal() {
            disk = self.checker.repair(&disk)?;
        }
        let fs = Ext4::mount(disk.clone(), "after", &self.options());
        let fs = fs.map_err(|error| format!("mount: {error}"))?;
        let judged = walk(&*fs)
            .and_then(|tree| session.model.judge(&tree, !self.image.has_journal() && !unmounted));
        fs.unmount().map_err(|error| format!("unmount: {error}"))?;
        judged?;
        if has_error_flag(&disk) {
            return self.checker.repair(&disk).map(drop);
        }
        self.checker.clean(&disk)
    }
}

/// A session that promised nothing.
struct MemorySession(Session);

impl MemorySession {
    fn new(start: &SnapshotDevice) -> Self {
        let fs = Ext4::mount(start.fork(), "untouched", &options()).expect("mount a new image");
        Self(Session::new(fs, 1, true, May::Nothing))
    }

    fn session(&self) -> &Session {
        &self.0
    }
}

/// Panics of any thread, since the process began.
static PANICS: AtomicU64 = AtomicU64::new(0);
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

fn count_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // A test that ends with its failures is no panic of the filesystem.
            if !info.location().is_some_and(|at| at.file().starts_with("tests/fault")) {
                PANICS.fetch_add(1, Ordering::SeqCst);
                if let Ok(mut last) = LAST_PANIC.lock() {
                    *last = info.to_string();
                }
            }
            before(info);
        }));
    });
}

/// Ends the process when a run hangs: a thread that waits cannot be ended.
struct Watchdog {
    beats: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Watchdog {
    fn start(at: Arc<Mutex<String>>) -> Self {
        let (beats, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (watched, ended) = (beats.clone(), stop.clone());
        std::thread::spawn(move || {
            let (mut seen, mut since) = (0, Instant::now());
            while !ended.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(200));
                let now = watched.load(Ordering::SeqCst);
                if now != seen {
                    (seen, since) = (now, Instant::now());
                } else if since.elapsed() > TOO_LONG {
                    let at = at.lock().map(|at| at.clone()).unwrap_or_default();
                    eprintln!("HANG: {at}");
                    std::process::abort();
                }
            }
        });
        Self { beats, stop }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// The points of a run that had so many reads, writes and flushes.
fn points((reads, writes, flushes): (u64, u64, u64)) -> Vec<Point> {
    let mut all = Vec::new();
    for (ops, count, hows) in [
        (Ops::READ, reads, &[How::Once, How::Sticky][..]),
        (Ops::WRITE, writes, &[How::Once, How::Sticky, How::Torn][..]),
        (Ops::FLUSH, flushes, &[How::Once, How::Sticky][..]),
    ] {
        for nth in 1..=count {
            all.extend(hows.iter().map(|&how| Point { ops, nth, how }));
        }
    }
    all
}

/// Runs a workload with a fault at each of its points, or as many as were asked for.
pub fn sweep(name: &str, profile: Profile, image: Image) {
    count_panics();
    let base = image.make(12, &["-m", "0", "-N", "1024"]);
    let sweep = Sweep { profile, image, checker: Checker::new(base.len()), base };
    let clean = sweep.run(None).unwrap_or_else(|error| panic!("{name} without a fault: {error}"));
    let all = points(clean.counts);
    let only = std::env::var("UEXT_FAULT").ok();
    let most = std::env::var("UEXT_FAULT_POINTS").ok().and_then(|text| text.parse().ok());
    let most: usize = if only.is_some() { 0 } else { most.unwrap_or(POINTS) };
    // An odd stride goes through all operations and ways to fail.
    let stride = all.len().checked_div(most).map_or(1, |every| every.max(1) | 1);
    let at = Arc::new(Mutex::new(String::new()));
    let watchdog = Watchdog::start(at.clone());
    let (begin, mut tested, mut failed, mut failures) = (Instant::now(), 0, 0, Vec::new());
    for &point in all.iter().step_by(stride) {
        if only.as_ref().is_some_and(|only| *only != point.name()) {
            continue;
        }
        let repeat =
            format!("UEXT_FAULT={} cargo test -p uext-tests --test fault {name}", point.name());
        if let Ok(mut at) = at.lock() {
            at.clone_from(&repeat);
        }
        watchdog.beats.fetch_add(1, Ordering::SeqCst);
        let panics = PANICS.load(Ordering::SeqCst);
        let ran = catch_unwind(AssertUnwindSafe(|| sweep.run(Some(point))));
        let mut result = ran.unwrap_or_else(|_| Err("panic".into()));
        if PANICS.load(Ordering::SeqCst) != panics {
            let last = LAST_PANIC.lock().map(|last| last.clone()).unwrap_or_default();
            result = Err(format!("a thread panicked: {last}"));
        }
        tested += 1;
        match result {
            Ok(ran) => failed += ran.failed,
            Err(error) => failures.push(format!("{repeat}\n    {error}")),
        }
        if failures.len() >= 8 {
            break;
        }
    }
    let took = begin.elapsed().as_secs_f64();
    println!(
        "{name}: {} reads, {} writes, {} flushes; {tested} points of {}, {failed} calls failed, \
         {:.0} points/s",
        clean.counts.0,
        clean.counts.1,
        clean.counts.2,
        all.len(),
        f64::from(tested) / took
    );
    assert!(failures.is_empty(), "{} points:\n{}", failures.len(), failures.join("\n"));
}
