//! Builds requests, by dialect.

use potstill_datasets::{Completion, Message, Prompt, Role};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::http::{Api, Call, CallTask, Dialect, Failure, FailureReason, RequestSettings};

type Fields = Map<String, Value>;

/// A request to be sent by POST.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::http) struct RequestBody {
    /// Path, such as `/chat/completions`.
    pub(in crate::http) path: &'static str,
    /// Whether `path` is relative to the host's root and not to the base URL, as SGLang's `/generate` is.
    pub(in crate::http) from_root: bool,
    /// JSON text.
    pub(in crate::http) json: Vec<u8>,
}

/// Builds the request for a call, or for the rest of an answer of which there is `so_far`.
pub(in crate::http) fn request(
    settings: &RequestSettings,
    call: &Call,
    so_far: Option<&Completion>,
) -> Result<RequestBody, Failure> {
    check(settings, call)?;
    if uses_generate(settings, call) {
        return generate(settings, call, so_far);
    }
    let mut fields = Fields::new();
    fields.insert("model".into(), settings.model.as_str().into());
    let path = match (&call.task, settings.api) {
        (
            CallTask::Score {
                token_ids, top_k, ..
            },
            _,
        ) => {
            score(&mut fields, token_ids, *top_k);
            "/completions"
        }
        (CallTask::AnswerIds(ids), _) => {
            fields.insert("prompt".into(), ids_so_far(ids, so_far)?.into());
            sampling(&mut fields, settings, call);
            completions_logprobs(&mut fields, settings);
            "/completions"
        }
        (CallTask::Answer, Api::Completions) => {
            fields.insert("prompt".into(), text_so_far(&call.prompt, so_far)?.into());
            sampling(&mut fields, settings, call);
            completions_logprobs(&mut fields, settings);
            "/completions"
        }
        (CallTask::Answer, Api::Chat) => {
            chat(&mut fields, settings, call, so_far)?;
            sampling(&mut fields, settings, call);
            chat_logprobs(&mut fields, settings);
            "/chat/completions"
        }
    };
    if is_streamed(settings, call) {
        fields.insert("stream".into(), true.into());
        fields.insert("stream_options".into(), json!({"include_usage": true}));
    }
    body(path, false, fields)
}

/// Whether the request uses SGLang's `/generate`, its only API with token ids and with log-probabilities of a prompt.
pub(super) fn uses_generate(settings: &RequestSettings, call: &Call) -> bool {
    settings.dialect == Dialect::Sglang && !matches!(call.task, CallTask::Answer)
}

/// Whether the response is streamed. Scores are not, and `/generate` would repeat the whole answer with each piece.
pub(super) fn is_streamed(settings: &RequestSettings, call: &Call) -> bool {
    settings.stream
        && !matches!(call.task, CallTask::Score { .. })
        && !uses_generate(settings, call)
}

fn body(path: &'static str, from_root: bool, fields: Fields) -> Result<RequestBody, Failure> {
    let json = serde_json::to_vec(&fields).map_err(|error| cannot(error.to_string()))?;
    Ok(RequestBody {
        path,
        from_root,
        json,
    })
}

fn cannot(why: impl Into<String>) -> Failure {
    Failure::new(FailureReason::BadRequest, why)
}

/// Refuses settings that the dialect has no field for, so that none is silently left out.
fn check(settings: &RequestSettings, call: &Call) -> Result<(), Failure> {
    let dialect = settings.dialect;
    if matches!(call.task, CallTask::Score { .. })
        && !matches!(dialect, Dialect::Vllm | Dialect::Sglang)
    {
        return Err(cannot(
            "servers of this dialect give no reliable log-probabilities of a prompt (score with vLLM, SGLang or a checkpoint)",
        ));
    }
    if matches!(call.task, CallTask::AnswerIds(_)) && dialect == Dialect::LlamaCppPython {
        return Err(cannot(
            "the server of llama-cpp-python does not accept prompts as token ids (use the chat API, or llama-server)",
        ));
    }
    if !settings.template_arguments.is_empty()
        && !dialect.takes_template_arguments()
        && (&call.task, settings.api) == (&CallTask::Answer, Api::Chat)
    {
        return Err(cannot(
            "servers of this dialect take no arguments of the chat template (leave `template_arguments` out, or set the dialect of the server)",
        ));
    }
    let beyond = [
        ("top_k", settings.top_k.is_some()),
        ("min_p", settings.min_p.is_some()),
        (
            "repetition_penalty",
            settings.repetition_penalty.is_some_and(|it| it != 1.0),
        ),
    ];
    let beyond = beyond.iter().find(|(_, is_set)| *is_set);
    if let (Dialect::Openai, Some((name, _))) = (dialect, beyond) {
        return Err(cannot(format!(
            "OpenAI's protocol has no field `{name}` (leave it out, or set the dialect of the server)"
        )));
    }
    if settings.reasoning_model && settings.logprobs.is_some() {
        return Err(cannot(
            "OpenAI's reasoning models give no log-probabilities (collect without signals)",
        ));
    }
    Ok(())
}

