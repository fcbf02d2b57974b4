//! What follows from the findings, and how they read.

use super::{LogprobKind, Probe, Recommendation, SamplingStage, ScoringApi};
use crate::http::Dialect;

/// How many likeliest tokens a trainer is glad of.
const WANTED_K: u32 = 64;

/// Names the method, and what stands in the way of a better one.
pub(super) fn conclude(probe: &mut Probe) {
    let mut change: Vec<String> = Vec::new();
    let vllm = probe.dialect == Some(Dialect::Vllm);
    let logprobs = &probe.logprobs;
    match logprobs.kind {
        LogprobKind::Real => {}
        LogprobKind::Missing if probe.dialect == Some(Dialect::LlamaCppPython) => {
            change.push(
                "there are no log-probabilities: start the server with `--logits_all true`".into(),
            );
        }
        LogprobKind::Missing => {
            change.push("there are no log-probabilities: collect text alone".into())
        }
        LogprobKind::Placeholder | LogprobKind::Impossible => {
            change.push("log-probabilities are not those of a model: do not ask for them".into())
        }
    }
    if logprobs.temperature == SamplingStage::Processed {
        change.push(match vllm {
            true => "log-probabilities are taken after temperature: start vLLM with `--logprobs-mode raw_logprobs`, or sample at temperature 1".into(),
            false => "log-probabilities are taken after temperature: sample at temperature 1, without `top_p` and `top_k`".into(),
        });
    }
    if logprobs.penalties == SamplingStage::Processed {
        change.push("log-probabilities are taken after penalties: ask for none".into());
    }
    if logprobs.penalty_by_default == Some(true) {
        change.push("a penalty on repeated tokens is on by default: set `repetition_penalty = 1.0` in `[collect]`, which the server is then sent".into());
    }
    if vllm && logprobs.kind == LogprobKind::Real && logprobs.largest_k < WANTED_K {
        change.push(format!(
            "at most {} likeliest tokens: start vLLM with `--max-logprobs {WANTED_K}`",
            logprobs.largest_k
        ));
    }
    let prompted = &probe.prompt_logprobs;
    if prompted.stale == Some(true) {
        change.push("log-probabilities of a cached prompt are not those of a new one: start the server with prefix caching off (`--no-enable-prefix-caching`) for `score`".into());
    }
    if prompted.through == ScoringApi::Nothing || prompted.shift != Some(0) {
        change.push(
            "given text cannot be scored here: signals come from the server's own answers".into(),
        );
    }
    if !probe.tokens.top_ids && logprobs.kind == LogprobKind::Real && !vllm {
        change.push("likeliest tokens come as strings: ids are recovered through the teacher's tokenizer, so set `tokenizer`".into());
    }
    if probe.tokens.same_as_local == Some(false) {
        change.push("the server's tokens are not those of the local tokenizer: set `tokenizer` to the folder of the model that is served".into());
    }
    if probe.tokens.same_template == Some(false) {
        change.push("the server renders chats otherwise than the local template: set `tokenizer` to the folder of the model that is served, or start the server with its `--chat-template`".into());
    }
    probe.change = change;
    let own = logprobs.temperature != SamplingStage::Processed;
    let known = probe.tokens.same_as_local != Some(false);
    probe.recommended =
        if logprobs.kind == LogprobKind::Real && logprobs.largest_k > 0 && own && known {
            Recommendation::Logits
        } else {
            Recommendation::Traces
        };
}

