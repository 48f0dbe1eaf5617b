//! Numbers and layouts of NBD. All integers are big-endian.

/// First bytes of a server's greeting: `NBDMAGIC`.
pub const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second of a newstyle greeting, and before each option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Second of an oldstyle greeting.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each simple reply.
pub const REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flag: options may be refused one by one.
pub const FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag: no zeroes after [`OPTION_EXPORT_NAME`]'s answer.
pub const NO_ZEROES: u16 = 1 << 1;

/// Option: begin with an export, without a way to refuse it.
pub const OPTION_EXPORT_NAME: u32 = 1;
/// Option: say what an export is, and begin with it.
pub const OPTION_GO: u32 = 7;

/// Reply to an option: it is done.
pub const REPLY_ACK: u32 = 1;
/// Reply to an option: information, and more replies follow.
pub const REPLY_INFO: u32 = 3;
/// Replies from here on are errors.
pub const REPLY_ERRORS: u32 = 1 << 31;
/// Error of an option: the server does not know it.
pub const REPLY_UNSUPPORTED: u32 = REPLY_ERRORS + 1;
/// Error of an option: an administrator has forbidden it.
pub const REPLY_POLICY: u32 = REPLY_ERRORS + 2;
/// Error of an option: only over TLS.
pub const REPLY_TLS: u32 = REPLY_ERRORS + 5;
/// Error of an option: no such export.
pub const REPLY_UNKNOWN: u32 = REPLY_ERRORS + 6;
/// Error of an option: the server is going down.
pub const REPLY_SHUTDOWN: u32 = REPLY_ERRORS + 7;
/// Error of an option: the client must ask for block sizes, and keep to them.
pub const REPLY_BLOCK_SIZE: u32 = REPLY_ERRORS + 8;

/// Information: size and flags.
pub const INFO_EXPORT: u16 = 0;
/// Information: least, best and largest request.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Export flag: it may not be written.
pub const READ_ONLY: u16 = 1 << 1;
/// Export flag: [`FLUSH`] works.
pub const SEND_FLUSH: u16 = 1 << 2;
/// Export flag: [`FUA`] works.
pub const SEND_FUA: u16 = 1 << 3;
/// Export flag: what one connection has written and flushed, all others see.
pub const CAN_MULTI_CONN: u16 = 1 << 8;

/// Command: read.
pub const READ: u16 = 0;
/// Command: write.
pub const WRITE: u16 = 1;
/// Command: no more requests come. It has no reply.
pub const DISCONNECT: u16 = 2;
/// Command: make what is written safe.
pub const FLUSH: u16 = 3;

/// Command flag: a write that is safe when it is answered.
pub const FUA: u16 = 1;

/// What a server takes in one request that says nothing of it.
pub const DEFAULT_MOST: u32 = 32 << 20;
/// Longest answer to an option that is listened to: names and texts are at most 4 KiB.
pub const LONGEST_ANSWER: u32 = 64 << 10;

/// Bytes of a request.
pub const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply.
pub const REPLY_LEN: usize = 16;

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Of the command.
    pub flags: u16,
    /// What is asked for.
    pub command: u16,
    /// Comes back in the reply.
    pub cookie: u64,
    /// From where on, bytes.
    pub offset: u64,
    /// How much, bytes.
    pub length: u32,
}

impl Request {
    /// As it is sent.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut bytes = [0; REQUEST_LEN];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }
}

/// A simple reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// 0, or why it failed: numbers as Linux has them.
    pub error: u32,
    /// The request's.
    pub cookie: u64,
}

impl Reply {
    /// From what was received; `None` for what is no simple reply.
    pub fn decode(bytes: [u8; REPLY_LEN]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk()?;
        let (error, rest) = rest.split_first_chunk()?;
        let (cookie, _) = rest.split_first_chunk()?;
        let reply = Self { error: u32::from_be_bytes(*error), cookie: u64::from_be_bytes(*cookie) };
        (u32::from_be_bytes(*magic) == REPLY_MAGIC).then_some(reply)
    }
}
