//! `-o`: the options of mount(8), of ext4 and our own, as one request.
//!
//! What is known but has no meaning here is accepted silently when mount(8) itself
//! consumes it, and logged when it is a tuning knob of the kernel's ext4. Anything
//! else is an error: an option that does nothing must not look as if it did.

use std::path::PathBuf;
use std::time::Duration;

use uext_blockdev::file::Engine;
use uext_ext4::{AtimePolicy, DataMode, ErrorsPolicy, MountOptions};
use uext_fuse::{Config, CpuLatency, MountAttr, Transport};

/// Everything a mount was asked for.
#[derive(Clone, Debug)]
pub struct MountRequest {
    /// For the filesystem.
    pub ext4: MountOptions,
    /// For the kernel's side.
    pub fuse: Config,
    /// How the image is read and written.
    pub engine: Engine,
    /// Where messages go.
    pub log_file: Option<PathBuf>,
    /// The options as they were given, in order.
    pub given: Vec<String>,
    /// Kernel tuning knobs that were given and do nothing here.
    pub ignored: Vec<String>,
    /// Mount through fusermount3 even as root.
    pub portable: bool,
    /// Unknown options count as tuning knobs (`-s` of mount(8)).
    pub sloppy: bool,
}

impl MountRequest {
    /// A request without options; `root`: others may enter, as with the kernel's ext4.
    pub fn new(root: bool) -> Self {
        Self {
            ext4: MountOptions::default(),
            fuse: Config { allow_other: root, ..Config::default() },
            engine: Engine::Auto,
            log_file: None,
            given: Vec::new(),
            ignored: Vec::new(),
            portable: false,
            sloppy: false,
        }
    }

