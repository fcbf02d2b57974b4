//! Requests to the Hub: redirects without the token, and retries.

use std::future::Future;
use std::ops::ControlFlow;
use std::time::{Duration, Instant, SystemTime};

use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Client, Method, Response, Url};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::HubError;
use super::event::{FetchEvent, Observer};
use super::request::{HubRequest, Refusal};
use super::settings::HubSettings;
use crate::http::{ApiKey, TextKind};

/// Largest number of redirects that are followed.
const REDIRECTS: u32 = 8;
/// Time between two looks at the observer while nothing arrives.
const TICK: Duration = Duration::from_millis(200);
/// Number of bytes that are read of an error response.
const REFUSAL_BYTES: usize = 2000;
/// Longest pause between two attempts that the Hub did not ask for.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);

/// Connection to the Hub.
pub(super) struct Transport {
    runtime: Runtime,
    client: Client,
    endpoint: Url,
    token: Option<ApiKey>,
    settings: HubSettings,
}

/// Why an attempt failed.
pub(super) enum AttemptFailure {
    /// Another attempt may succeed, not before the pause that the Hub asks for.
    Transient(String, Option<Duration>),
    /// No attempt will succeed.
    Final(HubError),
}

impl From<HubError> for AttemptFailure {
    fn from(error: HubError) -> AttemptFailure {
        AttemptFailure::Final(error)
    }
}

impl Transport {
    /// Sets up the connection. Nothing is sent.
    pub(super) fn new(settings: &HubSettings) -> Result<Transport, HubError> {
        let endpoint = settings.checked_endpoint()?;
        // A provider may be installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = Client::builder()
            .user_agent(concat!("potstill/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .connect_timeout(settings.idle)
            .pool_idle_timeout(Duration::from_secs(4));
        if endpoint.scheme() == "http" {
            // Skips loading the system's certificates, and a proxy, which would see the token.
            builder = builder.tls_certs_only([]).no_proxy();
        }
        let unusable = |why: String| HubError::Settings(format!("cannot set up HTTP: {why}"));
        Ok(Transport {
            client: builder.build().map_err(|e| unusable(describe(&e)))?,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| unusable(e.to_string()))?,
            endpoint,
            token: settings.token.clone(),
            settings: settings.clone(),
        })
    }

    /// Runs attempts of a request until one succeeds. Each attempt gets its number from 0 and says whether it made
    /// progress, which starts the count anew.
    pub(super) fn attempts<T>(
        &self,
        request: HubRequest<'_>,
        observer: Observer<'_>,
        mut attempt: impl FnMut(Observer<'_>) -> (Result<T, AttemptFailure>, bool),
    ) -> Result<T, HubError> {
        let mut failures = 0;
        loop {
            let (result, has_progressed) = attempt(observer);
            let (why, asked) = match result {
                Ok(value) => return Ok(value),
                Err(AttemptFailure::Final(error)) => return Err(error),
                Err(AttemptFailure::Transient(why, asked)) => (why, asked),
            };
            failures = if has_progressed { 1 } else { failures + 1 };
            if failures >= self.settings.attempts {
                return Err(HubError::Unavailable {
                    what: request.what(),
                    why,
                    attempts: failures,
                    hint: self.unavailable_hint(),
                });
            }
            if let Some(asked) = asked.filter(|asked| *asked > self.settings.longest_pause) {
                return Err(HubError::AskedToWait {
                    what: request.what(),
                    seconds: asked.as_secs(),
                });
            }
            let doubled = self.settings.pause * 2_u32.pow((failures - 1).min(16));
            // Clients that failed at the same time do not all return at the same time.
            let nanoseconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let nanoseconds = nanoseconds.map_or(0, |since| since.subsec_nanos());
            let spread = 0.5 + f64::from(nanoseconds % 1000) / 2000.0;
            let pause = asked.unwrap_or(doubled.min(LONGEST_BACKOFF).mul_f64(spread));
            let seconds = pause.as_secs_f64();
            let what = request.what();
            self.told(observer, FetchEvent::Waiting { what, why, seconds })?;
            self.wait(pause, observer)?;
        }
    }

    fn unavailable_hint(&self) -> String {
        let host = self.endpoint.host_str().unwrap_or_default();
        format!(
            "check the connection to {host}; with HF_HUB_OFFLINE=1 the cache alone is used, and HF_ENDPOINT names a mirror"
        )
    }

    fn told(&self, observer: Observer<'_>, event: FetchEvent) -> Result<(), HubError> {
        match observer(event) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(HubError::Stopped),
        }
    }

    fn wait(&self, pause: Duration, observer: Observer<'_>) -> Result<(), HubError> {
        let end = Instant::now() + pause;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            self.told(observer, FetchEvent::Tick)?;
            std::thread::sleep(left.min(TICK));
        }
        Ok(())
    }

    /// Sends a request and waits for the headers of a successful response. `from` is the first byte that is wanted.
    pub(super) fn open(
        &self,
        request: HubRequest<'_>,
        method: Method,
        from: Option<u64>,
        observer: Observer<'_>,
    ) -> Result<Response, AttemptFailure> {
        let whole = format!(
            "{}/{}",
            self.endpoint.as_str().trim_end_matches('/'),
            request.path
        );
        let mut url = Url::parse(&whole).map_err(|e| {
            AttemptFailure::Final(HubError::Malformed {
                what: request.what(),
                why: e.to_string(),
            })
        })?;
        for _ in 0..=REDIRECTS {
            let headers = self.headers(&url, from)?;
            let sent = self.client.request(method.clone(), url.clone());
            let response = self.within_idle(sent.headers(headers).send(), observer)?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            if !status.is_redirection() {
                return Err(self.refused(request, response));
            }
            // The Hub's own redirect to a CDN carries the facts about the file, which the CDN does not repeat.
            if method == Method::HEAD && response.headers().contains_key("x-linked-etag") {
                return Ok(response);
            }
            url = self.redirected(request, &url, &response)?;
        }
        let why = format!("more than {REDIRECTS} times");
        let what = request.what();
        Err(HubError::Redirect { what, why }.into())
    }

