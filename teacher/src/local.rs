//! A teacher that runs in this process, from a checkpoint in Hugging Face layout.

mod score;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use potstill_datasets::{
    ChatTemplate, Completion, FinishReason, Prompt, Provenance, Reasoning, SampledToken, Tokenizer,
    Usage, canonical_json, encode_answer, hash_file, prompt_ids, split_reasoning,
};
use potstill_model::{
    BatchLimits, DType, Device, GeneratedAnswer, Llama, Sampling, StopConditions, StopReason,
    generate, load, weight_files,
};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::Error;

pub use score::{Scoring, Text};

/// What a local teacher is made of.
#[derive(Debug)]
pub struct LocalSettings {
    /// The checkpoint's folder.
    pub dir: PathBuf,
    /// The type it computes in.
    pub dtype: DType,
    /// The device it runs on.
    pub device: Device,
    /// The template to use instead of the checkpoint's own.
    pub template: Option<ChatTemplate>,
    /// How the teacher marks its reasoning; `None` keeps everything in the answer.
    pub reasoning: Option<Reasoning>,
    /// Under what licence its answers may be used.
    pub licence: Option<String>,
}

/// One answer asked for.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The prompt.
    pub prompt: &'a Prompt,
    /// Which sample of the prompt, from 0.
    pub sample_index: u32,
}

/// A checkpoint that answers and scores.
#[derive(Debug)]
pub struct Local {
    model: Llama,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    /// EOS and the start of the reasoning's end: ids that every support holds.
    control_ids: Vec<u32>,
    reasoning: Option<Reasoning>,
    identity: Identity,
}

/// What provenance says of the checkpoint.
#[derive(Debug)]
struct Identity {
    teacher: String,
    revision: String,
    licence: Option<String>,
}

impl Local {
    /// Loads the checkpoint's model, tokenizer and template, and hashes its weights.
    ///
    /// # Errors
    /// What the model's and the tokenizer's files are refused for; a tokenizer that is larger than the
    /// model's embedding; no template, neither given nor in the checkpoint.
    pub fn open(settings: LocalSettings) -> Result<Self, Error> {
        let model = load(&settings.dir, settings.dtype, &settings.device)?;
        Self::with_model(model, settings)
    }

