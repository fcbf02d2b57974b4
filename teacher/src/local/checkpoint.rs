//! A checkpoint with its tokenizer and template, and the answers that it samples.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use potstill_datasets::{
    ChatTemplate, Completion, FinishReason, Prompt, Provenance, Reasoning, SampledToken, Tokenizer,
    Usage, canonical_json, hash_file, split_reasoning,
};
use potstill_model::{
    BatchLimits, DType, Decoder, Device, GeneratedAnswer, Sampling, StopConditions, StopReason,
    generate, load, weight_files,
};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::text::ScoringText;
use crate::Error;
use crate::encoder::TextEncoder;

/// Files and settings of a local teacher.
#[derive(Debug)]
pub struct LocalSettings {
    /// The checkpoint's folder.
    pub dir: PathBuf,
    /// Floating-point type of the computation.
    pub dtype: DType,
    /// Device that computes.
    pub device: Device,
    /// The template to use instead of the checkpoint's own.
    pub template: Option<ChatTemplate>,
    /// Marks of the teacher's reasoning; `None` keeps everything in the answer.
    pub reasoning: Option<Reasoning>,
    /// Licence under which the answers may be used.
    pub licence: Option<String>,
    /// Name and revision of the checkpoint if they are not those of its folder.
    pub origin: Option<Origin>,
}

/// Origin of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Name of the model, such as `org/name`.
    pub name: String,
    /// Revision of the model, such as a commit.
    pub revision: String,
}

/// An answer to sample.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The prompt.
    pub prompt: &'a Prompt,
    /// Index of the sample among those of its prompt, from 0.
    pub sample_index: u32,
}

/// A checkpoint that answers and scores.
#[derive(Debug)]
pub struct Local {
    pub(super) model: Decoder,
    encoder: TextEncoder,
    /// Ids that every support holds: EOS, and the first token of the mark that closes the reasoning.
    pub(super) control_ids: Vec<u32>,
    identity: Identity,
}

/// Provenance of the checkpoint.
#[derive(Debug)]
struct Identity {
    teacher: String,
    revision: String,
    licence: Option<String>,
}

impl Local {
    /// Loads the checkpoint's model, tokenizer and template, and hashes its weights if no origin is given.
    ///
    /// # Errors
    /// Those of the model's and the tokenizer's files; a tokenizer that is larger than the model's embedding; no
    /// template, neither given nor in the checkpoint.
    pub fn open(settings: LocalSettings) -> Result<Self, Error> {
        let model = load(&settings.dir, settings.dtype, &settings.device)?;
        Self::with_model(model, settings)
    }

    /// Combines a model in memory with the tokenizer and template of the folder. Name and revision are the
    /// folder's if no origin is given.
    ///
    /// # Errors
    /// As [`Self::open`], except for the model's own files.
    pub fn with_model(model: Decoder, settings: LocalSettings) -> Result<Self, Error> {
        let dir = settings.dir.as_path();
        let tokenizer = Tokenizer::from_dir(dir)?;
        let (tokenizer_size, model_size) = (tokenizer.vocab_size(), model.config().vocab_size);
        let tokenizer =
            tokenizer
                .with_rows(model_size)
                .map_err(|token| Error::VocabularyTooLarge {
                    tokenizer: dir.join("tokenizer.json"),
                    tokenizer_size,
                    token,
                    model: dir.join("config.json"),
                    model_size,
                })?;
        let template = match settings.template {
            Some(template) => template,
            None => ChatTemplate::from_dir(dir)?.ok_or_else(|| Error::NoTemplate {
                dir: dir.to_path_buf(),
            })?,
        };
        let mut control_ids = tokenizer.eos_ids().to_vec();
        if let Some(reasoning) = &settings.reasoning {
            control_ids.extend(tokenizer.encode(&reasoning.close, false)?.first());
        }
        let origin = match settings.origin {
            Some(origin) => origin,
            None => folder_origin(dir)?,
        };
        let identity = Identity {
            teacher: origin.name,
            revision: origin.revision,
            licence: settings.licence,
        };
        Ok(Self {
            model: model.with_token_count(tokenizer.vocab_size()),
            encoder: TextEncoder::new(tokenizer, template, settings.reasoning),
            control_ids,
            identity,
        })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// The checkpoint's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        self.encoder.tokenizer()
    }

    /// The template that prompts are rendered with.
    #[must_use]
    pub fn template(&self) -> &ChatTemplate {
        self.encoder.template()
    }

