//! `uext_ondisk::fuzzing::fuzz_htree` on a fuzzer's input.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| uext_ondisk::fuzzing::fuzz_htree(data));
