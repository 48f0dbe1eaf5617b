//! What the cross-crate tests share: scratch images that clean up after
//! themselves, the judges (kernel, e2fsck), and a tree that uses every feature.
//!
//! Invariants: whatever a test mounts or attaches is released when its guard
//! drops, also when the test fails; a test that cannot run says why, loudly.

pub mod identity;
pub mod mapping;
pub mod mounts;
pub mod scratch;
pub mod tree;

use std::process::Command;
use std::sync::OnceLock;

/// Why a test cannot run here, `None` when it can.
pub fn missing(tools: &[&str]) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    if !std::path::Path::new("/dev/fuse").exists() {
        return Some("needs /dev/fuse".into());
    }
    tools.iter().find(|tool| !has_tool(tool)).map(|tool| format!("needs {tool}"))
}

fn has_tool(tool: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    path.split(':').any(|dir| std::path::Path::new(dir).join(tool).exists())
}

/// Skips the test, saying why, when the machine lacks something. Written to the stream itself:
/// what the print macros print is captured, and not shown when the test passes.
#[macro_export]
macro_rules! require {
    ($($tool:expr),* $(,)?) => {
        if let Some(why) = $crate::missing(&[$($tool),*]) {
            { use std::io::Write as _; let _ = writeln!(std::io::stderr(), "SKIPPED {}: {why}", std::thread::current().name().unwrap_or("test")); }
            return;
        }
    };
}

/// Runs a command; panics with its output when it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

/// Whether `e2fsck -y`, by what it printed, asked to mend something. What it asks about every
/// filesystem that was in use, the kernel's own too, is none: the superblock's counts, which `-n`
/// calls no error, the mark that the orphan file is in use, which every mount leaves, the slots of
/// orphans that it has deleted, and extent trees that it would like shorter or narrower.
pub fn has_repairs(text: &str) -> bool {
    let of_use = |problem: &str| {
        problem.starts_with("Free blocks count wrong (")
            || problem.starts_with("Free inodes count wrong (")
            || problem.ends_with(" could be shorter.  Optimize? yes")
            || problem.ends_with(" could be narrower.  Optimize? yes")
            || problem == "Feature orphan_present is set but orphan file is clean."
            || (problem.starts_with("Orphan file (inode ") && problem.ends_with(" is not clean."))
    };
    let mut problem = "";
    for line in text.lines() {
        let asked = if matches!(line, "Fix? yes" | "Clear? yes") { problem } else { line };
        if line.ends_with("? yes") && !of_use(asked) {
            return true;
        }
        problem = line;
    }
    false
}

/// Runs a shell script that stops at its first error.
pub fn sh(script: &str) -> String {
    run(Command::new("bash").args(["-euo", "pipefail", "-c", script]))
}

/// The `uext` program, built once: `UEXT_BIN`, else by cargo, in this build's profile.
pub fn uext() -> &'static std::path::Path {
    static PATH: OnceLock<std::path::PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("UEXT_BIN") {
            return path.into();
        }
        let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "--locked", "-p", "uext-tools", "--bin", "uext"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        run(build.current_dir(env!("CARGO_MANIFEST_DIR")));
        // This test runs from <target>/<profile>/deps.
        let exe = std::env::current_exe().expect("the test has a path");
        let dir = exe.ancestors().nth(2).expect("the test lies in deps");
        dir.join("uext")
    })
}
