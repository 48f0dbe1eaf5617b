//! Mounts of the filesystem in memory: what the kernel and the usual programs make
//! of them. They need root and `/dev/fuse`, and say so when they skip.
#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::mount::{MntFlags, umount2};
use nix::unistd::linkat;
use uext_fuse::fuser_front::FuserMount;
use uext_fuse::null::NullFs;
use uext_fuse::{
    Config, CpuLatency, Pending, SessionError, Source, Stopper, Transport, mount_table,
};

/// A mount that goes when the test does.
struct TestMount {
    fs: Arc<NullFs>,
    dir: PathBuf,
    stopper: Stopper,
    session: Option<JoinHandle<Result<(), SessionError>>>,
    _scratch: tempfile::TempDir,
}

/// Held while a program is started: from its fork until its exec it has what this process has
/// open, connections and files of mounts. A file's close then asks a filesystem whose
/// connection cannot end, as long as the child that waits for the answer holds it.
static STARTING: Mutex<()> = Mutex::new(());

/// Runs a program.
fn output(command: &mut Command) -> Output {
    let child = {
        let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    child.wait_with_output().unwrap()
}

/// Whether this machine can mount; a skip is loud.
fn can_mount() -> bool {
    let able = nix::unistd::getuid().is_root() && Path::new("/dev/fuse").exists();
    if !able {
        {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "SKIPPED: mounting needs root and /dev/fuse");
        }
    }
    able
}

enum Kind {
    /// fuseblk over an image.
    Block,
    /// fuse by name.
    Plain,
}

fn mount(kind: &Kind, config: &Config) -> Option<TestMount> {
    mount_fs(kind, config, NullFs::default())
}

fn mount_fs(kind: &Kind, config: &Config, fs: NullFs) -> Option<TestMount> {
    if !can_mount() {
        return None;
    }
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("mount");
    fs::create_dir(&dir).unwrap();
    let source = match kind {
        Kind::Block => {
            let image = scratch.path().join("image");
            File::create(&image).unwrap().set_len(1 << 20).unwrap();
            Source::of_path(&image).unwrap()
        }
        Kind::Plain => Source::Name("nothing".into()),
    };
    let fs = Arc::new(fs);
    let mut config = config.clone();
    if let Ok(transport) = std::env::var("UEXT_TEST_TRANSPORT") {
        assert_eq!(transport, "uring", "UEXT_TEST_TRANSPORT");
        config.transport = Transport::Uring;
    }
    let session = Pending::create(&source, &config).unwrap().serve(fs.clone(), &dir).unwrap();
    assert_eq!(session.is_over_uring(), config.transport == Transport::Uring);
    let stopper = session.stopper();
    let session = Some(std::thread::spawn(move || session.wait()));
    Some(TestMount { fs, dir, stopper, session, _scratch: scratch })
}

impl TestMount {
    fn end(mut self) -> Result<(), SessionError> {
        self.session.take().unwrap().join().unwrap()
    }

    fn umount(self) {
        unmount(&self.dir);
        self.end().unwrap();
    }

    /// Runs a shell script in the mount.
    fn sh(&self, script: &str) -> String {
        let mut command = Command::new("timeout");
        let output = output(command.args(["60", "sh", "-euc", script]).current_dir(&self.dir));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}\n{text}\n{errors}");
        text
    }
}

/// A child that another test is starting has our files open until it gets to its exec.
fn unmount(dir: &Path) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match umount2(dir, MntFlags::empty()) {
            Err(nix::Error::EBUSY) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result.unwrap(),
        }
    }
}

impl Drop for TestMount {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            self.fs.hold_writes(false);
            // After a failed test: abort the connection, then it ends by itself.
            let _ = umount2(&self.dir, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
            self.stopper.stop();
            let _ = session.join();
        }
    }
}

