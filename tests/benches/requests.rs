//! What the requests of metadata work cost, without the kernel and without a disk:
//! `cargo bench -p uext-tests --bench requests [-- FILES]`.
//!
//! A made-up kernel sends what Linux sends when files are made, written, given attributes and
//! removed, twenty directories of them and one large one. Printed is the processor time of the
//! serving thread per file. Under `valgrind --tool=callgrind` the phases are functions of their
//! own, so that instructions can be compared, which do not depend on what else the machine does.

#![allow(missing_docs, reason = "a benchmark has no public items")]

use std::sync::Arc;
use std::time::Duration;

use uext_blockdev::MemoryDevice;
use uext_ext4::{Ext4, MountOptions};
use uext_fuse::abi::{self, Opcode};
use uext_fuse::{Answer, Config, Dispatcher, ReplyBuf, Request};
use uext_tests::scratch::{Kind, Scratch};
use zerocopy::{FromBytes, IntoBytes};

/// Directories among which files are spread.
const DIRS: usize = 20;
const DATA: [u8; 4096] = [0x5a; 4096];
/// The most a reply here takes.
const REPLY: usize = 8192;

/// A kernel that asks one thing at a time.
struct Kernel {
    dispatcher: Dispatcher,
    message: Vec<u8>,
    reply: Vec<u8>,
}

impl Kernel {
    /// Sends a request; what was answered, or nothing for an error.
    fn ask(&mut self, opcode: Opcode, nodeid: u64, body: &[&[u8]]) -> Option<&[u8]> {
        let len = size_of::<abi::InHeader>() + body.iter().map(|part| part.len()).sum::<usize>();
        let header = abi::InHeader {
            len: len as u32,
            opcode: opcode as u32,
            unique: 2,
            nodeid,
            pid: 1,
            ..abi::InHeader::default()
        };
        self.message.clear();
        self.message.extend_from_slice(header.as_bytes());
        body.iter().for_each(|part| self.message.extend_from_slice(part));
        let request = Request::parse(&self.message).map_err(drop).expect("a sound request");
        let mut out = ReplyBuf::new(&mut self.reply);
        match self.dispatcher.dispatch(&request, &mut out) {
            Answer::Buffer => {
                let len = out.filled().len();
                Some(&self.reply[..len])
            }
            Answer::None | Answer::Status(Ok(())) => Some(&[]),
            Answer::Status(Err(_)) | Answer::Read(_) => None,
        }
    }

    fn make(&mut self, opcode: Opcode, dir: u64, args: &[u8], name: &[u8]) -> u64 {
        let entry = self.ask(opcode, dir, &[args, name, b"\0"]).expect("it is made");
        abi::EntryOut::read_from_prefix(entry).expect("an entry").0.nodeid
    }

    fn mkdir(&mut self, name: &[u8]) -> u64 {
        let args = abi::MkdirIn { mode: 0o755, umask: 0o22 };
        self.make(Opcode::Mkdir, abi::ROOT_ID, args.as_bytes(), name)
    }

    /// open(2) of a new file: the directory's attributes are old since the last one.
    #[inline(never)]
    fn create(&mut self, dir: u64, name: &[u8]) -> u64 {
        self.ask(Opcode::Getattr, dir, &[abi::GetattrIn::default().as_bytes()])
            .expect("attributes");
        assert!(
            self.ask(Opcode::Lookup, dir, &[name, b"\0"]).is_none_or(|entry| entry[..8] == [0; 8])
        );
        let args = abi::MknodIn { mode: libc::S_IFREG | 0o644, umask: 0o22, ..Default::default() };
        self.make(Opcode::Mknod, dir, args.as_bytes(), name)
    }

    /// The first write(2) to a new file.
    #[inline(never)]
    fn write(&mut self, ino: u64) {
        self.capability(ino);
        let args = abi::WriteIn { size: DATA.len() as u32, ..Default::default() };
        self.ask(Opcode::Write, ino, &[args.as_bytes(), &DATA]).expect("written");
    }

