//! `export`: writes trained students in Hugging Face layout, with their tokenizer and a model card that
//! names their origin.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use potstill_datasets::{
    AnswerSource, Arm, FloatType, Manifest, Provenance, RunModel, Variant, read_footer,
    replace_shared_file, shards,
};
use potstill_eval::markdown_text;
use potstill_model::{Config, Decoder, GgufLabels, GgufType, export_gguf, merged, save_adapter};
use serde_json::json;

use super::models::export_home;
use super::training::exported_model;
use super::{
    Context, StageOutcome, StageSummary, checkpoint, counts, for_each_model, known, run_stage,
};
use crate::run_dir::{StagePlan, settings_of};
use crate::run_file::{
    AdapterExport, ExportFormat, ExportedWeights, GgufTypeName, HubSource, RunFile,
};

/// Files that are copied from the checkpoint that the student started from.
const COPIED_FILES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// Exports every trained model of the run.
///
/// # Errors
/// When a student is not yet trained, or a file cannot be read or written.
pub fn export(context: &Context) -> anyhow::Result<StageOutcome> {
    for_each_model(context.variants(), |variant| export_one(context, variant))
}

fn export_one(context: &Context, variant: Variant) -> anyhow::Result<StageOutcome> {
    let (stage, home) = (format!("export {variant}"), export_home(variant));
    let Some((plan, trained)) = known(context, &stage, &home, || plan(context, variant))? else {
        return Ok(StageOutcome::WouldRun);
    };
    let source = checkpoint::student(&context.run)?;
    let (dtype, gguf) = (context.run.settings.export.dtype, gguf_of(context));
    let is_separate = context.run.settings.export.adapter == AdapterExport::Separate;
    run_stage(context, &plan, |out| {
        let out = out.join(&home);
        let (seed_index, training) = (variant.seed_index, format!("students/{variant}"));
        let model = exported_model(context, seed_index, &training, &trained.counts)?;
        let config = model.config().clone();
        match is_separate {
            true => save_adapter_alone(context, &model, &out)?,
            false => potstill_model::save(&merged(model), &out, checkpoint::dtype(dtype))?,
        }
        for file in COPIED_FILES
            .iter()
            .filter(|file| source.join(file).exists())
        {
            let from = source.join(file);
            let text =
                fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
            replace_shared_file(&out.join(file), &text)?;
        }
        let card = card(context, variant, &trained, &config, dtype)?;
        replace_shared_file(&out.join("README.md"), card.as_bytes())?;
        if let Some(kind) = gguf {
            write_gguf(context, variant, kind, &out)?;
        }
        Ok(Some(StageSummary::new(counts([(
            "parameters",
            config.parameters() as usize,
        )]))))
    })
}

/// Writes the adapter of a model without the model, which is named by its repository and commit, or by its folder.
fn save_adapter_alone(context: &Context, model: &Decoder, out: &Path) -> anyhow::Result<()> {
    let (base, revision) = match base_source(context) {
        Some(source) => (repository_name(source), Some(source.commit.clone())),
        None => {
            let folder = checkpoint::student(&context.run)?;
            (folder.display().to_string(), None)
        }
    };
    Ok(save_adapter(model, out, &base, revision.as_deref())?)
}

/// The repository of the Hub that the student started from, if it did.
fn base_source(context: &Context) -> Option<&HubSource> {
    let student = &context.run.settings.student;
    match (&student.random, &student.path) {
        (Some(_), _) => None,
        (None, Some(_)) => context.run.hub.get("student"),
        (None, None) => context.run.hub.get("teacher"),
    }
}

/// The name of a repository, without the file in it.
fn repository_name(source: &HubSource) -> String {
    let name: Vec<&str> = source.repository.splitn(3, '/').take(2).collect();
    name.join("/")
}

