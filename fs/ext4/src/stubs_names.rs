//! Replaced by names and attributes.
#![allow(unused_variables, clippy::unnecessary_wraps)]
use std::sync::Arc;
use uext_jbd2::Handle;
use uext_vfs::{Context, DirSink, Errno, RenameFlags, XattrFlags};
use crate::error::Result;
use crate::fs::Ext4;
use crate::inode::Inode;

type Dir<'a> = &'a Arc<Inode>;
impl Ext4 {
    pub(crate) fn lookup_name(&self, ctx: &Context, dir: Dir, name: &[u8]) -> Result<Arc<Inode>> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn make_node(&self, ctx: &Context, dir: Dir, name: &[u8], mode: u32, rdev: u32) -> Result<Arc<Inode>> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn make_dir(&self, ctx: &Context, dir: Dir, name: &[u8], mode: u32) -> Result<Arc<Inode>> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn make_symlink(&self, ctx: &Context, dir: Dir, name: &[u8], target: &[u8]) -> Result<Arc<Inode>> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn make_link(&self, ctx: &Context, inode: &Arc<Inode>, dir: Dir, name: &[u8]) -> Result<()> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn unlink_name(&self, ctx: &Context, dir: Dir, name: &[u8]) -> Result<Arc<Inode>> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn remove_dir(&self, ctx: &Context, dir: Dir, name: &[u8]) -> Result<Arc<Inode>> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn rename_names(&self, ctx: &Context, from: (Dir, &[u8]), to: (Dir, &[u8]), flags: RenameFlags) -> Result<Option<Arc<Inode>>> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn read_link(&self, inode: &Arc<Inode>) -> Result<Vec<u8>> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn read_dir(&self, dir: Dir, offset: u64, sink: &mut dyn DirSink) -> Result<()> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn get_xattr(&self, ctx: &Context, inode: &Arc<Inode>, name: &[u8]) -> Result<Vec<u8>> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn list_xattr(&self, ctx: &Context, inode: &Arc<Inode>) -> Result<Vec<u8>> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn set_xattr(&self, ctx: &Context, inode: &Arc<Inode>, name: &[u8], value: &[u8], flags: XattrFlags) -> Result<()> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn remove_xattr(&self, ctx: &Context, inode: &Arc<Inode>, name: &[u8]) -> Result<()> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn chmod_acl(&self, handle: &Handle, inode: &Arc<Inode>) -> Result<()> { Ok(()) }
    pub(crate) fn delete_xattr_block(&self, handle: &Handle, inode: &Arc<Inode>) -> Result<()> { Ok(()) }
}
