//! A teacher behind a server: from the run file's tables to a client.

use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use potstill_datasets::{
    AnswerSource, Imported, PromptedAnswer, Provenance, Tokenizer, canonical_json,
};
use potstill_teacher::http::{
    self, Api, ApiKey, ClientSettings, Dialect, Endpoint, Provider, RequestSettings, Spending,
    TokenEstimate,
};
use potstill_teacher::{HttpTeacher, ScoreSettings, TeacherSettings, TextEncoder};
use serde_json::{Value, json};

use super::{checkpoint, forecast};
use crate::run_dir::settings_of;
use crate::run_file::{Loaded, RunFile};

/// Largest body of a response, bytes. A long answer with 20 alternatives a token has some tens of megabytes.
const MAX_BODY_BYTES: u64 = 128 << 20;

/// The teacher of the run file, with the settings that its provider adds.
struct ServedTeacher<'a> {
    run: &'a Loaded,
    table: &'a TeacherSettings,
    provider: Option<Provider>,
    dialect: Dialect,
}

/// The client for the teacher of the run file. It has no endpoints yet, so that no key is needed; see [`endpoints`].
///
/// # Errors
/// [`crate::run_file::ConfigError`] where a provider is unknown or the server cannot do what the run file asks for.
pub(super) fn http_teacher(run: &Loaded) -> anyhow::Result<HttpTeacher> {
    let served = ServedTeacher::resolve(run)?;
    let client = served.client()?;
    served.check(&client)?;
    let encoder = match checkpoint::teacher_tokenizer_folder(run)? {
        Some(folder) => Some(TextEncoder::new(
            Tokenizer::from_dir(&folder)?,
            checkpoint::template(run, &folder)?,
            run.settings.collect.reasoning.clone(),
        )),
        None => None,
    };
    let of_provider = served.provider.as_ref().and_then(|p| p.context);
    let context = served.table.context;
    let provenance = Provenance {
        teacher: client.request.model.clone(),
        revision: served.table.provider.clone().unwrap_or_default(),
        engine: settings_of(&served.dialect)?
            .as_str()
            .map(|dialect| format!("{dialect} over http"))
            .unwrap_or_default(),
        dtype: String::new(),
        tokenizer: encoder
            .as_ref()
            .map_or_else(String::new, |e| e.tokenizer().fingerprint().to_owned()),
        template: encoder
            .as_ref()
            .map_or_else(String::new, |e| e.template().hash()),
        sampling: String::new(),
        temperatures: Vec::new(),
        licence: served.licence(),
    };
    let mut http = HttpTeacher::new(client, encoder, context.or(of_provider), provenance);
    http.provenance.sampling = canonical_json(&answer_settings(run, &http)?);
    Ok(http)
}

