//! uext: mkfs, fsck, mount and more, one program
