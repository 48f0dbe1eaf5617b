//! A request as it comes, and what its parts mean to a filesystem. What it says is not believed:
//! lengths, names and times are checked here, once.

use uext_vfs::{Context, Errno, FileHandle, Result, SetAttr, SetTime, Timestamp, WriteFlags};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::abi::{self, Fattr, InHeader, Opcode, WriteInFlags};

/// Longest name of a file.
pub(crate) const NAME_MAX: usize = 255;
/// Longest name of an extended attribute.
const XATTR_NAME_MAX: usize = 255;

/// A read or write of more is large.
const LITTLE: usize = 64 * 1024;

/// Sends a reply's body before the request has been served.
pub type EarlyReply<'a> = dyn Fn(&[u8]) -> bool + 'a;

/// A request, cut at its boundaries.
pub struct Request<'a> {
    /// What is asked, of which node, by whom.
    pub header: InHeader,
    /// The structure that the opcode fixes.
    pub args: &'a [u8],
    /// Names or data.
    pub payload: &'a [u8],
    /// Sends a reply with this body at once, where the transport lends the payload for longer, and
    /// says whether it did: not when too many work on behind theirs. If it did, the answer is
    /// [`Answer::None`](crate::reply::Answer::None).
    pub early: Option<&'a EarlyReply<'a>>,
}

impl<'a> Request<'a> {
    /// Cuts a message as `/dev/fuse` gives it. `Err` has the header where there was
    /// one, so that an answer is possible.
    ///
    /// # Errors
    /// A message shorter than it says, or than its opcode needs.
    pub fn parse(message: &'a [u8]) -> std::result::Result<Self, Option<InHeader>> {
        let (header, rest) = InHeader::read_from_prefix(message).map_err(|_| None)?;
        let extensions = usize::from(header.total_extlen) * 8;
        let body = rest
            .len()
            .checked_sub(extensions)
            .filter(|_| usize::try_from(header.len) == Ok(message.len()))
            .ok_or(Some(header))?;
        let args_len = Opcode::from_wire(header.opcode).map_or(0, Opcode::args_len);
        let (args, payload) = rest[..body].split_at_checked(args_len).ok_or(Some(header))?;
        Ok(Self { header, args, payload, early: None })
    }

    pub(crate) fn args<T: FromBytes + KnownLayout + Immutable>(&self) -> Result<T> {
        T::read_from_prefix(self.args).map(|(args, _)| args).map_err(|_| Errno::EINVAL)
    }

    pub(crate) fn context(&self) -> Context {
        Context { uid: self.header.uid, gid: self.header.gid, pid: self.header.pid, umask: 0 }
    }
}

/// The opcode of a message and what follows its header, where it has those.
fn opcode(message: &[u8]) -> Option<(Opcode, &[u8])> {
    let (header, rest) = InHeader::read_from_prefix(message).ok()?;
    Some((Opcode::from_wire(header.opcode)?, rest))
}

/// The thread that a message is from; 0 is the kernel.
pub(crate) fn client(message: &[u8]) -> u32 {
    InHeader::read_from_prefix(message).map_or(0, |(header, _)| header.pid)
}

/// Whether somebody waits for the answer to a message.
pub(crate) fn is_waited_for(message: &[u8]) -> bool {
    use Opcode::{BatchForget, Forget, Interrupt, Release, Releasedir};
    let opcode = opcode(message).map(|(opcode, _)| opcode);
    !matches!(opcode, Some(Forget | BatchForget | Interrupt | Release | Releasedir))
}

/// Whether a message asks for what takes long even when nothing is in its way: much data, or all
/// that was changed.
pub(crate) fn takes_long(message: &[u8]) -> bool {
    match opcode(message) {
        Some((Opcode::Read, args)) => abi::ReadIn::read_from_prefix(args)
            .is_ok_and(|(args, _)| usize::try_from(args.size).is_ok_and(|size| size > LITTLE)),
        Some((Opcode::Write, data)) => data.len() > LITTLE,
        Some((Opcode::Setattr, args)) => abi::SetattrIn::read_from_prefix(args)
            .is_ok_and(|(args, _)| Fattr::from_bits_retain(args.valid).contains(Fattr::SIZE)),
        Some((opcode, _)) => matches!(
            opcode,
            Opcode::Syncfs
                | Opcode::Fallocate
                | Opcode::Ioctl
                | Opcode::CopyFileRange
                | Opcode::CopyFileRange64
                | Opcode::Destroy
        ),
        None => false,
    }
}

