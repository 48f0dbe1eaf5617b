//! File devices: who may open them, what they refuse, and that every bio ends
//! once, whatever the thread that submitted it does next.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use common::{disk_file, file_in, loop_device, raw, tmpfs_file};
use uext_blockdev::file::Engine;
use uext_blockdev::{
    AlignedBuf, Bio, BioFlags, BioOp, BioVec, BlkStatus, BlockDevice, FileDevice, OpenError,
    OpenOptions, Plug, Sector, submit_bio_wait,
};

const ENGINES: [Engine; 3] = [Engine::Sync, Engine::IoUring, Engine::Aio];
const LONG: Duration = Duration::from_secs(30);

fn open(path: &Path, engine: Engine) -> Arc<FileDevice> {
    FileDevice::open(path, OpenOptions { engine, ..OpenOptions::default() }).unwrap()
}

fn read_only() -> OpenOptions {
    OpenOptions { read_only: true, ..OpenOptions::default() }
}

fn bio(op: BioOp, sector: u64, bytes: usize, fill: u8) -> Bio {
    let mut bio = Bio::new(op, BioFlags::empty(), Sector(sector));
    bio.add_vec(BioVec::whole(Arc::new(AlignedBuf::from_slice(&vec![fill; bytes]))));
    bio
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let place = disk_file();
    place.resize(1 << 20);
    let writer = FileDevice::open(place.path(), OpenOptions::default()).unwrap();
    let second = FileDevice::open(place.path(), OpenOptions::default());
    assert!(matches!(second, Err(OpenError::InUse(_))));
    assert!(matches!(FileDevice::open(place.path(), read_only()), Err(OpenError::InUse(_))));
    drop(writer);
    let readers = [0, 1].map(|_| FileDevice::open(place.path(), read_only()).unwrap());
    let writer = FileDevice::open(place.path(), OpenOptions::default());
    assert!(matches!(writer, Err(OpenError::InUse(_))));
    drop(readers);
    FileDevice::open(place.path(), OpenOptions::default()).unwrap();
}

#[test]
fn holes_and_what_was_only_reserved_are_sparse() {
    let place = disk_file();
    place.resize(4 << 20);
    let dev = open(place.path(), Engine::Sync);
    let (part, sector) = (64 << 10, |offset: u64| Sector(offset / 512));
    for offset in [0, 1 << 20] {
        submit_bio_wait(&*dev, bio(BioOp::Write, offset / 512, part, 7)).unwrap();
    }
    // Reserved by the way.
    submit_bio_wait(&*dev, Bio::range(BioOp::WriteZeroes, sector(2 << 20), 1 << 20)).unwrap();
    let part = part as u64;
    for written in [0, 1 << 20] {
        assert!(!dev.is_sparse(sector(written), part));
        assert!(dev.is_sparse(sector(written), part + 4096));
    }
    for offset in [part, 2 << 20, (4 << 20) - part] {
        assert!(dev.is_sparse(sector(offset), part), "at {offset}");
    }
    // Nothing was written past the end, and no number overflows.
    assert!(dev.is_sparse(sector(0), u64::MAX));
}

#[test]
fn a_block_device_is_claimed_from_the_kernel() {
    let Some(place) = loop_device(8 << 20) else { return };
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(place.path()).status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("SKIP: no mkfs.ext4");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mount = || {
        Command::new("mount")
            .arg(place.path())
            .arg(dir.path())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap()
            .success()
    };
    let dev = FileDevice::open(place.path(), OpenOptions::default()).unwrap();
    assert!(!mount(), "the kernel can't have it too");
    drop(dev);
    // A child that another test is just starting may still have a copy of the claim.
    assert!((0..50).any(|_| mount() || {
        std::thread::sleep(Duration::from_millis(20));
        false
    }));
    let taken = FileDevice::open(place.path(), OpenOptions::default());
    let look = FileDevice::open(place.path(), read_only()).map(drop);
    assert!(Command::new("umount").arg(dir.path()).status().unwrap().success());
    assert!(matches!(taken, Err(OpenError::InUse(_))));
    look.unwrap();
}

#[test]
fn what_is_no_device_is_refused_by_its_kind() {
    let open = |path: &str| FileDevice::open(path, OpenOptions::default()).map(drop).unwrap_err();
    assert!(matches!(open("/nowhere/at/all"), OpenError::NotFound(_)));
    assert!(matches!(open("/tmp"), OpenError::NotADevice(_)));
    assert!(matches!(open("/dev/null"), OpenError::NotADevice(_)));
    assert!(open("/tmp").to_string().contains("/tmp is neither"));
}

