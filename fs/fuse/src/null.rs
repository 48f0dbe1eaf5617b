//! A filesystem in memory: no disk, no journal, no checks of its own.
//!
//! It measures the transport alone and is what the transport's tests mount. It does
//! what POSIX asks of names, links, data with holes and extended attributes; it
//! leaves permissions to `default_permissions`.
//!
//! Locks: one, over everything; apart from it that of the gate for fsyncs.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, Ordering};

use uext_sync::{Condvar, Mutex, RwLock};
use uext_vfs::{
    Attr, Capabilities, Context, DirEntry, DirSink, Entry, Errno, FileHandle, FileKind, FileSystem,
    Ino, OpenReply, ReadReply, ReadSegment, RenameFlags, Result, SetAttr, SetTime, StatFs,
    Timestamp, Write, WriteFlags, XattrFlags,
};

/// Bytes of a page of data.
const PAGE: u64 = 4096;
/// The root's number: not the kernel's, so that the exchange of the two is exercised.
const ROOT: Ino = 2;

type Page = Box<[u8; PAGE as usize]>;

enum Content {
    File(BTreeMap<u64, Page>),
    Directory(Directory),
    Symlink(Vec<u8>),
    Special,
}

struct Directory {
    parent: Ino,
    names: HashMap<Vec<u8>, (u64, Ino)>,
    /// Names in the order of their making; the key is the offset before the entry.
    order: BTreeMap<u64, Vec<u8>>,
    next: u64,
}

impl Directory {
    fn new(parent: Ino) -> Self {
        // Offsets 0 to 2 are before "." , before ".." and after both.
        Self { parent, names: HashMap::new(), order: BTreeMap::new(), next: 2 }
    }

    fn insert(&mut self, name: &[u8], ino: Ino) {
        self.names.insert(name.to_vec(), (self.next, ino));
        self.order.insert(self.next, name.to_vec());
        self.next += 1;
    }

    fn remove(&mut self, name: &[u8]) {
        if let Some((at, _)) = self.names.remove(name) {
            self.order.remove(&at);
        }
    }
}

struct Node {
    attr: Attr,
    content: Content,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    lookups: u64,
}

