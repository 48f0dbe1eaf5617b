//! A compiler's output: cargo builds a crate onto the mount and its result runs.

use uext_tests::{require, run};

use crate::{EXT4, Mounted, limited, workspace};

#[test]
fn cargo_builds_a_crate_and_finds_it_fresh_after_a_remount() {
    require!("mke2fs", "e2fsck");
    let mut mounted = Mounted::new(EXT4, 1024);
    let target = mounted.path().join("target");
    let build = |more: &[&str]| {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let mut command = limited(300, &cargo);
        command.args(["build", "--offline", "--locked", "-p", "uext-ondisk"]).args(more);
        // The build of the test must not leak into this one.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG") || text == "RUSTFLAGS" || text == "CARGO_TARGET_DIR" {
                command.env_remove(&name);
            }
        }
        run(command.arg("--target-dir").arg(&target).current_dir(workspace()))
    };
    build(&[]);
    mounted.check_and_remount();
    let again = build(&["--verbose"]);
    assert!(again.contains("Fresh uext-ondisk"), "cargo did not recognise its work:\n{again}");
    mounted.finish();
}
