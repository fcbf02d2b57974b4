//! Decides what follows from the end of a request: the charge, and whether its call is completed, retried or
//! continued.

use std::sync::Arc;

use potstill_datasets::{Completion, FinishReason};

use crate::http::exchange::RequestOutcome;
use crate::http::settings::ClientSettings;
use crate::http::{
    Call, CallTask, ChargeBasis, Failure, FailureReason, OnBreak, OnLength, Response, TokenUsage,
    wire,
};

/// Largest number of times that an answer is continued.
const MAX_CONTINUATIONS: u32 = 64;

/// Failed connections are not counted as failures of a call, but for each allowed attempt there may be no more than
/// this many.
const FAILED_CONNECTIONS_PER_ATTEMPT: u32 = 16;

/// A call that is not completed.
#[derive(Debug)]
pub(super) struct PendingCall {
    pub(super) call: Arc<Call>,
    /// Number of requests that were sent for the call.
    pub(super) requests: u32,
    /// Endpoint of the last failure; another one is preferred for the next request.
    pub(super) avoid: Option<usize>,
    failures: u32,
    failed_connections: u32,
    continuations: u32,
    partial: Option<PartialAnswer>,
}

/// The beginning of an answer.
#[derive(Debug)]
struct PartialAnswer {
    response: Response,
    /// Whether the answer was cut at the token limit, so that it can be returned as it is. Otherwise its stream broke.
    is_answer: bool,
}

/// Next step of a call.
pub(super) enum NextStep {
    /// The call is completed.
    Complete(Box<(PendingCall, Result<Response, Failure>)>),
    /// The request is repeated after a backoff.
    Retry(Box<PendingCall>),
    /// The rest of the answer is requested at once.
    Continue(Box<PendingCall>),
}

impl PendingCall {
    pub(super) fn new(call: Call) -> PendingCall {
        PendingCall {
            call: Arc::new(call),
            requests: 0,
            avoid: None,
            failures: 0,
            failed_connections: 0,
            continuations: 0,
            partial: None,
        }
    }

    /// Number of failures of any kind, which sets the bound of the backoff.
    pub(super) fn failures(&self) -> u32 {
        self.failures + self.failed_connections
    }

    /// The beginning of the answer that the next request continues.
    pub(super) fn so_far(&self) -> Option<&Completion> {
        self.partial
            .as_ref()
            .map(|partial| &partial.response.completion)
    }

    /// Upper bound of the number of tokens in that beginning.
    pub(super) fn tokens_so_far(&self) -> u64 {
        self.so_far().map_or(0, |c| {
            let counted = u64::from(c.usage.completion_tokens).max(c.tokens.len() as u64);
            if counted > 0 {
                return counted;
            }
            // A token has at least one byte.
            (c.answer.len() + c.reasoning.as_ref().map_or(0, String::len)) as u64
        })
    }

    /// Drops the beginning of an answer whose stream broke. Returns whether there was one.
    pub(super) fn drop_broken(&mut self) -> bool {
        self.partial.take_if(|p| !p.is_answer).is_some()
    }

    /// Takes the beginning of an answer if it can be returned as it is.
    pub(super) fn take_answer(&mut self) -> Option<Response> {
        let partial = self.partial.take()?;
        partial.is_answer.then_some(partial.response)
    }
}

/// Computes the tokens that a request is charged for, and the basis of that charge. Only a refusal before the server
/// worked is free; without a count by the server the whole reservation is charged.
pub(super) fn charge_for(
    outcome: &RequestOutcome,
    reserved: &TokenUsage,
) -> (TokenUsage, ChargeBasis) {
    let (reported, is_implausible) = match &outcome.result {
        Ok(response) => (response.billed, response.is_usage_implausible),
        Err(failure) => (
            failure.billed.or(outcome.billed),
            failure.is_usage_implausible,
        ),
    };
    match reported {
        Some(billed) => (billed, ChargeBasis::Reported),
        None if is_implausible => (*reserved, ChargeBasis::Implausible),
        None if is_free(outcome) => (TokenUsage::default(), ChargeBasis::Nothing),
        None => (*reserved, ChargeBasis::Reserved),
    }
}

fn is_free(outcome: &RequestOutcome) -> bool {
    let Err(failure) = &outcome.result else {
        return false;
    };
    if failure.reason == FailureReason::Connect {
        return true;
    }
    match outcome.status {
        // 503 and 529 say that the server accepts no more work. Other server errors may come after the work.
        Some(status) => (300..500).contains(&status) || status == 503 || status == 529,
        None => failure.reason == FailureReason::Redirected,
    }
}

