//! Endpoints, and the time limits of requests to them.

use std::time::Duration;

use potstill_datasets::limits::SERVER_WAIT_SECONDS;
use potstill_datasets::range::{Count, Optional, Positive};
use reqwest::Url;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ApiKey;
use crate::Error;

/// A server that requests are sent to: one of `endpoints` of `[teacher]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Base URL, such as `http://localhost:8000/v1`.
    pub url: String,
    /// Environment variable that holds the API key. Default: that of `[teacher]`.
    pub key_env: Option<String>,
    /// Command that prints the API key; `sh` runs it. Default: that of `[teacher]`.
    pub key_command: Option<String>,
    /// Share of the requests relative to the other endpoints' weights.
    #[serde(with = "Positive", default = "one")]
    pub weight: f64,
    /// Largest number of requests a minute. Default: no limit.
    #[serde(with = "Optional::<Positive>", default)]
    pub requests_per_minute: Option<f64>,
    /// Largest number of tokens a minute, of prompts and longest answers together. Default: no limit.
    #[serde(with = "Optional::<Positive>", default)]
    pub tokens_per_minute: Option<f64>,
    /// Largest number of requests in flight. The concurrency limit adapts below this value. Default: `concurrency` of
    /// `[collect]`.
    #[serde(with = "Optional::<Count>", default)]
    pub max_in_flight: Option<u32>,
    /// Longest wait that the server may ask for, seconds. Default: that of `[teacher]`.
    #[serde(with = "Optional::<Positive>", default)]
    pub longest_wait: Option<f64>,
    /// Whether plain `http://` is allowed to another machine. Keys and prompts are then readable in transit.
    #[serde(default)]
    pub allow_plain_http: bool,
    /// Key that authorises requests. A run file cannot hold it.
    #[serde(skip)]
    pub key: Option<ApiKey>,
}

/// Requests in flight to an endpoint without a limit of its own.
pub const DEFAULT_CONCURRENCY: u32 = 64;

fn one() -> f64 {
    1.0
}

/// Time limits of a request: `timeouts` of `[collect]`, in seconds
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// Time until a connection is made, with name resolution and TLS.
    #[serde(with = "Positive")]
    pub connect: Duration,
    /// Time from sending to the first byte of the response. A response that is not streamed begins when the answer is
    /// complete.
    #[serde(with = "Positive")]
    pub first_byte: Duration,
    /// Time between two pieces of a response.
    #[serde(with = "Positive")]
    pub idle: Duration,
    /// Time of the whole request.
    #[serde(with = "Positive")]
    pub whole: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(10),
            first_byte: Duration::from_secs(600),
            idle: Duration::from_secs(120),
            whole: Duration::from_secs(1800),
        }
    }
}

impl Endpoint {
    /// An endpoint at a URL, without a key and without limits.
    pub fn new(url: impl Into<String>) -> Endpoint {
        Endpoint {
            url: url.into(),
            key_env: None,
            key_command: None,
            weight: 1.0,
            requests_per_minute: None,
            tokens_per_minute: None,
            max_in_flight: None,
            longest_wait: None,
            allow_plain_http: false,
            key: None,
        }
    }

    /// Name of the endpoint in the ledger and in messages: the URL without scheme and user.
    #[must_use]
    pub fn name(&self) -> &str {
        let name = self
            .url
            .split_once("://")
            .map_or(&*self.url, |(_, rest)| rest);
        let name = name.rsplit_once('@').map_or(name, |(_, rest)| rest);
        name.trim_end_matches('/')
    }

    /// Largest number of requests in flight.
    #[must_use]
    pub fn in_flight_limit(&self) -> u32 {
        self.max_in_flight.unwrap_or(DEFAULT_CONCURRENCY)
    }

    /// Longest wait that the server may ask for.
    #[must_use]
    pub fn longest_wait(&self) -> Duration {
        let seconds = self.longest_wait.unwrap_or(f64::from(SERVER_WAIT_SECONDS));
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Parses and checks the URL: https, or plain http to this host or where that is allowed, without user name,
    /// password, query or fragment.
    pub(super) fn checked_url(&self) -> Result<Url, Error> {
        let refuse = |why: &str| Error::Endpoint {
            endpoint: self.name().to_owned(),
            why: why.to_owned(),
        };
        let url = Url::parse(&self.url).map_err(|e| {
            refuse(&format!(
                "`url` is not a URL ({e})\nhint: write it as `https://host/v1`"
            ))
        })?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refuse(
                "`url` contains a user name or a password\nhint: give the key through `key_env` or `key_command`",
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(refuse(
                "`url` has a query or a fragment, but paths are appended to it\nhint: write it without them",
            ));
        }
        match url.scheme() {
            "https" => {}
            "http" if self.allow_plain_http || is_loopback(&url) => {}
            "http" => {
                return Err(refuse(
                    "`url` is plain http to another host, so keys and prompts can be read in transit\nhint: use https, or set `allow_plain_http = true`",
                ));
            }
            _ => return Err(refuse("`url` is neither https nor http")),
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(refuse("`url` names no host"));
        }
        if !(self.weight.is_finite() && self.weight > 0.0) {
            return Err(refuse("`weight` is not above 0"));
        }
        if self.max_in_flight == Some(0) {
            return Err(refuse(
                "`max_in_flight` is 0, so no request would be sent\nhint: set it to 1 or more",
            ));
        }
        for (name, rate) in [
            ("requests_per_minute", self.requests_per_minute),
            ("tokens_per_minute", self.tokens_per_minute),
        ] {
            if rate.is_some_and(|r| !(r.is_finite() && r > 0.0)) {
                return Err(refuse(&format!("`{name}` is not above 0")));
            }
        }
        Ok(url)
    }
}

/// Whether the host of a URL is this machine, by its name or address alone: no name is resolved.
fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost") => true,
        Some(host) => host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback()),
        None => false,
    }
}