const NAMES: &str = "
    mkdir d; mkdir d/e; echo hello > d/f
    test \"$(cat d/f)\" = hello
    ln d/f d/g; test \"$(stat -c %h d/f)\" = 2
    ln -s f d/s; test \"$(readlink d/s)\" = f; test \"$(cat d/s)\" = hello
    mkfifo d/p; test -p d/p; mknod d/n c 1 3; test \"$(stat -c %t:%T d/n)\" = 1:3
    mv d/f d/h; test ! -e d/f; test \"$(cat d/h)\" = hello
    cp d/h d/i; cmp d/h d/i; rm d/g; test \"$(stat -c %h d/h)\" = 1
    test \"$(stat -c %i .)\" = 2
    chmod 4750 d/h; test \"$(stat -c %a d/h)\" = 4750
    chown 12:34 d/i; test \"$(stat -c %u:%g d/i)\" = 12:34
    touch -d @1000000000.5 d/i; test \"$(stat -c %Y d/i)\" = 1000000000
    test \"$(stat -c %W d/i)\" -gt 1000000000
    truncate -s 10000 d/i; test \"$(stat -c %s d/i)\" = 10000
    ! rmdir d 2>/dev/null; ! mkdir d 2>/dev/null; ! cat d/none 2>/dev/null
    find . | sort | tr '\\n' ' '
    sync; sync -f .; df . > /dev/null; rm -r d; test -z \"$(ls -A)\"
";
const LISTED: &str = ". ./d ./d/e ./d/h ./d/i ./d/n ./d/p ./d/s ";

#[test]
fn the_usual_programs_work_as_fuseblk() {
    let Some(mount) = mount(&Kind::Block, &Config::default()) else { return };
    assert_eq!(mount.sh(NAMES), LISTED);
    mount.umount();
}

#[test]
fn what_is_tuned_after_the_mount_is_in_sysfs() {
    let config = Config { read_ahead_kb: Some(2048), max_ratio: Some(40), ..Config::default() };
    for (kind, suffix) in [(Kind::Block, "-fuseblk"), (Kind::Plain, "")] {
        let Some(mount) = mount(&kind, &config) else { return };
        let device = fs::metadata(&mount.dir).unwrap().dev();
        let (major, minor) = (libc::major(device), libc::minor(device));
        let bdi = PathBuf::from(format!("/sys/class/bdi/{major}:{minor}{suffix}"));
        let read = |name: &str| fs::read_to_string(bdi.join(name)).unwrap().trim().to_owned();
        assert_eq!((read("read_ahead_kb"), read("max_ratio")), ("2048".into(), "40".into()));
        mount.umount();
    }
}

/// Replies by splice: whole pages, parts of them, holes, and more than the pipe takes.
#[test]
fn spliced_replies_have_the_data() {
    let config = Config { splice: true, ..Config::default() };
    let Some(mount) = mount(&Kind::Block, &config) else { return };
    let path = mount.dir.join("file");
    let mut data: Vec<u8> = (0..5_000_000u32).map(|n| (n / 3) as u8).collect();
    data[1_000_000..2_500_000].fill(0);
    let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
    file.write_all_at(&data[..1_000_000], 0).unwrap();
    file.write_all_at(&data[2_500_000..], 2_500_000).unwrap();
    drop(file);
    // Past the kernel's cache, which has it all from the writes.
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    let mut all = vec![0; data.len()];
    direct.read_exact_at(&mut all, 0).unwrap();
    assert!(all == data);
    let mut part = vec![0; 300_000];
    direct.read_exact_at(&mut part, 999_000).unwrap();
    assert!(part == data[999_000..1_299_000]);
    drop(direct);
    mount.umount();
}

#[test]
fn the_usual_programs_work_as_plain_fuse_with_opens_and_one_thread() {
    let config = Config { threads: Some(1), ..Config::default() };
    let Some(mount) = mount_fs(&Kind::Plain, &config, NullFs::new(false)) else { return };
    assert_eq!(mount.sh(NAMES), LISTED);
    mount.umount();
}

