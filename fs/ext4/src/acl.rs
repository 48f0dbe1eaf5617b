//! POSIX ACLs: inheritance, the mode they stand for, and what programs see of them.
//!
//! An access ACL that says no more than the nine permission bits is not stored. The
//! bits of the mode and the entries they stand for (owner, mask or group, other) are
//! kept equal: by setting an ACL, by chmod, and at creation, where a directory's default
//! ACL takes the umask's place.
//!
//! Locks: the inode's `rwsem`, as for attributes.

use uext_jbd2::Handle;
use uext_ondisk::acl::{Acl, AclEntry, AclTag};
use uext_ondisk::xattr::NameIndex;
use uext_vfs::{Context, Errno, FileKind, XattrFlags};

use crate::credits;
use crate::error::Result;
use crate::fs::Ext4;
use crate::inode::Inode;
use crate::xattr::XattrName;

const S_ISGID: u16 = 0o2000;
const PERMISSIONS: u16 = 0o777;

const ACCESS: XattrName<'static> = XattrName { index: NameIndex::POSIX_ACL_ACCESS, rest: b"" };
const DEFAULT: XattrName<'static> = XattrName { index: NameIndex::POSIX_ACL_DEFAULT, rest: b"" };

/// What a new inode inherits.
#[derive(Clone, Debug)]
pub(crate) struct NewAcls {
    /// Type and permission bits it gets.
    pub mode: u16,
    access: Option<Acl>,
    default: Option<Acl>,
}

/// The three permission bits of a mode from `shift` on.
fn bits(mode: u16, shift: u32) -> u8 {
    // Three bits.
    #[allow(clippy::cast_possible_truncation)]
    let bits = (mode >> shift & 7) as u8;
    bits
}

/// Cuts an inherited ACL by the mode a file is created with, and the mode by the ACL
/// (`posix_acl_create_masq`).
fn mask_for_creation(acl: &Acl, mode: u16) -> Result<(Acl, u16)> {
    let has_mask = acl.entries().iter().any(|entry| entry.tag == AclTag::Mask);
    let mut entries = acl.entries().to_vec();
    let mut result = mode & !PERMISSIONS;
    for entry in &mut entries {
        let shift = match entry.tag {
            AclTag::UserObj => 6,
            AclTag::Other => 0,
            AclTag::Mask => 3,
            AclTag::GroupObj if !has_mask => 3,
            _ => continue,
        };
        entry.perm &= bits(mode, shift);
        result |= u16::from(entry.perm) << shift;
    }
    Ok((Acl::new(entries)?, result))
}

/// Puts a mode's bits into an ACL (`posix_acl_chmod_masq`).
fn mask_for_chmod(acl: &Acl, mode: u16) -> Result<Acl> {
    let has_mask = acl.entries().iter().any(|entry| entry.tag == AclTag::Mask);
    let change = |entry: &AclEntry| {
        let perm = match entry.tag {
            AclTag::UserObj => bits(mode, 6),
            AclTag::Other => bits(mode, 0),
            AclTag::Mask => bits(mode, 3),
            AclTag::GroupObj if !has_mask => bits(mode, 3),
            _ => entry.perm,
        };
        AclEntry { perm, ..*entry }
    };
    Ok(Acl::new(acl.entries().iter().map(change).collect())?)
}

impl Ext4 {
    /// An ACL of an inode, whose lock is held.
    fn acl_of(&self, inode: &Inode, name: XattrName<'_>) -> Result<Option<Acl>> {
        match self.xattr_value(inode, name)? {
            Some(value) => Ok(Some(Acl::from_disk(&value).map_err(|c| c.in_inode(inode.ino))?)),
            None => Ok(None),
        }
    }

    /// The value of an ACL attribute as programs see it.
    pub(crate) fn acl_to_user(&self, inode: &Inode, value: &[u8]) -> Result<Vec<u8>> {
        Ok(Acl::from_disk(value).map_err(|c| c.in_inode(inode.ino))?.to_xattr())
    }

    /// What a file made in a directory gets: its mode, cut by the directory's default ACL or by
    /// the umask, and ACLs. The directory's lock is held.
    pub(crate) fn plan_acls(&self, dir: &Inode, mode: u16, umask: u32) -> Result<NewAcls> {
        let none = |mode| NewAcls { mode, access: None, default: None };
        let kind = FileKind::from_mode(u32::from(mode));
        if kind == Some(FileKind::Symlink) {
            return Ok(none(mode));
        }
        // Nine bits.
        #[allow(clippy::cast_possible_truncation)]
        let masked = mode & !(umask as u16 & PERMISSIONS);
        if !self.options.acl {
            return Ok(none(masked));
        }
        let Some(inherited) = self.acl_of(dir, DEFAULT)? else { return Ok(none(masked)) };
        let (access, mode) = mask_for_creation(&inherited, mode)?;
        let (_, says_no_more) = access.mode();
        Ok(NewAcls {
            mode,
            access: (!says_no_more).then_some(access),
            default: (kind == Some(FileKind::Directory)).then_some(inherited),
        })
    }

