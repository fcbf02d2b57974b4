//! `probe`: finds out what the server can do, keeps the findings as `probe.json` in the run directory, and checks the
//! run file against them.

use std::path::Path;

use potstill_datasets::{read_sealed, write_sealed};
use potstill_teacher::HttpTeacher;
use potstill_teacher::http::{self, Api, LogprobKind, Probe, RequestLog, ScoringApi, TokenUsage};

use super::acquire::{self, REQUESTS_FILE};
use super::{Context, StageOutcome, forecast, served};
use crate::run_file::{ConfigError, Loaded};

const PROBE_FILE: &str = "probe.json";

/// Asks the server what it can do, and keeps the findings for `collect` and `score` to check.
///
/// # Errors
/// When the teacher is not behind a server, the server cannot be reached or refuses the key, or the disk refuses.
pub fn probe(context: &Context) -> anyhow::Result<StageOutcome> {
    let run = &context.run;
    if run.settings.served().is_none() {
        let what = "there is no server to ask\nhint: `probe` is for a teacher with `provider`, `url` or `endpoints`";
        return Err(run.problem(&["teacher"], what).into());
    }
    let mut http = served::http_teacher(run)?;
    http.client.endpoints = served::endpoints(run)?;
    if context.dry_run {
        context
            .console
            .note("probe: would ask a handful of short questions");
        return Ok(StageOutcome::WouldRun);
    }
    let encoder = http.encoder.as_ref();
    let encoder = encoder.map(|e| (e.tokenizer(), e.template()));
    let console = &context.console;
    let probe = http::probe(&http.client, encoder, &mut |request| {
        console.note(&format!("probe: {request}"));
    })?;
    keep(&context.dir.path(""), &probe)?;
    let TokenUsage {
        prompt_tokens,
        completion_tokens,
        ..
    } = probe.spent;
    let cost = http::forecast_usd(http.client.price.as_ref(), prompt_tokens, completion_tokens);
    let log = RequestLog::open(&context.dir.path(REQUESTS_FILE), "probe")?;
    acquire::say_lost(context, "probe", &log);
    log.probed(probe.requests, probe.spent, cost.unwrap_or(0.0))?;
    console.output(&probe.lines().join("\n"));
    console.note(&format!(
        "probe: {} questions, {} tokens{}; kept in {}",
        probe.requests,
        prompt_tokens + completion_tokens,
        cost.map_or_else(String::new, |usd| format!(", {}", forecast::dollars(usd))),
        context.dir.path(PROBE_FILE).display()
    ));
    Ok(StageOutcome::Done)
}

/// Writes the findings into the run directory.
fn keep(dir: &Path, probe: &Probe) -> anyhow::Result<()> {
    write_sealed(&dir.join(PROBE_FILE), probe)?;
    Ok(())
}

/// Reads the findings, if they are about this model.
fn kept(dir: &Path, model: &str) -> anyhow::Result<Option<Probe>> {
    let path = dir.join(PROBE_FILE);
    let hint = "delete it, or run `potstill probe` again";
    let probe: Option<Probe> = read_sealed(&path, hint)?;
    Ok(probe.filter(|probe| probe.model == model))
}

/// Refuses settings that the server cannot serve, according to a probe of it.
///
/// # Errors
/// [`ConfigError`] at the key of the setting, with a hint.
pub(super) fn check(run: &Loaded, http: &HttpTeacher, dir: &Path) -> anyhow::Result<()> {
    let Some(probe) = kept(dir, &http.client.request.model)? else {
        return Ok(());
    };
    match unmet(run, http, &probe) {
        None => Ok(()),
        Some(Unmet { key, why, hint }) => {
            let message = format!(
                "{why}, according to {} (`potstill probe` asks again; without the file this is not checked)\nhint: {hint}",
                dir.join(PROBE_FILE).display()
            );
            let error: ConfigError = run.problem(key, message);
            Err(error.into())
        }
    }
}

/// A setting that the server cannot serve.
struct Unmet {
    key: &'static [&'static str],
    why: String,
    hint: String,
}

impl Unmet {
    fn new(key: &'static [&'static str], why: impl Into<String>, hint: impl Into<String>) -> Unmet {
        Unmet {
            key,
            why: why.into(),
            hint: hint.into(),
        }
    }
}

