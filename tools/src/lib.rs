//! uext: mkfs, fsck, mount and more, one program

pub mod fsck;