#[test]
fn a_read_only_device_reads_flushes_and_refuses_changes() {
    let place = disk_file();
    place.resize(1 << 20);
    for engine in ENGINES {
        let options = OpenOptions { engine, ..read_only() };
        let dev = FileDevice::open(place.path(), options).unwrap();
        let dev: &dyn BlockDevice = &*dev;
        dev.read_at(1000, 1000).unwrap();
        dev.flush().unwrap();
        assert_eq!(dev.write_at(0, &[0; 512], BioFlags::empty()), Err(BlkStatus::ReadOnly));
        for op in [BioOp::Discard, BioOp::WriteZeroes] {
            let refused = submit_bio_wait(dev, Bio::range(op, Sector(0), 512));
            assert_eq!(refused.map(drop), Err(BlkStatus::ReadOnly));
        }
    }
}

#[test]
fn bios_outside_or_misaligned_are_invalid_both_ways() {
    let place = disk_file();
    place.resize(1 << 20);
    let mut shifted = Bio::new(BioOp::Read, BioFlags::empty(), Sector(0));
    shifted.add_vec(BioVec::part(Arc::new(AlignedBuf::new(4096)), 3, 512));
    let mut bad = vec![
        bio(BioOp::Read, 2048, 512, 0),
        bio(BioOp::Read, 2047, 1024, 0),
        bio(BioOp::Write, u64::MAX, 512, 0),
        bio(BioOp::Write, u64::MAX / 512, 512, 0),
        bio(BioOp::Read, 0, 100, 0),
        Bio::range(BioOp::Discard, Sector(1), u64::MAX - 511),
    ];
    for engine in ENGINES {
        let dev = open(place.path(), engine);
        if dev.is_direct() && dev.limits().dma_alignment > 1 {
            bad.push(shifted.piece(0, 512));
        }
        for bio in &bad {
            let again = || {
                if bio.op() == BioOp::Discard {
                    Bio::range(BioOp::Discard, bio.sector(), bio.len())
                } else {
                    bio.piece(0, bio.len())
                }
            };
            assert_eq!(submit_bio_wait(&*dev, again()).map(drop), Err(BlkStatus::Invalid));
            let (send, recv) = channel();
            let mut bio = again();
            bio.set_end_io(move |bio| send.send(bio.status()).unwrap());
            dev.submit_bio(bio);
            assert_eq!(recv.recv_timeout(LONG).unwrap(), Err(BlkStatus::Invalid));
        }
    }
}

#[test]
fn the_tail_of_an_odd_length_is_not_used() {
    let place = disk_file();
    place.resize((1 << 20) + 700);
    let dev = open(place.path(), Engine::Auto);
    assert_eq!((&*dev as &dyn BlockDevice).size(), (1 << 20) + 512);
    drop(dev);
    place.resize(100);
    let dev = open(place.path(), Engine::Auto);
    let dev: &dyn BlockDevice = &*dev;
    assert_eq!(dev.size(), 0);
    assert_eq!(dev.read_at(0, 1), Err(BlkStatus::Invalid));
    assert_eq!(dev.read_at(0, 0), Ok(vec![]));
}

#[test]
fn a_device_with_4096_byte_sectors_says_so_and_is_used_so() {
    let file = disk_file();
    file.resize((1 << 20) + 512);
    let out =
        Command::new("losetup").args(["-f", "--show", "-b", "4096"]).arg(file.path()).output();
    let path = match out {
        Ok(out) if out.status.success() => String::from_utf8(out.stdout).unwrap(),
        other => return eprintln!("SKIP: no loop device: {other:?}"),
    };
    let run = || {
        for engine in ENGINES {
            let dev = open(Path::new(path.trim()), engine);
            assert_eq!(dev.limits().logical_block_size, 4096);
            let dev: &dyn BlockDevice = &*dev;
            assert_eq!(dev.size(), 1 << 20);
            dev.write_at(5000, b"hello", BioFlags::FUA).unwrap();
            assert_eq!(dev.read_at(5000, 5).unwrap(), b"hello");
            let odd = submit_bio_wait(dev, bio(BioOp::Read, 1, 512, 0)).map(drop);
            assert_eq!(odd, Err(BlkStatus::Invalid));
        }
    };
    let result = std::panic::catch_unwind(run);
    assert!(Command::new("losetup").arg("-d").arg(path.trim()).status().unwrap().success());
    result.unwrap();
}