/// Decides what follows for a call whose request to `endpoint` has ended.
pub(super) fn next_step(
    settings: &ClientSettings,
    mut call: PendingCall,
    outcome: RequestOutcome,
    endpoint: usize,
) -> NextStep {
    match outcome.result {
        Ok(response) => {
            let tokens_before = call.tokens_so_far();
            let response = match call.partial.take() {
                Some(partial) => joined(partial.response, response),
                None => response,
            };
            call.failures = 0;
            after_response(settings, call, response, tokens_before)
        }
        Err(failure) => {
            call.avoid = Some(endpoint);
            if settings.on_break == OnBreak::Continue
                && let Some(so_far) = outcome.so_far
            {
                call.partial = Some(extended(call.partial.take(), so_far));
            }
            after_failure(settings, call, failure)
        }
    }
}

fn after_response(
    settings: &ClientSettings,
    mut call: PendingCall,
    response: Response,
    tokens_before: u64,
) -> NextStep {
    let is_cut = response.completion.finish_reason == FinishReason::Length
        && !matches!(call.call.task, CallTask::Score { .. });
    match settings.on_length {
        OnLength::Drop if is_cut => {
            let mut failure = Failure::new(
                FailureReason::Length,
                "the answer was cut at the token limit, and `on_length` is \"drop\"",
            );
            failure.billed = response.billed;
            NextStep::Complete(Box::new((call, Err(failure))))
        }
        OnLength::Continue if is_cut && call.continuations < MAX_CONTINUATIONS => {
            call.partial = Some(PartialAnswer {
                response,
                is_answer: true,
            });
            // A continuation without a token would be followed by others without one.
            if call.tokens_so_far() <= tokens_before {
                return match call.take_answer() {
                    Some(response) => NextStep::Complete(Box::new((call, Ok(response)))),
                    None => NextStep::Retry(Box::new(call)),
                };
            }
            call.continuations += 1;
            NextStep::Continue(Box::new(call))
        }
        OnLength::Keep | OnLength::Drop | OnLength::Continue => {
            NextStep::Complete(Box::new((call, Ok(response))))
        }
    }
}

fn after_failure(settings: &ClientSettings, mut call: PendingCall, failure: Failure) -> NextStep {
    if failure.reason == FailureReason::Connect {
        call.failed_connections += 1;
    } else {
        call.failures += 1;
    }
    let max_connections = settings
        .attempts
        .saturating_mul(FAILED_CONNECTIONS_PER_ATTEMPT);
    let has_attempts =
        call.failures < settings.attempts && call.failed_connections < max_connections;
    let may_help = failure.reason.is_transient() || failure.reason.concerns_endpoint();
    if may_help && has_attempts {
        return NextStep::Retry(Box::new(call));
    }
    // The context is full, or the server fails to continue the answer: what was paid for is returned.
    let result = call.take_answer().ok_or(failure);
    NextStep::Complete(Box::new((call, result)))
}

/// Joins a response and its continuation.
fn joined(first: Response, rest: Response) -> Response {
    Response {
        completion: wire::joined(first.completion, rest.completion),
        billed: first
            .billed
            .zip(rest.billed)
            .map(|(first, rest)| first.plus(&rest)),
        is_usage_implausible: first.is_usage_implausible || rest.is_usage_implausible,
        prompt_token_ids: first.prompt_token_ids.or(rest.prompt_token_ids),
        prompt_logprobs: first.prompt_logprobs.or(rest.prompt_logprobs),
        served_by: rest.served_by.or(first.served_by),
    }
}

/// Appends what a broken stream gave to the beginning of an answer.
fn extended(before: Option<PartialAnswer>, so_far: Completion) -> PartialAnswer {
    let Some(PartialAnswer {
        mut response,
        is_answer,
    }) = before
    else {
        return PartialAnswer {
            response: Response {
                completion: so_far,
                billed: None,
                is_usage_implausible: false,
                prompt_token_ids: None,
                prompt_logprobs: None,
                served_by: None,
            },
            is_answer: false,
        };
    };
    let finish_reason = response.completion.finish_reason;
    response.completion = wire::joined(response.completion, so_far);
    if is_answer {
        response.completion.finish_reason = finish_reason;
    }
    response.billed = None;
    PartialAnswer {
        response,
        is_answer,
    }
}
