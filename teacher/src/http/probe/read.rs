//! Log-probabilities in every shape that servers give them, and how two of them compare.

use serde_json::Value;

use super::LogprobKind;
use super::ask::ProbeResponse;

/// Rounding, batching and half precision move log-probabilities by less, on average.
pub(super) const ALIKE: f64 = 0.15;

/// A position.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct PositionLogprobs {
    pub(super) token: String,
    pub(super) logprob: Option<f64>,
    pub(super) id: Option<u64>,
    pub(super) has_bytes: bool,
    pub(super) top: Vec<(String, f64)>,
    pub(super) top_has_ids: bool,
}

/// The positions of an answer, or of prompt and answer where they were echoed.
pub(super) fn positions(response: &ProbeResponse) -> Vec<PositionLogprobs> {
    let choice = response.choice();
    let Some(logprobs) = choice.get("logprobs") else {
        return Vec::new();
    };
    let mut positions = match logprobs.get("content").and_then(Value::as_array) {
        Some(content) => content.iter().map(chat_place).collect(),
        None => completion_places(logprobs),
    };
    let ids = choice.get("token_ids").and_then(Value::as_array);
    if let Some(ids) = ids.filter(|ids| ids.len() == positions.len()) {
        for (position, id) in positions.iter_mut().zip(ids) {
            position.id = id.as_u64();
        }
    }
    positions
}

fn chat_place(entry: &Value) -> PositionLogprobs {
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

fn completion_places(logprobs: &Value) -> Vec<PositionLogprobs> {
    let list = |name| {
        let list = logprobs.get(name).and_then(Value::as_array);
        list.map(Vec::as_slice).unwrap_or_default()
    };
    let (tokens, values, tops) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
    let position = |(at, token): (usize, &Value)| PositionLogprobs {
        token: token.as_str().unwrap_or_default().to_owned(),
        logprob: values.get(at).and_then(Value::as_f64),
        top: tops.get(at).map(of_map).unwrap_or_default(),
        ..PositionLogprobs::default()
    };
    tokens.iter().enumerate().map(position).collect()
}

/// `{"token": -0.5, …}`, likeliest first.
fn of_map(map: &Value) -> Vec<(String, f64)> {
    let entries = map.as_object().into_iter().flatten();
    sorted(entries.filter_map(|(token, value)| Some((token.clone(), value.as_f64()?))))
}

fn sorted(entries: impl Iterator<Item = (String, f64)>) -> Vec<(String, f64)> {
    let mut top: Vec<(String, f64)> = entries.collect();
    top.sort_by(|a, b| b.1.total_cmp(&a.1));
    top
}

/// vLLM's `prompt_logprobs`: by position a map from id to `{logprob, rank, decoded_token}`; the realised token
/// comes first.
pub(super) fn prompt_places(response: &ProbeResponse) -> Option<Vec<PositionLogprobs>> {
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

/// SGLang's `meta_info`: `input_top_logprobs` is by position a list of `[logprob, id, text]`.
pub(super) fn generate_places(response: &ProbeResponse) -> Option<Vec<PositionLogprobs>> {
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

/// What log-probabilities are worth.
pub(super) fn kind(positions: &[PositionLogprobs]) -> LogprobKind {
    let values: Vec<f64> = positions
        .iter()
        .flat_map(|position| {
            position
                .logprob
                .into_iter()
                .chain(position.top.iter().map(|top| top.1))
        })
        .collect();
    let Some(first) = values.first() else {
        return LogprobKind::Missing;
    };
    let over = |position: &PositionLogprobs| {
        let mass: f64 = position.top.iter().map(|top| top.1.exp()).sum();
        mass > 1.001
    };
    if values.iter().all(|value| value == first) && (values.len() > 1 || *first == 0.0)
        || values
            .iter()
            .all(|value| *value == 0.0 || *value <= -9990.0)
    {
        LogprobKind::Placeholder
    } else if values.iter().any(|value| value.is_nan() || *value > 1e-5)
        || positions.iter().any(over)
    {
        LogprobKind::Impossible
    } else {
        LogprobKind::Real
    }
}

/// Mean and largest difference of two positions over the tokens both have; `None` where that is fewer than half of
/// the shorter list.
pub(super) fn difference(a: &PositionLogprobs, b: &PositionLogprobs) -> Option<(f64, f64)> {
    // Parts of characters are all shown as U+FFFD: such a string names no token.
    let alone = |top: &[(String, f64)], token: &str| {
        let mut same = top.iter().filter(|top| top.0 == token);
        let value = same.next().map(|top| top.1);
        value.filter(|_| same.next().is_none())
    };
    let apart: Vec<f64> = a
        .top
        .iter()
        .filter_map(|(token, _)| Some((alone(&a.top, token)? - alone(&b.top, token)?).abs()))
        .collect();
    let least = a.top.len().min(b.top.len()).div_ceil(2).max(1);
    if apart.len() < least {
        return None;
    }
    let mean = apart.iter().sum::<f64>() / apart.len() as f64;
    Some((mean, apart.into_iter().fold(0.0, f64::max)))
}

/// By which factor differences between tokens grow from `a` to `b`: 1 where temperature leaves log-probabilities
/// alone, 1/T where it does not.
pub(super) fn slope(a: &PositionLogprobs, b: &PositionLogprobs) -> Option<f64> {
    let (token, most) = a.top.first()?;
    let of_b = |token: &str| b.top.iter().find(|top| top.0 == token).map(|top| top.1);
    let most_b = of_b(token)?;
    let pairs: Vec<(f64, f64)> = a
        .top
        .iter()
        .skip(1)
        .filter(|top| top.1 > -9990.0)
        .filter_map(|(token, value)| Some((value - most, of_b(token)? - most_b)))
        .filter(|(_, b)| *b > -9000.0)
        .collect();
    let square: f64 = pairs.iter().map(|(a, _)| a * a).sum();
    (pairs.len() >= 2 && square > 0.0)
        .then(|| pairs.iter().map(|(a, b)| a * b).sum::<f64>() / square)
}

/// Whether at temperature 0 something else than the likeliest token was taken: something acts on the choice that
/// the log-probabilities do not show.
pub(super) fn odd_choice(positions: &[PositionLogprobs]) -> Option<&PositionLogprobs> {
    positions.iter().find(|position| {
        let likeliest = position.top.first().map(|top| top.1);
        position
            .logprob
            .zip(likeliest)
            .is_some_and(|(value, likeliest)| value < likeliest - 0.01)
    })
}

/// The numbers in a complaint, as a limit may be among them.
pub(super) fn numbers(text: &str) -> Vec<u32> {
    text.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}
