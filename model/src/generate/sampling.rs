//! How an answer is drawn, and which settings are refused.

use crate::Error;

/// How an answer is drawn. The repetition penalty, temperature, `top_k`, `top_p` and `min_p` apply in
/// this order, each to what the one before left, as in transformers; a temperature of 0 makes the last
/// three idle.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// The most tokens of an answer, its EOS counted; at least 1.
    pub max_new_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token, and the lowest id among equals.
    pub temperature: f64,
    /// Only so many of the likeliest tokens are drawn from, and those as likely as the last of them; at
    /// least 1. `None` for all.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together reach this probability (at this temperature) are drawn
    /// from; above 0 and at most 1.
    pub top_p: f64,
    /// Only tokens with at least this share of the likeliest token's probability (at this temperature)
    /// are drawn from; from 0, which leaves none out, to 1.
    pub min_p: f64,
    /// Divides the positive logits of tokens that are in the prompt or in the answer so far, and
    /// multiplies their negative ones (Keskar et al. 2019, CTRL, section 4.1); above 0, and 1 for none.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    /// Up to 256 tokens from the whole distribution as it is.
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

pub(super) fn check(sampling: &Sampling) -> Result<(), Error> {
    let out_of_range = |setting, value, range| Error::Sampling {
        setting,
        value,
        range,
    };
    if sampling.max_new_tokens == 0 {
        return Err(out_of_range("max_new_tokens", 0.0, "it is at least 1"));
    }
    if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
        let range = "it is 0 (the likeliest token) or above";
        return Err(out_of_range("temperature", sampling.temperature, range));
    }
    if sampling.top_k == Some(0) {
        let range = "it is at least 1; leave it out to draw from all tokens";
        return Err(out_of_range("top_k", 0.0, range));
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        let range = "it is above 0 and at most 1";
        return Err(out_of_range("top_p", sampling.top_p, range));
    }
    if !(sampling.min_p >= 0.0 && sampling.min_p <= 1.0) {
        let range = "it is at least 0 (which leaves no token out) and at most 1";
        return Err(out_of_range("min_p", sampling.min_p, range));
    }
    let penalty = sampling.repetition_penalty;
    if !(penalty > 0.0 && penalty.is_finite()) {
        let range = "it is above 0; 1 leaves the logits as they are";
        return Err(out_of_range("repetition_penalty", penalty, range));
    }
    Ok(())
}
