//! Tests of storage: records through Parquet and the journal, damaged files, full disks.

mod damage;
mod documented;
mod full_disk;
mod gsm8k;
mod import;
mod records;
mod round_trip;
mod table;

/// An error and its sources, as the command line prints them.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
