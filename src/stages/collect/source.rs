//! The source of a run's answers, and the settings that the answers depend on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use potstill_datasets::{AnswerSource, FolderRows, Published, Tables, stage_key};
use potstill_teacher::{HttpTeacher, Teacher};
use serde_json::{Value, json};

use super::{given, local};
use crate::events::Event;
use crate::run_dir::{Counts, StagePlan, settings_of, short};
use crate::stages::acquire::Acquired;
use crate::stages::{Context, checkpoint, counts, import, probe, served};

/// The source of a run's answers.
pub(super) struct CollectSource {
    kind: SourceKind,
    /// Settings that an answer depends on, besides its prompt and sample index.
    pub(super) answers: Value,
    /// Settings of the published stage.
    settings: Value,
    /// Content hashes of what is read besides `prompts/`.
    inputs: BTreeMap<String, String>,
    pub(super) samples: Samples,
    /// The teacher; a local one once it is needed.
    pub(super) teacher: Option<Teacher>,
}

/// The kind of a source.
enum SourceKind {
    /// A checkpoint in this folder.
    Local(PathBuf),
    Http,
    /// The run's data itself.
    Given,
}

/// Number of answers to each prompt.
pub(super) enum Samples {
    /// This many for every prompt.
    Each(u32),
    /// The number for each prompt in order.
    PerPrompt(Vec<u32>),
}

impl Samples {
    /// Number of answers to a prompt, by its place in `prompts/`.
    pub(super) fn of(&self, prompt: usize) -> u32 {
        match self {
            Samples::Each(samples) => *samples,
            Samples::PerPrompt(samples) => samples.get(prompt).copied().unwrap_or(0),
        }
    }

    /// Number of answers to all prompts.
    pub(super) fn total(&self, prompts: usize) -> usize {
        match self {
            Samples::Each(samples) => prompts * *samples as usize,
            Samples::PerPrompt(samples) => samples.iter().map(|n| *n as usize).sum(),
        }
    }
}

impl CollectSource {
    /// The source that the run file names. No model is loaded and nothing is sent.
    pub(super) fn open(context: &Context) -> anyhow::Result<CollectSource> {
        let run = &context.run;
        if run.settings.import.answers == AnswerSource::Given {
            return CollectSource::given(context);
        }
        let (kind, answers, teacher) = match run.settings.served() {
            Some(_) => {
                let http = served::http_teacher(run)?;
                probe::check(run, &http, &context.dir.path(""))?;
                let answers = served::answer_settings(run, &http)?;
                (
                    SourceKind::Http,
                    answers,
                    Some(Teacher::Http(Box::new(http))),
                )
            }
            None => {
                let folder = checkpoint::teacher(run)?;
                let answers = local::answer_settings(run, &folder)?;
                (SourceKind::Local(folder), answers, None)
            }
        };
        let samples = run.settings.collect.samples;
        let mut settings = json!({ "answers": answers, "samples": samples });
        if let (Some(Teacher::Http(http)), Some(signals)) =
            (&teacher, &run.settings.collect.signals)
        {
            // Distributions are made of the answers' own alternatives and of the text around them.
            let encoder = http.encoder.as_ref();
            let encoder = encoder.context("signals need a tokenizer")?;
            settings["signals"] = json!({
                "top_k": signals.top_k,
                "tokenizer": encoder.tokenizer().fingerprint(),
                "template": encoder.template().hash(),
            });
        }
        Ok(CollectSource {
            kind,
            answers,
            settings,
            inputs: BTreeMap::new(),
            samples: Samples::Each(samples as u32),
            teacher,
        })
    }

    fn given(context: &Context) -> anyhow::Result<CollectSource> {
        let run = &context.run;
        let files = import::source(run)?;
        let path = run.settings.import.path.as_path();
        let provenance = given::provenance(path, import::hash_of(&files)?);
        // The columns say which text is the answer, and the prompts do not depend on that. The name of the file is not
        // part of the settings: a file may be renamed.
        let settings = json!({
            "given": true,
            "columns": settings_of(&run.settings.import.columns)?,
            "reasoning": settings_of(&run.settings.collect.reasoning)?,
        });
        let inputs = BTreeMap::from([("source".to_owned(), provenance.revision.clone())]);
        Ok(CollectSource {
            kind: SourceKind::Given,
            answers: json!({ "settings": settings, "source": provenance.revision }),
            settings,
            inputs,
            samples: Samples::Each(0),
            teacher: Some(given::teacher(provenance)),
        })
    }

