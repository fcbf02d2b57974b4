//! Tests of the wire formats, with recorded and with written responses.

mod broken;
mod hostile;
mod requests;
mod responses;

use std::sync::Arc;

use potstill_datasets::{Message, Prompt, Role};

use crate::http::{Api, Call, CallTask, Dialect, RequestSettings};

fn settings(dialect: Dialect, logprobs: Option<u32>) -> RequestSettings {
    RequestSettings {
        model: "m".into(),
        dialect,
        api: Api::Chat,
        reasoning_model: false,
        max_tokens: Some(64),
        temperature: Some(0.5),
        top_p: None,
        top_k: None,
        min_p: None,
        repetition_penalty: None,
        stop: Vec::new(),
        seed: None,
        logprobs,
        stream: false,
        reasoning: None,
        template_arguments: Default::default(),
    }
}

fn call(task: CallTask) -> Call {
    let messages = vec![Message::text(Role::User, "What is the capital of Japan?")];
    Call {
        number: 7,
        prompt: Arc::new(Prompt::new(messages, None, None, "test:1".into())),
        sample_index: 3,
        task,
        max_prompt_tokens: 64,
    }
}
