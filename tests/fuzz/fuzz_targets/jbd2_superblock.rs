//! `uext_ondisk::fuzzing::fuzz_jbd2_superblock` on a fuzzer's input.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| uext_ondisk::fuzzing::fuzz_jbd2_superblock(data));
