//! The shared table of what was written and what was made safe; with `--log` a file, kept
//! where the crash under test doesn't reach.
//!
//! It is memory that all clients map. It says, for each slot (a place for a file) and each
//! block of it, what was begun, what is done, and what the filesystem has promised to keep.
//! A number is raised *before* the system call that may make it true (`issued`) or *after*
//! the one that promised it (`synced`), so whenever everything stops, however it stops, the
//! disk must be between the two.
//!
//! ```text
//!   0        header: magic, length, and the plan as JSON
//!   64 KiB   slots, eight u64 each
//!   ...      blocks, four u32 each, `blocks` for each slot
//! ```
//!
//! A slot's names have numbers: each create, rename and delete makes the next one, and a
//! file's name holds it, so no name comes twice. Of the last 64 states the slot remembers
//! which had a file. A block's versions count up through all of a slot's files.
//!
//! Locks: an entry's writers take turns by the slot's mutex of `control`; a slot of a
//! directory is one thread's where names change.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use uext_drive_sys::Mapping;
use uext_sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::plan::Plan;

const MAGIC: &[u8; 8] = b"UEXTDRV1";
/// Bytes of the header.
const HEADER: usize = 64 << 10;
/// Numbers of a slot.
const SLOT: usize = 8;
/// Numbers of a block.
const BLOCK: usize = 4;

/// The table.
#[derive(Debug)]
pub struct Ledger {
    mapping: Mapping,
    slots: usize,
    blocks: usize,
}

fn len(slots: usize, blocks: usize) -> usize {
    HEADER + slots * SLOT * 8 + slots * blocks * BLOCK * 4
}

impl Ledger {
    /// A new one for a plan: in a file, or in memory.
    ///
    /// # Errors
    /// One line.
    pub fn create(plan: &Plan, log: Option<&Path>) -> Result<(Self, OwnedFd), String> {
        let json = serde_json::to_vec(plan).map_err(|error| error.to_string())?;
        if json.len() + 16 > HEADER {
            return Err("the workload is too long for the log's header".into());
        }
        let (slots, blocks) = (plan.slots(), plan.blocks_per_slot());
        let make = || -> io::Result<(Self, OwnedFd)> {
            let len = len(slots, blocks);
            let mut header = MAGIC.to_vec();
            // Checked above.
            header.extend((json.len() as u64).to_le_bytes());
            header.extend(&json);
            let fd = match log {
                Some(path) => {
                    let mut options = OpenOptions::new();
                    options.read(true).write(true).create(true).truncate(true);
                    let mut file = options.open(path)?;
                    file.write_all(&header)?;
                    // A full disk must be met here and not by a signal later.
                    nix::fcntl::posix_fallocate(&file, 0, len.try_into().unwrap_or(i64::MAX))?;
                    OwnedFd::from(file)
                }
                None => {
                    let (_, fd) = Mapping::anonymous("uext-drive-table", len)?;
                    let mut file = File::from(fd);
                    file.write_all(&header)?;
                    OwnedFd::from(file)
                }
            };
            let mapping = Mapping::of(&fd, len)?;
            Ok((Self { mapping, slots, blocks }, fd))
        };
        make().map_err(|error| match log {
            Some(path) => format!("{}: {error}", path.display()),
            None => format!("the table: {error}"),
        })
    }

    /// One that a coordinator made.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map(fd: &OwnedFd, plan: &Plan) -> io::Result<Self> {
        let (slots, blocks) = (plan.slots(), plan.blocks_per_slot());
        Ok(Self { mapping: Mapping::of(fd, len(slots, blocks))?, slots, blocks })
    }

    /// One that was kept, and its plan.
    ///
    /// # Errors
    /// One line.
    pub fn open(path: &Path) -> Result<(Self, Plan), String> {
        let fail = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let file = OpenOptions::new().read(true).write(true).open(path);
        let mut file = file.map_err(|error| fail(&error))?;
        let mut start = [0; 16];
        file.read_exact(&mut start).map_err(|_| fail(&"no log of uext drive"))?;
        let (magic, json) = start.split_at(8);
        // A length that is no length is found by the read below.
        let json = u64::from_le_bytes(json.try_into().unwrap_or_default()) as usize;
        if magic != MAGIC || json > HEADER {
            return Err(fail(&"no log of uext drive"));
        }
        let mut text = vec![0; json];
        file.read_exact(&mut text).map_err(|error| fail(&error))?;
        let plan: Plan = serde_json::from_slice(&text).map_err(|error| fail(&error))?;
        let ledger = Self::map(&file.into(), &plan).map_err(|error| fail(&error))?;
        Ok((ledger, plan))
    }

    /// A slot's entry.
    pub fn slot(&self, slot: usize) -> SlotEntry<'_> {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        SlotEntry { numbers: self.mapping.slice(HEADER + slot * SLOT * 8, SLOT) }
    }

    /// A block's entry.
    pub fn block(&self, slot: usize, block: usize) -> BlockEntry<'_> {
        assert!(slot < self.slots && block < self.blocks, "block {block} of slot {slot}");
        let at = HEADER + self.slots * SLOT * 8 + (slot * self.blocks + block) * BLOCK * 4;
        BlockEntry { numbers: self.mapping.slice(at, BLOCK) }
    }

    /// Blocks of a slot.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Slots.
    pub fn slots(&self) -> usize {
        self.slots
    }
}

