//! A teacher behind a server, as the run file has it: what is asked of it, where, and for how much.

pub(crate) mod collect;
mod forecast;
mod pairs;
mod probe;
mod prompts;
pub(crate) mod publish;
mod requests;
pub(crate) mod score;
mod store;

use std::cell::OnceCell;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use potstill_datasets::{
    AnswerSource, ChatTemplate, Completion, Imported, Prompt, Provenance, Signal, Tokenizer,
    canonical_json, prompt_ids,
};
use potstill_teacher::http::{
    self, Api, ApiKey, Caps, ClientSettings, Dialect, Endpoint, Price, Provider, RequestSettings,
    Spellings, Spending,
};
use serde_json::{Value, json};

pub(crate) use self::probe::probe;
use super::{checkpoint, collect as local};
use crate::run_dir::settings_of;
use crate::run_file::{Loaded, RunFile, Teacher};

/// The list of requests, in the run directory.
pub(super) const REQUESTS_FILE: &str = "requests.jsonl";
/// Largest reply, bytes: a long answer with 20 alternatives a token is some tens of megabytes.
const MAX_BODY_BYTES: u64 = 128 << 20;
/// Tokens that a server's template may add to what ours makes of a prompt.
const TEMPLATE_SLACK: u32 = 16;
/// The same where there is no tokenizer: a system prompt of its own, and marks around each message.
const UNKNOWN_TEMPLATE: usize = 64;
const UNKNOWN_MARKS: usize = 16;

/// How text becomes tokens at the server, as far as it is known here.
pub(super) struct Text {
    pub(super) tokenizer: Tokenizer,
    pub(super) template: ChatTemplate,
    /// For servers that give no ids; made when it is first needed.
    spellings: OnceCell<Spellings>,
}

impl Text {
    /// The distributions of an answer, from its own alternatives.
    fn signal(
        &self,
        prompt_ids: &[u32],
        completion: &Completion,
        top_k: usize,
    ) -> Result<Signal, String> {
        let nameless = completion
            .tokens
            .iter()
            .any(|token| token.id.is_none() || token.top.iter().any(|top| top.id.is_none()));
        let spellings = || Spellings::new(&self.tokenizer);
        let spellings = nameless.then(|| self.spellings.get_or_init(spellings));
        let vocabulary = self.tokenizer.vocab_size();
        http::answer_signal_with(vocabulary, spellings, prompt_ids, completion, top_k)
    }
}

/// The teacher of the run file, resolved. No key is read and nothing is asked yet.
pub(super) struct Served<'a> {
    run: &'a Loaded,
    teacher: &'a Teacher,
    provider: Option<Provider>,
    /// The model's name at the server.
    pub(super) model: String,
    dialect: Dialect,
    pub(super) price: Option<Price>,
    /// Longest prompt and answer together, tokens.
    pub(super) context: Option<u32>,
    pub(super) text: Option<Text>,
}

