//! A conversation as token ids, and which of them are the assistant's.
//!
//! Where the assistant's text lies is known from the template's generation marks, or from the prompt's
//! rendering being the start of the conversation's. Where it lies in tokens is known by encoding: the
//! text up to a boundary is encoded by itself, and if its ids are the start of the whole text's ids,
//! that many tokens lie before the boundary. If a token of the whole text straddles a boundary, the parts
//! are encoded one by one and joined. Either way the ids up to the answer are those of [`prompt_ids`],
//! which is what a model sees when it has to answer.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ChatTemplate, Error, Message, RenderOptions, Rendered, Tokenizer};

/// Marks around the reasoning in front of an answer. White space between a mark and the text beside it
/// belongs to the mark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Reasoning {
    /// Text that opens the reasoning, such as `<think>`.
    pub open: String,
    /// Text that closes the reasoning, such as `</think>`.
    pub close: String,
}

/// A conversation that ends in an assistant turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The ids of prompt, answer, end of turn and what the template puts behind it.
    pub token_ids: Vec<u32>,
    /// As long as `token_ids`: true for the last assistant turn up to and with the EOS that ends it.
    pub loss_mask: Vec<bool>,
}

/// The ids that a model continues with its answer: the messages with what opens an assistant turn.
/// Special tokens are the template's alone; the tokenizer adds none.
///
/// # Errors
/// Those of [`ChatTemplate::render`] and [`Tokenizer::encode`]; [`Error::PromptEmpty`].
pub fn prompt_ids(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&str>,
    reasoning: Option<&Reasoning>,
) -> Result<Vec<u32>, Error> {
    let rendered = render(tokenizer, template, messages, tools, reasoning, true)?;
    let ids = tokenizer.encode(&rendered.text, false)?;
    if ids.is_empty() {
        return Err(Error::PromptEmpty {
            template: template.name().to_owned(),
        });
    }
    Ok(ids)
}

/// The ids of a prompt with its answer, and the loss mask that covers the answer with its EOS.
/// [`check_mask`](crate::check_mask) shows the same token by token, and finds all that is wrong at once.
///
/// # Errors
/// Those of [`prompt_ids`], and where a mask would be wrong: the answer's place is not known, the template
/// drops its reasoning, the turn does not end in an EOS, or the answer spells an EOS itself.
pub fn encode_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&str>,
    answer: &Message,
    reasoning: Option<&Reasoning>,
) -> Result<Encoded, Error> {
    if let Some(token) = eos_inside(tokenizer, answer) {
        return Err(Error::EndOfTurnInside { token });
    }
    let texts = render_both(tokenizer, template, messages, tools, answer, reasoning)?;
    let spans = answer_spans(template, &texts)?;
    let laid = lay_out(tokenizer, &texts.whole.text, spans)?;
    let turn = laid.turn(&texts.whole.text);
    if let Some(reasoning) = dropped_reasoning(turn, answer) {
        return Err(Error::ReasoningDropped {
            template: template.name().to_owned(),
            reasoning: reasoning.to_owned(),
            rendered: turn.to_owned(),
        });
    }
    if !laid.ended {
        return Err(Error::EndOfTurnMissing {
            template: template.name().to_owned(),
            rendered: turn.to_owned(),
            eos: eos_tokens(tokenizer),
        });
    }
    if laid.runs.first().is_some_and(|run| run.start == 0) {
        return Err(Error::PromptEmpty {
            template: template.name().to_owned(),
        });
    }
    let loss_mask = laid.mask();
    Ok(Encoded {
        token_ids: laid.token_ids,
        loss_mask,
    })
}

/// A prompt with what opens an answer, and the conversation with the answer.
pub(crate) struct Texts {
    pub(crate) prompt: Rendered,
    pub(crate) whole: Rendered,
}

pub(crate) fn render_both(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&str>,
    answer: &Message,
    reasoning: Option<&Reasoning>,
) -> Result<Texts, Error> {
    let prompt = render(tokenizer, template, messages, tools, reasoning, true)?;
    let mut messages = messages.to_vec();
    messages.push(answer.clone());
    let whole = render(tokenizer, template, &messages, tools, reasoning, false)?;
    Ok(Texts { prompt, whole })
}

