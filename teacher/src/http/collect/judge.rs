//! What the end of a request means: what it is charged, and what becomes of its call.

use std::sync::Arc;

use potstill_datasets::{Completion, FinishReason};

use super::Settings;
use crate::http::ask::Over;
use crate::http::{Billed, Call, Charge, Failure, OnBreak, OnLength, Reason, Reply, Task, wire};

/// An answer is made longer at most so often.
const CONTINUATIONS: u32 = 64;

/// Connections that do not come about are no failure of a call, but for each attempt not more than this many.
const UNREACHABLE_PER_ATTEMPT: u32 = 16;

/// A call that has not landed.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) call: Arc<Call>,
    /// Requests sent for it.
    pub(super) requests: u32,
    /// The endpoint that failed last, which another is preferred to.
    pub(super) avoid: Option<usize>,
    failures: u32,
    unreachable: u32,
    continuations: u32,
    partial: Option<Partial>,
}

/// The beginning of an answer.
#[derive(Debug)]
struct Partial {
    reply: Reply,
    /// Whether it was cut at the limit, and can land as it is; otherwise it broke.
    is_answer: bool,
}

/// What becomes of a call.
pub(super) enum Fate {
    /// It is over.
    Land(Box<(Open, Result<Reply, Failure>)>),
    /// It is asked for again after a wait.
    Again(Box<Open>),
    /// Its answer is made longer.
    GoOn(Box<Open>),
}

impl Open {
    pub(super) fn new(call: Call) -> Open {
        Open {
            call: Arc::new(call),
            requests: 0,
            avoid: None,
            failures: 0,
            unreachable: 0,
            continuations: 0,
            partial: None,
        }
    }

    /// Failures of any kind, for the wait before the next request.
    pub(super) fn failures(&self) -> u32 {
        self.failures + self.unreachable
    }

    /// What the next request goes on from.
    pub(super) fn so_far(&self) -> Option<&Completion> {
        self.partial.as_ref().map(|p| &p.reply.completion)
    }

    /// At most so many tokens are in what the next request goes on from.
    pub(super) fn tokens_so_far(&self) -> u64 {
        self.so_far().map_or(0, |c| {
            let counted = u64::from(c.usage.completion_tokens).max(c.tokens.len() as u64);
            if counted > 0 {
                return counted;
            }
            // A token has a byte at least.
            (c.answer.len() + c.reasoning.as_ref().map_or(0, String::len)) as u64
        })
    }

    /// Forgets the beginning of an answer that broke; whether there was one.
    pub(super) fn drop_broken(&mut self) -> bool {
        self.partial.take_if(|p| !p.is_answer).is_some()
    }

    /// The answer as long as it is, if it can land.
    pub(super) fn keep(&mut self) -> Option<Reply> {
        self.partial.take().filter(|p| p.is_answer).map(|p| p.reply)
    }
}

/// What a request is billed, and how that is known. Only a refusal before the server worked is free; what it did
/// not count is charged as reserved.
pub(super) fn charged(over: &Over, most: &Billed) -> (Billed, Charge) {
    let told = match &over.outcome {
        Ok(reply) => reply.billed,
        Err(failure) => failure.billed.or(over.billed),
    };
    match told {
        Some(billed) => (billed, Charge::Reported),
        None if is_free(over) => (Billed::default(), Charge::Nothing),
        None => (*most, Charge::Reserved),
    }
}

fn is_free(over: &Over) -> bool {
    let Err(failure) = &over.outcome else {
        return false;
    };
    if failure.reason == Reason::Connect {
        return true;
    }
    match over.status {
        // 503 and 529 say that the server takes no more work; other failures of a server may come after it.
        Some(status) => (300..500).contains(&status) || status == 503 || status == 529,
        None => failure.reason == Reason::Redirected,
    }
}

