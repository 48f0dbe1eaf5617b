//! Replaced by the data path.
#![allow(unused_variables, clippy::unnecessary_wraps)]
use std::sync::Arc;
use uext_ondisk::{FsBlock, LogicalBlock};
use uext_pagecache::{AddressSpace, AddressSpaceOps, WritebackControl, WritebackError};
use uext_vfs::{Context, Errno, ReadReply, WriteFlags};
use crate::error::Result;
use crate::fs::Ext4;
use crate::inode::Inode;

#[derive(Debug)]
pub(crate) struct Mapping {
    pub start: Option<FsBlock>,
    pub len: u32,
    pub unwritten: bool,
}
impl AddressSpaceOps for Inode {
    fn writepages(&self, mapping: &Arc<AddressSpace>, wbc: &WritebackControl) -> std::result::Result<u64, WritebackError> {
        Ok(0)
    }
}
impl Ext4 {
    pub(crate) fn map_lookup(&self, inode: &Inode, lblk: LogicalBlock, max: u32) -> Result<Mapping> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn file_read(&self, inode: &Arc<Inode>, offset: u64, len: usize, reply: &mut ReadReply) -> Result<()> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn file_write(&self, ctx: &Context, inode: &Arc<Inode>, offset: u64, data: &[u8], flags: WriteFlags) -> Result<usize> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn truncate(&self, inode: &Arc<Inode>, size: u64) -> Result<()> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn sync_inode(&self, inode: &Arc<Inode>, datasync: bool) -> Result<()> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn seek(&self, inode: &Arc<Inode>, offset: u64, whence: i32) -> Result<u64> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn flush_data(&self, inode: &Arc<Inode>) -> Result<()> { Err(Errno::ENOSYS.into()) }
    pub(crate) fn drop_all_blocks(&self, inode: &Arc<Inode>) -> Result<()> { Err(Errno::ENOSYS.into()) }
}