#[test]
fn the_usual_programs_work_with_writeback_and_without_caching() {
    let zero = Duration::ZERO;
    let config = Config {
        writeback_cache: true,
        entry_timeout: zero,
        attr_timeout: zero,
        negative_timeout: zero,
        ..Config::default()
    };
    let Some(mount) = mount(&Kind::Block, &config) else { return };
    assert_eq!(mount.sh(NAMES), LISTED);
    mount.umount();
}

#[test]
fn umount_of_a_block_mount_returns_after_the_filesystem_has_unmounted() {
    let Some(mount) = mount(&Kind::Block, &Config::default()) else { return };
    unmount(&mount.dir);
    assert_eq!(mount.fs.unmounts(), 1);
    let fs = mount.fs.clone();
    mount.end().unwrap();
    assert_eq!(fs.unmounts(), 1);
}

#[test]
fn a_plain_mount_unmounts_its_filesystem_when_the_session_ends() {
    let Some(mount) = mount(&Kind::Plain, &Config::default()) else { return };
    let fs = mount.fs.clone();
    mount.umount();
    assert_eq!(fs.unmounts(), 1);
}

#[test]
fn an_aborted_connection_unmounts_the_filesystem_and_leaves_no_mount() {
    for kind in [Kind::Block, Kind::Plain] {
        let Some(mount) = mount(&kind, &Config::default()) else { return };
        let (fs, dir) = (mount.fs.clone(), mount.dir.clone());
        let file = File::create(dir.join("open")).unwrap();
        // The force aborts; being busy, the mount stays for the session to take away.
        assert!(umount2(&dir, MntFlags::MNT_FORCE).is_err());
        mount.end().unwrap();
        assert_eq!(fs.unmounts(), 1);
        assert_eq!(mount_table::mount_at(&dir).unwrap(), None);
        drop(file);
    }
}

/// A session that lingers after its unmount, or is told late to stop, must leave alone what was
/// mounted in its place meanwhile, from the same device even.
#[test]
fn a_session_that_ends_late_leaves_the_next_mount_in_its_place() {
    for kind in [Kind::Block, Kind::Plain] {
        if !can_mount() {
            return;
        }
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("mount");
        fs::create_dir(&dir).unwrap();
        let image = scratch.path().join("image");
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let source = match kind {
            // A device of its own, so that both mounts have its number.
            Kind::Block => {
                let output = output(Command::new("losetup").args(["-f", "--show"]).arg(&image));
                let device = String::from_utf8(output.stdout).unwrap();
                Source::Device(device.trim().into())
            }
            Kind::Plain => Source::Name("nothing".into()),
        };
        let serve = || {
            let pending = Pending::create(&source, &Config::default()).unwrap();
            pending.serve(Arc::new(NullFs::default()), &dir).unwrap()
        };
        let mounted = || mount_table::mount_at(&dir).unwrap().is_some();
        let first = serve();
        unmount(&dir);
        let second = serve();
        let same_number = second.device() == first.device();
        first.stopper().stop();
        let after_stop = mounted();
        first.wait().unwrap();
        let after_wait = mounted();
        let _ = umount2(&dir, MntFlags::empty());
        second.wait().unwrap();
        if let Source::Device(device) = &source {
            assert!(output(Command::new("losetup").arg("-d").arg(device)).status.success());
            assert!(same_number);
        }
        assert!(after_stop && after_wait, "{after_stop} {after_wait}");
    }
}

#[test]
fn a_stop_ends_the_session_with_files_open() {
    for kind in [Kind::Block, Kind::Plain] {
        let Some(mount) = mount(&kind, &Config::default()) else { return };
        let fs = mount.fs.clone();
        let mut file = File::create(mount.dir.join("open")).unwrap();
        file.write_all(b"data").unwrap();
        let _nobody_starts = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        mount.stopper.stop();
        mount.end().unwrap();
        assert_eq!(fs.unmounts(), 1);
        assert!(file.write_all(b"more").is_err());
    }
}

