//! A reply as it is put together from one piece or many, and what it has to be in the end.

use potstill_datasets::{Completion, FinishReason, SampledToken, ToolCall, Usage, split_reasoning};

use super::asked::Asked;
use super::refusal;
use super::shape::{Choice, Part, Shape, ToolPiece, finish_reason};
use super::token::Id;
use crate::http::{Failure, FailureReason, PromptLogprobs, Response, TokenUsage};

/// What came.
#[derive(Debug, Clone, Default)]
pub(super) struct Gathered {
    has_choice: bool,
    content: String,
    reasoning: String,
    refusal: String,
    tool_calls: Vec<ToolCall>,
    tokens: Vec<SampledToken>,
    token_ids: Vec<u32>,
    pub(super) finish: Option<String>,
    pub(super) billed: Option<TokenUsage>,
    model: Option<String>,
    fingerprint: Option<String>,
    prompt_token_ids: Option<Vec<u32>>,
    prompt_logprobs: Option<PromptLogprobs>,
}

/// What another shape than OpenAI's says, in the same terms.
pub(super) struct Whole {
    pub(super) content: String,
    pub(super) tokens: Vec<SampledToken>,
    pub(super) finish: Option<String>,
    pub(super) billed: Option<TokenUsage>,
    pub(super) prompt_logprobs: Option<PromptLogprobs>,
}

impl From<Whole> for Gathered {
    fn from(whole: Whole) -> Gathered {
        Gathered {
            has_choice: true,
            content: whole.content,
            tokens: whole.tokens,
            finish: whole.finish,
            billed: whole.billed,
            prompt_logprobs: whole.prompt_logprobs,
            ..Gathered::default()
        }
    }
}

impl Gathered {
    /// Takes a whole reply or a piece.
    pub(super) fn take<L: Into<Vec<SampledToken>>>(
        &mut self,
        shape: Shape<'_, L>,
    ) -> Result<(), Failure> {
        // A usage on the way counts what was sent so far; the last one stands.
        let timed = shape.timings.and_then(|timings| timings.billed());
        let counted = shape.usage.and_then(|usage| usage.billed());
        self.billed = counted.or(timed).or(self.billed);
        if let Some(error) = shape.error.filter(|error| !error.is_null()) {
            return Err(refusal::inside(&error));
        }
        if let Some(model) = shape.model {
            self.model.get_or_insert_with(|| model.0.into_owned());
        }
        if let Some(print) = shape.system_fingerprint {
            self.fingerprint.get_or_insert_with(|| print.0.into_owned());
        }
        self.take_prompt(shape.prompt_token_ids, shape.prompt_logprobs);
        for choice in shape.choices.into_iter().flatten() {
            // One is asked for; what a server gives beyond is its own.
            if choice.index.unwrap_or_default() == 0 {
                self.take_choice(choice)?;
            }
        }
        Ok(())
    }

    fn take_prompt(
        &mut self,
        ids: Option<Vec<Id>>,
        logprobs: Option<Vec<Option<super::token::ById>>>,
    ) {
        if let Some(ids) = ids {
            self.prompt_token_ids = Some(ids.into_iter().map(|id| id.0).collect());
        }
        if let Some(positions) = logprobs {
            let positions = positions
                .into_iter()
                .map(|position| position.map(|by| by.0));
            self.prompt_logprobs = Some(positions.collect());
        }
    }

    fn take_choice<L: Into<Vec<SampledToken>>>(
        &mut self,
        choice: Choice<'_, L>,
    ) -> Result<(), Failure> {
        self.has_choice = true;
        if let Some(error) = choice.error.filter(|error| !error.is_null()) {
            return Err(refusal::inside(&error));
        }
        self.take_prompt(choice.prompt_token_ids, choice.prompt_logprobs);
        for part in [choice.message, choice.delta].into_iter().flatten() {
            self.take_part(part);
        }
        if let Some(text) = choice.text {
            self.content.push_str(&text.0);
        }
        if let Some(logprobs) = choice.logprobs {
            self.tokens.extend(logprobs.into());
        }
        self.token_ids
            .extend(choice.token_ids.into_iter().flatten().map(|id| id.0));
        if let Some(finish) = choice.finish_reason.filter(|finish| !finish.0.is_empty()) {
            self.finish = Some(finish.0.into_owned());
        }
        Ok(())
    }

    fn take_part(&mut self, part: Part<'_>) {
        if let Some(text) = part.content {
            self.content.push_str(&text.0);
        }
        // Where both are there, they say the same.
        let reasoning = part.reasoning_content.filter(|text| !text.0.is_empty());
        if let Some(text) = reasoning.or(part.reasoning) {
            self.reasoning.push_str(&text.0);
        }
        if let Some(text) = part.refusal {
            self.refusal.push_str(&text.0);
        }
        for (at, piece) in part.tool_calls.into_iter().flatten().enumerate() {
            self.take_tool(at, piece);
        }
    }

