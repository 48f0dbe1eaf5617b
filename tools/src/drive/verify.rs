//! Compares what is there with what the table says must be, may be, and can't be.
//!
//! After a crash the disk may be anything between what was promised (`synced`) and what was
//! begun (`issued`). Without one, when the run has just ended, it must be what was done.
//!
//! | found | is |
//! |---|---|
//! | no file, though each allowed state has one | a lost file |
//! | a name older than what was promised | a resurrected file |
//! | a name that no state has had | an unknown file |
//! | two names of one slot | a rename that was half done |
//! | a version before the promised one; nothing or zeroes for one | a lost write |
//! | a version that no write was begun for | an unknown write |
//! | another file's block | a foreign block: stale contents |
//! | sectors of versions that are not all allowed, or in a promised block | a torn block |
//!
//! A block that was being overwritten, and not synced since, may be old in some sectors and
//! new in others: nobody promised otherwise. These are counted and not complained about.
//!
//! Locks: none; the clients have ended.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::block::{BlockId, Found, describe};
use super::ledger::Ledger;
use super::message::Finding;
use super::plan::{DIRECTORY, Plan, Target, dir_name, file_id, file_name, parse_file_name};
use super::raw::Raw;

/// Findings that are kept in full.
const KEPT: usize = 1000;

/// When the table is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The run has just ended: what is done is there.
    Now,
    /// After a crash or a remount: what was promised is there.
    Later,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Files that were read.
    pub files: u64,
    /// Blocks that were checked.
    pub blocks: u64,
    /// Blocks, of these, that had to be there.
    pub promised: u64,
    /// Blocks and files that were begun and are not there, which nobody promised.
    pub gone: u64,
    /// Blocks half old and half new, which nobody promised otherwise.
    pub mixed: u64,
    /// How much is wrong.
    pub count: u64,
    /// The first of it.
    pub findings: Vec<Finding>,
}

impl Verdict {
    fn find(&mut self, kind: &str, path: &Path, text: String) {
        self.count += 1;
        if self.findings.len() < KEPT {
            let path = path.display().to_string();
            self.findings.push(Finding { kind: kind.into(), path, text });
        }
    }
}

/// Checks a target.
///
/// # Errors
/// What can't be read, in a line: not a finding, since nothing was found.
pub fn verify(plan: &Plan, ledger: &Ledger, target: &Path, when: When) -> Result<Verdict, String> {
    let mut check = Check { plan, ledger, when, verdict: Verdict::default(), buffer: Vec::new() };
    match &plan.target {
        Target::Directory(_) => check.directory(&target.join(DIRECTORY))?,
        Target::Device(..) | Target::Nbd(..) => check.device(target)?,
    }
    Ok(check.verdict)
}

struct Check<'a> {
    plan: &'a Plan,
    ledger: &'a Ledger,
    when: When,
    verdict: Verdict,
    buffer: Vec<u8>,
}

