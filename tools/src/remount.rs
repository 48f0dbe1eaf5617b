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
use uext_fuse::{control, mount_table};

/// Flags that may be given with `remount`, and their bits; `false` clears one.
const FLAGS: [(&str, MsFlags, bool); 6] = [
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
];
/// What mount(8) repeats from the table of mounts or fstab(5), and what changes nothing.
const REPEATED: [&str; 10] = [
    "remount",
    "defaults",
    "relatime",
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

/// Flags of a remount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remount {
    read_only: bool,
    flags: MsFlags,
}

impl Remount {
    /// From the options of `-o`; `None` when they ask for no remount.
    ///
    /// # Errors
    /// One line that names an option that cannot be changed.
    pub fn parse(lists: &[String]) -> Result<Option<Self>, String> {
        let options = || lists.iter().flat_map(|list| list.split(',')).filter(|o| !o.is_empty());
        if !options().any(|option| option == "remount") {
            return Ok(None);
        }
        let mut remount = Self { read_only: false, flags: MsFlags::empty() };
        for option in options() {
            if let Some((_, flag, on)) = FLAGS.iter().find(|(name, ..)| *name == option) {
                remount.flags.set(*flag, *on);
                continue;
            }
            match option {
                "ro" => remount.read_only = true,
                "rw" => remount.read_only = false,
                _ if REPEATED.contains(&option) => {}
                _ if option.starts_with("x-") || option.starts_with("X-") => {}
                _ if REPEATED_KEYS.iter().any(|key| option.starts_with(key)) => {}
                _ => {
                    return Err(format!(
                        "option {option}: cannot be changed by a remount: unmount and mount again"
                    ));
                }
            }
        }
        Ok(Some(remount))
    }

    /// Changes the mount at `dir`.
    ///
    /// # Errors
    /// One line.
    pub fn apply(self, dir: &Path) -> Result<(), String> {
        let named = |problem: &str| format!("{}: {problem}", dir.display());
        let dir = &dir.canonicalize().map_err(|error| named(&error.to_string()))?;
        let entry = mount_table::mount_at(dir).map_err(|error| named(&error.to_string()))?;
        let entry = entry.ok_or_else(|| named("not mounted"))?;
        if !entry.fstype.ends_with(".uext") {
            return Err(named(&format!("a mount of {}, not of uext", entry.fstype)));
        }
        let tell = || {
            let root = File::open(dir).map_err(|error| named(&error.to_string()))?;
            control::remount(&root, self.read_only).map_err(|error| named(&error.to_string()))
        };
        let change = || {
            let mut flags = MsFlags::MS_REMOUNT | self.flags;
            flags.set(MsFlags::MS_RDONLY, self.read_only);
            let none: Option<&str> = None;
            mount(none, dir, none, flags, none).map_err(|errno| match errno {
                Errno::EBUSY => named("files are open for writing"),
                errno => named(errno.desc()),
            })
        };
        if self.read_only {
            change()?;
            tell()
        } else {
            tell()?;
            change()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &str) -> Result<Option<Remount>, String> {
        Remount::parse(&[options.to_owned()])
    }

    #[test]
    fn the_last_of_two_options_counts_and_others_are_refused() {
        assert_eq!(parse("ro,nodev"), Ok(None));
        let given =
            parse("rw,relatime,user_id=0,group_id=0,blksize=4096,remount,ro,nodev,nosuid,dev");
        let flags = MsFlags::MS_NOSUID;
        assert_eq!(given, Ok(Some(Remount { read_only: true, flags })));
        assert!(parse("remount,commit=5").unwrap_err().contains("commit=5"));
    }
}
