//! The bodies of the server's replies, right ones and wrong ones.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Asked, Fault, Plan, hash};

/// A request, parsed, and what the server will make of it.
pub(super) struct Work {
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

pub(super) fn work(asked: &Asked, plan: &Plan) -> Option<(Work, u64)> {
    let question: Value = serde_json::from_slice(&asked.body).ok()?;
    let is_chat = asked.path.ends_with("/chat/completions");
    let text = if is_chat {
        let messages = question.get("messages")?.as_array()?;
        let said = messages.iter().filter_map(|m| m.get("content")?.as_str());
        said.collect::<Vec<_>>().join("\n")
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
    let work = Work {
        is_chat,
        is_stream: question.get("stream") == Some(&Value::Bool(true)),
        words,
        prompt_tokens: text.split_whitespace().count().max(1) as u64,
        is_cut: limit < wanted,
        echo: asked.authorization.clone().filter(|_| plan.echo),
        usage: plan.usage,
        text,
        question,
    };
    Some((work, key))
}

/// The choice's text, with what the server was told to repeat.
fn said(work: &Work) -> String {
    let mut text: String = work.words.concat();
    if let Some(echo) = &work.echo {
        text.push_str(echo);
    }
    text
}

fn usage(work: &Work) -> Value {
    let completion = work.words.len();
    json!({
        "prompt_tokens": work.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": work.prompt_tokens + completion as u64,
    })
}

/// Log-probabilities of some words, as the chat door has them; `None` where none were asked for.
fn logprobs(work: &Work, words: &[String], fault: Option<Fault>) -> Option<Value> {
    let is_asked = work.question.get("logprobs") == Some(&Value::Bool(true));
    if !is_asked || !work.is_chat {
        return None;
    }
    let top = work
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

/// A fault of the content, where the request gives no occasion for the one that was drawn.
fn fitting(work: &Work, fault: Option<Fault>) -> Option<Fault> {
    let has_logprobs = logprobs(work, &[], None).is_some();
    match fault {
        Some(Fault::FewerLogprobs | Fault::IdsOutOfRange) if !has_logprobs || work.is_stream => {
            Some(Fault::NoChoice)
        }
        fault => fault,
    }
}

pub(super) fn whole(work: &Work, fault: Option<Fault>) -> String {
    let fault = fitting(work, fault);
    let mut choice = if work.is_chat {
        json!({"index": 0, "message": {"role": "assistant", "content": said(work)}})
    } else {
        json!({"index": 0, "text": said(work)})
    };
    choice["finish_reason"] = if work.is_cut {
        "length".into()
    } else {
        "stop".into()
    };
    choice["logprobs"] = logprobs(work, &work.words, fault).unwrap_or(Value::Null);
    if fault == Some(Fault::Empty) {
        if work.is_chat {
            choice["message"]["content"] = "".into();
        } else {
            choice["text"] = "".into();
        }
        choice["logprobs"] = Value::Null;
    }
    let object = if work.is_chat {
        "chat.completion"
    } else {
        "text_completion"
    };
    let mut body =
        json!({"id": "x", "object": object, "created": 0, "model": "faulty", "choices": [choice]});
    if work.usage {
        body["usage"] = usage(work);
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

/// The text with what JSON does not have, if that is the fault.
fn broken(text: String, fault: Option<Fault>) -> String {
    match fault {
        Some(Fault::NotANumber) => text.replacen("\"index\":0", "\"index\":NaN", 1),
        _ => text,
    }
}

pub(super) fn streamed(work: &Work, fault: Option<Fault>) -> Vec<u8> {
    let fault = fitting(work, fault);
    let mut text = String::new();
    let object = if work.is_chat {
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
    let mut pieces = work.words.clone();
    // The header comes in two pieces, neither of which is the key.
    if let Some(echo) = &work.echo {
        let (a, b) = echo.split_at(echo.len() / 2);
        pieces.extend([a.to_owned(), b.to_owned()]);
    }
    for piece in pieces.iter().filter(|_| has_text) {
        let mut choice = if work.is_chat {
            json!({"index": 0, "delta": {"content": piece}})
        } else {
            json!({"index": 0, "text": piece})
        };
        choice["finish_reason"] = Value::Null;
        choice["logprobs"] =
            logprobs(work, std::slice::from_ref(piece), None).unwrap_or(Value::Null);
        event(json!([choice]), None);
    }
    if fault != Some(Fault::NoChoice) {
        let reason = if work.is_cut { "length" } else { "stop" };
        let mut choice = json!({"index": 0, "finish_reason": reason});
        if work.is_chat {
            choice["delta"] = json!({});
        } else {
            choice["text"] = "".into();
        }
        event(json!([choice]), None);
    }
    let wants_usage =
        work.question.pointer("/stream_options/include_usage") == Some(&Value::Bool(true));
    if work.usage && wants_usage {
        event(json!([]), Some(usage(work)));
    }
    text.push_str("data: [DONE]\n\n");
    text.into_bytes()
}
