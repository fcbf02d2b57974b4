//! One request, from a call to a reply or a failure.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use potstill_datasets::Completion;
use tokio::time::timeout;

use super::transport::{Line, Opened, open};
use super::{Asking, Billed, Call, Failure, Reason, Reply, wire};

/// How long the end of a body is waited for after the server said that the answer is over, so that the connection
/// can be used again.
const LAST_BYTES: Duration = Duration::from_millis(500);

/// Bytes of a body that takes longer than some tenths of a millisecond to read.
const LARGE_BODY: usize = 64 << 10;

/// What came of a request.
#[derive(Debug)]
pub(super) struct Over {
    pub(super) outcome: Result<Reply, Failure>,
    /// What came of a stream that broke.
    pub(super) so_far: Option<Completion>,
    /// What the server said it counted before a stream broke.
    pub(super) billed: Option<Billed>,
    /// The status, where there was one.
    pub(super) status: Option<u16>,
    /// Bytes of the body, decoded.
    pub(super) bytes: u64,
}

impl Over {
    /// A request of which only this is known.
    pub(super) fn failed(failure: Failure) -> Over {
        Over {
            status: failure.status,
            outcome: Err(failure),
            so_far: None,
            billed: None,
            bytes: 0,
        }
    }
}

/// Sends one request and reads what comes. The key is in nothing that it gives back.
pub(super) async fn ask(
    line: Arc<Line>,
    asking: Arc<Asking>,
    call: Arc<Call>,
    body: wire::Body,
    nth: u64,
) -> Over {
    let json = Some(Bytes::from(body.json));
    let mut opened = match open(&line, nth, body.path, body.from_root, json).await {
        Ok(opened) => opened,
        Err(failure) => return Over::failed(failure),
    };
    let mut over = read(&line, asking, call, &mut opened).await;
    over.status = Some(opened.status);
    over.bytes = opened.bytes();
    if let Some(key) = line.key() {
        match &mut over.outcome {
            Ok(reply) => key.scrub_reply(reply),
            Err(failure) => {
                key.scrub(&mut failure.message);
            }
        }
    }
    over
}

async fn read(line: &Line, asking: Arc<Asking>, call: Arc<Call>, opened: &mut Opened) -> Over {
    let is_good = (200..300).contains(&opened.status);
    if is_good && asking.stream && opened.is_stream {
        return read_stream(line, &asking, &call, opened).await;
    }
    let body = match opened.whole(line).await {
        Ok(body) => body,
        Err(failure) => return Over::failed(failure),
    };
    let outcome = if is_good {
        parsed(asking, call, body).await
    } else {
        let told = opened.retry_after.as_deref();
        Err(wire::failure(opened.status, told, &body))
    };
    match outcome {
        Ok(reply) => Over {
            outcome: Ok(reply),
            so_far: None,
            billed: None,
            status: None,
            bytes: 0,
        },
        Err(failure) => Over::failed(failure),
    }
}

/// What a body says. A large one is read beside the threads that receive, so that none of those waits for it.
async fn parsed(asking: Arc<Asking>, call: Arc<Call>, body: Vec<u8>) -> Result<Reply, Failure> {
    if body.len() < LARGE_BODY {
        return wire::parse(&asking, &call, &body);
    }
    let parse = move || wire::parse(&asking, &call, &body);
    match tokio::task::spawn_blocking(parse).await {
        Ok(outcome) => outcome,
        // A panic is the dispatcher's to report.
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Failure::new(Reason::Cut, "the collection is given up")),
        },
    }
}

async fn read_stream(line: &Line, asking: &Asking, call: &Call, opened: &mut Opened) -> Over {
    let mut stream = wire::Stream::new(asking, call);
    let broke = loop {
        match opened.piece(line).await {
            Ok(Some(piece)) => {
                if let Err(failure) = stream.feed(&piece) {
                    break Some(failure);
                }
                if stream.is_done() {
                    let rest = async { while let Ok(Some(_)) = opened.piece(line).await {} };
                    // Whether it comes in time or not, the answer is there.
                    let _ = timeout(LAST_BYTES, rest).await;
                    break None;
                }
            }
            Ok(None) => break None,
            Err(failure) => break Some(failure),
        }
    };
    let is_cut = broke.is_some() || !stream.is_done();
    let so_far = if is_cut { stream.so_far() } else { None };
    let billed = stream.billed();
    let outcome = match broke {
        // What broke behind the answer's end was its usage: the answer is kept, and charged in full.
        Some(failure) if stream.has_answer() && is_of_line(failure.reason) => {
            stream.finish().map_err(|_| failure)
        }
        Some(failure) => Err(failure),
        None => stream.finish(),
    };
    let is_broken = matches!(&outcome, Err(f) if breaks(f.reason));
    Over {
        outcome,
        so_far: so_far.filter(|_| is_broken),
        billed,
        status: None,
        bytes: 0,
    }
}

/// Whether the connection failed and not the server.
fn is_of_line(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Cut | Reason::IdleTimeout | Reason::TotalTimeout
    )
}

/// Whether a stream that ends like this can be gone on from.
fn breaks(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Cut | Reason::IdleTimeout | Reason::TotalTimeout | Reason::ErrorInside
    )
}