    /// Stores what a new inode inherits.
    ///
    /// # Errors
    /// `ENOSPC`.
    pub(crate) fn apply_acls(&self, handle: &Handle, inode: &Inode, acls: &NewAcls) -> Result<()> {
        if acls.access.is_none() && acls.default.is_none() {
            return Ok(());
        }
        // The body's attributes need the raw inode.
        self.mark_inode_dirty(handle, inode)?;
        for (name, acl) in [(DEFAULT, &acls.default), (ACCESS, &acls.access)] {
            if let Some(acl) = acl {
                let value = acl.to_disk();
                self.write_xattr(handle, inode, name, Some(&value), XattrFlags::empty())?;
            }
        }
        Ok(())
    }

    /// setxattr(2) of an ACL, in the form of programs; the inode's lock is held.
    pub(crate) fn set_user_acl(
        &self,
        ctx: &Context,
        inode: &Inode,
        name: XattrName<'_>,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        if inode.kind == FileKind::Symlink {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let owner = inode.core.lock().uid;
        // Whom the kernel does not name it has checked.
        if ![0, owner, Context::UNKNOWN].contains(&ctx.uid) {
            return Err(Errno::EPERM.into());
        }
        let mut acl = if value.is_empty() {
            None
        } else {
            Acl::from_xattr(value).map_err(|_| Errno::EINVAL)?
        };
        if name == DEFAULT && !inode.kind.eq(&FileKind::Directory) {
            return if acl.is_some() { Err(Errno::EACCES.into()) } else { Ok(()) };
        }
        let handle = self.start_for(ctx, credits::SETATTR + credits::XATTR)?;
        let mut new_mode = None;
        if name == ACCESS
            && let Some(access) = &acl
        {
            let (permissions, says_no_more) = access.mode();
            let mut mode = (inode.core.lock().mode & !PERMISSIONS) | permissions;
            if flags.contains(XattrFlags::ACL_KILL_SGID) {
                mode &= !S_ISGID;
            }
            new_mode = Some(mode);
            if says_no_more {
                acl = None;
            }
        }
        let stored = acl.map(|acl| acl.to_disk());
        match self.write_xattr(&handle, inode, name, stored.as_deref(), XattrFlags::empty()) {
            // Nothing to remove.
            Err(error) if stored.is_none() && error.is(Errno::ENODATA) => {}
            done => done?,
        }
        if let Some(mode) = new_mode {
            let now = self.now();
            let mut core = inode.core.lock();
            core.mode = mode;
            core.ctime = now;
        }
        self.mark_inode_dirty(&handle, inode)
    }

    /// The mode changed: so must the access ACL. `core.mode` has the new mode already, and the
    /// caller writes the inode.
    pub(crate) fn chmod_acl(&self, handle: &Handle, inode: &Inode) -> Result<()> {
        if !self.options.acl || inode.kind == FileKind::Symlink {
            return Ok(());
        }
        let Some(acl) = self.acl_of(inode, ACCESS)? else { return Ok(()) };
        let mode = inode.core.lock().mode;
        let value = mask_for_chmod(&acl, mode)?.to_disk();
        self.write_xattr(handle, inode, ACCESS, Some(&value), XattrFlags::empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(AclTag, u8)]) -> Acl {
        let entries = entries.iter().map(|&(tag, perm)| AclEntry { tag, perm }).collect();
        Acl::new(entries).expect("valid")
    }

    #[test]
    fn a_default_acl_cuts_the_mode_and_is_cut_by_it() {
        let inherited = acl(&[
            (AclTag::UserObj, 7),
            (AclTag::User(5), 7),
            (AclTag::GroupObj, 7),
            (AclTag::Mask, 5),
            (AclTag::Other, 4),
        ]);

        let (access, mode) = mask_for_creation(&inherited, 0o100_662).unwrap();

        assert_eq!(mode, 0o100_640);
        let expected = acl(&[
            (AclTag::UserObj, 6),
            (AclTag::User(5), 7),
            (AclTag::GroupObj, 7),
            (AclTag::Mask, 4),
            (AclTag::Other, 0),
        ]);
        assert_eq!(access, expected);
    }

    #[test]
    fn chmod_changes_the_mask_and_not_the_group_behind_it() {
        let before = acl(&[
            (AclTag::UserObj, 7),
            (AclTag::GroupObj, 5),
            (AclTag::Group(9), 7),
            (AclTag::Mask, 7),
            (AclTag::Other, 0),
        ]);

        let after = mask_for_chmod(&before, 0o100_421).unwrap();

        let expected = acl(&[
            (AclTag::UserObj, 4),
            (AclTag::GroupObj, 5),
            (AclTag::Group(9), 7),
            (AclTag::Mask, 2),
            (AclTag::Other, 1),
        ]);
        assert_eq!(after, expected);
    }
}
