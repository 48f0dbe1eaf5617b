//! The running journal under a toy filesystem: whatever a power cut leaves, recovery
//! gives exactly what some number of handles had done, and no fewer than were committed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::*;
use uext_blockdev::{
    Bio, BioFlags, BioOp, BlkStatus, BlockDevice, MemoryDevice, QueueLimits, Sector,
};
use uext_jbd2::{Handle, Journal, JournalConfig, JournalError, JournalMap, OnDamage, Recovery};
use uext_pagecache::{BufferCache, CacheConfig, PageCache};
use uext_sync::Mutex;

/// One step a device did.
enum Step {
    /// `grew`: its first bytes had never been written.
    Write {
        at: usize,
        data: Vec<u8>,
        fua: bool,
        grew: bool,
    },
    Flush,
}

/// Records what reaches it, in order; fails from the n-th change on when asked to, and has no
/// space for writes that are longer than they may be.
struct Recorder {
    below: Arc<MemoryDevice>,
    steps: Mutex<Vec<Step>>,
    fail_at: AtomicU64,
    longest: AtomicU64,
}

impl Recorder {
    fn new(image: Vec<u8>) -> Arc<Self> {
        let below = MemoryDevice::from_vec(image);
        let never = || AtomicU64::new(u64::MAX);
        Arc::new(Self { below, steps: Mutex::default(), fail_at: never(), longest: never() })
    }

    fn len(&self) -> usize {
        self.steps.lock().len()
    }
}

impl BlockDevice for Recorder {
    fn limits(&self) -> &QueueLimits {
        self.below.limits()
    }

    fn is_sparse(&self, sector: Sector, bytes: u64) -> bool {
        self.below.is_sparse(sector, bytes)
    }

    fn submit_bio(&self, bio: Bio) {
        if bio.op() == BioOp::Read {
            return self.below.submit_bio(bio);
        }
        let mut steps = self.steps.lock();
        if steps.len() as u64 >= self.fail_at.load(Ordering::Relaxed) {
            drop(steps);
            return bio.end_io(Err(BlkStatus::IoErr));
        }
        let (op, flags, sector, len) = (bio.op(), bio.flags(), bio.sector(), bio.len());
        if len > self.longest.load(Ordering::Relaxed) {
            drop(steps);
            return bio.end_io(Err(BlkStatus::NoSpc));
        }
        let grew = self.below.is_sparse(sector, 512);
        self.below.submit_bio(bio);
        if op == BioOp::Flush || flags.contains(BioFlags::PREFLUSH) {
            steps.push(Step::Flush);
        }
        if op == BioOp::Write {
            let below: &dyn BlockDevice = &*self.below;
            let data = below.read_at(sector.byte_offset(), len as usize).unwrap();
            let fua = flags.contains(BioFlags::FUA);
            steps.push(Step::Write { at: sector.byte_offset() as usize, data, fua, grew });
        }
    }
}

const FREE: u64 = 6000;
const BLOCKS: u64 = 24;
const SIZE: usize = 1024;

/// What the handles did: for each number of them, the seed of each block's contents;
/// 0 for zeroes, `None` for a block that is free.
struct Model {
    states: Vec<Vec<Option<u64>>>,
    /// Steps on the device and handles that were durable then.
    durable: Vec<(usize, usize)>,
    /// Data written into a freed block: from this step, until this many handles.
    data: Vec<(usize, u64, Vec<u8>, usize)>,
}

fn contents(seed: u64) -> Vec<u8> {
    if seed == 0 {
        return vec![0; SIZE];
    }
    let mut bytes = pattern(seed, SIZE);
    if seed.is_multiple_of(5) {
        bytes[..4].copy_from_slice(&0xC03B_3998u32.to_be_bytes());
    }
    bytes
}

struct Toy {
    device: Arc<Recorder>,
    map: JournalMap,
    buffers: Arc<BufferCache>,
    journal: Arc<Journal>,
    base: Vec<u8>,
}

fn toy(dir: &Path, features: &str) -> Toy {
    toy_with(dir, features, JournalConfig::default().cached_blocks)
}

