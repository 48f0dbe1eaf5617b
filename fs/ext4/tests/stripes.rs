//! On a RAID, files of whole stripes begin where a stripe does, as debugfs sees it; no
//! geometry that a superblock may tell keeps a block from being used.
#![allow(clippy::unwrap_used, missing_docs)]

mod names_common;

use std::path::Path;
use std::process::Command;

use names_common::{Image, ROOT};
use uext_ext4::Ext4;
use uext_vfs::{Errno, FileHandle, FileSystem, WriteFlags};

/// Writes a file and has its blocks chosen.
fn write(fs: &Ext4, name: &str, bytes: usize) -> Result<(), Errno> {
    let mode = libc::S_IFREG | 0o644;
    let ino = fs.mknod(&ROOT, fs.root(), name.as_bytes(), mode, 0)?.attr.ino;
    let data = vec![7; bytes];
    let written = fs.write(&ROOT, ino, FileHandle::default(), 0, &data, WriteFlags::empty())?;
    fs.fsync(&ROOT, ino, FileHandle::default(), false)?;
    // As much as there is room for.
    if written == bytes { Ok(()) } else { Err(Errno::ENOSPC) }
}

/// The first block of a file, asked of debugfs.
fn first_block(image: &Path, name: &str) -> u64 {
    let request = format!("bmap /{name} 0");
    let output = Command::new("debugfs").args(["-R", &request]).arg(image).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.trim().parse().unwrap_or_else(|_| panic!("{request}: {text}"))
}

#[test]
fn whole_stripes_begin_at_stripes_and_whole_chunks_at_chunks() {
    // Groups of 8192 blocks from block 1, which no multiple of 24 divides.
    for (block, chunk, stripe) in [(4096, 4, 16), (1024, 12, 24)] {
        let (size, geometry) = (block.to_string(), format!("stride={chunk},stripe_width={stripe}"));
        let image = Image::new(64, &["-t", "ext4", "-b", &size, "-E", &geometry]);
        let fs = image.mount();
        let cases = [(stripe, stripe), (3 * stripe, stripe), (32 * stripe, stripe), (chunk, chunk)];
        for round in 0..8 {
            for (length, _) in cases {
                // Something odd between.
                write(&fs, &format!("odd{length}-{round}"), block * (round + 1)).unwrap();
                write(&fs, &format!("whole{length}-{round}"), block * length).unwrap();
            }
        }
        image.check(&fs);
        let path = image.file();
        for round in 0..8 {
            for (length, align) in cases {
                let first = first_block(&path, &format!("whole{length}-{round}"));
                let place = format!("{geometry}: {length} blocks at {first}, round {round}");
                assert!(first.is_multiple_of(align as u64), "{place}");
            }
        }
    }
}

/// Fills a filesystem, and says how many blocks nobody gets.
fn left_when_full(args: &[&str]) -> u64 {
    let image = Image::new(32, &[&["-t", "ext4", "-b", "1024", "-m", "0"], args].concat());
    let fs = image.mount();
    // Whole stripes and odd ones, so that in the end only parts of stripes are free.
    for (round, blocks) in [5, 16, 4, 16, 1].into_iter().cycle().enumerate() {
        if let Err(error) = write(&fs, &format!("file{round}"), blocks << 10) {
            assert_eq!(error, Errno::ENOSPC, "{round}");
            break;
        }
    }
    let mut error = None;
    for last in 0.. {
        error = write(&fs, &format!("last{last}"), 1024).err();
        if error.is_some() {
            break;
        }
    }
    assert_eq!(error, Some(Errno::ENOSPC));
    let left = fs.statfs(&ROOT).unwrap().bfree;
    image.check(&fs);
    left
}

#[test]
fn a_filesystem_of_stripes_fills_as_far_as_any() {
    let plain = left_when_full(&[]);
    let stripes = left_when_full(&["-E", "stride=4,stripe_width=16"]);
    // A file of more pieces may need a block for its extents.
    assert!(stripes <= plain + 16, "{stripes} blocks stay free, {plain} without stripes");
}

#[test]
fn any_geometry_a_superblock_tells_can_be_written() {
    for (stride, width) in [(1, 1), (0xffff, 0xffff_ffff_u32), (0xffff, 0), (2, 0x8000_0000)] {
        let plain = Image::new(16, &["-t", "ext4", "-b", "1024"]);
        let path = plain.file();
        for (field, value) in [("raid_stride", stride), ("raid_stripe_width", width)] {
            let request = format!("set_super_value {field} {value}");
            let set = Command::new("debugfs").args(["-w", "-R", &request]).arg(&path).status();
            assert!(set.unwrap().success());
        }
        let image = Image::from_file(&path);
        let told = image.debugfs("stats -h");
        assert!(told.contains("RAID stride"), "{stride} {width}: {told}");
        let fs = image.mount();
        for (n, blocks) in [1, 2, 7, 64, 4096].into_iter().enumerate() {
            write(&fs, &format!("file{n}"), blocks << 10).unwrap();
        }
        image.check(&fs);
    }
}
