//! What a thread does to its files, with what the table must say before and after.
//!
//! Invariants, all of them about the order of a system call and the table:
//! - before a write: `reach` and `begin`; after it: `confirm`, and `set_length`;
//! - before a name changes: `begin`; after: `confirm`;
//! - before anything that may take a block away (delete, truncate): `forget`;
//! - after a sync has returned, and only then: `promise` what was confirmed before it.
//!
//! Locks: the mutexes of a transfer's pieces are held during it, so what is read is exactly
//! the version that the table has.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::fs::{AtFlags, Mode, OFlags};
use uext_blockdev::aligned::AlignedBuf;
use uext_blockdev::nbd::Connection;
use uext_drive_sys::{Direction, Piece};

use super::block::{BlockId, describe, is_right};
use super::control::{Control, Number, pieces};
use super::ledger::Ledger;
use super::message::{Failure, Finding, Message};
use super::plan::{DIRECTORY, Plan, STAGING, Target, dir_name, file_id, file_name};
use super::raw;
use super::stats::{Op, Shard};
use super::ways::{Ways, is_durable, open_flags};
use super::workload::{Sync, Way};

/// Open files that a thread keeps.
const KEPT: usize = 32;
/// Writes whose sync is still to come that a thread remembers.
const REMEMBERED: usize = 1 << 16;

/// What all threads of a client share.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// What is done.
    pub plan: &'a Plan,
    /// Where all meet.
    pub control: &'a Control,
    /// What is known.
    pub ledger: &'a Ledger,
    /// Where messages go.
    pub report: &'a (dyn Fn(&Message) + std::marker::Sync),
    /// Which client this is.
    pub client: usize,
}

/// Where a thread's files lie.
enum Home {
    /// In a client's directories, of the run's.
    Tree { root: OwnedFd, dirs: Vec<OwnedFd> },
    /// At their places of a file or device, which each opens.
    Device,
    /// At their places of an export, by the thread's own connection.
    Export(Box<Connection>),
}

/// An open file, or its place in an export.
pub enum Handle {
    /// A file or device.
    File(OwnedFd),
    /// Needs nothing: the connection is the thread's.
    Export,
}

impl Handle {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::File(file) => file.as_fd(),
            Self::Export => unreachable!("no step that needs a file comes to an export"),
        }
    }
}

/// A thread's files.
pub struct Files<'a> {
    /// Shared by the client's threads.
    pub context: Context<'a>,
    /// The thread, of all clients'.
    pub worker: usize,
    /// Where it counts.
    pub shard: Shard<'a>,
    home: Home,
    ways: Ways,
    buffer: AlignedBuf,
    kept: HashMap<usize, Handle>,
    /// Written and not yet synced: slot, block, version.
    dirty: Vec<(usize, usize, u32)>,
    /// States not yet synced, and the directories they changed.
    names: Vec<(usize, u64, [usize; 2])>,
}

/// A failure, when it ends the thread.
pub type Outcome<T = ()> = Result<T, Failure>;

