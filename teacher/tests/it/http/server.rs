//! A server on loopback that speaks OpenAI's protocol and fails on purpose. Its behaviour is a function of the prompt, of
//! the number of requests for it, and of a seed.

#[path = "response.rs"]
mod response;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use self::response::{PlannedAnswer, plan_answer, streamed, whole};

/// A fault of one response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// An error status and a JSON error.
    Status(u16),
    /// 429 with `Retry-After` in seconds.
    RetryAfter(u32),
    /// A pause, then the answer.
    HangBeforeHeaders,
    /// Half of the body, a pause, then the rest.
    HangBetweenChunks,
    /// Half of the body and then nothing.
    HangForEver,
    /// Half of the body and then a reset.
    Reset,
    /// A complete body with half of the JSON.
    Truncated,
    /// A byte in the answer that is not UTF-8.
    InvalidUtf8,
    /// JSON of another form.
    WrongShape,
    /// `NaN` in place of a number.
    NotANumber,
    /// Status 200 with an error inside.
    ErrorInside,
    /// No choice.
    NoChoice,
    /// A choice without text.
    Empty,
    /// Log-probabilities for one token less than there are.
    FewerLogprobs,
    /// Ids outside every vocabulary.
    IdsOutOfRange,
    /// A body of 200 MB.
    Huge,
    /// A body of one byte a second.
    Drip,
    /// The answer, and the answer again on the same connection.
    Twice,
}

/// All faults.
pub(crate) const FAULTS: &[Fault] = &[
    Fault::Status(400),
    Fault::Status(401),
    Fault::Status(403),
    Fault::Status(404),
    Fault::Status(408),
    Fault::Status(429),
    Fault::RetryAfter(0),
    Fault::Status(500),
    Fault::Status(502),
    Fault::Status(503),
    Fault::Status(529),
    Fault::HangBeforeHeaders,
    Fault::HangBetweenChunks,
    Fault::HangForEver,
    Fault::Reset,
    Fault::Truncated,
    Fault::InvalidUtf8,
    Fault::WrongShape,
    Fault::NotANumber,
    Fault::ErrorInside,
    Fault::NoChoice,
    Fault::Empty,
    Fault::FewerLogprobs,
    Fault::IdsOutOfRange,
    Fault::Huge,
    Fault::Drip,
    Fault::Twice,
];

/// Behaviour of the server.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Seed that decides which requests fail, and how.
    pub(crate) seed: u64,
    /// Share of the requests that fail.
    pub(crate) faulty: f64,
    /// Faults, drawn with equal probability.
    pub(crate) faults: Vec<Fault>,
    /// Time before each response.
    pub(crate) latency: Duration,
    /// Upper bound of the random factor of a response's latency, which is at least 1.
    pub(crate) latency_spread: f64,
    /// Duration of a pause.
    pub(crate) hang: Duration,
    /// Number of words of an answer; a word is a token.
    pub(crate) answer_tokens: u32,
    /// Bytes of a word, with its space.
    pub(crate) token_bytes: usize,
    /// Whether answers and errors repeat the header `Authorization`.
    pub(crate) echo: bool,
    /// Whether responses have a `usage`.
    pub(crate) usage: bool,
    /// Whether all requests get the response to the first one, to measure clients.
    pub(crate) same: bool,
    /// Status and target of a redirect of every request.
    pub(crate) redirect: Option<(u16, String)>,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            seed: 0,
            faulty: 0.0,
            faults: FAULTS.to_vec(),
            latency: Duration::from_millis(1),
            latency_spread: 1.0,
            hang: Duration::from_secs(600),
            answer_tokens: 12,
            token_bytes: 8,
            echo: false,
            usage: true,
            same: false,
            redirect: None,
        }
    }
}

