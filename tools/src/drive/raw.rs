//! Raw targets: plain files, block devices and NBD exports, which have no names.
//!
//! | target | is overwritten |
//! |---|---|
//! | zeroes, or blocks of an earlier run | when it is named |
//! | anything else | with `--destroy` |
//! | in use: a mounted device, an image that uext has open | never |
//!
//! Locks: none of memory; a [`Claim`] holds a file's flock, or a device's O_EXCL, for as
//! long as the run lasts.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use rustix::fs::FlockOperation;
use uext_blockdev::nbd::address::is_address;
use uext_blockdev::nbd::protocol::READ_ONLY;
use uext_blockdev::nbd::{Address, Connection, Export};
use uext_drive_sys::{Direction, Piece};

use super::block::block_len;
use super::plan::Target;
use super::stats::{Op, Shard};
use super::workload::Way;

/// How long an NBD server may take to answer when a connection is made.
const PATIENCE: Duration = Duration::from_secs(30);
/// What is looked at in one place before a target is overwritten, bytes.
const WINDOW: u64 = 1 << 20;
/// In how many places, beside the beginning.
const PLACES: u64 = 32;
/// Blocks of a raw target begin at multiples of this.
const PAGE: usize = 4096;

/// Connects to an export.
///
/// # Errors
/// One line.
pub fn connect(address: &str) -> Result<Connection, String> {
    let parsed: Address = address.parse()?;
    Connection::open(&parsed, PATIENCE).map_err(|error| format!("{address}: {error}"))
}

/// What an NBD target is.
///
/// # Errors
/// One line; a read-only export too.
pub fn find_export(address: &str) -> Result<(Target, Export), String> {
    let export = *connect(address)?.export();
    if export.has(READ_ONLY) {
        return Err(format!("{address}: the export is read-only"));
    }
    Ok((Target::Nbd(address.to_owned(), export.size), export))
}

/// A raw target that is read.
pub enum Raw {
    /// A file or device.
    File(File),
    /// An export.
    Export(Box<Connection>),
}

impl Raw {
    /// Opens a target by what it is called now: a disk may have been driven as an export,
    /// and be read as the file that it is.
    ///
    /// # Errors
    /// One line.
    pub fn open(name: &Path) -> Result<Self, String> {
        if let Some(address) = name.to_str().filter(|text| is_address(text)) {
            return Ok(Self::Export(Box::new(connect(address)?)));
        }
        let file = File::open(name);
        Ok(Self::File(file.map_err(|error| format!("{}: {error}", name.display()))?))
    }

    /// Reads all of a buffer.
    ///
    /// # Errors
    /// The disk's, the server's, or the end.
    pub fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(buffer, offset),
            Self::Export(connection) => connection.read(&mut [(offset, buffer)], |_| ()),
        }
    }
}

/// Moves all pieces through a connection at once, and counts each when it is answered.
///
/// # Errors
/// The server's; `ECONNRESET` when it is gone.
pub fn transfer(
    connection: &mut Connection,
    direction: Direction,
    durable: bool,
    pieces: &mut [Piece<'_>],
    shard: Shard<'_>,
) -> io::Result<()> {
    let start = std::time::Instant::now();
    let lens: Vec<u64> = pieces.iter().map(|piece| piece.memory.len() as u64).collect();
    // A piece of several requests counts when the last of them is answered.
    let most = u64::from(connection.export().most);
    let mut left: Vec<u64> = lens.iter().map(|len| len.div_ceil(most)).collect();
    let op = if direction == Direction::Read { Op::Read } else { Op::Write };
    let finished = |piece: usize| {
        left[piece] -= 1;
        if left[piece] == 0 {
            shard.count(op, start.elapsed(), lens[piece]);
        }
    };
    match direction {
        Direction::Read => {
            let mut list: Vec<(u64, &mut [u8])> =
                pieces.iter_mut().map(|piece| (piece.offset, &mut *piece.memory)).collect();
            connection.read(&mut list, finished)
        }
        Direction::Write => {
            let list: Vec<(u64, &[u8])> =
                pieces.iter().map(|piece| (piece.offset, &*piece.memory)).collect();
            connection.write(&list, durable, finished)
        }
    }
}

/// The ways there are to an export: plain requests, and those with FUA.
pub fn works_on_exports(way: Way) -> bool {
    matches!(way, Way::Rw | Way::Flags)
}

/// A target that nobody else has, for as long as this lives.
#[derive(Debug)]
pub struct Claim {
    _file: Option<File>,
}

/// Claims a target, and looks whether it may be overwritten.
///
/// # Errors
/// One line.
pub fn claim(target: &Target, destroy: bool) -> Result<Claim, String> {
    let (name, bytes, file) = match target {
        Target::Directory(_) => return Ok(Claim { _file: None }),
        Target::Nbd(address, bytes) => (Path::new(address), *bytes, None),
        Target::Device(path, bytes) => (path.as_path(), *bytes, Some(claim_file(path)?)),
    };
    if !destroy && holds_something(&mut Raw::open(name)?, name, bytes)? {
        return Err(format!(
            "{}: holds something that would be overwritten: say --destroy",
            name.display()
        ));
    }
    Ok(Claim { _file: file })
}

fn claim_file(path: &Path) -> Result<File, String> {
    let fail = |error: io::Error| format!("{}: {error}", path.display());
    let device = path.metadata().map_err(fail)?.file_type().is_block_device();
    let mut options = File::options();
    options.read(true).write(true);
    if device {
        // Without O_CREAT it says of a device: unless a filesystem, or the like, has it.
        options.custom_flags(libc::O_EXCL);
    }
    let in_use = || format!("{}: is in use", path.display());
    let file = match options.open(path) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(in_use()),
        file => file.map_err(fail)?,
    };
    // What has an image mounted holds this; where there are no locks, it is not asked.
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(in_use()),
        _ => Ok(file),
    }
}

