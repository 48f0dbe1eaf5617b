//! Every device against a `Vec<u8>`: random bios, one after the other, batches of
//! disjoint ones, and both ways to wait.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;

use common::{Place, places};
use proptest::prelude::*;
use uext_blockdev::file::Engine;
use uext_blockdev::{
    AlignedBuf, Bio, BioFlags, BioOp, BioVec, BlkStatus, BlockDevice, FileDevice, MemoryDevice,
    OpenOptions, SECTOR_SIZE, Sector, submit_bio_wait,
};

/// Sectors of the device under test; not a multiple of 4 KiB on purpose.
const SECTORS: u64 = 1021;

#[derive(Clone, Debug)]
struct Op {
    kind: BioOp,
    flags: BioFlags,
    sector: u64,
    sectors: u64,
    /// Where the memory is cut into bvecs, in sectors.
    cut: u64,
    fill: u8,
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![
        4 => Just(BioOp::Read),
        6 => Just(BioOp::Write),
        1 => Just(BioOp::Flush),
        1 => Just(BioOp::Discard),
        2 => Just(BioOp::WriteZeroes),
    ];
    let flags = prop_oneof![
        4 => Just(BioFlags::empty()),
        1 => Just(BioFlags::PREFLUSH),
        1 => Just(BioFlags::FUA),
        1 => Just(BioFlags::FUA | BioFlags::PREFLUSH),
    ];
    (kind, flags, 0..SECTORS, 1u64..64, 1u64..16, any::<u8>()).prop_map(
        |(kind, flags, sector, sectors, cut, fill)| Op {
            kind,
            flags,
            sector,
            sectors: sectors.min(SECTORS - sector),
            cut,
            fill,
        },
    )
}

impl Op {
    fn bytes(&self) -> std::ops::Range<usize> {
        let start = (self.sector * SECTOR_SIZE) as usize;
        start..start + (self.sectors * SECTOR_SIZE) as usize
    }

    /// Data that tells each sector from the next.
    fn data(&self) -> Vec<u8> {
        (0..self.bytes().len()).map(|n| self.fill.wrapping_add((n / 512) as u8)).collect()
    }

    /// The bio, and the buffers of its data.
    fn bio(&self) -> Bio {
        match self.kind {
            BioOp::Flush => Bio::flush(),
            BioOp::Discard | BioOp::WriteZeroes => {
                Bio::range(self.kind, Sector(self.sector), self.sectors * SECTOR_SIZE)
            }
            BioOp::Read | BioOp::Write => {
                let mut bio = Bio::new(self.kind, self.flags, Sector(self.sector));
                for part in self.data().chunks((self.cut * SECTOR_SIZE) as usize) {
                    let buf = if self.kind == BioOp::Write {
                        AlignedBuf::from_slice(part)
                    } else {
                        AlignedBuf::new(part.len())
                    };
                    bio.add_vec(BioVec::whole(Arc::new(buf)));
                }
                bio
            }
        }
    }

    /// Does the operation on the model, or compares what was read with it.
    fn check(&self, model: &mut [u8], done: &Bio, dev: &dyn BlockDevice) {
        match self.kind {
            BioOp::Flush => {}
            BioOp::Read => assert_eq!(done.data(), model[self.bytes()]),
            BioOp::Write => model[self.bytes()].copy_from_slice(&self.data()),
            BioOp::WriteZeroes => model[self.bytes()].fill(0),
            // Contents after a discard are the device's choice.
            BioOp::Discard => {
                let bytes = self.bytes();
                let now = dev.read_at(bytes.start as u64, bytes.len()).unwrap();
                model[bytes].copy_from_slice(&now);
            }
        }
    }
}

fn run_ops(dev: &dyn BlockDevice, ops: &[Op]) {
    let size = usize::try_from(dev.size()).unwrap();
    assert_eq!(size as u64, SECTORS * SECTOR_SIZE);
    let mut model = dev.read_at(0, size).unwrap();
    for (n, op) in ops.iter().enumerate() {
        // Odd ones go the asynchronous way and are waited for here.
        let done = if n % 2 == 0 {
            submit_bio_wait(dev, op.bio())
        } else {
            let (send, recv) = std::sync::mpsc::channel();
            let mut bio = op.bio();
            bio.set_end_io(move |bio| send.send(bio).unwrap());
            dev.submit_bio(bio);
            let bio = recv.recv().unwrap();
            bio.status().map(|()| bio)
        };
        match done {
            Ok(done) => op.check(&mut model, &done, dev),
            Err(status) => {
                assert_eq!((status, op.kind), (BlkStatus::NotSupp, BioOp::Discard), "{op:?}");
            }
        }
    }
    assert!(dev.read_at(0, size).unwrap() == model, "contents differ from the model");
}

/// One bio per region of 64 sectors, so that the order of a batch doesn't matter.
fn run_batch(dev: &dyn BlockDevice, ops: &[Op], wait: bool) {
    let size = usize::try_from(dev.size()).unwrap();
    let mut model = dev.read_at(0, size).unwrap();
    let mut ops = ops.to_vec();
    ops.truncate((SECTORS / 64) as usize);
    for (n, op) in ops.iter_mut().enumerate() {
        op.sector = n as u64 * 64;
        if op.kind == BioOp::Discard {
            op.kind = BioOp::WriteZeroes;
        }
    }
    let mut bios = Vec::new();
    for (n, op) in ops.iter().enumerate() {
        let mut bio = op.bio();
        bio.set_private(n as u64);
        bios.push(bio);
    }
    let done = if wait {
        dev.submit_bios_wait(bios)
    } else {
        let (send, recv) = std::sync::mpsc::channel();
        for bio in &mut bios {
            let send = send.clone();
            bio.set_end_io(move |bio| send.send(bio).unwrap());
        }
        drop(send);
        dev.submit_bios(bios);
        recv.iter().collect()
    };
    assert_eq!(done.len(), ops.len());
    for bio in done {
        bio.status().unwrap();
        ops[bio.private() as usize].check(&mut model, &bio, dev);
    }
    assert!(dev.read_at(0, size).unwrap() == model, "contents differ from the model");
}

fn run_all(dev: &dyn BlockDevice, ops: &[Op]) {
    run_ops(dev, ops);
    run_batch(dev, ops, false);
    run_batch(dev, ops, true);
}

fn file_device(place: &Place, engine: Engine) -> Arc<FileDevice> {
    place.resize(SECTORS * SECTOR_SIZE);
    FileDevice::open(place.path(), OpenOptions { engine, ..OpenOptions::default() }).unwrap()
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn memory_device_is_its_model(ops in prop::collection::vec(op(), 1..60)) {
        run_all(&*MemoryDevice::new(SECTORS * SECTOR_SIZE), &ops);
    }

    #[test]
    fn sync_engine_is_its_model(ops in prop::collection::vec(op(), 1..60)) {
        for place in places("sync") {
            run_all(&*file_device(&place, Engine::Sync), &ops);
        }
    }

    #[test]
    fn uring_engine_is_its_model(ops in prop::collection::vec(op(), 1..60)) {
        for place in places("uring") {
            run_all(&*file_device(&place, Engine::IoUring), &ops);
        }
    }

    #[test]
    fn aio_engine_is_its_model(ops in prop::collection::vec(op(), 1..60)) {
        for place in places("aio") {
            run_all(&*file_device(&place, Engine::Aio), &ops);
        }
    }
}