/// Settings that an answer depends on, besides its prompt and sample index. The address of the server is not part of
/// it: a model may move.
pub(super) fn answer_settings(run: &Loaded, http: &HttpTeacher) -> anyhow::Result<Value> {
    let request = &http.client.request;
    let collect = &run.settings.collect;
    let template = match (request.api, &http.encoder) {
        (Api::Completions, Some(encoder)) => Some(encoder.template().hash()),
        _ => None,
    };
    let arguments = match request.api {
        Api::Chat => Some(request.template_arguments.to_json()),
        Api::Completions => None,
    };
    Ok(json!({
        "served": request.model,
        "dialect": settings_of(&request.dialect)?,
        "method": settings_of(&request.api)?,
        "template": template,
        "template_arguments": arguments,
        "licence": http.provenance.licence,
        "seed": run.settings.run.seed,
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

/// The servers of the run file, with their keys.
///
/// # Errors
/// [`crate::run_file::ConfigError`] if a key is not there.
pub(super) fn endpoints(run: &Loaded) -> anyhow::Result<Vec<Endpoint>> {
    ServedTeacher::resolve(run)?.endpoints()
}

impl<'a> ServedTeacher<'a> {
    /// Looks up the provider of `[teacher]`.
    fn resolve(run: &'a Loaded) -> anyhow::Result<ServedTeacher<'a>> {
        let table = checkpoint::teacher_table(run)?;
        let provider = provider(run, table)?;
        let of_provider = provider.as_ref().map(|p| p.dialect);
        Ok(ServedTeacher {
            run,
            table,
            dialect: table.dialect.or(of_provider).unwrap_or_default(),
            provider,
        })
    }

    /// Checks the rules that need the provider.
    fn check(&self, client: &ClientSettings) -> anyhow::Result<()> {
        let RunFile {
            collect, budget, ..
        } = &self.run.settings;
        let refuse = |key: &[&str], message: String| Err(self.run.problem(key, message).into());
        if budget.usd.is_some() && client.price.is_none() {
            return refuse(
                &["budget", "usd"],
                "the provider's price is not known\nhint: add `price = { input = …, output = … }` to [teacher], USD for a million tokens".to_owned(),
            );
        }
        if self.dialect == Dialect::Openai {
            let unknown = [
                ("top_k", collect.top_k.is_some()),
                ("min_p", collect.min_p > 0.0),
                ("repetition_penalty", collect.repetition_penalty != 1.0),
            ];
            if let Some((key, _)) = unknown.iter().find(|(_, given)| *given) {
                return refuse(
                    &["collect", key],
                    "OpenAI's API does not know it\nhint: leave it out, or name the server's `dialect` in [teacher]".to_owned(),
                );
            }
        }
        let sent = self.table.method == Api::Chat && !self.table.template_arguments.is_empty();
        if sent && !self.dialect.takes_template_arguments() {
            return refuse(
                &["teacher", "template_arguments"],
                "servers of this dialect take no arguments of the chat template\nhint: name the server's `dialect` (vllm, sglang and llama-server take them), or use `method = \"completions\"` with a `tokenizer`".to_owned(),
            );
        }
        let largest_k = match (&self.provider, self.dialect) {
            (Some(provider), _) => provider.top_logprobs as usize,
            (None, Dialect::Openai) => 20,
            _ => return Ok(()),
        };
        match &collect.signals {
            Some(signals) if signals.top_k > largest_k => refuse(
                &["collect", "signals"],
                match largest_k {
                    0 => "this provider gives no log-probabilities\nhint: leave `signals` out, and learn from the text with `loss = { cross_entropy = 1.0 }`".to_owned(),
                    k => format!("this server gives at most {k} most likely tokens\nhint: set `top_k = {k}`"),
                },
            ),
            _ => Ok(()),
        }
    }

    /// Settings that all requests for answers share.
    fn request_settings(&self) -> anyhow::Result<RequestSettings> {
        let collect = &self.run.settings.collect;
        let reasoning_model = self.is_reasoning_model();
        let plain = self.dialect == Dialect::Openai;
        // OpenAI's API has the same defaults as the run file, and refuses settings that it does not know. Other servers
        // have defaults of their own, so they are sent every value.
        let sent = |value: f64, default: f64| (!plain || value != default).then_some(value);
        let of_provider = self.provider.as_ref().map(|p| p.model.clone());
        let model = self.table.model.clone().or(of_provider);
        Ok(RequestSettings {
            model: model.context("[teacher] names no model")?,
            dialect: self.dialect,
            api: self.table.method,
            reasoning_model,
            max_tokens: Some(collect.max_new_tokens as u32),
            temperature: (!reasoning_model).then_some(collect.temperature),
            top_p: (!reasoning_model)
                .then(|| sent(collect.top_p, 1.0))
                .flatten(),
            top_k: match (collect.top_k, self.dialect) {
                (Some(k), _) => Some(k as u32),
                // 0 stands for all tokens: the default of a checkpoint or a server would sample from fewer.
                (None, Dialect::Vllm | Dialect::LlamaServer | Dialect::LlamaCppPython) => Some(0),
                (None, _) => None,
            },
            min_p: sent(collect.min_p, 0.0),
            repetition_penalty: sent(collect.repetition_penalty, 1.0),
            stop: collect.stop.clone(),
            seed: Some(u64::from(self.run.settings.run.seed)),
            logprobs: collect.signals.as_ref().map(|s| s.top_k as u32),
            stream: collect.stream,
            reasoning: self.run.settings.collect.reasoning.clone(),
            template_arguments: self.table.template_arguments.clone(),
        })
    }

    fn is_reasoning_model(&self) -> bool {
        let of_provider = self.provider.as_ref().is_some_and(|p| p.reasoning_model);
        self.table.reasoning_model.unwrap_or(of_provider)
    }

    fn licence(&self) -> Option<String> {
        let terms = self.provider.as_ref().map(|p| p.terms.clone());
        self.table.licence.clone().or(terms)
    }

    /// Settings of the client, without endpoints.
    fn client(&self) -> anyhow::Result<ClientSettings> {
        let RunFile {
            collect,
            budget,
            run,
            ..
        } = &self.run.settings;
        Ok(ClientSettings {
            request: self.request_settings()?,
            endpoints: Vec::new(),
            timeouts: collect.timeouts,
            attempts: collect.attempts,
            first_backoff_seconds: collect.backoff,
            max_backoff_seconds: collect.longest_backoff,
            max_body_bytes: MAX_BODY_BYTES,
            caps: *budget,
            spent: Spending::default(),
            price: (self.table.price).or_else(|| self.provider.as_ref()?.price),
            on_length: collect.on_length,
            on_break: collect.on_break,
            jitter_seed: u64::from(run.seed) ^ u64::from(std::process::id()),
            offline: self.table.offline,
        })
    }

    /// The servers to ask, with their keys and concurrency limits.
    fn endpoints(&self) -> anyhow::Result<Vec<Endpoint>> {
        let concurrency = self.run.settings.collect.concurrency;
        let resolved = |endpoint: &Endpoint, place: &[&str], env, command| {
            let mut endpoint = endpoint.clone();
            endpoint.key = self.key(place, env, command)?;
            endpoint.max_in_flight.get_or_insert(concurrency);
            Ok(endpoint)
        };
        let teacher = self.table;
        let (env, command) = (teacher.key_env.as_deref(), teacher.key_command.as_deref());
        if !teacher.endpoints.is_empty() {
            let endpoints = teacher.endpoints.iter().map(|endpoint| {
                let env = endpoint.key_env.as_deref().or(env);
                let command = endpoint.key_command.as_deref().or(command);
                resolved(endpoint, &["teacher", "endpoints"], env, command)
            });
            return endpoints.collect();
        }
        if let Some(url) = &teacher.url {
            // The key of a provider is sent to the provider's own address alone.
            let endpoint = resolved(&Endpoint::new(url), &["teacher"], env, command)?;
            return Ok(vec![endpoint]);
        }
        let provider = self
            .provider
            .as_ref()
            .context("[teacher] names no server")?;
        let env = match command {
            Some(_) => None,
            None => env.or(provider.key_env.as_deref()),
        };
        let endpoint = Endpoint::new(&provider.url);
        Ok(vec![resolved(
            &endpoint,
            &["teacher", "provider"],
            env,
            command,
        )?])
    }

    /// Reads a key from the environment or from the output of a command. No message repeats either.
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
                    "the environment variable {name} is not set, and it holds the key\nhint: `export {name}=…` first"
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
                "`key_command` {}\nhint: try it in a shell; it has to print the key and nothing else",
                match success {
                    true => "printed nothing",
                    false => "failed",
                }
            )),
        }
    }
}

/// Describes for `check` how the server would be asked, in two or three lines. Nothing is sent.
///
/// # Errors
/// [`crate::run_file::ConfigError`] if the server cannot be used, or its key is not there.
pub(super) fn check(run: &Loaded, imported: &Imported) -> anyhow::Result<String> {
    let http = http_teacher(run)?;
    let endpoints = endpoints(run)?;
    let endpoints: Vec<&str> = endpoints.iter().map(Endpoint::name).collect();
    let model = &http.client.request.model;
    let mut lines = vec![format!("teacher   {model} at {}", endpoints.join(", "))];
    let mut estimate = TokenEstimate::default();
    for prompt in &imported.prompts {
        http.estimate_prompt(&mut estimate, prompt)?;
    }
    let RunFile {
        collect,
        import,
        budget,
        ..
    } = &run.settings;
    let answers = imported.prompts.len() * collect.samples;
    let spent = Spending::default();
    if import.answers == AnswerSource::Teacher {
        let ahead = forecast::of_answers(&http, budget, &estimate, answers, &spent);
        lines.push(format!("collect   {ahead}"));
    }
    if let Some(settings) = &run.settings.score {
        let ahead = scores_ahead(run, &http, settings, imported, &spent)?;
        lines.push(format!("score     {ahead}"));
    }
    Ok(lines.join("\n"))
}

/// Forecasts what the distributions over all answers will cost, before there are answers.
///
/// # Errors
/// When a prompt cannot be rendered.
pub(super) fn scores_ahead(
    run: &Loaded,
    http: &HttpTeacher,
    settings: &ScoreSettings,
    imported: &Imported,
    spent: &Spending,
) -> anyhow::Result<String> {
    let RunFile {
        collect,
        import,
        budget,
        ..
    } = &run.settings;
    let mut estimate = TokenEstimate::default();
    let (tokens, answers) = match import.answers {
        // Answers are estimated with the largest length.
        AnswerSource::Teacher => {
            for prompt in &imported.prompts {
                http.estimate_prompt(&mut estimate, prompt)?;
            }
            let answers = imported.prompts.len() * collect.samples;
            let longest = (collect.max_new_tokens * answers) as u64;
            (estimate.tokens(answers) + longest, answers)
        }
        AnswerSource::Given => {
            for answer in imported.prompted_answers() {
                let PromptedAnswer {
                    prompt,
                    completion,
                    own_ids,
                } = answer;
                let window = settings.window;
                http.estimate_answer(&mut estimate, &prompt, &completion, own_ids, window);
            }
            let answers = imported.answers.len();
            (estimate.tokens(answers), answers)
        }
    };
    Ok(forecast::of_scores(http, budget, tokens, answers, spent))
}

fn provider(run: &Loaded, teacher: &TeacherSettings) -> anyhow::Result<Option<Provider>> {
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
        "there is no provider {name:?}: known are {}\nhint: add your own in a file that `providers` names",
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
