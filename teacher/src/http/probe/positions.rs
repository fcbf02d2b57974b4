//! Reads log-probabilities in every form that servers give, classifies them, and compares them.

use serde_json::Value;

use super::LogprobKind;
use super::client::ProbeResponse;

/// Largest mean difference of log-probabilities that counts as equal, nats. Rounding, batching and half precision cause
/// smaller ones.
pub(super) const EQUAL_WITHIN: f64 = 0.15;

/// Largest value that servers write for −∞.
const NO_PROBABILITY: f64 = -9990.0;

/// Mass of the most likely tokens below which values are suspected not to be normalised.
const TINY_MASS: f64 = 0.01;

/// Log-probabilities of a position of a text.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct PositionLogprobs {
    pub(super) token: String,
    pub(super) logprob: Option<f64>,
    pub(super) id: Option<u64>,
    pub(super) has_bytes: bool,
    pub(super) top: Vec<(String, f64)>,
    pub(super) top_has_ids: bool,
}

/// Reads the positions of an answer, or of prompt and answer if the prompt was echoed.
pub(super) fn of_answer(response: &ProbeResponse) -> Vec<PositionLogprobs> {
    let choice = response.choice();
    let Some(logprobs) = choice.get("logprobs") else {
        return Vec::new();
    };
    let mut positions = match logprobs.get("content").and_then(Value::as_array) {
        Some(content) => content.iter().map(chat_position).collect(),
        None => completion_positions(logprobs),
    };
    let ids = choice.get("token_ids").and_then(Value::as_array);
    if let Some(ids) = ids.filter(|ids| ids.len() == positions.len()) {
        for (position, id) in positions.iter_mut().zip(ids) {
            position.id = id.as_u64();
        }
    }
    positions
}

fn chat_position(entry: &Value) -> PositionLogprobs {
    let top = entry.get("top_logprobs").and_then(Value::as_array);
    let top = top.map(Vec::as_slice).unwrap_or_default();
    PositionLogprobs {
        token: text(entry, "token"),
        logprob: entry.get("logprob").and_then(Value::as_f64),
        id: entry.get("id").and_then(Value::as_u64),
        has_bytes: entry.get("bytes").is_some_and(Value::is_array),
        top: top
            .iter()
            .filter_map(|top| Some((text(top, "token"), top.get("logprob")?.as_f64()?)))
            .collect(),
        top_has_ids: !top.is_empty() && top.iter().all(|top| top.get("id").is_some()),
    }
}

fn text(entry: &Value, name: &str) -> String {
    let text = entry.get(name).and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

fn completion_positions(logprobs: &Value) -> Vec<PositionLogprobs> {
    let list = |name| {
        let list = logprobs.get(name).and_then(Value::as_array);
        list.map(Vec::as_slice).unwrap_or_default()
    };
    let (tokens, values, tops) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
    let position = |(at, token): (usize, &Value)| PositionLogprobs {
        token: token.as_str().unwrap_or_default().to_owned(),
        logprob: values.get(at).and_then(Value::as_f64),
        top: tops.get(at).map(from_map).unwrap_or_default(),
        ..PositionLogprobs::default()
    };
    tokens.iter().enumerate().map(position).collect()
}

/// Reads `{"token": -0.5, …}`, with the most likely token first.
fn from_map(map: &Value) -> Vec<(String, f64)> {
    let entries = map.as_object().into_iter().flatten();
    sorted(entries.filter_map(|(token, value)| Some((token.clone(), value.as_f64()?))))
}

fn sorted(entries: impl Iterator<Item = (String, f64)>) -> Vec<(String, f64)> {
    let mut top: Vec<(String, f64)> = entries.collect();
    top.sort_by(|a, b| b.1.total_cmp(&a.1));
    top
}

/// Reads vLLM's `prompt_logprobs`: a map from id to `{logprob, rank, decoded_token}` for each position, the target token
/// first.
pub(super) fn of_prompt(response: &ProbeResponse) -> Option<Vec<PositionLogprobs>> {
    let positions = response
        .choice()
        .get("prompt_logprobs")
        .filter(|value| value.is_array())
        .or_else(|| response.json.get("prompt_logprobs"))?
        .as_array()?;
    let position = |position: &Value| {
        let entries = position.as_object().into_iter().flatten();
        let top = sorted(entries.filter_map(|(_, entry)| {
            Some((
                text(entry, "decoded_token"),
                entry.get("logprob")?.as_f64()?,
            ))
        }));
        PositionLogprobs {
            top,
            top_has_ids: position.is_object(),
            ..PositionLogprobs::default()
        }
    };
    Some(positions.iter().map(position).collect())
}

/// Reads SGLang's `input_top_logprobs`: a list of `[logprob, id, text]` for each position.
pub(super) fn of_generate(response: &ProbeResponse) -> Option<Vec<PositionLogprobs>> {
    let positions = response
        .json
        .pointer("/meta_info/input_top_logprobs")?
        .as_array()?;
    let position = |position: &Value| {
        let entries = position.as_array().into_iter().flatten();
        let top = sorted(entries.filter_map(|entry| {
            let token = entry.get(2)?.as_str().unwrap_or_default();
            Some((token.to_owned(), entry.get(0)?.as_f64()?))
        }));
        PositionLogprobs {
            top,
            top_has_ids: true,
            ..PositionLogprobs::default()
        }
    };
    Some(positions.iter().map(position).collect())
}

/// Classifies the values of the positions that have any.
pub(super) fn kind(positions: &[PositionLogprobs]) -> LogprobKind {
    let top_values = |position: &PositionLogprobs| position.top.iter().map(|top| top.1).collect();
    let tops: Vec<Vec<f64>> = positions.iter().map(top_values).collect();
    let values: Vec<f64> = positions
        .iter()
        .zip(&tops)
        .flat_map(|(position, top)| position.logprob.into_iter().chain(top.iter().copied()))
        .collect();
    let Some(first) = values.first() else {
        return LogprobKind::Missing;
    };
    let is_constant =
        values.iter().all(|value| value == first) && (values.len() > 1 || *first == 0.0);
    let is_filled_in = values
        .iter()
        .all(|value| *value == 0.0 || *value <= NO_PROBABILITY);
    if is_constant || is_filled_in {
        return LogprobKind::Placeholder;
    }
    if look_like_logits(&tops) {
        return LogprobKind::Logits;
    }
    let is_impossible = values.iter().any(|value| value.is_nan() || *value > 1e-5)
        || tops.iter().any(|top| mass(top) > 1.001);
    match is_impossible {
        true => LogprobKind::Impossible,
        false => LogprobKind::Real,
    }
}

fn mass(top: &[f64]) -> f64 {
    top.iter().map(|value| value.exp()).sum()
}

/// Whether lists of most likely tokens have the order of logits, but not the mass of a distribution: values above 1, or
/// a tiny mass that differs between positions.
fn look_like_logits(tops: &[Vec<f64>]) -> bool {
    let lists: Vec<&[f64]> = tops
        .iter()
        .map(Vec::as_slice)
        .filter(|top| top.len() > 1)
        .collect();
    let is_ordered =
        |top: &&[f64]| top.iter().all(|v| v.is_finite()) && top.is_sorted_by(|a, b| a >= b);
    if lists.is_empty() || !lists.iter().all(is_ordered) {
        return false;
    }
    let masses: Vec<f64> = lists.iter().map(|top| mass(top).ln()).collect();
    let (least, most) = masses
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), m| {
            (least.min(*m), most.max(*m))
        });
    let has_large = lists
        .iter()
        .any(|top| top.first().is_some_and(|value| *value > 1.0));
    has_large || (most < TINY_MASS.ln() && most - least > 1.0)
}

