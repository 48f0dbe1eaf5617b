//! `uext_ondisk::fuzzing::fuzz_xattr` on a fuzzer's input.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| uext_ondisk::fuzzing::fuzz_xattr(data));