#[test]
fn tmpfs_goes_through_the_page_cache_and_a_disk_does_not() {
    let place = disk_file();
    place.resize(1 << 20);
    assert!(open(place.path(), Engine::Auto).is_direct(), "the build directory is on a disk");
    let options = OpenOptions { direct: false, ..OpenOptions::default() };
    assert!(!FileDevice::open(place.path(), options).unwrap().is_direct());
    let Some(place) = tmpfs_file() else { return };
    place.resize(1 << 20);
    for engine in ENGINES {
        let dev = open(place.path(), engine);
        let dev: &dyn BlockDevice = &*dev;
        let both = BioFlags::PREFLUSH | BioFlags::FUA;
        dev.write_at(0, &[3; 100_000], both).unwrap();
        dev.flush().unwrap();
        assert_eq!(dev.read_at(99_999, 1).unwrap(), [3]);
    }
}

#[test]
fn a_discard_gives_space_back_and_zeroing_zeroes() {
    use std::os::unix::fs::MetadataExt;
    let place = disk_file();
    place.resize(1 << 20);
    for engine in ENGINES {
        let dev = open(place.path(), engine);
        let dev: &dyn BlockDevice = &*dev;
        dev.write_at(0, &[9; 1 << 20], BioFlags::FUA).unwrap();
        let before = raw(&place).metadata().unwrap().blocks();
        submit_bio_wait(dev, Bio::range(BioOp::Discard, Sector(0), 512 << 10)).unwrap();
        assert!(raw(&place).metadata().unwrap().blocks() < before);
        submit_bio_wait(dev, Bio::range(BioOp::WriteZeroes, Sector(1025), 512)).unwrap();
        let data = dev.read_at(524_288, 2048).unwrap();
        assert_eq!((data[511], data[512], data[1023], data[1024]), (9, 0, 0, 9));
    }
}

#[test]
fn a_file_that_shrinks_gives_errors_and_not_zeroes() {
    let place = disk_file();
    for engine in ENGINES {
        place.resize(1 << 20);
        let dev = open(place.path(), engine);
        place.resize(256 << 10);
        let far = || bio(BioOp::Read, 1024, 4096, 0);
        assert_eq!(submit_bio_wait(&*dev, far()).map(drop), Err(BlkStatus::IoErr));
        let across = bio(BioOp::Read, 508, 8192, 0);
        assert_eq!(submit_bio_wait(&*dev, across).map(drop), Err(BlkStatus::IoErr));
        let batch = dev.submit_bios_wait(vec![far(), bio(BioOp::Read, 0, 4096, 0)]);
        let failed = batch.iter().filter(|bio| bio.status() == Err(BlkStatus::IoErr)).count();
        assert_eq!((batch.len(), failed), (2, 1));
        let (send, recv) = channel();
        let mut far = far();
        far.set_end_io(move |bio| send.send(bio.status()).unwrap());
        dev.submit_bio(far);
        assert_eq!(recv.recv_timeout(LONG).unwrap(), Err(BlkStatus::IoErr));
    }
}

#[test]
fn no_space_below_is_told_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "none"])
        .arg(dir.path())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        return eprintln!("SKIP: root is needed to mount a small tmpfs");
    }
    let results = {
        let place = file_in("small tmpfs", dir.path());
        place.resize(1 << 20);
        ENGINES.map(|engine| {
            let dev = open(place.path(), engine);
            let batch = dev.submit_bios_wait(vec![
                bio(BioOp::Write, 0, 512 << 10, 1),
                bio(BioOp::Write, 1024, 512 << 10, 1),
            ]);
            let failed = batch.iter().any(|bio| bio.status() == Err(BlkStatus::NoSpc));
            (failed, (&*dev as &dyn BlockDevice).write_at(0, &[1; 1 << 20], BioFlags::FUA))
        })
    };
    assert!(Command::new("umount").arg(dir.path()).status().unwrap().success());
    assert_eq!(results, [(true, Err(BlkStatus::NoSpc)); 3]);
}

