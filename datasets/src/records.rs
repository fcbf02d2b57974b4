//! What Potstill stores, as plain data. `docs/parquet.md` says the same column by column.
//!
//! Log-probabilities and entropies are in nats. Token ids are those of the teacher's tokenizer, named in
//! [`Provenance`]. A row's `provenance` is its index into the list in its file's footer.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::manifest::{canonical_json, sha256_hex};
use crate::spelling::Spelling;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Instructions that precede the conversation.
    System,
    /// The person who asks.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// All roles, in the order of their declaration.
    pub const ALL: [Role; 4] = [Role::System, Role::User, Role::Assistant, Role::Tool];

    /// The name in chat templates and in Parquet.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }

    /// The role of that name.
    pub fn from_name(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.name() == name)
    }
}

/// A call that the model asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// What the tool's answer refers to.
    pub id: Option<String>,
    /// The function's name.
    pub name: String,
    /// The arguments as JSON text.
    pub arguments: String,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said, without reasoning. Empty where a turn only calls tools.
    pub content: String,
    /// What was thought before, without the marks a template puts around it.
    pub reasoning: Option<String>,
    /// The calls made in this turn.
    pub tool_calls: Vec<ToolCall>,
    /// The call this turn answers.
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A message of text alone.
    pub fn text(role: Role, content: impl Into<String>) -> Message {
        Message {
            role,
            content: content.into(),
            reasoning: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
        }
    }

    /// Absent parts are left out, so that parts added by a later schema leave the ids of today's prompts alone.
    fn to_canonical(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("role".into(), self.role.name().into());
        fields.insert("content".into(), self.content.as_str().into());
        if let Some(reasoning) = &self.reasoning {
            fields.insert("reasoning".into(), reasoning.as_str().into());
        }
        if !self.tool_calls.is_empty() {
            let calls = self.tool_calls.iter().map(|call| {
                let mut fields = Map::new();
                if let Some(id) = &call.id {
                    fields.insert("id".into(), id.as_str().into());
                }
                fields.insert("name".into(), call.name.as_str().into());
                fields.insert("arguments".into(), call.arguments.as_str().into());
                Value::Object(fields)
            });
            fields.insert("tool_calls".into(), Value::Array(calls.collect()));
        }
        if let Some(id) = &self.tool_call_id {
            fields.insert("tool_call_id".into(), id.as_str().into());
        }
        Value::Object(fields)
    }
}

/// What a teacher is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// Hash of messages and tools: the same question has the same id wherever it comes from.
    pub id: String,
    /// The conversation so far.
    pub messages: Vec<Message>,
    /// The tools on offer: a JSON array as text.
    pub tools: Option<String>,
    /// The right answer, for graders.
    pub reference: Option<String>,
    /// Which part of the data it belongs to, such as a subject; figures are given for each.
    pub group: Option<String>,
    /// Where it came from, such as `train.jsonl:17`.
    pub source: String,
}

impl Prompt {
    /// A prompt whose id is the first 32 hex digits of the SHA-256 of its messages and tools as canonical JSON.
    /// Reference, group and source are not part of the id.
    pub fn new(
        messages: Vec<Message>,
        tools: Option<String>,
        reference: Option<String>,
        source: String,
    ) -> Prompt {
        let mut fields = Map::new();
        fields.insert(
            "messages".into(),
            Value::Array(messages.iter().map(Message::to_canonical).collect()),
        );
        if let Some(tools) = &tools {
            fields.insert("tools".into(), tools.as_str().into());
        }
        let mut id = sha256_hex(canonical_json(&Value::Object(fields)).as_bytes());
        id.truncate(32);
        Prompt {
            id,
            messages,
            tools,
            reference,
            group: None,
            source,
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An EOS token or a stop string.
    Stop,
    /// The limit on new tokens.
    Length,
    /// Tools were called.
    ToolCalls,
    /// The server withheld the rest.
    ContentFilter,
    /// The server failed in the middle.
    Error,
}

impl FinishReason {
    /// All reasons, in the order of their declaration.
    pub const ALL: [FinishReason; 5] = [
        FinishReason::Stop,
        FinishReason::Length,
        FinishReason::ToolCalls,
        FinishReason::ContentFilter,
        FinishReason::Error,
    ];

    /// The name in Parquet.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ToolCalls => "tool_calls",
            FinishReason::ContentFilter => "content_filter",
            FinishReason::Error => "error",
        }
    }

    /// The reason of that name.
    pub fn from_name(name: &str) -> Option<FinishReason> {
        FinishReason::ALL
            .into_iter()
            .find(|reason| reason.name() == name)
    }
}

/// What an answer cost, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the rendered prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer, reasoning included.
    pub completion_tokens: u32,
}

/// An alternative at one position of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopToken {
    /// The token's id, where the teacher gives one.
    pub id: Option<u32>,
    /// The token's bytes.
    pub bytes: Spelling,
    /// Its log-probability at T=1, nats.
    pub logprob: f32,
}

/// A token of an answer, as sampled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampledToken {
    /// The token's bytes; a character may be spread over several tokens.
    pub bytes: Spelling,
    /// The token's id, where the teacher gives one.
    pub id: Option<u32>,
    /// Its log-probability at T=1, nats.
    pub logprob: f32,
    /// The likeliest tokens here, as many as the teacher gave.
    pub top: Vec<TopToken>,
}