    /// Adds the options of one `-o`; later ones win.
    ///
    /// # Errors
    /// One line that names the option.
    pub fn add(&mut self, list: &str) -> Result<(), String> {
        for option in split(list) {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(unquote(value))),
                None => (option, None),
            };
            self.add_one(key, value).map_err(|problem| format!("option {option}: {problem}"))?;
            self.given.push(option.to_owned());
        }
        self.set_read_only(self.ext4.read_only);
        self.fuse.sync = self.ext4.sync;
        self.fuse.dirsync = self.ext4.dirsync;
        Ok(())
    }

    /// Read-only or not, on both sides.
    pub fn set_read_only(&mut self, read_only: bool) {
        self.ext4.read_only = read_only;
        self.fuse.read_only = read_only;
        self.fuse.attributes.set(MountAttr::RDONLY, read_only);
    }

    fn add_one(&mut self, key: &str, value: Option<&str>) -> Result<(), String> {
        if self.add_flag(key, value) || consumed_by_mount(key) {
            return Ok(());
        }
        if is_tuning_knob(key) {
            self.ignored.push(key.to_owned());
            return Ok(());
        }
        let given = || value.filter(|value| !value.is_empty()).ok_or("a value is missing");
        let ext4 = &mut self.ext4;
        match key {
            "data" => {
                ext4.data_mode = Some(match given()? {
                    "ordered" => DataMode::Ordered,
                    "journal" => DataMode::Journal,
                    "writeback" => DataMode::Writeback,
                    _ => return Err("ordered, journal or writeback".into()),
                });
            }
            "data_err" => {
                ext4.data_err_abort = match given()? {
                    "abort" => true,
                    "ignore" => false,
                    _ => return Err("abort or ignore".into()),
                }
            }
            "errors" => {
                ext4.errors = Some(match given()? {
                    "continue" => ErrorsPolicy::Continue,
                    "remount-ro" => ErrorsPolicy::RemountRo,
                    "panic" => ErrorsPolicy::Panic,
                    _ => return Err("continue, remount-ro or panic".into()),
                });
            }
            "commit" => {
                // 0 is the default, as for the kernel's ext4.
                let seconds = number(given()?)?;
                let seconds = if seconds == 0 { 5 } else { seconds };
                ext4.commit_interval = Duration::from_secs(seconds);
            }
            "barrier" => ext4.barrier = number(value.unwrap_or("1"))? != 0,
            "sb" => ext4.sb_block = Some(number(given()?)?),
            "journal_path" => ext4.journal_path = Some(PathBuf::from(given()?)),
            "journal_dev" => ext4.journal_path = Some(device_path(given()?)?),
            "cache_size" => {
                let bytes = usize::try_from(size(given()?)?).map_err(|_| "too large")?;
                ext4.cache_bytes = Some(bytes);
            }
            "threads" => {
                let threads = number(given()?)?;
                let threads = usize::try_from(threads).ok().filter(|n| (1..=256).contains(n));
                self.fuse.threads = Some(threads.ok_or("1 to 256")?);
            }
            "spin" => {
                let micros = number(given()?)?;
                let micros = Some(micros).filter(|n| *n <= 10_000).ok_or("0 to 10000")?;
                self.fuse.spin = Duration::from_micros(micros);
            }
            "cpu_latency" => {
                self.fuse.cpu_latency = match given()? {
                    "auto" => CpuLatency::Auto,
                    "off" => CpuLatency::Off,
                    micros => CpuLatency::Within(
                        micros.parse().map_err(|_| "auto, off or microseconds, up to 65535")?,
                    ),
                }
            }
            "read_ahead_kb" => {
                let kb = u32::try_from(number(given()?)?).map_err(|_| "too large")?;
                self.fuse.read_ahead_kb = Some(kb);
            }
            "max_ratio" => {
                let percent = u8::try_from(number(given()?)?).ok().filter(|n| *n <= 100);
                self.fuse.max_ratio = Some(percent.ok_or("0 to 100")?);
            }
            "transport" => {
                self.fuse.transport = match given()? {
                    "uring" => Transport::Uring,
                    "devfuse" => Transport::DevFuse,
                    "auto" => Transport::Auto,
                    _ => return Err("uring, devfuse or auto".into()),
                }
            }
            "entry_timeout" => self.fuse.entry_timeout = seconds(given()?)?,
            "attr_timeout" => self.fuse.attr_timeout = seconds(given()?)?,
            "negative_timeout" => self.fuse.negative_timeout = seconds(given()?)?,
            "engine" => self.engine = engine(given()?)?,
            "log_file" => self.log_file = Some(PathBuf::from(given()?)),
            "context" | "fscontext" | "defcontext" | "rootcontext" => {
                let value = given()?.to_owned();
                self.fuse.extra.push((key.to_owned(), Some(value)));
            }
            "remount" => return Err("not among other lists of options".into()),
            "bind" | "rbind" | "move" => return Err("not for a filesystem".into()),
            _ if self.sloppy => self.ignored.push(key.to_owned()),
            _ => return Err("unknown".into()),
        }
        Ok(())
    }

    /// Options without a value; whether it was one.
    fn add_flag(&mut self, key: &str, value: Option<&str>) -> bool {
        if value.is_some() {
            return false;
        }
        let ext4 = &mut self.ext4;
        let attributes = &mut self.fuse.attributes;
        match key {
            "ro" => (ext4.read_only, ext4.rw_explicit) = (true, false),
            "rw" => (ext4.read_only, ext4.rw_explicit) = (false, true),
            "noatime" => {
                ext4.atime = AtimePolicy::Never;
                attributes.remove(MountAttr::STRICTATIME);
                attributes.insert(MountAttr::NOATIME);
            }
            "atime" | "relatime" | "nostrictatime" => {
                ext4.atime = AtimePolicy::Relative;
                attributes.remove(MountAttr::STRICTATIME | MountAttr::NOATIME);
            }
            "strictatime" | "norelatime" => {
                ext4.atime = AtimePolicy::Strict;
                attributes.remove(MountAttr::NOATIME);
                attributes.insert(MountAttr::STRICTATIME);
            }
            "nodiratime" => {
                ext4.nodiratime = true;
                attributes.insert(MountAttr::NODIRATIME);
            }
            "diratime" => {
                ext4.nodiratime = false;
                attributes.remove(MountAttr::NODIRATIME);
            }
            "nodev" => attributes.insert(MountAttr::NODEV),
            "dev" => attributes.remove(MountAttr::NODEV),
            "nosuid" => attributes.insert(MountAttr::NOSUID),
            "suid" => attributes.remove(MountAttr::NOSUID),
            "noexec" => attributes.insert(MountAttr::NOEXEC),
            "exec" => attributes.remove(MountAttr::NOEXEC),
            "nosymfollow" => attributes.insert(MountAttr::NOSYMFOLLOW),
            "symfollow" => attributes.remove(MountAttr::NOSYMFOLLOW),
            "sync" => ext4.sync = true,
            "async" => ext4.sync = false,
            "dirsync" => ext4.dirsync = true,
            "nobarrier" => ext4.barrier = false,
            "norecovery" | "noload" => ext4.norecovery = true,
            "force" => ext4.force = true,
            "auto_da_alloc" => ext4.auto_da_alloc = true,
            "noauto_da_alloc" => ext4.auto_da_alloc = false,
            "user_xattr" => ext4.user_xattr = true,
            "nouser_xattr" => ext4.user_xattr = false,
            "acl" => ext4.acl = true,
            "noacl" => ext4.acl = false,
            "allow_other" => self.fuse.allow_other = true,
            "noallow_other" => self.fuse.allow_other = false,
            "enable_uring" => self.fuse.enable_uring = true,
            "no_open" => self.fuse.no_open = Some(true),
            "open" => self.fuse.no_open = Some(false),
            "splice" => self.fuse.splice = true,
            "nosplice" => self.fuse.splice = false,
            "portable" => self.portable = true,
            "default_permissions" => self.fuse.default_permissions = true,
            "writeback_cache" => self.fuse.writeback_cache = true,
            "nowriteback_cache" => self.fuse.writeback_cache = false,
            _ => return false,
        }
        true
    }
}

