//! Sends the requests of a probe one after the other, and counts them.

use serde_json::{Value, json};

use crate::http::transport::{EndpointClient, send};
use crate::http::{Failure, FailureReason, RequestSettings, TokenUsage};
use crate::reply_json;

/// A client for the endpoint that is probed.
pub(super) struct ProbeClient<'a> {
    pub(super) endpoint: EndpointClient,
    pub(super) settings: &'a RequestSettings,
    /// Number for texts that are in no server's cache.
    pub(super) nonce: u64,
    pub(super) spent: TokenUsage,
    pub(super) requests: u64,
}

/// A response of any status.
pub(super) struct ProbeResponse {
    pub(super) status: u16,
    /// JSON of the body; null if the body is not JSON.
    pub(super) json: Value,
    /// Text of the body.
    pub(super) text: String,
    pub(super) bytes: u64,
    pub(super) seconds: f64,
}

impl ProbeResponse {
    pub(super) fn is_success(&self) -> bool {
        (200..300).contains(&self.status) && self.json.get("error").is_none_or(Value::is_null)
    }

    /// The server's error message, shortened.
    pub(super) fn error_message(&self) -> String {
        let message = self
            .json
            .pointer("/error/message")
            .or_else(|| self.json.get("message"))
            .or_else(|| self.json.get("detail"))
            .and_then(Value::as_str)
            .unwrap_or(&self.text);
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        message.chars().map(printable).take(200).collect()
    }

    /// The first choice; null if there is none.
    pub(super) fn choice(&self) -> &Value {
        self.json.pointer("/choices/0").unwrap_or(&Value::Null)
    }

    /// Text of the first choice, from either API.
    pub(super) fn answer(&self) -> &str {
        let choice = self.choice();
        choice
            .pointer("/message/content")
            .or_else(|| choice.get("text"))
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// A count of the response's `usage`.
    pub(super) fn usage(&self, field: &str) -> Option<u64> {
        let count = self.json.get("usage")?.get(field)?.as_u64();
        count.filter(|&count| count <= 1 << 32)
    }
}

impl ProbeClient<'_> {
    /// Sends a request, by POST if there is a body and by GET otherwise. Only a missing response, or a refusal of the
    /// key, is an error.
    pub(super) async fn request(
        &mut self,
        path: &str,
        from_root: bool,
        body: Option<&Value>,
    ) -> Result<ProbeResponse, Failure> {
        self.requests += 1;
        let json = body.map(|body| body.to_string().into_bytes());
        let whole = send(&self.endpoint, path, from_root, json).await?;
        let bytes = whole.body.len() as u64;
        let text = String::from_utf8_lossy(&whole.body).into_owned();
        let response = ProbeResponse {
            status: whole.status,
            json: reply_json::value(text.as_bytes()).unwrap_or_default(),
            text,
            bytes,
            seconds: whole.seconds,
        };
        if matches!(response.status, 401..=403) && body.is_some() {
            let mut failure = Failure::new(FailureReason::Unauthorized, response.error_message());
            failure.status = Some(response.status);
            return Err(failure);
        }
        let count = |field| response.usage(field).unwrap_or(0);
        self.spent = self.spent.plus(&TokenUsage {
            prompt_tokens: count("prompt_tokens"),
            completion_tokens: count("completion_tokens"),
            ..TokenUsage::default()
        });
        Ok(response)
    }

    /// Requests a chat answer to one question. The fields of `more` are added to the request.
    pub(super) async fn chat(
        &mut self,
        question: &str,
        max_tokens: u32,
        more: Value,
    ) -> Result<ProbeResponse, Failure> {
        let mut body = json!({
            "model": self.settings.model,
            "messages": [{ "role": "user", "content": question }],
        });
        self.add_template_arguments(&mut body);
        if self.settings.reasoning_model {
            // Reasoning comes first, so a limit of a few tokens would leave no answer.
            let max_tokens = max_tokens.max(512);
            merge(&mut body, json!({ "max_completion_tokens": max_tokens }));
        } else {
            merge(
                &mut body,
                json!({ "max_tokens": max_tokens, "temperature": 0 }),
            );
            merge(&mut body, more);
        }
        self.request("/chat/completions", false, Some(&body)).await
    }

    /// Adds the arguments of the chat template to a request with messages.
    pub(super) fn add_template_arguments(&self, body: &mut Value) {
        let arguments = &self.settings.template_arguments;
        if !arguments.is_empty() {
            merge(body, json!({ "chat_template_kwargs": arguments.to_json() }));
        }
    }

    /// Requests the completion of a prompt: a text, token ids, or several texts. The fields of `more` are added to the
    /// request.
    pub(super) async fn complete(
        &mut self,
        prompt: Value,
        max_tokens: u32,
        more: Value,
    ) -> Result<ProbeResponse, Failure> {
        let mut body = json!({
            "model": self.settings.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
        });
        merge(&mut body, more);
        self.request("/completions", false, Some(&body)).await
    }
}

fn merge(body: &mut Value, more: Value) {
    if let (Value::Object(body), Value::Object(more)) = (body, more) {
        body.extend(more);
    }
}