fn toy_with(dir: &Path, features: &str, cached_blocks: u32) -> Toy {
    let image = mkfs(dir, &["-b", "1024", "-O", features], "8192");
    let base = std::fs::read(&image).unwrap();
    let geometry = geometry(&base);
    let map = journal_map(&image);
    let device = Recorder::new(base.clone());
    let cache = PageCache::new(CacheConfig::default());
    let buffers = BufferCache::new(&cache, device.clone(), geometry.block_size);
    let config = JournalConfig {
        background: false,
        csum_v3: geometry.csum,
        wide: geometry.wide,
        cached_blocks,
        ..JournalConfig::default()
    };
    let journal =
        Journal::open(device.clone(), map.clone(), geometry.uuid, buffers.clone(), config).unwrap();
    Toy { device, map, buffers, journal, base }
}

/// Runs `count` handles; stops at the first error, which it returns.
fn work(toy: &Toy, seed: u64, count: usize) -> (Model, Option<JournalError>) {
    let mut now = vec![Some(0); BLOCKS as usize];
    let mut model = Model { states: vec![now.clone()], durable: vec![(0, 0)], data: Vec::new() };
    for index in 0..count {
        let noise = pattern(seed * 1_000_003 + index as u64 + 1, 8);
        let mut next = now.clone();
        if let Err(error) = update(toy, &noise, index, &mut next) {
            return (model, Some(error));
        }
        for (block, _) in
            next.iter().enumerate().filter(|(b, seed)| seed.is_some() && now[*b].is_none())
        {
            for data in model.data.iter_mut().filter(|data| data.1 == block as u64) {
                data.3 = data.3.min(index + 1);
            }
        }
        now = next;
        model.states.push(now.clone());
        if noise[6].is_multiple_of(3) {
            if let Err(error) = toy.journal.commit_all() {
                return (model, Some(error));
            }
            model.durable.push((toy.device.len(), index + 1));
            if let Some(free) = now.iter().position(Option::is_none) {
                model.data.retain(|old| old.1 != free as u64);
                let data = pattern(index as u64 + 77, SIZE);
                let device: &dyn BlockDevice = &*toy.device;
                let at = (FREE + free as u64) * SIZE as u64;
                let written = device.write_at(at, &data, BioFlags::empty());
                if written.and_then(|()| device.flush()).is_err() {
                    return (model, Some(JournalError::Closed));
                }
                model.data.push((toy.device.len(), free as u64, data, usize::MAX));
            }
        }
    }
    (model, None)
}

/// One handle: writes a few blocks, creates free ones, sometimes frees one.
fn update(
    toy: &Toy,
    noise: &[u8],
    index: usize,
    next: &mut [Option<u64>],
) -> Result<(), JournalError> {
    let handle = toy.journal.start(8)?;
    for &byte in &noise[..4] {
        let block = u64::from(byte) % BLOCKS;
        let seed = index as u64 * 100 + block + 1;
        let place = &mut next[block as usize];
        let buffer = if place.is_some() {
            toy.buffers.bread(FREE + block).map_err(|_| JournalError::Closed)?
        } else {
            toy.buffers.getblk(FREE + block)
        };
        let mut bytes =
            if place.is_some() { handle.write(&buffer)? } else { handle.create(&buffer)? };
        bytes.copy_from_slice(&contents(seed));
        *place = Some(seed);
    }
    if noise[5].is_multiple_of(4) {
        let block = u64::from(noise[4]) % BLOCKS;
        if next[block as usize].take().is_some() {
            handle.revoke(FREE + block);
        }
    }
    Ok(())
}

/// The disk after a cut behind `cut` steps: what is durable, and by `seed` some of the rest.
fn crash(base: &[u8], steps: &[Step], cut: usize, seed: u64) -> Vec<u8> {
    let flushed = steps[..cut].iter().rposition(|s| matches!(s, Step::Flush)).unwrap_or(0);
    let chance = pattern(seed + 1, cut + 1);
    let mut image = base.to_vec();
    for (index, step) in steps[..cut].iter().enumerate() {
        let Step::Write { at, data, fua, .. } = step else { continue };
        if index < flushed || *fua || chance[index].is_multiple_of(2) || seed == 0 {
            image[*at..*at + data.len()].copy_from_slice(data);
        }
    }
    image
}

