//! Extended attributes: in the inode's body as long as they fit, then in a block.
//!
//! Source: Documentation/filesystems/ext4/attributes.rst. Both places are read whole into
//! an [`XattrSet`], changed, and written back whole. A new or changed attribute goes
//! into the body if it fits there beside the others, else into the block; an attribute
//! stands in one of the two only.
//!
//! A block may be shared by inodes with the same attributes (see [`crate::xattr_share`]). It
//! is changed in place only by its single owner; else the inode gets a share of one that holds
//! the same, or a block of its own, and gives its old share back.
//!
//! Locks: `rwsem` of the inode, shared to look and exclusively to change; what takes a
//! handle expects the caller to hold it. `h_refcount` is changed under the block's write
//! guard only.

use std::cell::LazyCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use uext_jbd2::Handle;
use uext_ondisk::features::{Compat, Features};
use uext_ondisk::inode::Inode as RawView;
use uext_ondisk::inode::InodeFlags;
use uext_ondisk::xattr::{
    NAME_MAX, NameIndex, OwnedValue, REFCOUNT_MAX, SetError, VALUE_MAX, XattrArea, XattrSet,
    set_block_checksum, set_block_refcount,
};
use uext_ondisk::{Corrupt, FsBlock, InodeNumber};
use uext_pagecache::Buffer;
use uext_vfs::{Context, Errno, FileKind, ReadReply, XattrFlags};

use crate::credits;
use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;
use crate::xattr_share::{Known, hash_of};

const S_ISVTX: u16 = 0o1000;
/// Longest list of names Linux passes through (`XATTR_LIST_MAX`), bytes.
const LIST_MAX: usize = 65_536;

/// An attribute's name, split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct XattrName<'a> {
    pub index: NameIndex,
    pub rest: &'a [u8],
}

impl<'a> XattrName<'a> {
    /// Splits a full name.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a prefix ext4 does not have, `EINVAL` for a bare prefix, `ERANGE` for
    /// a name out of bounds.
    pub fn parse(name: &'a [u8]) -> Result<Self> {
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(Errno::ERANGE.into());
        }
        if matches!(name, b"user." | b"trusted." | b"security.") {
            return Err(Errno::EINVAL.into());
        }
        match NameIndex::split(name) {
            Some((NameIndex::SYSTEM, _)) | None => Err(Errno::EOPNOTSUPP.into()),
            Some((index, rest)) => Ok(Self { index, rest }),
        }
    }

    fn is_acl(&self) -> bool {
        matches!(self.index, NameIndex::POSIX_ACL_ACCESS | NameIndex::POSIX_ACL_DEFAULT)
    }
}

/// What a program may do whoever runs it.
const CAPABILITY: XattrName<'static> =
    XattrName { index: NameIndex::SECURITY, rest: b"capability" };

/// The attributes of an inode in both places.
#[derive(Clone, Debug, Default)]
struct Places {
    body: XattrSet,
    block: XattrSet,
}

fn set_error(error: SetError) -> Error {
    match error {
        SetError::Name(_) => Errno::ERANGE.into(),
        SetError::NoSpace { .. } => Errno::ENOSPC.into(),
    }
}

impl Ext4 {
    fn xattr_error(&self, inode: &Inode, corrupt: Corrupt) -> Error {
        corrupt.in_inode(inode.ino).into()
    }

    /// The attributes in the inode's body, and the bytes there are for them.
    fn body_xattrs(&self, inode: &Inode) -> Result<(XattrSet, usize)> {
        let (buffer, offset) = self.inode_buffer(inode.ino)?;
        let table = buffer.read();
        let raw = RawView::new(&table[offset..offset + usize::from(self.sb.inode_size())])?;
        let area = raw.xattr_area();
        let set = XattrArea::ibody(area)
            .map_err(|c| self.xattr_error(inode, c))?
            .map_or_else(XattrSet::new, XattrSet::from);
        Ok((set, area.len()))
    }

