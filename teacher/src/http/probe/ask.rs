//! Asking: one question after the other, counted.

use serde_json::{Value, json};

use super::super::transport::{EndpointClient, send};
use super::super::{Failure, FailureReason, RequestSettings, TokenUsage};

/// An endpoint that is being asked.
pub(super) struct ProbeClient<'a> {
    pub(super) endpoint: EndpointClient,
    pub(super) request: &'a RequestSettings,
    /// Makes texts that no server has in its cache.
    pub(super) nonce: u64,
    pub(super) spent: TokenUsage,
    pub(super) requests: u64,
}

/// What came back: any status that a server gives is an answer here.
pub(super) struct ProbeResponse {
    pub(super) status: u16,
    /// The JSON; null where the body is none.
    pub(super) json: Value,
    /// The body, where it is text.
    pub(super) text: String,
    pub(super) bytes: u64,
    pub(super) seconds: f64,
}

impl ProbeResponse {
    pub(super) fn is_good(&self) -> bool {
        (200..300).contains(&self.status) && self.json.get("error").is_none_or(Value::is_null)
    }

    /// What the server says is wrong, shortened.
    pub(super) fn complaint(&self) -> String {
        let said = self
            .json
            .pointer("/error/message")
            .or_else(|| self.json.get("message"))
            .or_else(|| self.json.get("detail"))
            .and_then(Value::as_str)
            .unwrap_or(&self.text);
        let clean = |c: char| if c.is_control() { ' ' } else { c };
        said.chars().map(clean).take(200).collect()
    }

    /// The first of the answers.
    pub(super) fn choice(&self) -> &Value {
        self.json.pointer("/choices/0").unwrap_or(&Value::Null)
    }

    /// Its text, from either door.
    pub(super) fn answer(&self) -> &str {
        let choice = self.choice();
        choice
            .pointer("/message/content")
            .or_else(|| choice.get("text"))
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// A count of `usage`.
    pub(super) fn used(&self, name: &str) -> Option<u64> {
        self.json.get("usage")?.get(name)?.as_u64()
    }
}

/// Asks by POST with `body`, else by GET. Only a failure to get any answer is an error.
pub(super) async fn ask(
    client: &mut ProbeClient<'_>,
    path: &str,
    from_root: bool,
    body: Option<&Value>,
) -> Result<ProbeResponse, Failure> {
    client.requests += 1;
    let json = body.map(|body| body.to_string().into_bytes());
    let came = send(&client.endpoint, path, from_root, json).await?;
    let bytes = came.body.len() as u64;
    let text = String::from_utf8_lossy(&came.body).into_owned();
    let response = ProbeResponse {
        status: came.status,
        json: serde_json::from_str(&text).unwrap_or(Value::Null),
        text,
        bytes,
        seconds: came.seconds,
    };
    if matches!(response.status, 401..=403) && body.is_some() {
        let mut failure = Failure::new(FailureReason::Unauthorized, response.complaint());
        failure.status = Some(response.status);
        return Err(failure);
    }
    client.spent.prompt_tokens += response.used("prompt_tokens").unwrap_or(0);
    client.spent.completion_tokens += response.used("completion_tokens").unwrap_or(0);
    Ok(response)
}

/// Asks a chat of one question. `more` is merged into the request.
pub(super) async fn chat(
    client: &mut ProbeClient<'_>,
    question: &str,
    max_tokens: u32,
    more: Value,
) -> Result<ProbeResponse, Failure> {
    let mut body = json!({
        "model": client.request.model,
        "messages": [{ "role": "user", "content": question }],
    });
    if client.request.reasoning_model {
        // Reasoning is spent first; a limit of a few tokens would leave no answer.
        merge(
            &mut body,
            json!({ "max_completion_tokens": max_tokens.max(512) }),
        );
    } else {
        merge(
            &mut body,
            json!({ "max_tokens": max_tokens, "temperature": 0 }),
        );
        merge(&mut body, more);
    }
    ask(client, "/chat/completions", false, Some(&body)).await
}

/// Asks for the continuation of a prompt, which is a text, ids, or several texts.
pub(super) async fn complete(
    client: &mut ProbeClient<'_>,
    prompt: Value,
    max_tokens: u32,
    more: Value,
) -> Result<ProbeResponse, Failure> {
    let mut body = json!({
        "model": client.request.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
    });
    merge(&mut body, more);
    ask(client, "/completions", false, Some(&body)).await
}

fn merge(body: &mut Value, more: Value) {
    if let (Value::Object(body), Value::Object(more)) = (body, more) {
        body.extend(more);
    }
}