    /// The teacher behind a server, where the source is one.
    pub(super) fn http(&self) -> Option<&HttpTeacher> {
        match &self.teacher {
            Some(Teacher::Http(http)) => Some(http),
            _ => None,
        }
    }

    /// Whether the data has the answers.
    pub(super) fn is_given(&self) -> bool {
        matches!(self.kind, SourceKind::Given)
    }

    /// The plan of the published stage.
    pub(super) fn plan(&self, context: &Context, prompts: String) -> StagePlan {
        let mut inputs = self.inputs.clone();
        inputs.insert("prompts".to_owned(), prompts);
        let outputs = self.outputs(context);
        StagePlan {
            stage: "collect".to_owned(),
            home: "completions".to_owned(),
            outputs: outputs.iter().map(|table| (*table).to_owned()).collect(),
            settings: self.settings.clone(),
            inputs,
        }
    }

    fn outputs(&self, context: &Context) -> Vec<&'static str> {
        let mut outputs = Vec::new();
        if context.run.settings.collect.signals.is_some() && !self.is_given() {
            outputs.push("signals");
        }
        if matches!(self.kind, SourceKind::Http) {
            outputs.push("failures");
        }
        outputs.push("completions");
        outputs
    }

    /// The folders of a draft that are written.
    pub(super) fn tables(&self, out: &Path, context: &Context) -> Tables {
        let outputs = self.outputs(context);
        let folder = |table: &str| outputs.contains(&table).then(|| out.join(table));
        let signals = context.run.settings.collect.signals.as_ref();
        Tables {
            completions: folder("completions"),
            signals: folder("signals"),
            tail_draws: signals.is_some_and(|signals| signals.tail_draws > 0),
            failures: folder("failures"),
        }
    }

    /// The name of the store's folder below `.work/`.
    pub(super) fn work_folder(&self) -> String {
        let key = stage_key("answers", &self.answers, &BTreeMap::new());
        format!("collect-{}", short(&key))
    }

    /// Whether answers are stored together with their distributions.
    pub(super) fn has_local_signals(&self) -> bool {
        matches!(self.kind, SourceKind::Local(_)) && !self.answers["signals"].is_null()
    }

    /// Whether published answers of these settings can be used. Where no distributions are wanted, answers that have
    /// some can be used as well.
    pub(super) fn can_use(&self, published: &Value) -> bool {
        let mut published = published.clone();
        if let Some(fields) = published.as_object_mut() {
            for key in ["signals", "logprobs"] {
                if self.answers.get(key).is_some_and(Value::is_null) && fields.contains_key(key) {
                    fields.insert(key.to_owned(), Value::Null);
                }
            }
        }
        published == self.answers
    }

    /// Counts the answers of the data, where the source is the data.
    pub(super) fn count_given(&mut self, context: &Context) -> anyhow::Result<()> {
        if self.is_given() {
            self.samples = Samples::PerPrompt(given::count(context)?);
        }
        Ok(())
    }

    /// Opens a local teacher, after a check that every prompt fits into its context.
    pub(super) fn prepare(&mut self, context: &Context) -> anyhow::Result<()> {
        if let SourceKind::Local(folder) = &self.kind {
            let prompts = FolderRows::open(&context.dir.verified("prompts")?)?;
            let checked = local::check_prompts(&context.run, folder, prompts)?;
            if let Some(text) = checked.bos_problem {
                context.console.emit(&Event::Warning { text });
            }
            self.teacher = Some(local::teacher(context, folder)?);
        }
        Ok(())
    }

    /// Counts of the published stage.
    pub(super) fn counts(&self, published: &Published) -> Counts {
        let answers = ("answers", published.answers);
        let tokens = ("answer tokens", published.tokens);
        match self.kind {
            SourceKind::Given => counts([answers]),
            SourceKind::Local(_) => counts([answers, tokens]),
            SourceKind::Http => counts([
                answers,
                tokens,
                ("cut at the limit", published.truncated),
                ("failures", published.failures),
                ("without distributions", published.without_signal),
            ]),
        }
    }

    /// Counts of this process, for the ledger.
    pub(super) fn worked(
        &self,
        acquired: Acquired,
        before: usize,
        published: &Published,
    ) -> Counts {
        let asked = ("asked", acquired.entries);
        let there = ("there before", before);
        let tokens = ("answer tokens", acquired.tokens);
        match self.kind {
            SourceKind::Given => counts([("answers", published.answers)]),
            SourceKind::Local(_) => counts([asked, there, tokens]),
            SourceKind::Http => counts([asked, there, tokens, ("failures", published.failures)]),
        }
    }
}
