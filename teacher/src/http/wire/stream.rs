//! Replies in pieces: server-sent events, <https://html.spec.whatwg.org/multipage/server-sent-events.html>.

use potstill_datasets::Completion;

use super::asked::Asked;
use super::gathered::Gathered;
use super::reply;
use crate::http::{Call, Failure, FailureReason, RequestSettings, Response, TokenUsage};

/// A streamed reply, as far as it came. A server that does not stream and sends one JSON text is read too.
#[derive(Debug)]
pub(in crate::http) struct Stream {
    asked: Asked,
    gathered: Gathered,
    /// What came of a line that has not ended.
    line: Vec<u8>,
    /// The data of an event that has not ended.
    event: Vec<u8>,
    /// Set by the first byte: whether one JSON text comes instead of events.
    is_whole: Option<bool>,
    is_done: bool,
}

impl Stream {
    /// For the reply to one request.
    pub(in crate::http) fn new(settings: &RequestSettings, call: &Call) -> Stream {
        Stream {
            asked: Asked::new(settings, call),
            gathered: Gathered::default(),
            line: Vec::new(),
            event: Vec::new(),
            is_whole: None,
            is_done: false,
        }
    }

    /// Takes what came, cut anywhere.
    pub(in crate::http) fn feed(&mut self, chunk: &[u8]) -> Result<(), Failure> {
        if self.is_whole.is_none() {
            let first = chunk.iter().find(|byte| !byte.is_ascii_whitespace());
            self.is_whole = first.map(|&byte| byte == b'{');
        }
        if self.is_whole == Some(true) {
            self.line.extend_from_slice(chunk);
            return Ok(());
        }
        let mut rest = chunk;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let (line, after) = rest.split_at(end);
            rest = after.get(1..).unwrap_or_default();
            if self.line.is_empty() {
                self.take_line(line)?;
            } else {
                let mut whole = std::mem::take(&mut self.line);
                whole.extend_from_slice(line);
                self.take_line(&whole)?;
                whole.clear();
                self.line = whole;
            }
        }
        self.line.extend_from_slice(rest);
        Ok(())
    }

    fn take_line(&mut self, line: &[u8]) -> Result<(), Failure> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            return self.take_event();
        }
        // Comments keep a connection alive; names, ids and retry times say nothing here.
        let Some(data) = line.strip_prefix(b"data:") else {
            return Ok(());
        };
        if !self.event.is_empty() {
            self.event.push(b'\n');
        }
        let data = data.strip_prefix(b" ").unwrap_or(data);
        self.event.extend_from_slice(data);
        Ok(())
    }

    fn take_event(&mut self) -> Result<(), Failure> {
        let mut event = std::mem::take(&mut self.event);
        let data = event.trim_ascii();
        if data == b"[DONE]" {
            self.is_done = true;
        } else if !data.is_empty() && !self.is_done {
            let taken = reply::take(&self.asked, &mut self.gathered, data);
            taken.map_err(|failure| Failure {
                billed: failure.billed.or(self.billed()),
                ..failure
            })?;
        }
        event.clear();
        self.event = event;
        Ok(())
    }

    /// Whether the server said that this is all.
    pub(in crate::http) fn is_done(&self) -> bool {
        self.is_done
    }

    /// Whether the answer has come to its end, though the stream may not have: its usage may follow.
    pub(in crate::http) fn has_answer(&self) -> bool {
        self.gathered.finish.is_some()
    }

    /// What the server says it counted; `None` before the answer's end, since it may count on.
    pub(in crate::http) fn billed(&self) -> Option<TokenUsage> {
        let has_ended = self.is_done || self.gathered.finish.is_some();
        self.gathered.billed.filter(|_| has_ended)
    }

    /// The answer as far as it came, to go on from; `None` where nothing came, or not all of it is known.
    pub(in crate::http) fn so_far(&self) -> Option<Completion> {
        self.gathered.so_far(&self.asked)
    }

    /// The reply. [`Reason::Cut`] where the stream ended before the answer did.
    pub(in crate::http) fn finish(mut self) -> Result<Response, Failure> {
        if self.is_whole == Some(true) {
            return reply::whole(&self.asked, &self.line);
        }
        // A last event may lack its empty line.
        let line = std::mem::take(&mut self.line);
        let ended = self.take_line(&line).and_then(|()| self.take_event());
        if self.gathered.finish.is_none() {
            let cut = Failure {
                status: Some(200),
                ..Failure::new(
                    FailureReason::Cut,
                    "the stream ended before the answer did (no `finish_reason`)",
                )
            };
            // Half an event at the end is a cut, an error in one is the server's word.
            return Err(match ended {
                Err(failure) if failure.reason != FailureReason::Malformed => failure,
                _ => cut,
            });
        }
        match ended {
            Err(failure) if failure.reason != FailureReason::Malformed => Err(failure),
            _ => self.gathered.reply(&self.asked),
        }
    }
}
