//! Reads a checkpoint (safetensors, 8-bit blocks, or a folder that a GGUF file was laid out in) and writes it again in
//! Hugging Face layout, in another float type: f32, f16 or bf16.
//!
//! cargo run --release --example convert -- FOLDER NEW_FOLDER [TYPE]

// An example program prints its results.
#![allow(clippy::print_stdout)]

use std::path::Path;

use potstill::model::{DType, Device, load, save};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (from, to, dtype) = match arguments.as_slice() {
        [from, to] => (from, to, "f32"),
        [from, to, dtype] => (from, to, dtype.as_str()),
        _ => return Err("usage: convert FOLDER NEW_FOLDER [TYPE]".into()),
    };
    let dtype = match dtype {
        "f32" => DType::F32,
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        other => return Err(format!("the type is `{other}`, but must be f32, f16 or bf16").into()),
    };
    let model = load(Path::new(from), dtype, &Device::flex())?;
    save(&model, Path::new(to), dtype)?;
    let config = model.config();
    println!(
        "{to}: {}, {} layers, {} parameters",
        config.model_type(),
        config.num_hidden_layers(),
        config.parameters()
    );
    Ok(())
}
