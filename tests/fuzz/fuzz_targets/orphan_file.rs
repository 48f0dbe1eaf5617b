//! `uext_ondisk::fuzzing::fuzz_orphan_file` on a fuzzer's input.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| uext_ondisk::fuzzing::fuzz_orphan_file(data));
