//! `-o remount`: what can be changed of a live mount.
//!
//! The kernel changes the mount's flags by itself, and tells a FUSE filesystem nothing of
//! it. So the filesystem is told by an ioctl on the mount: after the kernel when it becomes
//! read-only, since nothing may be written once the image is clean, and before the kernel
//! when it becomes writable.

use std::fs::File;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::{FsFlags, statvfs};
use uext_fuse::mount_table::MountEntry;
use uext_fuse::{control, mount_table};
use uext_vfs::RemountFlags;

use crate::mount_options::split;
use crate::state::MountWaiter;

/// Flags that may be given with `remount`, and their bits; `false` clears one. Those that are
/// not given stay.
const FLAGS: [(&str, MsFlags, bool); 12] = [
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("relatime", MsFlags::MS_NOATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
];
/// What mount(8) repeats from the table of mounts or fstab(5), and what changes nothing.
const REPEATED: [&str; 9] = [
    "remount",
    "defaults",
    "async",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
    "allow_other",
    "default_permissions",
];
const REPEATED_KEYS: [&str; 7] =
    ["user_id=", "group_id=", "rootmode=", "fd=", "blksize=", "max_read=", "subtype="];

/// What a remount is to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remount {
    /// `None` when neither was said.
    read_only: Option<bool>,
    set: MsFlags,
    clear: MsFlags,
    /// Options that cannot be changed: they must be those that the mount has.
    fixed: Vec<String>,
}

impl Remount {
    /// From the options of `-o`; `None` when they ask for no remount.
    pub fn parse(lists: &[String]) -> Option<Self> {
        let options = || lists.iter().flat_map(|list| split(list));
        if !options().any(|option| option == "remount") {
            return None;
        }
        let none = MsFlags::empty();
        let mut remount = Self { read_only: None, set: none, clear: none, fixed: Vec::new() };
        for option in options() {
            let mut is_flag = false;
            for (_, flag, on) in FLAGS.iter().filter(|(name, ..)| *name == option) {
                remount.set.set(*flag, *on);
                remount.clear.set(*flag, !*on);
                is_flag = true;
            }
            if is_flag {
                continue;
            }
            match option {
                "ro" => remount.read_only = Some(true),
                "rw" => remount.read_only = Some(false),
                _ if REPEATED.contains(&option) => {}
                _ if option.starts_with("x-") || option.starts_with("X-") => {}
                _ if REPEATED_KEYS.iter().any(|key| option.starts_with(key)) => {}
                _ => remount.fixed.push(option.to_owned()),
            }
        }
        Some(remount)
    }

    /// Changes the mount at `dir`.
    ///
    /// # Errors
    /// One line, which names an option that cannot be changed.
    pub fn apply(&self, dir: &Path) -> Result<(), String> {
        let named = |problem: &str| format!("{}: {problem}", dir.display());
        let dir = &dir.canonicalize().map_err(|error| named(&error.to_string()))?;
        let entry = mount_table::mount_at(dir).map_err(|error| named(&error.to_string()))?;
        let entry = entry.ok_or_else(|| named("not mounted"))?;
        if !entry.fstype.ends_with(".uext") {
            return Err(named(&format!("a mount of {}, not of uext", entry.fstype)));
        }
        self.check_fixed(&entry)?;
        let read_only = self.read_only.unwrap_or(entry.read_only);
        let tell = |read_only| {
            let root = File::open(dir).map_err(|error| named(&error.to_string()))?;
            control::remount(&root, self.words(read_only)).map_err(|error| {
                let refusal = || control::refusal(&root);
                named(&match error.raw_os_error() {
                    Some(libc::EROFS) => refusal().unwrap_or_else(|| {
                        "an error made it read-only: unmount it, and mount it with rw after uext \
                         fsck"
                            .to_owned()
                    }),
                    _ => error.to_string(),
                })
            })
        };
        let change = || {
            let mut flags = current_flags(dir).map_err(|errno| named(errno.desc()))?;
            flags.remove(self.clear);
            flags |= MsFlags::MS_REMOUNT | self.set;
            flags.set(MsFlags::MS_RDONLY, read_only);
            let none: Option<&str> = None;
            mount(none, dir, none, flags, none).map_err(|errno| match errno {
                Errno::EBUSY => named("files are open for writing"),
                errno => named(errno.desc()),
            })
        };
        if read_only {
            change()?;
            tell(true)
        } else {
            tell(false)?;
            // What the kernel lets nobody write is to be clean.
            let clean = |problem| tell(true).err().unwrap_or(problem);
            change().map_err(|problem| if entry.read_only { clean(problem) } else { problem })
        }
    }

    /// What the filesystem is told.
    fn words(&self, read_only: bool) -> RemountFlags {
        let mut flags = RemountFlags::empty();
        flags.set(RemountFlags::READ_ONLY, read_only);
        flags.set(RemountFlags::NOATIME, self.set.contains(MsFlags::MS_NOATIME));
        flags.set(RemountFlags::RELATIME, self.clear.contains(MsFlags::MS_NOATIME));
        flags.set(RemountFlags::NODIRATIME, self.set.contains(MsFlags::MS_NODIRATIME));
        flags.set(RemountFlags::DIRATIME, self.clear.contains(MsFlags::MS_NODIRATIME));
        flags
    }

    /// Whether the mount has what a remount cannot change. mount(8) repeats what is in fstab(5).
    fn check_fixed(&self, entry: &MountEntry) -> Result<(), String> {
        if self.fixed.is_empty() {
            return Ok(());
        }
        let word = MountWaiter::find(entry, entry.user);
        let has = word.and_then(|mut word| word.options().ok()).unwrap_or_default();
        match self.fixed.iter().find(|option| !has.contains(option)) {
            None => Ok(()),
            Some(option) => Err(format!(
                "option {option}: cannot be changed by a remount: unmount and mount again"
            )),
        }
    }
}

/// The flags of a mount that a remount would clear if they were not named again.
pub(crate) fn current_flags(dir: &Path) -> Result<MsFlags, Errno> {
    let now = statvfs(dir)?.flags();
    let mut flags = MsFlags::empty();
    for (has, flag) in [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_SYNCHRONOUS, MsFlags::MS_SYNCHRONOUS),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ] {
        flags.set(flag, now.contains(has));
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &str) -> Option<Remount> {
        Remount::parse(&[options.to_owned()])
    }

    #[test]
    fn the_last_of_two_options_counts_and_others_are_kept_for_comparison() {
        assert_eq!(parse("ro,nodev"), None);
        let given = parse(
            "rw,user_id=0,group_id=0,blksize=4096,remount,ro,nodev,nosuid,dev,commit=5,noatime",
        );
        let set = MsFlags::MS_NOSUID | MsFlags::MS_NOATIME;
        let clear = MsFlags::MS_NODEV;
        let fixed = vec!["commit=5".to_owned()];
        assert_eq!(given, Some(Remount { read_only: Some(true), set, clear, fixed }));
        assert_eq!(parse("remount,nodev").and_then(|remount| remount.read_only), None);
    }
}
