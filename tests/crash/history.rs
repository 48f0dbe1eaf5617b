//! What a workload did, step by step, and whether a tree found after a power cut is a
//! state that it may be in.
//!
//! A step is one call. The names, links, modes, attributes and targets found must be
//! those after some step that was begun before the cut, and no earlier than the last
//! step that was made durable. Of a file's bytes, each is from one of its versions, no
//! older than the one last made durable, or zero where a truncation has cut it off. Where
//! data is journalled, names and contents are all of one moment.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use uext_ext4::DataMode;

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
    /// A cut may leave a part of the change.
    in_pieces: bool,
}

/// From when on a version is the oldest that may be seen.
enum From {
    /// From this time on.
    Time(u64),
    /// In trees of this step and later ones.
    Step(usize),
}

/// What must be found from some time on.
struct Durable {
    /// From this time on.
    from: u64,
    /// No step before this one.
    step: usize,
    /// Where data is journalled: nothing older than what was begun by then.
    moment: u64,
}

/// All that was done.
pub struct History {
    mode: DataMode,
    steps: Vec<Step>,
    versions: BTreeMap<Object, Vec<Version>>,
    floors: Vec<(From, Object, usize)>,
    durable: Vec<Durable>,
}

fn hash_of(tree: &Tree) -> u64 {
    let mut hasher = DefaultHasher::new();
    tree.hash(&mut hasher);
    hasher.finish()
}

impl History {
    /// Of a filesystem mounted so.
    pub fn new(mode: DataMode) -> Self {
        Self {
            mode,
            steps: Vec::new(),
            versions: BTreeMap::new(),
            floors: Vec::new(),
            durable: Vec::new(),
        }
    }

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
    pub fn version(&mut self, object: Object, begun: u64, bytes: Vec<u8>, in_pieces: bool) {
        let bytes = Arc::new(bytes);
        let version = Version { begun, bytes, in_pieces };
        self.versions.entry(object).or_default().push(version);
    }

    /// The contents now.
    pub fn contents(&self, object: Object) -> Vec<u8> {
        let last = self.versions.get(&object).and_then(|versions| versions.last());
        last.map(|version| version.bytes.as_ref().clone()).unwrap_or_default()
    }

    fn newest(&self, object: Object) -> usize {
        self.versions.get(&object).map_or(0, |versions| versions.len().saturating_sub(1))
    }

    /// From `time` on this step and those before are durable, and where data is journalled,
    /// all that was begun before `moment`.
    pub fn step_durable(&mut self, step: usize, moment: u64, time: u64) {
        self.durable.push(Durable { from: time, step, moment });
    }

    /// What must be found at a time: the step, and the moment.
    fn promised(&self, time: u64) -> (usize, u64) {
        let made = || self.durable.iter().filter(|durable| durable.from < time);
        let step = made().map(|durable| durable.step).max().unwrap_or(0);
        (step, made().map(|durable| durable.moment).max().unwrap_or(0))
    }

