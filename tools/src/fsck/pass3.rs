//! Pass 3: every directory hangs from the root, and `..` leads back up.

use super::context::{BitSet, Context, InodeState};
use super::problem::{At, Code};

const ROOT_INO: u32 = 2;

/// Checks the connectivity of all directories.
pub fn run(ctx: &mut Context<'_, '_>) {
    if !ctx.inode(ROOT_INO).is(InodeState::DIR) {
        ctx.problem(Code::NoRoot, At::fs());
    }
    let total = ctx.dirs.len();
    // Directories known to hang from the root, or already reported.
    let mut done = BitSet::new(total as u64);
    if let Some(root) = ctx.dir_index(ROOT_INO) {
        done.insert(root as u64);
    }
    // Which walk marked a directory done: a walk that meets its own mark is a loop.
    let mut walk = vec![usize::MAX; total];
    for at in 0..total {
        ctx.progress.step(3, at as u64, total as u64);
        connect(ctx, &mut done, &mut walk, at);
        let dir = ctx.dirs[at];
        if dir.dotdot != dir.parent {
            let place = At::ino(dir.ino).num(dir.dotdot).num2(dir.parent);
            ctx.problem(Code::BadDotDot, place);
        }
    }
}

/// Follows parents up to a directory that is done; what was passed is then done.
fn connect(ctx: &mut Context<'_, '_>, done: &mut BitSet, walk: &mut [usize], start: usize) {
    let mut at = start;
    while !done.insert(at as u64) {
        walk[at] = start;
        let dir = ctx.dirs[at];
        let parent = if dir.parent == 0 { None } else { ctx.dir_index(dir.parent) };
        match parent {
            None => return ctx.problem(Code::Unconnected, At::ino(dir.ino).num(dir.dotdot)),
            Some(next) if walk[next] == start => {
                return ctx.problem(Code::Loop, At::ino(dir.ino));
            }
            Some(next) => at = next,
        }
    }
}