impl<'a> Served<'a> {
    /// Resolves `[teacher]` with the table of providers.
    ///
    /// # Errors
    /// [`crate::run_file::ConfigError`] where a provider is unknown or the server cannot do what the
    /// run file asks for.
    pub(super) fn open(run: &'a Loaded) -> anyhow::Result<Served<'a>> {
        let teacher = checkpoint::teacher_table(run)?;
        let provider = provider(run, teacher)?;
        let of_provider = provider.as_ref();
        let model = teacher.model.clone();
        let model = model.or_else(|| of_provider.map(|p| p.model.clone()));
        let text = match checkpoint::teachers_text(run)? {
            Some(folder) => Some(Text {
                tokenizer: Tokenizer::from_dir(&folder)?,
                template: checkpoint::template(run, &folder)?,
                spellings: OnceCell::new(),
            }),
            None => None,
        };
        let served = Served {
            run,
            teacher,
            model: model.context("[teacher] names no model")?,
            dialect: match teacher.dialect {
                Some(dialect) => dialect.into(),
                None => of_provider.map_or(Dialect::Openai, |p| p.dialect),
            },
            price: match teacher.price {
                Some(price) => Some(price.into()),
                None => of_provider.and_then(|p| p.price),
            },
            context: match teacher.context {
                Some(tokens) => Some(tokens.get() as u32),
                None => of_provider.and_then(|p| p.context),
            },
            provider,
            text,
        };
        served.check()?;
        Ok(served)
    }

    /// What the run file's own rules cannot know.
    fn check(&self) -> anyhow::Result<()> {
        let RunFile {
            collect, budget, ..
        } = &self.run.file;
        let refuse = |key: &[&str], message: String| Err(self.run.problem(key, message).into());
        if budget.usd.is_some() && self.price.is_none() {
            return refuse(
                &["budget", "usd"],
                "the provider's price is not known: add `price = { input = …, output = … }` to [teacher], USD for a million tokens".to_owned(),
            );
        }
        if self.dialect == Dialect::Openai {
            let unknown = [
                ("top_k", collect.top_k.is_some()),
                ("min_p", collect.min_p.get() > 0.0),
                (
                    "repetition_penalty",
                    collect.repetition_penalty.get() != 1.0,
                ),
            ];
            if let Some((key, _)) = unknown.iter().find(|(_, given)| *given) {
                return refuse(
                    &["collect", key],
                    "OpenAI's API does not know it: leave it out, or name the server's `dialect` in [teacher]".to_owned(),
                );
            }
        }
        let most = match (&self.provider, self.dialect) {
            (Some(provider), _) => provider.top_logprobs as usize,
            (None, Dialect::Openai) => 20,
            _ => return Ok(()),
        };
        match &collect.signals {
            Some(signals) if signals.top_k.get() > most => refuse(
                &["collect", "signals"],
                match most {
                    0 => "this provider gives no log-probabilities: leave `signals` out, and learn from the text with `loss = { cross_entropy = 1.0 }`".to_owned(),
                    most => format!("this server gives at most {most} likeliest tokens: set `top_k = {most}`"),
                },
            ),
            _ => Ok(()),
        }
    }

    /// What every request has in common.
    pub(super) fn request_settings(&self) -> RequestSettings {
        let collect = &self.run.file.collect;
        let reasoning_model = self.is_reasoning_model();
        let plain = self.dialect == Dialect::Openai;
        // A server with defaults of its own is told what the run file leaves at ours.
        let told = |value: f64, default: f64| (!plain || value != default).then_some(value);
        RequestSettings {
            model: self.model.clone(),
            dialect: self.dialect,
            api: self.teacher.method.into(),
            reasoning_model,
            max_tokens: Some(collect.max_new_tokens.get() as u32),
            temperature: (!reasoning_model).then_some(collect.temperature.get()),
            top_p: (!reasoning_model)
                .then(|| told(collect.top_p.get(), 1.0))
                .flatten(),
            top_k: match (collect.top_k, self.dialect) {
                (Some(k), _) => Some(k.get() as u32),
                // 0 is all of them: a checkpoint's or a server's own default would sample from fewer.
                (None, Dialect::Vllm | Dialect::LlamaServer | Dialect::LlamaCppPython) => Some(0),
                (None, _) => None,
            },
            min_p: told(collect.min_p.get(), 0.0),
            repetition_penalty: told(collect.repetition_penalty.get(), 1.0),
            stop: collect.stop.clone(),
            seed: Some(u64::from(self.run.file.run.seed)),
            logprobs: collect.signals.as_ref().map(|s| s.top_k.get() as u32),
            stream: collect.stream,
            reasoning: local::reasoning(self.run),
        }
    }

    fn is_reasoning_model(&self) -> bool {
        let of_provider = self.provider.as_ref().is_some_and(|p| p.reasoning_model);
        self.teacher.reasoning_model.unwrap_or(of_provider)
    }

    /// Everything that an answer depends on, besides its prompt and sample index. Where the server is
    /// and how it is reached are not among it: a model may move.
    pub(super) fn answers(&self) -> anyhow::Result<Value> {
        let request = self.request_settings();
        let RunFile { collect, run, .. } = &self.run.file;
        let template = match (request.api, &self.text) {
            (Api::Completions, Some(text)) => Some(text.template.hash()),
            _ => None,
        };
        Ok(json!({
            "served": request.model,
            "dialect": settings_of(&request.dialect)?,
            "method": settings_of(&request.api)?,
            "template": template,
            "licence": self.licence(),
            "seed": run.seed,
            "max_new_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "stop": request.stop,
            "logprobs": request.logprobs,
            "on_length": settings_of(&collect.on_length)?,
            "reasoning": settings_of(&collect.reasoning)?,
        }))
    }

    fn licence(&self) -> Option<String> {
        let terms = self.provider.as_ref().map(|p| p.terms.clone());
        self.teacher.licence.clone().or(terms)
    }

    /// Where its answers come from.
    pub(super) fn provenance(&self) -> anyhow::Result<Provenance> {
        let text = self.text.as_ref();
        Ok(Provenance {
            teacher: self.model.clone(),
            revision: self.teacher.provider.clone().unwrap_or_default(),
            engine: settings_of(&self.dialect)?
                .as_str()
                .map(|dialect| format!("{dialect} over http"))
                .unwrap_or_default(),
            dtype: String::new(),
            tokenizer: text.map_or_else(String::new, |t| t.tokenizer.fingerprint().to_owned()),
            template: text.map_or_else(String::new, |t| t.template.hash().to_owned()),
            sampling: canonical_json(&self.answers()?),
            temperatures: Vec::new(),
            licence: self.licence(),
        })
    }

    /// How it is reached, with the keys.
    ///
    /// # Errors
    /// [`crate::run_file::ConfigError`] where a key is not there.
    pub(super) fn settings(
        &self,
        request: RequestSettings,
        spent: Spending,
    ) -> anyhow::Result<ClientSettings> {
        let RunFile {
            collect,
            budget,
            run,
            ..
        } = &self.run.file;
        let seconds = |s: crate::run_file::ranges::Positive| Duration::from_secs_f64(s.get());
        Ok(ClientSettings {
            request,
            endpoints: self.endpoints()?,
            timeouts: http::Timeouts {
                connect: seconds(collect.timeouts.connect),
                first_byte: seconds(collect.timeouts.first_byte),
                idle: seconds(collect.timeouts.idle),
                whole: seconds(collect.timeouts.whole),
            },
            attempts: collect.attempts.get() as u32,
            first_backoff_seconds: collect.backoff.get(),
            max_backoff_seconds: collect.longest_backoff.get(),
            max_body_bytes: MAX_BODY_BYTES,
            caps: Caps {
                usd: budget.usd.map(|usd| usd.get()),
                tokens: budget.tokens.map(|n| n.get()),
                requests: budget.requests.map(|n| n.get()),
                seconds: budget.hours.map(|hours| hours.get() * 3600.0),
            },
            spent,
            price: self.price,
            on_length: collect.on_length.into(),
            on_break: collect.on_break.into(),
            jitter_seed: u64::from(run.seed) ^ u64::from(std::process::id()),
            offline: self.teacher.offline,
        })
    }

    fn endpoints(&self) -> anyhow::Result<Vec<Endpoint>> {
        let most = self.run.file.collect.concurrency.get() as u32;
        let one = |url: &str, key| Endpoint {
            name: name_of(url),
            url: url.to_owned(),
            key,
            weight: 1.0,
            requests_per_minute: None,
            tokens_per_minute: None,
            max_in_flight: most,
            allow_plain_http: false,
        };
        let teacher = self.teacher;
        if !teacher.endpoints.is_empty() {
            let mut endpoints = Vec::with_capacity(teacher.endpoints.len());
            for endpoint in &teacher.endpoints {
                let key = self.key(
                    &["teacher", "endpoints"],
                    endpoint.key_env.as_deref().or(teacher.key_env.as_deref()),
                    endpoint
                        .key_command
                        .as_deref()
                        .or(teacher.key_command.as_deref()),
                )?;
                endpoints.push(Endpoint {
                    weight: endpoint.weight.get(),
                    requests_per_minute: endpoint.requests_per_minute.map(|n| n.get()),
                    tokens_per_minute: endpoint.tokens_per_minute.map(|n| n.get()),
                    max_in_flight: endpoint.max_in_flight.map_or(most, |n| n.get() as u32),
                    allow_plain_http: endpoint.allow_plain_http,
                    ..one(&endpoint.url, key)
                });
            }
            return Ok(endpoints);
        }
        let (env, command) = (teacher.key_env.as_deref(), teacher.key_command.as_deref());
        if let Some(url) = &teacher.url {
            // A provider's key is for the provider's own address alone.
            return Ok(vec![one(url, self.key(&["teacher"], env, command)?)]);
        }
        let provider = self
            .provider
            .as_ref()
            .context("[teacher] names no server")?;
        let env = match command {
            Some(_) => None,
            None => env.or(provider.key_env.as_deref()),
        };
        let key = self.key(&["teacher", "provider"], env, command)?;
        Ok(vec![one(&provider.url, key)])
    }

    /// A key, from the environment or from what a command prints. Neither is ever repeated.
    fn key(
        &self,
        place: &[&str],
        env: Option<&str>,
        command: Option<&str>,
    ) -> anyhow::Result<Option<ApiKey>> {
        let refuse = |message: String| Err(self.run.problem(place, message).into());
        if let Some(name) = env {
            return match std::env::var(name) {
                Ok(key) if !key.trim().is_empty() => Ok(Some(ApiKey::new(key.trim().to_owned()))),
                _ => refuse(format!(
                    "the environment variable {name} is not set, and the key is in it: `export {name}=…` first"
                )),
            };
        }
        let Some(command) = command else {
            return Ok(None);
        };
        let output = match Command::new("sh").arg("-c").arg(command).output() {
            Ok(output) => output,
            Err(e) => return refuse(format!("`key_command` cannot be run: {e}")),
        };
        let key = String::from_utf8(output.stdout).unwrap_or_default();
        match (output.status.success(), key.trim()) {
            (true, key) if !key.is_empty() => Ok(Some(ApiKey::new(key.to_owned()))),
            (success, _) => refuse(format!(
                "`key_command` {}: try it in a shell; it has to print the key and nothing else",
                match success {
                    true => "printed nothing",
                    false => "failed",
                }
            )),
        }
    }

    /// The prompt as token ids, where the tokenizer is known.
    pub(super) fn prompt_ids(&self, prompt: &Prompt) -> anyhow::Result<Option<Vec<u32>>> {
        let Some(text) = &self.text else {
            return Ok(None);
        };
        let marks = local::reasoning(self.run);
        let ids = prompt_ids(
            &text.tokenizer,
            &text.template,
            &prompt.messages,
            prompt.tools.as_deref(),
            marks.as_ref(),
        );
        let ids = ids.with_context(|| format!("cannot render the prompt of {}", prompt.source))?;
        Ok(Some(ids))
    }

    /// Adds a prompt to what is reckoned with.
    fn measure(&self, measured: &mut forecast::Measured, prompt: &Prompt) -> anyhow::Result<()> {
        measured.add(bytes(prompt), || {
            Ok(self.prompt_ids(prompt)?.map(|ids| ids.len()))
        })
    }

    /// How many tokens the prompt has at most at the server, given its ids here.
    pub(super) fn max_prompt_tokens(&self, prompt: &Prompt, ids: Option<&[u32]>) -> u32 {
        let method = Api::from(self.teacher.method);
        let tokens = match (ids, method) {
            (Some(ids), Api::Completions) => ids.len() as u32,
            (Some(ids), Api::Chat) => ids.len() as u32 + TEMPLATE_SLACK,
            // A token is at least a byte.
            (None, _) => (bytes(prompt) + UNKNOWN_TEMPLATE + UNKNOWN_MARKS * prompt.messages.len())
                .min(u32::MAX as usize) as u32,
        };
        self.context.map_or(tokens, |context| tokens.min(context))
    }
}

/// For `check`: the server as it would be asked, in two or three lines. Nothing is asked.
///
/// # Errors
/// [`crate::run_file::ConfigError`] where it cannot be used, or its key is not there.
pub(super) fn check(run: &Loaded, imported: &Imported) -> anyhow::Result<String> {
    let served = Served::open(run)?;
    let endpoints = served.endpoints()?;
    let endpoints: Vec<&str> = endpoints.iter().map(|e| e.name.as_str()).collect();
    let endpoints = endpoints.join(", ");
    let mut lines = vec![format!("teacher   {} at {endpoints}", served.model)];
    let mut measured = forecast::Measured::default();
    for prompt in &imported.prompts {
        served.measure(&mut measured, prompt)?;
    }
    let RunFile {
        collect, import, ..
    } = &run.file;
    let answers = imported.prompts.len() * collect.samples.get();
    let spent = Spending::default();
    if import.answers == AnswerSource::Teacher {
        let ahead = forecast::of_answers(&served, &measured, answers, &spent);
        lines.push(format!("collect   {ahead}"));
    }
    if let Some(settings) = &run.file.score {
        let (tokens, answers) = match import.answers {
            // As long as they may be.
            AnswerSource::Teacher => {
                let longest = (collect.max_new_tokens.get() * answers) as u64;
                (measured.tokens_of(answers) + longest, answers)
            }
            AnswerSource::Given => score::check(&served, settings, imported)?,
        };
        let ahead = forecast::of_scores(&served, tokens, answers, &spent);
        lines.push(format!("score     {ahead}"));
    }
    Ok(lines.join("\n"))
}

/// Bytes of everything in a prompt that a template writes.
pub(super) fn bytes(prompt: &Prompt) -> usize {
    let messages = prompt.messages.iter().map(|m| {
        let calls = m.tool_calls.iter();
        let calls = calls.map(|c| c.name.len() + c.arguments.len() + UNKNOWN_MARKS);
        m.content.len() + m.reasoning.as_ref().map_or(0, String::len) + calls.sum::<usize>()
    });
    messages.sum::<usize>() + prompt.tools.as_ref().map_or(0, String::len)
}

/// An address without its scheme, which is how an endpoint is called in lists.
fn name_of(url: &str) -> String {
    let name = url.split_once("://").map_or(url, |(_, rest)| rest);
    name.trim_end_matches('/').to_owned()
}

fn provider(run: &Loaded, teacher: &Teacher) -> anyhow::Result<Option<Provider>> {
    let Some(name) = &teacher.provider else {
        return Ok(None);
    };
    let mut providers = http::known_providers()?;
    if let Some(path) = &teacher.providers {
        let path = path.as_path();
        let text = read(run, path)?;
        providers = http::merge_providers(providers, &text, path)?;
    }
    if let Some(provider) = providers.remove(name) {
        return Ok(Some(provider));
    }
    let known: Vec<String> = providers.into_keys().collect();
    let message = format!(
        "there is no provider {name:?}: known are {}; add your own in a file that `providers` names",
        known.join(", ")
    );
    Err(run.problem(&["teacher", "provider"], message).into())
}

fn read(run: &Loaded, path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).map_err(|e| {
        let message = format!("cannot read {}: {e}", path.display());
        run.problem(&["teacher", "providers"], message).into()
    })
}
