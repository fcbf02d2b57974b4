//! Rows that students learn from and are measured on: the signals of a list of answers or, where there are none, the
//! answers' text.

use std::collections::HashMap;

use anyhow::Context as _;
use potstill_datasets::{
    Completion, Error as DataError, Prompt, Selected, SequenceLength, Signal, Split, Table,
    read_footer, shards,
};
use potstill_teacher::TextEncoder;
use serde_json::{Value, json};

use super::{Context, checkpoint, curate, import};
use crate::run_dir::settings_of;
use crate::run_file::Loaded;

/// Signals of a list of selected answers, by position in the list.
pub(crate) struct SelectedRows {
    pub(crate) list: Vec<Selected>,
    source: RowSource,
    /// For each shard and provenance, the index in `log_z_at` of the loss's temperature; empty for temperature 1.
    normalisers: Vec<Vec<usize>>,
}

enum RowSource {
    Signals(Table<Signal>),
    Answers(Box<EncodedAnswers>),
}

/// Answers, encoded with the student's tokenizer and template.
struct EncodedAnswers {
    completions: Table<Completion>,
    prompts: HashMap<String, Prompt>,
    encoder: TextEncoder,
    /// For each shard and provenance, whether its token ids belong to this tokenizer.
    own_ids: Vec<Vec<bool>>,
}

impl SelectedRows {
    pub(crate) fn open(context: &Context, split: Split) -> anyhow::Result<SelectedRows> {
        let dir = &context.dir;
        let source = match context.run.settings.has_signals() {
            true => RowSource::Signals(Table::open(&dir.verified("signals")?)?),
            false => RowSource::Answers(Box::new(EncodedAnswers::open(context)?)),
        };
        Ok(SelectedRows {
            list: curate::list(&dir.verified(split.name())?)?,
            source,
            normalisers: Vec::new(),
        })
    }

    /// Keeps the normaliser of the loss's temperature alone.
    pub(crate) fn at_temperature(mut self, context: &Context) -> anyhow::Result<SelectedRows> {
        let temperature = context.run.settings.train.objective.temperature;
        if temperature == 1.0 {
            return Ok(self);
        }
        let signals = context.dir.verified("signals")?;
        for shard in shards(&signals)? {
            let mut indices = Vec::new();
            for provenance in read_footer(&shard)?.provenance {
                let stored = &provenance.temperatures;
                let at = stored.iter().position(|t| *t == temperature as f32);
                indices.push(at.with_context(|| {
                    format!(
                        "{} holds no normaliser for temperature {temperature} (it has {stored:?})\nhint: collect or score again with it in `temperatures`, or leave `temperature` of [train] loss out",
                        shard.display()
                    )
                })?);
            }
            self.normalisers.push(indices);
        }
        Ok(self)
    }

    /// The lengths of all sequences by position in the list, where they are stored. An answer's text has to be encoded
    /// first.
    pub(crate) fn lengths(&self) -> Result<Option<Vec<SequenceLength>>, DataError> {
        let RowSource::Signals(table) = &self.source else {
            return Ok(None);
        };
        let stored = table.lengths()?;
        // A row that does not exist is an error when it is read.
        let length = |selected: &Selected| {
            let shard = stored.get(selected.shard as usize)?;
            shard.get(selected.row as usize).copied()
        };
        Ok(self.list.iter().map(length).collect())
    }

    pub(crate) fn get(&mut self, position: usize) -> Result<Signal, DataError> {
        let selected = &self.list[position];
        let table = match &mut self.source {
            RowSource::Answers(answers) => return answers.get(selected),
            RowSource::Signals(table) => table,
        };
        let mut signal = table.get(selected.shard, selected.row)?;
        let normalisers = self.normalisers.get(selected.shard as usize);
        let at = normalisers.and_then(|of| of.get(signal.provenance as usize));
        if let Some(at) = at {
            signal.rows.keep_temperature(*at);
        }
        Ok(signal)
    }
}

/// Returns the settings that turn answers into tokens, if students learn from the answers' text; null otherwise, since
/// distributions have the teacher's own tokens.
pub(super) fn text_settings(run: &Loaded) -> anyhow::Result<Value> {
    if run.settings.has_signals() {
        return Ok(Value::Null);
    }
    let folder = checkpoint::student(run)?;
    Ok(json!({
        "template": checkpoint::student_template(run, &folder)?.hash(),
        "reasoning": settings_of(&run.settings.collect.reasoning)?,
    }))
}

impl EncodedAnswers {
    fn open(context: &Context) -> anyhow::Result<EncodedAnswers> {
        let folder = checkpoint::student(&context.run)?;
        let tokenizer = checkpoint::tokenizer(&folder)?;
        let completions = context.dir.verified("completions")?;
        let mut own_ids = Vec::new();
        for shard in shards(&completions)? {
            let provenance = read_footer(&shard)?.provenance.into_iter();
            let own = provenance.map(|p| p.tokenizer == tokenizer.fingerprint());
            own_ids.push(own.collect());
        }
        let template = checkpoint::student_template(&context.run, &folder)?;
        let reasoning = context.run.settings.collect.reasoning.clone();
        Ok(EncodedAnswers {
            completions: Table::open(&completions)?,
            prompts: import::published_by_id(&context.dir.verified("prompts")?)?,
            encoder: TextEncoder::new(tokenizer, template, reasoning),
            own_ids,
        })
    }

    fn get(&mut self, selected: &Selected) -> Result<Signal, DataError> {
        let Selected {
            shard,
            row,
            prompt_id,
            sample_index,
        } = selected;
        let completion = self.completions.get(*shard, *row)?;
        let prompt = self.prompts.get(prompt_id);
        let prompt = prompt.ok_or_else(|| DataError::BadSignal {
            prompt_id: prompt_id.clone(),
            sample_index: *sample_index,
            why: "`prompts/` does not have its prompt\nhint: run `import` again".to_owned(),
        })?;
        let own = self
            .own_ids
            .get(*shard as usize)
            .and_then(|own| own.get(completion.provenance as usize));
        let encoded = self
            .encoder
            .answer(prompt, &completion, own == Some(&true))?;
        Ok(Signal::of_text(prompt_id.clone(), *sample_index, encoded))
    }
}
