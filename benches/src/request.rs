//! The request that a measuring process reads and the reply that it writes, both as JSON.
//!
//! Potstill's worker and `benches/peer.py` read the same request.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Work that one process measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// Optimizer steps.
    Step,
    /// Hidden states of a text, and logits after its last token.
    Prefill,
    /// Greedy answers.
    Decode,
    /// The teacher's sparse distributions over texts.
    Capture,
    /// Seconds of each part of a step; Potstill only.
    Profile,
    /// The gradient of one text, once, for its peak memory; Potstill only.
    Memory,
    /// The loss from hidden states and head, with both gradients, and its three products alone.
    Loss,
    /// One evaluation of the loss, for its peak memory; Potstill only.
    LossMemory,
}

/// Program that computes the workload, and the form in which it computes the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Implementation {
    /// Potstill, in chunks by the kernels.
    #[default]
    Fused,
    /// Potstill, by tensor operations on all rows at once.
    Plain,
    /// PyTorch, one operation at a time.
    Eager,
    /// The same with weights, gradients and moments in bf16, where [`Implementation::Eager`] has f32 weights and
    /// autocast.
    EagerBf16,
    /// PyTorch, `torch.compile`.
    Compile,
    /// Liger's fused linear JSD, with a dense teacher of the same width.
    LigerJsd,
    /// Liger's fused linear KL, from dense probabilities.
    LigerKl,
    /// Liger's fused linear cross-entropy, from one token a row.
    LigerCrossEntropy,
    /// The same by Liger's CuTe kernels for Hopper.
    LigerCuteCrossEntropy,
    /// QuACK's chunked linear cross-entropy.
    QuackCrossEntropy,
    /// transformers with Liger's layers and FlashAttention.
    LigerLayers,
}

impl Implementation {
    /// Name in tables and progress lines.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Implementation::Fused => "Potstill",
            Implementation::Plain => "Potstill, plain",
            Implementation::Eager => "PyTorch",
            Implementation::EagerBf16 => "PyTorch, all in bf16",
            Implementation::Compile => "PyTorch, compiled",
            Implementation::LigerJsd => "Liger, JSD",
            Implementation::LigerKl => "Liger, KL",
            Implementation::LigerCrossEntropy => "Liger, cross-entropy",
            Implementation::LigerCuteCrossEntropy => "Liger CuTe, cross-entropy",
            Implementation::QuackCrossEntropy => "QuACK, cross-entropy",
            Implementation::LigerLayers => "PyTorch, Liger, FlashAttention",
        }
    }

    /// Whether this is PyTorch without the losses of Liger and QuACK.
    pub(crate) fn is_pytorch(self) -> bool {
        use Implementation::{Compile, Eager, EagerBf16, LigerLayers};
        matches!(self, Eager | EagerBf16 | Compile | LigerLayers)
    }

    /// Whether the requested loss is computed. The losses of Liger and QuACK are different ones.
    pub(crate) fn computes_requested_loss(self) -> bool {
        self.is_pytorch() || matches!(self, Implementation::Fused | Implementation::Plain)
    }

    /// Number of products of 2·n·d·v floating-point operations: logits, both gradients, and for Liger's
    /// JSD the teacher's logits.
    pub(crate) fn products(self) -> u64 {
        match self {
            Implementation::LigerJsd => 4,
            _ => 3,
        }
    }
}

/// Shape of [`Workload::Loss`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct LossShape {
    /// Number of rows, n.
    pub(crate) rows: usize,
    /// Width of a hidden state, d.
    pub(crate) width: usize,
    /// Size of the vocabulary, v.
    pub(crate) vocab: usize,
    /// Rows of logits that Potstill computes at a time.
    pub(crate) chunk_rows: usize,
}

impl LossShape {
    /// Floating-point operations of one product: 2·n·d·v.
    pub(crate) fn operations(self) -> f64 {
        2.0 * self.rows as f64 * self.width as f64 * self.vocab as f64
    }

    /// Bytes of the logits that the kernels' passes are measured on.
    pub(crate) fn chunk_bytes(self, float: FloatType) -> f64 {
        (self.rows.min(self.chunk_rows) * self.vocab * float.bytes()) as f64
    }
}

/// Number type that a model computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FloatType {
    /// Single precision.
    F32,
    /// Brain floating point: the exponent of f32 with 8 bits of precision.
    Bf16,
}

