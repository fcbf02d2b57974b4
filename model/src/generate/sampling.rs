//! Sampling settings and their allowed ranges.

use crate::Error;

/// Sampling settings. The repetition penalty, `temperature`, `top_k`, `top_p` and `min_p` apply in this order, each to
/// the tokens that the previous one left, as in transformers. At temperature 0 the last three have no effect.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Largest number of tokens of an answer, its EOS included; at least 1.
    pub max_new_tokens: usize,
    /// Temperature that the logits are divided by; 0 takes the likeliest token, the lowest id among equals.
    pub temperature: f64,
    /// Number of likeliest tokens to draw from; tokens that are as likely as the last of them are included. At least 1;
    /// `None` for all tokens.
    pub top_k: Option<usize>,
    /// Probability, at this temperature, that the likeliest tokens to draw from reach together; above 0 and at most 1.
    pub top_p: f64,
    /// Smallest probability, at this temperature and relative to the likeliest token, of a token to draw from; from 0,
    /// which excludes no token, to 1.
    pub min_p: f64,
    /// Divisor of the positive logits, and factor on the negative logits, of tokens in the prompt or in the answer so far
    /// (Keskar et al. 2019, CTRL, section 4.1); above 0, and 1 for no penalty.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    /// Draws up to 256 tokens from the unmodified distribution.
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
        return Err(out_of_range("max_new_tokens", 0.0, "at least 1"));
    }
    if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
        let range = "0 (the likeliest token) or above";
        return Err(out_of_range("temperature", sampling.temperature, range));
    }
    if sampling.top_k == Some(0) {
        let range = "at least 1\nhint: leave `top_k` out to draw from all tokens";
        return Err(out_of_range("top_k", 0.0, range));
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        let range = "above 0 and at most 1";
        return Err(out_of_range("top_p", sampling.top_p, range));
    }
    if !(sampling.min_p >= 0.0 && sampling.min_p <= 1.0) {
        let range = "at least 0 (which excludes no token) and at most 1";
        return Err(out_of_range("min_p", sampling.min_p, range));
    }
    let penalty = sampling.repetition_penalty;
    if !(penalty > 0.0 && penalty.is_finite()) {
        let range = "above 0 (1 for no penalty)";
        return Err(out_of_range("repetition_penalty", penalty, range));
    }
    Ok(())
}