/// Cuts at commas that are not within double quotes, as mount(8) does.
pub(crate) fn split(list: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    list.split(move |c| {
        quoted ^= c == '"';
        c == ',' && !quoted
    })
    .filter(|option| !option.is_empty())
}

fn unquote(value: &str) -> &str {
    value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
}

/// What mount(8), fstab and systemd write for themselves.
fn consumed_by_mount(key: &str) -> bool {
    const KEYS: [&str; 22] = [
        "defaults", "auto", "noauto", "nofail", "fail", "user", "users", "nouser", "nousers",
        "owner", "noowner", "group", "nogroup", "_netdev", "loop", "loud", "silent", "uhelper",
        "helper", "comment", "subtype", "fsname",
    ];
    KEYS.contains(&key) || key.starts_with("x-") || key.starts_with("X-")
}

/// Options of the kernel's ext4 that change its speed or habits, not what is on the disk.
fn is_tuning_knob(key: &str) -> bool {
    const KEYS: [&str; 30] = [
        "discard",
        "nodiscard",
        "delalloc",
        "nodelalloc",
        "stripe",
        "inode_readahead_blks",
        "journal_ioprio",
        "max_batch_time",
        "min_batch_time",
        "lazytime",
        "nolazytime",
        "i_version",
        "iversion",
        "noiversion",
        "init_itable",
        "noinit_itable",
        "journal_checksum",
        "nojournal_checksum",
        "journal_async_commit",
        "block_validity",
        "noblock_validity",
        "dioread_lock",
        "dioread_nolock",
        "orlov",
        "oldalloc",
        "mb_optimize_scan",
        "prefetch_block_bitmaps",
        "no_prefetch_block_bitmaps",
        "mand",
        "nomand",
    ];
    KEYS.contains(&key)
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text} is not a number"))
}

/// The path of a device number as mount(8) takes it for ext4: decimal or with 0x.
fn device_path(text: &str) -> Result<PathBuf, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let number = number.ok_or_else(|| format!("{text} is no device number"))?;
    let (major, minor) = (number >> 8 & 0xFFF, (number & 0xFF) | (number >> 12 & 0xF_FF00));
    Ok(PathBuf::from(format!("/dev/block/{major}:{minor}")))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text} is not a number"))?;
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("{text} is out of range"))
}

/// Bytes, with a suffix K, M, G or T of powers of 1024.
///
/// # Errors
/// What is wrong with it.
pub fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        suffix => return Err(format!("{suffix} is no unit: use K, M, G or T")),
    };
    number(digits)?.checked_mul(1 << shift).ok_or_else(|| "too large".to_owned())
}

