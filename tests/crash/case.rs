//! A workload with all that it needs to be the same in every run, and how it is written
//! in a line.
//!
//! `ext4 ordered 7 fixed links` is a fixed one; `ext4 ordered 7 mkdir A; sync | creat A/foo;
//! fsync A/foo` says its operations, and what stands before `|` only prepares: its cuts are
//! not looked at. A `+` behind the image's name means the large one,
//! `,apart` behind the mode that every journal handle is committed before the next begins.

use std::fmt;

use uext_ext4::DataMode;

use crate::image::{Kind, MODES, image, mode_name};
use crate::ops::{How, Op, format_all, parse_all};
use crate::recorder::{Recorder, Recording, Stop};
use crate::workloads;

/// What is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// One of the fixed workloads.
    Fixed(String),
    /// These operations; those that make no sense are left out.
    Ops { before: Vec<Op>, ops: Vec<Op> },
}

/// A workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    pub kind: Kind,
    /// The image is the large one.
    pub large: bool,
    pub mode: DataMode,
    /// Each handle of the journal is a transaction of its own: what an operation of several
    /// leaves between them is on the disk once.
    pub apart: bool,
    pub seed: u64,
    pub work: Work,
}

impl Case {
    /// A fixed workload in the default mode.
    pub fn fixed(kind: Kind, name: &str) -> Self {
        let work = Work::Fixed(name.to_owned());
        Self { kind, large: true, mode: DataMode::Ordered, apart: false, seed: 1, work }
    }

    /// Runs it.
    ///
    /// # Errors
    /// What the filesystem refused.
    pub fn record(&self) -> Result<Recording, String> {
        let image = image(self.kind, self.large);
        let mut recorder = Recorder::new(&image, self.mode, self.apart, self.seed)?;
        let (before, ops) = match &self.work {
            Work::Fixed(name) => {
                workloads::find(name).ok_or_else(|| format!("no workload {name}"))?(&mut recorder);
                return recorder.finish();
            }
            Work::Ops { before, ops } => (before, ops),
        };
        let apply = |recorder: &mut Recorder, op: &Op| match recorder.apply(op) {
            Err(Stop::Refused(why)) => Err(format!("`{op}` is refused: {why}")),
            Ok(()) | Err(Stop::Nonsense) => Ok(()),
        };
        before.iter().try_for_each(|op| apply(&mut recorder, op))?;
        recorder.begin_here();
        ops.iter().try_for_each(|op| apply(&mut recorder, op))?;
        if ops.last().is_some_and(persists) { recorder.stop() } else { recorder.finish() }
    }

    /// Reads what [`Case`] writes, without its seed.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str, seed: u64) -> Result<Self, String> {
        let mut words = text.splitn(3, ' ');
        let mut word = || words.next().ok_or_else(|| format!("`{text}` lacks a word"));
        let kind = word()?;
        let (kind, large) = kind.strip_suffix('+').map_or((kind, false), |kind| (kind, true));
        let kind = Kind::from_name(kind).ok_or_else(|| format!("no image is called {kind}"))?;
        let mode = word()?;
        let (mode, apart) = mode.strip_suffix(",apart").map_or((mode, false), |mode| (mode, true));
        let mode = MODES.iter().find(|(_, name)| *name == mode).map(|(mode, _)| *mode);
        let mode = mode.ok_or_else(|| format!("`{text}` names no mode"))?;
        let rest = word()?;
        let work = match rest.strip_prefix("fixed ") {
            Some(name) => Work::Fixed(name.to_owned()),
            None => {
                let (before, ops) = rest.split_once('|').unwrap_or(("", rest));
                Work::Ops { before: parse_all(before)?, ops: parse_all(ops)? }
            }
        };
        Ok(Self { kind, large, mode, apart, seed, work })
    }
}

/// Whether an operation ends with everything that it is about on the disk.
fn persists(op: &Op) -> bool {
    match op {
        Op::Fsync(_) | Op::Fdatasync(_) | Op::Sync => true,
        Op::During(op, _) => persists(op),
        Op::Write { how, .. } => matches!(how, How::Sync | How::Dsync),
        _ => false,
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plus = if self.large { "+" } else { "" };
        let apart = if self.apart { ",apart" } else { "" };
        write!(f, "{}{plus} {}{apart} ", self.kind.name(), mode_name(self.mode))?;
        match &self.work {
            Work::Fixed(name) => write!(f, "fixed {name}"),
            Work::Ops { before, ops } if before.is_empty() => f.write_str(&format_all(ops)),
            Work::Ops { before, ops } => {
                write!(f, "{} | {}", format_all(before), format_all(ops))
            }
        }
    }
}