/// Whether a target is anything but zeroes and blocks of an earlier run.
///
/// Looked at are the beginning, where nearly everything has its mark, the end, and places
/// between. What begins with a run's block was a run's: anything else that was there has
/// lost its beginning.
fn holds_something(raw: &mut Raw, name: &Path, bytes: u64) -> Result<bool, String> {
    let page = |place: u64| place / PAGE as u64 * PAGE as u64;
    let last = bytes.saturating_sub(WINDOW);
    let mut places: Vec<u64> = (0..PLACES).map(|n| page(last / PLACES * n)).collect();
    places.push(page(last));
    places.dedup();
    for place in places {
        // A megabyte and a page: to the last byte.
        let mut window = vec![0; (bytes - place).min(WINDOW + PAGE as u64) as usize];
        raw.read_exact_at(&mut window, place)
            .map_err(|error| format!("{}: {error}", name.display()))?;
        if place == 0 && block_len(&window).is_some() {
            return Ok(false);
        }
        let empty = window.iter().all(|&byte| byte == 0);
        // A run that was ended early has left some of its blocks; at the beginning they
        // are all that may be there.
        let ours = if place == 0 {
            window
                .chunks(PAGE)
                .all(|page| page.iter().all(|&byte| byte == 0) || block_len(page).is_some())
        } else {
            window.chunks(PAGE).any(|page| block_len(page).is_some())
        };
        if !empty && !ours {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::super::block::BlockId;
    use super::*;

    /// No whole pages.
    const BYTES: u64 = (8 << 20) + 512;

    fn holds(contents: &[(u64, &[u8])]) -> bool {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(BYTES).expect("room");
        for (at, bytes) in contents {
            file.write_all_at(bytes, *at).expect("written");
        }
        holds_something(&mut Raw::File(file), Path::new("file"), BYTES).expect("read")
    }

    fn block(len: usize) -> Vec<u8> {
        let mut block = vec![0; len];
        BlockId { run: 1, file: 2, offset: 0 }.stamp(3, &mut block);
        block
    }

    #[test]
    fn zeroes_and_blocks_of_a_run_may_be_overwritten() {
        assert!(!holds(&[]));
        assert!(!holds(&[(0, &block(8192)), (8192, &[7; 4096])]));
        // One that ended before the first block was there.
        assert!(!holds(&[(4096, &block(4096))]));
        assert!(!holds(&[(4 << 20, &[&block(8192)[..], &block(8192)].concat())]));
    }

    #[test]
    fn what_may_be_somebodys_is_left_alone() {
        // Where ext4, btrfs, a partition table's copy and anything at all have something.
        for at in [0, 1024, 4090, 64 << 10, 1 << 20, 4 << 20, BYTES - 512, BYTES - 4096] {
            assert!(holds(&[(at, &[1])]), "at {at}");
        }
        // A filesystem in which a run's files lie.
        assert!(holds(&[(1080, b"\x53\xef"), (4096, &block(4096))]));
    }
}
