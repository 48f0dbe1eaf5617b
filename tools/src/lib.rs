//! uext: mkfs, fsck, mount and more, one program
#![forbid(unsafe_code)]

pub mod bench_dev;
pub mod cli;
pub mod drive;
pub mod fsck;
pub mod logging;
pub mod mkfs;
pub mod mount;
mod mount_again;
pub mod mount_options;
pub mod remount;
mod shown;
pub mod state;
pub mod umount;
