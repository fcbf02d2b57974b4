//! A server on loopback that speaks OpenAI's protocol and fails on purpose. What it does is a function of the
//! prompt, of how often that was asked, and of a seed.

#[path = "reply.rs"]
mod reply;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use self::reply::{Work, streamed, whole, work};

/// What goes wrong with one reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// A status and a JSON error.
    Status(u16),
    /// 429 with `Retry-After` in seconds.
    RetryAfter(u32),
    /// Nothing for a time, then the answer.
    HangBeforeHeaders,
    /// Half of the body, nothing for a time, then the rest.
    HangBetweenChunks,
    /// Half of the body and then nothing.
    HangForEver,
    /// Half of the body and then a reset.
    Reset,
    /// A complete body of half the JSON.
    Truncated,
    /// A byte that is no UTF-8, in the answer.
    InvalidUtf8,
    /// JSON of another shape.
    WrongShape,
    /// `NaN` for a number.
    NotANumber,
    /// Status 200 with an error inside.
    ErrorInside,
    /// No choice.
    NoChoice,
    /// A choice without text.
    Empty,
    /// Log-probabilities for one token less than there are.
    FewerLogprobs,
    /// Ids that no vocabulary has.
    IdsOutOfRange,
    /// 200 MB.
    Huge,
    /// One byte a second.
    Drip,
    /// The answer, and the answer again on the same connection.
    Twice,
}

/// All of them.
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

/// What the server does.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Which requests fail, and how, follows from this.
    pub(crate) seed: u64,
    /// Share of the requests that fail.
    pub(crate) faulty: f64,
    /// How they fail, drawn evenly.
    pub(crate) faults: Vec<Fault>,
    /// Time before each reply.
    pub(crate) latency: Duration,
    /// Each reply's latency is drawn from one to so many times that.
    pub(crate) latency_spread: f64,
    /// How long a hang lasts.
    pub(crate) hang: Duration,
    /// Words of an answer, a token each.
    pub(crate) answer_tokens: u32,
    /// Bytes of a word, with its space.
    pub(crate) token_bytes: usize,
    /// Whether answers and errors repeat the header `Authorization`.
    pub(crate) echo: bool,
    /// Whether replies say what was counted.
    pub(crate) usage: bool,
    /// Whether every question gets the reply to the first, made once: for measuring clients.
    pub(crate) same: bool,
    /// Where every request is redirected to, with this status.
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

/// What the server saw and did.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    /// Requests whose head and body came.
    pub(crate) requests: u64,
    /// Good answers, written to their end.
    pub(crate) answers: u64,
    /// Tokens of their prompts.
    pub(crate) prompt_tokens: u64,
    /// Tokens of theirs.
    pub(crate) completion_tokens: u64,
    /// Tokens of prompts that the server worked on, whatever came of it.
    pub(crate) worked_prompt_tokens: u64,
    /// Tokens of answers that it worked on.
    pub(crate) worked_completion_tokens: u64,
    /// Requests under way.
    pub(crate) in_flight: u64,
    /// Most of them at once.
    pub(crate) in_flight_most: u64,
    /// Requests with the header `Authorization`.
    pub(crate) authorized: u64,
    /// Faults caused, by name.
    pub(crate) faults: HashMap<String, u64>,
    asked: HashMap<u64, u32>,
    same: Option<Arc<Vec<u8>>>,
}

/// A running server.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    /// Where it listens.
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
                    // A client that goes away is no failure of the server.
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

    /// What was seen so far. A client has the last byte of a reply before it is counted here, so replies in hand are
    /// waited for a little; one that hangs is not.
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

