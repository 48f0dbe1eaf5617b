//! Every atomic says whom it pairs with, or why no order is needed.
//!
//! - Where an atomic is declared, the comment above it (or above its struct) says
//!   `PAIRS-WITH:` or `WHY-RELAXED:`, or both.
//! - Where one is used, its declaration in the same crate says what fits the ordering, or
//!   a comment at the use does. A fence has a comment of its own.
//!
//! Tests are left out: a file's part from `#[cfg(test)]` or `#[cfg(all(test, ...` on,
//! and files that are only a test's modules.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const PAIRS: &str = "PAIRS-WITH:";
const RELAXED: &str = "WHY-RELAXED:";

/// One crate's sources.
#[derive(Default)]
struct Crate {
    /// Files with their lines, tests left out.
    files: Vec<(PathBuf, Vec<String>)>,
}

impl Crate {
    fn add(&mut self, path: PathBuf, text: &str) {
        let lines = text.lines().map(str::to_owned);
        let code = lines.take_while(|line| {
            let line = line.trim();
            !(line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test"))
        });
        self.files.push((path, code.collect()));
    }

    /// Leaves out files that no other makes a module.
    fn drop_unused(&mut self) {
        let text: String =
            self.files.iter().flat_map(|(_, lines)| lines).map(|l| format!("{l}\n")).collect();
        self.files.retain(|(path, _)| {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            ["lib", "main", "mod", "uext", "lockdep_off"].contains(&&*stem)
                || text.contains(&format!("mod {stem};"))
        });
    }

    /// What is wrong, a line each.
    fn complaints(&self) -> Vec<String> {
        let (mut complaints, mut pairing, mut relaxed) =
            (Vec::new(), BTreeSet::new(), BTreeSet::new());
        for (path, lines) in &self.files {
            for (at, line) in lines.iter().enumerate() {
                let Some(name) = declared(line) else { continue };
                let comment = declaration_comment(lines, at);
                if comment.contains(PAIRS) {
                    pairing.insert(name.to_owned());
                }
                if comment.contains(RELAXED) {
                    relaxed.insert(name.to_owned());
                }
                if !comment.contains(PAIRS) && !comment.contains(RELAXED) {
                    complaints.push(format!("{}:{}: {name} says neither", path.display(), at + 1));
                }
            }
        }
        for (path, lines) in &self.files {
            for (at, line) in lines.iter().enumerate() {
                let Some(marker) = needs(line) else { continue };
                let known = if marker == RELAXED { &relaxed } else { &pairing };
                let by_name = receiver(lines, at).is_some_and(|name| known.contains(&name));
                if !by_name && !use_comment(lines, at).contains(marker) {
                    let text = line.trim();
                    complaints.push(format!("{}:{}: {marker} for {text}", path.display(), at + 1));
                }
            }
        }
        complaints
    }
}

fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or("")
}

/// The name of the field or static that a line declares as an atomic.
fn declared(line: &str) -> Option<&str> {
    let code = code(line);
    let (before, kind) = code.split_once(": ")?;
    // A borrowed one was declared elsewhere; a constructor is no declaration.
    let owned = kind.contains("Atomic") && !kind.contains('&') && !kind.contains("(");
    let is_item = code.trim_start().starts_with("static ") || kind.trim_end().ends_with(',');
    let of_path = kind.split("Atomic").next().is_some_and(|path| !path.contains('"'));
    let fits = owned || (code.contains("static ") && kind.contains("Atomic"));
    (fits && is_item && of_path).then(|| before.trim().rsplit(' ').next().unwrap_or(before))
}

/// Which marker a use needs.
fn needs(line: &str) -> Option<&'static str> {
    let code = code(line);
    if code.contains("cmp::Ordering") || code.trim_start().starts_with("use ") {
        return None;
    }
    let strong = ["Acquire", "Release", "AcqRel", "SeqCst"];
    if strong.iter().any(|order| code.contains(&format!("Ordering::{order}"))) {
        Some(PAIRS)
    } else if code.contains("Ordering::Relaxed") || code.contains("(Relaxed)") {
        Some(RELAXED)
    } else {
        None
    }
}