impl Node {
    fn directory(&self) -> Result<&Directory> {
        match &self.content {
            Content::Directory(directory) => Ok(directory),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn directory_mut(&mut self) -> Result<&mut Directory> {
        match &mut self.content {
            Content::Directory(directory) => Ok(directory),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn pages_mut(&mut self) -> Result<&mut BTreeMap<u64, Page>> {
        match &mut self.content {
            Content::File(pages) => Ok(pages),
            Content::Directory(_) => Err(Errno::EISDIR),
            _ => Err(Errno::EINVAL),
        }
    }

    fn touch(&mut self) {
        let now = Timestamp::now();
        self.attr.mtime = now;
        self.attr.ctime = now;
    }

    /// Drops whole pages of the range and zeroes the rest of it.
    fn punch(&mut self, from: u64, to: u64) -> Result<()> {
        let pages = self.pages_mut()?;
        let inside: Vec<u64> = pages.range(from / PAGE..to.div_ceil(PAGE)).map(|p| *p.0).collect();
        for index in inside {
            let start = from.max(index * PAGE) - index * PAGE;
            let end = to.min((index + 1) * PAGE) - index * PAGE;
            if start == 0 && end == PAGE {
                pages.remove(&index);
            } else if let Some(page) = pages.get_mut(&index) {
                page[start as usize..end as usize].fill(0);
            }
        }
        self.attr.blocks = self.pages_mut()?.len() as u64 * (PAGE / 512);
        Ok(())
    }

    fn set_size(&mut self, size: u64) -> Result<()> {
        check_size(size)?;
        if size < self.attr.size {
            let end = self.attr.size.next_multiple_of(PAGE);
            self.punch(size, end)?;
        }
        self.attr.size = size;
        self.touch();
        Ok(())
    }
}

/// Offsets are signed in the system calls.
fn check_size(size: u64) -> Result<()> {
    i64::try_from(size).map(drop).map_err(|_| Errno::EFBIG)
}

struct State {
    nodes: HashMap<Ino, Node>,
    next: Ino,
}

impl State {
    fn node(&self, ino: Ino) -> Result<&Node> {
        self.nodes.get(&ino).ok_or(Errno::ESTALE)
    }

    fn node_mut(&mut self, ino: Ino) -> Result<&mut Node> {
        self.nodes.get_mut(&ino).ok_or(Errno::ESTALE)
    }

    fn child(&self, parent: Ino, name: &[u8]) -> Result<Ino> {
        let found = self.node(parent)?.directory()?.names.get(name);
        found.map(|(_, ino)| *ino).ok_or(Errno::ENOENT)
    }

    fn counted(&mut self, ino: Ino) -> Result<Entry> {
        let node = self.node_mut(ino)?;
        node.lookups += 1;
        Ok(Entry { attr: node.attr, generation: 1 })
    }

    /// Makes a node without a name; `mode` with type bits.
    fn make(&mut self, ctx: &Context, parent: Ino, mode: u32, content: Content) -> Result<Ino> {
        let above = &self.node(parent)?.attr;
        let kind = FileKind::from_mode(mode).ok_or(Errno::EINVAL)?;
        let inherits = above.perm & 0o2000 != 0;
        let gid = if inherits { above.gid } else { ctx.gid };
        let set_gid = if inherits && kind == FileKind::Directory { 0o2000 } else { 0 };
        let (ino, now) = (self.next, Timestamp::now());
        self.next += 1;
        let attr = Attr {
            ino,
            kind,
            perm: (mode & 0o7777) as u16 | set_gid,
            nlink: 0,
            uid: ctx.uid,
            gid,
            rdev: 0,
            size: 0,
            blocks: 0,
            blksize: PAGE as u32,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: Some(now),
        };
        self.nodes.insert(ino, Node { attr, content, xattrs: BTreeMap::new(), lookups: 0 });
        Ok(ino)
    }

    /// Makes a node with a name, and counts it.
    fn make_named(
        &mut self,
        ctx: &Context,
        (parent, name): (Ino, &[u8]),
        mode: u32,
        content: Content,
    ) -> Result<Entry> {
        self.vacant(parent, name)?;
        let ino = self.make(ctx, parent, mode, content)?;
        self.attach(parent, name, ino)?;
        self.counted(ino)
    }

    fn vacant(&self, parent: Ino, name: &[u8]) -> Result<()> {
        let node = self.node(parent)?;
        if node.attr.nlink == 0 {
            return Err(Errno::ENOENT);
        }
        if node.directory()?.names.contains_key(name) { Err(Errno::EEXIST) } else { Ok(()) }
    }

    /// Gives a node a name, with the links that go with it.
    fn attach(&mut self, parent: Ino, name: &[u8], ino: Ino) -> Result<()> {
        let node = self.node_mut(ino)?;
        let is_dir = node.directory_mut().map(|directory| directory.parent = parent).is_ok();
        node.attr.nlink += if is_dir { 2 } else { 1 };
        node.attr.ctime = Timestamp::now();
        let above = self.node_mut(parent)?;
        above.attr.nlink += u32::from(is_dir);
        above.directory_mut()?.insert(name, ino);
        above.touch();
        Ok(())
    }

    /// Takes a name away, with the links that go with it.
    fn detach(&mut self, parent: Ino, name: &[u8]) -> Result<Ino> {
        let ino = self.child(parent, name)?;
        let node = self.node_mut(ino)?;
        let is_dir = node.directory().is_ok();
        node.attr.nlink -= if is_dir { 2 } else { 1 };
        node.attr.ctime = Timestamp::now();
        let above = self.node_mut(parent)?;
        above.attr.nlink -= u32::from(is_dir);
        above.directory_mut()?.remove(name);
        above.touch();
        Ok(ino)
    }

    fn reap(&mut self, ino: Ino) {
        if self.nodes.get(&ino).is_some_and(|node| node.attr.nlink == 0 && node.lookups == 0) {
            self.nodes.remove(&ino);
        }
    }

    fn remove(&mut self, parent: Ino, name: &[u8], want_dir: bool) -> Result<()> {
        let ino = self.child(parent, name)?;
        match (&self.node(ino)?.content, want_dir) {
            (Content::Directory(_), false) => return Err(Errno::EISDIR),
            (Content::Directory(directory), true) if !directory.names.is_empty() => {
                return Err(Errno::ENOTEMPTY);
            }
            (Content::Directory(_), true) => {}
            (_, true) => return Err(Errno::ENOTDIR),
            (_, false) => {}
        }
        let ino = self.detach(parent, name)?;
        self.reap(ino);
        Ok(())
    }

    fn rename(&mut self, from: (Ino, &[u8]), to: (Ino, &[u8]), flags: RenameFlags) -> Result<()> {
        let moved = self.child(from.0, from.1)?;
        let target = self.child(to.0, to.1);
        if flags.contains(RenameFlags::EXCHANGE) {
            let other = target?;
            self.detach(from.0, from.1)?;
            self.detach(to.0, to.1)?;
            self.attach(to.0, to.1, moved)?;
            return self.attach(from.0, from.1, other);
        }
        match target {
            Ok(_) if flags.contains(RenameFlags::NOREPLACE) => return Err(Errno::EEXIST),
            Ok(other) if other == moved => return Ok(()),
            Ok(_) => {
                let is_dir = self.node(moved)?.directory().is_ok();
                self.remove(to.0, to.1, is_dir)?;
            }
            Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
        self.detach(from.0, from.1)?;
        self.attach(to.0, to.1, moved)
    }
}

/// The filesystem.
pub struct NullFs {
    state: RwLock<State>,
    stateless: bool,
    /// PAIRS-WITH: `unmounts`, in a test that waits for the unmount by other means.
    unmounts: AtomicU32,
    fsyncs: Gate,
    /// Behind their early replies.
    writes: Gate,
}

/// Where calls wait while it is shut.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    opened: Condvar,
}

#[derive(Default)]
struct GateState {
    shut: bool,
    waiting: usize,
    /// How often it was opened: who waited then passes, shut again or not.
    openings: u64,
}

impl Gate {
    fn hold(&self, hold: bool) {
        let mut state = self.state.lock();
        state.shut = hold;
        if !hold {
            state.openings += 1;
            self.opened.notify_all();
        }
    }

    fn is_shut(&self) -> bool {
        self.state.lock().shut
    }

    fn pass(&self) {
        let mut state = self.state.lock();
        let openings = state.openings;
        state.waiting += 1;
        while state.shut && state.openings == openings {
            self.opened.wait(&mut state);
        }
        state.waiting -= 1;
    }
}

impl Default for NullFs {
    fn default() -> Self {
        Self::new(true)
    }
}

impl NullFs {
    /// An empty filesystem; `stateless`: opens need not be sent.
    pub fn new(stateless: bool) -> Self {
        let mut state = State { nodes: HashMap::new(), next: ROOT };
        let now = Timestamp::now();
        let attr = Attr {
            ino: ROOT,
            kind: FileKind::Directory,
            perm: 0o755,
            nlink: 2,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            rdev: 0,
            size: PAGE,
            blocks: 8,
            blksize: PAGE as u32,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: Some(now),
        };
        let content = Content::Directory(Directory::new(ROOT));
        state.nodes.insert(ROOT, Node { attr, content, xattrs: BTreeMap::new(), lookups: 1 });
        state.next = ROOT + 10;
        Self {
            state: RwLock::new(state),
            stateless,
            unmounts: AtomicU32::new(0),
            fsyncs: Gate::default(),
            writes: Gate::default(),
        }
    }

    /// How often it was unmounted; for tests.
    pub fn unmounts(&self) -> u32 {
        self.unmounts.load(Ordering::SeqCst)
    }

    /// Has fsyncs wait, as for a slow disk, until told otherwise; for tests.
    pub fn hold_fsyncs(&self, hold: bool) {
        self.fsyncs.hold(hold);
    }

    /// Has writes be answered at once and wait then, as for a slow disk, until told otherwise;
    /// for tests.
    pub fn hold_writes(&self, hold: bool) {
        self.writes.hold(hold);
    }

    /// How many fsyncs wait; for tests.
    pub fn held_fsyncs(&self) -> usize {
        self.fsyncs.state.lock().waiting
    }

    /// How many writes wait; for tests.
    pub fn held_writes(&self) -> usize {
        self.writes.state.lock().waiting
    }

    /// Inodes in memory and their lookups in all, the root left out; for tests.
    pub fn counted(&self) -> (usize, u64) {
        let state = self.state.read();
        let others = state.nodes.iter().filter(|(ino, _)| **ino != ROOT);
        others.fold((0, 0), |(nodes, sum), (_, node)| (nodes + 1, sum + node.lookups))
    }
}

impl FileSystem for NullFs {
    fn root(&self) -> Ino {
        ROOT
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { stateless_open: self.stateless, ..Capabilities::default() }
    }

    fn lookup(&self, _ctx: &Context, parent: Ino, name: &[u8]) -> Result<Entry> {
        let mut state = self.state.write();
        let ino = match name {
            b"." => parent,
            b".." => state.node(parent)?.directory()?.parent,
            _ => state.child(parent, name)?,
        };
        state.counted(ino)
    }

    fn iget(&self, _ctx: &Context, ino: Ino) -> Result<Entry> {
        self.state.write().counted(ino)
    }

    fn forget(&self, ino: Ino, count: u64) {
        let mut state = self.state.write();
        if let Some(node) = state.nodes.get_mut(&ino) {
            node.lookups = node.lookups.saturating_sub(count);
        }
        state.reap(ino);
    }

    fn getattr(&self, _ctx: &Context, ino: Ino) -> Result<Attr> {
        self.state.read().node(ino).map(|node| node.attr)
    }

    fn setattr(&self, _ctx: &Context, ino: Ino, set: &SetAttr) -> Result<Attr> {
        let mut state = self.state.write();
        let node = state.node_mut(ino)?;
        if let Some(size) = set.size {
            node.set_size(size)?;
        }
        let time = |time: SetTime| match time {
            SetTime::Now => Timestamp::now(),
            SetTime::At(at) => at,
        };
        let attr = &mut node.attr;
        attr.perm = set.mode.map_or(attr.perm, |mode| (mode & 0o7777) as u16);
        if set.kill_suidgid {
            attr.perm &= if attr.perm & 0o010 != 0 { !0o6000 } else { !0o4000 };
        }
        attr.uid = set.uid.unwrap_or(attr.uid);
        attr.gid = set.gid.unwrap_or(attr.gid);
        attr.atime = set.atime.map_or(attr.atime, time);
        attr.mtime = set.mtime.map_or(attr.mtime, time);
        attr.ctime = set.ctime.unwrap_or_else(Timestamp::now);
        Ok(*attr)
    }

    fn readlink(&self, _ctx: &Context, ino: Ino) -> Result<Vec<u8>> {
        match &self.state.read().node(ino)?.content {
            Content::Symlink(target) => Ok(target.clone()),
            _ => Err(Errno::EINVAL),
        }
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: Ino,
        name: &[u8],
        mode: u32,
        rdev: u32,
    ) -> Result<Entry> {
        let mut state = self.state.write();
        let content = match FileKind::from_mode(mode) {
            Some(FileKind::Regular) => Content::File(BTreeMap::new()),
            _ => Content::Special,
        };
        let mut entry = state.make_named(ctx, (parent, name), mode, content)?;
        state.node_mut(entry.attr.ino)?.attr.rdev = rdev;
        entry.attr.rdev = rdev;
        Ok(entry)
    }

    fn mkdir(&self, ctx: &Context, parent: Ino, name: &[u8], mode: u32) -> Result<Entry> {
        let mode = (mode & !libc::S_IFMT) | libc::S_IFDIR;
        let content = Content::Directory(Directory::new(parent));
        self.state.write().make_named(ctx, (parent, name), mode, content)
    }

    fn symlink(&self, ctx: &Context, parent: Ino, name: &[u8], target: &[u8]) -> Result<Entry> {
        let mut state = self.state.write();
        let content = Content::Symlink(target.to_vec());
        let mode = libc::S_IFLNK | 0o777;
        let mut entry = state.make_named(ctx, (parent, name), mode, content)?;
        let size = target.len() as u64;
        state.node_mut(entry.attr.ino)?.attr.size = size;
        entry.attr.size = size;
        Ok(entry)
    }

    fn link(&self, _ctx: &Context, ino: Ino, parent: Ino, name: &[u8]) -> Result<Entry> {
        let mut state = self.state.write();
        if state.node(ino)?.directory().is_ok() {
            return Err(Errno::EPERM);
        }
        state.vacant(parent, name)?;
        state.attach(parent, name, ino)?;
        state.counted(ino)
    }

    fn unlink(&self, _ctx: &Context, parent: Ino, name: &[u8]) -> Result<()> {
        self.state.write().remove(parent, name, false)
    }

    fn rmdir(&self, _ctx: &Context, parent: Ino, name: &[u8]) -> Result<()> {
        self.state.write().remove(parent, name, true)
    }

    fn rename(
        &self,
        _ctx: &Context,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        flags: RenameFlags,
    ) -> Result<()> {
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::EINVAL);
        }
        self.state.write().rename(from, to, flags)
    }

    fn tmpfile(
        &self,
        ctx: &Context,
        parent: Ino,
        mode: u32,
        _flags: i32,
    ) -> Result<(Entry, OpenReply)> {
        let mut state = self.state.write();
        let mode = (mode & !libc::S_IFMT) | libc::S_IFREG;
        let ino = state.make(ctx, parent, mode, Content::File(BTreeMap::new()))?;
        Ok((state.counted(ino)?, OpenReply { keep_cache: true, ..OpenReply::default() }))
    }

    fn read(
        &self,
        _ctx: &Context,
        ino: Ino,
        _fh: FileHandle,
        offset: u64,
        len: usize,
        reply: &mut ReadReply,
    ) -> Result<()> {
        let state = self.state.read();
        let node = state.node(ino)?;
        let Content::File(pages) = &node.content else { return Err(Errno::EINVAL) };
        let end = node.attr.size.min(offset.saturating_add(len as u64));
        let mut at = offset;
        while at < end {
            let (index, skip) = (at / PAGE, (at % PAGE) as usize);
            let piece = (PAGE - at % PAGE).min(end - at) as usize;
            reply.push(match pages.get(&index) {
                Some(page) => ReadSegment::Bytes(page[skip..skip + piece].to_vec()),
                None => ReadSegment::Zeroes(piece),
            });
            at += piece as u64;
        }
        Ok(())
    }

    fn write(
        &self,
        _ctx: &Context,
        ino: Ino,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _flags: WriteFlags,
    ) -> Result<usize> {
        let mut state = self.state.write();
        let node = state.node_mut(ino)?;
        let end = offset.checked_add(data.len() as u64).ok_or(Errno::EFBIG)?;
        check_size(end)?;
        let pages = node.pages_mut()?;
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let skip = (at % PAGE) as usize;
            let piece = (PAGE as usize - skip).min(data.len() - done);
            let page = pages.entry(at / PAGE).or_insert_with(|| Box::new([0; PAGE as usize]));
            page[skip..skip + piece].copy_from_slice(&data[done..done + piece]);
            done += piece;
        }
        node.attr.blocks = pages.len() as u64 * (PAGE / 512);
        node.attr.size = node.attr.size.max(end);
        node.touch();
        Ok(data.len())
    }

    fn write_accepted(
        &self,
        ctx: &Context,
        write: &Write<'_>,
        accept: &mut dyn FnMut(usize),
    ) -> Result<usize> {
        let written =
            self.write(ctx, write.ino, write.fh, write.offset, write.data, write.flags)?;
        if self.writes.is_shut() {
            accept(written);
            self.writes.pass();
        }
        Ok(written)
    }

    fn fsync(&self, _ctx: &Context, _ino: Ino, _fh: FileHandle, _datasync: bool) -> Result<()> {
        self.fsyncs.pass();
        Ok(())
    }

    fn readdir(
        &self,
        _ctx: &Context,
        ino: Ino,
        _fh: FileHandle,
        offset: u64,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let state = self.state.read();
        let directory = state.node(ino)?.directory()?;
        let dots: [(&[u8], Ino); 2] = [(b".", ino), (b"..", directory.parent)];
        for (at, (name, ino)) in (0_u64..).zip(dots).filter(|(at, _)| *at >= offset) {
            let kind = Some(FileKind::Directory);
            if !sink.add(&DirEntry { ino, kind, name, next_offset: at + 1 }) {
                return Ok(());
            }
        }
        for (at, name) in directory.order.range(offset.max(2)..) {
            let Some((_, ino)) = directory.names.get(name) else { continue };
            let kind = state.nodes.get(ino).map(|node| node.attr.kind);
            if !sink.add(&DirEntry { ino: *ino, kind, name, next_offset: at + 1 }) {
                break;
            }
        }
        Ok(())
    }

    fn statfs(&self, _ctx: &Context) -> Result<StatFs> {
        let files = self.state.read().nodes.len() as u64;
        Ok(StatFs {
            bsize: PAGE as u32,
            blocks: 1 << 20,
            bfree: 1 << 19,
            bavail: 1 << 19,
            files: files + (1 << 20),
            ffree: 1 << 20,
            namelen: 255,
        })
    }

    fn getxattr(&self, _ctx: &Context, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        self.state.read().node(ino)?.xattrs.get(name).cloned().ok_or(Errno::ENODATA)
    }

    fn listxattr(&self, _ctx: &Context, ino: Ino) -> Result<Vec<u8>> {
        let state = self.state.read();
        let names = state.node(ino)?.xattrs.keys();
        Ok(names.flat_map(|name| name.iter().copied().chain([0])).collect())
    }

    fn setxattr(
        &self,
        _ctx: &Context,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        let mut state = self.state.write();
        let node = state.node_mut(ino)?;
        let there = node.xattrs.contains_key(name);
        if there && flags.contains(XattrFlags::CREATE) {
            return Err(Errno::EEXIST);
        }
        if !there && flags.contains(XattrFlags::REPLACE) {
            return Err(Errno::ENODATA);
        }
        node.xattrs.insert(name.to_vec(), value.to_vec());
        node.attr.ctime = Timestamp::now();
        Ok(())
    }

    fn removexattr(&self, _ctx: &Context, ino: Ino, name: &[u8]) -> Result<()> {
        let mut state = self.state.write();
        state.node_mut(ino)?.xattrs.remove(name).map(drop).ok_or(Errno::ENODATA)
    }

    fn fallocate(&self, _ctx: &Context, ino: Ino, offset: u64, len: u64, mode: i32) -> Result<()> {
        let mut state = self.state.write();
        let node = state.node_mut(ino)?;
        let end = offset.checked_add(len).ok_or(Errno::EFBIG)?;
        check_size(end)?;
        if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
            return node.punch(offset, end);
        }
        if mode & !libc::FALLOC_FL_KEEP_SIZE != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 && end > node.attr.size {
            node.set_size(end)?;
        }
        Ok(())
    }

    fn lseek(&self, _ctx: &Context, ino: Ino, offset: u64, whence: i32) -> Result<u64> {
        let state = self.state.read();
        let node = state.node(ino)?;
        let Content::File(pages) = &node.content else { return Err(Errno::EINVAL) };
        if offset >= node.attr.size {
            return Err(Errno::ENXIO);
        }
        let first = offset / PAGE;
        if whence == libc::SEEK_DATA {
            let (index, _) = pages.range(first..).next().ok_or(Errno::ENXIO)?;
            return Ok(offset.max(index * PAGE));
        }
        let hole = (first..).find(|index| !pages.contains_key(index)).ok_or(Errno::ENXIO)?;
        Ok(offset.max(hole * PAGE).min(node.attr.size))
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn unmount(&self) -> Result<()> {
        self.unmounts.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
