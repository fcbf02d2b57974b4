//! Lays out GGUF files as folders in Hugging Face layout, and writes folders as GGUF files.
//!
//!     cargo run --release --example gguf -- lay-out FILE FOLDER
//!     cargo run --release --example gguf -- export FOLDER FILE TYPE    # f16, bf16, q8_0, q4_0 or q4_k_m

// An example program prints its results.
#![allow(clippy::print_stderr)]

use std::path::Path;
use std::process::ExitCode;

use potstill::model::{GgufLabels, GgufType, export_gguf, lay_out_gguf};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["lay-out", file, folder] => lay_out_gguf(Path::new(file), Path::new(folder)),
        ["export", folder, file, kind] => {
            let kinds = [
                GgufType::F16,
                GgufType::Bf16,
                GgufType::Q8_0,
                GgufType::Q4_0,
                GgufType::Q4KM,
            ];
            let Some(kind) = kinds.into_iter().find(|one| one.name() == *kind) else {
                eprintln!("error: no type {kind}");
                return ExitCode::from(2);
            };
            let folder = Path::new(folder);
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            let labels = GgufLabels {
                name: name.into_owned(),
                licence: None,
            };
            export_gguf(folder, Path::new(file), kind, &labels)
        }
        _ => {
            eprintln!("usage: gguf lay-out FILE FOLDER | export FOLDER FILE TYPE");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