fn recover(image: Vec<u8>, map: &JournalMap) -> Vec<u8> {
    let device = MemoryDevice::from_vec(image);
    let recovery = Recovery::open(location(&*device, map, SIZE as u32), &*device).unwrap();
    recovery.replay(OnDamage::Keep).unwrap();
    device.snapshot()
}

fn assert_is_prefix(image: &[u8], model: &Model, cut: usize, seed: u64) {
    let block = |n: u64| &image[(FREE + n) as usize * SIZE..][..SIZE];
    let least = model.durable.iter().rev().find(|(steps, _)| *steps <= cut).unwrap().1;
    let found = (least..model.states.len()).find(|&count| {
        model.states[count].iter().zip(0..).all(|(seed, n)| match seed {
            Some(seed) => block(n) == contents(*seed),
            None => true,
        })
    });
    let found = found.unwrap_or_else(|| panic!("cut {cut} seed {seed}: no prefix from {least} on"));
    for (steps, n, data, until) in &model.data {
        if *steps <= cut && found < *until {
            assert!(
                block(*n) == data,
                "cut {cut} seed {seed}: data of block {n} was replayed over"
            );
        }
    }
}

#[test]
fn every_cut_recovers_to_a_prefix_of_the_handles() {
    if !have_e2fsprogs() {
        return;
    }
    for (round, features) in
        ["64bit,metadata_csum", "^64bit,^metadata_csum"].into_iter().enumerate()
    {
        let dir = scratch();
        let toy = toy(dir.path(), features);
        let (model, error) = work(&toy, 11 + round as u64, 120);
        assert_eq!(error, None);
        let steps = toy.device.steps.lock();
        for cut in 0..=steps.len() {
            for seed in 0..3 {
                let image = recover(crash(&toy.base, &steps, cut, seed), &toy.map);
                assert_is_prefix(&image, &model, cut, seed);
            }
        }
    }
}

#[test]
fn a_log_that_wraps_and_checkpoints_recovers_to_a_prefix() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let toy = toy(dir.path(), "64bit,metadata_csum");
    let (model, error) = work(&toy, 5, 1500);
    assert_eq!(error, None);
    assert!(toy.journal.status().used_blocks > 0);
    let steps = toy.device.steps.lock();
    assert!(steps.len() > 2000, "{} steps", steps.len());
    let last = steps.len();
    for cut in (0..=last).step_by(37).chain([last]) {
        for seed in 0..2 {
            let image = recover(crash(&toy.base, &steps, cut, seed), &toy.map);
            assert_is_prefix(&image, &model, cut, seed);
        }
    }
}

/// Commits `count` handles one by one.
fn commit_each(toy: &Toy, count: u64) {
    for n in 0..count {
        let handle = toy.journal.start(1).unwrap();
        let buffer = toy.buffers.bread(FREE + n % BLOCKS).unwrap();
        handle.write(&buffer).unwrap().fill(n as u8);
        drop(handle);
        toy.journal.commit_all().unwrap();
    }
}

/// Whoever keeps the device took storage with each of them.
#[test]
fn few_commits_are_the_first_to_write_to_their_part_of_the_log() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let toy = toy(dir.path(), "64bit,metadata_csum");
    let blocks = u64::from(toy.map.block_count());
    // Three blocks each.
    commit_each(&toy, blocks * 2 / 3);
    let log =
        |at: usize| (0..toy.map.block_count()).any(|n| toy.map.map(n) == Some((at / SIZE) as u64));
    let steps = toy.device.steps.lock();
    let written = steps.iter().filter_map(|step| match step {
        Step::Write { at, data, grew, .. } if log(*at) => Some((data.len(), *grew)),
        _ => None,
    });
    let (all, grew) =
        written.fold((0, 0), |(all, some), (len, grew)| (all + len, some + usize::from(grew)));
    let ring = blocks as usize * SIZE;
    assert!((2..=ring / (256 << 10) + 1).contains(&grew), "{grew} writes took storage");
    // Twice what was committed, the superblock for some of them, and the zeroes once.
    assert!(all < ring * 7 / 2, "{all} bytes for a log of {ring}");
}

/// Zeroes ahead are no reason to fail.
#[test]
fn a_commit_that_fits_where_zeroes_behind_it_do_not_is_done() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let toy = toy(dir.path(), "64bit,metadata_csum");
    toy.device.longest.store(32 << 10, Ordering::Relaxed);
    let (model, error) = work(&toy, 7, 200);
    assert_eq!(error, None);
    let image = recover(toy.device.below.snapshot(), &toy.map);
    assert_is_prefix(&image, &model, toy.device.len(), 0);
}

