//! The memory of one place in a ring's queue: a request comes in it, and its reply
//! goes back in it.
//!
//! Invariants: the kernel has the memory from a REGISTER or COMMIT_AND_FETCH to its
//! completion, and then the [`Entry`] lies in its ring untouched
//! ([`super::ring::Ring`]); whoever has the value has the memory.

use uext_vfs::{Errno, ReadSegment};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::PAGE_SIZE;
use crate::abi::{InHeader, Opcode, OutHeader};
use crate::dispatch::Dispatcher;
use crate::reply::{Answer, ReplyBuf};
use crate::request::Request;

/// Bytes for the headers and for an opcode's structure.
const HEADER_SIZE: usize = 128;

/// `struct fuse_uring_ent_in_out`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct InOut {
    flags: u64,
    commit_id: u64,
    payload_sz: u32,
    padding: u32,
    reserved: u64,
}

/// `struct fuse_uring_req_header`.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
struct ReqHeader {
    in_out: [u8; HEADER_SIZE],
    op_in: [u8; HEADER_SIZE],
    ring: InOut,
}

const _: () = assert!(size_of::<InOut>() == 32 && size_of::<ReqHeader>() == 288);

/// Page-aligned memory; pages come when they are first touched.
struct Pages {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Pages {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + PAGE_SIZE];
        let start = bytes.as_ptr().align_offset(PAGE_SIZE);
        Self { bytes, start, len }
    }

    fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// A place in the queue of one CPU.
pub(super) struct Entry {
    /// Its number in its ring.
    pub(super) index: usize,
    /// The queue: a CPU's number.
    pub(super) qid: u16,
    header: Pages,
    payload: Pages,
}

impl Entry {
    /// An empty one with room for `payload` bytes.
    pub(super) fn new(index: usize, qid: u16, payload: usize) -> Self {
        Self {
            index,
            qid,
            header: Pages::new(size_of::<ReqHeader>()),
            payload: Pages::new(payload),
        }
    }

    /// The memory for the kernel: header, payload.
    pub(super) fn memory(&mut self) -> [&mut [u8]; 2] {
        [self.header.get_mut(), self.payload.get_mut()]
    }

    /// What the kernel wants to hear with the reply.
    pub(super) fn commit_id(&self) -> u64 {
        header(&self.header).ring.commit_id
    }

    /// The header of the request in it.
    pub(super) fn request_header(&self) -> InHeader {
        parts(&self.header).0
    }

    /// The opcode's structure, as far as there is one.
    pub(super) fn args(&self) -> &[u8] {
        let (request, op_in, _) = parts(&self.header);
        &op_in[..args_len(&request)]
    }

    /// Serves the request and leaves the reply. `scratch` is for replies to requests
    /// with a payload of their own, which may be read to the end.
    pub(super) fn serve(&mut self, dispatcher: &Dispatcher, scratch: &mut Vec<u8>) {
        let (request, op_in, payload_len) = parts(&self.header);
        let args = &op_in[..args_len(&request)];
        let extensions = usize::from(request.total_extlen) * 8;
        let payload_len = payload_len.checked_sub(extensions);
        let payload_len = payload_len.filter(|len| *len <= self.payload.len);
        let (error, len) = match payload_len {
            None => (Errno::EINVAL.0, 0),
            Some(0) => {
                // Nothing to read there, so the reply is built where the kernel wants it.
                let request = Request { header: request, args, payload: &[], early: None };
                let mut out = ReplyBuf::new(self.payload.get_mut());
                let answer = dispatcher.dispatch(&request, &mut out);
                let len = out.filled().len();
                put(&answer, None, len, self.payload.get_mut())
            }
            Some(payload_len) => {
                scratch.resize(self.payload.len, 0);
                let payload = &self.payload.get()[..payload_len];
                let request = Request { header: request, args, payload, early: None };
                let mut out = ReplyBuf::new(scratch);
                let answer = dispatcher.dispatch(&request, &mut out);
                let filled = out.filled();
                put(&answer, Some(filled), filled.len(), self.payload.get_mut())
            }
        };
        self.finish(request.unique, error, len);
    }

    /// Writes the headers of a reply.
    fn finish(&mut self, unique: u64, error: i32, len: usize) {
        // At most the payload's size, which is far below 4 GiB.
        let total = (size_of::<OutHeader>() + len) as u32;
        let out = OutHeader { len: total, error: -error, unique };
        let header = header_mut(&mut self.header);
        header.in_out[..size_of::<OutHeader>()].copy_from_slice(out.as_bytes());
        header.ring.payload_sz = len as u32;
    }
}

/// Puts an answer's data into the payload; gives the error, positive, and the length.
fn put(answer: &Answer, built: Option<&[u8]>, len: usize, payload: &mut [u8]) -> (i32, usize) {
    match answer {
        Answer::None | Answer::Status(Ok(())) => (0, 0),
        Answer::Status(Err(errno)) => (errno.0, 0),
        Answer::Buffer => {
            if let Some(built) = built {
                payload[..len].copy_from_slice(built);
            }
            (0, len)
        }
        Answer::Read(data) => {
            let mut rest = payload;
            for segment in data.segments() {
                // The dispatcher has checked the sum against the request.
                let (part, tail) = rest.split_at_mut(segment.len());
                match segment {
                    ReadSegment::Folio(folio, range) => part.copy_from_slice(&folio[range.clone()]),
                    ReadSegment::Bytes(bytes) => part.copy_from_slice(bytes),
                    ReadSegment::Zeroes(_) => part.fill(0),
                }
                rest = tail;
            }
            (0, data.len())
        }
    }
}

fn header(pages: &Pages) -> &ReqHeader {
    ReqHeader::ref_from_bytes(pages.get()).expect("a page holds a header")
}

fn header_mut(pages: &mut Pages) -> &mut ReqHeader {
    ReqHeader::mut_from_bytes(pages.get_mut()).expect("a page holds a header")
}

/// A request's header, the opcode's structure, and how long the payload is.
fn parts(pages: &Pages) -> (InHeader, &[u8; HEADER_SIZE], usize) {
    let header = header(pages);
    let request = InHeader::read_from_prefix(&header.in_out).expect("it fits").0;
    (request, &header.op_in, header.ring.payload_sz as usize)
}

fn args_len(request: &InHeader) -> usize {
    Opcode::from_wire(request.opcode).map_or(0, Opcode::args_len).min(HEADER_SIZE)
}
