//! Endpoints, and the time limits of requests to them.

use std::time::Duration;

use reqwest::Url;

use super::ApiKey;
use crate::Error;

/// A server that requests are sent to.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// Name of the endpoint in the ledger and in errors.
    pub name: String,
    /// Base URL, such as `https://api.openai.com/v1`.
    pub url: String,
    /// Key that authorises requests.
    pub key: Option<ApiKey>,
    /// Share of the calls relative to the other endpoints' weights; above 0.
    pub weight: f64,
    /// Largest number of requests a minute.
    pub requests_per_minute: Option<f64>,
    /// Largest number of tokens a minute, of prompts and longest answers together.
    pub tokens_per_minute: Option<f64>,
    /// Largest number of requests in flight. The concurrency limit adapts below this value.
    pub max_in_flight: u32,
    /// Whether `http://` is allowed to other hosts than this one. Keys and prompts are then readable in
    /// transit.
    pub allow_plain_http: bool,
}

/// Time limits of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Time until a connection is made, with name resolution and TLS.
    pub connect: Duration,
    /// Time from sending to the first byte of the response. A response that is not streamed begins when the answer is
    /// complete.
    pub first_byte: Duration,
    /// Time between two pieces of a response.
    pub idle: Duration,
    /// Time of the whole request.
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
    /// Parses and checks the URL: https, or plain http to this host or where that is allowed, without user name,
    /// password, query or fragment.
    pub(super) fn checked_url(&self) -> Result<Url, Error> {
        let refuse = |why: &str| Error::Endpoint {
            endpoint: self.name.clone(),
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
        if self.max_in_flight == 0 {
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
