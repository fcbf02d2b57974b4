//! Builds a response from one or more pieces, and checks it.

use potstill_datasets::{Completion, FinishReason, SampledToken, ToolCall, Usage, split_reasoning};

use super::errors::{bad_logprobs, inside, printable};
use super::expected::Expected;
use super::json::{
    ChoiceJson, MessageJson, ResponseJson, ToolCallJson, finish_reason, timings, usage,
};
use super::token::{TokenId, TopById};
use crate::http::{Failure, FailureReason, PromptLogprobs, Response, TokenUsage};

/// A response under construction.
#[derive(Debug, Clone, Default)]
pub(super) struct ResponseBuilder {
    pub(super) has_choice: bool,
    pub(super) content: String,
    pub(super) reasoning: String,
    pub(super) refusal: String,
    pub(super) tool_calls: Vec<ToolCall>,
    pub(super) tokens: Vec<SampledToken>,
    pub(super) token_ids: Vec<u32>,
    pub(super) finish: Option<String>,
    pub(super) billed: Option<TokenUsage>,
    /// Whether the server's last count cannot be right.
    pub(super) is_usage_implausible: bool,
    pub(super) model: Option<String>,
    pub(super) fingerprint: Option<String>,
    pub(super) prompt_token_ids: Option<Vec<u32>>,
    pub(super) prompt_logprobs: Option<PromptLogprobs>,
}

impl ResponseBuilder {
    /// Adds a whole response or a piece.
    pub(super) fn add<L: Into<Vec<SampledToken>>>(
        &mut self,
        expected: &Expected,
        json: ResponseJson<'_, L>,
    ) -> Result<(), Failure> {
        // A usage in the middle of a stream counts the tokens so far; the last one is final.
        let counted = usage(json.usage.as_ref()).or_else(|| timings(json.timings.as_ref()));
        if let Some(counted) = counted {
            self.billed = expected.believed(counted);
            self.is_usage_implausible = self.billed.is_none();
        }
        if let Some(error) = json.error.filter(|error| !error.is_null()) {
            return Err(inside(&error));
        }
        if let Some(model) = json.model {
            self.model.get_or_insert_with(|| model.0.into_owned());
        }
        if let Some(print) = json.system_fingerprint {
            self.fingerprint.get_or_insert_with(|| print.0.into_owned());
        }
        self.add_prompt(json.prompt_token_ids, json.prompt_logprobs);
        for choice in json.choices.into_iter().flatten() {
            // One choice was requested; any others are ignored.
            if choice.index.unwrap_or_default() == 0 {
                self.add_choice(choice)?;
            }
        }
        Ok(())
    }

