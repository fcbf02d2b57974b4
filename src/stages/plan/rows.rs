//! Sequences like those that a training will have: the run's own rows if they are published, and otherwise rows made of
//! the prompts, with the answers of the data or placeholders for them.

use std::collections::HashMap;

use potstill_datasets::SequenceLength;
use potstill_datasets::{
    AnswerSource, Completion, Encoded, Imported, Prompt, Signal, SignalRow, Split, manifest_path,
};
use potstill_teacher::{SignalSettings, TextEncoder};

use crate::run_file::{Loaded, RunFile};
use crate::stages::rows::SelectedRows;
use crate::stages::{Context, checkpoint};

/// Largest number of sequences whose length is taken; of more sequences, so many are taken at equal distances.
const MOST_LENGTHS: usize = 1000;

/// Sequences of a training.
pub(super) struct PlannedRows {
    /// Number of sequences of the training.
    pub(super) count: usize,
    /// Lengths of the sequences, or of some of them at equal distances.
    pub(super) lengths: Vec<SequenceLength>,
    /// Description for people.
    pub(super) origin: String,
    source: PlannedSource,
}

enum PlannedSource {
    Published(Box<SelectedRows>),
    /// Texts whose distributions are made up.
    Made(Vec<Encoded>, Option<SignalSettings>),
}

impl PlannedRows {
    /// Opens the rows of the run directory if they are published, and makes rows otherwise. `answer_tokens` is the length
    /// of a placeholder for an answer.
    pub(super) fn open(
        context: &Context,
        imported: &Imported,
        answer_tokens: usize,
    ) -> anyhow::Result<PlannedRows> {
        let published = manifest_path(&context.dir.path("train"));
        if published.exists() && context.dir.published("completions")?.is_some() {
            return Self::published(context);
        }
        Self::made(&context.run, imported, answer_tokens)
    }

    pub(super) fn published(context: &Context) -> anyhow::Result<PlannedRows> {
        let mut rows = SelectedRows::open(context, Split::Train)?.at_temperature(context)?;
        let count = rows.list.len();
        let lengths = match rows.lengths()? {
            Some(lengths) => lengths,
            None => {
                let signals = spread(count).map(|at| Ok(SequenceLength::of(&rows.get(at)?)));
                signals.collect::<Result<_, potstill_datasets::Error>>()?
            }
        };
        Ok(PlannedRows {
            count,
            lengths,
            origin: "the rows of the run directory".to_owned(),
            source: PlannedSource::Published(Box::new(rows)),
        })
    }

    /// Makes rows of the prompts of the training split.
    pub(super) fn made(
        run: &Loaded,
        imported: &Imported,
        answer_tokens: usize,
    ) -> anyhow::Result<PlannedRows> {
        let RunFile {
            import,
            curate,
            collect,
            run: head,
            ..
        } = &run.settings;
        let folder = checkpoint::student(run)?;
        let encoder = TextEncoder::new(
            checkpoint::tokenizer(&folder)?,
            checkpoint::student_template(run, &folder)?,
            collect.reasoning.clone(),
        );
        let is_trained_on = |id: &str| curate.split(head.seed, id) == Split::Train;
        let mut texts = Vec::new();
        let (count, origin) = match import.answers {
            AnswerSource::Given => {
                let prompts = imported.prompts.iter();
                let prompts: HashMap<&str, &Prompt> =
                    prompts.map(|prompt| (prompt.id.as_str(), prompt)).collect();
                let answers = imported.answers.iter();
                let answers: Vec<(&Prompt, &Completion)> = answers
                    .filter(|answer| is_trained_on(&answer.prompt_id))
                    .filter_map(|answer| Some((*prompts.get(answer.prompt_id.as_str())?, answer)))
                    .collect();
                for at in spread(answers.len()) {
                    let (prompt, answer) = answers[at];
                    // What cannot be encoded is named by `check`.
                    texts.extend(encoder.answer(prompt, answer, false).ok());
                }
                (answers.len(), "the answers of the data".to_owned())
            }
            AnswerSource::Teacher => {
                let prompts = imported.prompts.iter();
                let prompts: Vec<&Prompt> =
                    prompts.filter(|prompt| is_trained_on(&prompt.id)).collect();
                for at in spread(prompts.len()) {
                    if let Ok(ids) = encoder.prompt_ids(prompts[at]) {
                        texts.push(with_placeholder(&ids, answer_tokens));
                    }
                }
                let origin = format!("the prompts with answers of {answer_tokens} tokens");
                (prompts.len() * collect.samples, origin)
            }
        };
        let lengths = texts.iter().map(|text| SequenceLength {
            tokens: text.token_ids.len(),
            first_loss: text.loss_mask.iter().position(|loss| *loss),
        });
        Ok(PlannedRows {
            count,
            lengths: lengths.collect(),
            origin,
            source: PlannedSource::Made(
                texts,
                run.settings.signals().map(|(settings, _)| settings),
            ),
        })
    }

