//! Defects planted in what a run left: each must be found, and be called what it is.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use uext_tests::scratch::Scratch;
use uext_tools::drive::block::BlockId;
use uext_tools::drive::ledger::Ledger;
use uext_tools::drive::plan::{Plan, dir_name, file_id, file_name};

use crate::{drive, run, verify};

/// A run of `mail`, with its table.
struct Planted {
    _scratch: Scratch,
    dir: PathBuf,
    log: PathBuf,
    ledger: Ledger,
    plan: Plan,
}

impl Planted {
    fn new() -> Self {
        let scratch = Scratch::new();
        let dir = scratch.mount_point("dir");
        let log = scratch.path().join("log");
        let words = "--profile mail --clients 2 --threads 2 --ops 4000";
        let (code, _) = run(drive(&dir, words).arg("--log").arg(&log));
        assert_eq!(code, 0);
        assert_eq!(verify(&dir, &log), (0, Vec::new()), "before anything is planted");
        let (ledger, plan) = Ledger::open(&log).expect("the log");
        Self { _scratch: scratch, dir, log, ledger, plan }
    }

    fn path(&self, slot: usize, state: u64) -> PathBuf {
        let dir = dir_name(self.plan.client_of(slot), self.plan.dir_of(slot, state));
        self.dir.join("uext-drive").join(dir).join(file_name(slot, state))
    }

    /// Files whose first two blocks are promised, as they are.
    fn promised(&self) -> impl Iterator<Item = (usize, PathBuf)> {
        (0..self.ledger.slots()).filter_map(|slot| {
            let entry = self.ledger.slot(slot);
            let state = entry.issued();
            let whole = |block| {
                let known = self.ledger.block(slot, block);
                known.synced() > 0 && known.synced() == known.issued()
            };
            let fits = entry.synced() == state && entry.is_present(state);
            (fits && whole(0) && whole(1)).then(|| (slot, self.path(slot, state)))
        })
    }

    fn id(&self, slot: usize, block: usize) -> BlockId {
        let file = file_id(slot, self.ledger.slot(slot).birth());
        let offset = (block * self.plan.block()) as u64;
        BlockId { run: self.plan.run, file, offset }
    }

    /// Changes a file, sees what is found, and puts it back.
    fn expect(&self, path: &Path, kinds: &[&str], plant: impl FnOnce(&Path)) {
        let before = fs::read(path).ok();
        plant(path);
        let (code, found) = verify(&self.dir, &self.log);
        match before {
            Some(contents) => fs::write(path, contents).expect("put back"),
            None => fs::remove_file(path).expect("put back"),
        }
        assert_eq!((code, found.iter().map(String::as_str).collect()), (3, kinds.to_vec()));
        assert_eq!(verify(&self.dir, &self.log), (0, Vec::new()), "all is as it was");
    }
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("the file");
    file.write_all_at(bytes, at).expect("written");
}

#[test]
fn each_planted_defect_is_found_and_called_what_it_is() {
    let run = Planted::new();
    let (slot, path) = run.promised().next().expect("a file that was synced");
    let (_, other) = run.promised().nth(1).expect("another");
    let block = run.plan.block();
    let version = run.ledger.block(slot, 1).issued();
    let stamped = |version| {
        let mut contents = vec![0; block];
        run.id(slot, 1).stamp(version, &mut contents);
        contents
    };

    let older = stamped(version - 1);
    run.expect(&path, &["lost write"], |path| overwrite(path, block as u64, &older));
    run.expect(&path, &["lost write"], |path| overwrite(path, block as u64, &vec![0; block]));
    run.expect(&path, &["lost write"], |path| {
        OpenOptions::new().write(true).open(path).expect("it").set_len(block as u64).expect("cut");
        // Later blocks, where there are some, are lost as well: they go first.
        let blocks = run.ledger.slot(slot).length();
        let rest: Vec<u8> = (2..blocks)
            .flat_map(|at| {
                let mut contents = vec![0; block];
                let version = run.ledger.block(slot, at).issued();
                run.id(slot, at).stamp(version, &mut contents);
                contents
            })
            .collect();
        overwrite(path, 2 * block as u64, &rest);
    });
    // Half of it is the write before.
    run.expect(&path, &["torn block"], |path| overwrite(path, block as u64, &older[..2048]));
    run.expect(&path, &["torn block"], |path| overwrite(path, block as u64 + 1000, b"bit rot"));
    let newer = stamped(version + 1);
    run.expect(&path, &["unknown write"], |path| overwrite(path, block as u64, &newer));
    let foreign = fs::read(&other).expect("the other")[block..2 * block].to_vec();
    run.expect(&path, &["foreign block"], |path| overwrite(path, block as u64, &foreign));
    run.expect(&path, &["lost file"], |path| fs::remove_file(path).expect("removed"));
    let stranger = path.with_file_name("unknown");
    run.expect(&stranger, &["unknown file"], |path| fs::write(path, "x").expect("made"));
}

#[test]
fn a_resurrected_file_is_found() {
    let run = Planted::new();
    // A deletion that was made safe, and nothing since.
    let slot = (0..run.ledger.slots()).find(|&slot| {
        let entry = run.ledger.slot(slot);
        entry.synced() > 1 && entry.issued() == entry.synced() && !entry.is_present(entry.issued())
    });
    let slot = slot.expect("4000 steps delete something, and sync its directory");
    let path = run.path(slot, run.ledger.slot(slot).issued() - 1);
    let (_, some) = run.promised().next().expect("a file");
    run.expect(&path, &["resurrected file"], |path| {
        fs::copy(&some, path).expect("copied");
    });
}

/// A file of a run is damaged while the run goes on: a client finds it when it reads.
#[test]
fn damage_during_a_run_is_found_by_who_reads_it() {
    let scratch = Scratch::new();
    let file = scratch.sparse("disk", 8 << 20);
    let words = "--profile database --clients 2 --time 3s";
    let mut command = drive(&file, words);
    let child = command.stdout(std::process::Stdio::piped()).spawn().expect("it runs");
    std::thread::sleep(std::time::Duration::from_millis(700));
    for at in (0..8u64 << 20).step_by(8192) {
        overwrite(&file, at + 600, &[0x5a; 8]);
    }
    let output = child.wait_with_output().expect("it ends");
    let (code, figures) = crate::read(&output, &command);
    assert_eq!(code, 3, "{figures:#}");
    assert_eq!(figures["status"], "wrong data");
    let kinds = figures["findings"].as_array().expect("findings");
    assert!(kinds.iter().all(|finding| finding["kind"] == "torn block"), "{figures:#}");
}