    /// How much had been made durable at a time: with the same number, the same may be
    /// found, or more.
    pub fn promises(&self, time: u64) -> usize {
        let floors = self.floors.iter();
        let floors = floors.filter(|(from, ..)| matches!(from, From::Time(from) if *from < time));
        self.durable.iter().filter(|durable| durable.from < time).count() + floors.count()
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

    /// Steps so far.
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
        if self.mode == DataMode::Journal {
            return self.judge_moment(time, found, read);
        }
        let (oldest, _) = self.promised(time);
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

    /// Judges a tree found where data is journalled: names and contents are those of one
    /// moment. Of a large write that was under way at that moment, a part may be there.
    fn judge_moment(
        &self,
        time: u64,
        found: &Tree,
        read: &mut dyn FnMut(&str) -> Vec<u8>,
    ) -> Result<(), String> {
        let (oldest, least) = self.promised(time);
        let hash = hash_of(found);
        let begun = self.steps.iter().map(|step| step.begun);
        let begun = begun.chain(self.versions.values().flatten().map(|version| version.begun));
        let mut moments: Vec<u64> = begun.filter(|&begun| begun < time).collect();
        moments.sort_unstable();
        moments.dedup();
        let mut contents: BTreeMap<Arc<str>, Vec<u8>> = BTreeMap::new();
        let mut why = None;
        for (index, &moment) in moments.iter().enumerate().rev() {
            let at = self.steps.iter().rposition(|step| step.begun <= moment).unwrap_or(0);
            // What was begun before the promise is behind it; nothing was begun in between.
            let next = moments.get(index + 1).copied();
            if at < oldest || next.is_some_and(|next| next < least) {
                break;
            }
            if self.steps[at].hash != hash {
                continue;
            }
            let under_way = next.filter(|&next| next < time);
            match self.judge_at(moment, under_way, at, found, &mut contents, read) {
                Ok(()) => return Ok(()),
                Err(error) => why = why.or(Some(error)),
            }
        }
        let newest = self.steps.iter().rposition(|step| step.begun < time).unwrap_or(0);
        Err(why.unwrap_or_else(|| self.explain(oldest, newest, found)))
    }

    /// Judges all contents at a moment; `under_way` is when the change after it was begun.
    fn judge_at(
        &self,
        moment: u64,
        under_way: Option<u64>,
        at: usize,
        found: &Tree,
        contents: &mut BTreeMap<Arc<str>, Vec<u8>>,
        read: &mut dyn FnMut(&str) -> Vec<u8>,
    ) -> Result<(), String> {
        for path in found.iter().filter(|(_, node)| node.regular).map(|(path, _)| path) {
            let object = self.steps[at].objects[path];
            let bytes = contents.entry(path.clone()).or_insert_with(|| read(path));
            let versions = self.versions.get(&object).map_or(&[][..], |all| &all[..]);
            let count = versions.partition_point(|version| version.begun <= moment);
            let Some(now) = count.checked_sub(1).map(|last| &versions[last]) else { continue };
            if *bytes == *now.bytes {
                continue;
            }
            let partial = versions.get(count).filter(|v| v.in_pieces && under_way == Some(v.begun));
            let cut = |version: &Version| version.bytes.len() < now.bytes.len();
            let may: Vec<May<'_>> = [Some(now), partial]
                .into_iter()
                .flatten()
                .map(|version| May { bytes: &version.bytes, cut: cut(version) })
                .collect();
            let judged = match partial {
                Some(_) => judge_bytes(bytes, &may),
                None => Err("not the contents of that moment".to_owned()),
            };
            judged.map_err(|error| format!("{path} (object {object}, at step {at}): {error}"))?;
        }
        Ok(())
    }

    /// Judges whether a tree is that after any step, promised or not.
    ///
    /// # Errors
    /// The nearest step, and how the tree differs.
    pub fn judge_names(&self, found: &Tree) -> Result<(), String> {
        let hash = hash_of(found);
        if self.steps.iter().any(|step| step.hash == hash) {
            return Ok(());
        }
        Err(self.explain(0, self.steps.len() - 1, found))
    }

    /// Judges what a repair left of a filesystem without a journal, after a cut at `time`:
    /// a file whose contents were made durable is there, with just these, unless it was
    /// changed after that.
    ///
    /// # Errors
    /// What is missing.
    pub fn judge_kept(
        &self,
        time: u64,
        found: &Tree,
        read: &mut dyn FnMut(&str) -> Vec<u8>,
    ) -> Result<(), String> {
        let (durable, _) = self.promised(time);
        let newest = self.steps.iter().rposition(|step| step.begun < time).unwrap_or(0);
        let begun_since = self.steps[durable.min(newest)..=newest].iter();
        let begun_since: Vec<&Step> = begun_since.collect();
        for (path, &object) in self.steps[durable].objects.iter() {
            let stays = begun_since.iter().all(|step| step.objects.get(path) == Some(&object));
            let node = &self.steps[durable].tree[path];
            if !stays || path.is_empty() {
                continue;
            }
            let floor = self.floors.iter().filter(|(from, of, _)| {
                *of == object && matches!(from, From::Time(at) if *at < time)
            });
            let floor = floor.map(|(_, _, version)| *version).max().unwrap_or(0);
            let versions = self.versions.get(&object).map_or(&[][..], |all| &all[..]);
            if versions.iter().skip(floor + 1).any(|version| version.begun < time) {
                // The mapping may have reached the disk in part, and the repair cut it off.
                continue;
            }
            let Some(there) = found.get(path) else {
                return Err(format!("{path} was durable at step {durable}, and is gone"));
            };
            if there.regular != node.regular {
                return Err(format!("{path} was durable as {}", node.describe));
            }
            if node.regular && read(path) != *versions[floor].bytes {
                return Err(format!("{path} has not the contents that were durable"));
            }
        }
        Ok(())
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
            let may: Vec<May<'_>> = versions
                .iter()
                .enumerate()
                .filter(|(index, version)| {
                    *index == floor || (*index > floor && version.begun < time)
                })
                .map(|(index, version)| May {
                    bytes: &version.bytes,
                    cut: index > 0 && versions[index - 1].bytes.len() > version.bytes.len(),
                })
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

/// A version that may be seen.
struct May<'a> {
    bytes: &'a [u8],
    /// A truncation made it: what was behind its end may be zero before the size is less.
    cut: bool,
}

fn judge_bytes(found: &[u8], may: &[May<'_>]) -> Result<(), String> {
    let least = may.iter().map(|version| version.bytes.len()).min().unwrap_or(0);
    let most = may.iter().map(|version| version.bytes.len()).max().unwrap_or(0);
    if found.len() < least || found.len() > most {
        return Err(format!("size {} is not in {least}..={most}", found.len()));
    }
    const CHUNK: usize = 512;
    for (index, chunk) in found.chunks(CHUNK).enumerate() {
        let start = index * CHUNK;
        let range = start..start + chunk.len();
        if may.iter().any(|version| version.bytes.get(range.clone()) == Some(chunk)) {
            continue;
        }
        for (offset, &byte) in (start..).zip(chunk) {
            let known = may.iter().any(|version| match version.bytes.get(offset) {
                Some(&there) => there == byte,
                None => byte == 0 && version.cut,
            });
            if !known {
                return Err(format!("byte {offset} of {} is {byte:#x}", found.len()));
            }
        }
    }
    Ok(())
}
