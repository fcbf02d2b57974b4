//! The cost of training in device hours and USD, in the units of published accounts.

use serde::{Deserialize, Serialize};

use crate::wording;

/// Tokens in the unit of prices.
const MILLION: f64 = 1e6;

/// Tokens that were or will be trained on, and what they cost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TrainingCost {
    /// Hours of all devices together.
    pub device_hours: f64,
    /// Tokens that the models are trained on, prompts included; a token counts in each pass over it.
    pub tokens: f64,
    /// USD for an hour of a device; `None` if the run file has no price.
    pub usd_per_hour: Option<f64>,
}

/// The account of DeepSeek-V3's training in its technical report (arXiv 2412.19437, table 1): 2.788 million hours of H800 at
/// an assumed price of 2 USD, for 14.8 trillion tokens.
pub const DEEPSEEK_V3: TrainingCost = TrainingCost {
    device_hours: 2.788e6,
    tokens: 14.8e12,
    usd_per_hour: Some(2.0),
};

impl TrainingCost {
    /// USD of the whole training.
    #[must_use]
    pub fn usd(&self) -> Option<f64> {
        self.usd_per_hour.map(|price| price * self.device_hours)
    }

    /// Device hours for a million tokens; `None` without tokens.
    #[must_use]
    pub fn hours_per_million(&self) -> Option<f64> {
        (self.tokens > 0.0).then(|| self.device_hours / self.tokens * MILLION)
    }

    /// USD for a million tokens.
    #[must_use]
    pub fn usd_per_million(&self) -> Option<f64> {
        Some(self.hours_per_million()? * self.usd_per_hour?)
    }

    /// Describes what a million tokens cost, such as `0.188 H800-hours and $0.377`.
    #[must_use]
    pub fn per_million(&self, device: &str) -> String {
        let Some(hours) = self.hours_per_million() else {
            return "no tokens".to_owned();
        };
        let hours = format!("{} {device}-hours", digits(hours));
        match self.usd_per_million() {
            Some(usd) => format!("{hours} and ${}", digits(usd)),
            None => hours,
        }
    }
}

/// Time and memory that the trainings of a run took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CostFacts {
    /// Device hours, tokens and price of all trainings, those of learning rates and controls included.
    pub training: TrainingCost,
    /// Name of a device: `machine` or `GPU`.
    pub device: String,
    /// Mean number of tokens that were trained in a second of the steps.
    pub tokens_per_second: f64,
    /// Peak of the trainings' memory, predicted from the settings, bytes.
    pub predicted_bytes: Option<u64>,
    /// Largest resident memory of the process while it trained, bytes; `None` where the system does not tell.
    pub peak_bytes: Option<u64>,
}

impl CostFacts {
    /// Describes the cost in sentences, beside a published account in the same units.
    #[must_use]
    pub fn sentences(&self) -> Vec<String> {
        let TrainingCost {
            device_hours,
            tokens,
            usd_per_hour,
        } = self.training;
        let usd = match (self.training.usd(), usd_per_hour) {
            (Some(usd), Some(price)) => format!(", ${} at ${price} an hour", digits(usd)),
            _ => String::new(),
        };
        let mut list = vec![
            format!(
                "All trainings took {} {}-hours{usd}, for {} tokens: {} for a million tokens, at {} tokens/s.",
                digits(device_hours),
                self.device,
                wording::count(tokens as u64),
                self.training.per_million(&self.device),
                digits(self.tokens_per_second),
            ),
            format!(
                "DeepSeek-V3, as its report accounts for it, took {} million H800-hours, ${} million at ${} an hour, for {} trillion tokens: {} for a million tokens. It computes with 37 billion parameters for each token.",
                DEEPSEEK_V3.device_hours / 1e6,
                DEEPSEEK_V3.usd().unwrap_or_default() / 1e6,
                DEEPSEEK_V3.usd_per_hour.unwrap_or_default(),
                DEEPSEEK_V3.tokens / 1e12,
                DEEPSEEK_V3.per_million("H800"),
            ),
        ];
        match (self.predicted_bytes, self.peak_bytes) {
            (Some(predicted), Some(peak)) => list.push(format!(
                "The peak of memory was {}; {} were predicted from the settings.",
                wording::bytes(peak),
                wording::bytes(predicted)
            )),
            (Some(predicted), None) => list.push(format!(
                "A peak of memory of {} was predicted from the settings.",
                wording::bytes(predicted)
            )),
            _ => {}
        }
        list
    }
}

/// Writes a number with three digits, without an exponent.
#[must_use]
pub fn digits(value: f64) -> String {
    let size = value.abs();
    let decimals = match size {
        size if size == 0.0 || size >= 100.0 => 0,
        size => (2 - size.log10().floor() as i32).clamp(0, 9) as usize,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_account_is_reproduced() {
        assert!((DEEPSEEK_V3.usd().unwrap() - 5.576e6).abs() < 1.0);
        let text = DEEPSEEK_V3.per_million("H800");
        assert_eq!(text, "0.188 H800-hours and $0.377");
    }

    #[test]
    fn numbers_have_three_digits() {
        let shown = [0.0, 0.000_123_4, 0.05, 1.234, 56.78, 1234.5].map(digits);
        assert_eq!(shown, ["0", "0.000123", "0.0500", "1.23", "56.8", "1234"]);
        let nothing = TrainingCost {
            tokens: 0.0,
            ..DEEPSEEK_V3
        };
        assert_eq!(nothing.per_million("H800"), "no tokens");
    }
}
