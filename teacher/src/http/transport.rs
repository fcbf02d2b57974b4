//! One request over HTTP: limits on time and size, and redirects without leaking the key.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use bytes::Bytes;
use potstill_datasets::limits::ERROR_REPLY_BYTES;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Client, Method, Response, Url};
use tokio::time::timeout;

use super::wire::{RateState, rate_state};
use super::{ApiKey, Endpoint, Failure, FailureReason, Timeouts};
use crate::Error;

/// Largest number of redirects that are followed, to the same host.
const REDIRECTS: u32 = 4;

/// Number of requests that share a client, and with it a connection if the server speaks HTTP/2. Servers allow about a
/// hundred streams on a connection.
const STREAMS: u32 = 96;

/// HTTP clients for one endpoint.
pub(super) struct EndpointClient {
    clients: Vec<Client>,
    url: Url,
    key: Option<ApiKey>,
    timeouts: Timeouts,
    max_body_bytes: u64,
}

/// A complete response of any status.
#[derive(Debug)]
pub(super) struct WholeResponse {
    /// HTTP status.
    pub status: u16,
    /// Decoded body, which may contain the key.
    pub body: Vec<u8>,
    /// Time from sending to the end, seconds.
    pub seconds: f64,
}

/// A response whose headers have arrived and whose body is being read.
pub(super) struct OpenResponse {
    pub(super) status: u16,
    pub(super) retry_after: Option<String>,
    pub(super) rates: RateState,
    pub(super) is_stream: bool,
    response: Response,
    begun: Instant,
    read: u64,
    limit: u64,
    timeouts: Timeouts,
}

/// Sends a request and reads the whole response of any status. The method is POST with `json`, and GET without.
/// `path` is relative to the base URL, such as `/models`, or to the host's root, and may have a query.
pub(super) async fn send(
    client: &EndpointClient,
    path: &str,
    from_root: bool,
    json: Option<Vec<u8>>,
) -> Result<WholeResponse, Failure> {
    let whole = async {
        let mut response = open(client, 0, path, from_root, json.map(Bytes::from)).await?;
        let body = response.whole_body().await?;
        Ok(WholeResponse {
            status: response.status,
            body,
            seconds: response.begun.elapsed().as_secs_f64(),
        })
    };
    whole.await.map_err(|mut failure: Failure| {
        if let Some(key) = client.key() {
            key.scrub_failure(&mut failure);
        }
        failure
    })
}