    /// Provenance of answers that were sampled with these settings, for the footers of their shards.
    ///
    /// `temperatures` are those of the distributions over the answers. Sampling settings that are off are left out.
    #[must_use]
    pub fn provenance(
        &self,
        sampling: &Sampling,
        stop: &[String],
        seed: u64,
        temperatures: &[f64],
    ) -> Provenance {
        let mut drawn = json!({
            "max_new_tokens": sampling.max_new_tokens,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        });
        if let Some(top_k) = sampling.top_k {
            drawn["top_k"] = json!(top_k);
        }
        if sampling.min_p > 0.0 {
            drawn["min_p"] = json!(sampling.min_p);
        }
        if sampling.repetition_penalty != 1.0 {
            drawn["repetition_penalty"] = json!(sampling.repetition_penalty);
        }
        if !stop.is_empty() {
            drawn["stop"] = json!(stop);
        }
        self.provenance_of(canonical_json(&drawn), temperatures)
    }

    /// Provenance of this teacher's distributions over given answers. `sampling` is taken from the answers' own
    /// provenance.
    #[must_use]
    pub fn provenance_of(&self, sampling: String, temperatures: &[f64]) -> Provenance {
        Provenance {
            teacher: self.identity.teacher.clone(),
            revision: self.identity.revision.clone(),
            engine: concat!("potstill ", env!("CARGO_PKG_VERSION")).to_owned(),
            dtype: match self.model.dtype() {
                DType::F64 => "f64".to_owned(),
                DType::F32 => "f32".to_owned(),
                DType::F16 => "f16".to_owned(),
                DType::BF16 => "bf16".to_owned(),
                other => format!("{other:?}"),
            },
            tokenizer: self.tokenizer().fingerprint().to_owned(),
            template: self.template().hash(),
            sampling,
            temperatures: temperatures.iter().map(|t| *t as f32).collect(),
            licence: self.identity.licence.clone(),
        }
    }

    /// Token ids of a prompt as the teacher sees it when it has to answer.
    ///
    /// # Errors
    /// A template that refuses the prompt, or text that cannot be encoded, with the prompt's source.
    pub fn prompt_ids(&self, prompt: &Prompt) -> Result<Arc<[u32]>, Error> {
        let ids = self.encoder.prompt_ids(prompt);
        ids.map_err(|source| encode_error(prompt, source))
    }