#[test]
fn a_stop_of_an_idle_mount_is_an_umount() {
    let Some(mount) = mount(&Kind::Block, &Config::default()) else { return };
    let (fs, dir) = (mount.fs.clone(), mount.dir.clone());
    mount.stopper.stop();
    assert_eq!(fs.unmounts(), 1);
    mount.end().unwrap();
    assert_eq!(mount_table::mount_at(&dir).unwrap(), None);
}

#[test]
fn a_mount_that_cannot_be_attached_unmounts_its_filesystem() {
    if !can_mount() {
        return;
    }
    let fs = Arc::new(NullFs::default());
    let pending = Pending::create(&Source::Name("x".into()), &Config::default()).unwrap();
    let result = pending.serve(fs.clone(), Path::new("/nonexistent/uext"));
    assert_eq!(result.err().and_then(|error| error.raw_os_error()), Some(libc::ENOENT));
    assert_eq!(fs.unmounts(), 1);
}

#[test]
fn an_option_the_kernel_does_not_know_is_named() {
    if !can_mount() {
        return;
    }
    let config = Config { extra: vec![("nonsense".into(), None)], ..Config::default() };
    let error = Pending::create(&Source::Name("x".into()), &config).err().unwrap();
    assert!(error.to_string().contains("nonsense"), "{error}");
}

#[test]
fn ten_thousand_names_are_listed_once_each_and_all_counts_come_back() {
    let Some(mount) = mount(&Kind::Block, &Config::default()) else { return };
    let dir = mount.dir.join("big");
    fs::create_dir(&dir).unwrap();
    let names: BTreeSet<String> = (0..10_000).map(|n| format!("name-of-a-file-{n}")).collect();
    for name in &names {
        File::create(dir.join(name)).unwrap();
    }
    // With stat of each entry: what makes the kernel ask with inodes.
    mount.sh("ls -lR . > /dev/null; find . -size +1 > /dev/null");
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(&dir).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().size(), 0);
        assert!(seen.insert(entry.file_name().into_string().unwrap()));
    }
    assert_eq!(seen, names);
    fs::remove_dir_all(&dir).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while mount.fs.counted() != (0, 0) {
        assert!(Instant::now() < deadline, "nodes and lookups left: {:?}", mount.fs.counted());
        std::thread::sleep(Duration::from_millis(10));
    }
    mount.umount();
}

#[test]
fn data_comes_back_as_it_was_written() {
    let Some(mount) = mount(&Kind::Block, &Config::default()) else { return };
    let path = mount.dir.join("f");
    let mut data = vec![0; 3 << 20];
    let mut state = 1_u64;
    for byte in &mut data {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *byte = (state >> 56) as u8;
    }
    fs::write(&path, &data).unwrap();
    assert!(fs::read(&path).unwrap() == data);
    // Past the kernel's cache, too.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    let mut direct = vec![0; data.len() + 4096];
    let skip = direct.as_ptr().align_offset(4096);
    file.read_exact_at(&mut direct[skip..skip + data.len()], 0).unwrap();
    assert!(direct[skip..skip + data.len()] == data);
    // Appending goes to the end, wherever the offset is.
    let mut append = OpenOptions::new().append(true).open(&path).unwrap();
    append.seek(SeekFrom::Start(0)).unwrap();
    append.write_all(b"end").unwrap();
    let read = fs::read(&path).unwrap();
    assert!(read[..data.len()] == data && &read[data.len()..] == b"end");
    drop((file, append));
    mount.umount();
}

#[test]
fn holes_are_found_punched_and_read_as_zeroes() {
    let Some(mount) = mount(&Kind::Block, &Config::default()) else { return };
    let path = mount.dir.join("f");
    let mut file = OpenOptions::new().create_new(true).read(true).write(true).open(&path).unwrap();
    file.write_all_at(&[1; 8192], 1 << 20).unwrap();
    let seek = |whence| nix::unistd::lseek(&file, 0, whence).unwrap() as u64;
    assert_eq!(seek(nix::unistd::Whence::SeekData), 1 << 20);
    assert_eq!(seek(nix::unistd::Whence::SeekHole), 0);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 1 << 20, 4096).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, (1 << 20) + 10_000).unwrap();
    let mut read = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut read).unwrap();
    assert_eq!(read.len(), (1 << 20) + 10_000);
    let ones: Vec<usize> = (0..read.len()).filter(|at| read[*at] != 0).collect();
    assert_eq!(ones, ((1 << 20) + 4096..(1 << 20) + 8192).collect::<Vec<_>>());
    drop(file);
    mount.umount();
}

