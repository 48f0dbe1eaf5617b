//! What a filesystem that may fail any call owes its users.
//!
//! The model follows a run call by call. A call that succeeded has happened. One that failed has
//! happened or not: [`Session`](crate::session::Session) then looks at what is there, and what
//! cannot be looked at either is *unsure* until it can.
//!
//! For a disk found after a power cut the model keeps, since the last acknowledged sync,
//! - of each path: every object that stood there, or that none did;
//! - of each file: every contents it had, from the last acknowledged one on.
//!
//! Invariants: the first version of a file is its floor; the last is what it holds now.

use std::collections::{BTreeMap, BTreeSet};

/// An object of the run: a file, directory or symbolic link under whatever names.
pub type Object = usize;

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link with its target.
    Link(Vec<u8>),
}

/// What a walk found at a path.
#[derive(Clone, Debug)]
pub struct Found {
    /// What it is.
    pub kind: Kind,
    /// A regular file's bytes.
    pub bytes: Vec<u8>,
}

struct File {
    kind: Kind,
    versions: Vec<Vec<u8>>,
    unsure: bool,
}

/// The run so far.
#[derive(Default)]
pub struct Model {
    files: Vec<File>,
    /// What stands at a path now.
    names: BTreeMap<String, Object>,
    /// What may stand there after a power cut.
    may: BTreeMap<String, BTreeSet<Option<Object>>>,
    /// Paths of which nothing is known.
    unsure: BTreeSet<String>,
}

impl Model {
    /// A new object, at no path yet.
    pub fn add(&mut self, kind: Kind) -> Object {
        self.files.push(File { kind, versions: vec![Vec::new()], unsure: false });
        self.files.len() - 1
    }

    /// What an object is.
    pub fn kind(&self, object: Object) -> &Kind {
        &self.files[object].kind
    }

    /// What stands at a path.
    pub fn at(&self, path: &str) -> Option<Object> {
        self.names.get(path).copied()
    }

    /// Whether the model knows what stands at a path and the directories above it.
    pub fn is_sure(&self, path: &str) -> bool {
        let below = |dir: &String| path.strip_prefix(dir.as_str()).is_some_and(below_prefix);
        !self.unsure.iter().any(below)
    }

    /// Paths of which the model is not sure, to look again.
    pub fn unsure_paths(&self) -> Vec<String> {
        self.unsure.iter().cloned().collect()
    }

    /// Something stands, or nothing, at a path from now on.
    pub fn set_name(&mut self, path: &str, object: Option<Object>) {
        self.unsure.remove(path);
        let before = self.names.get(path).copied();
        self.may.entry(path.to_owned()).or_insert_with(|| BTreeSet::from([before])).insert(object);
        match object {
            Some(object) => self.names.insert(path.to_owned(), object),
            None => self.names.remove(path),
        };
    }

    /// Moves what stands at and below a path.
    pub fn move_name(&mut self, from: &str, to: &str) {
        for (path, object) in self.names_below(from) {
            self.set_name(&path, None);
            self.set_name(&format!("{to}{}", &path[from.len()..]), Some(object));
        }
    }

    /// Nothing is known of a path any more.
    pub fn lose_name(&mut self, path: &str) {
        self.unsure.insert(path.to_owned());
    }

    /// A path and all below it.
    pub fn names_below(&self, path: &str) -> Vec<(String, Object)> {
        let is_below = |name: &str| name.strip_prefix(path).is_some_and(below_prefix);
        self.names.iter().filter(|(name, _)| is_below(name)).map(|(n, o)| (n.clone(), *o)).collect()
    }

    /// Paths of sure objects that `wanted` takes.
    pub fn paths(&self, wanted: impl Fn(&Kind) -> bool) -> Vec<String> {
        self.names
            .iter()
            .filter(|(path, object)| wanted(&self.files[**object].kind) && self.is_sure(path))
            .map(|(path, _)| path.clone())
            .collect()
    }

    /// Names an object has.
    pub fn links(&self, object: Object) -> usize {
        self.names.values().filter(|other| **other == object).count()
    }

    /// A file's bytes; `None` while they are not known.
    pub fn bytes(&self, object: Object) -> Option<&[u8]> {
        let file = &self.files[object];
        (!file.unsure).then(|| file.versions.last().map_or(&[][..], Vec::as_slice))
    }

    /// What the file may hold on the disk: a change was tried.
    pub fn tried(&mut self, object: Object, bytes: Vec<u8>) {
        self.files[object].versions.push(bytes);
        self.files[object].unsure = true;
    }

    /// The file holds this now.
    pub fn set_bytes(&mut self, object: Object, bytes: Vec<u8>) {
        self.files[object].versions.push(bytes);
        self.files[object].unsure = false;
    }

    /// A file was looked at after a change that failed.
    ///
    /// # Errors
    /// When it holds what it never held.
    pub fn found_bytes(&mut self, object: Object, bytes: Vec<u8>) -> Result<(), String> {
        judge_bytes(&bytes, &self.files[object].versions)?;
        self.set_bytes(object, bytes);
        Ok(())
    }

    /// The file's contents were acknowledged as durable.
    pub fn bytes_durable(&mut self, object: Object) {
        let file = &mut self.files[object];
        if !file.unsure {
            let last = file.versions.len() - 1;
            file.versions.drain(..last);
        }
    }