    /// Reads up to `count` sequences at equal distances.
    pub(super) fn read(&mut self, count: usize, run: &Loaded) -> anyhow::Result<Vec<Signal>> {
        let mut signals = Vec::new();
        match &mut self.source {
            PlannedSource::Published(rows) => {
                let step = (rows.list.len() / count.max(1)).max(1);
                for at in (0..rows.list.len()).step_by(step).take(count) {
                    signals.push(rows.get(at)?);
                }
            }
            PlannedSource::Made(texts, settings) => {
                let vocabulary = checkpoint::tokenizer(&checkpoint::student(run)?)?.vocab_size();
                let temperature = run.settings.train.objective.temperature;
                for (number, text) in texts.iter().cycle().take(count).enumerate() {
                    let id = format!("planned {number}");
                    let mut signal = Signal::of_text(id, 0, text.clone());
                    if let Some(settings) = settings {
                        let spread =
                            |_, row: &mut _| spread_mass(row, settings, temperature, vocabulary);
                        signal.rows.change_rows(spread);
                    }
                    signals.push(signal);
                }
            }
        }
        Ok(signals)
    }
}

/// Up to [`MOST_LENGTHS`] positions at equal distances below `count`.
fn spread(count: usize) -> impl Iterator<Item = usize> {
    let step = count.div_ceil(MOST_LENGTHS).max(1);
    (0..count).step_by(step)
}

/// A prompt with an answer of so many tokens, which are those of the prompt again.
fn with_placeholder(prompt: &[u32], answer_tokens: usize) -> Encoded {
    let answer = prompt.iter().copied().cycle().take(answer_tokens);
    let token_ids: Vec<u32> = prompt.iter().copied().chain(answer).collect();
    Encoded {
        loss_mask: (0..token_ids.len())
            .map(|at| at >= prompt.len().max(1))
            .collect(),
        token_ids,
    }
}

/// Replaces a distribution with all mass on the target token by one of the size that the settings store: the mass falls
/// from token to token, and a hundredth is in the tail.
fn spread_mass(
    row: &mut SignalRow,
    settings: &SignalSettings,
    temperature: f64,
    vocabulary: usize,
) {
    const TAIL: f64 = 0.01;
    let target = row.ids.first().copied().unwrap_or(0);
    let others = (0..vocabulary as u32).filter(|id| *id != target);
    let k = settings.top_k.clamp(1, vocabulary.saturating_sub(1).max(1));
    row.ids = [target].into_iter().chain(others.take(k - 1)).collect();
    let weights: Vec<f64> = (0..k)
        .map(|slot| 1.0 / (slot as f64 + 1.0).powf(1.5))
        .collect();
    let sum: f64 = weights.iter().sum();
    let p = weights.iter().map(|weight| weight / sum * (1.0 - TAIL));
    row.logprobs = p.map(|p| p.ln() as f32).collect();
    row.tail_logprob = TAIL.ln() as f32;
    row.entropy = 1.0;
    if temperature != 1.0 {
        let tempered = row
            .logprobs
            .iter()
            .map(|logprob| (f64::from(*logprob) / temperature).exp());
        let log_z = (tempered.sum::<f64>() / (1.0 - TAIL)).ln();
        row.log_z_at = vec![Some(log_z as f32)];
    }
    if settings.tail_draws > 0 {
        let drawn = (0..vocabulary as u32)
            .rev()
            .find(|id| !row.ids.contains(id));
        row.draw_ids = drawn.into_iter().collect();
        row.draw_counts = drawn.map(|_| settings.tail_draws).into_iter().collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_rows_are_valid_signals() {
        let text = with_placeholder(&[5, 6, 7], 4);
        assert_eq!(text.token_ids, [5, 6, 7, 5, 6, 7, 5]);
        let mut signal = Signal::of_text("p".to_owned(), 0, text);
        assert_eq!(signal.rows.len(), 4);
        for (top_k, temperature) in [(1, 1.0), (4, 1.0), (8, 2.0), (100, 1.0)] {
            let settings = SignalSettings {
                top_k,
                temperatures: Vec::new(),
                tail_draws: 3,
            };
            let mut made = signal.clone();
            made.rows
                .change_rows(|_, row| spread_mass(row, &settings, temperature, 20));
            made.validate().unwrap();
            assert_eq!(made.rows.row(0).ids.len(), top_k.min(19));
        }
        signal.rows.truncate(0);
        assert!(signal.validate().is_err());
    }
}