    /// Reads and checks the inode's attribute block; `None` when it has none.
    fn xattr_block(&self, inode: &Inode) -> Result<Option<Buffer>> {
        let number = inode.core.lock().file_acl;
        if number.0 == 0 {
            return Ok(None);
        }
        let place = |c: Corrupt| self.xattr_error(inode, c.in_block(number));
        if !self.is_data_range(number, 1) {
            let detail = "the attribute block is outside the data area";
            return Err(place(Corrupt::value("inode", detail)));
        }
        let buffer = self.buffers.bread(number.0)?;
        let bytes = buffer.read();
        let area = XattrArea::block(&bytes).map_err(place)?;
        if self.sb.features().metadata_csum() && !buffer.is_verified() {
            area.verify_checksum(self.sb.csum_seed(), number).map_err(place)?;
            buffer.set_verified();
        }
        let shares = area.header().map_or(0, |header| header.h_refcount.get());
        if shares == 0 || shares > REFCOUNT_MAX {
            let detail = format!("h_refcount is {shares}");
            return Err(place(Corrupt::value("extended attributes", detail)));
        }
        drop(bytes);
        Ok(Some(buffer))
    }

    fn block_xattrs(&self, inode: &Inode) -> Result<XattrSet> {
        let Some(buffer) = self.xattr_block(inode)? else { return Ok(XattrSet::new()) };
        let bytes = buffer.read();
        let area = XattrArea::block(&bytes).map_err(|c| self.xattr_error(inode, c))?;
        let (set, hash) = (XattrSet::from(area), hash_of(&bytes));
        drop(bytes);
        self.xattr_share.lock().add(hash, FsBlock(buffer.block()));
        Ok(set)
    }

    /// The value of an attribute; the inode's lock is held.
    pub(crate) fn xattr_value(
        &self,
        inode: &Inode,
        name: XattrName<'_>,
    ) -> Result<Option<Vec<u8>>> {
        let none = &inode.data.no_xattrs;
        // WHY-RELAXED: the inode's lock, which is held, orders it.
        if none.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (body, _) = self.body_xattrs(inode)?;
        let value = match body.get(name.index, name.rest) {
            Some(value) => Some(value.clone()),
            None => {
                let block = self.block_xattrs(inode)?;
                // WHY-RELAXED: as above; who shares the lock finds the same.
                none.store(body.is_empty() && block.is_empty(), Ordering::Relaxed);
                block.get(name.index, name.rest).cloned()
            }
        };
        match value {
            None => Ok(None),
            Some(OwnedValue::Inline(value)) => Ok(Some(value)),
            Some(OwnedValue::Inode { inode: holder, size, .. }) => {
                self.held_value(inode, holder, size).map(Some)
            }
        }
    }

    /// A value that lies in an inode of its own (images with ea_inode, which are read-only).
    fn held_value(&self, inode: &Inode, holder: InodeNumber, size: u32) -> Result<Vec<u8>> {
        let bad =
            |detail: String| self.xattr_error(inode, Corrupt::value("extended attributes", detail));
        let len = size as usize;
        if len > VALUE_MAX {
            return Err(bad(format!("a value of {len} bytes")));
        }
        let value_inode = self.iget(holder)?;
        let (flags, held) = {
            let core = value_inode.core.lock();
            (core.flags, core.size)
        };
        if !flags.contains(InodeFlags::EA_INODE) || held != u64::from(size) {
            return Err(bad(format!("inode {holder} does not hold the value of {size} bytes")));
        }
        let mut reply = ReadReply::new();
        self.file_read(&value_inode, 0, len, &mut reply)?;
        Ok(reply.to_vec())
    }

    /// Who may use an attribute: `user.` is for files and directories, `trusted.` for root.
    fn check_xattr_access(
        &self,
        ctx: &Context,
        inode: &Inode,
        name: XattrName<'_>,
        change: bool,
    ) -> Result<()> {
        let core = inode.core.lock();
        if change && core.flags.intersects(InodeFlags::APPEND | InodeFlags::IMMUTABLE) {
            return Err(Errno::EPERM.into());
        }
        let refusal = if change { Errno::EPERM } else { Errno::ENODATA };
        // Whom the kernel does not name it has checked.
        let is_root = ctx.uid == 0 || ctx.uid == Context::UNKNOWN;
        match name.index {
            NameIndex::TRUSTED if !is_root => Err(refusal.into()),
            NameIndex::USER if !self.options.user_xattr => Err(Errno::EOPNOTSUPP.into()),
            NameIndex::USER => match inode.kind {
                FileKind::Regular => Ok(()),
                FileKind::Directory => {
                    let sticky = core.mode & S_ISVTX != 0;
                    if change && sticky && !is_root && ctx.uid != core.uid {
                        return Err(Errno::EPERM.into());
                    }
                    Ok(())
                }
                _ => Err(refusal.into()),
            },
            _ if name.is_acl() && !self.options.acl => Err(Errno::EOPNOTSUPP.into()),
            _ => Ok(()),
        }
    }

