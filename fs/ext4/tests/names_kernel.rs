//! Large directories go between the kernel's ext4 and ours.
#![allow(clippy::unwrap_used, missing_docs)]

mod names_common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use names_common::{Image, ROOT, list, look, touch};
use uext_vfs::FileSystem;

/// A loop mount of the kernel's ext4; unmounted when dropped.
struct KernelMount(PathBuf);

impl KernelMount {
    fn new(image: &Path) -> Self {
        let at = image.with_extension("mnt");
        std::fs::create_dir_all(&at).unwrap();
        let done = Command::new("mount").args(["-o", "loop"]).arg(image).arg(&at).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Self(at)
    }

    fn names(&self, dir: &str) -> BTreeSet<Vec<u8>> {
        std::fs::read_dir(self.0.join(dir))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_encoded_bytes())
            .collect()
    }
}

impl Drop for KernelMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn can_mount() -> bool {
    let root = Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout == b"0\n");
    if !root || !Path::new("/dev/loop-control").exists() {
        {
            use std::io::Write as _;
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: needs root and loop devices to mount with the kernel's ext4"
            );
        }
        return false;
    }
    true
}

#[test]
fn the_kernel_and_we_continue_each_others_indexes() {
    if !can_mount() {
        return;
    }
    for args in [&["-t", "ext4", "-b", "1024"][..], &["-t", "ext3", "-b", "4096"]] {
        let image = Image::new(64, &[args, &["-N", "40000"]].concat());
        let file = image.file();
        {
            let kernel = KernelMount::new(&file);
            std::fs::create_dir(kernel.0.join("dir")).unwrap();
            for number in 0..10_000 {
                std::fs::write(kernel.0.join(format!("dir/kernel-{number}")), "").unwrap();
            }
        }

        let image = Image::from_file(&file);
        let fs = image.mount();
        let dir = look(&fs, fs.root(), b"dir").unwrap().attr.ino;
        assert_eq!(list(&fs, dir, 100).len(), 10_000);
        for number in 0..10_000 {
            touch(&fs, dir, format!("ours-{number}").as_bytes()).unwrap();
            if number % 3 == 0 {
                fs.unlink(&ROOT, dir, format!("kernel-{number}").as_bytes()).unwrap();
            }
        }
        let ours: BTreeSet<Vec<u8>> = list(&fs, dir, 100).into_keys().collect();
        image.check(&fs);

        let kernel = KernelMount::new(&image.file());
        assert_eq!(kernel.names("dir"), ours);
        for name in &ours {
            let name = String::from_utf8_lossy(name).into_owned();
            assert!(kernel.0.join("dir").join(&name).exists(), "{name}");
            if name.ends_with('7') {
                std::fs::remove_file(kernel.0.join("dir").join(&name)).unwrap();
            }
        }
    }
}
