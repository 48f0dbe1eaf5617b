//! `uext_ondisk::fuzzing::fuzz_dirhash` on a fuzzer's input.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| uext_ondisk::fuzzing::fuzz_dirhash(data));