fn sampling(fields: &mut Fields, settings: &RequestSettings, call: &Call) {
    let limit = if settings.reasoning_model {
        "max_completion_tokens"
    } else {
        "max_tokens"
    };
    put(fields, limit, settings.max_tokens);
    if !settings.reasoning_model {
        put(fields, "temperature", settings.temperature);
        put(fields, "top_p", settings.top_p);
    }
    put(fields, "top_k", settings.top_k);
    put(fields, "min_p", settings.min_p);
    match settings.dialect {
        Dialect::Openai => {}
        Dialect::Vllm | Dialect::Sglang => {
            put(fields, "repetition_penalty", settings.repetition_penalty);
        }
        // The default of llama-cpp-python is 1.1.
        Dialect::LlamaServer | Dialect::LlamaCppPython => {
            let penalty = settings.repetition_penalty.unwrap_or(1.0);
            put(fields, "repeat_penalty", Some(penalty));
        }
    }
    if !settings.stop.is_empty() {
        fields.insert("stop".into(), settings.stop.clone().into());
    }
    put(fields, "seed", seed(settings, call));
}

fn put<T: Into<Value>>(fields: &mut Fields, name: &str, value: Option<T>) {
    if let Some(value) = value {
        fields.insert(name.into(), value.into());
    }
}

/// Derives the seed of an answer, so that samples of a prompt differ and a second run sends the same seeds. The seed has
/// 31 bits, which every server accepts.
fn seed(settings: &RequestSettings, call: &Call) -> Option<u32> {
    let mut hash = Sha256::new();
    hash.update(settings.seed?.to_le_bytes());
    hash.update(call.sample_index.to_le_bytes());
    hash.update(call.prompt.id.as_bytes());
    let digest = hash.finalize();
    let first = digest
        .iter()
        .take(4)
        .fold(0, |seed, &byte| seed << 8 | u32::from(byte));
    Some(first & 0x7fff_ffff)
}

/// Number of most likely tokens to request. llama.cpp's servers give no log-probabilities for 0.
fn least_top(settings: &RequestSettings) -> Option<u32> {
    let is_llama = matches!(
        settings.dialect,
        Dialect::LlamaServer | Dialect::LlamaCppPython
    );
    settings.logprobs.map(|top| top.max(u32::from(is_llama)))
}

fn chat_logprobs(fields: &mut Fields, settings: &RequestSettings) {
    let Some(top) = least_top(settings) else {
        return;
    };
    fields.insert("logprobs".into(), true.into());
    fields.insert("top_logprobs".into(), top.into());
    token_ids(fields, settings);
}

fn completions_logprobs(fields: &mut Fields, settings: &RequestSettings) {
    let Some(top) = least_top(settings) else {
        return;
    };
    fields.insert("logprobs".into(), top.into());
    token_ids(fields, settings);
}

/// Requests token ids from vLLM: different ids can have the same text, and a part of a character has none.
fn token_ids(fields: &mut Fields, settings: &RequestSettings) {
    if settings.dialect == Dialect::Vllm {
        fields.insert("return_token_ids".into(), true.into());
        fields.insert("return_tokens_as_token_ids".into(), true.into());
    }
}

fn score(fields: &mut Fields, token_ids: &[u32], top_k: u32) {
    fields.insert("prompt".into(), token_ids.to_vec().into());
    fields.insert("max_tokens".into(), 1.into());
    fields.insert("temperature".into(), 1.0.into());
    fields.insert("prompt_logprobs".into(), top_k.into());
    fields.insert("return_token_ids".into(), true.into());
}

fn chat(
    fields: &mut Fields,
    settings: &RequestSettings,
    call: &Call,
    so_far: Option<&Completion>,
) -> Result<(), Failure> {
    let mut messages: Vec<Value> = call.prompt.messages.iter().map(message).collect();
    if let Some(so_far) = so_far {
        messages.push(json!({"role": "assistant", "content": prefill(settings, so_far)?}));
        if matches!(settings.dialect, Dialect::Vllm | Dialect::Sglang) {
            fields.insert("continue_final_message".into(), true.into());
        }
        if settings.dialect == Dialect::Vllm {
            fields.insert("add_generation_prompt".into(), false.into());
        }
    }
    fields.insert("messages".into(), messages.into());
    if !settings.template_arguments.is_empty() {
        let arguments = settings.template_arguments.to_json();
        fields.insert("chat_template_kwargs".into(), arguments);
    }
    if let Some(tools) = &call.prompt.tools {
        let tools: Value = serde_json::from_str(tools).map_err(|error| {
            cannot(format!(
                "{}: the prompt's tools are not JSON: {error}",
                call.prompt.source
            ))
        })?;
        fields.insert("tools".into(), tools);
    }
    Ok(())
}

