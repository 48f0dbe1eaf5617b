//! The transport on real mounts of the filesystem in memory: that requests go by
//! rings, and that every failure on the way leads to `/dev/fuse` and a mount that works.
#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use uext_vfs::{Errno, FileSystem};

use super::*;
use crate::null::NullFs;
use crate::{Pending, SessionError, Source, Transport};

/// The CPU, plus one, of which an entry is to be refused, and which entry.
static REFUSED: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];

/// Gives the kernel too small a payload for an entry, which it then refuses.
pub(super) fn plant_failure(cpu: usize, ring: &mut Ring<'_>) {
    if REFUSED[0].load(Ordering::SeqCst) == cpu + 1 {
        ring.plant_refusal(REFUSED[1].load(Ordering::SeqCst));
    }
}

/// `enable_uring`, set for one test at a time, in all test programs, and restored.
struct Parameter {
    before: String,
    file: Flock<File>,
}

impl Parameter {
    /// `None`, loudly, where it can't be set.
    fn set(value: &str) -> Option<Self> {
        let file = OpenOptions::new().read(true).write(true).open(ENABLE);
        let (Ok(file), true) = (file, nix::unistd::getuid().is_root()) else {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "SKIPPED: needs root and FUSE over io_uring");
            return None;
        };
        let file = Flock::lock(file, FlockArg::LockExclusive).unwrap();
        let before = fs::read_to_string(ENABLE).unwrap();
        fs::write(ENABLE, value).unwrap();
        Some(Self { before, file })
    }
}

impl Drop for Parameter {
    fn drop(&mut self) {
        fs::write(ENABLE, self.before.trim()).unwrap();
        // The lock goes with the file.
        let _ = &self.file;
    }
}

struct Mounted {
    dir: PathBuf,
    over_uring: bool,
    session: Option<JoinHandle<Result<(), SessionError>>>,
    _scratch: tempfile::TempDir,
}

impl Mounted {
    fn new(fs: Arc<dyn FileSystem>, transport: Transport) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let (image, dir) = (scratch.path().join("image"), scratch.path().join("mount"));
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
        fs::create_dir(&dir).unwrap();
        let config = Config { transport, ..Config::default() };
        let source = Source::of_path(&image).unwrap();
        let session = Pending::create(&source, &config).unwrap().serve(fs, &dir).unwrap();
        let over_uring = session.is_over_uring();
        let session = Some(std::thread::spawn(move || session.wait()));
        Self { dir, over_uring, session, _scratch: scratch }
    }

    /// Names, data and a directory with many entries, from several threads.
    fn work(&self) {
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let dir = self.dir.join(thread.to_string());
                scope.spawn(move || {
                    fs::create_dir(&dir).unwrap();
                    for n in 0..200 {
                        fs::write(dir.join(format!("file {n}")), vec![thread; 10_000]).unwrap();
                    }
                    assert_eq!(fs::read_dir(&dir).unwrap().count(), 200);
                    let data = fs::read(dir.join("file 77")).unwrap();
                    assert_eq!(data, vec![thread; 10_000]);
                    let large: Vec<u8> = (0..3 << 20).map(|n: usize| (n / 7) as u8).collect();
                    fs::write(dir.join("large"), &large).unwrap();
                    File::open(dir.join("large")).unwrap().sync_all().unwrap();
                    assert!(fs::read(dir.join("large")).unwrap() == large);
                    fs::remove_dir_all(&dir).unwrap();
                });
            }
        });
        assert_eq!(fs::read_dir(&self.dir).unwrap().count(), 0);
    }

    fn umount(mut self) {
        umount2(&self.dir, MntFlags::empty()).unwrap();
        self.session.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.session.is_some() {
            // After a failed test; the thread ends by itself.
            let _ = umount2(&self.dir, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        }
    }
}

#[test]
fn requests_go_by_rings_where_the_kernel_offers_them() {
    let Some(_parameter) = Parameter::set("Y") else { return };
    for transport in [Transport::Uring, Transport::Auto] {
        let mounted = Mounted::new(Arc::new(NullFs::default()), transport);
        assert!(mounted.over_uring);
        mounted.work();
        mounted.umount();
    }
}

#[test]
fn without_the_kernels_offer_the_device_serves() {
    let Some(_parameter) = Parameter::set("N") else { return };
    for transport in [Transport::Uring, Transport::Auto, Transport::DevFuse] {
        let mounted = Mounted::new(Arc::new(NullFs::default()), transport);
        assert!(!mounted.over_uring);
        mounted.work();
        mounted.umount();
    }
}

