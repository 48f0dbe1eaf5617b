//! Pass 4: every inode in use has a name, and as many links as names.

use uext_ondisk::features::RoCompat;
use uext_ondisk::inode::{InodeFlags, InodeRef};

use super::context::{Context, InodeState};
use super::problem::{At, Code};

const ROOT_INO: u32 = 2;
/// Most links Linux gives an inode (`EXT4_LINK_MAX`).
const LINK_MAX: u32 = 65000;

/// Checks the link counts of all inodes.
pub fn run(ctx: &mut Context<'_, '_>) {
    let count = ctx.sb.inodes_count();
    let raw = ctx.sb.raw();
    let hidden = [raw.s_prj_quota_inum.get(), raw.s_orphan_file_inum.get()];
    let first = ctx.sb.first_ino().0;
    for ino in ROOT_INO..=count {
        if ino % 4096 == 0 {
            ctx.progress.step(4, ino.into(), count.into());
        }
        let state = ctx.inode(ino);
        let own = (ino > ROOT_INO && ino < first) || hidden.contains(&ino);
        if own || ctx.is_gone(ino) || !state.is(InodeState::USED) || state.is(InodeState::IMAGIC) {
            continue;
        }
        check_links(ctx, ino, state);
    }
}

fn check_links(ctx: &mut Context<'_, '_>, ino: u32, state: InodeState) {
    let mut counted = state.counted;
    if state.is(InodeState::EA_REFERENCED) {
        // Attributes count as one name; how many refer to it is kept elsewhere.
        counted = counted.max(1);
    }
    if counted == 0 {
        return ctx.problem(Code::Unattached, At::ino(ino));
    }
    let is_dir = state.is(InodeState::DIR);
    if is_dir && counted > LINK_MAX {
        if !ctx.sb.features().ro_compat.contains(RoCompat::DIR_NLINK) {
            ctx.problem(Code::DirNlink, At::ino(ino));
        }
        counted = 1;
    }
    let links = u32::from(state.links);
    // A directory whose count once overflowed keeps 1 when it shrinks again.
    if links == counted || (is_dir && links == 1 && counted > 1 && is_indexed(ctx, ino)) {
        return;
    }
    ctx.problem(Code::LinkCount, At::ino(ino).num(links).num2(counted));
}

fn is_indexed(ctx: &Context<'_, '_>, ino: u32) -> bool {
    let bytes = ctx.read_inode(ino);
    let inode = bytes.as_deref().and_then(|bytes| InodeRef::new(bytes).ok());
    inode.is_some_and(|inode| inode.flags().contains(InodeFlags::INDEX))
}
