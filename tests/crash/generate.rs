//! Workloads made by rule, as ACE makes them: every operation over a small set of names,
//! alone, with what it needs put there and synced before, followed by each way to make it
//! durable; and longer ones by chance.

use uext_tests::tree::Rng;

use crate::case::{Case, Work};
use crate::image::Kind;
use crate::ops::{How, Op};
use uext_ext4::DataMode;

/// The files.
const FILES: [&str; 4] = ["A/foo", "A/bar", "B/foo", "B/bar"];
/// Bytes of a file that is there before: an odd end, and more than two blocks.
const SIZE: usize = 9500;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// What follows an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Persist {
    /// Nothing: an unmount.
    None,
    Fsync,
    Fdatasync,
    Sync,
    /// fsync of the directory.
    FsyncDir,
}

impl Persist {
    const ALL: [Self; 5] = [Self::None, Self::Fsync, Self::Fdatasync, Self::Sync, Self::FsyncDir];

    /// The operation, for what stands at `path` in the end.
    fn op(self, path: &str) -> Option<Op> {
        let dir = path.rsplit_once('/').map_or("", |(dir, _)| dir);
        match self {
            Self::None => None,
            Self::Fsync => Some(Op::Fsync(path.into())),
            Self::Fdatasync => Some(Op::Fdatasync(path.into())),
            Self::Sync => Some(Op::Sync),
            Self::FsyncDir => Some(Op::Fsync(dir.into())),
        }
    }
}

/// An operation, what it needs, and where what it made stands.
struct Step {
    needs: Vec<Op>,
    op: Vec<Op>,
    /// `None` when nothing is left to be fsynced.
    leaves: Option<String>,
}

fn file(path: &str, fill: u64) -> Vec<Op> {
    vec![Op::Create(path.into()), Op::Append { path: path.into(), len: SIZE, fill }]
}

fn step(needs: Vec<Op>, op: Op, leaves: Option<&str>) -> Step {
    Step { needs, op: vec![op], leaves: leaves.map(str::to_owned) }
}

/// A name of each kind.
fn makers(path: &str) -> Vec<Step> {
    let make = |op| step(Vec::new(), op, Some(path));
    vec![
        make(Op::Create(path.into())),
        make(Op::Mkdir(path.into())),
        make(Op::Mknod(path.into())),
        make(Op::Symlink(path.into(), 20)),
        make(Op::Symlink(path.into(), 700)),
    ]
}

/// What takes names away.
fn removers(path: &str) -> Vec<Step> {
    let held = format!("@{path}");
    let hold = Op::Hold(path.into());
    let mut written = step(file(path, 3), hold.clone(), Some(&held));
    written.op.push(Op::Append { path: held.clone(), len: 5000, fill: 4 });
    vec![
        step(file(path, 1), Op::Unlink(path.into()), None),
        step(vec![Op::Mkdir(path.into())], Op::Rmdir(path.into()), None),
        step(file(path, 2), hold, Some(&held)),
        written,
    ]
}

/// What one file's contents and attributes go through.
fn changers(path: &str) -> Vec<Step> {
    let at = |how, offset, len| {
        let op = Op::Write { how, path: path.into(), offset, len, fill: 5 };
        step(file(path, 6), op, Some(path))
    };
    let on = |op| step(file(path, 7), op, Some(path));
    let attribute = |name: &str, len| {
        let name = name.to_owned();
        Op::SetXattr { path: path.into(), name, len, fill: 8 }
    };
    let falloc = |mode, offset, len| on(Op::Fallocate { path: path.into(), mode, offset, len });
    let mut steps = vec![
        on(Op::Append { path: path.into(), len: 6000, fill: 9 }),
        at(How::Plain, 1000, 5000),
        at(How::Plain, SIZE - 1000, 7000),
        at(How::Plain, 60_000, 5000),
        at(How::Plain, 900_000, 3000),
        at(How::Direct, 0, 131_072),
        at(How::Page, 4096, 4096),
        at(How::Sync, 3000, 9000),
        at(How::Dsync, 3000, 3000),
        at(How::Dsync, SIZE, 3000),
        on(Op::Truncate(path.into(), 5000)),
        on(Op::Truncate(path.into(), 0)),
        on(Op::Truncate(path.into(), 30_000)),
        falloc(0, 0, 40_000),
        falloc(0, 20_000, 30_000),
        falloc(libc::FALLOC_FL_KEEP_SIZE, 20_000, 30_000),
        falloc(PUNCH, 1000, 7000),
        falloc(PUNCH, 4096, 4096),
        falloc(libc::FALLOC_FL_ZERO_RANGE, 500, 20_000),
        falloc(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, 2000, 7000),
        on(attribute("user.small", 20)),
        on(attribute("user.large", 900)),
        on(Op::SetAcl { path: path.into(), default: false }),
        on(Op::Chmod(path.into(), 0o640)),
        on(Op::Utimes(path.into(), 1000)),
    ];
    for (name, len) in [("user.small", 20), ("user.large", 900)] {
        let mut needs = file(path, 10);
        needs.push(attribute(name, len));
        steps.push(step(needs, Op::RemoveXattr(path.into(), name.into()), Some(path)));
    }
    steps
}

