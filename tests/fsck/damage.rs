//! Random damage: the verdict is e2fsck's, and nothing hangs or panics.

use std::path::Path;
use std::process::Command;

use uext_tests::scratch::Scratch;
use uext_tests::tree::Rng;
use uext_tests::{run, sh};

use crate::{ours, theirs};

const SEED: u64 = 20_261_123;
const ROUNDS: u64 = 150;
/// Values that mean something in some field.
const VALUES: [u16; 16] =
    [0, 1, 2, 4, 8, 11, 12, 255, 1000, 1012, 1024, 0x4000, 0x7FFF, 0x8000, 0xF30A, 0xFFFF];

/// A small tree with hashed directories, attributes and maps of several levels.
fn base(scratch: &Scratch, layout: &str) -> Vec<u8> {
    let dir = scratch.path().display();
    sh(&format!(
        "mkdir -p {dir}/src/d/sub; cd {dir}/src
         for i in $(seq 250); do echo $i > d/file-number-$i; done
         ln -sf short l1; ln -sf $(printf 'x%.0s' $(seq 100)) l2; [ -p p ] || mkfifo p
         head -c 200000 /dev/zero | tr '\\0' 'a' > data; truncate -s 3M sparse; echo x >> sparse
         for i in 1 2 3; do touch x$i; setfattr -n user.a -v v$i x$i
           setfattr -n user.b -v $(printf 'v%.0s' $(seq 300)) x$i; done
         cd ..; rm -f base; truncate -s 4M base
         mke2fs -q -F {layout} -b 1024 -N 512 -d src base; e2fsck -fyD base > /dev/null || true
         e2fsck -fn base > /dev/null"
    ));
    std::fs::read(scratch.path().join("base")).expect("read the image")
}

/// Changes one to three words, mostly where something is.
fn damage(bytes: &mut [u8], rng: &mut Rng) -> Vec<(usize, u16)> {
    let words = bytes.len() as u64 / 2;
    let mut changes = Vec::new();
    for _ in 0..=rng.below(3) {
        let mut at = 0;
        for _ in 0..200 {
            // Most metadata of a small image lies at its start.
            let reach = if rng.below(4) > 0 { words / 20 } else { words };
            at = rng.below(reach) as usize * 2;
            if bytes[at] != 0 || bytes[at + 1] != 0 {
                break;
            }
        }
        let value = match rng.below(3) {
            0 => rng.next() as u16,
            1 => u16::from_le_bytes([bytes[at], bytes[at + 1]]) ^ 1 << rng.below(16),
            _ => VALUES[rng.below(16) as usize],
        };
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        changes.push((at, value));
    }
    changes
}

fn verdicts_agree_on(layout: &str) {
    let scratch = Scratch::new();
    let sound = base(&scratch, layout);
    let image = scratch.path().join("image");
    let mut rng = Rng(SEED);
    for round in 0..ROUNDS {
        let mut bytes = sound.clone();
        let changes = damage(&mut bytes, &mut rng);
        std::fs::write(&image, &bytes).expect("write the image");
        let (outcome, text) = ours(&image);
        let (clean, their_text) = theirs(&image);
        assert_eq!(
            outcome.exit == 0,
            clean,
            "{layout}, seed {SEED}, round {round}: {changes:?}\nours:\n{text}\n{their_text}"
        );
    }
}

#[test]
fn verdicts_on_random_damage_are_those_of_e2fsck() {
    uext_tests::require!("mke2fs", "e2fsck", "setfattr");
    verdicts_agree_on("-t ext2 -I 128");
    verdicts_agree_on("-t ext4 -O ^metadata_csum,^has_journal");
    verdicts_agree_on("-t ext4 -O ^has_journal");
}

/// Fills blocks with other blocks, zeroes and noise.
fn shuffle(bytes: &mut [u8], rng: &mut Rng) {
    let blocks = bytes.len() as u64 / 1024;
    for _ in 0..=rng.below(12) {
        let to = rng.below(blocks.min(400)) as usize * 1024;
        let from = rng.below(blocks) as usize * 1024;
        match rng.below(3) {
            0 => bytes.copy_within(from..from + 1024, to),
            1 => bytes[to..to + 1024].fill(rng.next() as u8),
            _ => bytes[to..to + 1024].copy_from_slice(&rng.bytes(1024)),
        }
    }
}

#[test]
fn no_shuffled_image_makes_the_check_panic_or_hang() {
    uext_tests::require!("mke2fs", "e2fsck", "setfattr");
    let scratch = Scratch::new();
    let image = scratch.path().join("image");
    for layout in ["-t ext2 -I 128", "-t ext4 -O ^metadata_csum,^has_journal,inline_data"] {
        let sound = base(&scratch, layout);
        let mut rng = Rng(SEED);
        for _ in 0..ROUNDS * 2 {
            let mut bytes = sound.clone();
            shuffle(&mut bytes, &mut rng);
            std::fs::write(&image, &bytes).expect("write the image");
            ours(&image);
        }
    }
}

/// Every pointer of every map leads to the same map block: without a bound this
/// is a walk of 256³ blocks for each of many inodes.
#[test]
fn maps_that_lead_to_themselves_are_followed_once() {
    uext_tests::require!("mke2fs", "debugfs");
    let scratch = Scratch::new();
    let image = scratch.sparse("image", 8 << 20);
    run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext2", "-b", "1024"]).arg(&image));
    let block = 5000u32;
    let mut script = String::new();
    for number in 0..200 {
        script += &format!("write /dev/null f{number}\n");
        for root in ["IND", "DIND", "TIND"] {
            script += &format!("sif f{number} block[{root}] {block}\n");
        }
        script += &format!("sif f{number} size 1000000000\nsif f{number} blocks 2\n");
    }
    debugfs(&image, &script, &scratch);
    let mut bytes = std::fs::read(&image).expect("read the image");
    let at = block as usize * 1024;
    for pointer in bytes[at..at + 1024].chunks_mut(4) {
        pointer.copy_from_slice(&block.to_le_bytes());
    }
    std::fs::write(&image, bytes).expect("write the image");
    assert_ne!(ours(&image).0.exit, 0);
}

fn debugfs(image: &Path, script: &str, scratch: &Scratch) {
    let commands = scratch.path().join("commands");
    std::fs::write(&commands, script).expect("write the commands");
    run(Command::new("debugfs").arg("-w").arg("-f").arg(commands).arg(image));
}