impl EndpointClient {
    /// Sets up the clients for an endpoint. Nothing is sent.
    pub(super) fn new(
        endpoint: &Endpoint,
        timeouts: Timeouts,
        max_body_bytes: u64,
    ) -> Result<EndpointClient, Error> {
        let url = endpoint.checked_url()?;
        // A provider may be installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut headers = HeaderMap::new();
        if let Some(key) = &endpoint.key {
            let mut value =
                HeaderValue::from_str(&key.authorization()).map_err(|_| Error::Endpoint {
                    endpoint: endpoint.name().to_owned(),
                    why: "the key has characters that an HTTP header cannot contain\nhint: check the output of `key_command` or the variable of `key_env`".into(),
                })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let is_plain = url.scheme() == "http";
        let count = if is_plain {
            1
        } else {
            endpoint.in_flight_limit().div_ceil(STREAMS)
        };
        let clients = (0..count)
            .map(|_| {
                let mut builder = Client::builder()
                    .user_agent(concat!("potstill/", env!("CARGO_PKG_VERSION")))
                    .default_headers(headers.clone())
                    .redirect(reqwest::redirect::Policy::none())
                    .retry(reqwest::retry::never())
                    .no_proxy()
                    .referer(false)
                    .connect_timeout(timeouts.connect)
                    // Servers close idle connections after 5 s, and a request on a connection that is being closed is lost.
                    .pool_idle_timeout(Duration::from_secs(4))
                    .http2_adaptive_window(true);
                if is_plain {
                    // Skips loading the system's certificates.
                    builder = builder.tls_certs_only([]);
                }
                builder.build()
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| Error::Endpoint {
                endpoint: endpoint.name().to_owned(),
                why: format!("cannot set up an HTTP client: {}", describe(&e)),
            })?;
        Ok(EndpointClient {
            clients,
            url,
            key: endpoint.key.clone(),
            timeouts,
            max_body_bytes,
        })
    }

    /// The key of the endpoint.
    pub(super) fn key(&self) -> Option<&ApiKey> {
        self.key.as_ref()
    }

    fn address(&self, full_path: &str, from_root: bool) -> Url {
        let mut url = self.url.clone();
        let base = if from_root {
            ""
        } else {
            self.url.path().trim_end_matches('/')
        };
        let (path, query) = full_path.split_once('?').unzip();
        url.set_path(&format!("{base}{}", path.unwrap_or(full_path)));
        url.set_query(query);
        url
    }
}

/// Sends a request and waits for the headers of the response. `number` spreads requests over clients.
pub(super) async fn open(
    client: &EndpointClient,
    number: u64,
    path: &str,
    from_root: bool,
    json: Option<Bytes>,
) -> Result<OpenResponse, Failure> {
    let begun = Instant::now();
    let http = &client.clients[(number % client.clients.len() as u64) as usize];
    let mut url = client.address(path, from_root);
    let limit = client.timeouts.first_byte.min(client.timeouts.whole);
    for _ in 0..=REDIRECTS {
        let mut request = http.request(
            if json.is_some() {
                Method::POST
            } else {
                Method::GET
            },
            url.clone(),
        );
        if let Some(json) = &json {
            request = request
                .header(CONTENT_TYPE, "application/json")
                .body(json.clone());
        }
        let left = limit.saturating_sub(begun.elapsed());
        let response = match timeout(left, request.send()).await {
            Err(_) => {
                return Err(Failure::new(
                    FailureReason::FirstByteTimeout,
                    format!("no response within {} s", limit.as_secs_f64()),
                ));
            }
            Ok(Err(e)) => return Err(failed(&e, begun.elapsed())),
            Ok(Ok(response)) => response,
        };
        if !response.status().is_redirection() {
            return Ok(open_response(response, begun, client));
        }
        url = redirected(&url, &response, json.is_some())?;
    }
    Err(Failure::new(
        FailureReason::Redirected,
        format!("more than {REDIRECTS} redirects"),
    ))
}

fn open_response(response: Response, begun: Instant, client: &EndpointClient) -> OpenResponse {
    let header = |name: &str| {
        response
            .headers()
            .get(name)
            .and_then(|v| v.to_str().ok())
            .map(str::to_owned)
    };
    let is_stream =
        header(CONTENT_TYPE.as_str()).is_some_and(|t| t.starts_with("text/event-stream"));
    let is_success = response.status().is_success();
    OpenResponse {
        status: response.status().as_u16(),
        retry_after: header(RETRY_AFTER.as_str()),
        rates: rate_state(header),
        is_stream,
        response,
        begun,
        read: 0,
        limit: if is_success {
            client.max_body_bytes
        } else {
            client.max_body_bytes.min(ERROR_REPLY_BYTES)
        },
        timeouts: client.timeouts,
    }
}

/// The target of a redirect, if it may be followed: the same scheme, host and port, with the same method and body.
fn redirected(from: &Url, response: &Response, has_body: bool) -> Result<Url, Failure> {
    let status = response.status().as_u16();
    let refuse = |why: String| {
        let mut failure = Failure::new(FailureReason::Redirected, why);
        failure.status = Some(status);
        failure
    };
    let to = response
        .headers()
        .get(LOCATION)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| from.join(v).ok())
        .ok_or_else(|| refuse("the redirect has no valid `Location`".into()))?;
    if to.origin() != from.origin() {
        return Err(refuse(format!(
            "the server redirects to `{}`, to which the key is not sent (if that address is right, set it as `url`)",
            to.origin().ascii_serialization()
        )));
    }
    if has_body && !matches!(status, 307 | 308) {
        return Err(refuse(format!(
            "the server redirects to `{}` with status {status}, which drops the request's body (set the right `url`)",
            to.path()
        )));
    }
    Ok(to)
}

impl OpenResponse {
    /// The next chunk of the decoded body; `None` at its end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        let left = self.timeouts.whole.saturating_sub(self.begun.elapsed());
        let limit = left.min(self.timeouts.idle);
        let chunk = match timeout(limit, self.response.chunk()).await {
            Err(_) if limit < self.timeouts.idle => {
                return Err(self.failure(
                    FailureReason::TotalTimeout,
                    format!(
                        "the response did not end within {} s",
                        self.timeouts.whole.as_secs_f64()
                    ),
                ));
            }
            Err(_) => {
                return Err(self.failure(
                    FailureReason::IdleTimeout,
                    format!("no data arrived for {} s", self.timeouts.idle.as_secs_f64()),
                ));
            }
            Ok(Err(e)) => {
                let mut failure = failed(&e, self.begun.elapsed());
                failure.status = Some(self.status);
                return Err(failure);
            }
            Ok(Ok(chunk)) => chunk,
        };
        if let Some(chunk) = &chunk {
            self.read += chunk.len() as u64;
            if self.read > self.limit {
                return Err(self.failure(
                    FailureReason::TooLarge,
                    format!("the response has more than {} bytes", self.limit),
                ));
            }
        }
        Ok(chunk)
    }