/// A conversation in tokens.
pub(crate) struct LaidOut {
    pub(crate) token_ids: Vec<u32>,
    /// The bytes of the answer.
    pub(crate) spans: Vec<Range<usize>>,
    /// The same in tokens, with the EOS behind the last where there is one.
    pub(crate) runs: Vec<Range<usize>>,
    /// Whether the last run ends in an EOS.
    pub(crate) ended: bool,
}

impl LaidOut {
    /// The text from where the answer begins.
    pub(crate) fn turn<'a>(&self, text: &'a str) -> &'a str {
        let start = self.spans.first().map_or(text.len(), |span| span.start);
        text.get(start..).unwrap_or_default()
    }

    pub(crate) fn mask(&self) -> Vec<bool> {
        let loss = |t| self.runs.iter().any(|run| run.contains(&t));
        (0..self.token_ids.len()).map(loss).collect()
    }
}

pub(crate) fn lay_out(
    tokenizer: &Tokenizer,
    text: &str,
    spans: Vec<Range<usize>>,
) -> Result<LaidOut, Error> {
    let (token_ids, mut runs) = encode_spans(tokenizer, text, &spans)?;
    let mut ended = false;
    if let Some(last) = runs.last_mut()
        && let Some(end) = end_of_turn(tokenizer, &token_ids, last)
    {
        last.end = end;
        ended = true;
    }
    Ok(LaidOut {
        token_ids,
        spans,
        runs,
        ended,
    })
}

/// The answer's reasoning, where the rendered turn does not have it. Templates of reasoning models look for
/// `</think>` in the text itself, and write what follows it alone.
pub(crate) fn dropped_reasoning<'a>(turn: &str, answer: &'a Message) -> Option<&'a str> {
    let written = answer.content.split_once("</think>");
    let written = written.map(|(before, _)| before.trim().trim_start_matches("<think>"));
    let all = answer.reasoning.as_deref().into_iter().chain(written);
    all.map(str::trim)
        .find(|reasoning| !turn.contains(reasoning))
}

/// Parts the reasoning from a generated text. The marks are looked for as they are, and else without the
/// white space around them. A text without the opening mark but with the closing one began inside the
/// reasoning, as it does where the prompt opens it; one that is never closed is reasoning to its end.
/// Reasoning of white space only is none.
pub fn split_reasoning(text: &str, reasoning: &Reasoning) -> (Option<String>, String) {
    let (open, close) = (reasoning.open.trim(), reasoning.close.trim());
    let inside = strip(text, &reasoning.open, open);
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
    let thought = if thought.trim().is_empty() {
        None
    } else {
        Some(thought.to_owned())
    };
    (thought, answer.to_owned())
}

fn strip<'a>(text: &'a str, exact: &str, trimmed: &str) -> Option<&'a str> {
    text.strip_prefix(exact)
        .or_else(|| text.trim_start().strip_prefix(trimmed))
}

fn render(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&str>,
    reasoning: Option<&Reasoning>,
    add_generation_prompt: bool,
) -> Result<Rendered, Error> {
    let special = tokenizer.special_tokens();
    template.render(
        messages,
        tools,
        RenderOptions {
            add_generation_prompt,
            special,
            reasoning,
            now: None,
        },
    )
}

/// An EOS within the answer, which would end the sequence there for every model that reads it.
pub(crate) fn eos_inside(tokenizer: &Tokenizer, answer: &Message) -> Option<String> {
    let calls = answer
        .tool_calls
        .iter()
        .flat_map(|call| [call.name.as_str(), call.arguments.as_str()]);
    let texts: Vec<&str> = calls
        .chain([answer.content.as_str()])
        .chain(answer.reasoning.as_deref())
        .collect();
    let mut tokens = tokenizer
        .eos_ids()
        .iter()
        .filter_map(|&id| tokenizer.added_token(id));
    tokens.find(|token| texts.iter().any(|text| text.contains(token.as_str())))
}