#[test]
fn e2fsck_replays_our_log_as_we_do() {
    if !have_e2fsprogs() {
        return;
    }
    for features in ["64bit,metadata_csum", "^64bit,^metadata_csum"] {
        let dir = scratch();
        let toy = toy(dir.path(), features);
        let (_, error) = work(&toy, 3, 100);
        assert_eq!(error, None);
        let cut = with_needs_recovery(toy.device.below.snapshot());
        let image = dir.path().join("cut");
        std::fs::write(&image, &cut).unwrap();
        e2fsck_journal_only(&image);
        let mut theirs = std::fs::read(&image).unwrap();
        let mut ours = recover(cut, &toy.map);
        normalise(&mut ours);
        normalise(&mut theirs);
        assert_eq!(differing_blocks(&ours, &theirs, 1024), Vec::<usize>::new(), "{features}");
    }
}

#[test]
fn close_leaves_everything_home_and_the_log_empty() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let toy = toy(dir.path(), "64bit,metadata_csum");
    let (model, _) = work(&toy, 9, 60);
    toy.journal.close().unwrap();
    assert_eq!(toy.journal.status().used_blocks, 0);
    let image = toy.device.below.snapshot();
    assert_is_prefix(&image, &model, toy.device.len(), 0);
    let device: &dyn BlockDevice = &*toy.device;
    let recovery = Recovery::open(location(device, &toy.map, 1024), device).unwrap();
    assert!(!recovery.needs_recovery());
    assert!(matches!(toy.journal.start(1), Err(JournalError::Closed)));
}

#[test]
fn a_write_error_at_any_step_aborts_and_keeps_a_prefix() {
    if !have_e2fsprogs() {
        return;
    }
    for fail_at in (0..120).step_by(7) {
        let dir = scratch();
        let toy = toy(dir.path(), "64bit,metadata_csum");
        toy.device.fail_at.store(fail_at, Ordering::Relaxed);
        let (model, error) = work(&toy, 21, 200);
        assert!(error.is_some(), "step {fail_at} failed unnoticed");
        let image = recover(toy.device.below.snapshot(), &toy.map);
        assert_is_prefix(&image, &model, toy.device.len(), 0);
        toy.device.fail_at.store(u64::MAX, Ordering::Relaxed);
        if toy.journal.aborted().is_some() {
            assert!(matches!(toy.journal.start(1), Err(JournalError::Aborted(_))));
            assert!(matches!(toy.journal.commit_all(), Err(JournalError::Aborted(_))));
            assert!(toy.journal.close().is_err());
        }
    }
}

#[test]
fn concurrent_handles_and_commits_leave_each_handle_whole() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let toy = toy(dir.path(), "64bit,metadata_csum");
    let last = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            let (toy, last) = (&toy, &last);
            scope.spawn(move || {
                // Each thread has two blocks of its own, always written alike.
                let (a, b) = (FREE + thread * 2, FREE + thread * 2 + 1);
                for round in 1..=300u64 {
                    let seed = thread * 10_000 + round;
                    let handle = toy.journal.start(2).unwrap();
                    let tid = handle.tid();
                    for block in [a, b] {
                        let buffer = toy.buffers.bread(block).unwrap();
                        handle.write(&buffer).unwrap().copy_from_slice(&contents(seed));
                    }
                    drop(handle);
                    if round.is_multiple_of(3) {
                        toy.journal.commit(tid).unwrap();
                        assert!(toy.journal.is_committed(tid));
                    }
                    last.lock().insert(thread, seed);
                }
            });
        }
    });
    let image = recover(toy.device.below.snapshot(), &toy.map);
    for (thread, seed) in last.into_inner() {
        for block in [FREE + thread * 2, FREE + thread * 2 + 1] {
            assert_eq!(image[block as usize * SIZE..][..SIZE], contents(seed), "block {block}");
        }
    }
}

