//! What students learn from and are measured on: the signals of a list of answers, or where
//! there are none, their text.

use std::collections::HashMap;

use anyhow::Context as _;
use potstill_datasets::{
    ChatTemplate, Completion, Error as DataError, Prompt, Reasoning, Selected, Signal, Table,
    Tokenizer, encode_answer, read_footer,
};

use super::{Context, checkpoint, collect, curate, score};

/// Signals of a list of selected answers, by position in the list.
pub(crate) struct Rows {
    pub(crate) list: Vec<Selected>,
    source: Source,
    /// Of each shard and provenance, which of `log_z_at` is that of the loss's temperature; empty for
    /// temperature 1.
    normalisers: Vec<Vec<usize>>,
}

enum Source {
    Signals(Table<Signal>),
    Text(Box<Text>),
}

/// Answers as the student's tokenizer and template write them.
struct Text {
    completions: Table<Completion>,
    prompts: HashMap<String, Prompt>,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    reasoning: Option<Reasoning>,
    /// Of each shard and provenance, whether its token ids are of this tokenizer.
    own_ids: Vec<Vec<bool>>,
}

impl Rows {
    pub(crate) fn open(context: &Context, list: &str) -> anyhow::Result<Rows> {
        let dir = &context.dir;
        let source = match context.run.file.has_signals() {
            true => Source::Signals(Table::open(&dir.path("signals"))?),
            false => Source::Text(Box::new(Text::open(context)?)),
        };
        Ok(Rows {
            list: curate::list(&dir.path(list))?,
            source,
            normalisers: Vec::new(),
        })
    }

    /// With the normaliser of the loss's temperature alone.
    pub(crate) fn at_temperature(mut self, context: &Context) -> anyhow::Result<Rows> {
        let temperature = context.run.file.train.objective.temperature;
        if temperature == 1.0 {
            return Ok(self);
        }
        let signals = context.dir.path("signals");
        for shard in potstill_datasets::shards(&signals)? {
            let mut of_shard = Vec::new();
            for provenance in read_footer(&shard)?.provenance {
                let stored = &provenance.temperatures;
                let at = stored.iter().position(|t| *t == temperature as f32);
                of_shard.push(at.with_context(|| {
                    format!(
                        "{} holds no normaliser for temperature {temperature} (it has {stored:?}): collect or score again with it in `temperatures`, or leave `temperature` of [train] loss out",
                        shard.display()
                    )
                })?);
            }
            self.normalisers.push(of_shard);
        }
        Ok(self)
    }

    pub(crate) fn get(&mut self, position: usize) -> Result<Signal, DataError> {
        let selected = &self.list[position];
        let table = match &mut self.source {
            Source::Text(text) => return text.get(selected),
            Source::Signals(table) => table,
        };
        let mut signal = table.get(selected.shard, selected.row)?;
        let normalisers = self.normalisers.get(selected.shard as usize);
        let at = normalisers.and_then(|of| of.get(signal.provenance as usize));
        if let Some(at) = at {
            for row in &mut signal.rows {
                row.log_z_at = row.log_z_at.get(*at).copied().into_iter().collect();
            }
        }
        Ok(signal)
    }
}

impl Text {
    fn open(context: &Context) -> anyhow::Result<Text> {
        let folder = checkpoint::student(&context.run)?;
        let tokenizer = checkpoint::tokenizer(&folder)?;
        let completions = context.dir.path("completions");
        let mut own_ids = Vec::new();
        for shard in potstill_datasets::shards(&completions)? {
            own_ids.push(score::own_ids(&shard, tokenizer.fingerprint())?);
        }
        Ok(Text {
            completions: Table::open(&completions)?,
            prompts: score::prompts(&context.dir.path("prompts"))?,
            template: checkpoint::template(&context.run, &folder)?,
            reasoning: collect::reasoning(&context.run),
            tokenizer,
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
            why: "`prompts/` does not have its prompt: run `import` again".to_owned(),
        })?;
        let own = self
            .own_ids
            .get(*shard as usize)
            .and_then(|own| own.get(completion.provenance as usize));
        let encoded = encode_answer(
            &self.tokenizer,
            &self.template,
            self.reasoning.as_ref(),
            prompt,
            &completion,
            own == Some(&true),
        )?;
        Ok(Signal::of_text(prompt_id.clone(), *sample_index, encoded))
    }
}
