//! Streamed responses: server-sent events, <https://html.spec.whatwg.org/multipage/server-sent-events.html>.

use potstill_datasets::Completion;

use super::builder::ResponseBuilder;
use super::expected::Expected;
use super::openai;
use crate::http::{Call, Failure, FailureReason, RequestSettings, Response, TokenUsage};

/// A streamed response so far. One JSON text from a server that does not stream is accepted too.
#[derive(Debug)]
pub(in crate::http) struct Stream {
    expected: Expected,
    builder: ResponseBuilder,
    /// Bytes of a line that has not ended.
    line: Vec<u8>,
    /// Data of an event that has not ended.
    event: Vec<u8>,
    /// Whether the body is one JSON text instead of events; known from the first byte.
    is_whole: Option<bool>,
    is_done: bool,
}

impl Stream {
    pub(in crate::http) fn new(settings: &RequestSettings, call: &Call) -> Stream {
        Stream {
            expected: Expected::new(settings, call),
            builder: ResponseBuilder::default(),
            line: Vec::new(),
            event: Vec::new(),
            is_whole: None,
            is_done: false,
        }
    }

    /// Adds a chunk of the body, which may begin and end anywhere.
    pub(in crate::http) fn feed(&mut self, chunk: &[u8]) -> Result<(), Failure> {
        if self.is_whole.is_none() {
            let first = chunk.iter().find(|byte| !byte.is_ascii_whitespace());
            self.is_whole = first.map(|byte| b"{[".contains(byte));
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
        // Comments keep the connection alive; event names, ids and retry times are not needed.
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
            openai::add(&self.expected, &mut self.builder, data)?;
        }
        event.clear();
        self.event = event;
        Ok(())
    }

    /// Whether the server marked the end of the stream.
    pub(in crate::http) fn is_done(&self) -> bool {
        self.is_done
    }

    /// Whether the answer is complete. The stream may not be, since the usage follows the answer.
    pub(in crate::http) fn has_answer(&self) -> bool {
        self.builder.finish.is_some()
    }

    /// Token counts of the server; `None` before the answer's end, since they may still grow.
    pub(in crate::http) fn billed(&self) -> Option<TokenUsage> {
        let has_ended = self.is_done || self.builder.finish.is_some();
        self.builder.billed.filter(|_| has_ended)
    }

    /// The answer so far, to be continued; `None` if there is none, or parts of it may be missing.
    pub(in crate::http) fn so_far(&self) -> Option<Completion> {
        self.builder.so_far(&self.expected)
    }

    /// Ends the stream and returns the response; [`FailureReason::Cut`] if the answer is not complete.
    pub(in crate::http) fn finish(mut self) -> Result<Response, Failure> {
        if self.is_whole == Some(true) {
            return openai::parse(&self.expected, &self.line);
        }
        // The last event may lack its empty line.
        let line = std::mem::take(&mut self.line);
        let ended = self.take_line(&line).and_then(|()| self.take_event());
        if self.builder.finish.is_none() {
            let cut = Failure {
                status: Some(200),
                ..Failure::new(
                    FailureReason::Cut,
                    "the stream ended before the answer did (no `finish_reason`)",
                )
            };
            // Half an event at the end is a cut; an error inside a whole event is the server's.
            return Err(match ended {
                Err(failure) if failure.reason != FailureReason::Malformed => failure,
                _ => cut,
            });
        }
        match ended {
            Err(failure) if failure.reason != FailureReason::Malformed => Err(failure),
            _ => self.builder.finish(&self.expected),
        }
    }
}
