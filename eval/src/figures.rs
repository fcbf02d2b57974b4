//! Figures of the text of test: ratios of sums over its sequences.

use potstill_datasets::SequenceValues;

use crate::error::Error;
use crate::estimate::{Estimate, PromptSums};
use crate::interval::Interval;
use crate::metric::Metric;

/// Computes a metric over `values`, the sequences of one model, with its 95 % interval over prompts.
///
/// # Errors
/// If no sequence has a token, or a value is not finite.
pub fn interval(values: &[SequenceValues], metric: Metric) -> Result<Interval, Error> {
    Ok(Estimate::of(&metric_sums(values, metric)?).interval())
}

/// Computes the teacher's negative log-likelihood of the target tokens, nats per token, with its 95 % interval. A
/// student that equals the teacher has this negative log-likelihood. `values` may be those of any student.
///
/// # Errors
/// If no sequence has a token.
pub fn teacher_nll(values: &[SequenceValues]) -> Result<Interval, Error> {
    let sums = token_sums(values, |value| value.teacher_nll_nats)?;
    Ok(Estimate::of(&sums).interval())
}

/// Adds up a metric by prompt.
///
/// # Errors
/// If no sequence has a token, or a value is not finite.
pub(crate) fn metric_sums(
    values: &[SequenceValues],
    metric: Metric,
) -> Result<PromptSums<'_>, Error> {
    if let Some(v) = values.iter().find(|v| !metric.sum(v).is_finite()) {
        return Err(Error::NotFinite {
            prompt_id: v.prompt_id.clone(),
            sample_index: v.sample_index,
            metric: metric.name(),
            value: metric.sum(v),
        });
    }
    token_sums(values, |value| metric.sum(value))
}

/// Adds up a value by prompt, with the number of tokens as its weight. Sequences without tokens are left out.
///
/// # Errors
/// If no sequence has a token.
pub(crate) fn token_sums(
    values: &[SequenceValues],
    sum: impl Fn(&SequenceValues) -> f64,
) -> Result<PromptSums<'_>, Error> {
    let records = values.iter().filter(|value| value.tokens > 0).map(|value| {
        let prompt = value.prompt_id.as_str();
        (prompt, sum(value), f64::from(value.tokens))
    });
    let sums = PromptSums::of_seed(records);
    match sums.prompts.is_empty() {
        true => Err(Error::NoTokens),
        false => Ok(sums),
    }
}

/// Checks that two models were measured over the same sequences, in the same order.
///
/// # Errors
/// If they were not.
pub(crate) fn check_same_sequences(
    a: &[SequenceValues],
    b: &[SequenceValues],
) -> Result<(), Error> {
    let key = |v: &SequenceValues| (v.sample_index, v.tokens);
    let same =
        |a: &SequenceValues, b: &SequenceValues| key(a) == key(b) && a.prompt_id == b.prompt_id;
    let describe = |v: Option<&SequenceValues>| match v {
        None => "absent".to_owned(),
        Some(v) => format!("{}/{} ({} tokens)", v.prompt_id, v.sample_index, v.tokens),
    };
    let differs = |i: &usize| match (a.get(*i), b.get(*i)) {
        (Some(a), Some(b)) => !same(a, b),
        _ => true,
    };
    match (0..a.len().max(b.len())).find(differs) {
        None => Ok(()),
        Some(position) => Err(Error::NotPaired {
            position,
            left: describe(a.get(position)),
            right: describe(b.get(position)),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(prompt: usize, sample_index: u32, tokens: u32, kl_nats: f64) -> SequenceValues {
        SequenceValues {
            prompt_id: format!("p{prompt}"),
            sample_index,
            tokens,
            kl_nats,
            nll_nats: 2.0 * kl_nats,
            agree: tokens / 2,
            teacher_nll_nats: 0.0,
            teacher_entropy_nats: 0.0,
            confidence: Vec::new(),
            expected: Vec::new(),
        }
    }

    #[test]
    fn the_mean_is_over_tokens_not_over_sequences() {
        let values = [value(0, 0, 1, 1.0), value(1, 0, 9, 0.0)];
        for (metric, expected) in [
            (Metric::Kl, 0.1),
            (Metric::Nll, 0.2),
            (Metric::Agreement, 0.4),
        ] {
            let found = interval(&values, metric).unwrap().mean;
            assert!((found - expected).abs() < 1e-12, "{metric:?}: {found}");
        }
    }

    #[test]
    fn samples_of_one_prompt_are_one_unit() {
        let values: Vec<_> = (0..8)
            .flat_map(|p| (0..4).map(move |s| value(p, s, 10, p as f64)))
            .collect();
        let one_each: Vec<_> = (0..8).map(|p| value(p, 0, 40, 4.0 * p as f64)).collect();
        let found = interval(&values, Metric::Kl).unwrap();
        assert_eq!(found, interval(&one_each, Metric::Kl).unwrap());
        assert_eq!(found.prompts, 8);
    }

    #[test]
    fn errors_name_the_sequence() {
        let empty = interval(&[value(0, 0, 0, 0.0)], Metric::Kl);
        assert!(matches!(empty, Err(Error::NoTokens)));
        let broken = [value(0, 0, 4, 1.0), value(1, 2, 4, f64::NAN)];
        assert_eq!(
            interval(&broken, Metric::Kl).unwrap_err().to_string(),
            "prompt p1, sample 2: KL is NaN\nhint: the model's weights or its outputs are not finite; train with a lower learning_rate"
        );
        let a = [value(0, 0, 4, 1.0), value(1, 0, 4, 1.0)];
        let b = [value(0, 0, 4, 1.0), value(1, 1, 4, 1.0)];
        assert_eq!(
            check_same_sequences(&a, &b).unwrap_err().to_string(),
            "two models were not measured over the same sequences: number 1 is p1/0 (4 tokens) for one and p1/1 (4 tokens) for the other\nhint: run `eval` again"
        );
        assert!(check_same_sequences(&a, &b[..1]).is_err());
        assert!(check_same_sequences(&a, &a).is_ok());
    }
}
