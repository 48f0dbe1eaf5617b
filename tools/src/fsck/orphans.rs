//! The orphan file: with no filesystem mounted all its slots are free. When the check looks
//! through the journal of one that was, those are used whose inodes the next mount deletes.

use uext_ondisk::FsBlock;
use uext_ondisk::features::RoCompat;
use uext_ondisk::inode::InodeRef;
use uext_ondisk::orphan_file;

use super::context::Context;
use super::problem::{At, Code};
use super::walk::{Volume, collect_runs};

/// Checks the orphan file and the flag that says whether it holds orphans.
pub fn run(ctx: &mut Context<'_, '_>) {
    let features = ctx.sb.features();
    let present = features.ro_compat.contains(RoCompat::ORPHAN_PRESENT);
    if !features.orphan_file() {
        if present {
            ctx.problem(Code::OrphanPresentNoFile, At::fs());
        }
        return;
    }
    if !features.has_journal() {
        ctx.problem(Code::OrphanWithoutJournal, At::fs());
    }
    let ino = ctx.sb.raw().s_orphan_file_inum.get();
    match check_file(ctx, ino) {
        Err(text) => ctx.problem(Code::OrphanFileBad, At::ino(ino).text(text)),
        Ok(()) if present && !ctx.looked_through => ctx.problem(Code::OrphanPresentClean, At::fs()),
        Ok(()) => {}
    }
}

fn check_file(ctx: &Context<'_, '_>, ino: u32) -> Result<(), String> {
    let bytes = ctx.read_inode(ino).ok_or("its inode cannot be read")?;
    let inode = InodeRef::new(&bytes[..]).map_err(|error| error.detail)?;
    let block_size = u64::from(ctx.sb.block_size());
    if inode.raw_size() % block_size != 0 {
        return Err(format!("its size is {}", inode.raw_size()));
    }
    let volume = Volume::new(ctx.dev, &ctx.sb);
    let runs = collect_runs(volume, ino, inode, ctx.sb.features().extents())
        .ok_or("its block map is damaged")?;
    let blocks = inode.raw_size() / block_size;
    if blocks > ctx.sb.blocks_count() {
        return Err(format!("its size is {}", inode.raw_size()));
    }
    let seed = inode.csum_seed(ctx.sb.csum_seed(), ino.into());
    let mut next = 0;
    for (logical, start, len) in runs {
        if logical >= blocks {
            return Err(format!("block {logical} lies past its end"));
        }
        if logical != next {
            return Err(format!("block {next} is missing"));
        }
        next = logical + len;
        for block in start..start + len {
            check_block(ctx, block, seed)?;
        }
    }
    if next < blocks { Err(format!("block {next} is missing")) } else { Ok(()) }
}

fn check_block(ctx: &Context<'_, '_>, block: u64, seed: u32) -> Result<(), String> {
    let bytes = ctx.read_block(block).ok_or_else(|| format!("block {block} cannot be read"))?;
    let used = orphan_file::orphans(&bytes)
        .map_err(|error| format!("block {block}: {}", error.detail))?
        .find(|(_, ino)| !ctx.orphans.contains(&ino.0));
    if let Some((slot, inode)) = used {
        return Err(format!("block {block}, slot {slot} holds inode {inode}"));
    }
    if ctx.sb.features().metadata_csum() {
        orphan_file::verify_checksum(&bytes, seed, FsBlock(block))
            .map_err(|error| format!("block {block}: {}", error.detail))?;
    }
    Ok(())
}
