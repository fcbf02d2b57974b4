//! What a student would learn from one answer, token by token, and what is wrong with it.

use std::ops::Range;

use crate::encode::{
    LaidOut, Texts, answer_spans, dropped_reasoning, eos_inside, eos_tokens, lay_out, render_both,
};
use crate::{ChatTemplate, Error, Message, Reasoning, Role, Tokenizer, prompt_ids};

/// A token of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaskedToken {
    /// Its id.
    pub id: u32,
    /// Its bytes; a character may be spread over several tokens.
    pub bytes: Vec<u8>,
    /// Whether it is learned.
    pub loss: bool,
}

/// A conversation as a student would see it. Where nothing is found, ids and mask are those of
/// [`encode_conversation`](crate::encode_conversation); else they are as near to them as can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaskReport {
    /// The tokens of prompt and answer.
    pub tokens: Vec<MaskedToken>,
    /// How many tokens a model is given when it is asked.
    pub prompt_tokens: usize,
    /// What is wrong, each as a sentence with the way out.
    pub findings: Vec<Finding>,
}

/// What is wrong with a mask.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// The answer spells an EOS.
    #[error(
        "the answer contains {token:?}, which ends a sequence, so that all behind it would be lost: remove it from the data"
    )]
    EosInside {
        /// The token's text.
        token: String,
    },
    /// There is reasoning, and neither a template that reads it nor marks to write it with. It was left out.
    #[error(
        "there is reasoning, and the template has no place for it: say how to write it with `reasoning = {{ open = \"<think>\", close = \"</think>\" }}`, or use data without reasoning"
    )]
    ReasoningUnplaced,
    /// The template leaves the answer's reasoning out.
    #[error(
        "the template drops the answer's reasoning: use a template that keeps it, or data without reasoning"
    )]
    ReasoningDropped,
    /// Where the answer begins is not known.
    #[error(
        "it is not known which tokens are the answer's, because the rendered prompt ({prompt:?}) is not the start of the rendered conversation ({conversation:?}): put the assistant's turn between {{% generation %}} and {{% endgeneration %}} in the template"
    )]
    AnswerNotFound {
        /// The prompt's rendering around the place where the two part.
        prompt: String,
        /// The conversation's rendering around that place.
        conversation: String,
    },
    /// The template marks other turns than the answer.
    #[error(
        "the template has {{% generation %}} marks, but none around the answer: put them around every assistant turn, or remove them all"
    )]
    AnswerUnmarked,
    /// No EOS behind the answer is learned.
    #[error(
        "no end-of-sequence token under loss ends the answer, so that a student would never learn to stop (the tokenizer has {eos}): end the assistant's turn with it in the template, next to or within the {{% generation %}} marks if there are any, or name the token that ends it in eos_token_id of generation_config.json"
    )]
    EosWithoutLoss {
        /// The EOS tokens of the tokenizer.
        eos: String,
    },
    /// A token of the prompt is learned.
    #[error(
        "token {position} ({text:?}) is the prompt's, and it is under loss: put the {{% generation %}} marks of the template around assistant turns alone"
    )]
    PromptUnderLoss {
        /// The first such token's place, from 0.
        position: usize,
        /// Its text.
        text: String,
    },
    /// Nothing is learned.
    #[error(
        "no token is under loss, so that nothing would be learned: put what the assistant says between {{% generation %}} and {{% endgeneration %}} in the template, or remove the marks"
    )]
    NothingUnderLoss,
    /// Nothing precedes the answer.
    #[error(
        "nothing precedes the answer, and a model needs at least one token to go on from: begin the template with a token, such as `{{{{ bos_token }}}}`"
    )]
    PromptEmpty,
}