/// What becomes of a call now that a request for it is over.
pub(super) fn judge(settings: &Settings, mut open: Open, over: Over, endpoint: usize) -> Fate {
    match over.outcome {
        Ok(reply) => {
            let had = open.tokens_so_far();
            let reply = match open.partial.take() {
                Some(partial) => longer(partial.reply, reply),
                None => reply,
            };
            open.failures = 0;
            judge_answer(settings, open, reply, had)
        }
        Err(failure) => {
            open.avoid = Some(endpoint);
            if settings.on_break == OnBreak::Continue
                && let Some(so_far) = over.so_far
            {
                open.partial = Some(extended(open.partial.take(), so_far));
            }
            judge_failure(settings, open, failure)
        }
    }
}

fn judge_answer(settings: &Settings, mut open: Open, reply: Reply, had: u64) -> Fate {
    let is_cut = reply.completion.finish_reason == FinishReason::Length
        && !matches!(open.call.task, Task::Score { .. });
    match settings.on_length {
        OnLength::Drop if is_cut => {
            let mut failure = Failure::new(
                Reason::Length,
                "the answer was cut at the limit on tokens, and such answers are dropped",
            );
            failure.billed = reply.billed;
            Fate::Land(Box::new((open, Err(failure))))
        }
        OnLength::Continue if is_cut && open.continuations < CONTINUATIONS => {
            open.partial = Some(Partial {
                reply,
                is_answer: true,
            });
            // A rest without a token would come again and again.
            if open.tokens_so_far() <= had {
                let reply = open.keep();
                return match reply {
                    Some(reply) => Fate::Land(Box::new((open, Ok(reply)))),
                    None => Fate::Again(Box::new(open)),
                };
            }
            open.continuations += 1;
            Fate::GoOn(Box::new(open))
        }
        OnLength::Keep | OnLength::Drop | OnLength::Continue => {
            Fate::Land(Box::new((open, Ok(reply))))
        }
    }
}

fn judge_failure(settings: &Settings, mut open: Open, failure: Failure) -> Fate {
    if failure.reason == Reason::Connect {
        open.unreachable += 1;
    } else {
        open.failures += 1;
    }
    let may_help = failure.reason.is_transient() || failure.reason.is_endpoints();
    let has_tries = open.failures < settings.attempts
        && open.unreachable < settings.attempts.saturating_mul(UNREACHABLE_PER_ATTEMPT);
    if may_help && has_tries {
        return Fate::Again(Box::new(open));
    }
    // The context is full, or the server fails at what would have made it longer: what there is was paid for.
    let outcome = open.keep().ok_or(failure);
    Fate::Land(Box::new((open, outcome)))
}

/// A reply and the rest of it.
fn longer(first: Reply, rest: Reply) -> Reply {
    Reply {
        completion: wire::joined(first.completion, rest.completion),
        billed: match (first.billed, rest.billed) {
            (Some(a), Some(b)) => Some(Billed {
                prompt_tokens: a.prompt_tokens + b.prompt_tokens,
                cached_tokens: a.cached_tokens + b.cached_tokens,
                completion_tokens: a.completion_tokens + b.completion_tokens,
                reasoning_tokens: a.reasoning_tokens + b.reasoning_tokens,
            }),
            _ => None,
        },
        prompt_token_ids: first.prompt_token_ids.or(rest.prompt_token_ids),
        prompt_logprobs: first.prompt_logprobs.or(rest.prompt_logprobs),
        served_by: rest.served_by.or(first.served_by),
    }
}

/// The beginning of an answer with what came of a stream that broke.
fn extended(before: Option<Partial>, so_far: Completion) -> Partial {
    let Some(Partial {
        mut reply,
        is_answer,
    }) = before
    else {
        return Partial {
            reply: Reply {
                completion: so_far,
                billed: None,
                prompt_token_ids: None,
                prompt_logprobs: None,
                served_by: None,
            },
            is_answer: false,
        };
    };
    let finish_reason = reply.completion.finish_reason;
    reply.completion = wire::joined(reply.completion, so_far);
    if is_answer {
        reply.completion.finish_reason = finish_reason;
    }
    reply.billed = None;
    Partial { reply, is_answer }
}
