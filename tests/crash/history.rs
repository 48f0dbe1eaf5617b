//! What a workload did, step by step, and whether a tree found after a power cut is a
//! state that it may be in.
//!
//! A step is one call. The names, links, modes, attributes and targets found must be
//! those after some step that was begun before the cut, and no earlier than the last
//! step that was made durable. Of a file's bytes, each is from one of its versions, no
//! older than the one last made durable, or zero where one of these versions ends.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// An object of the workload: a file under whatever names, a directory, a symlink.
pub type Object = usize;

/// What stands at a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// Type, mode, links, attributes, target: all but contents and times.
    pub describe: Arc<str>,
    /// A regular file.
    pub regular: bool,
}

/// The tree after a step.
pub type Tree = BTreeMap<Arc<str>, Node>;

/// One call.
struct Step {
    /// Time of the log just before.
    begun: u64,
    tree: Arc<Tree>,
    objects: Arc<BTreeMap<Arc<str>, Object>>,
    hash: u64,
    what: String,
}

/// The contents of a file after a change.
#[derive(Clone)]
struct Version {
    begun: u64,
    bytes: Arc<Vec<u8>>,
}

/// From when on a version is the oldest that may be seen.
enum From {
    /// From this time on.
    Time(u64),
    /// In trees of this step and later ones.
    Step(usize),
}

/// All that was done.
#[derive(Default)]
pub struct History {
    steps: Vec<Step>,
    versions: BTreeMap<Object, Vec<Version>>,
    floors: Vec<(From, Object, usize)>,
    /// From this time on, no step before this one may be found.
    durable: Vec<(u64, usize)>,
}

fn hash_of(tree: &Tree) -> u64 {
    let mut hasher = DefaultHasher::new();
    tree.hash(&mut hasher);
    hasher.finish()
}

impl History {
    /// Adds a step and the tree that it made.
    pub fn step(
        &mut self,
        begun: u64,
        what: String,
        tree: Tree,
        objects: BTreeMap<Arc<str>, Object>,
    ) {
        let hash = hash_of(&tree);
        let (tree, objects) = (Arc::new(tree), Arc::new(objects));
        self.steps.push(Step { begun, tree, objects, hash, what });
    }

    /// Adds a change of a file's contents.
    pub fn version(&mut self, object: Object, begun: u64, bytes: Vec<u8>) {
        let bytes = Arc::new(bytes);
        self.versions.entry(object).or_default().push(Version { begun, bytes });
    }

    /// The contents now.
    pub fn contents(&self, object: Object) -> Vec<u8> {
        let last = self.versions.get(&object).and_then(|versions| versions.last());
        last.map(|version| version.bytes.as_ref().clone()).unwrap_or_default()
    }

    fn newest(&self, object: Object) -> usize {
        self.versions.get(&object).map_or(0, |versions| versions.len().saturating_sub(1))
    }

    /// From `time` on every step so far is durable.
    pub fn steps_durable(&mut self, time: u64) {
        self.durable.push((time, self.steps.len().saturating_sub(1)));
    }

    /// From `time` on the file's contents now are durable.
    pub fn contents_durable(&mut self, object: Object, time: u64) {
        let newest = self.newest(object);
        self.floors.push((From::Time(time), object, newest));
    }

    /// Where the step just added is seen, the file's contents now are.
    pub fn contents_with_step(&mut self, object: Object) {
        let newest = self.newest(object);
        self.floors.push((From::Step(self.steps.len().saturating_sub(1)), object, newest));
    }

    /// Steps and versions, for the report.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Judges a tree found after a cut at `time`; `read` gives a regular file's bytes.
    ///
    /// # Errors
    /// What is not as it may be.
    pub fn judge(
        &self,
        time: u64,
        found: &Tree,
        read: &mut dyn FnMut(&str) -> Vec<u8>,
    ) -> Result<(), String> {
        let oldest = self.durable.iter().filter(|(at, _)| *at < time).map(|(_, step)| *step).max();
        let oldest = oldest.unwrap_or(0);
        let newest = self.steps.iter().rposition(|step| step.begun < time).unwrap_or(0);
        let hash = hash_of(found);
        let mut why = None;
        let mut contents: BTreeMap<Arc<str>, Vec<u8>> = BTreeMap::new();
        for at in (oldest..=newest.max(oldest)).rev() {
            if self.steps[at].hash != hash {
                continue;
            }
            match self.judge_contents(time, at, found, &mut contents, read) {
                Ok(()) => return Ok(()),
                Err(error) => why = why.or(Some(error)),
            }
        }
        Err(why.unwrap_or_else(|| self.explain(oldest, newest, found)))
    }

