//! The records that Potstill stores, as plain data. `docs/parquet.md` describes their columns.
//!
//! Log-probabilities and entropies are in nats. Token ids are those of the teacher's tokenizer, which [`Provenance`]
//! names. The field `provenance` of a row is an index into the list in the footer of its file.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::canonical::{canonical_json, sha256_hex};
use crate::curate::Split;
use crate::spelling::Spelling;

/// Role of a message's author.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Instructions that precede the conversation.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// All roles, in the order of their declaration.
    pub const ALL: [Role; 4] = [Role::System, Role::User, Role::Assistant, Role::Tool];

    /// Returns the name that chat templates and Parquet use.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }

    /// Returns the role with this name.
    pub fn from_name(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.name() == name)
    }
}

/// A call of a tool that the model requested.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Id that the tool's result refers to.
    pub id: Option<String>,
    /// The function's name.
    pub name: String,
    /// The arguments as JSON text.
    pub arguments: String,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Role of the author.
    pub role: Role,
    /// Text without the reasoning. It is empty if the turn only calls tools.
    pub content: String,
    /// Reasoning in front of the text, without the tags that a template puts around it.
    pub reasoning: Option<String>,
    /// Tool calls of this turn.
    pub tool_calls: Vec<ToolCall>,
    /// Id of the tool call whose result this turn is.
    pub tool_call_id: Option<String>,
}

impl Message {
    /// Creates a message that consists of text only.
    pub fn text(role: Role, content: impl Into<String>) -> Message {
        Message {
            role,
            content: content.into(),
            reasoning: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
        }
    }

    /// Converts the message to the JSON that prompt ids are computed from. Absent parts are left out, so parts that a
    /// later schema adds do not change the ids of prompts without them.
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

/// A prompt for a teacher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// Hash of messages and tools, so equal prompts have equal ids wherever they come from.
    pub id: String,
    /// The conversation up to the answer.
    pub messages: Vec<Message>,
    /// The tools that the model may call, as the text of a JSON array.
    pub tools: Option<String>,
    /// The right answer, for graders.
    pub reference: Option<String>,
    /// Part of the data that the prompt belongs to, such as a subject. The report gives figures for each part.
    pub group: Option<String>,
    /// File and line that the prompt came from, such as `train.jsonl:17`.
    pub source: String,
}

impl Prompt {
    /// Creates a prompt. Its id is the first 32 hex digits of the SHA-256 of its messages and tools as canonical JSON;
    /// reference, group and source do not affect it.
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

/// Reason why the generation of an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model wrote an EOS token or a stop string.
    Stop,
    /// The limit on new tokens was reached.
    Length,
    /// The model called tools.
    ToolCalls,
    /// The server withheld the rest.
    ContentFilter,
    /// The server failed during generation.
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

    /// Returns the name that Parquet uses.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ToolCalls => "tool_calls",
            FinishReason::ContentFilter => "content_filter",
            FinishReason::Error => "error",
        }
    }

    /// Returns the reason with this name.
    pub fn from_name(name: &str) -> Option<FinishReason> {
        FinishReason::ALL
            .into_iter()
            .find(|reason| reason.name() == name)
    }
}

/// Number of tokens that an answer used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Number of tokens of the rendered prompt.
    pub prompt_tokens: u32,
    /// Number of tokens of the completion, reasoning included.
    pub completion_tokens: u32,
}

/// An alternative at a position of an answer: one of the most probable tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopToken {
    /// Id of the token, if the teacher reports ids.
    pub id: Option<u32>,
    /// Bytes of the token.
    pub bytes: Spelling,
    /// Log-probability of the token at T = 1, in nats.
    pub logprob: f32,
}

/// A sampled token of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampledToken {
    /// Bytes of the token; a character may be spread over several tokens.
    pub bytes: Spelling,
    /// Id of the token, if the teacher reports ids.
    pub id: Option<u32>,
    /// Log-probability of the token at T = 1, in nats.
    pub logprob: f32,
    /// The most probable tokens at this position, as many as the teacher reported.
    pub top: Vec<TopToken>,
}

/// A teacher's answer to a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Number of the sample among those of its prompt, from 0.
    pub sample_index: u32,
    /// Reasoning, without the tags around it.
    pub reasoning: Option<String>,
    /// The answer, without reasoning.
    pub answer: String,
    /// Tool calls.
    pub tool_calls: Vec<ToolCall>,
    /// Reason why the generation ended.
    pub finish_reason: FinishReason,
    /// Number of tokens used.
    pub usage: Usage,
    /// The sampled tokens; empty if the teacher reports text only.
    pub tokens: Vec<SampledToken>,
    /// Index into the list of provenances in the file's footer.
    pub provenance: u32,
}