#[test]
fn renames_obey_their_flags() {
    let Some(mount) = mount(&Kind::Block, &Config::default()) else { return };
    let (a, b) = (mount.dir.join("a"), mount.dir.join("b"));
    fs::write(&a, "a").unwrap();
    fs::create_dir(&b).unwrap();
    let rename = |from: &Path, to: &Path, flags| renameat2(AT_FDCWD, from, AT_FDCWD, to, flags);
    let result = rename(&a, &b, RenameFlags::RENAME_NOREPLACE);
    assert_eq!(result, Err(nix::Error::EEXIST));
    rename(&a, &b, RenameFlags::RENAME_EXCHANGE).unwrap();
    assert!(a.is_dir() && fs::read(&b).unwrap() == b"a");
    let root = fs::metadata(&mount.dir).unwrap();
    assert_eq!(root.nlink(), 3);
    fs::write(a.join("inside"), "").unwrap();
    let c = mount.dir.join("c");
    fs::create_dir(&c).unwrap();
    let result = rename(&c, &a, RenameFlags::empty());
    assert_eq!(result, Err(nix::Error::ENOTEMPTY));
    mount.umount();
}

#[test]
fn extended_attributes_are_set_listed_and_removed() {
    let Some(mount) = mount(&Kind::Block, &Config::default()) else { return };
    let script = r#"
import os, errno
open('f', 'w').close()
os.setxattr('f', 'user.a', b'1' * 60000)
assert os.getxattr('f', 'user.a') == b'1' * 60000
os.setxattr('f', 'user.b', b'')
os.setxattr('f', 'trusted.c', b'x', os.XATTR_CREATE)
assert sorted(os.listxattr('f')) == ['trusted.c', 'user.a', 'user.b']
def fails(number, call, *args):
    try:
        call(*args)
    except OSError as error:
        assert error.errno == number, error
    else:
        raise AssertionError(call)
fails(errno.EEXIST, os.setxattr, 'f', 'user.a', b'', os.XATTR_CREATE)
fails(errno.ENODATA, os.setxattr, 'f', 'user.z', b'', os.XATTR_REPLACE)
os.removexattr('f', 'user.a')
fails(errno.ENODATA, os.getxattr, 'f', 'user.a')
"#;
    mount.sh(&format!("python3 - <<'EOF'\n{script}\nEOF"));
    mount.umount();
}

#[test]
fn a_file_without_a_name_gets_one() {
    let Some(mount) = mount(&Kind::Block, &Config::default()) else { return };
    let open = || {
        let flags = libc::O_TMPFILE;
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(flags).open(&mount.dir).unwrap()
    };
    let mut file = open();
    file.write_all(b"content").unwrap();
    let (from, to) = (format!("/proc/self/fd/{}", file.as_raw_fd()), mount.dir.join("named"));
    linkat(AT_FDCWD, from.as_str(), AT_FDCWD, &to, AtFlags::AT_SYMLINK_FOLLOW).unwrap();
    assert_eq!(fs::read(&to).unwrap(), b"content");
    drop((file, open()));
    mount.umount();
}