/// The atomic that a line, with those it goes on from, works on.
fn receiver(lines: &[String], at: usize) -> Option<String> {
    let methods = [".load(", ".store(", ".swap(", ".fetch_", ".compare_exchange"];
    (at.saturating_sub(3)..=at).rev().find_map(|n| {
        let code = code(&lines[n]);
        let end = methods.iter().filter_map(|method| code.rfind(method)).max()?;
        // An element counts for its array.
        let before = code[..end].trim_end_matches(|c: char| "[]".contains(c) || c.is_numeric());
        let end = before.len();
        let start = before.rfind(|c: char| !c.is_alphanumeric() && c != '_').map_or(0, |i| i + 1);
        if start < end {
            return Some(before[start..].to_owned());
        }
        // A chain broken before the method: the name ends the line above.
        let above = lines.get(n.checked_sub(1)?)?.trim_end();
        Some(above.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next()?.to_owned())
    })
}

fn is_comment(line: &str) -> bool {
    let line = line.trim();
    line.starts_with("//") || line.starts_with("#[")
}

fn comment_above(lines: &[String], at: usize) -> String {
    let above = lines[..at].iter().rev().take_while(|line| is_comment(line));
    above.cloned().collect::<Vec<_>>().join("\n")
}

/// The comment of a declaration, and of the struct it is in.
fn declaration_comment(lines: &[String], at: usize) -> String {
    let own = format!("{}\n{}", lines[at], comment_above(lines, at));
    let is_open =
        |line: &&String| code(line).contains("struct ") && code(line).trim_end().ends_with('{');
    let depth = |line: &str| line.len() - line.trim_start().len();
    let outer =
        lines[..at].iter().rposition(|line| is_open(&line) && depth(line) < depth(&lines[at]));
    let ended = |from: usize| lines[from..at].iter().any(|line| line.starts_with('}'));
    match outer.filter(|&from| !ended(from)) {
        Some(from) => own + &comment_above(lines, from),
        None => own,
    }
}

/// The comment at a use, or above the statement it is in.
fn use_comment(lines: &[String], at: usize) -> String {
    let begin = (0..=at).rev().take(6).find(|&n| n == 0 || is_comment(&lines[n - 1]));
    let above = begin.map_or_else(String::new, |n| comment_above(lines, n));
    format!("{}\n{above}", lines[at])
}

fn sources(dir: &Path, krate: &mut Crate) {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "model" {
            sources(&path, krate);
        } else if name.ends_with(".rs") && !["tests.rs", "loom_model.rs"].contains(&name.as_str()) {
            krate.add(path.clone(), &std::fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_atomic_says_whom_it_pairs_with_or_why_it_need_not() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let fs = std::fs::read_dir(root.join("fs")).unwrap();
    let mut crates: Vec<PathBuf> = fs.map(|entry| entry.unwrap().path()).collect();
    crates.extend([root.join("blockdev"), root.join("tools"), root.join("tools/drive-sys")]);
    let (mut complaints, mut files) = (Vec::new(), 0);
    for dir in crates {
        let mut krate = Crate::default();
        sources(&dir.join("src"), &mut krate);
        krate.drop_unused();
        files += krate.files.len();
        complaints.extend(krate.complaints());
    }
    assert!(files > 100, "only {files} sources were found");
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn an_atomic_without_a_word_is_found() {
    let complaints = |text: &str| {
        let mut krate = Crate::default();
        krate.add("x.rs".into(), text);
        krate.complaints()
    };
    let field = |comment: &str| format!("struct S {{\n    {comment}\n    a: AtomicU32,\n}}\n");
    let load = |order: &str| format!("fn f() {{\n    s.a.load(Ordering::{order});\n}}\n");

    assert_eq!(complaints(&field("// A number.")).len(), 1);
    assert_eq!(complaints("static A: AtomicBool = AtomicBool::new(false);").len(), 1);
    let relaxed = field("/// WHY-RELAXED: a hint.");
    assert_eq!(complaints(&(relaxed.clone() + &load("Relaxed"))), Vec::<String>::new());
    assert_eq!(complaints(&(relaxed + &load("Acquire"))).len(), 1);
    let pairs = field("/// PAIRS-WITH: `g`.");
    assert_eq!(complaints(&(pairs.clone() + &load("Acquire"))), Vec::<String>::new());
    assert_eq!(complaints(&(pairs.clone() + &load("Relaxed"))).len(), 1);
    let told =
        "fn g() {\n    // WHY-RELAXED: only we store it.\n    s.a.load(Ordering::Relaxed);\n}\n";
    assert_eq!(complaints(&(pairs + told)), Vec::<String>::new());
    assert_eq!(complaints("fn f() {\n    fence(Ordering::Acquire);\n}\n").len(), 1);
}