/// A teacher's answer to a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// The prompt's id.
    pub prompt_id: String,
    /// Which sample of the prompt, from 0.
    pub sample_index: u32,
    /// What was thought first, without the marks around it.
    pub reasoning: Option<String>,
    /// The answer, without reasoning.
    pub answer: String,
    /// The tools called.
    pub tool_calls: Vec<ToolCall>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What it cost.
    pub usage: Usage,
    /// The tokens as sampled; empty where the teacher gives text alone.
    pub tokens: Vec<SampledToken>,
    /// Index into the footer's list.
    pub provenance: u32,
}

/// Where rows come from. Two rows with the same provenance may be trained on together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The teacher's name: a model, or the folder's name of a checkpoint.
    pub teacher: String,
    /// What exactly answered: a hash of a checkpoint's files, or the server.
    pub revision: String,
    /// The engine and its version.
    pub engine: String,
    /// What it computed in, such as `f32`.
    pub dtype: String,
    /// Fingerprint of the tokenizer.
    pub tokenizer: String,
    /// Hash of the chat template.
    pub template: String,
    /// How answers were sampled, as canonical JSON.
    pub sampling: String,
    /// The temperatures that [`SignalRow::log_z_at`](crate::SignalRow::log_z_at) is for.
    pub temperatures: Vec<f32>,
    /// Under what licence the teacher's answers may be used.
    pub licence: Option<String>,
}

/// A row of `completions/` and `signals/` that curation chose, by place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selected {
    /// The shard's number, from 0.
    pub shard: u32,
    /// The row in the shard, from 0.
    pub row: u32,
    /// The prompt's id.
    pub prompt_id: String,
    /// Which sample of the prompt, from 0.
    pub sample_index: u32,
}

/// An answer that curation left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// The prompt's id.
    pub prompt_id: String,
    /// Which sample of the prompt, from 0.
    pub sample_index: u32,
    /// Why, in a word or a few.
    pub reason: String,
}

/// Reason of an answer whose distributions could not be made, in [`Failed::reason`].
pub const NO_SIGNAL: &str = "no_signal";

/// An answer that a teacher did not give, or one whose distributions could not be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// The prompt's id.
    pub prompt_id: String,
    /// Which sample of the prompt, from 0.
    pub sample_index: u32,
    /// Why, in a word, such as `content_filter`; `no_signal` where there is an answer without distributions.
    pub reason: String,
    /// The same in a sentence.
    pub message: String,
}

/// How many bins of equal width the student's confidence, from 0 to 1, is counted in.
pub const CONFIDENCE_BINS: usize = 10;

/// What evaluation measured on one held-out text. Sums over its loss positions, so that any mean can be formed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SequenceValues {
    /// The prompt's id.
    pub prompt_id: String,
    /// Which sample of the prompt, from 0.
    pub sample_index: u32,
    /// How many loss positions.
    pub tokens: u32,
    /// Sum of the forward KL from teacher to student on the coarse vocabulary, nats.
    pub kl_nats: f64,
    /// Sum of the student's negative log-likelihood, nats.
    pub nll_nats: f64,
    /// At how many positions the student's likeliest token is the teacher's.
    pub agree: u32,
    /// Sum of the teacher's negative log-likelihood, nats.
    pub teacher_nll_nats: f64,
    /// How many positions are in each of [`CONFIDENCE_BINS`] bins of the student's confidence, the probability of its
    /// likeliest token: bin i holds i/10 up to, not including, (i+1)/10, the last one 1 as well.
    pub bin_tokens: Vec<u32>,
    /// By bin, the sum of these confidences.
    pub bin_confidence: Vec<f64>,
    /// By bin, at how many positions the student's likeliest token is the one in the text.
    pub bin_correct: Vec<u32>,
}

/// What a grader found of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The prompt's id.
    pub prompt_id: String,
    /// Which sample of the prompt, from 0.
    pub sample_index: u32,
    /// The grader's name.
    pub grader: String,
    /// Whether the answer is right.
    pub correct: bool,
    /// What the grader took the answer to be; `None` where it found none.
    pub extracted: Option<String>,
}

/// What a student answered to a question of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskSample {
    /// The question's id.
    pub prompt_id: String,
    /// What was thought first, without the marks around it.
    pub reasoning: Option<String>,
    /// The answer, without reasoning.
    pub answer: String,
    /// What the grader took the answer to be; `None` where it found none.
    pub extracted: Option<String>,
    /// Whether the answer is right.
    pub correct: bool,
    /// Whether it ended by itself, and not at the limit on new tokens.
    pub finished: bool,
    /// Tokens of the answer, reasoning included.
    pub tokens: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids name paid answers on disk: they must not change from version to version.
    #[test]
    fn the_id_of_a_prompt_is_stable() {
        let messages = vec![Message::text(Role::User, "2 + 2?")];
        let id = |prompt: Prompt| prompt.id;
        let plain = id(Prompt::new(messages.clone(), None, None, "a:1".into()));
        // python: hashlib.sha256(b'{"messages":[{"content":"2 + 2?","role":"user"}]}').hexdigest()[:32]
        assert_eq!(plain, "48f4d5ff679b3689a979a7879c33d376");
        assert_eq!(
            plain,
            id(Prompt::new(
                messages.clone(),
                None,
                Some("4".into()),
                "b:9".into()
            ))
        );
        assert_ne!(
            plain,
            id(Prompt::new(
                messages.clone(),
                Some("[]".into()),
                None,
                String::new()
            ))
        );
        let mut other = messages;
        other[0].reasoning = Some(String::new());
        assert_ne!(plain, id(Prompt::new(other, None, None, String::new())));
    }
}