    /// The whole body; of an error response only the beginning.
    pub(super) async fn whole_body(&mut self) -> Result<Vec<u8>, Failure> {
        let is_success = (200..300).contains(&self.status);
        let length = self.response.content_length().unwrap_or(0);
        if length > self.limit && is_success {
            return Err(self.failure(
                FailureReason::TooLarge,
                format!("the response has {length} bytes, more than {}", self.limit),
            ));
        }
        let mut body = Vec::with_capacity(length.min(1 << 20) as usize);
        loop {
            match self.chunk().await {
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                Ok(None) => break,
                // The status is enough to classify the failure.
                Err(_) if !is_success => break,
                Err(failure) => return Err(failure),
            }
        }
        Ok(body)
    }

    /// Number of decoded bytes of the body that were read so far.
    pub(super) fn bytes(&self) -> u64 {
        self.read
    }

    fn failure(&self, reason: FailureReason, message: String) -> Failure {
        let mut failure = Failure::new(reason, message);
        failure.status = Some(self.status);
        failure
    }
}

/// The failure of a request whose response is missing or incomplete.
fn failed(error: &reqwest::Error, after: Duration) -> Failure {
    let reason = if error.is_connect() {
        FailureReason::Connect
    } else if error.is_timeout() {
        FailureReason::TotalTimeout
    } else if error.is_decode() && is_garbled(error) {
        FailureReason::Malformed
    } else {
        FailureReason::Cut
    };
    let mut message = format!("{} after {:.1} s", describe(error), after.as_secs_f64());
    message.truncate(message.floor_char_boundary(500));
    Failure::new(reason, message)
}

/// Whether the body does not have the encoding that its header names, as opposed to being cut.
fn is_garbled(error: &reqwest::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(e) = cause {
        let kind = e.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        if matches!(kind, Some(ErrorKind::InvalidData | ErrorKind::InvalidInput)) {
            return true;
        }
        cause = e.source();
    }
    false
}

/// Describes an error with its causes, without the URL.
fn describe(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(e) = cause {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&e.to_string());
        cause = e.source();
    }
    if text.is_empty() {
        text = if error.is_connect() {
            "no connection".into()
        } else {
            "the request failed".into()
        };
    }
    text
}