    /// The step whose tree is nearest, and the difference.
    fn explain(&self, oldest: usize, newest: usize, found: &Tree) -> String {
        let known = self.steps.iter().position(|step| step.hash == hash_of(found));
        let differ = |step: &Step| {
            let mut lines: Vec<String> = Vec::new();
            for (path, node) in step.tree.iter() {
                match found.get(path) {
                    None => lines.push(format!("missing {path} ({})", node.describe)),
                    Some(other) if other != node => {
                        lines.push(format!("{path}: {} not {}", other.describe, node.describe));
                    }
                    _ => {}
                }
            }
            lines.extend(
                found
                    .keys()
                    .filter(|path| !step.tree.contains_key(*path))
                    .map(|path| format!("unexpected {path}")),
            );
            lines
        };
        let range = oldest..=newest.max(oldest);
        let nearest = range.clone().min_by_key(|&at| differ(&self.steps[at]).len()).unwrap_or(0);
        let mut lines = differ(&self.steps[nearest]);
        lines.truncate(8);
        format!(
            "the tree is that of none of the steps {range:?} (it is that of {known:?}); \
             nearest is step {nearest} ({}): {}",
            self.steps[nearest].what,
            lines.join("; ")
        )
    }

    fn judge_contents(
        &self,
        time: u64,
        at: usize,
        found: &Tree,
        contents: &mut BTreeMap<Arc<str>, Vec<u8>>,
        read: &mut dyn FnMut(&str) -> Vec<u8>,
    ) -> Result<(), String> {
        for (path, node) in found.iter().filter(|(_, node)| node.regular) {
            let object = self.steps[at].objects[path];
            let bytes = contents.entry(path.clone()).or_insert_with(|| read(path));
            let floor = self.floors.iter().filter(|(from, of, _)| {
                *of == object
                    && match from {
                        From::Time(from) => *from < time,
                        From::Step(step) => *step <= at,
                    }
            });
            let floor = floor.map(|(_, _, version)| *version).max().unwrap_or(0);
            let versions = self.versions.get(&object).map_or(&[][..], |all| &all[..]);
            let may: Vec<&[u8]> = versions
                .iter()
                .enumerate()
                .filter(|(index, version)| {
                    *index == floor || (*index > floor && version.begun < time)
                })
                .map(|(_, version)| &version.bytes[..])
                .collect();
            judge_bytes(bytes, &may).map_err(|error| {
                format!(
                    "{path} (object {object}, at step {at}, {}, versions from {floor}): {error}",
                    node.describe
                )
            })?;
        }
        Ok(())
    }
}

fn judge_bytes(found: &[u8], may: &[&[u8]]) -> Result<(), String> {
    let least = may.iter().map(|version| version.len()).min().unwrap_or(0);
    let most = may.iter().map(|version| version.len()).max().unwrap_or(0);
    if found.len() < least || found.len() > most {
        return Err(format!("size {} is not in {least}..={most}", found.len()));
    }
    const CHUNK: usize = 512;
    for (index, chunk) in found.chunks(CHUNK).enumerate() {
        let start = index * CHUNK;
        if may.iter().any(|version| version.get(start..start + chunk.len()) == Some(chunk)) {
            continue;
        }
        for (offset, &byte) in (start..).zip(chunk) {
            let known = may.iter().any(|version| match version.get(offset) {
                Some(&there) => there == byte,
                None => byte == 0,
            });
            if !known {
                return Err(format!("byte {offset} of {} is {byte:#x}", found.len()));
            }
        }
    }
    Ok(())
}