#[test]
fn asking_for_too_much_is_an_error_and_so_is_using_too_much() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let toy = toy(dir.path(), "64bit,metadata_csum");
    let most = toy.journal.max_credits();
    assert!(matches!(toy.journal.start(most + 1), Err(JournalError::TooManyCredits { .. })));
    let handle = toy.journal.start(1).unwrap();
    let (first, second) = (toy.buffers.bread(FREE).unwrap(), toy.buffers.bread(FREE + 1).unwrap());
    drop(handle.write(&first).unwrap());
    drop(handle.write(&first).unwrap());
    assert!(matches!(handle.write(&second), Err(JournalError::NoCredits { .. })));
    assert!(handle.extend(1).unwrap());
    drop(handle.write(&second).unwrap());
}

/// Committed blocks stayed in memory until the log was half full, 512 MiB of a log of 1 GiB,
/// however little memory the page cache was to take.
#[test]
fn blocks_that_wait_for_their_checkpoint_keep_to_the_memory_for_them() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let toy = toy_with(dir.path(), "64bit,metadata_csum", 256);
    let mut most = 0;
    for block in 0..1000 {
        let handle = toy.journal.start(1).unwrap();
        let buffer = toy.buffers.bread(FREE + block).unwrap();
        handle.write(&buffer).unwrap().fill(block as u8);
        drop(handle);
        toy.journal.commit_all().unwrap();
        most = most.max(toy.journal.status().kept_blocks);
    }
    assert!((64..=129).contains(&most), "{most} kept");
    toy.journal.close().unwrap();
    let device: &dyn BlockDevice = &*toy.device;
    for block in 0..1000 {
        let home = device.read_at((FREE + block) * SIZE as u64, SIZE).unwrap();
        assert!(home.iter().all(|byte| *byte == block as u8), "block {block}");
    }
}

/// What a transaction freed stays in memory until it has committed, and cost no credits: a
/// million pointer blocks of a large file were all kept.
#[test]
fn blocks_that_were_freed_keep_to_the_memory_for_them() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let toy = toy_with(dir.path(), "64bit,metadata_csum", 256);
    let free = |handle: &Handle, block: u64| {
        let buffer = toy.buffers.bread(FREE + block).unwrap();
        handle.revoke(FREE + block);
        drop(buffer);
    };
    let before = toy.journal.committed_tid();
    (0..1000).for_each(|block| free(&toy.journal.start(1).unwrap(), block));
    let commits = toy.journal.committed_tid() - before;
    assert!(commits >= 3, "{commits} commits");
    // And under one handle, which is told to begin again.
    toy.journal.commit_all().unwrap();
    let handle = toy.journal.start(1).unwrap();
    let room = (0..1000).take_while(|block| {
        free(&handle, *block);
        handle.extend(0).unwrap()
    });
    assert_eq!(room.count(), 256);
}

#[test]
fn the_kernel_mounts_and_replays_our_log() {
    let dir = scratch();
    if !have_e2fsprogs() || !have_kernel_mounts(dir.path()) {
        return;
    }
    for features in ["64bit,metadata_csum", "^64bit,^metadata_csum"] {
        let toy = toy(dir.path(), features);
        let (_, error) = work(&toy, 4, 300);
        assert_eq!(error, None);
        let cut = with_needs_recovery(toy.device.below.snapshot());
        let image = dir.path().join("cut");
        std::fs::write(&image, &cut).unwrap();
        drop(KernelMount::new(&image, "").unwrap());
        let theirs = std::fs::read(&image).unwrap();
        let ours = recover(cut, &toy.map);
        let blocks = FREE as usize * SIZE..(FREE + BLOCKS) as usize * SIZE;
        assert!(ours[blocks.clone()] == theirs[blocks], "{features}");
        let map = journal_map(&image);
        let device = MemoryDevice::from_vec(theirs);
        assert!(
            !Recovery::open(location(&*device, &map, 1024), &*device).unwrap().needs_recovery()
        );
    }
}

/// Without needs_recovery in the superblock nobody looks at the log.
fn with_needs_recovery(mut image: Vec<u8>) -> Vec<u8> {
    image[1024 + 0x60] |= 4;
    let checksum = uext_ondisk::checksum::crc32c(!0, &image[1024..1024 + 0x3FC]);
    if geometry(&image).csum {
        image[1024 + 0x3FC..2048].copy_from_slice(&checksum.to_le_bytes());
    }
    image
}
