//! Bodies of the test server's responses, correct and faulty ones.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Fault, ParsedRequest, Plan, hash};

/// A parsed request, and the answer that the server will give.
pub(super) struct PlannedAnswer {
    pub(super) question: Value,
    pub(super) text: String,
    pub(super) is_chat: bool,
    pub(super) is_stream: bool,
    pub(super) words: Vec<String>,
    pub(super) prompt_tokens: u64,
    pub(super) is_cut: bool,
    pub(super) echo: Option<String>,
    pub(super) usage: bool,
}

pub(super) fn plan_answer(request: &ParsedRequest, plan: &Plan) -> Option<(PlannedAnswer, u64)> {
    let question: Value = serde_json::from_slice(&request.body).ok()?;
    let is_chat = request.path.ends_with("/chat/completions");
    let text = if is_chat {
        let messages = question.get("messages")?.as_array()?;
        let texts = messages.iter().filter_map(|m| m.get("content")?.as_str());
        texts.collect::<Vec<_>>().join("\n")
    } else {
        question.get("prompt")?.to_string()
    };
    let seed = question
        .get("seed")
        .map(Value::to_string)
        .unwrap_or_default();
    let key = hash(&[text.as_bytes(), seed.as_bytes()]);
    let limit = ["max_tokens", "max_completion_tokens"]
        .iter()
        .find_map(|name| question.get(name)?.as_u64())
        .unwrap_or(u64::MAX);
    let wanted = plan.answer_tokens as u64;
    let words = (0..wanted.min(limit))
        .map(|i| {
            let drawn = hash(&[&key.to_le_bytes(), &i.to_le_bytes()]);
            let mut word = format!("{drawn:016x}").repeat(1 + plan.token_bytes / 16);
            word.truncate(plan.token_bytes.saturating_sub(1).max(1));
            word + " "
        })
        .collect();
    let planned = PlannedAnswer {
        is_chat,
        is_stream: question.get("stream") == Some(&Value::Bool(true)),
        words,
        prompt_tokens: text.split_whitespace().count().max(1) as u64,
        is_cut: limit < wanted,
        echo: request.authorization.clone().filter(|_| plan.echo),
        usage: plan.usage,
        text,
        question,
    };
    Some((planned, key))
}

/// Text of the choice, with the repeated header if there is one.
fn answer_text(planned: &PlannedAnswer) -> String {
    let mut text: String = planned.words.concat();
    if let Some(echo) = &planned.echo {
        text.push_str(echo);
    }
    text
}

fn usage(planned: &PlannedAnswer) -> Value {
    let completion = planned.words.len();
    json!({
        "prompt_tokens": planned.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": planned.prompt_tokens + completion as u64,
    })
}

/// Log-probabilities of some words in the form of the chat API; `None` if they were not requested.
fn logprobs(planned: &PlannedAnswer, words: &[String], fault: Option<Fault>) -> Option<Value> {
    let is_asked = planned.question.get("logprobs") == Some(&Value::Bool(true));
    if !is_asked || !planned.is_chat {
        return None;
    }
    let top = planned
        .question
        .get("top_logprobs")
        .and_then(Value::as_u64)
        .unwrap_or(0);
    let mut content: Vec<Value> = words
        .iter()
        .map(|word| {
            let token = if fault == Some(Fault::IdsOutOfRange) {
                "token_id:99999999999".to_owned()
            } else {
                word.clone()
            };
            let tops: Vec<Value> = (0..top)
                .map(|i| {
                    let other = if i == 0 { word.clone() } else { format!("t{i}") };
                    json!({"token": other, "logprob": -0.25 - i as f64, "bytes": other.as_bytes()})
                })
                .collect();
            json!({"token": token, "logprob": -0.25, "bytes": token.as_bytes(), "top_logprobs": tops})
        })
        .collect();
    if fault == Some(Fault::FewerLogprobs) {
        content.pop();
    }
    Some(json!({"content": content, "refusal": null}))
}

/// Replaces a fault that the request gives no occasion for by another one.
fn fitting(planned: &PlannedAnswer, fault: Option<Fault>) -> Option<Fault> {
    let has_logprobs = logprobs(planned, &[], None).is_some();
    match fault {
        Some(Fault::FewerLogprobs | Fault::IdsOutOfRange) if !has_logprobs || planned.is_stream => {
            Some(Fault::NoChoice)
        }
        fault => fault,
    }
}

