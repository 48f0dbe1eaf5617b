//! What the README tells an ordinary user to do, done by one.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};

use uext_tests::scratch::{Scratch, assert_clean};
use uext_tests::{require, run, uext};

use crate::{limited, workspace};

const NOBODY: u32 = 65_534;

/// The root directory of a new image belonged to root, so the demo could copy nothing in.
#[test]
fn the_demo_works_for_an_ordinary_user() {
    require!("e2fsck", "fusermount3", "unshare", "setpriv");
    let scratch = Scratch::new();
    let path = scratch.path();
    fs::set_permissions(path, Permissions::from_mode(0o711)).expect("chmod");
    fs::copy(uext(), path.join("uext")).expect("copy the program");
    fs::copy(workspace().join("tests/scripts/demo.sh"), path.join("demo.sh")).expect("copy");
    let home = scratch.mount_point("home");
    chown(&home, Some(NOBODY), Some(NOBODY)).expect("chown");
    // A device node that everybody may open, as most machines have it, seen by this test alone.
    let script = "mknod -m 666 \"$1/fuse\" c 10 229; mount --bind \"$1/fuse\" /dev/fuse; cd \"$1\"; \
                  setpriv --reuid 65534 --regid 65534 --clear-groups \
                  sh demo.sh ./uext home/demo; \
                  setpriv --reuid 65534 --regid 65534 --clear-groups \
                  ./uext mkfs -q -E root_owner home/left.img 64M";
    let mut demo = limited(300, "unshare");
    let said = run(demo.args(["-m", "sh", "-euc", script, "sh"]).arg(path));
    assert!(said.contains("both checkers find the image clean"), "{said}");
    assert_clean(&home.join("left.img"));
}