    /// The names were acknowledged as durable.
    pub fn names_durable(&mut self) {
        self.may =
            self.names.iter().map(|(p, o)| (p.clone(), BTreeSet::from([Some(*o)]))).collect();
    }

    /// Everything was.
    pub fn all_durable(&mut self) {
        self.names_durable();
        (0..self.files.len()).for_each(|object| self.bytes_durable(object));
    }

    /// Judges a tree after a power cut. Without a journal (`loose`) a name that was touched since
    /// it was durable may be gone.
    ///
    /// # Errors
    /// What is not as it may be.
    pub fn judge(&self, found: &BTreeMap<String, Found>, loose: bool) -> Result<(), String> {
        for (path, may) in &self.may {
            if !self.is_sure(path) {
                continue;
            }
            let Some(here) = found.get(path) else {
                let touched = may.len() > 1 || self.is_touched(path);
                if may.contains(&None) || touched && loose || self.has_lost_parent(path) {
                    continue;
                }
                return Err(format!("{path} is gone, it was object {may:?}"));
            };
            let fits = |object: &Option<Object>| match object {
                Some(object) => self.judge_object(*object, here),
                None => Err("nothing".to_owned()),
            };
            let failures: Vec<String> = may.iter().map_while(|object| fits(object).err()).collect();
            if failures.len() == may.len() {
                return Err(format!("{path} is none of {may:?}: {}", failures.join("; ")));
            }
        }
        let known = |path: &String| self.may.contains_key(path) || !self.is_sure(path);
        match found.keys().find(|path| !known(path)) {
            Some(path) if !loose => Err(format!("{path} was never there")),
            _ => Ok(()),
        }
    }

    fn is_touched(&self, path: &str) -> bool {
        self.may.iter().any(|(other, may)| {
            may.len() > 1 && path.strip_prefix(other.as_str()).is_some_and(below_prefix)
        })
    }

    /// Whether a directory above may be gone, or be another one.
    fn has_lost_parent(&self, path: &str) -> bool {
        let parents = path.match_indices('/').map(|(at, _)| &path[..at]);
        parents.into_iter().any(|dir| self.may.get(dir).is_some_and(|may| may.len() > 1))
    }

    fn judge_object(&self, object: Object, found: &Found) -> Result<(), String> {
        let file = &self.files[object];
        match (&file.kind, &found.kind) {
            (Kind::File, Kind::File) => judge_bytes(&found.bytes, &file.versions),
            (wanted, kind) if wanted == kind => Ok(()),
            (wanted, kind) => Err(format!("a {kind:?}, not the {wanted:?}")),
        }
    }
}

/// What is left of a path behind a directory's name is that path, or something in it.
fn below_prefix(rest: &str) -> bool {
    rest.is_empty() || rest.starts_with('/')
}

/// Every byte is one of those it had since the floor, which is the first version; behind the
/// floor's end also zero, where data that failed to reach the disk lies before data that did.
fn judge_bytes(found: &[u8], may: &[Vec<u8>]) -> Result<(), String> {
    let least = may.iter().map(Vec::len).min().unwrap_or(0);
    let most = may.iter().map(Vec::len).max().unwrap_or(0);
    if found.len() < least || found.len() > most {
        return Err(format!("size {} is not in {least}..={most}", found.len()));
    }
    if may.iter().any(|version| version == found) {
        return Ok(());
    }
    let floor = may.first().map_or(0, Vec::len);
    for (offset, &byte) in found.iter().enumerate() {
        let zero = byte == 0 && (offset >= floor || may.iter().any(|v| v.len() <= offset));
        if !zero && !may.iter().any(|version| version.get(offset) == Some(&byte)) {
            return Err(format!("byte {offset} of {} is {byte:#x}", found.len()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> Found {
        Found { kind: Kind::File, bytes: bytes.to_vec() }
    }

    #[test]
    fn acknowledged_bytes_and_names_must_be_there() {
        let mut model = Model::default();
        let object = model.add(Kind::File);
        model.set_name("a", Some(object));
        model.set_bytes(object, vec![7; 10]);
        let empty = BTreeMap::new();
        assert!(model.judge(&empty, false).is_ok(), "nothing was acknowledged");
        model.all_durable();
        assert!(model.judge(&empty, false).is_err(), "a name is missing");
        let found = BTreeMap::from([("a".to_owned(), file(&[7; 10]))]);
        assert!(model.judge(&found, false).is_ok());
        model.set_bytes(object, vec![8; 12]);
        for (bytes, good) in [(vec![8; 12], true), (vec![0; 10], false), (vec![7; 9], false)] {
            let found = BTreeMap::from([("a".to_owned(), file(&bytes))]);
            assert_eq!(model.judge(&found, false).is_ok(), good, "{bytes:?}");
        }
        let more = BTreeMap::from([("a".to_owned(), file(&[7; 10])), ("b".to_owned(), file(b""))]);
        assert!(model.judge(&more, false).is_err(), "nobody made b");
    }

    #[test]
    fn a_change_that_failed_is_there_or_not() {
        let mut model = Model::default();
        let object = model.add(Kind::File);
        model.set_name("a", Some(object));
        model.all_durable();
        model.tried(object, vec![1; 8]);
        assert_eq!(model.bytes(object), None);
        assert!(model.found_bytes(object, vec![2; 8]).is_err());
        assert!(model.found_bytes(object, vec![1; 3]).is_ok());
        assert_eq!(model.bytes(object), Some(&[1; 3][..]));
    }
}