    /// The headers of a request for a file from a byte on, or of another request. Only the endpoint gets the token.
    fn headers(&self, url: &Url, from: Option<u64>) -> Result<HeaderMap, HubError> {
        let mut headers = HeaderMap::new();
        if let Some(from) = from {
            // A compressed response would have other bytes than the file.
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            if from > 0 {
                let range = HeaderValue::from_str(&format!("bytes={from}-"));
                headers.extend(range.ok().map(|range| (RANGE, range)));
            }
        }
        if let Some(token) = &self.token
            && url.origin() == self.endpoint.origin()
        {
            let mut value = HeaderValue::from_str(&token.authorization()).map_err(|_| {
                HubError::Settings(
                    "the token has characters that an HTTP header cannot contain\nhint: check HF_TOKEN".to_owned(),
                )
            })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        Ok(headers)
    }

    fn redirected(
        &self,
        request: HubRequest<'_>,
        from: &Url,
        response: &Response,
    ) -> Result<Url, HubError> {
        let refuse = |why: &str| HubError::Redirect {
            what: request.what(),
            why: why.to_owned(),
        };
        let to = response.headers().get(LOCATION);
        let to = to.and_then(|to| from.join(to.to_str().ok()?).ok());
        let to = to.ok_or_else(|| refuse("to no valid address"))?;
        match (from.scheme(), to.scheme()) {
            ("https", "https") | ("http", "http" | "https") => Ok(to),
            _ => Err(refuse("from https to an address that is not https")),
        }
    }

    /// The next part of a response's body; `None` at its end.
    pub(super) fn chunk(
        &self,
        response: &mut Response,
        observer: Observer<'_>,
    ) -> Result<Option<bytes::Bytes>, AttemptFailure> {
        self.within_idle(response.chunk(), observer)
    }

    /// Waits for a step of a request as long as the settings allow, and looks at the observer meanwhile.
    fn within_idle<T>(
        &self,
        step: impl Future<Output = reqwest::Result<T>>,
        observer: Observer<'_>,
    ) -> Result<T, AttemptFailure> {
        let began = Instant::now();
        self.runtime.block_on(async {
            let mut step = std::pin::pin!(step);
            loop {
                match timeout(TICK.min(self.settings.idle), &mut step).await {
                    Ok(Ok(value)) => return Ok(value),
                    Ok(Err(e)) => {
                        let mut why = describe(&e);
                        if let Some(token) = &self.token {
                            token.scrub(&mut why, TextKind::Message);
                        }
                        return Err(AttemptFailure::Transient(why, None));
                    }
                    Err(_) if began.elapsed() >= self.settings.idle => {
                        let seconds = self.settings.idle.as_secs_f64();
                        let why = format!("no data arrived for {seconds} s");
                        return Err(AttemptFailure::Transient(why, None));
                    }
                    Err(_) => self.told(observer, FetchEvent::Tick)?,
                }
            }
        })
    }

    /// The failure that an error response stands for.
    fn refused(&self, request: HubRequest<'_>, mut response: Response) -> AttemptFailure {
        let status = response.status();
        let header = |name: &str| {
            let value = response.headers().get(name);
            value
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        if matches!(status.as_u16(), 408 | 425 | 429 | 500..=599) {
            let asked = header(RETRY_AFTER.as_str()).and_then(|text| text.trim().parse().ok());
            let why = format!("the server answered with status {status}");
            return AttemptFailure::Transient(why, asked.map(Duration::from_secs));
        }
        let (code, told) = (header("x-error-code"), header("x-error-message"));
        let mut message = told.unwrap_or_else(|| self.beginning(&mut response));
        if let Some(token) = &self.token {
            token.scrub(&mut message, TextKind::Message);
        }
        let refusal = Refusal {
            status,
            code: code.as_deref().unwrap_or_default(),
            message: message.trim(),
            endpoint: self.endpoint(),
            has_token: self.token.is_some(),
        };
        AttemptFailure::Final(refusal.error(request))
    }

    /// The beginning of an error response, on one line.
    fn beginning(&self, response: &mut Response) -> String {
        let mut body = Vec::new();
        let mut silent = |_: FetchEvent| ControlFlow::Continue(());
        while let Ok(Some(chunk)) = self.chunk(response, &mut silent) {
            body.extend_from_slice(&chunk);
            if body.len() > REFUSAL_BYTES {
                break;
            }
        }
        let text = String::from_utf8_lossy(&body);
        let is_markup = text.trim_start().starts_with('<');
        let words: Vec<&str> = text.split_whitespace().collect();
        let mut line = if is_markup {
            String::new()
        } else {
            words.join(" ")
        };
        line.truncate(line.floor_char_boundary(300));
        line
    }

    /// Base URL of the Hub.
    pub(super) fn endpoint(&self) -> &str {
        self.endpoint.as_str().trim_end_matches('/')
    }
}

/// Describes an error with its causes, without the URL, which may be signed.
fn describe(error: &reqwest::Error) -> String {
    let mut causes: Vec<String> = Vec::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(e) = cause {
        causes.push(e.to_string());
        cause = e.source();
    }
    match causes.is_empty() {
        true => "the request failed".to_owned(),
        false => causes.join(": "),
    }
}
