//! Extended attributes and ACLs against e2fsck, debugfs and a model.
#![allow(clippy::unwrap_used, missing_docs)]

mod names_common;

use std::collections::BTreeMap;

use names_common::{Image, ROOT, Random, mkdir, touch};
use uext_ext4::Ext4;
use uext_ondisk::acl::{Acl, AclEntry, AclTag};
use uext_vfs::{Context, Errno, FileSystem, Ino, SetAttr, XattrFlags};

const ANY: XattrFlags = XattrFlags::empty();
const KINDS: [&[&str]; 4] = [
    &["-t", "ext4", "-b", "1024"],
    &["-t", "ext4", "-b", "4096"],
    &["-t", "ext2", "-b", "1024", "-I", "128"],
    &["-t", "ext3", "-b", "4096", "-I", "256"],
];

fn set(fs: &Ext4, ino: Ino, name: &str, value: &[u8]) -> Result<(), Errno> {
    fs.setxattr(&ROOT, ino, name.as_bytes(), value, ANY)
}

fn get(fs: &Ext4, ino: Ino, name: &str) -> Result<Vec<u8>, Errno> {
    fs.getxattr(&ROOT, ino, name.as_bytes())
}

fn names(fs: &Ext4, ino: Ino) -> Vec<String> {
    let list = fs.listxattr(&ROOT, ino).unwrap();
    let mut names: Vec<String> = list
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn random_attributes_agree_with_a_model() {
    for (seed, args) in (1u64..).zip(KINDS) {
        let image = Image::new(16, args);
        let fs = image.mount();
        let file = touch(&fs, fs.root(), b"file").unwrap().attr.ino;
        let mut random = Random(seed);
        let mut model: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for step in 0..3000 {
            let prefix = ["user.", "trusted.", "security."][random.below(3) as usize];
            let name =
                format!("{prefix}{}", "abcdefghijkl".get(..1 + random.below(12) as usize).unwrap());
            let value = vec![step as u8; random.below(300) as usize];
            match random.below(4) {
                0 => {
                    let expected = model.remove(&name).map(drop).ok_or(Errno::ENODATA);
                    let done = fs.removexattr(&ROOT, file, name.as_bytes());
                    assert_eq!(done, expected, "{args:?}, seed {seed}, step {step}");
                }
                _ => match set(&fs, file, &name, &value) {
                    Ok(()) => drop(model.insert(name, value)),
                    Err(errno) => assert_eq!(errno, Errno::ENOSPC, "step {step}"),
                },
            }
            assert_eq!(names(&fs, file), model.keys().cloned().collect::<Vec<_>>(), "step {step}");
        }
        for (name, value) in &model {
            assert_eq!(&get(&fs, file, name).unwrap(), value);
        }
        image.check(&fs);
        let fs = image.mount();
        for (name, value) in &model {
            assert_eq!(&get(&fs, file, name).unwrap(), value);
        }
        let free = fs.statfs(&ROOT).unwrap().bfree;
        let blocks = fs.getattr(&ROOT, file).unwrap().blocks;
        fs.unlink(&ROOT, fs.root(), b"file").unwrap();
        fs.sync().unwrap();
        let freed = fs.statfs(&ROOT).unwrap().bfree - free;
        assert_eq!(freed * u64::from(fs.statfs(&ROOT).unwrap().bsize) / 512, blocks);
        image.check(&fs);
    }
}

#[test]
fn refusals_are_those_of_the_kernel() {
    let image = Image::new(16, &["-t", "ext4", "-b", "4096"]);
    let fs = image.mount();
    let root = fs.root();
    let file = touch(&fs, root, b"file").unwrap().attr.ino;
    let fifo = fs.mknod(&ROOT, root, b"fifo", libc::S_IFIFO | 0o644, 0).unwrap().attr.ino;
    let user = Context { uid: 1000, gid: 1000, pid: 0, umask: 0 };

    assert_eq!(get(&fs, file, "user.a").unwrap_err(), Errno::ENODATA);
    assert_eq!(get(&fs, file, "other.a").unwrap_err(), Errno::EOPNOTSUPP);
    assert_eq!(get(&fs, file, "user.").unwrap_err(), Errno::EINVAL);
    assert_eq!(
        set(&fs, file, &format!("user.{}", "n".repeat(300)), b"").unwrap_err(),
        Errno::ERANGE
    );
    assert_eq!(set(&fs, file, "user.big", &[1; 4096]).unwrap_err(), Errno::ENOSPC);
    assert_eq!(set(&fs, file, "user.big", &[1; 65_537]).unwrap_err(), Errno::E2BIG);
    assert_eq!(set(&fs, fifo, "user.a", b"1").unwrap_err(), Errno::EPERM);
    set(&fs, fifo, "trusted.a", b"1").unwrap();
    let with = |name: &[u8], flags| fs.setxattr(&ROOT, file, name, b"v", flags);
    assert_eq!(with(b"user.a", XattrFlags::REPLACE).unwrap_err(), Errno::ENODATA);
    with(b"user.a", XattrFlags::CREATE).unwrap();
    assert_eq!(with(b"user.a", XattrFlags::CREATE).unwrap_err(), Errno::EEXIST);
    assert_eq!(fs.getxattr(&user, fifo, b"trusted.a").unwrap_err(), Errno::ENODATA);
    assert_eq!(fs.setxattr(&user, fifo, b"trusted.a", b"", ANY).unwrap_err(), Errno::EPERM);
    assert!(fs.listxattr(&user, fifo).unwrap().is_empty());
    fs.forget(fifo, 1);
    image.check(&fs);
}

fn acl(entries: &[(AclTag, u8)]) -> Vec<u8> {
    let entries = entries.iter().map(|&(tag, perm)| AclEntry { tag, perm }).collect();
    Acl::new(entries).unwrap().to_xattr()
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

#[test]
fn default_acls_are_inherited_and_modes_follow() {
    for args in KINDS {
        let image = Image::new(16, args);
        let fs = image.mount();
        let dir = mkdir(&fs, fs.root(), b"dir").unwrap().attr.ino;
        let inherited = acl(&[
            (AclTag::UserObj, 7),
            (AclTag::User(1234), 6),
            (AclTag::GroupObj, 5),
            (AclTag::Mask, 7),
            (AclTag::Other, 1),
        ]);
        set(&fs, dir, DEFAULT, &inherited).unwrap();
        // The umask does not count where a default ACL is.
        let masked = Context { umask: 0o077, ..ROOT };
        let file = fs.mknod(&masked, dir, b"file", libc::S_IFREG | 0o666, 0).unwrap();
        let sub = fs.mkdir(&masked, dir, b"sub", 0o777).unwrap();

        assert_eq!(file.attr.perm, 0o660);
        let expected = acl(&[
            (AclTag::UserObj, 6),
            (AclTag::User(1234), 6),
            (AclTag::GroupObj, 5),
            (AclTag::Mask, 6),
            (AclTag::Other, 0),
        ]);
        assert_eq!(get(&fs, file.attr.ino, ACCESS).unwrap(), expected);
        assert_eq!(get(&fs, file.attr.ino, DEFAULT).unwrap_err(), Errno::ENODATA);
        assert_eq!(get(&fs, sub.attr.ino, DEFAULT).unwrap(), inherited);
        assert_eq!(sub.attr.perm, 0o771);

        let chmod = SetAttr { mode: Some(0o640), ..SetAttr::default() };
        fs.setattr(&ROOT, file.attr.ino, &chmod).unwrap();
        let expected = acl(&[
            (AclTag::UserObj, 6),
            (AclTag::User(1234), 6),
            (AclTag::GroupObj, 5),
            (AclTag::Mask, 4),
            (AclTag::Other, 0),
        ]);
        assert_eq!(get(&fs, file.attr.ino, ACCESS).unwrap(), expected);

        // An ACL that says what a mode says becomes the mode.
        let plain = acl(&[(AclTag::UserObj, 7), (AclTag::GroupObj, 4), (AclTag::Other, 4)]);
        set(&fs, file.attr.ino, ACCESS, &plain).unwrap();
        assert_eq!(get(&fs, file.attr.ino, ACCESS).unwrap_err(), Errno::ENODATA);
        assert_eq!(fs.getattr(&ROOT, file.attr.ino).unwrap().perm, 0o744);
        assert_eq!(set(&fs, file.attr.ino, DEFAULT, &plain).unwrap_err(), Errno::EACCES);
        assert_eq!(set(&fs, file.attr.ino, ACCESS, b"nonsense").unwrap_err(), Errno::EINVAL);

        fs.forget(file.attr.ino, 1);
        fs.forget(sub.attr.ino, 1);
        image.check(&fs);
    }
}

#[test]
fn without_a_default_acl_the_umask_counts() {
    let image = Image::new(16, &["-t", "ext4"]);
    let fs = image.mount();
    let masked = Context { umask: 0o027, ..ROOT };
    let file = fs.mknod(&masked, fs.root(), b"file", libc::S_IFREG | 0o666, 0).unwrap();
    assert_eq!(file.attr.perm, 0o640);
    fs.forget(file.attr.ino, 1);
    image.check(&fs);
}

#[test]
fn debugfs_reads_what_was_set() {
    let image = Image::new(16, &["-t", "ext4", "-b", "1024"]);
    let fs = image.mount();
    let file = touch(&fs, fs.root(), b"file").unwrap().attr.ino;
    set(&fs, file, "user.small", b"in the inode").unwrap();
    set(&fs, file, "user.large", &[b'x'; 700]).unwrap();
    image.check(&fs);
    assert!(image.debugfs("ea_get file user.small").contains("in the inode"));
    assert!(image.debugfs("ea_get file user.large").contains(&"x".repeat(700)));
}