    fn capability(&mut self, ino: u64) {
        let args = abi::GetxattrIn { size: 24, ..Default::default() };
        let name = b"security.capability\0".as_slice();
        assert!(self.ask(Opcode::Getxattr, ino, &[args.as_bytes(), name]).is_none());
    }

    /// utimensat(2), chown(2) and chmod(2), as an archiver calls them.
    #[inline(never)]
    fn attributes(&mut self, ino: u64) {
        let times = abi::Fattr::ATIME | abi::Fattr::MTIME;
        let times = abi::SetattrIn { valid: times.bits(), mtime: 1, ..Default::default() };
        self.ask(Opcode::Setattr, ino, &[times.as_bytes()]).expect("times");
        self.capability(ino);
        let owner = abi::Fattr::UID | abi::Fattr::GID;
        let owner = abi::SetattrIn { valid: owner.bits(), ..Default::default() };
        self.ask(Opcode::Setattr, ino, &[owner.as_bytes()]).expect("an owner");
        let mode = abi::Fattr::MODE.bits();
        let mode = abi::SetattrIn { valid: mode, mode: 0o100_600, ..Default::default() };
        self.ask(Opcode::Setattr, ino, &[mode.as_bytes()]).expect("a mode");
    }

    #[inline(never)]
    fn stat(&mut self, dir: u64, name: &[u8]) {
        self.ask(Opcode::Lookup, dir, &[name, b"\0"]).expect("it is there");
    }

    #[inline(never)]
    fn unlink(&mut self, dir: u64, name: &[u8], ino: u64) {
        self.ask(Opcode::Getattr, dir, &[abi::GetattrIn::default().as_bytes()])
            .expect("attributes");
        self.ask(Opcode::Unlink, dir, &[name, b"\0"]).expect("it is removed");
        self.ask(Opcode::Forget, ino, &[abi::ForgetIn { nlookup: 2 }.as_bytes()]);
    }
}

/// How long this thread has had a processor.
fn cpu_time() -> Duration {
    let stat =
        std::fs::read_to_string("/proc/thread-self/schedstat").expect("scheduler statistics");
    let nanos = stat.split(' ').next().and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.expect("a number"))
}

/// Does something to each of `files` files, and says what it took.
fn phase(name: &str, files: usize, mut each: impl FnMut(usize)) {
    let begin = cpu_time();
    (0..files).for_each(&mut each);
    let each = (cpu_time() - begin).as_nanos() / files as u128;
    println!("{name:<28} {each:>7} ns");
}

fn work(kernel: &mut Kernel, title: &str, dirs: &[u64], files: usize) {
    let dir = |n: usize| dirs[n * dirs.len() / files];
    let names: Vec<_> = (0..files).map(|n| format!("file-{n:06}").into_bytes()).collect();
    let mut inos = vec![0; files];
    phase(&format!("{title}create"), files, |n| inos[n] = kernel.create(dir(n), &names[n]));
    phase(&format!("{title}write 4k"), files, |n| kernel.write(inos[n]));
    phase(&format!("{title}utimens, chown, chmod"), files, |n| kernel.attributes(inos[n]));
    phase(&format!("{title}stat"), files, |n| kernel.stat(dir(n), &names[n]));
    phase(&format!("{title}unlink"), files, |n| kernel.unlink(dir(n), &names[n], inos[n]));
}

fn main() {
    let files = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(20_000);
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", Kind { fs: "ext4", block_size: 4096 }, 1 << 30, &[]);
    let dev = MemoryDevice::from_vec(std::fs::read(&image).expect("the image"));
    let fs = Ext4::mount(dev, "bench", &MountOptions::default()).expect("a mount");
    let dispatcher = Dispatcher::new(Arc::<Ext4>::clone(&fs), &Config::default());
    let mut kernel = Kernel { dispatcher, message: Vec::new(), reply: vec![0; REPLY] };
    let dirs: Vec<_> = (0..DIRS).map(|n| kernel.mkdir(format!("d{n}").as_bytes())).collect();
    work(&mut kernel, "", &dirs, files);
    let large = kernel.mkdir(b"large");
    work(&mut kernel, "one directory: ", &[large], files);
    kernel.dispatcher.unmount().expect("unmount");
}