/// Makes the plan of an export, and reads the manifest of the training that is exported.
fn plan(context: &Context, variant: Variant) -> anyhow::Result<(StagePlan, Manifest)> {
    let trained = context
        .dir
        .require(&format!("students/{variant}"), "train", &context.run)?;
    let home = export_home(variant);
    let source = checkpoint::student(&context.run)?;
    let dtype = context.run.settings.export.dtype;
    let mut settings = match gguf_of(context) {
        None => json!({ "dtype": settings_of(&dtype)? }),
        Some(kind) => json!({ "dtype": settings_of(&dtype)?, "gguf": settings_of(&kind)? }),
    };
    if context.run.settings.export.adapter == AdapterExport::Separate {
        settings["adapter"] = settings_of(&AdapterExport::Separate)?;
    }
    if context.run.settings.export.weights != ExportedWeights::default() {
        settings["weights"] = settings_of(&context.run.settings.export.weights)?;
    }
    let plan = StagePlan {
        stage: format!("export {variant}"),
        home: home.clone(),
        outputs: vec![home],
        settings,
        inputs: BTreeMap::from([
            ("trained".to_owned(), trained.content_hash()),
            (
                "tokenizer".to_owned(),
                checkpoint::small_files_hash(&source)?,
            ),
        ]),
    };
    Ok((plan, trained))
}

/// The type of the GGUF file, if one is written.
fn gguf_of(context: &Context) -> Option<GgufTypeName> {
    let settings = &context.run.settings.export;
    (settings.format == ExportFormat::Gguf).then(|| settings.gguf_type.unwrap_or_default())
}

/// Writes the exported folder as a GGUF file in the folder itself.
fn write_gguf(
    context: &Context,
    variant: Variant,
    kind: GgufTypeName,
    folder: &Path,
) -> anyhow::Result<()> {
    let run = context.run.settings.run.name.as_str();
    let kind = gguf_type(kind);
    let teachers = provenance(context)?;
    let labels = GgufLabels {
        name: format!("{run} ({variant})"),
        licence: teachers.into_iter().find_map(|teacher| teacher.licence),
    };
    let file = folder.join(format!("{run}-{}.gguf", kind.name()));
    export_gguf(folder, &file, kind, &labels)?;
    Ok(())
}

fn gguf_type(kind: GgufTypeName) -> GgufType {
    match kind {
        GgufTypeName::F16 => GgufType::F16,
        GgufTypeName::Bf16 => GgufType::Bf16,
        GgufTypeName::Q8_0 => GgufType::Q8_0,
        GgufTypeName::Q4_0 => GgufType::Q4_0,
        GgufTypeName::Q4KM => GgufType::Q4KM,
    }
}

/// Reads the teacher's provenance from the first shard of `completions/`.
pub(crate) fn provenance(context: &Context) -> anyhow::Result<Vec<Provenance>> {
    match shards(&context.dir.verified("completions")?)?.first() {
        Some(shard) => Ok(read_footer(shard)?.provenance),
        None => Ok(Vec::new()),
    }
}

