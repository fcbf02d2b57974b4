//! Conversion of a conversation to token ids and a loss mask.
//!
//! The bytes of the answer in the rendered conversation are known from the template's generation marks, or because the
//! rendered prompt is the start of the rendered conversation. The tokens of the answer are found by encoding: the text
//! up to a boundary is encoded by itself, and if its ids are the start of the ids of the whole text, that many tokens
//! precede the boundary. If a token of the whole text straddles a boundary, the parts are encoded one by one and
//! joined. In both cases the ids up to the answer are those of [`prompt_ids`], which a model sees when it has to answer.

use std::ops::Range;

use crate::error::Error;
use crate::finding::Finding;
use crate::reasoning::Reasoning;
use crate::records::{Message, Role};
use crate::template::{ChatTemplate, RenderOptions, Rendered};
use crate::tokenizer::Tokenizer;

/// Token ids and loss mask of a conversation that ends in an assistant turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Ids of the prompt, the answer, the end of the turn and the text that the template puts after it.
    pub token_ids: Vec<u32>,
    /// For each of `token_ids`, whether it carries loss: true for the last assistant turn including the EOS that ends it.
    pub loss_mask: Vec<bool>,
}

/// Returns the ids of a prompt: the messages and the text that opens an assistant turn. Special tokens come from the
/// template only; the tokenizer adds none.
///
/// # Errors
/// Those of [`ChatTemplate::render`] and [`Tokenizer::encode`]; [`Error::Untrainable`] if there are no ids.
pub fn prompt_ids(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&str>,
    reasoning: Option<&Reasoning>,
) -> Result<Vec<u32>, Error> {
    rendered_prompt(tokenizer, template, messages, tools, reasoning).map(|(_, ids)| ids)
}

/// Returns the text and the ids of a prompt.
pub(crate) fn rendered_prompt(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&str>,
    reasoning: Option<&Reasoning>,
) -> Result<(String, Vec<u32>), Error> {
    let rendered = render(tokenizer, template, messages, tools, reasoning, true)?;
    let ids = tokenizer.encode(&rendered.text, false)?;
    match ids.is_empty() {
        true => Err(template.untrainable(Finding::PromptEmpty)),
        false => Ok((rendered.text, ids)),
    }
}

/// Returns the ids of a prompt with its answer, and the loss mask that covers the answer and its EOS.
/// [`check_mask`](crate::check_mask) returns the same token by token, with all problems at once.
///
/// # Errors
/// Those of [`prompt_ids`], and [`Error::Untrainable`] if the mask would be wrong: the position of the answer is not
/// known, the template drops the reasoning, the answer or the question, the turn does not end in an EOS, or the answer's
/// text contains an EOS.
pub fn encode_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&str>,
    answer: &Message,
    reasoning: Option<&Reasoning>,
) -> Result<Encoded, Error> {
    let untrainable = |finding| template.untrainable(finding);
    if let Some(token) = eos_inside(tokenizer, answer) {
        return Err(untrainable(Finding::EosInside { token }));
    }
    let rendered = render_pair(tokenizer, template, messages, tools, answer, reasoning)?;
    let spans = answer_spans(template, &rendered).map_err(untrainable)?;
    let layout = AnswerLayout::new(tokenizer, &rendered.conversation.text, spans)?;
    let findings = answer_findings(tokenizer, &rendered, &layout, answer);
    if let Some(finding) = findings.into_iter().next() {
        return Err(untrainable(finding));
    }
    if layout.runs.first().is_some_and(|run| run.start == 0) {
        return Err(untrainable(Finding::PromptEmpty));
    }
    if let Some(finding) = prompt_dropped(messages, &rendered.prompt.text) {
        return Err(untrainable(finding));
    }
    let loss_mask = layout.mask();
    Ok(Encoded {
        token_ids: layout.token_ids,
        loss_mask,
    })
}

/// The rendered prompt, which ends with the text that opens an answer, and the rendered conversation with the answer.
pub(crate) struct RenderedPair {
    pub(crate) prompt: Rendered,
    pub(crate) conversation: Rendered,
}