impl Probe {
    /// The findings to be read, a line each.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("{} at {}", self.model, self.url)];
        let mut say = |name: &str, what: String| lines.push(format!("  {name:<22}{what}"));
        say(
            "server",
            self.engine
                .clone()
                .unwrap_or_else(|| "says nothing of itself".into()),
        );
        if let Some(context) = self.context {
            say("context", format!("{context} tokens"));
        }
        say("doors", self.doors());
        say("log-probabilities", self.said_logprobs());
        say("of prompts", self.said_prompted());
        say("tokens", self.said_tokens());
        if let Some(same) = self.deterministic {
            let apart = self.repeat_difference.map_or(String::new(), |d| {
                format!(", log-probabilities within {d:.4} nats")
            });
            say(
                "client twice at T = 0",
                format!(
                    "{}{apart}",
                    if same { "same text" } else { "different texts" }
                ),
            );
        }
        say("usage", self.said_usage());
        for speed in &self.speeds {
            let name = speed
                .k
                .map_or("speed, text alone".into(), |k| format!("speed, top {k}"));
            say(
                &name,
                format!(
                    "{:.1} tokens/s, {:.0} bytes a token",
                    speed.tokens_per_second, speed.bytes_per_token
                ),
            );
        }
        for quirk in &self.quirks {
            say("note", quirk.clone());
        }
        for change in &self.change {
            say("to change", change.clone());
        }
        let method = match self.recommended {
            Recommendation::Logits => "logits: log-probabilities can be learned from",
            Recommendation::Traces => "traces: learn from the text",
        };
        say("use it for", method.into());
        say(
            "this cost",
            format!(
                "{} requests, {} tokens of prompts, {} of answers",
                self.requests, self.spent.prompt_tokens, self.spent.completion_tokens
            ),
        );
        lines
    }

    fn doors(&self) -> String {
        match (self.chat, self.completions) {
            (true, true) => "chat, completions".into(),
            (true, false) => "chat".into(),
            (false, true) => "completions".into(),
            (false, false) => "none that answers".into(),
        }
    }

    fn said_logprobs(&self) -> String {
        let logprobs = &self.logprobs;
        let kind = match logprobs.kind {
            LogprobKind::Missing => return "none".into(),
            LogprobKind::Placeholder => return "placeholders, not measured".into(),
            LogprobKind::Impossible => {
                return "impossible: above 0, or with more mass than 1".into();
            }
            LogprobKind::Real => "real",
        };
        let scale = |scale: SamplingStage, of: &str| match scale {
            SamplingStage::Raw => format!(", before {of}"),
            SamplingStage::Processed => format!(", after {of}"),
            SamplingStage::Unknown => String::new(),
        };
        let limit = match logprobs.limit_said.is_some() {
            true => "at most",
            false => "at least",
        };
        format!(
            "{kind}, {limit} top {}{}{}",
            logprobs.largest_k,
            scale(logprobs.temperature, "temperature"),
            scale(logprobs.penalties, "penalties")
        )
    }

    fn said_prompted(&self) -> String {
        let prompted = &self.prompt_logprobs;
        let through = match prompted.through {
            ScoringApi::Nothing => return "none".into(),
            ScoringApi::PromptLogprobs => "through prompt_logprobs",
            ScoringApi::Echo => "through echo",
            ScoringApi::Generate => "through /generate",
        };
        let position = match prompted.shift {
            Some(0) => "aligned".to_owned(),
            Some(by) => format!("off by {by}"),
            None => "that fit nowhere".to_owned(),
        };
        let stale = match prompted.stale {
            Some(true) => ", stale once cached",
            Some(false) => ", the same once cached",
            None => "",
        };
        format!("top {} {through}, {position}{stale}", prompted.largest_k)
    }

    fn said_tokens(&self) -> String {
        let tokens = &self.tokens;
        let mut said = vec![if tokens.ids { "ids" } else { "no ids" }];
        said.push(if tokens.bytes {
            "bytes"
        } else {
            "strings without bytes"
        });
        if tokens.id_prompts {
            said.push("prompts may be ids");
        }
        said.extend(tokens.same_as_local.map(|same| match same {
            true => "as the local tokenizer",
            false => "NOT as the local tokenizer",
        }));
        said.extend(tokens.same_template.map(|same| match same {
            true => "template as the local one",
            false => "template NOT as the local one",
        }));
        said.join(", ")
    }

    fn said_usage(&self) -> String {
        let usage = &self.usage;
        if !usage.present {
            return "none: every answer is charged by its reservation".into();
        }
        let mut said = vec!["present"];
        let mut add = |found: Option<bool>, good: &'static str, bad: &'static str| {
            said.extend(found.map(|found| if found { good } else { bad }));
        };
        add(usage.in_streams, "in streams too", "not in streams");
        add(
            usage.prompt_right,
            "prompts counted right",
            "prompts counted otherwise than here",
        );
        add(
            usage.completion_right,
            "answers counted right",
            "answers counted wrong",
        );
        add(
            usage.counts_all_prompts,
            "all of several prompts",
            "only one of several prompts",
        );
        said.join(", ")
    }
}
