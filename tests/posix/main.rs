//! The numbered suite: shell scripts whose output must be the same on uext and on the
//! kernel's ext4. `check` runs them; here its quick group runs as one test.

use std::process::Command;

use uext_tests::{require, uext};

#[test]
fn the_quick_group_prints_the_same_as_on_the_kernels_ext4() {
    require!("e2fsck", "mke2fs", "xfs_io", "python3", "setfattr", "setfacl", "setcap");
    let check = concat!(env!("CARGO_MANIFEST_DIR"), "/posix/check");

    let output = Command::new(check).args(["-g", "quick"]).env("UEXT", uext()).output();

    let output = output.expect("run check");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("not run 0"), "{text}");
}
