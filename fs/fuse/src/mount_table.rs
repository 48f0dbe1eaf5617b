//! What is mounted, from `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Device number of the filesystem: major, minor.
    pub device: (u32, u32),
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Its type, with a subtype after a dot: `fuseblk.uext`.
    pub fstype: String,
    /// What was mounted.
    pub source: OsString,
    /// Which directory of it is seen there.
    pub root: PathBuf,
    /// Nothing of it can be written, by whichever mount.
    pub read_only: bool,
    /// For FUSE, the user who mounted; else 0.
    pub user: u32,
}

/// The table, in the order of mounting.
///
/// # Errors
/// Those of reading `/proc`.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse_line).collect())
}

/// What is mounted at `dir` (an absolute path without links), uppermost; `None` for
/// what is no mount point.
///
/// # Errors
/// Those of reading `/proc`.
pub fn mount_at(dir: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rfind(|mount| mount.mount_point == dir))
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let root = PathBuf::from(unescape(fields.next()?));
    let mount_point = PathBuf::from(unescape(fields.next()?));
    // A varying number of tags ends with a lone dash.
    fields.find(|field| *field == b"-")?;
    let fstype = String::from_utf8_lossy(unescape(fields.next()?).as_bytes()).into_owned();
    let source = unescape(fields.next()?);
    let options = fields.next().unwrap_or_default().split(|byte| *byte == b',');
    let read_only = options.clone().any(|option| option == b"ro");
    let mut user =
        options.filter_map(|option| str::from_utf8(option).ok()?.strip_prefix("user_id="));
    let user = user.next().and_then(|user| user.parse().ok()).unwrap_or(0);
    Some(MountEntry { device, mount_point, fstype, source, root, read_only, user })
}

/// Undoes the table's octal escapes of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = (byte == b'\\').then(|| tail.get(..3)).flatten();
        let code = code.and_then(|digits| str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) => {
                out.push(code);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_tags_and_escapes_is_read() {
        let line =
            b"36 35 7:3 / /mnt/a\\040b rw,noatime shared:1 master:2 - fuseblk.uext /dev/loop3 rw,user_id=1000";
        let mount = parse_line(line).unwrap();
        assert_eq!(mount.device, (7, 3));
        assert_eq!(mount.mount_point, Path::new("/mnt/a b"));
        assert_eq!(mount.fstype, "fuseblk.uext");
        assert_eq!(mount.source, "/dev/loop3");
        assert_eq!((mount.root.as_path(), mount.read_only), (Path::new("/"), false));
        assert_eq!(mount.user, 1000);
    }

    #[test]
    fn a_cut_line_is_left_out() {
        assert_eq!(parse_line(b"36 35 7:3 / /mnt"), None);
        assert_eq!(parse_line(b""), None);
    }
}
