//! Where requests go, and how long each part of one may take.

use std::time::Duration;

use reqwest::Url;

use super::ApiKey;
use crate::Error;

/// A server that answers calls.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// Its name in the ledger and in errors.
    pub name: String,
    /// Base URL, such as `https://api.openai.com/v1`.
    pub url: String,
    /// What it is let in with.
    pub key: Option<ApiKey>,
    /// Its share of the calls, beside the other endpoints'; above 0.
    pub weight: f64,
    /// Requests that may be sent in a minute.
    pub requests_per_minute: Option<f64>,
    /// Tokens, of prompts and largest answers together, that may be asked for in a minute.
    pub tokens_per_minute: Option<f64>,
    /// Requests that may be under way at once; how many are is found out below this.
    pub max_in_flight: u32,
    /// Whether `http://` is allowed to other hosts than this one. Keys and prompts are then readable on the
    /// way.
    pub allow_plain_http: bool,
}

/// How long each part of a request may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// To a connection, with name and TLS.
    pub connect: Duration,
    /// From sending to the first byte of the reply. A reply that is not streamed begins when it is whole.
    pub first_byte: Duration,
    /// Between two pieces of a reply.
    pub idle: Duration,
    /// All of it.
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
    /// The URL, checked: https, or plain http to this host or where it is allowed; no name, password, query
    /// or fragment in it.
    pub(super) fn checked_url(&self) -> Result<Url, Error> {
        let refuse = |why: &str| Error::Endpoint {
            endpoint: self.name.clone(),
            why: why.to_owned(),
        };
        let url = Url::parse(&self.url).map_err(|e| {
            refuse(&format!(
                "`url` is not a URL ({e}): write it as `https://host/v1`"
            ))
        })?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refuse(
                "`url` holds a name or a password: give the key through `key_env` or `key_command`",
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(refuse(
                "`url` has a query or a fragment: paths are added to its end, so write it without",
            ));
        }
        match url.scheme() {
            "https" => {}
            "http" if self.allow_plain_http || is_loopback(&url) => {}
            "http" => {
                return Err(refuse(
                    "`url` is plain http to another host, where keys and prompts can be read on the way: use https, or set `allow_plain_http = true`",
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
            return Err(refuse("`max_in_flight` is 0: nothing could be asked"));
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

/// Whether a URL's host is this machine, by its name or number alone: nothing is looked up.
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