    fn add_prompt(&mut self, ids: Option<Vec<TokenId>>, logprobs: Option<Vec<Option<TopById>>>) {
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

    fn add_choice<L: Into<Vec<SampledToken>>>(
        &mut self,
        choice: ChoiceJson<'_, L>,
    ) -> Result<(), Failure> {
        self.has_choice = true;
        if let Some(error) = choice.error.filter(|error| !error.is_null()) {
            return Err(inside(&error));
        }
        self.add_prompt(choice.prompt_token_ids, choice.prompt_logprobs);
        for part in [choice.message, choice.delta].into_iter().flatten() {
            self.add_message(part);
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

    fn add_message(&mut self, part: MessageJson<'_>) {
        if let Some(text) = part.content {
            self.content.push_str(&text.0);
        }
        // If both fields are present, they have the same text.
        let reasoning = part.reasoning_content.filter(|text| !text.0.is_empty());
        if let Some(text) = reasoning.or(part.reasoning) {
            self.reasoning.push_str(&text.0);
        }
        if let Some(text) = part.refusal {
            self.refusal.push_str(&text.0);
        }
        for (at, piece) in part.tool_calls.into_iter().flatten().enumerate() {
            self.add_tool_call(at, piece);
        }
    }

    /// Adds a piece of a tool call: the first piece has name and id, later ones have more of the arguments.
    fn add_tool_call(&mut self, at: usize, piece: ToolCallJson) {
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

    /// The answer so far; `None` if there is nothing that can be continued.
    pub(super) fn so_far(&self, expected: &Expected) -> Option<Completion> {
        let has_text = !self.content.is_empty() || !self.reasoning.is_empty();
        if expected.has_stops || !has_text || !self.tool_calls.is_empty() {
            return None;
        }
        let mut builder = self.clone();
        builder.set_ids().ok()?;
        // The tokens may be ahead of the text by a part of a character.
        let text = builder.content.len() + builder.reasoning.len();
        let mut bytes: usize = builder.tokens.iter().map(|token| token.bytes.len()).sum();
        let is_chat_with_bytes = builder.tokens.iter().all(|token| !token.bytes.is_empty());
        while is_chat_with_bytes && self.reasoning.is_empty() && bytes > text {
            bytes -= builder.tokens.pop()?.bytes.len();
        }
        Some(builder.completion(expected, FinishReason::Length))
    }

    /// Checks the response and returns it.
    pub(super) fn finish(mut self, expected: &Expected) -> Result<Response, Failure> {
        self.check_usage(expected);
        let billed = self.billed;
        let is_usage_implausible = self.is_usage_implausible;
        self.check(expected).map_err(|failure| Failure {
            status: failure.status.or(Some(200)),
            billed: failure.billed.or(billed),
            is_usage_implausible,
            ..failure
        })?;
        let finish = finish_reason(self.finish.as_deref());
        let served_by = [self.model.take(), self.fingerprint.take()];
        let served_by: Vec<String> = served_by.into_iter().flatten().collect();
        let prompt_token_ids = self.prompt_token_ids.take();
        let prompt_logprobs = self.prompt_logprobs.take();
        let mut completion = self.completion(expected, finish);
        if let (None, Some(ids)) = (billed, &prompt_token_ids) {
            completion.usage.prompt_tokens = u32::try_from(ids.len()).unwrap_or(u32::MAX);
        }
        Ok(Response {
            completion,
            billed,
            is_usage_implausible,
            prompt_token_ids,
            prompt_logprobs,
            served_by: (!served_by.is_empty()).then(|| served_by.join(" ")),
        })
    }

    /// Drops a usage of 0 tokens for a prompt or an answer that has some.
    fn check_usage(&mut self, expected: &Expected) {
        let is_answered =
            expected.score.is_none() && !(self.content.is_empty() && self.reasoning.is_empty());
        let lacks = |usage: &TokenUsage| {
            usage.prompt_tokens == 0 || (is_answered && usage.completion_tokens == 0)
        };
        if self.billed.as_ref().is_some_and(lacks) {
            self.billed = None;
            self.is_usage_implausible = true;
        }
    }

    fn check(&mut self, expected: &Expected) -> Result<(), Failure> {
        if !self.has_choice {
            return Err(Failure::new(
                FailureReason::Empty,
                "the response has no choice (`choices`)",
            ));
        }
        // Reasons of vLLM and SGLang, of DeepSeek, and of OpenRouter.
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
                    "the server stopped in the middle of the answer (`finish_reason` is {finish})"
                ),
            ));
        }
        if let Some(token_ids) = &expected.score {
            return self.check_prompt(token_ids);
        }
        self.check_text()?;
        self.set_ids().map_err(|why| bad_logprobs(&why))?;
        match expected.logprobs {
            Some(top) => self.check_tokens(top).map_err(|why| bad_logprobs(&why))?,
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
                printable(&self.refusal),
            ));
        }
        Err(match self.finish.as_deref() {
            Some("content_filter") => Failure::new(
                FailureReason::ContentFilter,
                "the server withheld the answer (`finish_reason` is content_filter)",
            ),
            // A retry would cost the same and have the same result.
            Some("length" | "max_tokens") => Failure::new(
                FailureReason::Length,
                "the token limit was reached before any text, in reasoning that is not shown (raise max_tokens)",
            ),
            _ => Failure::new(
                FailureReason::Empty,
                "the choice has neither text nor reasoning nor a tool call",
            ),
        })
    }

    fn check_prompt(&self, token_ids: &[u32]) -> Result<(), Failure> {
        let Some(positions) = &self.prompt_logprobs else {
            return Err(bad_logprobs("the response has none for the prompt"));
        };
        if positions.len() != token_ids.len() {
            return Err(bad_logprobs(&format!(
                "there are {} positions for a text of {} tokens",
                positions.len(),
                token_ids.len()
            )));
        }
        match &self.prompt_token_ids {
            Some(ids) if ids != token_ids => Err(bad_logprobs(
                "the server scored other tokens than those that were sent",
            )),
            _ => Ok(()),
        }
    }

    /// Sets the ids of the tokens from the separate list of ids.
    fn set_ids(&mut self) -> Result<(), String> {
        if self.token_ids.is_empty() || self.tokens.is_empty() {
            return Ok(());
        }
        if self.token_ids.len() != self.tokens.len() {
            return Err(format!(
                "there are {} for {} tokens",
                self.tokens.len(),
                self.token_ids.len()
            ));
        }
        for (token, &id) in self.tokens.iter_mut().zip(&self.token_ids) {
            if token.id.is_some_and(|own| own != id) {
                return Err(format!(
                    "token {:?} has another id, {id}, in `token_ids`",
                    token.id
                ));
            }
            token.id = Some(id);
        }
        Ok(())
    }

    /// Checks that every token has log-probabilities. Parsing has checked that they are finite and at most 0.
    fn check_tokens(&self, top: u32) -> Result<(), String> {
        if !self.tool_calls.is_empty() {
            // Servers omit the tokens of tool calls, or give no tokens at all.
            return Ok(());
        }
        if self.tokens.is_empty() {
            return Err(
                "the response has none (`logprobs`), although they were requested".to_owned(),
            );
        }
        if top > 0 && self.tokens.iter().all(|token| token.top.is_empty()) {
            return Err(
                "the response has only those of sampled tokens (no `top_logprobs`)".to_owned(),
            );
        }
        let count = self.tokens.len() as u64;
        if let Some(billed) = self.billed {
            // On some servers the token that ends an answer has none.
            let visible = billed.completion_tokens - billed.reasoning_tokens;
            if count + 1 < visible {
                return Err(format!("there are {count} for {visible} tokens"));
            }
        }
        let is_exact = !self.content.contains('\u{fffd}')
            && self.tokens.iter().all(|token| !token.bytes.is_empty());
        let bytes: usize = self.tokens.iter().map(|token| token.bytes.len()).sum();
        let text = self.content.trim().len();
        if is_exact && bytes < text {
            return Err(format!(
                "there are {count} tokens of {bytes} bytes for a text of {text} bytes"
            ));
        }
        Ok(())
    }

    fn completion(self, expected: &Expected, finish_reason: FinishReason) -> Completion {
        let (reasoning, answer) = if self.reasoning.trim().is_empty() {
            split_reasoning(&self.content, &expected.marks)
        } else {
            // Line ends between marks and texts belong to the marks.
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
            prompt_id: expected.prompt_id.clone(),
            sample_index: expected.sample_index,
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