/// The byte ranges of the answer in the whole rendering; at least one.
pub(crate) fn answer_spans(
    template: &ChatTemplate,
    Texts { prompt, whole }: &Texts,
) -> Result<Vec<Range<usize>>, Error> {
    let end = prompt.text.len();
    let prefix = whole.text.starts_with(&prompt.text);
    if !template.marks_generation() && prefix {
        return Ok(std::iter::once(end..whole.text.len()).collect());
    }
    if template.marks_generation() {
        // The prompt's own assistant turns come first, and are no answers of the teacher. What the prompt
        // writes of the answer, an opening mark of reasoning for instance, is no one's answer either.
        let spans: Vec<Range<usize>> = if prefix {
            let behind = whole
                .generation
                .iter()
                .filter(|span| span.start >= end || span.end > end);
            behind.map(|span| span.start.max(end)..span.end).collect()
        } else {
            whole
                .generation
                .iter()
                .skip(prompt.generation.len())
                .cloned()
                .collect()
        };
        if spans.is_empty() {
            return Err(Error::GenerationUnmarked {
                template: template.name().to_owned(),
                rendered: window(&whole.text, whole.text.chars().count()),
            });
        }
        return Ok(spans);
    }
    let same = prompt
        .text
        .chars()
        .zip(whole.text.chars())
        .take_while(|(a, b)| a == b)
        .count();
    Err(Error::PromptNotPrefix {
        template: template.name().to_owned(),
        position: same,
        prompt: window(&prompt.text, same),
        conversation: window(&whole.text, same),
    })
}

/// What of a text stands around a place, for a message.
fn window(text: &str, place: usize) -> String {
    const BEFORE: usize = 160;
    const BEHIND: usize = 160;
    let skipped = place.saturating_sub(BEFORE);
    let part: String = text
        .chars()
        .skip(skipped)
        .take(place - skipped + BEHIND)
        .collect();
    let start = if skipped > 0 { "…" } else { "" };
    let end = if text.chars().count() > place + BEHIND {
        "…"
    } else {
        ""
    };
    format!("{start}{part}{end}")
}

/// Encodes a text so that no token straddles an end of a span. Gives the ids and the spans in tokens.
fn encode_spans(
    tokenizer: &Tokenizer,
    text: &str,
    spans: &[Range<usize>],
) -> Result<(Vec<u32>, Vec<Range<usize>>), Error> {
    let whole = tokenizer.encode(text, false)?;
    let place = |cut: usize| match text.get(..cut) {
        Some(before) if cut < text.len() => tokenizer.encode(before, false),
        _ => Ok(whole.clone()),
    };
    let mut runs = Vec::new();
    for span in spans {
        let (start, end) = (place(span.start)?, place(span.end)?);
        if !whole.starts_with(&start) || !whole.starts_with(&end) {
            return encode_parts(tokenizer, text, spans);
        }
        runs.push(start.len()..end.len());
    }
    Ok((whole, runs))
}

/// Encodes the spans and the texts between them one by one, and joins the ids.
fn encode_parts(
    tokenizer: &Tokenizer,
    text: &str,
    spans: &[Range<usize>],
) -> Result<(Vec<u32>, Vec<Range<usize>>), Error> {
    let mut ids: Vec<u32> = Vec::new();
    let mut append = |from: usize, to: usize| -> Result<usize, Error> {
        let part = text.get(from..to).unwrap_or_default();
        ids.extend(if from == 0 {
            tokenizer.encode(part, false)?
        } else {
            tokenizer.encode_continuation(part)?
        });
        Ok(ids.len())
    };
    let mut runs = Vec::new();
    let mut done = 0;
    for span in spans {
        let start = append(done, span.start)?;
        runs.push(start..append(span.start, span.end)?);
        done = span.end;
    }
    append(done, text.len())?;
    Ok((ids, runs))
}

/// One past the EOS that ends the answer's last run: the first one in it, or behind it if only white
/// space lies between, which then is the model's to write too.
fn end_of_turn(tokenizer: &Tokenizer, ids: &[u32], run: &Range<usize>) -> Option<usize> {
    let is_eos = |id: &u32| tokenizer.eos_ids().contains(id);
    let end = run.start + ids.get(run.start..)?.iter().position(is_eos)?;
    let between: Vec<u8> = ids
        .get(run.end..end)
        .unwrap_or_default()
        .iter()
        .flat_map(|&id| tokenizer.token_bytes(id))
        .collect();
    String::from_utf8_lossy(&between)
        .trim()
        .is_empty()
        .then_some(end + 1)
}

pub(crate) fn eos_tokens(tokenizer: &Tokenizer) -> String {
    let tokens: Vec<String> = tokenizer
        .eos_ids()
        .iter()
        .map(|&id| {
            format!(
                "{id} {:?}",
                String::from_utf8_lossy(&tokenizer.token_bytes(id))
            )
        })
        .collect();
    if tokens.is_empty() {
        "no token".to_owned()
    } else {
        tokens.join(", ")
    }
}
