//! What is done while the device fails: short runs by seed, each with its own weight on a part
//! of the filesystem.

use crate::model::Kind;
use crate::session::Session;

type Done = Result<(), String>;

/// What a run does most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Files in directories that come, move and go.
    Names,
    /// Files that grow and are synced.
    Append,
    /// Writes anywhere, into holes and over data.
    Overwrite,
    /// Sizes that go up and down.
    Truncate,
    /// A directory that grows past its index, links and attributes.
    Large,
    /// More metadata than the log holds.
    Wrap,
}

impl Profile {
    /// Runs it.
    ///
    /// # Errors
    /// A promise that was broken.
    pub fn run(self, on: &mut Session) -> Done {
        match self {
            Self::Names => names(on),
            Self::Append => append(on),
            Self::Overwrite => overwrite(on),
            Self::Truncate => truncate(on),
            Self::Large => large(on),
            Self::Wrap => wrap(on),
        }
    }
}

/// New bytes, none zero, so that a hole is no part of a version.
pub fn bytes(on: &mut Session, len: usize) -> Vec<u8> {
    on.rng.bytes(len).into_iter().map(|byte| byte.max(1)).collect()
}

fn below(on: &mut Session, end: usize) -> usize {
    on.rng.below(end as u64) as usize
}

fn any_file(on: &mut Session) -> Option<String> {
    let files = on.model.paths(|kind| *kind == Kind::File);
    let at = below(on, files.len());
    files.into_iter().nth(at)
}

fn sync_something(on: &mut Session) -> Done {
    let which = below(on, 8);
    match any_file(on) {
        Some(path) if which < 5 => on.fsync(&path, which == 0).map(drop),
        _ if which < 7 => on.sync().map(drop),
        _ => Ok(()),
    }
}

fn names(on: &mut Session) -> Done {
    for dir in ["a", "b", "c"] {
        on.make(dir, Kind::Dir)?;
    }
    for step in 0..70 {
        let dirs = on.model.paths(|kind| *kind == Kind::Dir);
        let at = below(on, dirs.len());
        let dir = dirs.into_iter().nth(at).unwrap_or_default();
        let fresh = format!("{dir}/n{step}").trim_start_matches('/').to_owned();
        match below(on, 10) {
            0 | 1 => on.make(&fresh, Kind::File)?,
            2 => {
                let target = b"t".repeat(1 + below(on, 120));
                on.make(&fresh, Kind::Link(target))?;
            }
            3 if dir.matches('/').count() < 3 => on.make(&fresh, Kind::Dir)?,
            4 => {
                if let Some(path) = any_file(on) {
                    on.link(&path, &fresh)?;
                }
            }
            5 | 6 => {
                if let Some(path) = any_file(on) {
                    let over = any_file(on).filter(|over| *over != path && step % 2 == 0);
                    // Two names of one file stay two.
                    let over = over.filter(|over| on.model.at(over) != on.model.at(&path));
                    on.rename(&path, &over.unwrap_or(fresh))?;
                }
            }
            7 if dir.len() > 1 => on.rename(&dir, &format!("moved{step}"))?,
            8 => {
                if let Some(path) = any_file(on) {
                    on.remove(&path)?;
                }
            }
            _ => sync_something(on)?,
        }
        if let Some(path) = any_file(on).filter(|_| step % 3 == 0) {
            let data = bytes(on, 3000);
            on.write(&path, 0, &data)?;
        }
    }
    on.sync().map(drop)
}

fn append(on: &mut Session) -> Done {
    for file in 0..6 {
        on.make(&format!("log{file}"), Kind::File)?;
    }
    for step in 0..80 {
        let path = format!("log{}", below(on, 6));
        let Some(end) = on.model.at(&path).and_then(|o| on.model.bytes(o)).map(<[u8]>::len) else {
            continue;
        };
        let len = 1 + below(on, 9000);
        let data = bytes(on, len);
        on.write(&path, end, &data)?;
        if step % 3 == 0 {
            on.fsync(&path, step % 2 == 0)?;
        }
        if step % 11 == 0 {
            on.read(&path)?;
        }
    }
    on.sync().map(drop)
}

fn overwrite(on: &mut Session) -> Done {
    for file in 0..4 {
        on.make(&format!("f{file}"), Kind::File)?;
    }
    on.sync()?;
    for step in 0..90 {
        let path = format!("f{}", below(on, 4));
        let (offset, len) = (below(on, 200_000), 1 + below(on, 12_000));
        let data = bytes(on, len);
        on.write(&path, offset, &data)?;
        match below(on, 6) {
            0 | 1 => on.fsync(&path, step % 2 == 0).map(drop)?,
            2 => on.read(&path)?,
            3 if step % 4 == 0 => on.sync().map(drop)?,
            _ => {}
        }
    }
    on.sync().map(drop)
}

fn truncate(on: &mut Session) -> Done {
    for file in 0..4 {
        on.make(&format!("t{file}"), Kind::File)?;
    }
    for step in 0..70 {
        let path = format!("t{}", below(on, 4));
        match below(on, 5) {
            0 | 1 => {
                let size = below(on, 300_000);
                on.truncate(&path, size)?;
            }
            2 | 3 => {
                let (offset, len) = (below(on, 150_000), 1 + below(on, 30_000));
                let data = bytes(on, len);
                on.write(&path, offset, &data)?;
            }
            _ => on.read(&path)?,
        }
        if step % 5 == 4 {
            sync_something(on)?;
        }
        if step % 23 == 22 {
            on.remove(&path)?;
            on.make(&path, Kind::File)?;
        }
    }
    on.sync().map(drop)
}

fn large(on: &mut Session) -> Done {
    on.make("big", Kind::Dir)?;
    on.make("anchor", Kind::File)?;
    for step in 0..130 {
        let path = format!("big/{step:03}-{}", "n".repeat(90));
        if step % 4 == 0 {
            on.make(&path, Kind::File)?
        } else {
            on.link("anchor", &path)?
        }
        if step % 16 == 7 {
            let len = 1 + below(on, 900);
            on.set_xattr("anchor", len)?;
            on.fsync("anchor", false)?;
        }
    }
    for step in (0..130).step_by(2) {
        on.remove(&format!("big/{step:03}-{}", "n".repeat(90)))?;
        if step % 40 == 0 {
            on.sync()?;
        }
    }
    on.sync().map(drop)
}

fn wrap(on: &mut Session) -> Done {
    for round in 0..14 {
        let dir = format!("w{round}");
        on.make(&dir, Kind::Dir)?;
        for at in 0..12 {
            on.make(&format!("{dir}/{at}"), Kind::Dir)?;
        }
        let file = format!("{dir}/file");
        on.make(&file, Kind::File)?;
        let data = bytes(on, 5000);
        on.write(&file, 0, &data)?;
        on.fsync(&file, false)?;
        if round > 1 {
            let old = format!("w{}", round - 2);
            for at in 0..12 {
                on.remove(&format!("{old}/{at}"))?;
            }
            on.rename(&format!("{old}/file"), &format!("kept{round}"))?;
            on.remove(&old)?;
        }
    }
    on.sync().map(drop)
}
