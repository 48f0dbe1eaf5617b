//! Writes a planned filesystem.
//!
//! Invariants: old signatures are wiped and flushed first, and the primary superblock is
//! written last, after a flush of everything else; so from the first write until the end
//! there is no filesystem, and a power cut at any point leaves none or a whole one.

use std::collections::BTreeMap;
use std::sync::Arc;

use uext_blockdev::{AlignedBuf, Bio, BioFlags, BioOp, BioVec, BlkStatus, BlockDevice, Sector};
use uext_ondisk::bitmap;
use uext_ondisk::group_desc::{GroupDesc, GroupFlags};
use uext_ondisk::inode::{FileType, Inode, Timestamp};
use uext_ondisk::superblock::SUPERBLOCK_OFFSET;
use uext_ondisk::{FsBlock, GroupNumber, InodeNumber};

use super::error::{MkfsError, Result};
use super::files::{FirstFiles, NewFile};
use super::layout::Layout;
use super::params::Params;
use super::progress::Progress;

/// Bytes at each end where other filesystems, RAID and partition tables keep their marks.
const WIPE_BYTES: u64 = 128 << 10;
/// Longest write that adjacent blocks are joined to, bytes.
const MAX_JOINED: usize = 1 << 20;
/// Longest run zeroed or discarded by one bio, so that progress shows, bytes.
const MAX_RANGE: u64 = 1 << 30;

/// Writes the filesystem. `discard_zeroes`: what was discarded reads as zeroes.
///
/// # Errors
/// `Device` when a write or flush fails; then there is no filesystem.
pub fn write(
    dev: &dyn BlockDevice,
    params: &Params,
    layout: &mut Layout,
    files: &FirstFiles,
    discard_zeroes: bool,
    progress: &Progress,
) -> Result<()> {
    let mut writer = Writer { dev, params, layout, progress, zeroed: params.prezeroed };
    writer.wipe()?;
    writer.discard(discard_zeroes);
    writer.zero_tables_and_journal(files)?;
    writer.write_blocks(files)?;
    writer.write_inodes(files)?;
    let descs = writer.write_bitmaps(files)?;
    writer.write_descriptors(&descs)?;
    writer.flush()?;
    writer.write_superblock()?;
    writer.flush()
}

struct Writer<'a> {
    dev: &'a dyn BlockDevice,
    params: &'a Params,
    layout: &'a mut Layout,
    progress: &'a Progress,
    /// Every block that was not written reads as zeroes.
    zeroed: bool,
}

fn failed(what: &'static str) -> impl Fn(BlkStatus) -> MkfsError {
    move |status| MkfsError::Device { what, status }
}