#[test]
fn an_unlinked_file_lives_until_it_is_closed() {
    let Some(mount) = mount(&Kind::Block, &Config::default()) else { return };
    let path = mount.dir.join("f");
    let file = OpenOptions::new().create_new(true).write(true).read(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    file.write_all_at(b"still", 0).unwrap();
    let mut read = [0; 5];
    file.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(&read, b"still");
    drop(file);
    let deadline = Instant::now() + Duration::from_secs(10);
    while mount.fs.counted() != (0, 0) {
        assert!(Instant::now() < deadline, "{:?}", mount.fs.counted());
        std::thread::sleep(Duration::from_millis(5));
    }
    mount.umount();
}

#[test]
fn a_read_only_mount_refuses_writes() {
    let config = Config { read_only: true, ..Config::default() };
    let Some(mount) = mount(&Kind::Block, &config) else { return };
    let error = File::create(mount.dir.join("f")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    mount.umount();
}

#[test]
fn many_threads_work_side_by_side() {
    let config = Config { threads: Some(8), ..Config::default() };
    let Some(mount) = mount(&Kind::Block, &config) else { return };
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let dir = &mount.dir;
            scope.spawn(move || {
                for round in 0..200 {
                    let (a, b) = (dir.join(format!("{thread}-a")), dir.join(format!("{thread}-b")));
                    fs::write(&a, vec![thread as u8; round * 7]).unwrap();
                    fs::rename(&a, &b).unwrap();
                    assert_eq!(fs::read(&b).unwrap(), vec![thread as u8; round * 7]);
                    fs::remove_file(&b).unwrap();
                }
            });
        }
    });
    assert_eq!(fs::read_dir(&mount.dir).unwrap().count(), 0);
    mount.umount();
}

#[test]
fn the_fuser_front_serves_the_usual_programs_and_unmounts_once() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let fs = Arc::new(NullFs::default());
    let config = Config::default();
    let mount = FuserMount::new(fs.clone(), "nothing", scratch.path(), &config).unwrap();
    let stopper = mount.stopper();
    let session = std::thread::spawn(move || mount.wait());
    // The birth time needs statx, which fuser lacks; the root shows the node's number.
    let script =
        NAMES.replace("%W d/i)\" -gt", "%W d/i)\" -lt").replace("%i .)\" = 2", "%i .)\" = 1");
    let mut command = Command::new("timeout");
    let output = output(command.args(["60", "sh", "-euc", &script]).current_dir(scratch.path()));
    stopper.stop();
    session.join().unwrap().unwrap();
    assert_eq!(fs.unmounts(), 1);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), LISTED);
    assert_eq!(mount_table::mount_at(scratch.path()).unwrap(), None);
}

/// What the kernel holds CPUs to, in microseconds; none where it can't.
fn cpu_latency() -> Option<i32> {
    let mut value = [0; 4];
    File::open("/dev/cpu_dma_latency").and_then(|mut file| file.read_exact(&mut value)).ok()?;
    Some(i32::from_le_bytes(value))
}

#[test]
fn a_busy_mount_has_cpus_stay_awake() {
    if cpu_latency().is_none() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: no /dev/cpu_dma_latency");
        return;
    }
    // A value that nobody else on the machine holds; others' may be smaller.
    let config = Config { cpu_latency: CpuLatency::Within(4321), ..Config::default() };
    let Some(mount) = mount(&Kind::Plain, &config) else { return };
    let end = Instant::now() + Duration::from_secs(30);
    let mut held = false;
    while !held && Instant::now() < end {
        for _ in 0..200 {
            let _ = fs::remove_file(mount.dir.join("none"));
            fs::write(mount.dir.join("file"), "").unwrap();
        }
        held = cpu_latency().is_some_and(|micros| micros <= 4321);
    }
    assert!(held, "{:?}", cpu_latency());
    let mut lifted = false;
    while !lifted && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
        lifted = cpu_latency() != Some(4321);
    }
    assert!(lifted, "the mount is idle");
    mount.umount();
}

