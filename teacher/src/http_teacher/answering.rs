//! Answers from a server.

use std::cell::RefCell;
use std::ops::ControlFlow;

use potstill_datasets::{Answer, Entry, Failed};

use super::inspection::Inspection;
use super::setup::HttpTeacher;
use crate::Error;
use crate::http::{
    self, Api, Call, CallEvent, CallTask, CollectionEnd, CompletedCall, FailureReason,
};
use crate::protocol::{AnswerRequest, CompletedEntries, Exchange};

impl HttpTeacher {
    pub(crate) fn answer(
        &self,
        exchange: Exchange<'_, AnswerRequest, Answer>,
    ) -> Result<CollectionEnd, Error> {
        let log = self.log()?;
        let client = self.client_for(self.client.request.clone(), log.spent());
        // Requests that fail before they are sent; they complete with the next group.
        let unsent: RefCell<CompletedEntries<Answer>> = RefCell::default();
        let mut inspection = Inspection::default();
        let end = http::collect(
            &client,
            &mut || {
                while let Some(request) = (exchange.next)()? {
                    match self.call(&request)? {
                        Ok(call) => return Ok(Some(call)),
                        Err(failed) => unsent.borrow_mut().push((request.ordinal, Err(failed))),
                    }
                }
                Ok(None)
            },
            &|reservation| log.sent(reservation),
            &mut |events| {
                let (mut entries, mut fault) = (unsent.take(), None);
                for event in events {
                    match event {
                        CallEvent::Attempt(attempt) => log.ended(attempt)?,
                        CallEvent::Completed(completed) => {
                            fault = fault.or(inspection.fault(self, &completed)?);
                            entries.push((completed.call.number as u32, entry(*completed)));
                        }
                    }
                }
                log.sync()?;
                let flow = (exchange.completed)(entries)?;
                Ok(fault.map_or(flow, ControlFlow::Break))
            },
            exchange.progress,
            exchange.stop,
        )?;
        // The end of the collection has its own reason.
        let _ = (exchange.completed)(unsent.take()).map_err(Error::completed_entries)?;
        Ok(end)
    }

    /// The call for a request, or the failure of a prompt that cannot fit into the context, which costs nothing.
    fn call(&self, request: &AnswerRequest) -> Result<Result<Call, Failed>, Error> {
        let prompt = &request.prompt;
        let ids = self.prompt_ids(prompt)?;
        if let Some(message) = self.too_long(ids.as_deref()) {
            return Ok(Err(Failed {
                prompt_id: prompt.id.clone(),
                sample_index: request.sample_index,
                reason: FailureReason::ContextTooLong.name(),
                message,
            }));
        }
        let max_prompt_tokens = self.max_prompt_tokens(prompt, ids.as_deref());
        Ok(Ok(Call {
            number: u64::from(request.ordinal),
            prompt: prompt.clone(),
            sample_index: request.sample_index,
            task: match (self.client.request.api, ids) {
                (Api::Completions, Some(ids)) => CallTask::AnswerIds(ids.to_vec()),
                _ => CallTask::Answer,
            },
            max_prompt_tokens,
        }))
    }

    pub(super) fn too_long(&self, ids: Option<&[u32]>) -> Option<String> {
        let (tokens, context) = (ids?.len() as u64, u64::from(self.context?));
        let answer = u64::from(self.client.request.max_tokens.unwrap_or(1));
        (tokens + answer > context).then(|| {
            format!("the prompt has {tokens} tokens, and with {answer} for the answer that is more than the context of {context}")
        })
    }
}

fn entry(completed: CompletedCall) -> Entry<Answer> {
    match completed.result {
        Ok(response) => Ok(Answer {
            completion: response.completion,
            signal: None,
        }),
        Err(failure) => Err(Failed {
            prompt_id: completed.call.prompt.id.clone(),
            sample_index: completed.call.sample_index,
            reason: failure.reason.name(),
            message: failure.message,
        }),
    }
}