/// Mean and largest absolute difference of two positions over their common tokens, nats; `None` if these are fewer than
/// half of the shorter list.
pub(super) fn difference(a: &PositionLogprobs, b: &PositionLogprobs) -> Option<(f64, f64)> {
    let differences = common_differences(a, b)?;
    let mean = differences.iter().map(|d| d.abs()).sum::<f64>() / differences.len() as f64;
    let largest = differences.iter().map(|d| d.abs()).fold(0.0, f64::max);
    Some((mean, largest))
}

/// Mean absolute difference of two positions up to a constant, for values that are not normalised.
pub(super) fn difference_up_to_constant(a: &PositionLogprobs, b: &PositionLogprobs) -> Option<f64> {
    let differences = common_differences(a, b)?;
    let n = differences.len() as f64;
    let constant = differences.iter().sum::<f64>() / n;
    Some(
        differences
            .iter()
            .map(|d| (d - constant).abs())
            .sum::<f64>()
            / n,
    )
}

fn common_differences(a: &PositionLogprobs, b: &PositionLogprobs) -> Option<Vec<f64>> {
    // A string that occurs twice, such as U+FFFD for parts of characters, names no token.
    let unique = |top: &[(String, f64)], token: &str| {
        let mut same = top.iter().filter(|top| top.0 == token);
        let value = same.next().map(|top| top.1);
        value.filter(|_| same.next().is_none())
    };
    let differences: Vec<f64> = a
        .top
        .iter()
        .filter_map(|(token, _)| Some(unique(&a.top, token)? - unique(&b.top, token)?))
        .collect();
    let least = a.top.len().min(b.top.len()).div_ceil(2).max(1);
    (differences.len() >= least).then_some(differences)
}

/// Factor by which differences between tokens grow from `a` to `b` (least squares): 1 if temperature does not act on
/// the values, 1/T if it does.
pub(super) fn slope(a: &PositionLogprobs, b: &PositionLogprobs) -> Option<f64> {
    let (token, most) = a.top.first()?;
    let of_b = |token: &str| b.top.iter().find(|top| top.0 == token).map(|top| top.1);
    let most_b = of_b(token)?;
    let pairs: Vec<(f64, f64)> = a
        .top
        .iter()
        .skip(1)
        .filter(|top| top.1 > NO_PROBABILITY)
        .filter_map(|(token, value)| Some((value - most, of_b(token)? - most_b)))
        .filter(|(_, b)| *b > -9000.0)
        .collect();
    let square: f64 = pairs.iter().map(|(a, _)| a * a).sum();
    (pairs.len() >= 2 && square > 0.0)
        .then(|| pairs.iter().map(|(a, b)| a * b).sum::<f64>() / square)
}

/// The first position of an answer at temperature 0 whose token is not the most likely one, so that something acts on
/// the choice that the log-probabilities do not show.
pub(super) fn odd_choice(positions: &[PositionLogprobs]) -> Option<&PositionLogprobs> {
    positions.iter().find(|position| {
        let best = position.top.first().map(|top| top.1);
        position
            .logprob
            .zip(best)
            .is_some_and(|(value, best)| value < best - 0.01)
    })
}

/// The numbers in an error message, one of which may be a limit.
pub(super) fn numbers(text: &str) -> Vec<u32> {
    text.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}
