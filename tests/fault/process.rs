//! The daemon dies, or its connection does, or its disk.
//!
//! A daemon that is killed has lost what it did not write; the page cache of the image stays. So
//! what is tested is that everything an fsync acknowledged was written by then, and in an order
//! from which the next mount recovers.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use uext_tests::mounts::{try_unmount, unmount};
use uext_tests::scratch::{Kind, Scratch, assert_clean};
use uext_tests::tree::Rng;
use uext_tests::{run, uext};

/// Longest wait for anything.
const LONG: Duration = Duration::from_secs(60);
/// Threads of a client.
const CLIENTS: u64 = 3;
/// Files of a thread.
const FILES: u64 = 4;
/// Longest file of a client.
const FILE_BYTES: u64 = 200_000;

/// The daemon of a mount, in the foreground.
struct Daemon {
    child: Child,
    dir: PathBuf,
    log: PathBuf,
}

impl Daemon {
    fn start(source: &Path, dir: &Path, log: &Path, options: &str) -> Self {
        let mut command = Command::new(uext());
        command.arg("mount").arg("-f").arg(source).arg(dir).arg("--log-file").arg(log);
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        let child = command.stdin(Stdio::null()).spawn().expect("start the daemon");
        let mut daemon = Self { child, dir: dir.to_owned(), log: log.to_owned() };
        let start = Instant::now();
        while !daemon.is_mounted() {
            let ended = daemon.child.try_wait().expect("look at the daemon");
            assert!(ended.is_none() && start.elapsed() < LONG, "no mount: {ended:?} {daemon}");
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }

    fn is_mounted(&self) -> bool {
        let table = fs::read_to_string("/proc/self/mounts").expect("read the mounts");
        let dir = self.dir.to_string_lossy();
        table.lines().any(|line| line.split(' ').nth(1) == Some(&dir))
    }

    /// The loop device under the mount, when there is one.
    fn source(&self) -> String {
        let table = fs::read_to_string("/proc/self/mounts").expect("read the mounts");
        let dir = self.dir.to_string_lossy();
        let line = table.lines().find(|line| line.split(' ').nth(1) == Some(&dir));
        line.and_then(|line| line.split(' ').next()).unwrap_or_default().to_owned()
    }

    /// SIGKILL; the dead mount stays, so that nobody writes to the directory below it.
    fn kill(&mut self) {
        self.child.kill().expect("kill the daemon");
        self.child.wait().expect("wait for the daemon");
    }

    /// Takes the mount of a dead daemon away.
    fn detach(self) {
        umount2(&self.dir, MntFlags::MNT_DETACH).expect("take the dead mount away");
    }

    /// Waits for the daemon's end.
    fn wait(mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("look at the daemon") {
                return status;
            }
            assert!(start.elapsed() < LONG, "the daemon does not end: {self}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl std::fmt::Display for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&fs::read_to_string(&self.log).unwrap_or_default())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("daemon's log:\n{self}");
        }
        if self.is_mounted() {
            let _ = umount2(&self.dir, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Nobody uses a loop device over the image any more; the last close may take a moment.
#[track_caller]
fn assert_no_loop(image: &Path) {
    let start = Instant::now();
    loop {
        let list = run(Command::new("losetup").arg("-j").arg(image));
        if list.trim().is_empty() {
            return;
        }
        assert!(start.elapsed() < LONG, "a loop device is left: {list}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A file of a client: each contents it had since the last acknowledged fsync.
struct Logged {
    name: String,
    versions: Vec<Vec<u8>>,
    /// The last calls, and how each ended.
    calls: VecDeque<String>,
}

/// How many calls of a file are remembered.
const CALLS: usize = 40;

impl Logged {
    fn note(&mut self, call: String) {
        self.calls.truncate(CALLS - 1);
        self.calls.push_front(call);
    }

    /// What is known of a byte that no version has: how far it goes on, and what was there.
    fn describe(&self, found: &[u8], at: usize) -> String {
        let wrong = |at: &usize| {
            let byte = found[*at];
            (byte != 0 || *at < self.versions[0].len())
                && !self.versions.iter().any(|v| v.get(*at).copied().unwrap_or(0) == byte)
        };
        let end = (at..found.len()).take_while(wrong).last().unwrap_or(at) + 1;
        let all = (0..found.len()).filter(wrong).count();
        let versions: Vec<String> = self
            .versions
            .iter()
            .map(|v| format!("{}:{:x?}", v.len(), v.get(at).copied().unwrap_or(0)))
            .collect();
        format!(
            "{}: bytes {at}..{end} of {} ({all} in all) are in no version; byte {at} is {:#x}; \
             versions since the last fsync, size and byte: {}\n{}",
            self.name,
            found.len(),
            found[at],
            versions.join(" "),
            self.calls.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
        )
    }

    /// Whether a file found after a kill is one that fsync and later writes allow.
    fn check(&self, dir: &Path) -> Result<(), String> {
        let floor = &self.versions[0];
        let found = match fs::read(dir.join(&self.name)) {
            Err(_) if floor.is_empty() => return Ok(()),
            found => found.map_err(|error| format!("{}: {error}", self.name))?,
        };
        let (least, most) = self
            .versions
            .iter()
            .fold((usize::MAX, 0), |(low, high), v| (low.min(v.len()), high.max(v.len())));
        if found.len() < least || found.len() > most {
            return Err(format!("{}: size {} not in {least}..={most}", self.name, found.len()));
        }
        for (at, byte) in found.iter().enumerate() {
            let beyond = *byte == 0 && at >= floor.len();
            if !beyond && !self.versions.iter().any(|v| v.get(at).copied().unwrap_or(0) == *byte) {
                return Err(self.describe(&found, at));
            }
        }
        Ok(())
    }
}

/// A thread that works like fsx and keeps a log of what it fsynced.
struct Client {
    rng: Rng,
    files: Vec<Logged>,
    fsyncs: u64,
}

impl Client {
    fn new(index: u64, seed: u64) -> Self {
        let name = |file| format!("client{index}-{file}");
        let files = (0..FILES).map(|file| Logged {
            name: name(file),
            versions: vec![Vec::new()],
            calls: VecDeque::new(),
        });
        Self { rng: Rng(seed ^ index << 40), files: files.collect(), fsyncs: 0 }
    }

    /// Works until the mount is gone.
    fn run(&mut self, dir: &Path, stop: &AtomicBool) {
        while !stop.load(Ordering::SeqCst) {
            let at = self.rng.below(FILES) as usize;
            if self.step(dir, at).is_err() && !stop.load(Ordering::SeqCst) {
                // The kill comes first, the word of it a moment later.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn step(&mut self, dir: &Path, at: usize) -> std::io::Result<()> {
        let mut call = String::new();
        let result = self.call(dir, at, &mut call);
        self.files[at].note(format!("{call}: {result:?}"));
        result
    }

    fn call(&mut self, dir: &Path, at: usize, call: &mut String) -> std::io::Result<()> {
        let what = self.rng.below(10);
        let offset = self.rng.below(FILE_BYTES) as usize;
        let len = 1 + self.rng.below(20_000) as usize;
        let data: Vec<u8> = self.rng.bytes(len).into_iter().map(|byte| byte.max(1)).collect();
        *call = match what {
            0..=5 => format!("write {offset}..{} of {:#x}...", offset + len, data[0]),
            6 => format!("truncate {offset}"),
            7 => "fdatasync".into(),
            _ => "fsync".into(),
        };
        let log = &mut self.files[at];
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join(&log.name))?;
        let mut next = log.versions.last().cloned().unwrap_or_default();
        match what {
            0..=5 => {
                next.resize(next.len().max(offset + len), 0);
                next[offset..offset + len].copy_from_slice(&data);
                // Before the call, which may be cut anywhere.
                log.versions.push(next);
                file.write_all_at(&data, offset as u64)
            }
            6 => {
                next.resize(offset, 0);
                log.versions.push(next);
                file.set_len(offset as u64)
            }
            _ => {
                if what == 7 {
                    file.sync_data()?
                } else {
                    file.sync_all()?
                }
                let last = log.versions.len() - 1;
                log.versions.drain(..last);
                self.fsyncs += 1;
                Ok(())
            }
        }
    }

    /// After a remount: what is there is what the log goes on from.
    fn resume(&mut self, dir: &Path) -> Result<(), String> {
        for log in &mut self.files {
            log.check(dir)?;
            let found = fs::read(dir.join(&log.name)).unwrap_or_default();
            log.note(format!("mounted again, size {}", found.len()));
            log.versions = vec![found];
        }
        Ok(())
    }
}

/// Kills the daemon under load, again and again.
/// `UEXT_KEEP=dir` keeps the images that the last three mounts met.
pub fn kills(kind: Kind, options: &str) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (count, seed) = (number("UEXT_KILLS").unwrap_or(5), number("UEXT_SEED").unwrap_or(1));
    println!("UEXT_SEED={seed} UEXT_KILLS={count}");
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", kind, 64 << 20, &[]);
    let (dir, log) = (scratch.mount_point("mnt"), scratch.path().join("log"));
    let mut rng = Rng(seed);
    let mut clients: Vec<Client> = (0..CLIENTS).map(|index| Client::new(index, seed)).collect();
    let begin = Instant::now();
    for kill in 1..=count {
        if let Some(keep) = std::env::var_os("UEXT_KEEP") {
            let keep =
                Path::new(&keep).join(format!("{}-{}-{}", kind.fs, kind.block_size, kill % 3));
            run(Command::new("cp").arg("--sparse=always").arg(&image).arg(keep));
        }
        let mut daemon = Daemon::start(&image, &dir, &log, options);
        for client in &mut clients {
            client
                .resume(&dir)
                .unwrap_or_else(|error| panic!("kill {kill} lost data: {error}\n{daemon}"));
        }
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for client in &mut clients {
                let (dir, stop) = (&dir, &stop);
                scope.spawn(move || client.run(dir, stop));
            }
            std::thread::sleep(Duration::from_millis(20 + rng.below(300)));
            daemon.kill();
            stop.store(true, Ordering::SeqCst);
        });
        daemon.detach();
        assert_no_loop(&image);
        if kill % 5 == 0 || kill == count {
            // The next mount replays the journal; what it leaves must be in order.
            let daemon = Daemon::start(&image, &dir, &log, options);
            unmount(Command::new(uext()).arg("umount").arg(&dir));
            assert!(daemon.wait().success());
            assert_clean(&image);
        }
    }
    let daemon = Daemon::start(&image, &dir, &log, options);
    for client in &mut clients {
        client.resume(&dir).unwrap_or_else(|error| panic!("the last kill lost data: {error}"));
    }
    unmount(Command::new(uext()).arg("umount").arg(&dir));
    assert!(daemon.wait().success());
    assert_clean(&image);
    assert_no_loop(&image);
    let fsyncs: u64 = clients.iter().map(|client| client.fsyncs).sum();
    let took = begin.elapsed().as_secs_f64();
    println!("{count} kills in {took:.1} s, {fsyncs} fsyncs acknowledged, nothing lost");
    assert!(fsyncs > 0, "the clients did nothing");
}

/// Where the kernel lists the FUSE connections; mounted by most systems.
struct Connections(bool);

impl Connections {
    const DIR: &str = "/sys/fs/fuse/connections";

    fn new() -> Self {
        let listed = fs::read_to_string("/proc/self/mounts").expect("read the mounts");
        let ours = !listed.contains(Self::DIR);
        if ours {
            let none: Option<&str> = None;
            mount(none, Self::DIR, Some("fusectl"), MsFlags::empty(), none).expect("mount fusectl");
        }
        Self(ours)
    }

    fn abort(&self, dir: &Path) {
        let device = fs::metadata(dir).expect("stat the mount").dev();
        // The kernel's own form of a device number.
        let number = u64::from(libc::major(device)) << 20 | u64::from(libc::minor(device));
        fs::write(format!("{}/{number}/abort", Self::DIR), "1").expect("abort the connection");
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        if self.0 {
            let _ = umount2(Self::DIR, MntFlags::empty());
        }
    }
}

/// The connection is aborted while a client writes: the daemon writes and commits what it has,
/// and says by its exit status that this was no unmount.
pub fn aborted_connection(kind: Kind) {
    let connections = Connections::new();
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", kind, 64 << 20, &[]);
    let (dir, log) = (scratch.mount_point("mnt"), scratch.path().join("log"));
    let daemon = Daemon::start(&image, &dir, &log, "");
    let mut client = Client::new(0, 3);
    // Written and not synced: the daemon has it, so the daemon must not lose it.
    fs::write(dir.join("kept"), vec![9; 300_000]).expect("write a file");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (running, dir, stop) = (&mut client, &dir, &stop);
        scope.spawn(move || running.run(dir, stop));
        std::thread::sleep(Duration::from_millis(150));
        connections.abort(dir);
        stop.store(true, Ordering::SeqCst);
    });
    let was_mounted = dir.clone();
    let status = daemon.wait();
    assert_eq!(status.code().map(|code| code != 0), Some(true), "{status}");
    assert_no_loop(&image);
    assert_clean(&image);
    let daemon = Daemon::start(&image, &was_mounted, &log, "");
    assert_eq!(fs::read(dir.join("kept")).expect("read a file"), vec![9; 300_000]);
    client.resume(&dir).unwrap_or_else(|error| panic!("lost: {error}"));
    unmount(Command::new(uext()).arg("umount").arg(&dir));
    assert!(daemon.wait().success());
    assert_clean(&image);
}

/// The daemon's memory is not swapped out, and no thread of it waits in the kernel for pages that
/// only it can write.
pub fn prepared_for_pressure(kind: Kind) {
    /// `PF_MEMALLOC_NOIO` of `linux/sched.h`, which `PR_SET_IO_FLUSHER` sets.
    const NO_IO: u64 = 0x0008_0000;
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", kind, 64 << 20, &[]);
    let (dir, log) = (scratch.mount_point("mnt"), scratch.path().join("log"));
    let daemon = Daemon::start(&image, &dir, &log, "");
    let proc = PathBuf::from(format!("/proc/{}", daemon.child.id()));
    let status = fs::read_to_string(proc.join("status")).expect("read the status");
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let locked = locked.and_then(|text| text.trim().split(' ').next()?.parse::<u64>().ok());
    assert!(locked.is_some_and(|kib| kib > 0), "nothing is locked: {locked:?}");
    // The kernel asks for CAP_SYS_RESOURCE, which a container's root may not have.
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    let may = capabilities.is_some_and(|set| set >> 24 & 1 == 1);
    if !may {
        let _ = writeln!(std::io::stderr(), "SKIPPED: PR_SET_IO_FLUSHER needs CAP_SYS_RESOURCE");
    }
    let threads = fs::read_dir(proc.join("task")).expect("list the threads");
    for task in threads.filter(|_| may) {
        let stat = task.expect("a thread").path().join("stat");
        let text = fs::read_to_string(stat).expect("read a thread's state");
        // The ninth field, counted from behind the name, which may hold anything.
        let (name, rest) = text.rsplit_once(')').expect("a name in brackets");
        let flags: u64 =
            rest.split_whitespace().nth(6).and_then(|f| f.parse().ok()).expect("flags");
        assert!(flags & NO_IO != 0, "{name}) is no I/O flusher: {flags:#x}");
    }
    unmount(Command::new(uext()).arg("umount").arg(&dir));
    assert!(daemon.wait().success());
}

/// umount(8) with much that is dirty: the image is clean when it returns.
pub fn dirty_unmount(kind: Kind, options: &str) {
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", kind, 128 << 20, &[]);
    let (dir, log) = (scratch.mount_point("mnt"), scratch.path().join("log"));
    let daemon = Daemon::start(&image, &dir, &log, options);
    let mut rng = Rng(5);
    let bytes: Vec<Vec<u8>> = (0..8).map(|_| rng.bytes(3 << 20)).collect();
    for (index, bytes) in bytes.iter().enumerate() {
        fs::write(dir.join(format!("file{index}")), bytes).expect("write a file");
    }
    unmount(Command::new("umount").arg(&dir));
    assert_clean(&image);
    assert!(daemon.wait().success());
    assert_no_loop(&image);
    let daemon = Daemon::start(&image, &dir, &log, "ro");
    for (index, bytes) in bytes.iter().enumerate() {
        let found = fs::read(dir.join(format!("file{index}"))).expect("read a file");
        assert!(found == *bytes, "file{index} differs");
    }
    unmount(Command::new(uext()).arg("umount").arg(&dir));
    assert!(daemon.wait().success());
}

/// A disk whose writes fail when its backing store is full: a sparse file on a small tmpfs, under
/// a loop device.
struct FullDisk {
    store: PathBuf,
    device: String,
}

impl FullDisk {
    fn new(scratch: &Scratch, kind: Kind) -> Self {
        let store = scratch.mount_point("store");
        let options = Some("size=24m");
        mount(Some("uext-fault"), &store, Some("tmpfs"), MsFlags::empty(), options)
            .expect("mount a tmpfs");
        let image = store.join("image");
        File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("make an image");
        let (block, fstype) = (kind.block_size.to_string(), kind.fs);
        let mut mkfs = Command::new("mke2fs");
        run(mkfs.args(["-q", "-F", "-t", fstype, "-b", &block, "-J", "size=4"]).arg(&image));
        let device = run(Command::new("losetup").args(["-f", "--show"]).arg(&image));
        Self { store, device: device.trim().to_owned() }
    }

    /// From now on blocks that were never written cannot be.
    fn fill(&self) {
        let ballast = File::create(self.store.join("ballast")).expect("make a file");
        let chunk = vec![1; 64 << 10];
        let mut at = 0;
        while ballast.write_all_at(&chunk, at).is_ok() {
            at += chunk.len() as u64;
        }
    }

    fn is_clean(&self) -> bool {
        let text = run(Command::new("dumpe2fs").arg("-h").arg(&self.device));
        let state = text.lines().find(|line| line.starts_with("Filesystem state"));
        let replay = text.contains("needs_recovery");
        state.is_some_and(|line| line.trim_end().ends_with(" clean")) && !replay
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
        let _ = umount2(&self.store, MntFlags::MNT_DETACH);
    }
}

/// The disk fails under the unmount: it is logged, told by the exit status of who unmounts and of
/// the daemon, and the image is not marked clean.
pub fn eio_at_unmount(kind: Kind) {
    let scratch = Scratch::new();
    let disk = FullDisk::new(&scratch, kind);
    let (dir, log) = (scratch.mount_point("mnt"), scratch.path().join("log"));
    let daemon = Daemon::start(Path::new(&disk.device), &dir, &log, "commit=600");
    assert_eq!(daemon.source(), disk.device);
    fs::write(dir.join("before"), vec![1; 100_000]).expect("write a file");
    File::open(dir.join("before")).and_then(|file| file.sync_all()).expect("fsync");
    disk.fill();
    // Into the cache, small as they are, unless something has met the full disk before.
    let lost = File::create(dir.join("lost"));
    let written = lost.and_then(|mut file| {
        vec![2; 3_000_000].chunks(50_000).try_for_each(|small| file.write_all(small))
    });
    if let Err(error) = written {
        assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
    }
    let unmounted = try_unmount(Command::new(uext()).arg("umount").arg(&dir));
    assert!(!unmounted.status.success(), "the unmount says that all is well");
    let status = daemon.wait();
    assert_eq!(status.code().map(|code| code != 0), Some(true), "{status}");
    let said = fs::read_to_string(&log).expect("read the log");
    assert!(said.contains("ERROR") || said.contains("error"), "the log says nothing:\n{said}");
    assert!(!disk.is_clean(), "the image is marked clean");
    fs::remove_file(disk.store.join("ballast")).expect("make room");
    run(Command::new("bash").arg("-c").arg(format!("e2fsck -fy {} || [ $? -le 1 ]", disk.device)));
    let daemon = Daemon::start(Path::new(&disk.device), &dir, &log, "");
    let found = fs::read(dir.join("before")).expect("read a file");
    assert!(found == vec![1; 100_000], "an fsynced file is damaged");
    unmount(Command::new(uext()).arg("umount").arg(&dir));
    assert!(daemon.wait().success());
}

/// Large writes go to the disk at once, and whoever writes does not wait for it. When it fails
/// them, the next fsync says so, the file still has what was written, and once the disk is well
/// another fsync brings it there.
pub fn eio_of_large_writes(kind: Kind) {
    let scratch = Scratch::new();
    let disk = FullDisk::new(&scratch, kind);
    let (dir, log) = (scratch.mount_point("mnt"), scratch.path().join("log"));
    // What fails and is tried again is data; the journal's own blocks are written before.
    let daemon = Daemon::start(Path::new(&disk.device), &dir, &log, "commit=600");
    let file = File::create(dir.join("large")).expect("make a file");
    let data = Rng(7).bytes(3 << 20);
    file.sync_all().expect("fsync");
    disk.fill();
    file.write_all_at(&data, 0).expect("write");
    let told = file.sync_data().expect_err("an fsync of what the disk refused");
    // Which of the two a loop device says is up to its kernel.
    assert!(matches!(told.raw_os_error(), Some(libc::EIO | libc::ENOSPC)), "{told}");
    assert_eq!(file.metadata().expect("stat").len(), data.len() as u64);
    fs::remove_file(disk.store.join("ballast")).expect("make room");
    file.sync_all().expect("fsync of a disk that is well");
    drop(file);
    unmount(Command::new(uext()).arg("umount").arg(&dir));
    assert!(daemon.wait().success());
    run(Command::new("e2fsck").arg("-fn").arg(&disk.device));
    let daemon = Daemon::start(Path::new(&disk.device), &dir, &log, "ro");
    assert!(fs::read(dir.join("large")).expect("read a file") == data, "the file differs");
    unmount(Command::new(uext()).arg("umount").arg(&dir));
    assert!(daemon.wait().success());
}
