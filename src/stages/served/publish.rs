//! The tables of a collection, in the order of prompts.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use potstill_datasets::{
    Completion, Failed, FinishReason, PROMPTS_PER_SHARD, Prompt, ShardWriter, Signal, shard_name,
};

use super::Served;
use super::collect::Collection;
use super::prompts::Prompts;
use super::store::{Outcome, Row};

/// Prompts whose answers are in memory at a time.
const PROMPTS_AT_A_TIME: usize = 64;
/// The reason of an answer that has no distributions.
pub(crate) const NO_SIGNAL: &str = "no_signal";

/// What was written.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) answers: usize,
    pub(super) failures: usize,
    pub(super) tokens: usize,
    /// Answers that ended at the limit on tokens.
    pub(super) cut: usize,
    /// Answers without distributions, where there should be some.
    pub(super) unsignalled: usize,
    reasons: BTreeMap<String, usize>,
    first_failure: Option<String>,
}

struct Shard {
    completions: ShardWriter<Completion>,
    failures: ShardWriter<Failed>,
    signals: Option<ShardWriter<Signal>>,
}

/// Writes `completions/`, `failures/` and, where distributions are asked for, `signals/`.
///
/// # Errors
/// When nothing at all was answered, or the disk refuses.
pub(super) fn write(
    collection: &mut Collection<'_>,
    served: &Served<'_>,
    top_k: Option<usize>,
    out: &Path,
) -> anyhow::Result<Written> {
    let mut written = Written::default();
    let mut prompts = Prompts::open(&collection.prompts_folder())?;
    let mut first = 0;
    for index in 0.. {
        let name = shard_name(index);
        let mut shard: Option<Shard> = None;
        let mut left = PROMPTS_PER_SHARD;
        while left > 0 {
            let some: Vec<Prompt> = prompts
                .by_ref()
                .take(PROMPTS_AT_A_TIME.min(left))
                .collect::<anyhow::Result<_>>()?;
            if some.is_empty() {
                break;
            }
            if shard.is_none() {
                shard = Some(Shard::begin(out, &name, collection, top_k.is_some())?);
            }
            let Some(shard) = &mut shard else { continue };
            left -= some.len();
            let units = first..first + some.len() * collection.samples;
            first = units.end;
            let rows = collection.store.answers(units)?;
            for (unit, row) in rows.into_iter().enumerate() {
                let prompt = some.get(unit / collection.samples).context("no prompt")?;
                let sample = unit % collection.samples;
                let row =
                    row.with_context(|| format!("no answer {sample} of prompt {}", prompt.id))?;
                shard.push(prompt, row, served, top_k, &mut written)?;
            }
        }
        match shard {
            Some(shard) => shard.finish()?,
            None => break,
        }
    }
    collection.say_failures(&written.reasons);
    if written.answers == 0 {
        let first = written.first_failure.unwrap_or_default();
        bail!(
            "none of {} answers came: {first}; `--retry-failures` asks again",
            written.failures
        );
    }
    Ok(written)
}

impl Shard {
    fn begin(
        out: &Path,
        name: &str,
        collection: &Collection<'_>,
        signals: bool,
    ) -> anyhow::Result<Shard> {
        let provenance = &collection.store.provenance;
        let signals = match signals {
            true => Some(ShardWriter::new(
                &out.join("signals").join(name),
                provenance,
            )?),
            false => None,
        };
        Ok(Shard {
            completions: ShardWriter::new(&out.join("completions").join(name), provenance)?,
            failures: ShardWriter::new(&out.join("failures").join(name), &[])?,
            signals,
        })
    }

    fn push(
        &mut self,
        prompt: &Prompt,
        row: Row<Completion>,
        served: &Served<'_>,
        top_k: Option<usize>,
        written: &mut Written,
    ) -> anyhow::Result<()> {
        let Row {
            prompt_id,
            sample_index,
            outcome,
            ..
        } = row;
        if prompt_id != prompt.id {
            bail!(
                "the journal has the answer to {prompt_id} where that to {} belongs",
                prompt.id
            );
        }
        let completion = match outcome {
            Outcome::Got(completion) => completion,
            Outcome::Failed { reason, message } => {
                let failed = Failed {
                    prompt_id,
                    sample_index,
                    reason,
                    message,
                };
                return self.fail(failed, written);
            }
        };
        written.answers += 1;
        written.tokens += match completion.tokens.len() {
            0 => completion.usage.completion_tokens as usize,
            tokens => tokens,
        };
        written.cut += usize::from(completion.finish_reason == FinishReason::Length);
        if let (Some(signals), Some(top_k)) = (&mut self.signals, top_k) {
            match signal(served, prompt, &completion, top_k) {
                Ok(signal) => signals.push(signal)?,
                Err(why) => {
                    written.unsignalled += 1;
                    *written.reasons.entry(NO_SIGNAL.to_owned()).or_default() += 1;
                    signals.push(empty(&completion))?;
                    self.failures.push(Failed {
                        prompt_id,
                        sample_index,
                        reason: NO_SIGNAL.to_owned(),
                        message: why,
                    })?;
                }
            }
        }
        self.completions.push(completion)?;
        Ok(())
    }

    fn fail(&mut self, failed: Failed, written: &mut Written) -> anyhow::Result<()> {
        written.failures += 1;
        if written.first_failure.is_none() {
            written.first_failure = Some(format!("{}: {}", failed.reason, failed.message));
        }
        *written.reasons.entry(failed.reason.clone()).or_default() += 1;
        self.failures.push(failed)?;
        Ok(())
    }

    fn finish(self) -> anyhow::Result<()> {
        self.completions.finish()?;
        self.failures.finish()?;
        if let Some(signals) = self.signals {
            signals.finish()?;
        }
        Ok(())
    }
}

/// The distributions of an answer, or why there are none.
fn signal(
    served: &Served<'_>,
    prompt: &Prompt,
    completion: &Completion,
    top_k: usize,
) -> Result<Signal, String> {
    let text = served.text.as_ref().ok_or("there is no tokenizer")?;
    let ids = served.prompt_ids(prompt).map_err(|e| format!("{e:#}"))?;
    let ids = ids.ok_or("there is no tokenizer")?;
    let mut signal = text.signal(&ids, completion, top_k)?;
    signal.prompt_id.clone_from(&completion.prompt_id);
    signal.sample_index = completion.sample_index;
    signal.provenance = completion.provenance;
    signal.validate().map_err(|e| e.to_string())?;
    Ok(signal)
}

/// A row without distributions: it keeps the places of those after it, and `curate` leaves it out.
pub(super) fn empty(completion: &Completion) -> Signal {
    Signal {
        prompt_id: completion.prompt_id.clone(),
        sample_index: completion.sample_index,
        token_ids: Vec::new(),
        loss_mask: Vec::new(),
        rows: Vec::new(),
        provenance: completion.provenance,
    }
}