pub(super) fn whole(planned: &PlannedAnswer, fault: Option<Fault>) -> String {
    let fault = fitting(planned, fault);
    let mut choice = if planned.is_chat {
        json!({"index": 0, "message": {"role": "assistant", "content": answer_text(planned)}})
    } else {
        json!({"index": 0, "text": answer_text(planned)})
    };
    choice["finish_reason"] = if planned.is_cut {
        "length".into()
    } else {
        "stop".into()
    };
    choice["logprobs"] = logprobs(planned, &planned.words, fault).unwrap_or(Value::Null);
    if fault == Some(Fault::Empty) {
        if planned.is_chat {
            choice["message"]["content"] = "".into();
        } else {
            choice["text"] = "".into();
        }
        choice["logprobs"] = Value::Null;
    }
    let object = if planned.is_chat {
        "chat.completion"
    } else {
        "text_completion"
    };
    let mut body =
        json!({"id": "x", "object": object, "created": 0, "model": "faulty", "choices": [choice]});
    if planned.usage {
        body["usage"] = usage(planned);
    }
    match fault {
        Some(Fault::NoChoice) => body["choices"] = json!([]),
        Some(Fault::WrongShape) => return r#"{"choices":{"text":[1,2,3]},"object":7}"#.into(),
        Some(Fault::ErrorInside) => {
            return json!({"error": {"message": "an error inside", "type": "server_error", "code": 500}}).to_string();
        }
        _ => {}
    }
    broken(body.to_string(), fault)
}

/// Puts `NaN` into the text, if that is the fault.
fn broken(text: String, fault: Option<Fault>) -> String {
    match fault {
        Some(Fault::NotANumber) => text.replacen("\"index\":0", "\"index\":NaN", 1),
        _ => text,
    }
}

pub(super) fn streamed(planned: &PlannedAnswer, fault: Option<Fault>) -> Vec<u8> {
    let fault = fitting(planned, fault);
    let mut text = String::new();
    let object = if planned.is_chat {
        "chat.completion.chunk"
    } else {
        "text_completion"
    };
    let mut event = |choices: Value, usage: Option<Value>| {
        let mut body = json!({"id": "x", "object": object, "created": 0, "model": "faulty", "choices": choices});
        if let Some(usage) = usage {
            body["usage"] = usage;
        }
        let _ = write!(text, "data: {}\n\n", broken(body.to_string(), fault));
    };
    match fault {
        Some(Fault::ErrorInside) => {
            return b"data: {\"error\":{\"message\":\"an error inside\",\"code\":500}}\n\n"
                .to_vec();
        }
        Some(Fault::WrongShape) => {
            return b"data: {\"choices\":{\"text\":[1,2,3]}}\n\ndata: [DONE]\n\n".to_vec();
        }
        _ => {}
    }
    let has_text = !matches!(fault, Some(Fault::NoChoice | Fault::Empty));
    let mut pieces = planned.words.clone();
    // The header is sent in two pieces, neither of which is the whole key.
    if let Some(echo) = &planned.echo {
        let (a, b) = echo.split_at(echo.len() / 2);
        pieces.extend([a.to_owned(), b.to_owned()]);
    }
    for piece in pieces.iter().filter(|_| has_text) {
        let mut choice = if planned.is_chat {
            json!({"index": 0, "delta": {"content": piece}})
        } else {
            json!({"index": 0, "text": piece})
        };
        choice["finish_reason"] = Value::Null;
        choice["logprobs"] =
            logprobs(planned, std::slice::from_ref(piece), None).unwrap_or(Value::Null);
        event(json!([choice]), None);
    }
    if fault != Some(Fault::NoChoice) {
        let reason = if planned.is_cut { "length" } else { "stop" };
        let mut choice = json!({"index": 0, "finish_reason": reason});
        if planned.is_chat {
            choice["delta"] = json!({});
        } else {
            choice["text"] = "".into();
        }
        event(json!([choice]), None);
    }
    let wants_usage =
        planned.question.pointer("/stream_options/include_usage") == Some(&Value::Bool(true));
    if planned.usage && wants_usage {
        event(json!([]), Some(usage(planned)));
    }
    text.push_str("data: [DONE]\n\n");
    text.into_bytes()
}