/// An engine by its name on the command line.
///
/// # Errors
/// The names there are.
pub fn engine(name: &str) -> Result<Engine, String> {
    match name {
        "auto" => Ok(Engine::Auto),
        "uring" | "io_uring" => Ok(Engine::IoUring),
        "aio" => Ok(Engine::Aio),
        "sync" => Ok(Engine::Sync),
        _ => Err("auto, uring, aio or sync".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Result<MountRequest, String> {
        let mut request = MountRequest::new(true);
        request.add(list).map(|()| request)
    }

    #[test]
    fn a_line_of_fstab_is_understood() {
        let request =
            parse("rw,noatime,nodev,errors=remount-ro,commit=30,data=journal,user,x-a.b=c");
        let request = request.unwrap();
        assert!(request.ext4.rw_explicit && !request.ext4.read_only);
        assert_eq!(request.ext4.atime, AtimePolicy::Never);
        assert_eq!(request.fuse.attributes, MountAttr::NOATIME | MountAttr::NODEV);
        assert_eq!(request.ext4.errors, Some(ErrorsPolicy::RemountRo));
        assert_eq!(request.ext4.commit_interval, Duration::from_secs(30));
        assert_eq!(request.ext4.data_mode, Some(DataMode::Journal));
    }

    #[test]
    fn the_later_option_wins() {
        let request = parse("ro,rw,noatime,strictatime,nobarrier,barrier=1").unwrap();
        assert!(!request.fuse.read_only);
        assert_eq!(request.ext4.atime, AtimePolicy::Strict);
        assert!(request.ext4.barrier);
        assert!(parse("rw,ro").unwrap().fuse.read_only);
    }

    #[test]
    fn an_unknown_option_is_named() {
        let error = parse("rw,nonsense=3").unwrap_err();
        assert_eq!(error, "option nonsense=3: unknown");
        assert!(parse("data=sideways").is_err());
        assert!(parse("commit=soon").is_err());
        assert!(parse("ro=1").is_err());
        assert!(parse("remount").is_err());
    }

    #[test]
    fn tuning_knobs_are_kept_apart() {
        assert_eq!(parse("discard,stripe=16").unwrap().ignored, ["discard", "stripe"]);
    }

    #[test]
    fn a_quoted_value_keeps_its_commas() {
        let request = parse("context=\"a:b:c:s0,c1\",ro").unwrap();
        let wanted = ("context".to_owned(), Some("a:b:c:s0,c1".to_owned()));
        assert_eq!(request.fuse.extra, [wanted]);
        assert!(request.ext4.read_only);
    }

    #[test]
    fn the_transport_and_what_comes_with_it_are_options() {
        let request = parse("transport=uring,enable_uring,open,max_ratio=50,splice").unwrap();
        assert_eq!(request.fuse.transport, Transport::Uring);
        assert!(request.fuse.enable_uring && request.fuse.splice);
        assert_eq!((request.fuse.no_open, request.fuse.max_ratio), (Some(false), Some(50)));
        assert_eq!(parse("rw").unwrap().fuse.transport, Transport::DevFuse);
        assert!(parse("transport=pigeon").is_err());
        assert_eq!(parse("spin=0").unwrap().fuse.spin, Duration::ZERO);
        assert!(parse("spin=10001").is_err());
        let latency = |list| parse(list).map(|request| request.fuse.cpu_latency);
        assert_eq!(latency("rw"), Ok(CpuLatency::Auto));
        assert_eq!(latency("cpu_latency=off"), Ok(CpuLatency::Off));
        assert_eq!(latency("cpu_latency=0"), Ok(CpuLatency::Within(0)));
        assert!(latency("cpu_latency=-1").is_err() && latency("cpu_latency").is_err());
        assert!(parse("max_ratio=101").is_err());
    }

    #[test]
    fn a_journal_is_named_by_path_or_number() {
        let path = |list| parse(list).map(|request| request.ext4.journal_path.unwrap());
        assert_eq!(path("journal_path=/dev/loop7"), Ok(PathBuf::from("/dev/loop7")));
        assert_eq!(path("journal_dev=0x703"), Ok(PathBuf::from("/dev/block/7:3")));
        assert_eq!(path("journal_dev=66305"), Ok(PathBuf::from("/dev/block/259:1")));
        assert!(parse("journal_dev=sda").is_err());
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("1GiB"), Ok(1 << 30));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("12x").is_err());
        assert!(size("99999999999T").is_err());
    }
}
