//! How much memory a mount takes: of a huge filesystem, and under load.

use std::fs::{self, File};
use std::io::Write;
use std::time::{Duration, Instant};

use uext_tests::mounts::UextMount;
use uext_tests::scratch::{Scratch, assert_clean};
use uext_tests::{require, run};

use crate::EXT4;

/// What the daemon may take beside its cache.
const OVERHEAD_MIB: u64 = 64;

/// The daemon's resident set and its peak, MiB.
fn memory(mount: &UextMount) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{}/status", mount.daemon())).expect("status");
    let mib = |key: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(key)).expect("the line");
        line.split_whitespace().nth(1).and_then(|kb| kb.parse::<u64>().ok()).expect("kB") >> 10
    };
    (mib("VmRSS:"), mib("VmHWM:"))
}

/// A terabyte has 8192 groups; nothing may be read or kept for each of them but its
/// descriptor. The time is a bound for a busy machine: it is some 0.05 s on an idle one.
#[test]
fn a_terabyte_is_mounted_at_once_and_in_little_memory() {
    require!("mke2fs", "e2fsck");
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", EXT4, 1 << 40, &[]);
    let dir = scratch.mount_point("mount");
    let start = Instant::now();
    let mount = UextMount::new(&image, &dir, "");
    let took = start.elapsed();
    File::create(dir.join("file")).and_then(|mut file| file.write_all(b"data")).expect("a file");
    let (resident, peak) = memory(&mount);
    mount.unmount();
    assert!(took < Duration::from_secs(3), "mounted in {took:?}");
    assert!(peak <= OVERHEAD_MIB, "resident {resident} MiB, peak {peak} MiB");
}

#[test]
fn under_load_memory_is_the_cache_and_a_little() {
    require!("mke2fs", "e2fsck", "dd");
    const CACHE_MIB: u64 = 32;
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", EXT4, 1 << 30, &[]);
    let dir = scratch.mount_point("mount");
    let mount = UextMount::new(&image, &dir, &format!("cache_size={CACHE_MIB}M"));
    let big = dir.join("big");
    for direction in ["if=/dev/zero of=", "iflag=direct of=/dev/null if="] {
        let command = format!("dd {direction}{} bs=1M count=200 status=none", big.display());
        run(std::process::Command::new("sh").args(["-c", &command]));
    }
    for n in 0..5000 {
        fs::write(dir.join(format!("small {n}")), [7; 5000]).expect("a file");
    }
    assert_eq!(fs::read_dir(&dir).expect("a listing").count(), 5002);
    let (resident, peak) = memory(&mount);
    mount.unmount();
    assert!(peak <= CACHE_MIB + OVERHEAD_MIB, "resident {resident} MiB, peak {peak} MiB");
    assert_clean(&image);
}