impl<'a> Files<'a> {
    /// The thread's; makes the client's directories, which its other threads may have made.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn new(context: Context<'a>, worker: usize) -> Outcome<Self> {
        let plan = context.plan;
        // Checked: at most 64 MiB, and 1024 pieces.
        let len = (plan.workload.io as usize * plan.workload.depth).max(plan.block());
        let shard = Shard::new(context.control.counts(), worker);
        let home = match &plan.target {
            Target::Directory(path) => open_dirs(plan, path, context.client)?,
            Target::Device(..) => Home::Device,
            Target::Nbd(address, _) => Home::Export(Box::new(connect(address)?)),
        };
        let mut ways = Ways::new(plan.workload.depth);
        let copies = |way: &Way| matches!(way, Way::Copy | Way::Sendfile);
        if let Home::Tree { dirs, .. } = &home
            && plan.workload.ways.iter().any(copies)
        {
            let name = format!("{STAGING}.{worker}");
            let made = ways.make_staging(&dirs[0], &name);
            failed_io(made, "create", || name)?;
        }
        let (kept, dirty, names) = (HashMap::new(), Vec::new(), Vec::new());
        let buffer = AlignedBuf::new(len);
        Ok(Self { context, worker, shard, home, ways, buffer, kept, dirty, names })
    }

    fn plan(&self) -> &'a Plan {
        self.context.plan
    }

    fn ledger(&self) -> &'a Ledger {
        self.context.ledger
    }

    /// A slot's way.
    pub fn way(&self, slot: usize) -> Way {
        let ways = &self.plan().workload.ways;
        ways[slot % ways.len()]
    }

    /// Whether a slot has a file.
    pub fn is_present(&self, slot: usize) -> bool {
        let entry = self.ledger().slot(slot);
        entry.is_present(entry.done())
    }

    /// How long a slot's file is, blocks.
    pub fn length(&self, slot: usize) -> usize {
        self.ledger().slot(slot).length()
    }

    /// A state's name, and the directory that has it.
    fn place(&self, slot: usize, state: u64) -> (BorrowedFd<'_>, String) {
        let (owner, dir) = (self.plan().client_of(slot), self.plan().dir_of(slot, state));
        let name = file_name(slot, state);
        if owner == self.context.client {
            (self.dir(dir), name)
        } else {
            let Home::Tree { root, .. } = &self.home else { unreachable!("names are in a tree") };
            (root.as_fd(), format!("{}/{name}", dir_name(owner, dir)))
        }
    }

    /// A directory of the client's, by number.
    fn dir(&self, number: usize) -> BorrowedFd<'_> {
        let Home::Tree { dirs, .. } = &self.home else { unreachable!("names are in a tree") };
        dirs[number].as_fd()
    }

    /// A state's path, for people.
    pub fn path(&self, slot: usize, state: u64) -> String {
        path(self.plan(), slot, state)
    }

    fn now(&self, slot: usize) -> u64 {
        self.ledger().slot(slot).done()
    }

    /// Runs a system call that counts as an operation.
    fn call<T>(
        &self,
        op: Op,
        (slot, state): (usize, u64),
        call: impl FnOnce() -> rustix::io::Result<T>,
    ) -> Outcome<T> {
        let start = Instant::now();
        let result = call();
        self.shard.count(op, start.elapsed(), 0);
        failed(result, op.name(), || self.path(slot, state))
    }

    /// Says that the data is not what it must be.
    pub fn find(&self, slot: usize, kind: &str, text: String) {
        self.context.control.add(Number::Findings, 1);
        let path = self.path(slot, self.now(slot));
        (self.context.report)(&Message::Finding(Finding { kind: kind.into(), path, text }));
    }

    fn open_flags(&self, way: Way) -> OFlags {
        let sync = self.plan().workload.sync == Sync::Dsync;
        let sync = if sync { OFlags::DSYNC } else { OFlags::empty() };
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | open_flags(way) | sync
    }

    /// Opens a slot's file.
    ///
    /// # Errors
    /// The filesystem's; that it is not there is a finding too.
    pub fn open(&self, slot: usize) -> Outcome<Handle> {
        match &self.plan().target {
            Target::Directory(_) => {}
            Target::Device(path, _) => {
                let flags = self.open_flags(self.way(slot));
                let device = rustix::fs::open(path, flags, Mode::empty());
                return failed(device, "open", || path.display().to_string()).map(Handle::File);
            }
            Target::Nbd(..) => return Ok(Handle::Export),
        }
        let state = self.now(slot);
        let (dir, name) = self.place(slot, state);
        let flags = self.open_flags(self.way(slot));
        let opened = self
            .call(Op::Open, (slot, state), || rustix::fs::openat(dir, &name, flags, Mode::empty()));
        if let Err(Failure { errno: libc::ENOENT, .. }) = &opened {
            self.find(slot, "lost file", "it was made, and is not there".into());
        }
        opened.map(Handle::File)
    }

    /// As [`Files::open`], but kept open for next time.
    ///
    /// # Errors
    /// As there.
    pub fn keep_open(&mut self, slot: usize) -> Outcome<Handle> {
        let file = match self.kept.remove(&slot) {
            Some(file) => file,
            None => self.open(slot)?,
        };
        if self.kept.len() >= KEPT {
            self.kept.clear();
        }
        Ok(file)
    }

    /// Gives an open file back.
    pub fn keep(&mut self, slot: usize, file: Handle) {
        self.kept.insert(slot, file);
    }

    /// Makes a slot's file, of some blocks.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn create(&mut self, slot: usize, blocks: usize, sync: bool) -> Outcome {
        if !self.plan().is_directory() {
            self.ledger().slot(slot).begin_file();
            self.ledger().slot(slot).confirm();
            let file = self.open(slot)?;
            self.write_all(slot, &file, 0..blocks)?;
            return if sync { self.sync(slot, &file) } else { Ok(()) };
        }
        let entry = self.ledger().slot(slot);
        for block in 0..entry.longest() {
            self.ledger().block(slot, block).begin_file();
        }
        let state = entry.begin_file();
        let flags = self.open_flags(self.way(slot)) | OFlags::CREATE | OFlags::EXCL;
        let file = {
            let (dir, name) = self.place(slot, state);
            self.call(Op::Create, (slot, state), || {
                rustix::fs::openat(dir, &name, flags, Mode::from_raw_mode(0o644))
            })
            .map(Handle::File)?
        };
        entry.confirm();
        entry.set_length(0);
        self.remember_name(slot, state, state);
        self.write_all(slot, &file, 0..blocks)?;
        if sync { self.sync(slot, &file) } else { Ok(()) }
    }

    /// Writes blocks in pieces of `io`, one after the other.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn write_all(&mut self, slot: usize, file: &Handle, blocks: Range<usize>) -> Outcome {
        for range in self.in_pieces(blocks) {
            self.transfer(Direction::Write, slot, file, &[range])?;
        }
        Ok(())
    }

    /// Reads and verifies blocks in pieces of `io`, one after the other.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn read_all(&mut self, slot: usize, file: &Handle, blocks: Range<usize>) -> Outcome {
        for range in self.in_pieces(blocks) {
            self.transfer(Direction::Read, slot, file, &[range])?;
        }
        Ok(())
    }

    /// Blocks of one read or write.
    pub fn per_piece(&self) -> usize {
        // Checked: at most 64 MiB.
        (self.plan().workload.io / self.plan().workload.block) as usize
    }

    /// A range as pieces, at multiples of their length.
    fn in_pieces(&self, blocks: Range<usize>) -> Vec<Range<usize>> {
        let per = self.per_piece();
        pieces(blocks.clone(), per)
            .map(|piece| (piece * per).max(blocks.start)..((piece + 1) * per).min(blocks.end))
            .collect()
    }

    /// Writes, or reads and verifies, some ranges of blocks at once. Each is within one
    /// piece, and no two are of the same.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn transfer(
        &mut self,
        direction: Direction,
        slot: usize,
        file: &Handle,
        ranges: &[Range<usize>],
    ) -> Outcome {
        let (plan, ledger, control) = (self.plan(), self.ledger(), self.context.control);
        let (block, per) = (plan.block(), self.per_piece());
        let base = if plan.is_directory() { 0 } else { plan.device_offset(slot) };
        let entry = ledger.slot(slot);
        let file_id = file_id(slot, entry.birth());
        let id = |at: usize| BlockId { run: plan.run, file: file_id, offset: (at * block) as u64 };
        let held = control.lock(slot, ranges.iter().map(|range| range.start / per));
        let mut memory = &mut self.buffer[..];
        let mut list: Vec<Piece<'_>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            let (piece, rest) = memory.split_at_mut(range.len() * block);
            memory = rest;
            if direction == Direction::Write {
                entry.reach(range.end);
                for (at, block) in range.clone().zip(piece.chunks_exact_mut(block)) {
                    id(at).stamp(ledger.block(slot, at).begin(), block);
                }
            }
            list.push(Piece { offset: base + (range.start * block) as u64, memory: piece });
        }
        let way = plan.workload.ways[slot % plan.workload.ways.len()];
        let durable = is_durable(way) || plan.workload.sync == Sync::Dsync;
        let result = match &mut self.home {
            Home::Export(connection) => {
                raw::transfer(connection, direction, durable, &mut list, self.shard)
            }
            _ => self.ways.transfer(way, direction, file.fd(), &mut list, self.shard),
        };
        match (direction, result) {
            (Direction::Write, Ok(())) => {
                let mut end = 0;
                for at in ranges.iter().cloned().flatten() {
                    let known = ledger.block(slot, at);
                    let version = known.issued();
                    known.confirm(version);
                    if durable {
                        known.promise(version);
                    } else if plan.workload.sync != Sync::None {
                        self.dirty.push((slot, at, version));
                    }
                    end = end.max(at + 1);
                }
                if self.dirty.len() > REMEMBERED {
                    self.dirty.clear();
                }
                if end > entry.length() {
                    entry.set_length(end);
                }
                drop(held);
                Ok(())
            }
            (Direction::Read, Ok(())) => {
                let mut wrong = Vec::new();
                for (range, piece) in ranges.iter().zip(&list) {
                    for (at, contents) in range.clone().zip(piece.memory.chunks_exact(block)) {
                        let known = ledger.block(slot, at);
                        // Who began it was killed: whatever is there, nobody was told.
                        let undecided = known.issued() != known.done();
                        let found = id(at).check(contents);
                        if !undecided && !is_right(&found, known.done()) {
                            wrong.push((at, known.done(), found, id(at).sectors(contents)));
                        }
                    }
                }
                drop(held);
                let count = ranges.iter().map(Range::len).sum::<usize>();
                control.add(Number::Verified, count as u64);
                for (at, expected, found, sectors) in wrong {
                    let (kind, text) = describe(at, expected, &found, &sectors);
                    self.find(slot, kind, text);
                }
                Ok(())
            }
            (Direction::Read, Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                drop(held);
                let end = ranges.iter().map(|range| range.end).max().unwrap_or(0);
                self.find(slot, "short file", format!("it ends before block {end}"));
                Ok(())
            }
            (direction, Err(error)) => {
                let what = if direction == Direction::Read { "read" } else { "write" };
                let what = format!("{what} ({way:?})").to_lowercase();
                failed_io(Err(error), &what, || self.path(slot, entry.done()))
            }
        }
    }

    /// Makes what was written to a file safe, as the workload has it.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn sync(&mut self, slot: usize, file: &Handle) -> Outcome {
        let entry = self.ledger().slot(slot);
        let state = entry.done();
        let sync = self.plan().workload.sync;
        let op = match sync {
            Sync::None | Sync::Dsync => return Ok(()),
            Sync::Fsync => Op::Fsync,
            Sync::Fdatasync => Op::Fdatasync,
        };
        let start = Instant::now();
        let result = match (&mut self.home, sync) {
            (Home::Export(connection), _) => connection.flush(),
            (_, Sync::Fsync) => rustix::fs::fsync(file.fd()).map_err(Into::into),
            _ => rustix::fs::fdatasync(file.fd()).map_err(Into::into),
        };
        self.shard.count(op, start.elapsed(), 0);
        failed_io(result, op.name(), || self.path(slot, state))?;
        if sync == Sync::Fsync {
            entry.promise(state);
            self.names.retain(|(other, ..)| *other != slot);
        }
        let ledger = self.ledger();
        self.dirty.retain(|&(other, block, version)| {
            if other == slot {
                ledger.block(slot, block).promise(version);
            }
            other != slot
        });
        Ok(())
    }

    fn remember_name(&mut self, slot: usize, old: u64, new: u64) {
        let dirs = [self.plan().dir_of(slot, old), self.plan().dir_of(slot, new)];
        if self.names.len() < REMEMBERED {
            self.names.push((slot, new, dirs));
        }
    }

    /// Deletes a slot's file.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn delete(&mut self, slot: usize) -> Outcome {
        let entry = self.ledger().slot(slot);
        let old = entry.done();
        self.kept.remove(&slot);
        self.dirty.retain(|(other, ..)| *other != slot);
        for block in 0..entry.length() {
            self.ledger().block(slot, block).forget();
        }
        let state = entry.begin(false);
        let (dir, name) = self.place(slot, old);
        self.call(Op::Unlink, (slot, old), || rustix::fs::unlinkat(dir, &name, AtFlags::empty()))?;
        entry.confirm();
        entry.set_length(0);
        self.remember_name(slot, old, state);
        Ok(())
    }

    /// Gives a slot's file its next name.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn rename(&mut self, slot: usize) -> Outcome {
        let entry = self.ledger().slot(slot);
        let old = entry.done();
        let state = entry.begin(true);
        {
            let ((from, name), (to, new)) = (self.place(slot, old), self.place(slot, state));
            self.call(Op::Rename, (slot, old), || rustix::fs::renameat(from, &name, to, &new))?;
        }
        entry.confirm();
        self.remember_name(slot, old, state);
        Ok(())
    }

    /// Cuts a slot's file.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn truncate(&mut self, slot: usize, blocks: usize) -> Outcome {
        let entry = self.ledger().slot(slot);
        self.dirty.retain(|(other, block, _)| *other != slot || *block < blocks);
        for block in blocks..entry.length() {
            self.ledger().block(slot, block).forget();
        }
        entry.set_length(blocks);
        let file = self.open(slot)?;
        let bytes = (blocks * self.plan().block()) as u64;
        let state = entry.done();
        self.call(Op::Truncate, (slot, state), || rustix::fs::ftruncate(file.fd(), bytes))?;
        self.stat(slot)
    }

    /// Has the directories written to the disk that this thread has changed.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn sync_dirs(&mut self) -> Outcome {
        let mut dirs: Vec<usize> = self.names.iter().flat_map(|(_, _, dirs)| *dirs).collect();
        dirs.sort_unstable();
        dirs.dedup();
        for dir in dirs {
            let start = Instant::now();
            let result = rustix::fs::fsync(self.dir(dir));
            self.shard.count(Op::Dirsync, start.elapsed(), 0);
            failed(result, "fsync", || dir_name(self.context.client, dir))?;
        }
        for (slot, state, _) in std::mem::take(&mut self.names) {
            self.ledger().slot(slot).promise(state);
        }
        Ok(())
    }

    /// Looks at a slot's file: it must be a file of its length.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn stat(&mut self, slot: usize) -> Outcome {
        let stat = self.look(slot)?;
        let bytes = (self.length(slot) * self.plan().block()) as u64;
        if u64::try_from(stat.st_size) != Ok(bytes) || stat.st_nlink != 1 {
            let (size, links) = (stat.st_size, stat.st_nlink);
            self.find(slot, "wrong attributes", format!("{size} bytes for {bytes}, {links} links"));
        }
        Ok(())
    }

    fn look(&self, slot: usize) -> Outcome<rustix::fs::Stat> {
        let state = self.now(slot);
        let (dir, name) = self.place(slot, state);
        let stat = self.call(Op::Stat, (slot, state), || {
            rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)
        });
        if let Err(Failure { errno: libc::ENOENT, .. }) = &stat {
            self.find(slot, "lost file", "it was made, and is not there".into());
        }
        stat
    }

    /// Makes a second name for a file, sees that it counts, and takes it away.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn link(&mut self, slot: usize) -> Outcome {
        let state = self.now(slot);
        let (dir, name) = self.place(slot, state);
        let second = format!("l{slot:x}.{}", self.worker);
        self.call(Op::Link, (slot, state), || {
            rustix::fs::linkat(dir, &name, dir, &second, AtFlags::empty())
        })?;
        let links = self.look(slot)?.st_nlink;
        self.call(Op::Unlink, (slot, state), || {
            rustix::fs::unlinkat(dir, &second, AtFlags::empty())
        })?;
        if links != 2 {
            self.find(slot, "wrong attributes", format!("{links} links for 2"));
        }
        Ok(())
    }

    /// Makes a symbolic link to a file, reads it, and takes it away.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn symlink(&mut self, slot: usize) -> Outcome {
        let state = self.now(slot);
        let (dir, name) = self.place(slot, state);
        let link = format!("s{slot:x}.{}", self.worker);
        self.call(Op::Symlink, (slot, state), || rustix::fs::symlinkat(&name, dir, &link))?;
        let read = rustix::fs::readlinkat(dir, &link, Vec::new());
        let read = failed(read, "readlink", || link.clone())?;
        self.call(Op::Unlink, (slot, state), || {
            rustix::fs::unlinkat(dir, &link, AtFlags::empty())
        })?;
        if read.as_bytes() != name.as_bytes() {
            self.find(slot, "wrong link", format!("{read:?} for {name:?}"));
        }
        Ok(())
    }

    /// Makes a directory, and takes it away.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn make_dir(&mut self, slot: usize) -> Outcome {
        let state = self.now(slot);
        let dir = self.dir(self.plan().dir_of(slot, state));
        let name = format!("m{slot:x}.{}", self.worker);
        let mode = Mode::from_raw_mode(0o755);
        self.call(Op::Mkdir, (slot, state), || rustix::fs::mkdirat(dir, &name, mode))?;
        self.call(Op::Rmdir, (slot, state), || rustix::fs::unlinkat(dir, &name, AtFlags::REMOVEDIR))
    }

    /// Lists the directory of a slot's file: the thread's own files must be in it, each
    /// once, and none that is elsewhere.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn list(&mut self, slot: usize) -> Outcome {
        let state = self.now(slot);
        let number = self.plan().dir_of(slot, state);
        let dir = self.dir(number);
        let start = Instant::now();
        let names = list_names(dir);
        self.shard.count(Op::List, start.elapsed(), 0);
        let names = failed(names, "list", || dir_name(self.context.client, number))?;
        if self.plan().workload.share > 1 {
            return Ok(());
        }
        let mut listed: HashMap<&str, usize> = HashMap::new();
        for name in &names {
            *listed.entry(name).or_default() += 1;
        }
        for slot in self.plan().slots_of(self.worker) {
            let state = self.now(slot);
            let here = self.is_present(slot) && self.plan().dir_of(slot, state) == number;
            let times = listed.get(file_name(slot, state).as_str()).copied().unwrap_or(0);
            if times != usize::from(here) {
                self.find(slot, "wrong listing", format!("it is listed {times} times"));
            }
        }
        Ok(())
    }

    /// Changes a file's mode and times, and looks.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn setattr(&mut self, slot: usize, random: u64) -> Outcome {
        let state = self.now(slot);
        // Nine bits.
        let bits = (random & 0o77) as u32 | 0o600;
        // Some second before 2038, which any filesystem can say.
        let seconds = (random >> 8 & 0x3fff_ffff).cast_signed();
        {
            let (dir, name) = self.place(slot, state);
            self.call(Op::Setattr, (slot, state), || {
                rustix::fs::chmodat(dir, &name, Mode::from_raw_mode(bits), AtFlags::empty())
            })?;
            let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: 0 };
            let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
            self.call(Op::Setattr, (slot, state), || {
                rustix::fs::utimensat(dir, &name, &times, AtFlags::empty())
            })?;
        }
        let stat = self.look(slot)?;
        if stat.st_mode & 0o7777 != bits || stat.st_mtime != seconds {
            let text = format!(
                "mode {:o} for {bits:o}, mtime {} for {seconds}",
                stat.st_mode, stat.st_mtime
            );
            self.find(slot, "wrong attributes", text);
        }
        Ok(())
    }

    /// Sets an extended attribute, and reads it. A filesystem without is left in peace.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn set_xattr(&mut self, slot: usize, random: u64) -> Outcome {
        let state = self.now(slot);
        let file = self.open(slot)?;
        let name = "user.uext-drive";
        let value = random.to_le_bytes();
        let start = Instant::now();
        let flags = rustix::fs::XattrFlags::empty();
        let set = rustix::fs::fsetxattr(file.fd(), name, &value, flags);
        if set == Err(rustix::io::Errno::OPNOTSUPP) {
            return Ok(());
        }
        self.shard.count(Op::Xattr, start.elapsed(), 0);
        failed(set, "setxattr", || self.path(slot, state))?;
        let mut read = [0; 16];
        let len = rustix::fs::fgetxattr(file.fd(), name, &mut read[..]);
        let len = failed(len, "getxattr", || self.path(slot, state))?;
        if read[..len] != value {
            self.find(slot, "wrong attributes", format!("{:?} for {value:?}", &read[..len]));
        }
        Ok(())
    }
}