/// Counts of the server.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    /// Requests that were received completely.
    pub(crate) requests: u64,
    /// Answers that were written to their end.
    pub(crate) answers: u64,
    /// Tokens of the prompts of these answers.
    pub(crate) prompt_tokens: u64,
    /// Tokens of these answers.
    pub(crate) completion_tokens: u64,
    /// Tokens of all prompts that the server worked on.
    pub(crate) worked_prompt_tokens: u64,
    /// Tokens of all answers that the server worked on.
    pub(crate) worked_completion_tokens: u64,
    /// Requests in flight.
    pub(crate) in_flight: u64,
    /// Largest number of requests in flight.
    pub(crate) in_flight_most: u64,
    /// Requests with the header `Authorization`.
    pub(crate) authorized: u64,
    /// Number of faults, by name.
    pub(crate) faults: HashMap<String, u64>,
    attempts: HashMap<u64, u32>,
    same: Option<Arc<Vec<u8>>>,
}

/// A running server.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    /// Address of the server.
    pub(crate) address: SocketAddr,
    counts: Arc<Mutex<Counts>>,
}

impl Server {
    /// Listens on a free port of the loopback, on the current runtime, until that ends.
    pub(crate) async fn start(plan: Plan) -> io::Result<Server> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let server = Server {
            address: listener.local_addr()?,
            counts: Arc::default(),
        };
        let counts = Arc::clone(&server.counts);
        let plan = Arc::new(plan);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let (plan, counts) = (Arc::clone(&plan), Arc::clone(&counts));
                tokio::spawn(async move {
                    // A client that disconnects is not a failure of the server.
                    let _ = serve(stream, &plan, &counts).await;
                });
            }
        });
        Ok(server)
    }

    /// The base URL.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// The counts so far. A client receives the last byte of a response before the response is counted, so this method
    /// waits for responses in flight for up to half a second.
    pub(crate) fn counts(&self) -> Counts {
        for _ in 0..100 {
            if locked(&self.counts).in_flight == 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        locked(&self.counts).clone()
    }
}

fn locked(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The parts of a request that the server uses.
struct ParsedRequest {
    path: String,
    authorization: Option<String>,
    body: Vec<u8>,
}

struct InFlight<'a>(&'a Mutex<Counts>);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        locked(self.0).in_flight -= 1;
    }
}

async fn serve(mut stream: TcpStream, plan: &Plan, counts: &Mutex<Counts>) -> io::Result<()> {
    let mut buffer = Vec::new();
    while let Some(request) = read(&mut stream, &mut buffer).await? {
        if request.path.ends_with("/__counts") {
            let text = counted(&locked(counts));
            write_whole(&mut stream, 200, "", text.as_bytes()).await?;
            continue;
        }
        if request.path.ends_with("/models") {
            let models = br#"{"object":"list","data":[{"id":"faulty","object":"model"}]}"#;
            write_whole(&mut stream, 200, "", models).await?;
            continue;
        }
        {
            let mut counts = locked(counts);
            counts.requests += 1;
            counts.in_flight += 1;
            counts.in_flight_most = counts.in_flight_most.max(counts.in_flight);
            counts.authorized += u64::from(request.authorization.is_some());
        }
        let _in_flight = InFlight(counts);
        answer(&mut stream, &request, plan, counts).await?;
    }
    Ok(())
}

async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Option<ParsedRequest>> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
    let mut length = 0;
    let mut authorization = None;
    for line in head.lines().skip(1) {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap_or(0);
        } else if name.eq_ignore_ascii_case("authorization") {
            authorization = Some(value.trim().to_owned());
        }
    }
    while buffer.len() < end + length {
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
    let body = buffer[end..end + length].to_vec();
    buffer.drain(..end + length);
    let path = head.split_whitespace().nth(1).unwrap_or("/").to_owned();
    Ok(Some(ParsedRequest {
        path,
        authorization,
        body,
    }))
}