/// What a request says, as far as the server cares.
struct Asked {
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
    while let Some(asked) = read(&mut stream, &mut buffer).await? {
        if asked.path.ends_with("/__counts") {
            let text = counted(&locked(counts));
            write_whole(&mut stream, 200, "", text.as_bytes()).await?;
            continue;
        }
        if asked.path.ends_with("/models") {
            let models = br#"{"object":"list","data":[{"id":"faulty","object":"model"}]}"#;
            write_whole(&mut stream, 200, "", models).await?;
            continue;
        }
        {
            let mut counts = locked(counts);
            counts.requests += 1;
            counts.in_flight += 1;
            counts.in_flight_most = counts.in_flight_most.max(counts.in_flight);
            counts.authorized += u64::from(asked.authorization.is_some());
        }
        let _in_flight = InFlight(counts);
        answer(&mut stream, &asked, plan, counts).await?;
    }
    Ok(())
}

async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Option<Asked>> {
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
    Ok(Some(Asked {
        path,
        authorization,
        body,
    }))
}

/// A hash that is the same everywhere: FNV-1a, stirred at its end.
pub(crate) fn hash(parts: &[&[u8]]) -> u64 {
    let mut h: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in parts.iter().copied().flatten() {
        h = (h ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^ (h >> 33)
}

/// The fault of one request, if it has one.
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
    asked: &Asked,
    plan: &Plan,
    counts: &Mutex<Counts>,
) -> io::Result<()> {
    if let Some((status, to)) = &plan.redirect {
        let location = format!("Location: {to}\r\n");
        return write_whole(stream, *status, &location, b"").await;
    }
    if plan.same {
        return answer_same(stream, asked, plan, counts).await;
    }
    let Some((work, key)) = work(asked, plan) else {
        return refuse(stream, 422, "", "the body is not understood", None).await;
    };
    let attempt = {
        let mut counts = locked(counts);
        let attempt = counts.asked.entry(key).or_insert(0);
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
            return refuse(stream, status, "", &work.text, work.echo.as_deref()).await;
        }
        Some(Fault::RetryAfter(seconds)) => {
            let header = format!("Retry-After: {seconds}\r\n");
            return refuse(stream, 429, &header, &work.text, work.echo.as_deref()).await;
        }
        _ => {}
    }
    let tokens = work.words.len() as u64;
    {
        let mut counts = locked(counts);
        counts.worked_prompt_tokens += work.prompt_tokens;
        counts.worked_completion_tokens += tokens;
    }
    write_answer(stream, &work, fault, plan).await?;
    if matches!(
        fault,
        None | Some(Fault::HangBeforeHeaders | Fault::HangBetweenChunks | Fault::Twice)
    ) {
        let mut counts = locked(counts);
        counts.answers += 1;
        counts.prompt_tokens += work.prompt_tokens;
        counts.completion_tokens += tokens;
    }
    Ok(())
}

async fn answer_same(
    stream: &mut TcpStream,
    asked: &Asked,
    plan: &Plan,
    counts: &Mutex<Counts>,
) -> io::Result<()> {
    let known = locked(counts).same.clone();
    let reply = match known {
        Some(reply) => reply,
        None => {
            let Some((work, _)) = work(asked, plan) else {
                return refuse(stream, 422, "", "the body is not understood", None).await;
            };
            let body = whole(&work, None);
            let reply = [head(200, "application/json", "", body.len()), body].concat();
            let reply = Arc::new(reply.into_bytes());
            locked(counts).same = Some(Arc::clone(&reply));
            reply
        }
    };
    sleep(plan.latency).await;
    stream.write_all(&reply).await?;
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
    work: &Work,
    fault: Option<Fault>,
    plan: &Plan,
) -> io::Result<()> {
    let body = if work.is_stream {
        streamed(work, fault)
    } else {
        whole(work, fault).into_bytes()
    };
    let kind = if work.is_stream {
        "text/event-stream"
    } else {
        "application/json"
    };
    let mut body = body;
    if fault == Some(Fault::InvalidUtf8)
        && let Some(at) = find(&body, work.words.first().map_or("", String::as_str))
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
            // Until the client gives up.
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
        "prompts": counts.asked.len(),
    })
    .to_string()
}