    /// The first piece of a call has its name and id, later ones have more of its arguments.
    fn take_tool(&mut self, at: usize, piece: ToolPiece) {
        let known = |call: &ToolCall| piece.id.is_some() && call.id == piece.id;
        let index = piece
            .index
            .or_else(|| self.tool_calls.iter().position(known));
        let index = index.unwrap_or(at).min(self.tool_calls.len());
        if index == self.tool_calls.len() {
            self.tool_calls.push(ToolCall {
                id: None,
                name: String::new(),
                arguments: String::new(),
            });
        }
        let Some(call) = self.tool_calls.get_mut(index) else {
            return;
        };
        call.id = call.id.take().or(piece.id.filter(|id| !id.is_empty()));
        if let Some(function) = piece.function {
            if call.name.is_empty() {
                call.name = function.name.unwrap_or_default();
            }
            call.arguments.push_str(&function.arguments);
        }
    }

    /// The answer as far as it came; `None` where nothing came that can be gone on from.
    pub(super) fn so_far(&self, asked: &Asked) -> Option<Completion> {
        let has_text = !self.content.is_empty() || !self.reasoning.is_empty();
        if asked.has_stops || !has_text || !self.tool_calls.is_empty() {
            return None;
        }
        let mut gathered = self.clone();
        gathered.name_ids().ok()?;
        // Tokens may be ahead of the text by a part of a character.
        let text = gathered.content.len() + gathered.reasoning.len();
        let mut bytes: usize = gathered.tokens.iter().map(|token| token.bytes.len()).sum();
        let is_chat_with_bytes = gathered.tokens.iter().all(|token| !token.bytes.is_empty());
        while is_chat_with_bytes && self.reasoning.is_empty() && bytes > text {
            bytes -= gathered.tokens.pop()?.bytes.len();
        }
        Some(gathered.completion(asked, FinishReason::Length))
    }

    /// What it is in the end.
    pub(super) fn reply(mut self, asked: &Asked) -> Result<Response, Failure> {
        let billed = self.billed;
        self.checked(asked).map_err(|failure| Failure {
            status: failure.status.or(Some(200)),
            billed: failure.billed.or(billed),
            ..failure
        })?;
        let finish = finish_reason(self.finish.as_deref());
        let served_by = [self.model.take(), self.fingerprint.take()];
        let served_by: Vec<String> = served_by.into_iter().flatten().collect();
        let prompt_token_ids = self.prompt_token_ids.take();
        let prompt_logprobs = self.prompt_logprobs.take();
        let mut completion = self.completion(asked, finish);
        if let (None, Some(ids)) = (billed, &prompt_token_ids) {
            completion.usage.prompt_tokens = u32::try_from(ids.len()).unwrap_or(u32::MAX);
        }
        Ok(Response {
            completion,
            billed,
            prompt_token_ids,
            prompt_logprobs,
            served_by: (!served_by.is_empty()).then(|| served_by.join(" ")),
        })
    }

    fn checked(&mut self, asked: &Asked) -> Result<(), Failure> {
        if !self.has_choice {
            return Err(Failure::new(
                FailureReason::Empty,
                "the reply has no choice (`choices`)",
            ));
        }
        // vLLM's and SGLang's, DeepSeek's, OpenRouter's.
        if let Some(finish @ ("abort" | "insufficient_system_resource" | "error")) =
            self.finish.as_deref()
        {
            let reason = match finish {
                "error" => FailureReason::ErrorInside,
                _ => FailureReason::Overloaded,
            };
            return Err(Failure::new(
                reason,
                format!(
                    "the server gave up in the middle of the answer (`finish_reason` is {finish})"
                ),
            ));
        }
        if let Some(token_ids) = &asked.score {
            return self.check_prompt(token_ids);
        }
        self.check_text()?;
        self.name_ids().map_err(bad_logprobs)?;
        match asked.logprobs {
            Some(top) => self.check_tokens(top).map_err(bad_logprobs)?,
            None => self.tokens.clear(),
        }
        Ok(())
    }