/// Origin of rows. Rows with the same provenance may be trained on together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Name of the teacher: a model's name, or the name of a checkpoint's folder.
    pub teacher: String,
    /// Hash of the checkpoint's files, or the server that answered.
    pub revision: String,
    /// Engine and its version.
    pub engine: String,
    /// Number format of the computation, such as `f32`.
    pub dtype: String,
    /// Fingerprint of the tokenizer.
    pub tokenizer: String,
    /// Hash of the chat template.
    pub template: String,
    /// Sampling settings as canonical JSON.
    pub sampling: String,
    /// Temperatures of the entries of [`DistributionRow::log_z_at`](crate::DistributionRow::log_z_at).
    pub temperatures: Vec<f32>,
    /// Licence under which the teacher's answers may be used.
    pub licence: Option<String>,
}

/// Position of a row of `completions/` and `signals/` that curation selected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selected {
    /// Number of the shard, from 0.
    pub shard: u32,
    /// Row within the shard, from 0.
    pub row: u32,
    /// Id of the prompt.
    pub prompt_id: String,
    /// Number of the sample among those of its prompt, from 0.
    pub sample_index: u32,
}

/// An answer that curation left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Number of the sample among those of its prompt, from 0.
    pub sample_index: u32,
    /// Reason in a few words.
    pub reason: String,
}

/// A prompt of dev or test that is nearly the same as a prompt to train on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NearDuplicate {
    /// Split of the prompt, dev or test.
    pub split: Split,
    /// Id of the prompt.
    pub prompt_id: String,
    /// Id of the most similar prompt to train on.
    pub train_prompt_id: String,
    /// Similarity of the two prompts, from [`NEAR_DUPLICATE_SIMILARITY`](crate::NEAR_DUPLICATE_SIMILARITY) to 1.
    pub similarity: f64,
}

/// Reason of an answer whose distributions could not be computed, in [`Failed::reason`].
pub const NO_SIGNAL: &str = "no_signal";

/// An answer that a teacher did not give, or an answer whose distributions could not be computed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Number of the sample among those of its prompt, from 0.
    pub sample_index: u32,
    /// Reason as one word, such as `content_filter`; `no_signal` for an answer without distributions.
    pub reason: String,
    /// Reason as a sentence.
    pub message: String,
}

/// Measurements of a model on one text: sums over its loss positions, from which any mean can be computed, and two
/// probabilities at each loss position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SequenceValues {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Number of the sample among those of its prompt, from 0.
    pub sample_index: u32,
    /// Number of loss positions.
    pub tokens: u32,
    /// Sum of the forward KL from teacher to student on the coarse vocabulary, in nats.
    pub kl_nats: f64,
    /// Sum of the student's negative log-likelihood, in nats.
    pub nll_nats: f64,
    /// Number of positions at which student and teacher have the same most probable token.
    pub agree: u32,
    /// Sum of the teacher's negative log-likelihood, in nats.
    pub teacher_nll_nats: f64,
    /// Sum of the entropies of the teacher's distributions, in nats; 0 if no distributions are stored.
    pub teacher_entropy_nats: f64,
    /// The model's probability of the teacher's most probable token, at each loss position. If no distributions are
    /// stored, the probability of the model's own most probable token.
    pub confidence: Vec<f32>,
    /// The teacher's probability of its most probable token, at each loss position. If no distributions are stored, 1 if
    /// the model's most probable token is the target token, otherwise 0.
    pub expected: Vec<f32>,
}

/// The divergence of a model from the teacher on an answer that the model wrote itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OwnText {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Number of the sample among those of its prompt, from 0.
    pub sample_index: u32,
    /// Number of tokens of the answer, including the one that ends it.
    pub tokens: u32,
    /// Sum over these tokens of the reverse KL from the model to the teacher on the whole vocabulary, in nats.
    pub reverse_kl_nats: f64,
}

/// A grader's verdict on an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Number of the sample among those of its prompt, from 0.
    pub sample_index: u32,
    /// Name of the grader.
    pub grader: String,
    /// Whether the answer is right.
    pub correct: bool,
    /// Final answer that the grader found in the text; `None` if it found none.
    pub extracted: Option<String>,
}

/// A student's answer to a question of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskSample {
    /// Id of the question.
    pub prompt_id: String,
    /// Reasoning, without the tags around it.
    pub reasoning: Option<String>,
    /// The answer, without reasoning.
    pub answer: String,
    /// Final answer that the grader found in the text; `None` if it found none.
    pub extracted: Option<String>,
    /// Whether the answer is right.
    pub correct: bool,
    /// Whether the answer ended by itself, not at the limit on new tokens.
    pub finished: bool,
    /// Number of tokens of the completion, reasoning included.
    pub tokens: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Paid answers on disk are found by the ids of their prompts, so the ids must not change from version to version.
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
