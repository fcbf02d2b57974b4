#![no_main]

libfuzzer_sys::fuzz_target!(init: potstill_fuzz::let_panics_unwind(), |data: &[u8]| potstill_fuzz::models::config(data));