#[test]
fn more_bios_than_any_queue_holds_all_end_once_and_in_place() {
    const BIOS: u64 = 5000;
    let place = disk_file();
    place.resize(BIOS * 512);
    for engine in ENGINES {
        let dev = open(place.path(), engine);
        let (send, recv) = channel();
        let bios = (0..BIOS)
            .map(|n| {
                let mut bio = bio(BioOp::Write, n, 512, (n % 251) as u8);
                let send = send.clone();
                bio.set_end_io(move |bio| send.send((bio.sector().0, bio.status())).unwrap());
                bio
            })
            .collect();
        drop(send);
        dev.submit_bios(bios);
        let ended: Vec<_> = recv.iter().collect();
        assert!(ended.iter().all(|(_, status)| status.is_ok()));
        let sectors: HashSet<_> = ended.iter().map(|(sector, _)| *sector).collect();
        assert_eq!((ended.len() as u64, sectors.len() as u64), (BIOS, BIOS));
        let data = (&*dev as &dyn BlockDevice).read_at(0, (BIOS * 512) as usize).unwrap();
        assert!(data.chunks(512).enumerate().all(|(n, chunk)| chunk == [(n % 251) as u8; 512]));
    }
}

/// io_uring cancels the queued requests of a thread that exits; they must be done
/// all the same, since it is the journal's flush that would be lost.
#[test]
fn bios_outlive_the_thread_that_submitted_them() {
    let place = disk_file();
    place.resize(16 << 20);
    for engine in ENGINES {
        let dev = open(place.path(), engine);
        let (send, recv) = channel();
        for round in 0..20u64 {
            let (dev, send) = (dev.clone(), send.clone());
            let submitter = std::thread::spawn(move || {
                for n in 0..32 {
                    let mut bio = if n % 4 == 3 {
                        Bio::flush()
                    } else {
                        bio(BioOp::Write, (round * 32 + n) * 8, 4096, 1)
                    };
                    let send = send.clone();
                    bio.set_end_io(move |bio| send.send(bio.status()).unwrap());
                    dev.submit_bio(bio);
                }
            });
            submitter.join().unwrap();
        }
        for _ in 0..20 * 32 {
            assert_eq!(recv.recv_timeout(LONG).unwrap(), Ok(()));
        }
    }
}

/// The engine's thread has gone to sleep, or is about to, when the next bio comes.
#[test]
fn a_bio_that_comes_late_is_not_left_lying() {
    let place = disk_file();
    place.resize(16 << 20);
    for engine in ENGINES {
        let dev = open(place.path(), engine);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let dev = &dev;
                scope.spawn(move || {
                    for n in 0..250u64 {
                        let (send, recv) = channel();
                        let mut bio = bio(BioOp::Write, (thread * 250 + n) * 8, 4096, 3);
                        bio.set_end_io(move |bio| send.send(bio.status()).unwrap());
                        dev.submit_bio(bio);
                        assert_eq!(recv.recv_timeout(LONG), Ok(Ok(())), "{engine:?}");
                        std::thread::sleep(Duration::from_micros(n * 97 % 300));
                    }
                });
            }
        });
    }
}

/// The engine's thread may not have begun when it is to stop.
#[test]
fn a_device_that_is_dropped_at_once_is_gone() {
    let place = disk_file();
    place.resize(4 << 20);
    let (send, recv) = channel();
    std::thread::spawn(move || {
        for engine in ENGINES {
            for _ in 0..100 {
                drop(open(place.path(), engine));
            }
        }
        send.send(()).unwrap();
    });
    assert_eq!(recv.recv_timeout(LONG), Ok(()), "a device is still there");
}

#[test]
fn dropping_the_device_waits_for_what_is_in_flight() {
    let place = disk_file();
    place.resize(4 << 20);
    for engine in ENGINES {
        let ended = Arc::new(AtomicUsize::new(0));
        let dev = open(place.path(), engine);
        for n in 0..500u64 {
            let flags =
                if n % 50 == 0 { BioFlags::PREFLUSH | BioFlags::FUA } else { BioFlags::empty() };
            let mut bio = bio(BioOp::Write, n * 8, 4096, 2);
            bio.set_flags(flags);
            let ended = ended.clone();
            bio.set_end_io(move |bio| {
                bio.status().unwrap();
                ended.fetch_add(1, Ordering::SeqCst);
            });
            dev.submit_bio(bio);
        }
        drop(dev);
        assert_eq!(ended.load(Ordering::SeqCst), 500);
    }
}