fn open_dirs(plan: &Plan, target: &std::path::Path, client: usize) -> Outcome<Home> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let path = target.join(DIRECTORY);
    let root = rustix::fs::open(&path, flags, Mode::empty());
    let root = failed(root, "open", || path.display().to_string())?;
    let mut dirs = Vec::new();
    for dir in 0..plan.workload.dirs {
        let name = dir_name(client, dir);
        let parent = name.split('/').next().unwrap_or_default();
        for name in [parent, &name] {
            match rustix::fs::mkdirat(&root, name, Mode::from_raw_mode(0o755)) {
                Err(rustix::io::Errno::EXIST) => {}
                result => failed(result, "mkdir", || path.join(name).display().to_string())?,
            }
        }
        let opened = rustix::fs::openat(&root, &name, flags, Mode::empty());
        dirs.push(failed(opened, "open", || path.join(&name).display().to_string())?);
    }
    Ok(Home::Tree { root, dirs })
}

fn connect(address: &str) -> Outcome<Connection> {
    raw::connect(address).map_err(|text| {
        let (path, what) = (address.to_owned(), "connect".to_owned());
        Failure { errno: libc::ECONNREFUSED, what, path, text }
    })
}

fn list_names(dir: BorrowedFd<'_>) -> rustix::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// A state's path, for people.
pub fn path(plan: &Plan, slot: usize, state: u64) -> String {
    match &plan.target {
        Target::Directory(target) => {
            let dir = dir_name(plan.client_of(slot), plan.dir_of(slot, state));
            target.join(DIRECTORY).join(dir).join(file_name(slot, state)).display().to_string()
        }
        Target::Device(path, _) => format!("{} slot {slot}", path.display()),
        Target::Nbd(address, _) => format!("{address} slot {slot}"),
    }
}

/// An error with what was tried.
fn failed<T>(
    result: rustix::io::Result<T>,
    what: &str,
    path: impl FnOnce() -> String,
) -> Outcome<T> {
    result.map_err(|error| {
        let errno = error.raw_os_error();
        Failure { errno, what: what.into(), path: path(), text: error.to_string() }
    })
}

fn failed_io<T>(result: io::Result<T>, what: &str, path: impl FnOnce() -> String) -> Outcome<T> {
    result.map_err(|error| {
        let errno = error.raw_os_error().unwrap_or(0);
        Failure { errno, what: what.into(), path: path(), text: error.to_string() }
    })
}