/// Encodes a prompt with its answer as [`encode_conversation`](crate::encode_conversation) does, and instead of
/// stopping at what is wrong gives all of it beside the tokens.
///
/// # Errors
/// Those of [`ChatTemplate::render`] except reasoning without a place, and those of [`Tokenizer::encode`].
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
    let rendered = render_both(tokenizer, template, messages, tools, answer, reasoning);
    let texts = match rendered {
        Err(Error::ReasoningUnplaced { .. }) => {
            findings.push(Finding::ReasoningUnplaced);
            let without = |message: &Message| Message {
                reasoning: None,
                ..message.clone()
            };
            let messages: Vec<Message> = messages.iter().map(without).collect();
            render_both(
                tokenizer,
                template,
                &messages,
                tools,
                &without(answer),
                reasoning,
            )?
        }
        other => other?,
    };
    let spans = match answer_spans(template, &texts) {
        Err(Error::PromptNotPrefix {
            prompt,
            conversation,
            ..
        }) => {
            findings.push(Finding::AnswerNotFound {
                prompt,
                conversation,
            });
            Vec::new()
        }
        Err(Error::GenerationUnmarked { .. }) => {
            findings.push(Finding::AnswerUnmarked);
            Vec::new()
        }
        other => other?,
    };
    let laid = lay_out(tokenizer, &texts.whole.text, spans)?;
    let prompt_ids = tokenizer.encode(&texts.prompt.text, false)?;
    let loss = laid.mask();
    let tokens: Vec<MaskedToken> = (laid.token_ids.iter().zip(&loss))
        .map(|(&id, &loss)| MaskedToken {
            id,
            bytes: tokenizer.token_bytes(id),
            loss,
        })
        .collect();
    if !laid.runs.is_empty() {
        findings.extend(of_answer(tokenizer, &texts, &laid, answer, &findings));
        findings.extend(of_prompt(messages, &texts, &laid, &prompt_ids, &tokens));
        if !loss.contains(&true) {
            findings.push(Finding::NothingUnderLoss);
        }
    }
    if prompt_ids.is_empty() {
        findings.push(Finding::PromptEmpty);
    }
    Ok(MaskReport {
        tokens,
        prompt_tokens: prompt_ids.len(),
        findings,
    })
}

/// The same of an answer whose tokens are known, as sampled: all of them are learned. `finished` says whether
/// it ended by itself, so that the last of them has to be an EOS.
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
    let prompt = prompt_ids(tokenizer, template, messages, tools, reasoning)?;
    let token = |(&id, loss): (&u32, bool)| MaskedToken {
        id,
        bytes: tokenizer.token_bytes(id),
        loss,
    };
    let ids = prompt.iter().zip(std::iter::repeat(false));
    let ids = ids.chain(sampled.iter().zip(std::iter::repeat(true)));
    let ended = sampled
        .last()
        .is_some_and(|id| tokenizer.eos_ids().contains(id));
    let mut findings = Vec::new();
    if sampled.is_empty() {
        findings.push(Finding::NothingUnderLoss);
    } else if finished && !ended {
        findings.push(Finding::EosWithoutLoss {
            eos: eos_tokens(tokenizer),
        });
    }
    Ok(MaskReport {
        tokens: ids.map(token).collect(),
        prompt_tokens: prompt.len(),
        findings,
    })
}

/// Reasoning that is lost, and an end that is not learned.
fn of_answer(
    tokenizer: &Tokenizer,
    texts: &Texts,
    laid: &LaidOut,
    answer: &Message,
    before: &[Finding],
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let dropped = dropped_reasoning(laid.turn(&texts.whole.text), answer);
    if dropped.is_some() && !before.contains(&Finding::ReasoningUnplaced) {
        findings.push(Finding::ReasoningDropped);
    }
    if !laid.ended {
        findings.push(Finding::EosWithoutLoss {
            eos: eos_tokens(tokenizer),
        });
    }
    findings
}

/// The first token of the prompt that is learned. Tokens are the prompt's as long as they are those that a model is
/// asked with. Where the conversation goes another way, the texts of the prompt's messages, found one after another,
/// say more.
fn of_prompt(
    messages: &[Message],
    texts: &Texts,
    laid: &LaidOut,
    prompt_ids: &[u32],
    tokens: &[MaskedToken],
) -> Option<Finding> {
    let whole = &texts.whole.text;
    let same = (prompt_ids.iter().zip(tokens))
        .take_while(|(id, token)| **id == token.id)
        .count();
    let mut asked: Vec<Range<usize>> = Vec::new();
    asked.push(0..same);
    if !whole.starts_with(&texts.prompt.text) {
        let mut from = 0;
        let spoken = messages
            .iter()
            .filter(|message| message.role != Role::Assistant);
        for text in spoken
            .map(|message| message.content.trim())
            .filter(|text| !text.is_empty())
        {
            let Some(at) = whole.get(from..).and_then(|rest| rest.find(text)) else {
                continue;
            };
            let bytes = from + at..from + at + text.len();
            from = bytes.end;
            let within = |(span, _): &(&Range<usize>, &Range<usize>)| {
                span.start < bytes.end && bytes.start < span.end
            };
            let runs = laid.spans.iter().zip(&laid.runs).filter(within);
            asked.extend(runs.map(|(_, run)| run.clone()));
        }
    }
    let learned = |t: &usize| tokens.get(*t).is_some_and(|token| token.loss);
    let position = asked.into_iter().flatten().filter(learned).min()?;
    let bytes = tokens.get(position).map(|token| token.bytes.as_slice());
    Some(Finding::PromptUnderLoss {
        position,
        text: String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned(),
    })
}