fn unmet(run: &Loaded, http: &HttpTeacher, probe: &Probe) -> Option<Unmet> {
    const METHOD: &[&str] = &["teacher", "method"];
    let file = &run.settings;
    let api = http.client.request.api;
    if api == Api::Completions && !probe.completions {
        return Some(Unmet::new(
            METHOD,
            "the server has no completions API",
            "use \"chat\"",
        ));
    }
    if api == Api::Chat && !probe.chat && file.score.is_none() {
        return Some(Unmet::new(
            METHOD,
            "the server has no chat API",
            "use \"completions\"",
        ));
    }
    let wants_signals = file.collect.signals.is_some() || file.score.is_some();
    if wants_signals && probe.tokens.same_as_local == Some(false) {
        return Some(Unmet::new(
            &["teacher", "tokenizer"],
            "the server uses another tokenizer, so its distributions are over another vocabulary",
            "name the folder of the server's tokenizer",
        ));
    }
    match (&file.collect.signals, &file.score) {
        (Some(signals), _) => unmet_by_answers(http, probe, signals.top_k),
        (None, Some(score)) => unmet_by_scores(probe, score.top_k),
        (None, None) => None,
    }
}

/// Finds what `signals` of [collect] asks for and the server's answers do not have.
fn unmet_by_answers(http: &HttpTeacher, probe: &Probe, top_k: usize) -> Option<Unmet> {
    const SIGNALS: &[&str] = &["collect", "signals"];
    let largest = probe.logprobs.largest_k as usize;
    if probe.logprobs.kind != LogprobKind::Real {
        return Some(Unmet::new(
            SIGNALS,
            "the server gives no meaningful log-probabilities",
            "leave `signals` out, and learn from the text with `loss = { cross_entropy = 1.0 }`",
        ));
    }
    if top_k > largest {
        return Some(Unmet::new(
            SIGNALS,
            format!("the server gives at most {largest} most likely tokens"),
            format!("set `top_k = {largest}`, or change the server's limit"),
        ));
    }
    if probe.logprobs.is_processed()
        && let Some(setting) = http.client.request.altering_setting()
    {
        let key: &[&str] = match setting {
            "top_p" => &["collect", "top_p"],
            "top_k" => &["collect", "top_k"],
            "min_p" => &["collect", "min_p"],
            "repetition_penalty" => &["collect", "repetition_penalty"],
            _ => &["collect", "temperature"],
        };
        return Some(Unmet::new(
            key,
            "the server's log-probabilities are those of the distribution after penalties, temperature and truncation, which is not the model's",
            "set `temperature = 1.0` and `top_p = 1.0` without `top_k`, `min_p` and `repetition_penalty`, or start vLLM with `--logprobs-mode raw_logprobs`",
        ));
    }
    let api = http.client.request.api;
    if api == Api::Chat && probe.tokens.same_template == Some(false) {
        return Some(Unmet::new(
            &["teacher", "template"],
            "the server renders chats differently from the template here, so distributions would belong to another text",
            "name the server's template, or use `method = \"completions\"`",
        ));
    }
    None
}

/// Finds what [score] asks for and the server cannot do.
fn unmet_by_scores(probe: &Probe, top_k: usize) -> Option<Unmet> {
    const SCORE: &[&str] = &["score"];
    const ANOTHER: &str = "use `signals` of [collect], or another server";
    let prompted = &probe.prompt_logprobs;
    let largest = prompted.largest_k as usize;
    if prompted.through == ScoringApi::Nothing {
        return Some(Unmet::new(
            SCORE,
            "the server gives no log-probabilities of prompts",
            ANOTHER,
        ));
    }
    if top_k > largest {
        return Some(Unmet::new(
            SCORE,
            format!("the server gives at most {largest} most likely tokens of a prompt"),
            format!("set `top_k = {largest}`, or change the server's limit"),
        ));
    }
    if prompted.stale == Some(true) {
        return Some(Unmet::new(
            SCORE,
            "the server's log-probabilities of prompts change or are absent when the prompt is cached",
            "start the server without prefix caching",
        ));
    }
    if prompted.kind != LogprobKind::Real {
        return Some(Unmet::new(
            SCORE,
            "the server's values for prompts are no log-probabilities of a model",
            ANOTHER,
        ));
    }
    if prompted.shift.is_some_and(|shift| shift != 0) {
        return Some(Unmet::new(
            SCORE,
            "the server's log-probabilities of prompts belong to other positions than it says",
            ANOTHER,
        ));
    }
    None
}