    /// The value of an attribute, by its full name.
    ///
    /// # Errors
    /// `ENODATA`, `EOPNOTSUPP`, …
    pub(crate) fn get_xattr(&self, ctx: &Context, inode: &Inode, name: &[u8]) -> Result<Vec<u8>> {
        let name = XattrName::parse(name)?;
        let _shared = inode.rwsem.read();
        self.check_xattr_access(ctx, inode, name, false)?;
        let value = self.xattr_value(inode, name)?.ok_or(Error::Errno(Errno::ENODATA))?;
        if name.is_acl() { self.acl_to_user(inode, &value) } else { Ok(value) }
    }

    /// The full names of an inode's attributes, each ended by a NUL.
    ///
    /// # Errors
    /// `E2BIG` past what Linux passes through.
    pub(crate) fn list_xattr(&self, ctx: &Context, inode: &Inode) -> Result<Vec<u8>> {
        let _shared = inode.rwsem.read();
        let (body, _) = self.body_xattrs(inode)?;
        let block = self.block_xattrs(inode)?;
        let mut list = Vec::new();
        let is_root = LazyCell::new(|| ctx.is_root());
        for entry in body.entries().iter().chain(block.entries()) {
            let shown = match entry.index {
                NameIndex::USER => self.options.user_xattr,
                NameIndex::POSIX_ACL_ACCESS | NameIndex::POSIX_ACL_DEFAULT => self.options.acl,
                NameIndex::TRUSTED => *is_root,
                NameIndex::SECURITY => true,
                _ => false,
            };
            if let (true, Some(prefix)) = (shown, entry.index.prefix()) {
                list.extend_from_slice(prefix.as_bytes());
                list.extend_from_slice(&entry.name);
                list.push(0);
            }
        }
        if list.len() > LIST_MAX { Err(Errno::E2BIG.into()) } else { Ok(list) }
    }

    /// Sets an attribute, by its full name.
    ///
    /// # Errors
    /// `EEXIST`, `ENODATA`, `ENOSPC`, `ERANGE`, `E2BIG`, `EPERM`, `EOPNOTSUPP`, …
    pub(crate) fn set_xattr(
        &self,
        ctx: &Context,
        inode: &Arc<Inode>,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        let name = XattrName::parse(name)?;
        if value.len() > VALUE_MAX {
            return Err(Errno::E2BIG.into());
        }
        self.check_writable()?;
        self.with_space(|| {
            let _exclusive = inode.rwsem.write();
            self.check_xattr_access(ctx, inode, name, true)?;
            if name.is_acl() {
                return self.set_user_acl(ctx, inode, name, value, flags);
            }
            let handle = self.start_for(ctx, credits::SETATTR + credits::XATTR)?;
            self.write_xattr(&handle, inode, name, Some(value), flags)
        })
    }

    /// Removes an attribute, by its full name.
    ///
    /// # Errors
    /// `ENODATA`, `EPERM`, `EOPNOTSUPP`, …
    pub(crate) fn remove_xattr(
        &self,
        ctx: &Context,
        inode: &Arc<Inode>,
        name: &[u8],
    ) -> Result<()> {
        let name = XattrName::parse(name)?;
        self.check_writable()?;
        self.with_space(|| {
            let _exclusive = inode.rwsem.write();
            self.check_xattr_access(ctx, inode, name, true)?;
            let handle = self.start(credits::SETATTR + credits::XATTR)?;
            let done = self.write_xattr(&handle, inode, name, None, XattrFlags::REPLACE);
            match done {
                // Linux removes an ACL that is not there without a word.
                Err(error) if name.is_acl() && error.is(Errno::ENODATA) => Ok(()),
                done => done,
            }
        })
    }