impl Writer<'_> {
    fn flush(&self) -> Result<()> {
        self.dev.flush().map_err(failed("flushing the device"))
    }

    /// Removes what says that there is something else on the device.
    fn wipe(&self) -> Result<()> {
        let size = self.dev.size();
        let fs_end = self.layout.sb.blocks_count() << self.layout.sb.block_size_bits();
        let tail = size.saturating_sub(WIPE_BYTES);
        self.zero(0, WIPE_BYTES.min(size), "wiping the start of the device")?;
        if fs_end > tail {
            self.zero(tail, size - tail, "wiping the end of the device")?;
        }
        self.flush()
    }

    /// Gives the device's old contents back. A device that cannot does no harm.
    fn discard(&mut self, discard_zeroes: bool) {
        let limit = self.dev.limits().max_discard_bytes;
        if !self.params.discard || limit == 0 {
            return;
        }
        let block = u64::from(self.dev.limits().logical_block_size);
        let step = limit.min(MAX_RANGE) / block * block;
        let size = self.dev.size();
        self.progress.begin("discarding", size);
        let mut at = 0;
        while at < size && step > 0 {
            let len = step.min(size - at);
            let bio = Bio::range(BioOp::Discard, Sector::from_byte_offset(at), len);
            if self.dev.submit_bio_wait(bio).is_err() {
                return;
            }
            at += len;
            self.progress.advance(len);
        }
        self.zeroed |= discard_zeroes;
    }

    /// Zeroes a range: whole blocks of the device by itself, the edges by writing.
    fn zero(&self, offset: u64, len: u64, what: &'static str) -> Result<()> {
        let block = u64::from(self.dev.limits().logical_block_size);
        let end = offset + len;
        let start = offset.next_multiple_of(block).min(end);
        let stop = (end / block * block).max(start);
        for (from, to) in [(offset, start), (stop, end)] {
            if from < to {
                let zeroes = vec![0; (to - from) as usize];
                self.dev.write_at(from, &zeroes, BioFlags::empty()).map_err(failed(what))?;
            }
        }
        let mut at = start;
        while at < stop {
            let bytes = (stop - at).min(MAX_RANGE);
            let bio = Bio::range(BioOp::WriteZeroes, Sector::from_byte_offset(at), bytes);
            match self.dev.submit_bio_wait(bio) {
                Ok(_) => {}
                Err(BlkStatus::NotSupp) => self.write_zeroes(at, bytes, what)?,
                Err(status) => return Err(failed(what)(status)),
            }
            at += bytes;
            self.progress.advance(bytes);
        }
        Ok(())
    }

    /// Zeroes by writing.
    fn write_zeroes(&self, offset: u64, len: u64, what: &'static str) -> Result<()> {
        let zeroes = Arc::new(AlignedBuf::new(MAX_JOINED));
        let mut done = 0;
        while done < len {
            let part = (len - done).min(MAX_JOINED as u64) as u32;
            let sector = Sector::from_byte_offset(offset + done);
            let mut bio = Bio::new(BioOp::Write, BioFlags::empty(), sector);
            bio.add_vec(BioVec::part(zeroes.clone(), 0, part));
            self.dev.submit_bio_wait(bio).map_err(failed(what))?;
            done += u64::from(part);
        }
        Ok(())
    }

    /// Blocks at the start of a group's inode table that must not hold old contents. Where
    /// descriptors say how much was used, the kernel may zero the rest later.
    fn table_blocks_to_zero(&self, group: GroupNumber, files: &FirstFiles) -> u32 {
        let sb = &self.layout.sb;
        if !self.leaves_tables() {
            return sb.inode_table_blocks();
        }
        used_inodes(self.layout, group, files).div_ceil(sb.inodes_per_block())
    }

    /// Whether unused inodes may be left as they are.
    fn leaves_tables(&self) -> bool {
        self.params.lazy_itable_init && self.layout.sb.features().group_desc_csum()
    }

    fn zero_tables_and_journal(&self, files: &FirstFiles) -> Result<()> {
        if self.zeroed {
            return Ok(());
        }
        let bits = self.layout.sb.block_size_bits();
        let mut runs: BTreeMap<u64, u64> = BTreeMap::new();
        for group in self.layout.sb.groups() {
            let start = self.layout.groups[group.0 as usize].inode_table;
            runs.insert(start, self.table_blocks_to_zero(group, files).into());
        }
        runs.extend(files.zero.iter().map(|run| (run.start, run.len)));
        self.progress.begin("zeroing", runs.values().sum::<u64>() << bits);
        let mut joined: Option<(u64, u64)> = None;
        for (start, len) in runs.into_iter().filter(|(_, len)| *len > 0) {
            joined = match joined {
                Some((first, count)) if first + count == start => Some((first, count + len)),
                other => {
                    self.zero_blocks(other)?;
                    Some((start, len))
                }
            };
        }
        self.zero_blocks(joined)
    }

    fn zero_blocks(&self, run: Option<(u64, u64)>) -> Result<()> {
        let bits = self.layout.sb.block_size_bits();
        match run {
            None => Ok(()),
            Some((start, len)) => {
                self.zero(start << bits, len << bits, "zeroing inode tables and journal")
            }
        }
    }

    /// Writes blocks in order, adjacent ones together.
    fn write_joined(
        &self,
        blocks: impl IntoIterator<Item = (u64, Vec<u8>)>,
        what: &'static str,
    ) -> Result<()> {
        let bits = self.layout.sb.block_size_bits();
        let mut start = 0;
        let mut bytes: Vec<u8> = Vec::new();
        let put = |start: u64, bytes: &[u8]| {
            if bytes.is_empty() {
                return Ok(());
            }
            self.progress.advance(bytes.len() as u64);
            self.dev.write_at(start << bits, bytes, BioFlags::empty()).map_err(failed(what))
        };
        for (block, content) in blocks {
            let next = start + (bytes.len() as u64 >> bits);
            if block != next || bytes.len() >= MAX_JOINED {
                put(start, &bytes)?;
                bytes.clear();
                start = block;
            }
            bytes.extend_from_slice(&content);
        }
        put(start, &bytes)
    }

    fn write_blocks(&self, files: &FirstFiles) -> Result<()> {
        let sorted: BTreeMap<u64, &Vec<u8>> =
            files.blocks.iter().map(|(block, bytes)| (*block, bytes)).collect();
        let blocks = sorted.into_iter().map(|(block, bytes)| (block, bytes.clone()));
        self.write_joined(blocks, "writing the first files")
    }

    /// The inodes in use and, under `metadata_csum`, the reserved ones, whose checksums must
    /// be good although they are empty.
    fn write_inodes(&self, files: &FirstFiles) -> Result<()> {
        let sb = &self.layout.sb;
        let mut blocks: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for number in (1..=last_inode(files)).map(InodeNumber) {
            let file = files.inodes.iter().find(|file| file.number == number);
            let Some(at) = sb.inode_location(number) else { continue };
            let table = self.layout.groups[at.group.0 as usize].inode_table;
            let block = blocks
                .entry(table + u64::from(at.table_block))
                .or_insert_with(|| vec![0; sb.block_size() as usize]);
            let range = at.offset as usize..at.offset as usize + usize::from(sb.inode_size());
            let mut inode = Inode::new(&mut block[range])?;
            if let Some(file) = file {
                self.fill_inode(&mut inode, file);
            }
            inode.seal(sb, number);
        }
        self.write_joined(blocks, "writing inodes")
    }

    fn fill_inode(&self, inode: &mut Inode<&mut [u8]>, file: &NewFile) {
        let sb = &self.layout.sb;
        let now = Timestamp { secs: self.params.now.cast_signed(), nanos: 0 };
        inode.init(sb.want_extra_isize());
        inode.set_mode(file.mode);
        inode.set_uid(file.owner.0);
        inode.set_gid(file.owner.1);
        inode.set_links_count(file.links);
        inode.set_flags(file.flags);
        inode.set_size(file.size);
        // The journal is the largest, and its size was checked.
        let counted = inode.set_sectors(file.sectors, sb.features(), sb.block_size());
        assert!(counted.is_some(), "inode {} has {} sectors", file.number, file.sectors);
        inode.set_atime(now);
        inode.set_ctime(now);
        inode.set_mtime(now);
        inode.set_crtime(now);
        *inode.i_block_mut() = file.i_block;
    }

    /// Writes the bitmaps and gives the descriptors; sets the superblock's free counts.
    fn write_bitmaps(&mut self, files: &FirstFiles) -> Result<Vec<u8>> {
        let sb = self.layout.sb.clone();
        let desc_size = usize::from(sb.desc_size());
        let gdt_bytes = sb.gdt_blocks() as usize * sb.block_size() as usize;
        let mut descs = vec![0; gdt_bytes];
        let mut blocks: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let (mut free_blocks, mut free_inodes) = (0u64, 0u32);
        self.progress.begin("writing bitmaps", 0);
        for group in sb.groups() {
            let (n, offset) = sb.descriptor_at(group);
            let at = n as usize * sb.block_size() as usize + offset as usize;
            let mut desc = GroupDesc::new(&mut descs[at..at + desc_size])?;
            self.fill_group(&mut desc, group, files, &mut blocks);
            free_blocks += u64::from(desc.free_blocks_count());
            free_inodes += desc.free_inodes_count();
            // Bitmaps of a flex group lie together; write them when it is complete.
            if group.0 % 64 == 63 {
                self.write_joined(std::mem::take(&mut blocks), "writing bitmaps")?;
            }
        }
        self.write_joined(blocks, "writing bitmaps")?;
        self.layout.sb.set_free_blocks_count(free_blocks);
        self.layout.sb.set_free_inodes_count(free_inodes);
        Ok(descs)
    }

    fn fill_group(
        &self,
        desc: &mut GroupDesc<&mut [u8]>,
        group: GroupNumber,
        files: &FirstFiles,
        blocks: &mut BTreeMap<u64, Vec<u8>>,
    ) {
        let sb = &self.layout.sb;
        let places = self.layout.groups[group.0 as usize];
        let map_len = sb.block_size() as usize;
        let first = sb.group_first_block(group).0;
        let mut map = vec![0; map_len];
        for run in self.layout.space.taken_in(first..self.layout.group_end(group)) {
            bitmap::set_range(&mut map, (run.start - first) as u32, run.len as u32);
        }
        let in_group = sb.blocks_in_group(group);
        let taken = bitmap::count_set(&map, in_group);
        bitmap::set_range(&mut map, in_group, sb.block_size() * 8 - in_group);
        let used = used_inodes(self.layout, group, files);
        let mut inode_map = vec![0; map_len];
        sb.fill_uninit_inode_bitmap(&mut inode_map);
        bitmap::set_range(&mut inode_map, 0, used);

        desc.set_block_bitmap(FsBlock(places.block_bitmap));
        desc.set_inode_bitmap(FsBlock(places.inode_bitmap));
        desc.set_inode_table(FsBlock(places.inode_table));
        desc.set_free_blocks_count(in_group - taken);
        desc.set_free_inodes_count(sb.inodes_per_group() - used);
        desc.set_used_dirs_count(used_dirs(self.layout, group, files));
        desc.seal_block_bitmap(sb, &map);
        desc.seal_inode_bitmap(sb, &inode_map);
        let mut flags = GroupFlags::empty();
        if sb.features().group_desc_csum() {
            // The last group's bitmap needs its padding on disk.
            flags.set(GroupFlags::BLOCK_UNINIT, taken == 0 && group.0 + 1 < sb.groups_count());
            flags.set(GroupFlags::INODE_UNINIT, used == 0);
            flags.set(GroupFlags::INODE_ZEROED, self.zeroed || !self.leaves_tables());
            desc.set_itable_unused(sb.inodes_per_group() - used);
        }
        desc.set_flags(flags);
        desc.seal(sb.desc_checksum(), group);
        if !flags.contains(GroupFlags::BLOCK_UNINIT) {
            blocks.insert(places.block_bitmap, map);
        }
        if !flags.contains(GroupFlags::INODE_UNINIT) {
            blocks.insert(places.inode_bitmap, inode_map);
        }
    }

    /// Every copy of the descriptors, and the backups of the superblock.
    fn write_descriptors(&mut self, descs: &[u8]) -> Result<()> {
        self.layout.sb.set_write_time(self.params.now);
        self.layout.sb.set_mkfs_time(self.params.now);
        self.layout.sb.set_last_check_time(self.params.now);
        self.layout.sb.set_label(&self.params.label);
        self.layout.sb.set_last_mounted(&self.params.last_mounted);
        let sb = &self.layout.sb;
        let bits = sb.block_size_bits();
        let what = "writing descriptors";
        self.progress.begin(what, 0);
        let mut blocks: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for (n, bytes) in (0u32..).zip(descs.chunks(sb.block_size() as usize)) {
            blocks.insert(sb.descriptor_block(n).0, bytes.to_vec());
            let first = n * sb.descs_per_block();
            if sb.features().meta_bg() && n >= sb.first_meta_bg() {
                for group in [first + 1, first + sb.descs_per_block() - 1].map(GroupNumber) {
                    if let Some(block) = sb.descriptor_backup_block(n, group) {
                        blocks.insert(block.0, bytes.to_vec());
                    }
                }
            }
        }
        self.write_joined(blocks, what)?;
        for group in sb.backup_groups() {
            let start = sb.group_first_block(group).0;
            let copy = sb.sealed_copy(group);
            self.dev
                .write_at(start << bits, &copy, BioFlags::empty())
                .map_err(failed("writing a backup superblock"))?;
            let copies = (0u32..).zip(descs.chunks(sb.block_size() as usize));
            let placed =
                copies.filter(|(n, _)| !sb.features().meta_bg() || *n < sb.first_meta_bg());
            let blocks = placed.filter_map(|(n, bytes)| {
                Some((sb.descriptor_backup_block(n, group)?.0, bytes.to_vec()))
            });
            self.write_joined(blocks, what)?;
        }
        Ok(())
    }

    fn write_superblock(&mut self) -> Result<()> {
        let bytes = self.layout.sb.sealed_bytes().to_vec();
        self.dev
            .write_at(SUPERBLOCK_OFFSET, &bytes, BioFlags::empty())
            .map_err(failed("writing the superblock"))
    }
}

/// The last inode in use; all before it are too.
fn last_inode(files: &FirstFiles) -> u32 {
    files.inodes.last().map_or(InodeNumber::ROOT.0, |file| file.number.0)
}

/// Inodes in use in a group: from its first on, without gaps.
fn used_inodes(layout: &Layout, group: GroupNumber, files: &FirstFiles) -> u32 {
    let per_group = layout.sb.inodes_per_group();
    last_inode(files).saturating_sub(group.0.saturating_mul(per_group)).min(per_group)
}

fn used_dirs(layout: &Layout, group: GroupNumber, files: &FirstFiles) -> u32 {
    let is_dir = |file: &&NewFile| FileType::from_mode(file.mode) == Some(FileType::Directory);
    let dirs = files.inodes.iter().filter(is_dir);
    let groups = dirs.filter_map(|file| layout.sb.inode_location(file.number));
    groups.filter(|at| at.group == group).count() as u32
}