impl Check<'_> {
    fn directory(&mut self, root: &Path) -> Result<(), String> {
        let mut found: BTreeMap<usize, Vec<(u64, PathBuf)>> = BTreeMap::new();
        for client in 0..self.plan.clients {
            for dir in 0..self.plan.workload.dirs {
                let path = root.join(dir_name(client, dir));
                let entries = match std::fs::read_dir(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    entries => entries.map_err(|error| format!("{}: {error}", path.display()))?,
                };
                for entry in entries {
                    let entry = entry.map_err(|error| format!("{}: {error}", path.display()))?;
                    let path = entry.path();
                    let name = entry.file_name().to_string_lossy().into_owned();
                    match parse_file_name(&name) {
                        Some((slot, state)) if slot < self.ledger.slots() => {
                            found.entry(slot).or_default().push((state, path));
                        }
                        // Second names, links and directories of a step that was cut off.
                        _ if name.starts_with(['l', 's', 'm']) => {}
                        _ => self.verdict.find("unknown file", &path, "nobody made it".into()),
                    }
                }
            }
        }
        for slot in 0..self.ledger.slots() {
            let names = found.remove(&slot).unwrap_or_default();
            self.slot(root, slot, &names)?;
        }
        Ok(())
    }

    /// The states, from and to, that a slot may be in.
    fn states(&self, slot: usize) -> (u64, u64) {
        let entry = self.ledger.slot(slot);
        let least = if self.when == When::Now { entry.done() } else { entry.synced() };
        (least, entry.issued())
    }

    fn slot(&mut self, root: &Path, slot: usize, names: &[(u64, PathBuf)]) -> Result<(), String> {
        let entry = self.ledger.slot(slot);
        let (least, most) = self.states(slot);
        let known = |state: u64| most - state < 64;
        if names.is_empty() {
            let may_be_absent =
                least == 0 || (least..=most).any(|state| !known(state) || !entry.is_present(state));
            if may_be_absent {
                self.verdict.gone += u64::from(most > least);
            } else {
                let (client, dir) = (self.plan.client_of(slot), self.plan.dir_of(slot, least));
                let path = root.join(dir_name(client, dir)).join(file_name(slot, least));
                self.verdict.find("lost file", &path, "it was made safe, and is not there".into());
            }
            return Ok(());
        }
        if names.len() > 1 {
            let all: Vec<_> = names.iter().map(|(_, path)| path.display().to_string()).collect();
            self.verdict.find("two names", &names[0].1, format!("one file is {}", all.join(", ")));
        }
        for (state, path) in names {
            let place = dir_name(self.plan.client_of(slot), self.plan.dir_of(slot, *state));
            if !path.parent().is_some_and(|parent| parent.ends_with(&place)) {
                self.verdict.find("unknown file", path, format!("it belongs in {place}"));
            }
            if *state > most || (known(*state) && !entry.is_present(*state)) {
                self.verdict.find("unknown file", path, "nobody made it by this name".into());
            } else if *state < least {
                let text = format!("state {state}, when {least} was safe: it had gone by then");
                self.verdict.find("resurrected file", path, text);
            } else if *state >= entry.birth() {
                self.contents(slot, path)?;
            } else {
                // A file that a later one took the place of: its blocks' entries are the
                // later one's.
                self.verdict.gone += 1;
            }
        }
        Ok(())
    }

    fn contents(&mut self, slot: usize, path: &Path) -> Result<(), String> {
        let fail = |error: io::Error| format!("{}: {error}", path.display());
        let file = File::open(path).map_err(fail)?;
        let size = file.metadata().map_err(fail)?.len();
        self.verdict.files += 1;
        let block = self.plan.workload.block;
        let entry = self.ledger.slot(slot);
        let (length, longest) = (entry.length() as u64, entry.longest() as u64);
        let decided = entry.issued() == entry.done();
        let undecided = |at: usize| {
            let known = self.ledger.block(slot, at);
            known.issued() != known.done()
        };
        let settled = decided && (0..entry.longest()).all(|at| !undecided(at));
        if self.when == When::Now && settled && size != length * block {
            self.verdict.find("wrong size", path, format!("{size} bytes for {}", length * block));
        }
        if size.div_ceil(block) > longest {
            let text = format!("{size} bytes, and it never had more than {}", longest * block);
            self.verdict.find("unknown write", path, text);
        }
        let id = file_id(slot, entry.birth());
        self.blocks(slot, id, path, &mut Raw::File(file), 0, size.min(longest * block))
    }

    fn device(&mut self, path: &Path) -> Result<(), String> {
        let mut raw = Raw::open(path)?;
        for slot in 0..self.ledger.slots() {
            let entry = self.ledger.slot(slot);
            if entry.birth() == 0 {
                continue;
            }
            let size = entry.longest() as u64 * self.plan.workload.block;
            let id = file_id(slot, entry.birth());
            self.verdict.files += 1;
            self.blocks(slot, id, path, &mut raw, self.plan.device_offset(slot), size)?;
        }
        Ok(())
    }

    /// Checks all blocks of a slot; `size` bytes of them are there, from `base` on.
    fn blocks(
        &mut self,
        slot: usize,
        file_id: u64,
        path: &Path,
        raw: &mut Raw,
        base: u64,
        size: u64,
    ) -> Result<(), String> {
        let block = self.plan.block();
        let per = ((1 << 20) / block).max(1);
        let longest = self.ledger.slot(slot).longest();
        let mut buffer = std::mem::take(&mut self.buffer);
        for from in (0..longest).step_by(per) {
            let to = (from + per).min(longest);
            let (start, end) = ((from * block) as u64, ((to * block) as u64).min(size));
            // At most a megabyte, or a block.
            buffer.resize(end.saturating_sub(start) as usize, 0);
            raw.read_exact_at(&mut buffer, base + start)
                .map_err(|error| format!("{}: {error}", path.display()))?;
            for at in from..to {
                let offset = (at * block) as u64;
                let begin = ((at - from) * block).min(buffer.len());
                let contents = &buffer[begin..(begin + block).min(buffer.len())];
                let id = BlockId { run: self.plan.run, file: file_id, offset };
                self.block(slot, at, id, contents, path);
            }
        }
        self.buffer = buffer;
        Ok(())
    }

    fn block(&mut self, slot: usize, at: usize, id: BlockId, contents: &[u8], path: &Path) {
        let known = self.ledger.block(slot, at);
        let (issued, first) = (known.issued(), known.first());
        let least = if self.when == When::Now { known.done() } else { known.synced() };
        let most = if first == 0 { 0 } else { issued };
        self.verdict.blocks += 1;
        self.verdict.promised += u64::from(least > 0);
        let allowed = |version: u32| {
            version >= least && version <= most && (version == 0 || version >= first)
        };
        let whole = contents.len() == self.plan.block();
        let found = if contents.is_empty() {
            Found::Zeroes
        } else if whole {
            id.check(contents)
        } else {
            Found::Damaged
        };
        let sectors = if found == Found::Damaged { id.sectors(contents) } else { Vec::new() };
        let right = match &found {
            Found::Version(version) => allowed(*version),
            Found::Zeroes => {
                self.verdict.gone += u64::from(least == 0 && most > 0);
                least == 0
            }
            Found::Foreign(..) => false,
            Found::Damaged => {
                let window = most > least && (whole || least == 0);
                let right = window
                    && sectors.iter().all(|version| {
                        version.is_some_and(|v| if v == 0 { least == 0 } else { allowed(v) })
                    });
                self.verdict.mixed += u64::from(right);
                right
            }
        };
        if !right {
            let (kind, text) = describe(at, least, &found, &sectors);
            self.verdict.find(kind, path, text);
        }
    }
}
