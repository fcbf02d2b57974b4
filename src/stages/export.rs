//! `export`: writes trained students in Hugging Face layout, with their tokenizer and a model card that
//! names their origin.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use anyhow::Context as _;
use potstill_datasets::{Manifest, Provenance, read_footer, replace_file, shards};
use potstill_model::{Config, DType};
use serde_json::json;

use super::{Context, Done, Outcome, checkpoint, counts, each, seed_of, stage, train};
use crate::run_dir::{Plan, settings_of};
use crate::run_file::{Answers, Dtype, RunFile};

/// Files that are copied from the checkpoint that the student started from.
const COPIED_FILES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// Exports every student of the run file.
///
/// # Errors
/// When a student is not yet trained, or a file cannot be read or written.
pub fn export(context: &Context) -> anyhow::Result<Outcome> {
    each(&context.trained(), |name| export_one(context, name))
}

fn export_one(context: &Context, name: &str) -> anyhow::Result<Outcome> {
    let trained = context
        .dir
        .require(&format!("students/{name}"), "train", &context.run)?;
    let home = format!("students/{name}/export");
    let source = checkpoint::student(&context.run)?;
    let dtype = context.run.file.export.dtype;
    let plan = Plan {
        stage: format!("export {name}"),
        home: home.clone(),
        outputs: vec![home.clone()],
        settings: json!({ "dtype": settings_of(&dtype)? }),
        inputs: BTreeMap::from([
            ("trained".to_owned(), trained.content_hash()),
            (
                "tokenizer".to_owned(),
                checkpoint::small_files_hash(&source)?,
            ),
        ]),
    };
    stage(context, &plan, |out| {
        let out = out.join(&home);
        let last = context.dir.path(&train::last_checkpoint(context, name));
        let model = potstill_model::load(&last, DType::F32, &context.device)?;
        potstill_model::save(&model, &out, checkpoint::dtype(dtype))?;
        for file in COPIED_FILES
            .iter()
            .filter(|file| source.join(file).exists())
        {
            let from = source.join(file);
            let text =
                fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
            replace_file(&out.join(file), &text)?;
        }
        let card = card(context, name, &trained, model.config(), dtype)?;
        replace_file(&out.join("README.md"), card.as_bytes())?;
        Ok(Some(Done::new(counts([(
            "parameters",
            model.config().parameters() as usize,
        )]))))
    })
}

/// Reads the teacher's provenance from the first shard of `completions/`.
pub(crate) fn provenance(context: &Context) -> anyhow::Result<Vec<Provenance>> {
    match shards(&context.dir.path("completions"))?.first() {
        Some(shard) => Ok(read_footer(shard)?.provenance),
        None => Ok(Vec::new()),
    }
}

fn card(
    context: &Context,
    name: &str,
    trained: &Manifest,
    config: &Config,
    dtype: Dtype,
) -> anyhow::Result<String> {
    let run = &context.run.file;
    let teachers = provenance(context)?;
    let mut out = String::from("---\nlibrary_name: transformers\n");
    if let Some(licence) = teachers.iter().find_map(|p| p.licence.as_ref()) {
        let _ = writeln!(out, "license: {}", serde_json::to_string(licence)?);
    }
    let _ = write!(
        out,
        "tags:\n- distillation\n- potstill\n---\n\n# {} ({name})\n\n{}, trained by Potstill {} in run `{}`.\n\n",
        run.run.name.as_str(),
        learned_from(run, name),
        env!("CARGO_PKG_VERSION"),
        run.run.name.as_str(),
    );
    let _ = write!(
        out,
        "- {} layers, width {}, vocabulary {}, {}\n- {} optimizer steps over {} sequences\n",
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
        settings_of(&dtype)?.as_str().unwrap_or_default(),
        trained.counts.get("steps").copied().unwrap_or_default(),
        trained.counts.get("sequences").copied().unwrap_or_default(),
    );
    for teacher in &teachers {
        let _ = writeln!(
            out,
            "- teacher: {}, revision {}, {}, {}; sampled with {}",
            teacher.teacher, teacher.revision, teacher.engine, teacher.dtype, teacher.sampling
        );
    }
    let _ = writeln!(out, "- key of the training: {}", trained.key);
    for (what, hash) in &trained.inputs {
        let _ = writeln!(out, "- {what}: sha256 {hash}");
    }
    out.push_str("\nThe run's `report.md` has the figures on held-out text.\n");
    Ok(out)
}

/// Describes the text and the signals that a model learned from.
pub(crate) fn learned_from(file: &RunFile, name: &str) -> String {
    let text = match file.import.answers {
        Answers::Teacher => "the teacher's text",
        Answers::Given => "the data's text",
    };
    match seed_of(name).0 {
        "untrained" => "nothing (the student before training)".to_owned(),
        "shuffled" => format!("{text}, each position with the distribution of another"),
        "student" if file.has_signals() => match file.import.answers {
            Answers::Teacher => "the teacher's text and distributions".to_owned(),
            Answers::Given => format!("{text} and the teacher's distributions"),
        },
        _ => format!("{text}, cross-entropy only"),
    }
}