/// What two names go through.
fn pairs(from: &str, to: &str) -> Vec<Step> {
    let (a, b) = (from.to_owned(), to.to_owned());
    let both = || [file(from, 11), file(to, 12)].concat();
    let dirs = |names: &[&str]| names.iter().map(|name| Op::Mkdir((*name).into())).collect();
    let inner = format!("{from}/in");
    let mut full: Vec<Op> = dirs(&[from]);
    full.extend(file(&inner, 13));
    vec![
        step(file(from, 14), Op::Link(a.clone(), b.clone()), Some(to)),
        step(file(from, 15), Op::Rename(a.clone(), b.clone()), Some(to)),
        step(both(), Op::Rename(a.clone(), b.clone()), Some(to)),
        step(both(), Op::Exchange(a.clone(), b.clone()), Some(to)),
        step(dirs(&[from, to]), Op::Rename(a.clone(), b.clone()), Some(to)),
        step(full, Op::Rename(a, b), Some(to)),
    ]
}

/// Every step there is.
fn steps() -> Vec<Step> {
    let mut all: Vec<Step> = Vec::new();
    for path in FILES {
        all.extend(makers(path));
        all.extend(removers(path));
        all.extend(changers(path));
        for to in FILES.iter().filter(|to| **to != path) {
            all.extend(pairs(path, to));
        }
    }
    all
}

fn case(kind: Kind, mode: DataMode, seed: u64, before: Vec<Op>, ops: Vec<Op>) -> Case {
    Case { kind, large: false, mode, apart: false, seed, work: Work::Ops { before, ops } }
}

fn directories() -> Vec<Op> {
    vec![Op::Mkdir("A".into()), Op::Mkdir("B".into())]
}

/// All sequences of one operation and what makes it durable.
pub fn length_one(kind: Kind, mode: DataMode) -> impl Iterator<Item = Case> {
    steps().into_iter().flat_map(move |step| {
        let mut before = directories();
        before.extend(step.needs.clone());
        before.push(Op::Sync);
        Persist::ALL.into_iter().filter_map(move |persist| {
            let mut ops = step.op.clone();
            match (&step.leaves, persist) {
                (_, Persist::None) => {}
                (None, Persist::Fsync | Persist::Fdatasync) => return None,
                (Some(path), _) if path.starts_with('@') && persist == Persist::FsyncDir => {
                    ops.push(Op::Fsync(path.get(1..2).unwrap_or_default().into()));
                }
                (Some(path), _) => ops.extend(persist.op(path)),
                (None, Persist::Sync) => ops.push(Op::Sync),
                (None, Persist::FsyncDir) => {
                    let name = ops.first().map(Op::to_string).unwrap_or_default();
                    let dir = if name.contains(" A/") { "A" } else { "B" };
                    ops.push(Op::Fsync(dir.into()));
                }
            }
            Some(case(kind, mode, 1, before.clone(), ops))
        })
    })
}

/// A sequence of `length` operations by chance, each made durable in some way or not.
pub fn by_chance(kind: Kind, mode: DataMode, length: usize, seed: u64) -> Case {
    let mut rng = Rng(seed);
    let all = steps();
    let mut before = directories();
    for (index, path) in FILES.iter().enumerate() {
        match rng.below(4) {
            0 => {}
            1 => before.push(Op::Mkdir((*path).into())),
            _ => before.extend(file(path, 20 + index as u64)),
        }
    }
    before.push(Op::Sync);
    let mut ops = Vec::new();
    for number in 0..length {
        // In range by `below`.
        let step = &all[rng.below(all.len() as u64) as usize];
        // What a step needs is there, or made in the same breath.
        if rng.below(2) == 0 {
            ops.extend(step.needs.iter().cloned());
        }
        ops.extend(step.op.iter().cloned().map(|op| refill(op, 100 + number as u64)));
        let persist = Persist::ALL[rng.below(Persist::ALL.len() as u64) as usize];
        ops.extend(step.leaves.as_deref().and_then(|path| persist.op(path)));
    }
    case(kind, mode, seed, before, ops)
}

/// The same operation with contents of its own.
fn refill(mut op: Op, new: u64) -> Op {
    if let Op::Write { fill, .. } | Op::Append { fill, .. } = &mut op {
        *fill = new;
    }
    op
}