/// Until all queues have an entry all requests wait, and then they come by rings
/// whatever else was refused: neither must leave them waiting.
#[test]
fn a_refused_entry_leads_back_to_the_device_or_shortens_a_queue() {
    let Some(_parameter) = Parameter::set("Y") else { return };
    for (cpu, index) in (0..possible_cpus().unwrap()).flat_map(|cpu| [(cpu, 0), (cpu, 3)]) {
        REFUSED[1].store(index, Ordering::SeqCst);
        REFUSED[0].store(cpu + 1, Ordering::SeqCst);
        let mounted = Mounted::new(Arc::new(NullFs::default()), Transport::Uring);
        REFUSED[0].store(0, Ordering::SeqCst);
        // The first thread's queue is the last to be offered, and its first entry is there.
        let shorter = cpu == usable_cpus(4096).unwrap()[0] && index != 0;
        assert_eq!(mounted.over_uring, shorter, "CPU {cpu}, entry {index}");
        mounted.work();
        mounted.umount();
    }
}

/// All CPUs' requests that may wait do wait, more of them than there are CPUs, and
/// names are still answered.
#[test]
fn requests_that_wait_stall_no_others() {
    let Some(_parameter) = Parameter::set("Y") else { return };
    let fs = Arc::new(NullFs::default());
    let mounted = Mounted::new(fs.clone(), Transport::Uring);
    let files: Vec<_> = (0..6)
        .map(|n| {
            let path = mounted.dir.join(format!("waits {n}"));
            fs::write(&path, "data").unwrap();
            File::open(path).unwrap()
        })
        .collect();
    fs.hold_fsyncs(true);
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            files.iter().map(|file| scope.spawn(move || file.sync_all().unwrap())).collect();
        let start = Instant::now();
        while fs.held_fsyncs() < files.len() {
            assert!(start.elapsed() < Duration::from_secs(20), "all of them get to the filesystem");
            std::thread::sleep(Duration::from_millis(1));
        }
        // On each CPU: a name, a small write.
        for cpu in 0..possible_cpus().unwrap() {
            pin(cpu);
            let path = mounted.dir.join(format!("new {cpu}"));
            let file = File::create(path).unwrap();
            file.write_all_at(b"x", 0).unwrap();
        }
        assert!(threads.iter().all(|thread| !thread.is_finished()));
        fs.hold_fsyncs(false);
    });
    drop(files);
    mounted.umount();
}

#[test]
fn an_aborted_connection_ends_the_rings() {
    let Some(_parameter) = Parameter::set("Y") else { return };
    let mut mounted = Mounted::new(Arc::new(NullFs::default()), Transport::Uring);
    let open = File::create(mounted.dir.join("open")).unwrap();
    umount2(&mounted.dir, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH).unwrap();
    let error = open.write_all_at(b"x", 0).unwrap_err();
    assert!(matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)), "{error}");
    mounted.session.take().unwrap().join().unwrap().unwrap();
}

#[test]
fn a_stopped_session_ends_with_files_open() {
    let Some(_parameter) = Parameter::set("Y") else { return };
    let scratch = tempfile::tempdir().unwrap();
    let config = Config { transport: Transport::Uring, ..Config::default() };
    let pending = Pending::create(&Source::Name("null".into()), &config).unwrap();
    let session = pending.serve(Arc::new(NullFs::default()), scratch.path()).unwrap();
    assert!(session.is_over_uring());
    let open = File::create(scratch.path().join("open")).unwrap();
    let stopper = session.stopper();
    let session = std::thread::spawn(move || session.wait());
    stopper.stop();
    session.join().unwrap().unwrap();
    assert!(open.write_all_at(b"x", 0).is_err());
}

#[test]
fn an_error_has_its_number_and_no_data() {
    let mut entry = Entry::new(0, 0, PAGE_SIZE);
    let mut payload = vec![0; 16];
    assert_eq!(Errno::ENOENT.0, libc::ENOENT);
    let [header, _] = entry.memory();
    // A LOOKUP of a name that doesn't end, which is EINVAL.
    header[4..8].copy_from_slice(zerocopy::IntoBytes::as_bytes(&1u32));
    header[256 + 16..256 + 20].copy_from_slice(zerocopy::IntoBytes::as_bytes(&3u32));
    let dispatcher = Dispatcher::new(Arc::new(NullFs::default()), &Config::default());
    entry.serve(&dispatcher, &mut payload);
    let [header, _] = entry.memory();
    let out = crate::abi::OutHeader::read_from_prefix(header).unwrap().0;
    assert_eq!((out.error, out.len), (-libc::EINVAL, 16));
}
