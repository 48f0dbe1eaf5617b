//! A thread of a client: its part of the preparation, and then step after step.
//!
//! Locks: none of its own; see `files`.

use std::time::{Duration, Instant};

use uext_drive_sys::Direction;

use super::control::{Number, share};
use super::files::{Context, Files, Handle, Outcome};
use super::message::Message;
use super::workload::{Phase, Step, Sync};

/// Pseudo-random numbers (splitmix64), the same for the same seed.
#[derive(Debug)]
pub struct Rng(u64);

impl Rng {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Less than `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        // Less than a usize.
        ((u128::from(self.number()) * end as u128) >> 64) as usize
    }
}

/// The thread.
pub struct Worker<'a> {
    files: Files<'a>,
    context: Context<'a>,
    rng: Rng,
    /// Writes since the start, for `sync_every`.
    writes: usize,
    /// Where the log goes on, blocks.
    log_at: usize,
    steps_left: Option<u64>,
    pace: Option<Pace>,
}

/// When the next step may begin.
struct Pace {
    every: Duration,
    next: Instant,
}

impl<'a> Worker<'a> {
    /// Makes the thread's files: what goes before the start.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn prepare(context: Context<'a>, number: usize) -> Outcome<Self> {
        let plan = context.plan;
        let seed = plan.seed ^ (number as u64).wrapping_mul(0xd6e8_feb8_6659_fd93);
        let steps = share(plan.ops, plan.workers(), number);
        let mut worker = Self {
            files: Files::new(context, number)?,
            context,
            rng: Rng::new(seed),
            writes: 0,
            log_at: 0,
            steps_left: (plan.ops > 0).then_some(steps),
            pace: None,
        };
        if plan.makes_files(number) {
            worker.make_files(number)?;
        }
        Ok(worker)
    }

    fn make_files(&mut self, number: usize) -> Outcome {
        let workload = &self.context.plan.workload;
        // What is shared must be there, whole.
        let full = if workload.share > 1 { 100 } else { usize::from(workload.full) };
        let few = workload.files <= 2;
        for slot in self.context.plan.slots_of(number) {
            let blocks =
                if workload.share > 1 { workload.most_blocks() } else { self.random_length() };
            if self.rng.below(100) < full && !self.stopped() {
                self.files.create(slot, blocks, few)?;
            }
        }
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.context.control.stop().is_open()
    }

    fn random_length(&mut self) -> usize {
        let workload = &self.context.plan.workload;
        let (least, most) = (workload.least_blocks(), workload.most_blocks());
        least + self.rng.below(most - least + 1)
    }

    /// Does its steps until it has done them all, is told to stop, or fails.
    pub fn run(mut self, number: usize) {
        let control = self.context.control;
        let phases = self.context.plan.workload.phases();
        if let Err(failure) = self.run_phases(number, &phases) {
            control.count_error(failure.errno);
            (self.context.report)(&Message::Failed(failure));
        }
        if phases.len() > 1 {
            control.barrier().leave();
        }
    }

    fn run_phases(&mut self, number: usize, phases: &[Phase]) -> Outcome {
        let (plan, control) = (self.context.plan, self.context.control);
        control.start().pass();
        if plan.ramp > 0.0 {
            let part = number as f64 / plan.workers() as f64;
            control.stop().pass_within(Duration::from_secs_f64(plan.ramp * part));
        }
        if plan.rate > 0.0 {
            let every = Duration::from_secs_f64(plan.workers() as f64 / plan.rate);
            // Not all at once.
            let first = every.mul_f64(self.rng.below(1 << 20) as f64 / f64::from(1 << 20));
            self.pace = Some(Pace { every, next: Instant::now() + first });
        }
        loop {
            for phase in phases {
                let mut left = if phase.count == 0 { u64::MAX } else { phase.count };
                while left > 0 && self.may_go_on() {
                    left -= 1;
                    let step = self.choose(phase);
                    self.step(step, number)?;
                    control.add(Number::Steps, 1);
                }
                if self.stopped() || self.steps_left == Some(0) {
                    return Ok(());
                }
                if phases.len() > 1 {
                    control.barrier().arrive(|| control.stop().is_open());
                }
            }
        }
    }

    /// Waits for its turn; whether there is one.
    fn may_go_on(&mut self) -> bool {
        match &mut self.steps_left {
            Some(0) => return false,
            Some(left) => *left -= 1,
            None => {}
        }
        if let Some(pace) = &mut self.pace {
            let now = Instant::now();
            if pace.next > now && self.context.control.stop().pass_within(pace.next - now) {
                return false;
            }
            // What a slow disk has kept waiting is not made up for by a burst without end.
            pace.next =
                (pace.next + pace.every).max(now.checked_sub(pace.every * 100).unwrap_or(now));
        }
        !self.stopped()
    }

    fn choose(&mut self, phase: &Phase) -> Step {
        // A workload whose weights overflow this is no workload.
        let sum: usize = phase.steps.values().map(|&weight| weight as usize).sum();
        let mut at = self.rng.below(sum.max(1));
        for (&step, &weight) in &phase.steps {
            if at < weight as usize {
                return step;
            }
            at -= weight as usize;
        }
        Step::Stat
    }

    /// A slot of this thread's that has a file, or has none.
    fn pick(&mut self, number: usize, present: bool) -> Option<usize> {
        let slots = self.context.plan.slots_of(number);
        let from = self.rng.below(slots.len());
        let order = (from..slots.len()).chain(0..from).map(|n| slots.start + n);
        order.into_iter().find(|&slot| self.files.is_present(slot) == present)
    }

    fn step(&mut self, step: Step, number: usize) -> Outcome {
        let shared = self.context.plan.workload.share > 1;
        let wants_file = !matches!(step, Step::Create | Step::Log | Step::Dirsync);
        let slot = self.pick(number, wants_file);
        match (step, slot) {
            (Step::Log, _) => self.log(number),
            (Step::Dirsync, _) => self.files.sync_dirs(),
            (Step::Create, Some(slot)) => {
                let blocks = self.random_length();
                self.files.create(slot, blocks, true)
            }
            // No room for another, or nothing to work on.
            (Step::Create, None) => match self.pick(number, true) {
                Some(slot) if !shared => self.files.delete(slot),
                _ => Ok(()),
            },
            (Step::Delete, None) => Ok(()),
            (_, None) => match self.pick(number, false) {
                Some(slot) if !shared => {
                    let blocks = self.random_length();
                    self.files.create(slot, blocks, false)
                }
                _ => Ok(()),
            },
            (step, Some(slot)) => self.step_on(step, slot),
        }
    }

    fn step_on(&mut self, step: Step, slot: usize) -> Outcome {
        match step {
            Step::Append => self.append(slot),
            Step::Write => self.at_random(slot, Direction::Write),
            Step::Read => self.at_random(slot, Direction::Read),
            Step::Rewrite => {
                let file = self.files.keep_open(slot)?;
                self.through(Direction::Write, slot, &file)?;
                self.files.sync(slot, &file)?;
                self.files.keep(slot, file);
                Ok(())
            }
            Step::Scan => {
                let file = self.files.open(slot)?;
                self.through(Direction::Read, slot, &file)
            }
            Step::Delete => self.files.delete(slot),
            Step::Rename => self.files.rename(slot),
            Step::Truncate => {
                let blocks = self.rng.below(self.files.length(slot).max(1));
                self.files.truncate(slot, blocks)
            }
            Step::Stat => self.files.stat(slot),
            Step::Link => self.files.link(slot),
            Step::Symlink => self.files.symlink(slot),
            Step::List => self.files.list(slot),
            Step::Mkdir => self.files.make_dir(slot),
            Step::Setattr => {
                let random = self.rng.number();
                self.files.setattr(slot, random)
            }
            Step::Xattr => {
                let random = self.rng.number();
                self.files.set_xattr(slot, random)
            }
            Step::Create | Step::Log | Step::Dirsync => Ok(()),
        }
    }

    /// Goes through a file piece by piece, for as long as the run lasts.
    fn through(&mut self, direction: Direction, slot: usize, file: &Handle) -> Outcome {
        let (blocks, per) = (self.files.length(slot), self.files.per_piece());
        for from in (0..blocks).step_by(per) {
            let piece = from..(from + per).min(blocks);
            match direction {
                Direction::Read => self.files.read_all(slot, file, piece)?,
                Direction::Write => self.files.write_all(slot, file, piece)?,
            }
            if self.stopped() {
                break;
            }
        }
        Ok(())
    }

    fn append(&mut self, slot: usize) -> Outcome {
        let (length, most) = (self.files.length(slot), self.context.plan.workload.most_blocks());
        if length == most {
            // A mailbox that is full is emptied.
            return self.files.truncate(slot, 0);
        }
        let blocks = 1 + self.rng.below((most - length).min(self.files.per_piece()));
        let file = self.files.open(slot)?;
        self.files.write_all(slot, &file, length..length + blocks)?;
        self.files.sync(slot, &file)
    }

    /// Reads or writes `depth` pieces of a file, no two the same.
    fn at_random(&mut self, slot: usize, direction: Direction) -> Outcome {
        let per = self.files.per_piece();
        let length = self.files.length(slot);
        let count = length.div_ceil(per);
        if count == 0 {
            return self.append_if_own(slot);
        }
        let depth = self.context.plan.workload.depth.min(count);
        let first = self.rng.below(count);
        // Steps that have no divisor in common with the count come to all pieces.
        let stride = (1 + self.rng.below(count)) | 1;
        let mut places: Vec<usize> = (0..depth).map(|n| (first + n * stride) % count).collect();
        places.sort_unstable();
        places.dedup();
        let ranges: Vec<_> =
            places.iter().map(|&at| at * per..((at + 1) * per).min(length)).collect();
        let file = self.files.keep_open(slot)?;
        self.files.transfer(direction, slot, &file, &ranges)?;
        if direction == Direction::Write {
            self.writes += 1;
            if self.writes.is_multiple_of(self.context.plan.workload.sync_every) {
                self.files.sync(slot, &file)?;
            }
        }
        self.files.keep(slot, file);
        Ok(())
    }

    fn append_if_own(&mut self, slot: usize) -> Outcome {
        if self.context.plan.workload.share > 1 { Ok(()) } else { self.append(slot) }
    }

    /// Writes the next block of the thread's log, from the beginning again at its end.
    fn log(&mut self, number: usize) -> Outcome {
        let Some(slot) = self.context.plan.log_of(number) else { return Ok(()) };
        if !self.files.is_present(slot) {
            self.files.create(slot, 0, self.context.plan.workload.sync != Sync::None)?;
        }
        let file = self.files.keep_open(slot)?;
        let most = self.context.plan.workload.most_blocks().min(1024);
        let at = self.log_at % most;
        self.log_at += 1;
        self.files.write_all(slot, &file, at..at + 1)?;
        self.files.sync(slot, &file)?;
        self.files.keep(slot, file);
        Ok(())
    }
}
