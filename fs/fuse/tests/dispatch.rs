//! Requests that no kernel sends: every answer is an answer, never a panic.
#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

use std::sync::Arc;

use proptest::prelude::*;
use uext_fuse::abi::{self, InHeader, Opcode};
use uext_fuse::null::NullFs;
use uext_fuse::{Answer, Config, Dispatcher, ReplyBuf, Request};
use uext_vfs::Errno;
use zerocopy::{FromBytes, IntoBytes};

fn message(opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let header = InHeader {
        len: (size_of::<InHeader>() + body.len()) as u32,
        opcode,
        unique: 2,
        nodeid,
        ..InHeader::default()
    };
    let mut message = header.as_bytes().to_vec();
    message.extend_from_slice(body);
    message
}

/// Hands a message to the dispatcher; `Err` when not even its lengths are right.
fn ask(dispatcher: &Dispatcher, message: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut reply = vec![0; 1 << 20];
    let mut out = ReplyBuf::new(&mut reply);
    let request = Request::parse(message).map_err(|_| Errno::EINVAL)?;
    match dispatcher.dispatch(&request, &mut out) {
        Answer::None => Ok(Vec::new()),
        Answer::Status(result) => result.map(|()| Vec::new()),
        Answer::Buffer => Ok(out.filled().to_vec()),
        Answer::Read(data) => Ok(data.to_vec()),
    }
}

fn dispatcher() -> (Arc<NullFs>, Dispatcher) {
    let fs = Arc::new(NullFs::new(false));
    let dispatcher = Dispatcher::new(fs.clone(), &Config::default());
    (fs, dispatcher)
}

fn make(dispatcher: &Dispatcher, name: &str) -> abi::EntryOut {
    let args = abi::MknodIn { mode: libc::S_IFREG | 0o644, ..Default::default() };
    let body = [args.as_bytes(), name.as_bytes(), &[0]].concat();
    let reply = ask(dispatcher, &message(Opcode::Mknod as u32, abi::ROOT_ID, &body)).unwrap();
    abi::EntryOut::read_from_bytes(&reply).unwrap()
}

fn list(dispatcher: &Dispatcher, opcode: Opcode, offset: u64, size: u32) -> Vec<u8> {
    let args = abi::ReadIn { offset, size, ..Default::default() };
    ask(dispatcher, &message(opcode as u32, abi::ROOT_ID, args.as_bytes())).unwrap()
}

#[test]
fn a_request_shorter_than_its_structure_is_refused() {
    let (_, dispatcher) = dispatcher();
    for opcode in (0..64).filter_map(Opcode::from_wire) {
        for len in 0..opcode.args_len() {
            let message = message(opcode as u32, abi::ROOT_ID, &vec![0; len]);
            assert_eq!(ask(&dispatcher, &message), Err(Errno::EINVAL), "{opcode:?} {len}");
        }
    }
}

#[test]
fn a_name_without_an_end_or_with_a_slash_is_refused() {
    let (_, dispatcher) = dispatcher();
    for (name, errno) in [
        (&b"open"[..], Errno::EINVAL),
        (b"a/b\0", Errno::EINVAL),
        (b"\0", Errno::EINVAL),
        (b"..\0", Errno::EINVAL),
        (&[b'n'; 257][..], Errno::EINVAL),
        (&[[b'n'; 256].as_slice(), &[0]].concat(), Errno::ENAMETOOLONG),
    ] {
        let message = message(Opcode::Unlink as u32, abi::ROOT_ID, name);
        assert_eq!(ask(&dispatcher, &message), Err(errno));
    }
}

#[test]
fn a_write_with_less_data_than_it_says_is_refused() {
    let (_, dispatcher) = dispatcher();
    let node = make(&dispatcher, "f").nodeid;
    let args = abi::WriteIn { size: 100, ..Default::default() };
    let body = [args.as_bytes(), &[7; 99]].concat();
    let message = message(Opcode::Write as u32, node, &body);
    assert_eq!(ask(&dispatcher, &message), Err(Errno::EINVAL));
}