/// A message in the form of the chat API. Reasoning of earlier turns is left out: DeepSeek refuses it, and templates
/// drop it.
fn message(message: &Message) -> Value {
    let mut fields = Fields::new();
    fields.insert("role".into(), message.role.name().into());
    let only_calls = message.content.is_empty() && !message.tool_calls.is_empty();
    let content = (!only_calls).then_some(message.content.as_str());
    fields.insert("content".into(), content.into());
    if !message.tool_calls.is_empty() {
        let calls = message.tool_calls.iter().map(|call| {
            json!({
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            })
        });
        fields.insert("tool_calls".into(), calls.collect());
    }
    put(&mut fields, "tool_call_id", message.tool_call_id.as_deref());
    Value::Object(fields)
}

/// The answer so far, as the beginning of the assistant's turn.
fn prefill<'a>(settings: &RequestSettings, so_far: &'a Completion) -> Result<&'a str, Failure> {
    if matches!(settings.dialect, Dialect::Openai | Dialect::LlamaCppPython) {
        return Err(cannot(
            "servers of this dialect cannot continue an answer (use keep, drop or retry instead of continue)",
        ));
    }
    if so_far.reasoning.is_some() || !so_far.tool_calls.is_empty() {
        return Err(cannot(
            "the chat API cannot continue reasoning or a tool call, which the server's template writes (use the completions API with a tokenizer, or keep, drop or retry)",
        ));
    }
    Ok(&so_far.answer)
}

fn ids_so_far(ids: &[u32], so_far: Option<&Completion>) -> Result<Vec<u32>, Failure> {
    let mut ids = ids.to_vec();
    let Some(so_far) = so_far else {
        return Ok(ids);
    };
    let sampled: Option<Vec<u32>> = so_far.tokens.iter().map(|token| token.id).collect();
    let sampled = sampled.filter(|sampled| !sampled.is_empty()).ok_or_else(|| {
        cannot("an answer without token ids cannot be continued (request log-probabilities, or use keep, drop or retry instead of continue)")
    })?;
    ids.extend(sampled);
    Ok(ids)
}

/// The text to complete: the prompt of one user's message, and the answer so far. Other prompts have to be rendered.
fn text_so_far(prompt: &Prompt, so_far: Option<&Completion>) -> Result<String, Failure> {
    let [only] = prompt.messages.as_slice() else {
        return Err(cannot(format!(
            "{}: a conversation has to be rendered before it can be completed (set a tokenizer, or use the chat API)",
            prompt.source
        )));
    };
    if only.role != Role::User || prompt.tools.is_some() {
        return Err(cannot(format!(
            "{}: only a user's message without tools can be completed as it is (set a tokenizer, or use the chat API)",
            prompt.source
        )));
    }
    let more = match so_far {
        Some(so_far) if so_far.reasoning.is_some() => {
            return Err(cannot(
                "text cannot be continued within reasoning (use keep, drop or retry instead of continue)",
            ));
        }
        Some(so_far) => so_far.answer.as_str(),
        None => "",
    };
    Ok(format!("{}{more}", only.content))
}

/// A request to SGLang's `/generate`. It has no model name, no seed that every version knows, and no useful streams.
fn generate(
    settings: &RequestSettings,
    call: &Call,
    so_far: Option<&Completion>,
) -> Result<RequestBody, Failure> {
    let mut sampling = Fields::new();
    let mut fields = Fields::new();
    fields.insert("return_logprob".into(), true.into());
    match &call.task {
        CallTask::Score {
            token_ids,
            top_k,
            from,
        } => {
            fields.insert("input_ids".into(), token_ids.clone().into());
            fields.insert("top_logprobs_num".into(), (*top_k).into());
            // The lists begin at this position, without a value for it.
            let start = from.saturating_sub(1);
            fields.insert("logprob_start_len".into(), start.into());
            put(&mut sampling, "max_new_tokens", Some(1));
        }
        CallTask::AnswerIds(ids) => {
            fields.insert("input_ids".into(), ids_so_far(ids, so_far)?.into());
            fields.insert("return_logprob".into(), settings.logprobs.is_some().into());
            put(&mut fields, "top_logprobs_num", settings.logprobs);
            fields.insert("return_text_in_logprobs".into(), true.into());
            put(&mut sampling, "max_new_tokens", settings.max_tokens);
            put(&mut sampling, "temperature", settings.temperature);
            put(&mut sampling, "top_p", settings.top_p);
            put(&mut sampling, "top_k", settings.top_k);
            put(&mut sampling, "min_p", settings.min_p);
            put(
                &mut sampling,
                "repetition_penalty",
                settings.repetition_penalty,
            );
            if !settings.stop.is_empty() {
                sampling.insert("stop".into(), settings.stop.clone().into());
            }
        }
        CallTask::Answer => return Err(cannot("an answer to messages needs the chat API")),
    }
    fields.insert("sampling_params".into(), sampling.into());
    body("/generate", true, fields)
}