    fn check_text(&self) -> Result<(), Failure> {
        let texts = [&self.content, &self.reasoning];
        if texts.iter().any(|text| !text.is_empty()) || !self.tool_calls.is_empty() {
            return Ok(());
        }
        if !self.refusal.is_empty() {
            return Err(Failure::new(
                FailureReason::ContentFilter,
                refusal::shown(&self.refusal),
            ));
        }
        Err(match self.finish.as_deref() {
            Some("content_filter") => Failure::new(
                FailureReason::ContentFilter,
                "the server withheld the answer (`finish_reason` is content_filter)",
            ),
            // Asking again would cost the same for nothing.
            Some("length" | "max_tokens") => Failure::new(
                FailureReason::Length,
                "the limit on tokens was reached before any text, in reasoning that is not shown: raise max_tokens",
            ),
            _ => Failure::new(
                FailureReason::Empty,
                "the choice has neither text nor reasoning nor a tool call",
            ),
        })
    }

    fn check_prompt(&self, token_ids: &[u32]) -> Result<(), Failure> {
        let Some(positions) = &self.prompt_logprobs else {
            return Err(bad_logprobs(
                "the reply has no log-probabilities of the prompt".to_owned(),
            ));
        };
        if positions.len() != token_ids.len() {
            return Err(bad_logprobs(format!(
                "{} positions of log-probabilities for a text of {} tokens",
                positions.len(),
                token_ids.len()
            )));
        }
        match &self.prompt_token_ids {
            Some(ids) if ids != token_ids => Err(bad_logprobs(
                "the server scored other tokens than those it was sent".to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// Gives the tokens the ids that came beside them.
    fn name_ids(&mut self) -> Result<(), String> {
        if self.token_ids.is_empty() || self.tokens.is_empty() {
            return Ok(());
        }
        if self.token_ids.len() != self.tokens.len() {
            return Err(format!(
                "{} log-probabilities for {} tokens",
                self.tokens.len(),
                self.token_ids.len()
            ));
        }
        for (token, &id) in self.tokens.iter_mut().zip(&self.token_ids) {
            if token.id.is_some_and(|own| own != id) {
                return Err(format!(
                    "log-probabilities of token {:?} beside token {id}",
                    token.id
                ));
            }
            token.id = Some(id);
        }
        Ok(())
    }

    /// Log-probabilities are finite and at most 0 already; whether they are there, for every token, is told here.
    fn check_tokens(&self, top: u32) -> Result<(), String> {
        if !self.tool_calls.is_empty() {
            // Servers take the tokens of calls out, or give none.
            return Ok(());
        }
        if self.tokens.is_empty() {
            return Err("the reply has none (`logprobs`), though they were asked for".to_owned());
        }
        if top > 0 && self.tokens.iter().all(|token| token.top.is_empty()) {
            return Err(
                "the reply has those of sampled tokens alone (no `top_logprobs`)".to_owned(),
            );
        }
        let count = self.tokens.len() as u64;
        if let Some(billed) = self.billed {
            // The token that ends an answer has none on some servers.
            let visible = billed.completion_tokens - billed.reasoning_tokens;
            if count + 1 < visible {
                return Err(format!("{count} for {visible} tokens"));
            }
        }
        let is_exact = !self.content.contains('\u{fffd}')
            && self.tokens.iter().all(|token| !token.bytes.is_empty());
        let bytes: usize = self.tokens.iter().map(|token| token.bytes.len()).sum();
        let text = self.content.trim().len();
        if is_exact && bytes < text {
            return Err(format!(
                "{count} tokens of {bytes} bytes for a text of {text}"
            ));
        }
        Ok(())
    }

    fn completion(self, asked: &Asked, finish_reason: FinishReason) -> Completion {
        let (reasoning, answer) = if self.reasoning.trim().is_empty() {
            split_reasoning(&self.content, &asked.marks)
        } else {
            // What stands between the marks and the texts belongs to the marks.
            let reasoning = self.reasoning.trim_matches(['\r', '\n']).to_owned();
            let answer = self.content.trim_start_matches(['\r', '\n']).to_owned();
            (Some(reasoning), answer)
        };
        let counted = TokenUsage {
            completion_tokens: self.tokens.len().max(self.token_ids.len()) as u64,
            ..TokenUsage::default()
        };
        let billed = self.billed.unwrap_or(counted);
        Completion {
            prompt_id: asked.prompt_id.clone(),
            sample_index: asked.sample_index,
            reasoning,
            answer,
            tool_calls: self.tool_calls,
            finish_reason,
            usage: Usage {
                prompt_tokens: u32::try_from(billed.prompt_tokens).unwrap_or(u32::MAX),
                completion_tokens: u32::try_from(billed.completion_tokens).unwrap_or(u32::MAX),
            },
            tokens: self.tokens,
            provenance: 0,
        }
    }
}

pub(super) fn bad_logprobs(why: String) -> Failure {
    let why = why.replace(super::token::ABOUT_LOGPROBS, "");
    Failure {
        status: Some(200),
        ..Failure::new(
            FailureReason::BadLogprobs,
            refusal::shown(&format!("log-probabilities: {why}")),
        )
    }
}