#[test]
fn an_end_io_may_submit_more_panic_or_drop_the_device() {
    for engine in ENGINES {
        // Of its own, since the device goes some time after the last end_io's news.
        let place = disk_file();
        place.resize(1 << 20);
        let dev = open(place.path(), engine);
        let mut bad = bio(BioOp::Read, 0, 512, 0);
        bad.set_end_io(|_| panic!("a panic on purpose in an end_io"));
        dev.submit_bio(bad);

        /// Reads one sector after the other, each from the end of the last.
        fn next(dev: Arc<FileDevice>, sector: u64, done: std::sync::mpsc::Sender<u64>) {
            let mut read = bio(BioOp::Read, sector, 512, 0);
            let below = dev.clone();
            read.set_end_io(move |bio| {
                bio.status().unwrap();
                if sector == 1500 {
                    done.send(sector).unwrap()
                } else {
                    next(below, sector + 1, done)
                }
            });
            dev.submit_bio(read);
        }
        let (send, recv) = channel();
        // From here on only the end_ios own the device.
        next(dev, 0, send);
        assert_eq!(recv.recv_timeout(LONG).unwrap(), 1500);
    }
}

/// What an `end_io` of a worker submits waits for its return; but its worker alone must not
/// have to do it all.
#[test]
fn what_an_end_io_submits_is_shared_among_the_workers() {
    const BIOS: usize = 4;
    let place = disk_file();
    place.resize(1 << 20);
    let dev = open(place.path(), Engine::Sync);
    let met = Arc::new((std::sync::Mutex::new(0), std::sync::Condvar::new()));
    let (done, ends) = channel();
    let mut first = bio(BioOp::Read, 0, 4096, 0);
    let next = dev.clone();
    first.set_end_io(move |_| {
        for n in 0..BIOS {
            let (met, done) = (met.clone(), done.clone());
            let mut more = bio(BioOp::Read, 8 * n as u64, 4096, 0);
            more.set_end_io(move |bio| {
                let (count, all) = &*met;
                let mut count = count.lock().unwrap();
                *count += 1;
                all.notify_all();
                let waited = all.wait_timeout_while(count, LONG, |count| *count < BIOS).unwrap();
                done.send((bio.status(), waited.1.timed_out())).unwrap();
            });
            next.submit_bio(more);
        }
    });
    dev.submit_bio(first);
    assert_eq!(ends.iter().collect::<Vec<_>>(), [(Ok(()), false); BIOS]);
}

#[test]
fn threads_on_one_device_see_their_own_writes() {
    let place = disk_file();
    place.resize(8 << 20);
    for engine in ENGINES {
        let dev = open(place.path(), engine);
        std::thread::scope(|scope| {
            for thread in 0..6u64 {
                let dev = &dev;
                scope.spawn(move || {
                    for round in 0..20u8 {
                        let base = thread * 2048;
                        let fill = round.wrapping_mul(7).wrapping_add(thread as u8);
                        let (send, recv) = channel();
                        let mut plug = Plug::new(&**dev);
                        for n in (0..64).rev() {
                            let mut bio = bio(BioOp::Write, base + n * 8, 4096, fill);
                            let send = send.clone();
                            bio.set_end_io(move |bio| send.send(bio.status()).unwrap());
                            plug.submit_bio(bio);
                        }
                        plug.finish();
                        drop(send);
                        assert!(recv.iter().all(|status| status.is_ok()));
                        let reads = (0..64).map(|n| bio(BioOp::Read, base + n * 8, 4096, 0));
                        for read in dev.submit_bios_wait(reads.collect()) {
                            read.status().unwrap();
                            assert_eq!(read.data(), vec![fill; 4096]);
                        }
                    }
                });
            }
        });
    }
}

#[test]
fn a_bio_beyond_the_limits_is_split_and_ends_once() {
    let place = disk_file();
    place.resize(16 << 20);
    for engine in ENGINES {
        let dev = open(place.path(), engine);
        let buf = Arc::new(AlignedBuf::from_slice(&[8; 4096]));
        let mut big = Bio::new(BioOp::Write, BioFlags::PREFLUSH | BioFlags::FUA, Sector(0));
        for _ in 0..3000 {
            big.add_vec(BioVec::whole(buf.clone()));
        }
        let (send, recv) = channel();
        big.set_end_io(move |bio| send.send((bio.status(), bio.len())).unwrap());
        dev.submit_bio(big);
        assert_eq!(recv.recv_timeout(LONG).unwrap(), (Ok(()), 3000 * 4096));
        assert!(recv.recv().is_err(), "ends once");
        let data = (&*dev as &dyn BlockDevice).read_at(0, 3001 * 4096).unwrap();
        assert!(data[..3000 * 4096].iter().all(|&byte| byte == 8));
    }
}