/// Who has answered a write early keeps its worker; others must not wait for that.
#[test]
fn answers_before_the_end_leave_workers_for_others() {
    let config = Config { transport: Transport::DevFuse, threads: Some(1), ..Config::default() };
    if std::env::var_os("UEXT_TEST_TRANSPORT").is_some() {
        // Over io_uring nothing is answered early.
        return;
    }
    let Some(mount) = mount(&Kind::Block, &config) else { return };
    let file = File::create(mount.dir.join("written")).unwrap();
    let other = File::create(mount.dir.join("other")).unwrap();
    mount.fs.hold_writes(true);
    file.write_all_at(b"answered", 0).unwrap();
    let waits = std::thread::scope(|scope| {
        // One worker is away, so a second write is answered when it is done.
        let second = scope.spawn(|| other.write_all_at(b"later", 0).unwrap());
        while mount.fs.held_writes() < 2 && !second.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // The stand-ins serve these.
        let script = "for n in 0 1 2 3 4 5; do : > $n; stat $n; done";
        let served = catch_unwind(AssertUnwindSafe(|| mount.sh(script)));
        let waits = !second.is_finished();
        mount.fs.hold_writes(false);
        served.unwrap();
        waits
    });
    assert!(waits, "two were answered early");
    file.sync_all().unwrap();
    assert_eq!(mount.sh("cat written other"), "answeredlater");
    drop((file, other));
    mount.umount();
}

/// A mount of which one worker may take all requests: by `/dev/fuse`, where CPUs may halt.
fn mount_with_one_alone() -> Option<TestMount> {
    if std::env::var_os("UEXT_TEST_TRANSPORT").is_some() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: rings have no such worker");
        return None;
    }
    let config = Config {
        transport: Transport::DevFuse,
        threads: Some(2),
        cpu_latency: CpuLatency::Off,
        ..Config::default()
    };
    mount(&Kind::Block, &config)
}

/// One worker takes all requests of a client that sends one after the other (where the machine has
/// a CPU to spare); what holds it up must not hold up others.
#[test]
fn a_request_that_waits_does_not_stall_others_after_many_quick_ones() {
    let Some(mount) = mount_with_one_alone() else { return };
    for round in 0..5 {
        let dir = mount.dir.join(format!("dir {round}"));
        fs::create_dir(&dir).unwrap();
        let file = File::create(dir.join("file")).unwrap();
        for n in 0..2000 {
            fs::symlink_metadata(dir.join(format!("none {n}"))).unwrap_err();
        }
        mount.fs.hold_fsyncs(true);
        let wait = |done: &dyn Fn() -> bool| {
            let end = Instant::now() + Duration::from_secs(20);
            while !done() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            done()
        };
        let served = std::thread::scope(|scope| {
            let synced = scope.spawn(|| file.sync_all().unwrap());
            let held = wait(&|| mount.fs.held_fsyncs() > 0);
            // A child that stood in the mount could not be killed if this failed.
            let asked = scope.spawn(|| fs::symlink_metadata(dir.join("no")).unwrap_err());
            let served = wait(&|| asked.is_finished()) && held && !synced.is_finished();
            mount.fs.hold_fsyncs(false);
            served
        });
        assert!(served, "round {round}");
    }
    mount.umount();
}

/// The worker that is alone runs on its client's CPU when nobody else does; that must not last
/// when somebody wants all there is of the CPUs.
#[test]
fn programs_that_only_compute_do_not_hold_up_requests() {
    let Some(mount) = mount_with_one_alone() else { return };
    // No name twice, since the kernel remembers those that are not there.
    let mut names = (0u32..).map(|n| mount.dir.join(format!("none {n}")));
    let mut look = || drop(fs::symlink_metadata(names.next().unwrap()).unwrap_err());
    for _ in 0..3 {
        (0..4000).for_each(|_| look());
        let over = AtomicBool::new(false);
        let cpus = std::thread::available_parallelism().unwrap().get();
        let mut longest = Duration::ZERO;
        std::thread::scope(|scope| {
            for _ in 0..2 * cpus {
                // WHY-RELAXED: seen at some time.
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let begin = Instant::now();
            for _ in (0..20_000).take_while(|_| begin.elapsed() < Duration::from_secs(5)) {
                let asked = Instant::now();
                look();
                longest = longest.max(asked.elapsed());
            }
            over.store(true, Ordering::Relaxed); // WHY-RELAXED: see above
        });
        assert!(longest < Duration::from_millis(500), "a request took {longest:?}");
    }
    mount.umount();
}