/// A NUL-terminated string and what follows it.
pub(crate) fn cstr(bytes: &[u8]) -> Result<(&[u8], &[u8])> {
    let end = bytes.iter().position(|byte| *byte == 0).ok_or(Errno::EINVAL)?;
    Ok((&bytes[..end], &bytes[end + 1..]))
}

/// A name that can be given to a file.
pub(crate) fn file_name(name: &[u8]) -> Result<&[u8]> {
    match name {
        b"" | b"." | b".." => Err(Errno::EINVAL),
        _ if name.len() > NAME_MAX => Err(Errno::ENAMETOOLONG),
        _ if name.contains(&b'/') => Err(Errno::EINVAL),
        _ => Ok(name),
    }
}

pub(crate) fn one_name(payload: &[u8]) -> Result<&[u8]> {
    file_name(cstr(payload)?.0)
}

pub(crate) fn check_xattr_name(name: &[u8]) -> Result<&[u8]> {
    if name.is_empty() || name.len() > XATTR_NAME_MAX {
        return Err(Errno::ERANGE);
    }
    Ok(name)
}

pub(crate) fn xattr_name(payload: &[u8]) -> Result<&[u8]> {
    check_xattr_name(cstr(payload)?.0)
}

/// How a write came. `O_APPEND` is left out: the kernel, the only one to write the
/// file, has resolved the offset under its lock.
pub(crate) fn write_flags(write_flags: u32, open_flags: i32) -> WriteFlags {
    let from = WriteInFlags::from_bits_truncate(write_flags);
    let mut flags = WriteFlags::empty();
    flags.set(WriteFlags::CACHE, from.contains(WriteInFlags::CACHE));
    flags.set(WriteFlags::KILL_SUIDGID, from.contains(WriteInFlags::KILL_SUIDGID));
    if !from.contains(WriteInFlags::CACHE) {
        // A write from the kernel's cache carries the flags of whichever file was at hand.
        flags.set(WriteFlags::SYNC, open_flags & libc::O_SYNC == libc::O_SYNC);
        flags.set(WriteFlags::DSYNC, open_flags & libc::O_DSYNC != 0);
        flags.set(WriteFlags::DIRECT, open_flags & libc::O_DIRECT != 0);
    }
    flags
}

pub(crate) fn set_attr(args: &abi::SetattrIn) -> Result<SetAttr> {
    let valid = Fattr::from_bits_retain(args.valid);
    let when = |has: Fattr, sec: u64, nsec: u32| -> Result<Option<Timestamp>> {
        if !valid.contains(has) {
            return Ok(None);
        }
        if nsec >= 1_000_000_000 {
            return Err(Errno::EINVAL);
        }
        Ok(Some(Timestamp { sec: sec.cast_signed(), nsec }))
    };
    let time = |has: Fattr, now: Fattr, sec: u64, nsec: u32| -> Result<Option<SetTime>> {
        match when(has, sec, nsec)? {
            Some(_) if valid.contains(now) => Ok(Some(SetTime::Now)),
            given => Ok(given.map(SetTime::At)),
        }
    };
    let number = |has: Fattr, value: u32| valid.contains(has).then_some(value);
    Ok(SetAttr {
        mode: number(Fattr::MODE, args.mode),
        uid: number(Fattr::UID, args.uid),
        gid: number(Fattr::GID, args.gid),
        size: valid.contains(Fattr::SIZE).then_some(args.size),
        atime: time(Fattr::ATIME, Fattr::ATIME_NOW, args.atime, args.atimensec)?,
        mtime: time(Fattr::MTIME, Fattr::MTIME_NOW, args.mtime, args.mtimensec)?,
        ctime: when(Fattr::CTIME, args.ctime, args.ctimensec)?,
        kill_suidgid: valid.contains(Fattr::KILL_SUIDGID),
        fh: valid.contains(Fattr::FH).then_some(FileHandle(args.fh)),
    })
}