    /// Removes `security.capability`, which does not outlive a change of the file's data or
    /// owner; the inode's lock is held exclusively.
    pub(crate) fn kill_capability(&self, inode: &Inode) -> Result<()> {
        let known = &inode.data.no_capability;
        // WHY-RELAXED: the inode's lock, held exclusively, orders it.
        if known.load(Ordering::Relaxed) || inode.kind != FileKind::Regular {
            return Ok(());
        }
        if self.xattr_value(inode, CAPABILITY)?.is_some() {
            let handle = self.start(credits::XATTR + credits::SETATTR)?;
            self.write_xattr(&handle, inode, CAPABILITY, None, XattrFlags::empty())?;
        }
        known.store(true, Ordering::Relaxed); // WHY-RELAXED: as above.
        Ok(())
    }

    /// Sets or removes an attribute under a handle and notes the time; the inode's lock is held.
    ///
    /// # Errors
    /// `EEXIST`, `ENODATA`, `ENOSPC`; nothing is changed then.
    pub(crate) fn write_xattr(
        &self,
        handle: &Handle,
        inode: &Inode,
        name: XattrName<'_>,
        value: Option<&[u8]>,
        flags: XattrFlags,
    ) -> Result<()> {
        let (body, room) = self.body_xattrs(inode)?;
        let old = Places { body, block: self.block_xattrs(inode)? };
        let exists = old.body.get(name.index, name.rest).is_some()
            || old.block.get(name.index, name.rest).is_some();
        if exists && flags.contains(XattrFlags::CREATE) {
            return Err(Errno::EEXIST.into());
        }
        if !exists && (flags.contains(XattrFlags::REPLACE) || value.is_none()) {
            return Err(Errno::ENODATA.into());
        }
        let new = self.place_xattr(&old, name, value, room)?;
        // WHY-RELAXED: the inode's lock, held exclusively, orders it.
        inode.data.no_xattrs.store(false, Ordering::Relaxed);
        if name == CAPABILITY {
            inode.data.no_capability.store(false, Ordering::Relaxed);
        }
        // The block first: it is what may not be had.
        if new.block != old.block {
            self.write_xattr_block(handle, inode, &new.block)?;
        }
        inode.core.lock().ctime = self.now();
        self.mark_inode_dirty(handle, inode)?;
        if new.body != old.body {
            self.write_xattr_body(handle, inode, &new.body)?;
        }
        self.note_xattrs(handle)
    }

    /// Where everything stands after an attribute was set or removed.
    fn place_xattr(
        &self,
        old: &Places,
        name: XattrName<'_>,
        value: Option<&[u8]>,
        room: usize,
    ) -> Result<Places> {
        let mut without = old.clone();
        let in_body = without.body.remove(name.index, name.rest);
        let in_block = without.block.remove(name.index, name.rest);
        for gone in [&in_body, &in_block] {
            if matches!(gone, Some(OwnedValue::Inode { .. })) {
                return Err(Errno::EOPNOTSUPP.into());
            }
        }
        let Some(value) = value else { return Ok(without) };
        let set = |set: &mut XattrSet| {
            set.set(name.index, name.rest, OwnedValue::Inline(value.to_vec())).map_err(set_error)
        };
        // Where it stood it keeps its place among the others.
        let mut body = if in_body.is_some() { old.body.clone() } else { without.body.clone() };
        set(&mut body)?;
        if room > 0 && body.fits_ibody(room) {
            return Ok(Places { body, block: without.block });
        }
        let mut block = without.block;
        set(&mut block)?;
        if block.fits_block(self.block_size() as usize) {
            return Ok(Places { body: without.body, block });
        }
        Err(Errno::ENOSPC.into())
    }

    fn write_xattr_body(&self, handle: &Handle, inode: &Inode, set: &XattrSet) -> Result<()> {
        let (buffer, offset) = self.inode_buffer(inode.ino)?;
        let mut table = handle.write(&buffer)?;
        let bytes = &mut table[offset..offset + usize::from(self.sb.inode_size())];
        set.write_ibody(RawView::new(&mut *bytes)?.xattr_area_mut()).map_err(set_error)?;
        self.seal_inode(inode, bytes)
    }