#[test]
fn an_extended_attribute_is_asked_for_by_size() {
    let (_, dispatcher) = dispatcher();
    let node = make(&dispatcher, "f").nodeid;
    let args = abi::SetxattrIn { size: 5, ..Default::default() };
    let body = [args.as_bytes(), b"user.a\0", b"value"].concat();
    ask(&dispatcher, &message(Opcode::Setxattr as u32, node, &body)).unwrap();
    let get = |size: u32| {
        let args = abi::GetxattrIn { size, padding: 0 };
        let body = [args.as_bytes(), b"user.a\0"].concat();
        ask(&dispatcher, &message(Opcode::Getxattr as u32, node, &body))
    };
    assert_eq!(get(0).unwrap(), abi::GetxattrOut { size: 5, padding: 0 }.as_bytes());
    assert_eq!(get(4), Err(Errno::ERANGE));
    assert_eq!(get(5).unwrap(), b"value");
    assert_eq!(get(50).unwrap(), b"value");
}

#[test]
fn readdirplus_counts_exactly_the_inodes_it_sent() {
    let (fs, dispatcher) = dispatcher();
    for index in 0..50 {
        make(&dispatcher, &format!("file-{index}"));
    }
    let before = fs.counted().1;
    let reply = list(&dispatcher, Opcode::Readdirplus, 0, 1000);
    let mut rest = &reply[..];
    let mut sent = 0;
    while !rest.is_empty() {
        let (entry, tail) = abi::EntryOut::read_from_prefix(rest).unwrap();
        let (dirent, tail) = abi::Dirent::read_from_prefix(tail).unwrap();
        let name = &tail[..dirent.namelen as usize];
        assert_eq!(entry.nodeid == 0, name == b"." || name == b"..");
        sent += u64::from(entry.nodeid != 0);
        rest = &tail[abi::rec_align(name.len())..];
    }
    assert!(sent > 2 && sent < 50);
    assert_eq!(fs.counted().1 - before, sent);
}

#[test]
fn the_root_has_the_kernels_node_and_its_own_inode_number() {
    let (_, dispatcher) = dispatcher();
    let reply = ask(&dispatcher, &message(Opcode::Lookup as u32, abi::ROOT_ID, b".\0")).unwrap();
    let entry = abi::EntryOut::read_from_bytes(&reply).unwrap();
    assert_eq!((entry.nodeid, entry.attr.ino), (abi::ROOT_ID, 2));
}

#[test]
fn a_name_that_is_not_there_is_remembered() {
    let (_, dispatcher) = dispatcher();
    let reply = ask(&dispatcher, &message(Opcode::Lookup as u32, abi::ROOT_ID, b"x\0")).unwrap();
    let entry = abi::EntryOut::read_from_bytes(&reply).unwrap();
    assert_eq!((entry.nodeid, entry.entry_valid), (0, 86400));
}

#[test]
fn destroy_unmounts_once_and_then_nothing_is_served() {
    let (fs, dispatcher) = dispatcher();
    for _ in 0..2 {
        ask(&dispatcher, &message(Opcode::Destroy as u32, 0, &[])).unwrap();
    }
    dispatcher.unmount().unwrap();
    assert_eq!(fs.unmounts(), 1);
    let message = message(Opcode::Statfs as u32, abi::ROOT_ID, &[]);
    assert_eq!(ask(&dispatcher, &message), Err(Errno::ENODEV));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bytes_make_it_panic(
        opcode in 0_u32..60,
        node in 0_u64..20,
        body in proptest::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 0..200),
        lie in proptest::option::of(any::<(u32, u16)>()),
    ) {
        let (_, dispatcher) = dispatcher();
        make(&dispatcher, "a");
        let mut message = message(opcode, node, &body);
        if let Some((len, extlen)) = lie {
            message[..4].copy_from_slice(len.as_bytes());
            message[36..38].copy_from_slice(extlen.as_bytes());
        }
        let _ = ask(&dispatcher, &message);
    }

    #[test]
    fn no_raw_message_makes_it_panic(message in proptest::collection::vec(any::<u8>(), 0..120)) {
        let (_, dispatcher) = dispatcher();
        let _ = ask(&dispatcher, &message);
    }
}