pub(crate) fn render_pair(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&str>,
    answer: &Message,
    reasoning: Option<&Reasoning>,
) -> Result<RenderedPair, Error> {
    let prompt = render(tokenizer, template, messages, tools, reasoning, true)?;
    let mut messages = messages.to_vec();
    messages.push(answer.clone());
    let conversation = render(tokenizer, template, &messages, tools, reasoning, false)?;
    Ok(RenderedPair {
        prompt,
        conversation,
    })
}

/// The tokens of a conversation and the positions of its answer.
pub(crate) struct AnswerLayout {
    pub(crate) token_ids: Vec<u32>,
    /// Byte ranges of the answer.
    pub(crate) spans: Vec<Range<usize>>,
    /// Token ranges of the answer. The last one includes the EOS after it, if there is one.
    pub(crate) runs: Vec<Range<usize>>,
    /// Whether the last run ends in an EOS.
    ends_in_eos: bool,
}

impl AnswerLayout {
    /// Encodes a conversation whose answer is at `spans`.
    pub(crate) fn new(
        tokenizer: &Tokenizer,
        text: &str,
        spans: Vec<Range<usize>>,
    ) -> Result<AnswerLayout, Error> {
        let (token_ids, mut runs) = encode_spans(tokenizer, text, &spans)?;
        let mut ends_in_eos = false;
        if let Some(last) = runs.last_mut()
            && let Some(end) = end_of_turn(tokenizer, &token_ids, last)
        {
            last.end = end;
            ends_in_eos = true;
        }
        Ok(AnswerLayout {
            token_ids,
            spans,
            runs,
            ends_in_eos,
        })
    }

    pub(crate) fn mask(&self) -> Vec<bool> {
        let carries_loss = |t| self.runs.iter().any(|run| run.contains(&t));
        (0..self.token_ids.len()).map(carries_loss).collect()
    }
}

/// Returns the problems of an answer whose position is known: missing reasoning, missing text and a missing EOS.
pub(crate) fn answer_findings(
    tokenizer: &Tokenizer,
    rendered: &RenderedPair,
    layout: &AnswerLayout,
    answer: &Message,
) -> Vec<Finding> {
    let text = &rendered.conversation.text;
    let start = layout.spans.first().map_or(text.len(), |span| span.start);
    let turn = text.get(start..).unwrap_or_default();
    let mut findings = Vec::new();
    if let Some(reasoning) = dropped_reasoning(turn, answer) {
        findings.push(Finding::ReasoningDropped {
            reasoning: reasoning.to_owned(),
            rendered: turn.to_owned(),
        });
    }
    if let Some(missing) = dropped_line(turn, answer) {
        findings.push(Finding::AnswerDropped {
            missing: missing.to_owned(),
            rendered: turn.to_owned(),
        });
    }
    if !layout.ends_in_eos {
        findings.push(Finding::EosWithoutLoss {
            rendered: turn.to_owned(),
            eos: eos_tokens(tokenizer),
        });
    }
    findings
}

/// Returns the answer's reasoning if the rendered turn does not contain it. Templates of reasoning models search for
/// `</think>` in the text itself, and write only the text after it.
fn dropped_reasoning<'a>(turn: &str, answer: &'a Message) -> Option<&'a str> {
    let written = answer.content.split_once("</think>");
    let written = written.map(|(before, _)| before.trim().trim_start_matches("<think>"));
    let all = answer.reasoning.as_deref().into_iter().chain(written);
    all.map(str::trim)
        .find(|reasoning| !turn.contains(reasoning))
}

/// Returns the first line of the answer with a word that the rendered turn does not contain. A template may write white
/// space, and the reasoning in front of `</think>`, in another way.
fn dropped_line<'a>(turn: &str, answer: &'a Message) -> Option<&'a str> {
    let content = answer.content.rsplit("</think>").next()?;
    let mut lines = content.lines().map(str::trim);
    lines.find(|line| line.split_whitespace().any(|word| !turn.contains(word)))
}

