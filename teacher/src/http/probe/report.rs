//! The findings of a probe as text.

use super::{
    LogprobKind, Probe, PromptScoring, Recommendation, SamplingStage, ScoringApi, TokenFindings,
    UsageFindings,
};

impl Probe {
    /// The findings as text, a line each.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("{} at {}", self.model, self.url)];
        let mut add = |name: &str, text: String| lines.push(format!("  {name:<22}{text}"));
        let engine = self.engine.clone();
        add("server", engine.unwrap_or_else(|| "not known".into()));
        if let Some(context) = self.context {
            add("context", format!("{context} tokens"));
        }
        add("API", self.apis().into());
        add("log-probabilities", self.logprobs_text());
        if let Some(mode) = self.logprobs.mode {
            add("", format!("{}: {}", mode.name(), mode.meaning()));
        }
        add("of prompts", prompt_text(&self.prompt_logprobs));
        add("tokens", tokens_text(&self.tokens));
        if let Some(text) = self.repeat_text() {
            add("repeated at T = 0", text);
        }
        add("usage", usage_text(&self.usage));
        for speed in &self.speeds {
            let name = speed
                .k
                .map_or("speed, text alone".into(), |k| format!("speed, top {k}"));
            let rates = format!(
                "{:.1} tokens/s, {:.0} bytes a token",
                speed.tokens_per_second, speed.bytes_per_token
            );
            add(&name, rates);
        }
        for quirk in &self.quirks {
            add("note", quirk.clone());
        }
        for change in &self.change {
            add("to change", change.clone());
        }
        let recommended = match self.recommended {
            Recommendation::Logits => {
                "logits: train on its distributions, which are stored at temperature 1 only, so the loss has to use temperature 1"
            }
            Recommendation::Traces => {
                "traces: train on its text, with `loss = { cross_entropy = 1.0 }`"
            }
        };
        add("use it for", recommended.into());
        let spent = format!(
            "{} requests, {} tokens of prompts, {} of answers",
            self.requests, self.spent.prompt_tokens, self.spent.completion_tokens
        );
        add("cost of this probe", spent);
        lines
    }

    fn apis(&self) -> &'static str {
        match (self.chat, self.completions) {
            (true, true) => "chat, completions",
            (true, false) => "chat",
            (false, true) => "completions",
            (false, false) => "none that answers",
        }
    }

    fn logprobs_text(&self) -> String {
        let logprobs = &self.logprobs;
        let kind = match logprobs.kind {
            LogprobKind::Missing => return "none".into(),
            LogprobKind::Placeholder => return "placeholders, not measured".into(),
            LogprobKind::Impossible => return "impossible: above 0, or with a mass above 1".into(),
            LogprobKind::Logits => "logits, not normalised",
            LogprobKind::Real => "real",
        };
        let stage = |stage: SamplingStage, of: &str| match stage {
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
            stage(logprobs.temperature, "temperature"),
            stage(logprobs.penalties, "penalties")
        )
    }

    fn repeat_text(&self) -> Option<String> {
        let text = match self.deterministic? {
            true => "same text",
            false => "different texts",
        };
        let difference = self.repeat_difference.map_or(String::new(), |nats| {
            format!(", log-probabilities within {nats:.4} nats")
        });
        Some(format!("{text}{difference}"))
    }
}

fn prompt_text(scoring: &PromptScoring) -> String {
    let through = match scoring.through {
        ScoringApi::Nothing => return "none".into(),
        ScoringApi::PromptLogprobs => "through prompt_logprobs",
        ScoringApi::Echo => "through echo",
        ScoringApi::Generate => "through /generate",
    };
    let kind = match scoring.kind {
        LogprobKind::Real => "",
        LogprobKind::Logits => ", logits, not normalised",
        LogprobKind::Missing | LogprobKind::Placeholder | LogprobKind::Impossible => {
            ", not those of a model"
        }
    };
    let shift = match scoring.shift {
        Some(0) => "aligned".to_owned(),
        Some(by) => format!("off by {by}"),
        None => "at no known shift".to_owned(),
    };
    let stale = match scoring.stale {
        Some(true) => ", stale once cached",
        Some(false) => ", the same once cached",
        None => "",
    };
    format!("top {} {through}{kind}, {shift}{stale}", scoring.largest_k)
}

fn tokens_text(tokens: &TokenFindings) -> String {
    let mut facts = vec![
        if tokens.ids { "ids" } else { "no ids" },
        if tokens.bytes {
            "bytes"
        } else {
            "strings without bytes"
        },
    ];
    if tokens.id_prompts {
        facts.push("prompts may be ids");
    }
    facts.extend(tokens.same_as_local.map(|same| match same {
        true => "those of the local tokenizer",
        false => "NOT those of the local tokenizer",
    }));
    facts.extend(tokens.same_template.map(|same| match same {
        true => "template as the local one",
        false => "template NOT as the local one",
    }));
    facts.join(", ")
}

fn usage_text(usage: &UsageFindings) -> String {
    if !usage.present {
        return "none: every answer is charged by its reservation".into();
    }
    let mut facts = vec!["present"];
    let mut add = |found: Option<bool>, good: &'static str, bad: &'static str| {
        facts.extend(found.map(|found| if found { good } else { bad }));
    };
    add(usage.in_streams, "in streams too", "not in streams");
    add(
        usage.prompt_right,
        "prompts counted as here",
        "prompts counted differently from here",
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
    facts.join(", ")
}
