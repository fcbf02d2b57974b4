//! Reasoning in front of an answer.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Tags around the reasoning in front of an answer. White space between a tag and the text beside it belongs to the tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Reasoning {
    /// Text that opens the reasoning, such as `<think>`.
    pub open: String,
    /// Text that closes the reasoning, such as `</think>`.
    pub close: String,
}

/// Splits a generated text into reasoning and answer. The tags are searched as they are, and otherwise without the
/// white space around them. A text that has only the closing tag began inside the reasoning, because the prompt opened
/// it; a text that has only the opening tag is reasoning to its end. Reasoning of white space only counts as none.
pub fn split_reasoning(text: &str, reasoning: &Reasoning) -> (Option<String>, String) {
    let (open, close) = (reasoning.open.trim(), reasoning.close.trim());
    let inside = strip_tag(text, &reasoning.open, open);
    let body = inside.unwrap_or(text);
    let closed = body
        .split_once(&reasoning.close)
        .or_else(|| body.split_once(close));
    let (thought, answer) = match (inside, closed) {
        (Some(thought), None) => (thought, ""),
        (Some(_), Some(parts)) => parts,
        (None, Some((thought, answer))) if !thought.contains(open) => (thought, answer),
        (None, _) => return (None, text.to_owned()),
    };
    let thought = (!thought.trim().is_empty()).then(|| thought.to_owned());
    (thought, answer.to_owned())
}

fn strip_tag<'a>(text: &'a str, exact: &str, trimmed: &str) -> Option<&'a str> {
    text.strip_prefix(exact)
        .or_else(|| text.trim_start().strip_prefix(trimmed))
}
