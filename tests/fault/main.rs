//! Faults: devices that fail, space that runs out, processes that are killed.
//!
//! `make test` runs a part of the points; `make faults` all of them (`UEXT_FAULT_POINTS=0`).

mod disk;
mod eio;
mod enospc;
mod model;
mod process;
mod session;
mod workloads;

use uext_tests::require;
use uext_tests::scratch::Kind;

use crate::disk::Image;
use crate::workloads::Profile;

const EXT4: Image = Image { fs: "ext4", block: 4096 };
const EXT4_SMALL: Image = Image { fs: "ext4", block: 1024 };
const EXT3: Image = Image { fs: "ext3", block: 4096 };
const EXT3_SMALL: Image = Image { fs: "ext3", block: 1024 };
const EXT2: Image = Image { fs: "ext2", block: 4096 };
const EXT2_SMALL: Image = Image { fs: "ext2", block: 1024 };

macro_rules! eio_tests {
    ($($name:ident: $profile:ident $image:ident;)*) => {
        $(
            #[test]
            fn $name() {
                require!("mke2fs", "e2fsck");
                eio::sweep(stringify!($name), Profile::$profile, $image);
            }
        )*
    };
}

eio_tests! {
    eio_names_ext4: Names EXT4;
    eio_append_ext4_1k: Append EXT4_SMALL;
    eio_overwrite_ext4: Overwrite EXT4;
    eio_overwrite_ext3_1k: Overwrite EXT3_SMALL;
    eio_truncate_ext4_1k: Truncate EXT4_SMALL;
    eio_truncate_ext3: Truncate EXT3;
    eio_large_ext4_1k: Large EXT4_SMALL;
    eio_wrap_ext4_1k: Wrap EXT4_SMALL;
    eio_append_ext2: Append EXT2;
    eio_overwrite_ext2_1k: Overwrite EXT2_SMALL;
}

macro_rules! enospc_tests {
    ($($name:ident: $test:ident($($argument:expr),*);)*) => {
        $(
            #[test]
            fn $name() {
                require!("mke2fs", "e2fsck");
                enospc::$test($($argument),*);
            }
        )*
    };
}

enospc_tests! {
    enospc_names_ext4_1k: sweep("enospc_names_ext4_1k", Profile::Names, EXT4_SMALL);
    enospc_large_ext4_1k: sweep("enospc_large_ext4_1k", Profile::Large, EXT4_SMALL);
    enospc_overwrite_ext3_1k: sweep("enospc_overwrite_ext3_1k", Profile::Overwrite, EXT3_SMALL);
    enospc_truncate_ext4: sweep("enospc_truncate_ext4", Profile::Truncate, EXT4);
    enospc_wrap_ext2: sweep("enospc_wrap_ext2", Profile::Wrap, EXT2);
    nearly_full_ext4: nearly_full_property("nearly_full_ext4", EXT4);
    nearly_full_ext4_1k: nearly_full_property("nearly_full_ext4_1k", EXT4_SMALL);
    nearly_full_ext3_1k: nearly_full_property("nearly_full_ext3_1k", EXT3_SMALL);
    nearly_full_ext2_1k: nearly_full_property("nearly_full_ext2_1k", EXT2_SMALL);
    few_blocks_ext4: few_blocks(EXT4);
    few_blocks_ext4_1k: few_blocks(EXT4_SMALL);
    few_blocks_ext3_1k: few_blocks(EXT3_SMALL);
    few_blocks_ext2: few_blocks(EXT2);
    reserve_ext4: reserve(EXT4);
    reserve_ext2_1k: reserve(EXT2_SMALL);
}

macro_rules! process_tests {
    ($($name:ident: $test:ident($($argument:expr),*);)*) => {
        $(
            #[test]
            fn $name() {
                require!("mke2fs", "e2fsck", "losetup", "dumpe2fs");
                process::$test($($argument),*);
            }
        )*
    };
}

const ON_EXT4: Kind = Kind { fs: "ext4", block_size: 4096 };
const ON_EXT4_SMALL: Kind = Kind { fs: "ext4", block_size: 1024 };
const ON_EXT3: Kind = Kind { fs: "ext3", block_size: 4096 };

process_tests! {
    kills_ext4: kills(ON_EXT4, "");
    kills_ext4_1k_writeback_cache: kills(ON_EXT4_SMALL, "writeback_cache");
    aborted_connection_ext4: aborted_connection(ON_EXT4);
    prepared_for_pressure_ext4: prepared_for_pressure(ON_EXT4);
    dirty_unmount_ext4: dirty_unmount(ON_EXT4, "");
    dirty_unmount_ext3_writeback_cache: dirty_unmount(ON_EXT3, "writeback_cache");
    eio_at_unmount_ext4: eio_at_unmount(ON_EXT4);
    eio_of_large_writes_ext4: eio_of_large_writes(ON_EXT4);
}
