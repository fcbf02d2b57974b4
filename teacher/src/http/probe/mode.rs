//! Recognises the quantity that a server returns as log-probabilities.
//!
//! vLLM chooses it by `--logprobs-mode` (default `raw_logprobs`) for the tokens of answers. "Raw" values are those of
//! the model. "Processed" values come after penalties, temperature, `top_k`, `top_p` and `min_p`. "Logits" are not
//! normalised. `prompt_logprobs` are never processed, and follow the choice of logits since vLLM's pull request 47680
//! (July 2026): <https://docs.vllm.ai/en/stable/configuration/engine_args/>.

use serde::{Deserialize, Serialize};

use crate::http::RequestSettings;

/// The quantity that a server returns as log-probabilities of an answer's tokens, named as the values of vLLM's
/// `--logprobs-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogprobsMode {
    /// Log-probabilities of the model's own distribution.
    RawLogprobs,
    /// Log-probabilities after penalties, temperature and truncation: of the distribution that is sampled from.
    ProcessedLogprobs,
    /// The model's logits, not normalised.
    RawLogits,
    /// Logits after penalties, temperature and truncation, not normalised.
    ProcessedLogits,
}

impl LogprobsMode {
    const ALL: [LogprobsMode; 4] = [
        LogprobsMode::RawLogprobs,
        LogprobsMode::ProcessedLogprobs,
        LogprobsMode::RawLogits,
        LogprobsMode::ProcessedLogits,
    ];

    /// The value of `--logprobs-mode`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            LogprobsMode::RawLogprobs => "raw_logprobs",
            LogprobsMode::ProcessedLogprobs => "processed_logprobs",
            LogprobsMode::RawLogits => "raw_logits",
            LogprobsMode::ProcessedLogits => "processed_logits",
        }
    }

    /// Finds the mode in a text of the server, such as `"logprobs_mode": "raw_logits"` in vLLM's `/server_info`.
    pub(super) fn stated_in(text: &str) -> Option<LogprobsMode> {
        let keys = ["logprobs_mode", "logprobs-mode"];
        let at = keys.into_iter().filter_map(|key| text.find(key)).min()?;
        let rest = text.get(at + keys[0].len()..)?;
        let value = rest.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
        LogprobsMode::ALL
            .into_iter()
            .find(|mode| value.starts_with(mode.name()))
    }

    /// The mode of values that are `normalized` or not, and `processed` or not.
    pub(super) fn of(normalized: bool, processed: bool) -> LogprobsMode {
        match (normalized, processed) {
            (true, false) => LogprobsMode::RawLogprobs,
            (true, true) => LogprobsMode::ProcessedLogprobs,
            (false, false) => LogprobsMode::RawLogits,
            (false, true) => LogprobsMode::ProcessedLogits,
        }
    }

    /// Whether the values depend on the sampling settings of the request.
    #[must_use]
    pub fn is_processed(self) -> bool {
        matches!(
            self,
            LogprobsMode::ProcessedLogprobs | LogprobsMode::ProcessedLogits
        )
    }

    /// Describes the values, and whether they can be stored as distributions.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            LogprobsMode::RawLogprobs => {
                "the model's own distribution, whatever the sampling settings: stored as it is"
            }
            LogprobsMode::ProcessedLogprobs => {
                "the distribution after penalties, temperature, top_k, top_p and min_p: the model's own only if none of them changes it"
            }
            LogprobsMode::RawLogits => {
                "the model's logits: not stored, since the normaliser over the vocabulary is not known"
            }
            LogprobsMode::ProcessedLogits => {
                "logits after penalties, temperature, top_k, top_p and min_p: not stored, since the normaliser over the vocabulary is not known"
            }
        }
    }
}

impl RequestSettings {
    /// The first setting that makes tokens be sampled from another distribution than the model's own. Without such a
    /// setting, processed log-probabilities are the model's own.
    #[must_use]
    pub fn altering_setting(&self) -> Option<&'static str> {
        let settings = [
            ("temperature", self.temperature != Some(1.0)),
            ("top_p", self.top_p.is_some_and(|p| p != 1.0)),
            ("top_k", self.top_k.is_some_and(|k| k != 0)),
            ("min_p", self.min_p.is_some_and(|p| p != 0.0)),
            (
                "repetition_penalty",
                self.repetition_penalty.is_some_and(|p| p != 1.0),
            ),
        ];
        settings
            .into_iter()
            .find_map(|(name, alters)| alters.then_some(name))
    }
}

#[cfg(test)]
mod tests {
    use super::LogprobsMode;

    #[test]
    fn a_stated_mode_is_found_in_json_in_python_and_in_a_message() {
        for mode in LogprobsMode::ALL {
            let name = mode.name();
            for text in [
                format!("{{\"model_config\": {{\"logprobs_mode\": \"{name}\"}}}}"),
                format!("ModelConfig(max_logprobs=20, logprobs_mode='{name}', seed=0)"),
                format!("prompt_logprobs are not available with --logprobs-mode {name}"),
            ] {
                assert_eq!(LogprobsMode::stated_in(&text), Some(mode), "{text}");
            }
        }
        for text in ["", "logprobs_mode", "logprobs_mode=é", "raw_logprobs"] {
            assert_eq!(LogprobsMode::stated_in(text), None, "{text}");
        }
    }
}
