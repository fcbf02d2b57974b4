//! `probe`: what the server can do, kept as `probe.json` in the run directory, and held against what
//! the run file asks for.

use std::path::Path;

use anyhow::Context as _;
use potstill_datasets::replace_file;
use potstill_teacher::http::{
    self, Api, LogprobKind, Probe, SamplingStage, ScoringApi, Spending, TokenUsage,
};

use super::requests::Requests;
use super::{REQUESTS_FILE, Served};
use crate::run_file::ConfigError;
use crate::stages::{Context, Outcome};

const PROBE_FILE: &str = "probe.json";

/// Asks the server what it can do, says it, and keeps it for `collect` and `score` to check.
///
/// # Errors
/// When the teacher is not behind a server, the server cannot be reached or lets nobody in, or the
/// disk refuses.
pub(crate) fn probe(context: &Context) -> anyhow::Result<Outcome> {
    let run = &context.run;
    if run.file.served().is_none() {
        let what = "there is no server to ask: `probe` is for a teacher with `provider`, `url` or `endpoints`";
        return Err(run.problem(&["teacher"], what).into());
    }
    let served = Served::open(run)?;
    let settings = served.settings(served.request_settings(), Spending::default())?;
    if context.dry_run {
        context
            .talk
            .line("probe: would ask a handful of short questions");
        return Ok(Outcome::WouldRun);
    }
    let text = served.text.as_ref().map(|t| (&t.tokenizer, &t.template));
    let talk = &context.talk;
    let probe = http::probe(&settings, text, &mut |request| {
        talk.line(&format!("probe: {request}"));
    })?;
    keep(&context.dir.path(""), &probe)?;
    let TokenUsage {
        prompt_tokens,
        completion_tokens,
        ..
    } = probe.spent;
    let cost = http::forecast_usd(served.price.as_ref(), prompt_tokens, completion_tokens);
    let requests = Requests::open(&context.dir.path(REQUESTS_FILE), "probe")?;
    requests.say_lost(talk, "probe");
    requests.probed(probe.requests, probe.spent, cost.unwrap_or(0.0))?;
    talk.data(&probe.lines().join("\n"));
    talk.line(&format!(
        "probe: {} questions, {} tokens{}; kept in {}",
        probe.requests,
        prompt_tokens + completion_tokens,
        cost.map_or_else(String::new, |usd| format!(
            ", {}",
            super::forecast::dollars(usd)
        )),
        context.dir.path(PROBE_FILE).display()
    ));
    Ok(Outcome::Done)
}

/// Keeps what was found.
fn keep(dir: &Path, probe: &Probe) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(probe)? + "\n";
    replace_file(&dir.join(PROBE_FILE), text.as_bytes())?;
    Ok(())
}

/// What was found of the model that is asked now, where it was probed.
fn kept(dir: &Path, model: &str) -> anyhow::Result<Option<Probe>> {
    let path = dir.join(PROBE_FILE);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    let probe: Probe = serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} is not a probe's: delete it, or run `potstill probe` again",
            path.display()
        )
    })?;
    Ok(Some(probe).filter(|probe| probe.model == model))
}

/// Refuses what the probe saw that the server cannot do.
///
/// # Errors
/// [`ConfigError`] at the key that asks for it, with the way out.
pub(super) fn check(served: &Served<'_>, dir: &Path) -> anyhow::Result<()> {
    let Some(probe) = kept(dir, &served.model)? else {
        return Ok(());
    };
    let broken = broken(served, &probe);
    match broken {
        None => Ok(()),
        Some((key, why)) => {
            let message = format!(
                "{why} (so says {}; `potstill probe` asks again, and deleting it silences this)",
                dir.join(PROBE_FILE).display()
            );
            let error: ConfigError = served.run.problem(key, message);
            Err(error.into())
        }
    }
}

fn broken(served: &Served<'_>, probe: &Probe) -> Option<Broken> {
    const METHOD: &[&str] = &["teacher", "method"];
    let file = &served.run.file;
    let method = served.request_settings().api;
    if method == Api::Completions && !probe.completions {
        return Some((
            METHOD,
            "the server has no completions: use \"chat\"".to_owned(),
        ));
    }
    if method == Api::Chat && !probe.chat && file.score.is_none() {
        return Some((
            METHOD,
            "the server has no chat: use \"completions\"".to_owned(),
        ));
    }
    let wanted = file.collect.signals.is_some() || file.score.is_some();
    if wanted && probe.tokens.same_as_local == Some(false) {
        return Some((
            &["teacher", "tokenizer"],
            "the server's tokens are of another tokenizer, so its distributions are over another vocabulary".to_owned(),
        ));
    }
    match (&file.collect.signals, &file.score) {
        (Some(signals), _) => signals_broken(served, probe, signals.top_k.get()),
        (None, Some(score)) => score_broken(probe, score.top_k.get()),
        (None, None) => None,
    }
}

/// A key, and what the server cannot do of what it asks for.
type Broken = (&'static [&'static str], String);

fn signals_broken(served: &Served<'_>, probe: &Probe, top_k: usize) -> Option<Broken> {
    const SIGNALS: &[&str] = &["collect", "signals"];
    let largest = probe.logprobs.largest_k as usize;
    if probe.logprobs.kind != LogprobKind::Real {
        return Some((SIGNALS, "the server gives no log-probabilities that mean anything: leave `signals` out, and learn from the text with `loss = { cross_entropy = 1.0 }`".to_owned()));
    }
    if top_k > largest {
        return Some((
            SIGNALS,
            format!(
                "the server gives at most {largest} likeliest tokens: set `top_k = {largest}`, or change its limit"
            ),
        ));
    }
    let temperature = served.run.file.collect.temperature.get();
    if probe.logprobs.temperature == SamplingStage::Processed && temperature != 1.0 {
        return Some((&["collect", "temperature"], "the server's log-probabilities are of the distribution after temperature, which is not the model's: set `temperature = 1`, or have the server give raw ones".to_owned()));
    }
    if served.request_settings().api == Api::Chat && probe.tokens.same_template == Some(false) {
        return Some((&["teacher", "template"], "the server renders chats otherwise than the template here, so distributions would belong to another text: name its template, or use `method = \"completions\"`".to_owned()));
    }
    None
}

fn score_broken(probe: &Probe, top_k: usize) -> Option<Broken> {
    const SCORE: &[&str] = &["score"];
    let prompted = &probe.prompt_logprobs;
    let largest = prompted.largest_k as usize;
    if prompted.through == ScoringApi::Nothing {
        return Some((SCORE, "the server gives no log-probabilities of prompts: use `signals` of [collect], or another server".to_owned()));
    }
    if top_k > largest {
        return Some((
            SCORE,
            format!(
                "the server gives at most {largest} likeliest tokens of a prompt: set `top_k = {largest}`, or change its limit"
            ),
        ));
    }
    if prompted.stale == Some(true) {
        return Some((SCORE, "the server's log-probabilities of prompts change or lack when the prompt is cached: start it without prefix caching".to_owned()));
    }
    if prompted.shift.is_some_and(|shift| shift != 0) {
        return Some((SCORE, "the server's log-probabilities of prompts belong to other positions than it says: use `signals` of [collect], or another server".to_owned()));
    }
    None
}