impl FloatType {
    pub(crate) fn name(self) -> &'static str {
        match self {
            FloatType::F32 => "f32",
            FloatType::Bf16 => "bf16",
        }
    }

    fn bytes(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::Bf16 => 2,
        }
    }

    /// Largest accepted difference between numbers that two implementations computed.
    pub(crate) fn tolerance(self) -> f64 {
        match self {
            FloatType::F32 => 1e-3,
            FloatType::Bf16 => 5e-2,
        }
    }
}

/// One measurement to make. `benches/peer.py` reads the same fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct MeasurementRequest {
    #[serde(rename = "part")]
    pub(crate) workload: Workload,
    /// Folder of the checkpoint.
    pub(crate) model: PathBuf,
    #[serde(rename = "dtype")]
    pub(crate) float: FloatType,
    pub(crate) device: String,
    pub(crate) threads: usize,
    /// Number of repetitions that are not measured; none begins after `budget_s`.
    pub(crate) warm_up: usize,
    #[serde(default)]
    pub(crate) implementation: Implementation,
    #[serde(default)]
    pub(crate) loss: LossShape,
    /// Largest number of measured repetitions.
    pub(crate) repetitions: usize,
    /// Seconds after which no further repetition begins. Two are measured in any case, unless one takes
    /// three times as long.
    pub(crate) budget_s: f64,
    /// Token ids of texts of one length.
    pub(crate) ids: Vec<Vec<u32>>,
    /// Support of the teacher's distribution at each position of the first text except its first.
    pub(crate) support: Vec<Vec<u32>>,
    /// Log-probabilities of the support, nats. [`Workload::Loss`] has one row of them for all positions.
    pub(crate) logprobs: Vec<Vec<f32>>,
    /// Number of tokens that a captured distribution keeps.
    pub(crate) top_k: usize,
    /// Number of tokens of an answer.
    pub(crate) new_tokens: usize,
    pub(crate) learning_rate: f64,
    pub(crate) weight_decay: f64,
    /// Largest global norm of a gradient.
    pub(crate) clip: f64,
}

/// Result of one measuring process.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct MeasurementReply {
    /// Seconds of each repetition.
    pub(crate) seconds: Vec<f64>,
    /// Numbers that have to be the same in all implementations: the losses of all steps, logits, token
    /// ids, or means over captured positions.
    #[serde(default)]
    pub(crate) check: Vec<f64>,
    /// Resident bytes before the first repetition.
    #[serde(default)]
    pub(crate) before_bytes: Option<u64>,
    /// Peak of the resident bytes over the life of the process.
    #[serde(default)]
    pub(crate) peak_bytes: Option<u64>,
    /// Seconds of the three products alone, for each repetition of [`Workload::Loss`].
    #[serde(default)]
    pub(crate) products: Vec<f64>,
    /// Most bytes that a repetition of [`Workload::Loss`] took beyond inputs and gradients.
    #[serde(default)]
    pub(crate) above_bytes: Option<u64>,
    /// Remark about how the implementation computed.
    #[serde(default)]
    pub(crate) note: String,
    /// Seconds of the parts of [`Workload::Profile`], or of the passes over one chunk of logits in
    /// [`Workload::Loss`].
    #[serde(default)]
    pub(crate) parts: Vec<(String, f64)>,
    /// Processor time of the whole process, seconds.
    #[serde(default)]
    pub(crate) cpu_s: f64,
    /// Names and versions of the libraries that computed.
    pub(crate) engine: String,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A request for the loss of 24 rows, with a teacher of two tokens.
    pub(crate) fn loss_request() -> MeasurementRequest {
        let text = r#"{"part":"loss","model":"m","dtype":"f32","device":"cpu","threads":1,"warm_up":1,
            "repetitions":1,"budget_s":1.0,"ids":[],"support":[],"logprobs":[[-1.0,-2.0]],"top_k":2,
            "new_tokens":1,"learning_rate":0.0,"weight_decay":0.0,"clip":0.0,
            "loss":{"rows":24,"width":64,"vocab":500,"chunk_rows":7}}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_request_survives_serialization() {
        let request = MeasurementRequest {
            workload: Workload::LossMemory,
            float: FloatType::Bf16,
            implementation: Implementation::LigerCrossEntropy,
            ids: vec![vec![1, 2]],
            ..loss_request()
        };
        let text = serde_json::to_string(&request).unwrap();
        for names in [
            r#""part":"loss-memory""#,
            r#""dtype":"bf16""#,
            r#""implementation":"liger-cross-entropy""#,
        ] {
            assert!(text.contains(names), "{text}");
        }
        assert_eq!(
            serde_json::from_str::<MeasurementRequest>(&text).unwrap(),
            request
        );
    }
}
