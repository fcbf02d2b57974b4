//! The loss mask of a prompt and its answer, token by token, with all problems in it.

use std::iter::{once, repeat};
use std::ops::Range;

use crate::encode::{
    AnswerLayout, RenderedPair, answer_findings, answer_spans, eos_inside, eos_tokens,
    prompt_dropped, render_pair, rendered_prompt,
};
use crate::error::Error;
use crate::finding::Finding;
use crate::reasoning::Reasoning;
use crate::records::{Message, Role};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// A token of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaskedToken {
    /// Id of the token.
    pub id: u32,
    /// Bytes of the token; a character may be spread over several tokens.
    pub bytes: Vec<u8>,
    /// Whether the token carries loss.
    pub loss: bool,
}

/// The tokens of a prompt and its answer with their loss mask. Without findings, ids and mask are those of
/// [`encode_conversation`](crate::encode_conversation); with findings, they are as close to them as possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaskReport {
    /// Tokens of prompt and answer.
    pub tokens: Vec<MaskedToken>,
    /// Number of tokens that a model gets as the prompt when it has to answer.
    pub prompt_tokens: usize,
    /// The problems with the mask.
    pub findings: Vec<Finding>,
}

/// Encodes a prompt with its answer as [`encode_conversation`](crate::encode_conversation) does, but returns all
/// problems beside the tokens instead of stopping at the first one.
///
/// # Errors
/// Those of [`ChatTemplate::render`], except reasoning without a place, and those of [`Tokenizer::encode`].
pub fn check_mask(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&str>,
    answer: &Message,
    reasoning: Option<&Reasoning>,
) -> Result<MaskReport, Error> {
    let mut findings = Vec::new();
    if let Some(token) = eos_inside(tokenizer, answer) {
        findings.push(Finding::EosInside { token });
    }
    let mut spoken = answer.clone();
    let rendered = match render_pair(tokenizer, template, messages, tools, answer, reasoning) {
        Err(Error::Untrainable { finding, .. }) if *finding == Finding::ReasoningUnplaced => {
            findings.push(*finding);
            let mut messages = messages.to_vec();
            let all = messages.iter_mut().chain(once(&mut spoken));
            all.for_each(|message| message.reasoning = None);
            render_pair(tokenizer, template, &messages, tools, &spoken, reasoning)?
        }
        other => other?,
    };
    let spans = answer_spans(template, &rendered).unwrap_or_else(|finding| {
        findings.push(finding);
        Vec::new()
    });
    let layout = AnswerLayout::new(tokenizer, &rendered.conversation.text, spans)?;
    let prompt_ids = tokenizer.encode(&rendered.prompt.text, false)?;
    let ids = layout.token_ids.iter().copied();
    let tokens = masked_tokens(tokenizer, ids.zip(layout.mask()));
    if !layout.runs.is_empty() {
        findings.extend(answer_findings(tokenizer, &rendered, &layout, &spoken));
        findings.extend(prompt_under_loss(
            messages,
            &rendered,
            &layout,
            &prompt_ids,
            &tokens,
        ));
        if tokens.iter().all(|token| !token.loss) {
            findings.push(Finding::NothingUnderLoss);
        }
    }
    if prompt_ids.is_empty() {
        findings.push(Finding::PromptEmpty);
    } else {
        findings.extend(prompt_dropped(messages, &rendered.prompt.text));
    }
    Ok(MaskReport {
        tokens,
        prompt_tokens: prompt_ids.len(),
        findings,
    })
}

/// Does the same as [`check_mask`] for an answer whose sampled tokens are known; all of them carry loss. `finished`
/// says whether the answer ended by itself, in which case its last token has to be an EOS.
///
/// # Errors
/// Those of [`prompt_ids`](crate::prompt_ids).
pub fn check_sampled(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&str>,
    sampled: &[u32],
    finished: bool,
    reasoning: Option<&Reasoning>,
) -> Result<MaskReport, Error> {
    let (text, prompt) = rendered_prompt(tokenizer, template, messages, tools, reasoning)?;
    let ids = prompt.iter().copied().zip(repeat(false));
    let ids = ids.chain(sampled.iter().copied().zip(repeat(true)));
    let mut findings = Vec::new();
    match sampled.last() {
        None => findings.push(Finding::NothingUnderLoss),
        Some(last) if finished && !tokenizer.eos_ids().contains(last) => {
            findings.push(Finding::EosWithoutLoss {
                rendered: tokenizer.decode(sampled, false)?,
                eos: eos_tokens(tokenizer),
            });
        }
        Some(_) => {}
    }
    findings.extend(prompt_dropped(messages, &text));
    Ok(MaskReport {
        tokens: masked_tokens(tokenizer, ids),
        prompt_tokens: prompt.len(),
        findings,
    })
}

fn masked_tokens(
    tokenizer: &Tokenizer,
    ids: impl Iterator<Item = (u32, bool)>,
) -> Vec<MaskedToken> {
    ids.map(|(id, loss)| MaskedToken {
        id,
        bytes: tokenizer.token_bytes(id),
        loss,
    })
    .collect()
}

/// Finds the first token of the prompt that carries loss.
///
/// Tokens belong to the prompt as long as they equal the tokens of the rendered prompt. If the rendered conversation
/// does not begin with the rendered prompt, the texts of the prompt's messages are also searched in the conversation,
/// one after another.
fn prompt_under_loss(
    messages: &[Message],
    rendered: &RenderedPair,
    layout: &AnswerLayout,
    prompt_ids: &[u32],
    tokens: &[MaskedToken],
) -> Option<Finding> {
    let conversation = &rendered.conversation.text;
    let same = (prompt_ids.iter().zip(tokens))
        .take_while(|(id, token)| **id == token.id)
        .count();
    let mut prompt_runs: Vec<Range<usize>> = Vec::new();
    prompt_runs.push(0..same);
    if !conversation.starts_with(&rendered.prompt.text) {
        let mut from = 0;
        let texts = messages
            .iter()
            .filter(|message| message.role != Role::Assistant)
            .map(|message| message.content.trim())
            .filter(|text| !text.is_empty());
        for text in texts {
            let Some(at) = conversation.get(from..).and_then(|rest| rest.find(text)) else {
                continue;
            };
            let bytes = from + at..from + at + text.len();
            from = bytes.end;
            let overlaps = |(span, _): &(&Range<usize>, &Range<usize>)| {
                span.start < bytes.end && bytes.start < span.end
            };
            let runs = layout.spans.iter().zip(&layout.runs).filter(overlaps);
            prompt_runs.extend(runs.map(|(_, run)| run.clone()));
        }
    }
    let carries_loss = |t: &usize| tokens.get(*t).is_some_and(|token| token.loss);
    let position = prompt_runs
        .into_iter()
        .flatten()
        .filter(carries_loss)
        .min()?;
    let bytes = tokens.get(position).map(|token| token.bytes.as_slice());
    Some(Finding::PromptUnderLoss {
        position,
        text: String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned(),
    })
}