fn card(
    context: &Context,
    variant: Variant,
    trained: &Manifest,
    config: &Config,
    dtype: FloatType,
) -> anyhow::Result<String> {
    let run = &context.run.settings;
    let teachers = provenance(context)?;
    let mut out = String::from("---\nlibrary_name: transformers\n");
    if let Some(licence) = teachers.iter().find_map(|p| p.licence.as_ref()) {
        let _ = writeln!(out, "license: {}", serde_json::to_string(licence)?);
    }
    let base = base_source(context);
    if let Some(base) = base {
        let name = serde_json::to_string(&repository_name(base))?;
        let _ = writeln!(out, "base_model: {name}");
    }
    let _ = write!(
        out,
        "tags:\n- distillation\n- potstill\n---\n\n# {} ({variant})\n\n{}, trained by Potstill {} in run `{}`.\n\n",
        run.run.name.as_str(),
        learned_from(run, variant.into()),
        env!("CARGO_PKG_VERSION"),
        run.run.name.as_str(),
    );
    let _ = write!(
        out,
        "- {} layers, width {}, vocabulary {}, {}\n- {} optimizer steps over {} sequences\n",
        config.num_hidden_layers(),
        config.hidden_size,
        config.vocab_size,
        settings_of(&dtype)?.as_str().unwrap_or_default(),
        trained.counts.get("steps").copied().unwrap_or_default(),
        trained.counts.get("sequences").copied().unwrap_or_default(),
    );
    if let Some(base) = base {
        let (name, commit) = (&base.repository, &base.commit);
        let _ = writeln!(out, "- start of training: {name}, revision {commit}");
    }
    if let (ExportedWeights::Mean, Some(decay)) = (run.export.weights, run.train.ema) {
        let _ = writeln!(
            out,
            "- weights: the running mean of those that were trained, with decay {decay}"
        );
    }
    if run.train.adapter.is_some() {
        out.push_str(&adapter_lines(context)?);
    }
    for teacher in &teachers {
        let _ = writeln!(
            out,
            "- teacher: {}, revision {}, {}, {}; sampled with {}",
            markdown_text(&teacher.teacher),
            markdown_text(&teacher.revision),
            markdown_text(&teacher.engine),
            markdown_text(&teacher.dtype),
            markdown_text(&teacher.sampling)
        );
    }
    let _ = writeln!(out, "- key of the training: {}", trained.key);
    for (what, hash) in &trained.inputs {
        let _ = writeln!(out, "- {what}: sha256 {hash}");
    }
    out.push_str("\nThe run's `report.md` has the figures on test.\n");
    Ok(out)
}

/// The lines of a model card about the adapter and the model under it.
fn adapter_lines(context: &Context) -> anyhow::Result<String> {
    let run = &context.run;
    let folder = checkpoint::student(run)?;
    let hash = match run.settings.student.random {
        Some(_) => checkpoint::small_files_hash(&folder)?,
        None => checkpoint::content_hash(&folder)?,
    };
    let form = match run.settings.export.adapter {
        AdapterExport::Merged => "merged into the weights",
        AdapterExport::Separate => "in PEFT's layout, without the weights under it",
    };
    let base = markdown_text(&checkpoint::name(run, &folder));
    let mut lines =
        format!("- low-rank adapter, {form}\n- model under the adapter: {base}, sha256 {hash}\n");
    let adapter = run.settings.train.adapter.as_ref();
    if let Some(kind) = adapter.and_then(|adapter| adapter.base) {
        let kind = kind.block_type().name();
        let _ = writeln!(
            lines,
            "- its linear layers were in blocks of {kind} during training"
        );
    }
    Ok(lines)
}

/// Describes what a model learned from.
pub(crate) fn learned_from(file: &RunFile, model: RunModel) -> String {
    let text = match file.import.answers {
        AnswerSource::Teacher => "the teacher's text",
        AnswerSource::Given => "the data's text",
    };
    let arm = match model {
        RunModel::Trained(Variant { arm, .. }) => arm,
        RunModel::Unigram if file.has_signals() => {
            return "the mean of the teacher's distributions".to_owned();
        }
        RunModel::Unigram => return "the frequencies of the tokens".to_owned(),
        RunModel::Teacher | RunModel::Base => {
            return "nothing (the student before training)".to_owned();
        }
    };
    match (arm, file.import.answers) {
        (Arm::SameToken, _) => {
            format!("{text} and distributions of other positions with the same token")
        }
        (Arm::Smoothing, _) => format!("{text} by cross-entropy with label smoothing"),
        (Arm::Shuffled, _) => format!("{text} and shuffled distributions"),
        (Arm::Student, AnswerSource::Teacher) if file.has_signals() => {
            "the teacher's text and distributions".to_owned()
        }
        (Arm::Student, AnswerSource::Given) if file.has_signals() => {
            format!("{text} and the teacher's distributions")
        }
        (Arm::Student | Arm::Sft, _) => format!("{text} by cross-entropy only"),
    }
}