    /// Samples an answer for each of `asks`, in their order. An answer does not depend on the others. As many sequences
    /// run at a time as [`BatchLimits`] allows by default.
    ///
    /// An answer ends with the token that completes one of the `stop` texts, if it does not end before, and its text
    /// ends before that text. The randomness of each answer is a function of `seed`, its prompt's id and its sample
    /// index alone. `progress` is called after each step with the number of tokens so far; if it breaks, the result is
    /// `None`. The `provenance` of all rows is 0.
    ///
    /// # Errors
    /// A prompt that cannot be encoded, or that does not fit into the context with its answer, with its source;
    /// settings out of range.
    pub fn sample(
        &self,
        asks: &[Ask<'_>],
        sampling: &Sampling,
        stop: &[String],
        seed: u64,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<Completion>>, Error> {
        let prompts = self.fitting_prompts(asks, sampling)?;
        self.sample_encoded(asks, &prompts, sampling, stop, seed, progress)
    }

    /// Token ids of the prompts, each of which fits into the context with its answer.
    pub(super) fn fitting_prompts(
        &self,
        asks: &[Ask<'_>],
        sampling: &Sampling,
    ) -> Result<Vec<Arc<[u32]>>, Error> {
        let limit = self.model.config().max_position_embeddings;
        let mut prompts = Vec::with_capacity(asks.len());
        for ask in asks {
            let ids = self.prompt_ids(ask.prompt)?;
            if ids.len().saturating_add(sampling.max_new_tokens) > limit {
                return Err(Error::PromptTooLong {
                    prompt: ask.prompt.source.clone(),
                    tokens: ids.len(),
                    max_new_tokens: sampling.max_new_tokens,
                    limit,
                });
            }
            prompts.push(ids);
        }
        Ok(prompts)
    }

    /// [`Local::sample`] for prompts that are encoded already.
    pub(super) fn sample_encoded(
        &self,
        asks: &[Ask<'_>],
        prompts: &[Arc<[u32]>],
        sampling: &Sampling,
        stop: &[String],
        seed: u64,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<Completion>>, Error> {
        let seeds: Vec<u64> = asks.iter().map(|ask| sequence_seed(seed, ask)).collect();
        let strings: Vec<Vec<u8>> = stop.iter().map(|text| text.clone().into_bytes()).collect();
        let tokenizer = self.tokenizer();
        let stop = StopConditions {
            ids: tokenizer.eos_ids(),
            strings: &strings,
            token_bytes: &|id| tokenizer.token_bytes(id),
        };
        let limits = BatchLimits::default();
        let ids: Vec<Vec<u32>> = prompts.iter().map(|ids| ids.to_vec()).collect();
        let answers = generate(
            &self.model,
            &ids,
            &stop,
            sampling,
            &seeds,
            &limits,
            progress,
        )?;
        let Some(answers) = answers else {
            return Ok(None);
        };
        let rows = asks.iter().zip(prompts).zip(answers);
        Ok(Some(
            rows.map(|((ask, ids), answer)| self.completion(ask, ids.len(), &answer, &strings))
                .collect(),
        ))
    }

    fn completion(
        &self,
        ask: &Ask<'_>,
        prompt_tokens: usize,
        answer: &GeneratedAnswer,
        stop: &[Vec<u8>],
    ) -> Completion {
        let tokens: Vec<SampledToken> = answer
            .ids
            .iter()
            .zip(&answer.logprobs)
            .map(|(&id, &logprob)| SampledToken {
                bytes: self.tokenizer().token_bytes(id).into(),
                id: Some(id),
                logprob,
                top: Vec::new(),
            })
            .collect();
        // The text is what the tokens spell, without the EOS. A character that is cut off at the end is replaced.
        let spelled = tokens.len() - usize::from(answer.stop_reason == StopReason::StopToken);
        let mut bytes: Vec<u8> = tokens
            .iter()
            .take(spelled)
            .flat_map(|token| token.bytes.iter().copied())
            .collect();
        if answer.stop_reason == StopReason::StopString {
            let start = |stop: &Vec<u8>| bytes.windows(stop.len()).position(|part| part == stop);
            if let Some(end) = stop.iter().filter_map(start).min() {
                bytes.truncate(end);
            }
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let (reasoning, text) = match self.encoder.reasoning() {
            Some(marks) => split_reasoning(&text, marks),
            None => (None, text),
        };
        Completion {
            prompt_id: ask.prompt.id.clone(),
            sample_index: ask.sample_index,
            reasoning,
            answer: text,
            tool_calls: Vec::new(),
            finish_reason: match answer.stop_reason {
                StopReason::StopToken | StopReason::StopString => FinishReason::Stop,
                StopReason::Length => FinishReason::Length,
            },
            usage: Usage {
                prompt_tokens: prompt_tokens as u32,
                completion_tokens: answer.ids.len() as u32,
            },
            tokens,
            provenance: 0,
        }
    }

    /// Encodes a prompt and its answer for scoring, with loss on the answer alone. `own_ids` says that the answer's
    /// token ids, where it has them, belong to this teacher's tokenizer; otherwise its text is encoded.
    ///
    /// # Errors
    /// A prompt or answer that cannot be encoded, with the prompt's source.
    pub fn text(
        &self,
        prompt: &Prompt,
        completion: &Completion,
        own_ids: bool,
    ) -> Result<ScoringText, Error> {
        let encoded = self.encoder.answer(prompt, completion, own_ids);
        Ok(ScoringText {
            prompt_id: completion.prompt_id.clone(),
            sample_index: completion.sample_index,
            encoded: encoded.map_err(|source| encode_error(prompt, source))?,
        })
    }
}

fn encode_error(prompt: &Prompt, source: potstill_datasets::Error) -> Error {
    Error::Encode {
        prompt: prompt.source.clone(),
        source,
    }
}

/// SHA-256 over `config.json` and the contents of all weight files: equal numbers have equal revisions.
/// Name of a folder, and the hash of the checkpoint in it.
fn folder_origin(dir: &Path) -> Result<Origin, Error> {
    let folder = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    let name = folder.file_name();
    Ok(Origin {
        name: name.map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        revision: revision(dir)?,
    })
}

fn revision(dir: &Path) -> Result<String, Error> {
    let mut hasher = Sha256::new();
    let config = dir.join("config.json");
    for file in std::iter::once(config).chain(weight_files(dir)?) {
        hasher.update(hash_file(&file)?.sha256.as_bytes());
        hasher.update(b"\n");
    }
    let digest = hasher.finalize();
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The seed of one answer.
fn sequence_seed(seed: u64, ask: &Ask<'_>) -> u64 {
    let mut hasher = Sha256::new();
    hasher.update(seed.to_le_bytes());
    hasher.update(ask.sample_index.to_le_bytes());
    hasher.update(ask.prompt.id.as_bytes());
    let digest = hasher.finalize();
    digest
        .iter()
        .take(8)
        .fold(0, |seed, byte| seed << 8 | u64::from(*byte))
}