    /// Gives the inode a block with these attributes, or none.
    ///
    /// # Errors
    /// `ENOSPC`; nothing is changed then.
    fn write_xattr_block(&self, handle: &Handle, inode: &Inode, set: &XattrSet) -> Result<()> {
        let old = self.xattr_block(inode)?;
        if set.is_empty() {
            return self.delete_xattr_block(handle, inode);
        }
        let mut wanted = vec![0; self.block_size() as usize];
        set.write_block(&mut wanted, 1).map_err(set_error)?;
        let mut known = self.xattr_share.lock();
        let own = old.as_ref().map(|buffer| FsBlock(buffer.block()));
        if let Some(shared) = self.share_xattr_block(handle, &mut known, &wanted, own)? {
            self.drop_xattr_share(handle, &mut known, inode)?;
            self.own_xattr_block(inode, shared);
            return Ok(());
        }
        if let Some(buffer) = &old {
            let number = FsBlock(buffer.block());
            let mut bytes = handle.write(buffer)?;
            let shares = XattrArea::block(&bytes)
                .map_err(|c| self.xattr_error(inode, c))?
                .header()
                .map_or(0, |header| header.h_refcount.get());
            if shares == 1 {
                known.remove(hash_of(&bytes), number);
                bytes.copy_from_slice(&wanted);
                set_block_checksum_if(self, &mut bytes, number)?;
                known.add(hash_of(&wanted), number);
                return Ok(());
            }
        }
        let number = self.new_meta_block(handle, self.goal_for(inode))?;
        let buffer = self.buffers.getblk(number.0);
        {
            let mut bytes = handle.create(&buffer)?;
            bytes.copy_from_slice(&wanted);
            set_block_checksum_if(self, &mut bytes, number)?;
            buffer.set_verified();
        }
        known.add(hash_of(&wanted), number);
        self.drop_xattr_share(handle, &mut known, inode)?;
        self.own_xattr_block(inode, number);
        Ok(())
    }

    /// The inode has this attribute block now; the caller writes the inode.
    fn own_xattr_block(&self, inode: &Inode, number: FsBlock) {
        let mut core = inode.core.lock();
        core.file_acl = number;
        core.blocks += u64::from(self.block_size() / 512);
    }

    /// Takes the inode's share of its attribute block away, and frees the block with the last
    /// one. The caller writes the inode.
    pub(crate) fn delete_xattr_block(&self, handle: &Handle, inode: &Inode) -> Result<()> {
        self.drop_xattr_share(handle, &mut self.xattr_share.lock(), inode)
    }

    fn drop_xattr_share(&self, handle: &Handle, known: &mut Known, inode: &Inode) -> Result<()> {
        let Some(buffer) = self.xattr_block(inode)? else { return Ok(()) };
        let number = FsBlock(buffer.block());
        let last = {
            let mut bytes = handle.write(&buffer)?;
            let shares = XattrArea::block(&bytes)
                .map_err(|c| self.xattr_error(inode, c))?
                .header()
                .map_or(0, |header| header.h_refcount.get());
            if shares > 1 {
                set_block_refcount(&mut bytes, shares - 1)?;
                set_block_checksum_if(self, &mut bytes, number)?;
            } else {
                known.remove(hash_of(&bytes), number);
            }
            shares <= 1
        };
        if last {
            self.free_blocks(handle, number, 1, true)?;
        }
        let mut core = inode.core.lock();
        core.file_acl = FsBlock(0);
        core.blocks = core.blocks.saturating_sub(u64::from(self.block_size() / 512));
        Ok(())
    }

    /// Notes in the superblock that attributes are in use, which old images may not say yet.
    fn note_xattrs(&self, handle: &Handle) -> Result<()> {
        let known = self.with_super(|sb| sb.features().compat.contains(Compat::EXT_ATTR));
        if known {
            return Ok(());
        }
        let mut done = Ok(());
        self.update_super(handle, |sb| {
            let features = sb.features();
            let compat = features.compat | Compat::EXT_ATTR;
            done = sb.set_features(Features { compat, ..features });
        })?;
        Ok(done?)
    }
}

/// Sets the checksum of an attribute block where the filesystem has checksums.
pub(crate) fn set_block_checksum_if(fs: &Ext4, bytes: &mut [u8], number: FsBlock) -> Result<()> {
    if fs.sb.features().metadata_csum() {
        set_block_checksum(bytes, fs.sb.csum_seed(), number)?;
    }
    Ok(())
}