    /// A model that is in memory, with the tokenizer and template of the folder; its name and
    /// revision are the folder's.
    ///
    /// # Errors
    /// As [`Self::open`], but for the model's own files.
    pub fn with_model(model: Llama, settings: LocalSettings) -> Result<Self, Error> {
        let dir = settings.dir.as_path();
        let tokenizer = Tokenizer::from_dir(dir)?;
        let (tokenizer_size, model_size) = (tokenizer.vocab_size(), model.config().vocab_size);
        if tokenizer_size > model_size {
            return Err(Error::VocabularyTooLarge {
                tokenizer: dir.join("tokenizer.json"),
                tokenizer_size,
                model: dir.join("config.json"),
                model_size,
            });
        }
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
        let name = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        let identity = Identity {
            teacher: name
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            revision: revision(dir)?,
            licence: settings.licence,
        };
        Ok(Self {
            model,
            tokenizer,
            template,
            control_ids,
            reasoning: settings.reasoning,
            identity,
        })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Llama {
        &self.model
    }

    /// The checkpoint's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The template that prompts are rendered with.
    #[must_use]
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Where answers of this teacher come from, for the footer of their file.
    ///
    /// `sampling`, `stop` and `seed` are how they were drawn; `temperatures` are those of the scoring.
    #[must_use]
    pub fn provenance(
        &self,
        sampling: &Sampling,
        stop: &[String],
        seed: u64,
        temperatures: &[f32],
    ) -> Provenance {
        let mut drawn = json!({
            "max_new_tokens": sampling.max_new_tokens,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        });
        // What is off is left out, so that such answers come from where earlier ones came from.
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

    /// Where this teacher's distributions over given answers come from; `sampling` is how those were
    /// drawn, as their own provenance has it.
    #[must_use]
    pub fn provenance_of(&self, sampling: String, temperatures: &[f32]) -> Provenance {
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
            tokenizer: self.tokenizer.fingerprint().to_owned(),
            template: self.template.hash().to_owned(),
            sampling,
            temperatures: temperatures.to_vec(),
            licence: self.identity.licence.clone(),
        }
    }

    /// Token ids of a prompt as the teacher sees it when it has to answer.
    ///
    /// # Errors
    /// A template that refuses the prompt, and text that cannot be encoded, naming the prompt's source.
    pub fn prompt_ids(&self, prompt: &Prompt) -> Result<Vec<u32>, Error> {
        prompt_ids(
            &self.tokenizer,
            &self.template,
            &prompt.messages,
            prompt.tools.as_deref(),
            self.reasoning.as_ref(),
        )
        .map_err(|source| Error::Encode {
            prompt: prompt.source.clone(),
            source,
        })
    }

    /// Answers all of `asks`; their order is the order of the result, and an answer does not depend on
    /// the others. As many run at a time as [`BatchLimits`] has by default.
    ///
    /// An answer ends with the token that completes one of the `stop` texts, if not before, and its text
    /// ends before that text. Each answer's randomness follows from `seed`, its prompt's id and its sample index alone.
    /// `progress` is told after each step how many tokens there are so far; when it breaks, the result is
    /// `None`. The rows' `provenance` is 0.
    ///
    /// # Errors
    /// A prompt that cannot be encoded or that does not fit into the context with its answer, naming its
    /// source; settings out of range.
    pub fn sample(
        &self,
        asks: &[Ask<'_>],
        sampling: &Sampling,
        stop: &[String],
        seed: u64,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<Completion>>, Error> {
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
        let seeds: Vec<u64> = asks.iter().map(|ask| sequence_seed(seed, ask)).collect();
        let strings: Vec<Vec<u8>> = stop.iter().map(|text| text.clone().into_bytes()).collect();
        let stop = StopConditions {
            ids: self.tokenizer.eos_ids(),
            strings: &strings,
            token_bytes: &|id| self.tokenizer.token_bytes(id),
        };
        let limits = BatchLimits::default();
        let answers = generate(
            &self.model,
            &prompts,
            &stop,
            sampling,
            &seeds,
            &limits,
            progress,
        )?;
        let Some(answers) = answers else {
            return Ok(None);
        };
        let rows = asks.iter().zip(&prompts).zip(answers);
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
                bytes: self.tokenizer.token_bytes(id).into(),
                id: Some(id),
                logprob,
                top: Vec::new(),
            })
            .collect();
        // The text is what the tokens spell, but for the EOS. A character cut off at the end is replaced.
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
        let (reasoning, text) = match &self.reasoning {
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

    /// A prompt and its answer, for scoring: loss on the answer and on nothing else.
    ///
    /// `own_ids` says that the answer's token ids, where it has them, are this teacher's; else its
    /// text is encoded.
    ///
    /// # Errors
    /// A prompt or answer that cannot be encoded, naming the prompt's source.
    pub fn text(
        &self,
        prompt: &Prompt,
        completion: &Completion,
        own_ids: bool,
    ) -> Result<Text, Error> {
        let encoded = encode_answer(
            &self.tokenizer,
            &self.template,
            self.reasoning.as_ref(),
            prompt,
            completion,
            own_ids,
        );
        let encoded = encoded.map_err(|source| Error::Encode {
            prompt: prompt.source.clone(),
            source,
        })?;
        Ok(Text {
            prompt_id: completion.prompt_id.clone(),
            sample_index: completion.sample_index,
            encoded,
        })
    }
}

/// SHA-256 over `config.json` and the contents of all weights: the same numbers have the same revision.
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
