//! Conclusions from the findings of a probe: the recommended use, and changes that allow a better one.

use super::mode::LogprobsMode;
use super::{LogprobKind, Probe, Recommendation, SamplingStage, ScoringApi};
use crate::http::{Dialect, RequestSettings};

/// Number of most likely tokens that training profits from.
const WANTED_K: u32 = 64;

/// Sets the recommendation of a probe, and what stands in the way of a better one. `request` has the sampling settings
/// that answers are to be collected with.
pub(super) fn conclude(probe: &mut Probe, request: &RequestSettings) {
    determine_mode(probe);
    let mut changes = Vec::new();
    logprob_changes(probe, request, &mut changes);
    prompt_changes(probe, &mut changes);
    token_changes(probe, &mut changes);
    probe.change = changes;
    let logprobs = &probe.logprobs;
    let gives_model_distribution = !logprobs.is_processed() || request.altering_setting().is_none();
    let is_usable = logprobs.kind == LogprobKind::Real
        && logprobs.largest_k > 0
        && gives_model_distribution
        && probe.tokens.same_as_local != Some(false);
    probe.recommended = match is_usable {
        true => Recommendation::Logits,
        false => Recommendation::Traces,
    };
}

/// Sets the mode of the log-probabilities. Measurements count more than what the server states.
fn determine_mode(probe: &mut Probe) {
    let logprobs = &mut probe.logprobs;
    let normalized = match logprobs.kind {
        LogprobKind::Real => true,
        LogprobKind::Logits => false,
        LogprobKind::Missing | LogprobKind::Placeholder | LogprobKind::Impossible => return,
    };
    use SamplingStage::{Processed, Raw, Unknown};
    let processed = match (logprobs.temperature, logprobs.penalties) {
        (Raw, Raw | Unknown) | (Unknown, Raw) => false,
        (Processed, Processed | Unknown) | (Unknown, Processed) => true,
        // The measurements say nothing, or contradict every mode.
        (Unknown, Unknown) | (Raw, Processed) | (Processed, Raw) => return,
    };
    let measured = LogprobsMode::of(normalized, processed);
    if let Some(stated) = logprobs.mode
        && stated != measured
    {
        probe.quirks.push(format!(
            "the server states `--logprobs-mode {}`, but the values are those of {}",
            stated.name(),
            measured.name()
        ));
    }
    logprobs.mode = Some(measured);
}

fn logprob_changes(probe: &Probe, request: &RequestSettings, changes: &mut Vec<String>) {
    let is_vllm = probe.dialect == Some(Dialect::Vllm);
    let logprobs = &probe.logprobs;
    match logprobs.kind {
        LogprobKind::Real => {}
        LogprobKind::Missing if probe.dialect == Some(Dialect::LlamaCppPython) => changes.push(
            "there are no log-probabilities: start the server with `--logits_all true`".into(),
        ),
        LogprobKind::Missing => {
            changes.push("there are no log-probabilities: collect text alone".into());
        }
        LogprobKind::Logits => changes.push(
            "the values are logits and not log-probabilities, so they cannot be stored as distributions".into(),
        ),
        LogprobKind::Placeholder | LogprobKind::Impossible => changes.push(
            "the log-probabilities are not those of a model: do not request them".into(),
        ),
    }
    let is_altered = logprobs.is_processed() && request.altering_setting().is_some();
    if is_altered && logprobs.kind == LogprobKind::Real {
        changes.push("log-probabilities are those after penalties, temperature and truncation: set `temperature = 1.0` and `top_p = 1.0` in [collect] without `top_k`, `min_p` and `repetition_penalty`, or have the server give raw ones".into());
    }
    if logprobs.penalty_by_default == Some(true) {
        changes.push("a penalty on repeated tokens is on by default: set `repetition_penalty = 1.0` in [collect], which is then sent to the server".into());
    }
    if !is_vllm {
        return;
    }
    let mut flags = String::new();
    if is_altered || logprobs.kind == LogprobKind::Logits {
        flags += " --logprobs-mode raw_logprobs";
    }
    let measures_k = matches!(logprobs.kind, LogprobKind::Real | LogprobKind::Logits);
    if measures_k && logprobs.largest_k < WANTED_K {
        changes.push(format!(
            "the server gives at most {} most likely tokens at a position; {WANTED_K} or more are better",
            logprobs.largest_k
        ));
        flags += " --max-logprobs -1";
    }
    if !flags.is_empty() {
        changes.push(format!(
            "start the server with `vllm serve {}{flags}`",
            probe.model
        ));
    }
}

fn prompt_changes(probe: &Probe, changes: &mut Vec<String>) {
    let scoring = &probe.prompt_logprobs;
    if scoring.stale == Some(true) {
        changes.push("log-probabilities of a cached prompt differ from those of a new one: start the server without prefix caching (`--no-enable-prefix-caching`) for `score`".into());
    }
    if scoring.through == ScoringApi::Nothing
        || scoring.kind != LogprobKind::Real
        || scoring.shift != Some(0)
    {
        changes
            .push("this server cannot score given text: signals come from its own answers".into());
    }
}

fn token_changes(probe: &Probe, changes: &mut Vec<String>) {
    let is_vllm = probe.dialect == Some(Dialect::Vllm);
    if !probe.tokens.top_ids && probe.logprobs.kind == LogprobKind::Real && !is_vllm {
        changes.push("the most likely tokens are strings without ids, which are recovered through the teacher's tokenizer: set `tokenizer`".into());
    }
    if probe.tokens.same_as_local == Some(false) {
        changes.push("the server's tokens are not those of the local tokenizer: set `tokenizer` to the folder of the served model".into());
    }
    if probe.tokens.same_template == Some(false) {
        changes.push("the server renders chats differently from the local template: set `tokenizer` to the folder of the served model, or start the server with its `--chat-template`".into());
    }
}
