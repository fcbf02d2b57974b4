//! Answers prompts greedily with a checkpoint in Hugging Face layout, and prints a JSON line for each
//! prompt: `{"prompt": …, "prompt_ids": […], "ids": […], "text": …}`.
//!
//! cargo run --release --example generate -- FOLDER NEW_TOKENS PROMPT...

// An example program prints its results.
#![allow(clippy::print_stdout)]

use std::ops::ControlFlow;
use std::path::Path;

use potstill::datasets::Tokenizer;
use potstill::model::{BatchLimits, DType, Device, Sampling, StopConditions, generate, load};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(dir), Some(new_tokens)) = (args.next(), args.next()) else {
        return Err("usage: generate FOLDER NEW_TOKENS PROMPT...".into());
    };
    let dir = Path::new(&dir);
    let tokenizer = Tokenizer::from_dir(dir)?;
    let model = load(dir, DType::F32, &Device::flex())?;
    let sampling = Sampling {
        max_new_tokens: new_tokens.parse()?,
        temperature: 0.0,
        ..Sampling::default()
    };
    for prompt in args {
        let prompt_ids = tokenizer.encode(&prompt, true)?;
        let mut progress = |_| ControlFlow::Continue(());
        let prompts = [prompt_ids.clone()];
        let answers = generate(
            &model,
            &prompts,
            &StopConditions::at(tokenizer.eos_ids()),
            &sampling,
            &[0],
            &BatchLimits::default(),
            &mut progress,
        )?;
        for answer in answers.unwrap_or_default() {
            let text = tokenizer.decode(&answer.ids, true)?;
            let line = serde_json::json!({
                "prompt": prompt, "prompt_ids": prompt_ids, "ids": answer.ids, "text": text,
            });
            println!("{line}");
        }
    }
    Ok(())
}