/// Returns the finding for a rendered prompt without any line of the last message of the user.
pub(crate) fn prompt_dropped(messages: &[Message], prompt: &str) -> Option<Finding> {
    let mut from_user = messages.iter().rev().filter(|m| m.role == Role::User);
    let content = from_user.next()?.content.as_str();
    let mut lines = content
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    let first = lines.next()?;
    let found = prompt.contains(first) || lines.any(|line| prompt.contains(line));
    (!found).then(|| Finding::PromptDropped {
        missing: excerpt_around(first, 0),
        rendered: excerpt_around(prompt, prompt.chars().count()),
    })
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

/// Returns the first EOS token that the answer's text contains. A model that reads the text would end the sequence there.
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

/// Returns the byte ranges of the answer in the rendered conversation; there is at least one.
pub(crate) fn answer_spans(
    template: &ChatTemplate,
    RenderedPair {
        prompt,
        conversation,
    }: &RenderedPair,
) -> Result<Vec<Range<usize>>, Finding> {
    let end = prompt.text.len();
    let prefix = conversation.text.starts_with(&prompt.text);
    if !template.marks_generation() && prefix {
        return Ok(std::iter::once(end..conversation.text.len()).collect());
    }
    if template.marks_generation() {
        // Assistant turns of the prompt come first and are not the teacher's answer. The same holds for a part of
        // the answer's turn that the prompt contains, such as the opening tag of the reasoning.
        let spans: Vec<Range<usize>> = if prefix {
            let after = conversation
                .generation
                .iter()
                .filter(|span| span.start >= end || span.end > end);
            after.map(|span| span.start.max(end)..span.end).collect()
        } else {
            conversation
                .generation
                .iter()
                .skip(prompt.generation.len())
                .cloned()
                .collect()
        };
        if spans.is_empty() {
            return Err(Finding::AnswerUnmarked {
                rendered: excerpt_around(&conversation.text, conversation.text.chars().count()),
            });
        }
        return Ok(spans);
    }
    let same = prompt
        .text
        .chars()
        .zip(conversation.text.chars())
        .take_while(|(a, b)| a == b)
        .count();
    Err(Finding::AnswerNotFound {
        position: same,
        prompt: excerpt_around(&prompt.text, same),
        conversation: excerpt_around(&conversation.text, same),
    })
}

/// Returns the part of a text around a character, for a message.
fn excerpt_around(text: &str, place: usize) -> String {
    const BEFORE: usize = 160;
    const AFTER: usize = 160;
    let skipped = place.saturating_sub(BEFORE);
    let part: String = text
        .chars()
        .skip(skipped)
        .take(place - skipped + AFTER)
        .collect();
    let start = if skipped > 0 { "…" } else { "" };
    let end = if text.chars().count() > place + AFTER {
        "…"
    } else {
        ""
    };
    format!("{start}{part}{end}")
}

/// Encodes a text so that no token straddles an end of a span. Returns the ids and the spans in tokens.
fn encode_spans(
    tokenizer: &Tokenizer,
    text: &str,
    spans: &[Range<usize>],
) -> Result<(Vec<u32>, Vec<Range<usize>>), Error> {
    let whole = tokenizer.encode(text, false)?;
    let ids_before = |cut: usize| match text.get(..cut) {
        Some(before) if cut < text.len() => tokenizer.encode(before, false),
        _ => Ok(whole.clone()),
    };
    let mut runs = Vec::new();
    for span in spans {
        let (start, end) = (ids_before(span.start)?, ids_before(span.end)?);
        if !whole.starts_with(&start) || !whole.starts_with(&end) {
            return encode_parts(tokenizer, text, spans);
        }
        runs.push(start.len()..end.len());
    }
    Ok((whole, runs))
}

/// Encodes the spans and the texts between them one by one and joins the ids.
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

/// Returns the end of the EOS that ends the answer's last run: the first EOS in the run, or the one after it if only
/// white space is between. The model then has to write this white space too.
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

/// Lists the tokenizer's EOS tokens for a message.
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