/// What is known of a slot's names.
#[derive(Clone, Copy, Debug)]
pub struct SlotEntry<'a> {
    /// PAIRS-WITH: the mutex of the slot, and the end of all clients before anything is
    /// verified. WHY-RELAXED: so the order among these numbers is the program's, which the
    /// memory, outliving its writers, keeps.
    numbers: &'a [AtomicU64],
}

impl SlotEntry<'_> {
    fn get(&self, at: usize) -> u64 {
        self.numbers[at].load(Ordering::Acquire)
    }

    fn set(&self, at: usize, value: u64) {
        self.numbers[at].store(value, Ordering::Release); // PAIRS-WITH: get
    }

    /// The last state that was begun.
    pub fn issued(&self) -> u64 {
        self.get(0)
    }

    /// The last state that a system call has confirmed.
    pub fn done(&self) -> u64 {
        self.get(1)
    }

    /// The last state that must survive.
    pub fn synced(&self) -> u64 {
        self.get(2)
    }

    /// The state in which the file of now was made.
    pub fn birth(&self) -> u64 {
        self.get(4)
    }

    /// How long the file of now is, blocks.
    pub fn length(&self) -> usize {
        // It was a usize.
        self.get(5) as usize
    }

    /// How long a file of this slot ever was, blocks.
    pub fn longest(&self) -> usize {
        // It was a usize.
        self.get(6) as usize
    }

    /// A write is about to begin that may make the file so long, blocks.
    pub fn reach(&self, blocks: usize) {
        self.set(6, self.get(6).max(blocks as u64));
    }

    /// The file of now has another length, blocks.
    pub fn set_length(&self, blocks: usize) {
        self.reach(blocks);
        self.set(5, blocks as u64);
    }

    /// Whether a state, one of the last 64, had a file. State 0 had none.
    pub fn is_present(&self, state: u64) -> bool {
        let age = self.issued().saturating_sub(state);
        age < 64 && self.get(3) >> age & 1 == 1
    }

    /// Begins the next state; its number.
    pub fn begin(&self, present: bool) -> u64 {
        let state = self.issued() + 1;
        // A reader between the two finds one state too many that had a file, or one too
        // few of 64: nobody reads while clients run.
        self.set(3, self.get(3) << 1 | u64::from(present));
        self.set(0, state);
        state
    }

    /// Begins the state in which a file is made.
    pub fn begin_file(&self) -> u64 {
        self.set(4, self.issued() + 1);
        self.begin(true)
    }

    /// The last state that was begun is there.
    pub fn confirm(&self) {
        self.set(1, self.issued());
    }

    /// The last state that was begun did not come about, and never will.
    pub fn revoke(&self) {
        let before = self.done();
        let present = self.is_present(before);
        self.begin(present);
    }

    /// A state, and so all before it, is safe.
    pub fn promise(&self, state: u64) {
        self.numbers[2].fetch_max(state, Ordering::AcqRel); // PAIRS-WITH: get
    }
}

/// What is known of a block.
#[derive(Clone, Copy, Debug)]
pub struct BlockEntry<'a> {
    /// PAIRS-WITH: as `SlotEntry::numbers`.
    numbers: &'a [AtomicU32],
}

impl BlockEntry<'_> {
    fn get(&self, at: usize) -> u32 {
        self.numbers[at].load(Ordering::Acquire)
    }

    fn set(&self, at: usize, value: u32) {
        self.numbers[at].store(value, Ordering::Release); // PAIRS-WITH: get
    }

    /// The last version that a write was begun for.
    pub fn issued(&self) -> u32 {
        self.get(0)
    }

    /// The version that is there; 0: none.
    pub fn done(&self) -> u32 {
        self.get(1)
    }

    /// The version that must survive, or a later one; 0: none must.
    pub fn synced(&self) -> u32 {
        self.get(2)
    }

    /// The first version of the file of now.
    pub fn first(&self) -> u32 {
        self.get(3)
    }

    /// Begins a write; its version.
    pub fn begin(&self) -> u32 {
        let version = self.issued() + 1;
        if self.first() == 0 {
            self.set(3, version);
        }
        self.set(0, version);
        version
    }

    /// A write is done.
    pub fn confirm(&self, version: u32) {
        self.set(1, version);
    }

    /// A version is safe.
    pub fn promise(&self, version: u32) {
        self.numbers[2].fetch_max(version, Ordering::AcqRel); // PAIRS-WITH: get
    }

    /// The block is about to go, or was never there: nothing of it must survive.
    pub fn forget(&self) {
        self.set(2, 0);
        self.set(1, 0);
    }

    /// As [`BlockEntry::forget`], for a new file: older versions are another's.
    pub fn begin_file(&self) {
        self.forget();
        self.set(3, 0);
    }
}