/// A hash that is the same on every machine: FNV-1a with a final mix.
pub(crate) fn hash(parts: &[&[u8]]) -> u64 {
    let mut h: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in parts.iter().copied().flatten() {
        h = (h ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^ (h >> 33)
}

/// The fault of one request, if there is one.
pub(crate) fn fault(plan: &Plan, prompt: u64, attempt: u32) -> Option<Fault> {
    let drawn = hash(&[
        &prompt.to_le_bytes(),
        &attempt.to_le_bytes(),
        &plan.seed.to_le_bytes(),
    ]);
    let share = (drawn >> 11) as f64 / (1_u64 << 53) as f64;
    if plan.faults.is_empty() || share >= plan.faulty {
        return None;
    }
    let which = hash(&[&drawn.to_le_bytes()]) % plan.faults.len() as u64;
    plan.faults.get(which as usize).copied()
}

async fn answer(
    stream: &mut TcpStream,
    request: &ParsedRequest,
    plan: &Plan,
    counts: &Mutex<Counts>,
) -> io::Result<()> {
    if let Some((status, to)) = &plan.redirect {
        let location = format!("Location: {to}\r\n");
        return write_whole(stream, *status, &location, b"").await;
    }
    if plan.same {
        return answer_same(stream, request, plan, counts).await;
    }
    let Some((planned, key)) = plan_answer(request, plan) else {
        return refuse(stream, 422, "", "the body is not understood", None).await;
    };
    let attempt = {
        let mut counts = locked(counts);
        let attempt = counts.attempts.entry(key).or_insert(0);
        *attempt += 1;
        *attempt
    };
    let drawn = hash(&[&key.to_le_bytes(), &attempt.to_le_bytes(), b"latency"]);
    let share = (drawn >> 11) as f64 / (1_u64 << 53) as f64;
    let latency = plan
        .latency
        .mul_f64(1.0 + (plan.latency_spread - 1.0) * share);
    if !latency.is_zero() {
        sleep(latency).await;
    }
    let fault = fault(plan, key, attempt);
    if let Some(fault) = fault {
        let mut counts = locked(counts);
        *counts.faults.entry(format!("{fault:?}")).or_insert(0) += 1;
    }
    match fault {
        Some(Fault::Status(status)) => {
            return refuse(stream, status, "", &planned.text, planned.echo.as_deref()).await;
        }
        Some(Fault::RetryAfter(seconds)) => {
            let header = format!("Retry-After: {seconds}\r\n");
            return refuse(stream, 429, &header, &planned.text, planned.echo.as_deref()).await;
        }
        _ => {}
    }
    let tokens = planned.words.len() as u64;
    {
        let mut counts = locked(counts);
        counts.worked_prompt_tokens += planned.prompt_tokens;
        counts.worked_completion_tokens += tokens;
    }
    write_answer(stream, &planned, fault, plan).await?;
    if matches!(
        fault,
        None | Some(Fault::HangBeforeHeaders | Fault::HangBetweenChunks | Fault::Twice)
    ) {
        let mut counts = locked(counts);
        counts.answers += 1;
        counts.prompt_tokens += planned.prompt_tokens;
        counts.completion_tokens += tokens;
    }
    Ok(())
}

async fn answer_same(
    stream: &mut TcpStream,
    request: &ParsedRequest,
    plan: &Plan,
    counts: &Mutex<Counts>,
) -> io::Result<()> {
    let known = locked(counts).same.clone();
    let response = match known {
        Some(response) => response,
        None => {
            let Some((planned, _)) = plan_answer(request, plan) else {
                return refuse(stream, 422, "", "the body is not understood", None).await;
            };
            let body = whole(&planned, None);
            let response = [head(200, "application/json", "", body.len()), body].concat();
            let response = Arc::new(response.into_bytes());
            locked(counts).same = Some(Arc::clone(&response));
            response
        }
    };
    sleep(plan.latency).await;
    stream.write_all(&response).await?;
    locked(counts).answers += 1;
    Ok(())
}

async fn refuse(
    stream: &mut TcpStream,
    status: u16,
    header: &str,
    about: &str,
    echo: Option<&str>,
) -> io::Result<()> {
    let about: String = about.chars().take(60).collect();
    let message = format!(
        "status {status} on purpose, for: {about} {}",
        echo.unwrap_or("")
    );
    let body = json!({"error": {"message": message, "type": "on_purpose", "code": status}});
    write_whole(stream, status, header, body.to_string().as_bytes()).await
}

async fn write_answer(
    stream: &mut TcpStream,
    planned: &PlannedAnswer,
    fault: Option<Fault>,
    plan: &Plan,
) -> io::Result<()> {
    let body = if planned.is_stream {
        streamed(planned, fault)
    } else {
        whole(planned, fault).into_bytes()
    };
    let kind = if planned.is_stream {
        "text/event-stream"
    } else {
        "application/json"
    };
    let mut body = body;
    if fault == Some(Fault::InvalidUtf8)
        && let Some(at) = find(&body, planned.words.first().map_or("", String::as_str))
    {
        body[at] = 0xff;
    }
    let half = body.len() / 2;
    let cut = |what: &[u8], length: usize| {
        [head(200, kind, "", length).into_bytes(), what.to_vec()].concat()
    };
    match fault {
        Some(Fault::HangBeforeHeaders) => sleep(plan.hang).await,
        Some(Fault::HangBetweenChunks) => {
            stream.write_all(&cut(&body[..half], body.len())).await?;
            sleep(plan.hang).await;
            return stream.write_all(&body[half..]).await;
        }
        Some(Fault::HangForEver) => {
            stream.write_all(&cut(&body[..half], body.len())).await?;
            // Wait until the client disconnects.
            let _ = stream.read_u8().await;
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Some(Fault::Reset) => {
            stream.write_all(&cut(&body[..half], body.len())).await?;
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Some(Fault::Truncated) => return stream.write_all(&cut(&body[..half], half)).await,
        Some(Fault::Huge) => return write_huge(stream, kind).await,
        Some(Fault::Drip) => {
            stream.write_all(&cut(b"", body.len())).await?;
            for byte in &body {
                stream.write_all(&[*byte]).await?;
                sleep(Duration::from_secs(1)).await;
            }
            return Ok(());
        }
        Some(Fault::Twice) => {
            let once = cut(&body, body.len());
            return stream.write_all(&[once.clone(), once].concat()).await;
        }
        _ => {}
    }
    stream.write_all(&cut(&body, body.len())).await
}

fn find(bytes: &[u8], what: &str) -> Option<usize> {
    bytes
        .windows(what.len().max(1))
        .position(|w| w == what.as_bytes())
}

async fn write_huge(stream: &mut TcpStream, kind: &str) -> io::Result<()> {
    let total = 200 << 20;
    stream
        .write_all(head(200, kind, "", total).as_bytes())
        .await?;
    let piece = vec![b' '; 1 << 20];
    for _ in 0..200 {
        stream.write_all(&piece).await?;
    }
    Ok(())
}

fn head(status: u16, kind: &str, headers: &str, length: usize) -> String {
    format!(
        "HTTP/1.1 {status} {}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{headers}\r\n",
        if status < 400 { "OK" } else { "Error" },
    )
}

async fn write_whole(
    stream: &mut TcpStream,
    status: u16,
    headers: &str,
    body: &[u8],
) -> io::Result<()> {
    let head = head(status, "application/json", headers, body.len());
    stream.write_all(&[head.as_bytes(), body].concat()).await
}

fn counted(counts: &Counts) -> String {
    json!({
        "requests": counts.requests,
        "answers": counts.answers,
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "worked_prompt_tokens": counts.worked_prompt_tokens,
        "worked_completion_tokens": counts.worked_completion_tokens,
        "in_flight": counts.in_flight,
        "in_flight_most": counts.in_flight_most,
        "authorized": counts.authorized,
        "faults": counts.faults,
        "prompts": counts.attempts.len(),
    })
    .to_string()
}
