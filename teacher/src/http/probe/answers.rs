//! Requests that examine answers: log-probabilities, penalties, repeatability, counts, speed.

use serde_json::{Value, json};

use super::client::{ProbeClient, ProbeResponse};
use super::positions::{self, EQUAL_WITHIN, PositionLogprobs};
use super::{AnswerSpeed, LogprobKind, LogprobsMode, Probe, SamplingStage};
use crate::http::{Dialect, Failure};
use crate::reply_json;

/// The question of most chats: short, with one answer.
pub(super) const QUESTION: &str = "What is the capital of Japan?";

/// Sends the first chat, and finds out whether there are log-probabilities and in which form. Returns the response.
pub(super) async fn first(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
) -> Result<ProbeResponse, Failure> {
    let mut more = json!({ "logprobs": true, "top_logprobs": 5 });
    if probe.dialect == Some(Dialect::Vllm)
        && let Some(more) = more.as_object_mut()
    {
        more.insert("return_token_ids".into(), true.into());
    }
    let mut response = client.chat(QUESTION, 8, more.clone()).await?;
    if !response.is_success() {
        let message = response.error_message();
        probe.logprobs.mode = LogprobsMode::stated_in(&message).or(probe.logprobs.mode);
        probe.logprobs.limit_said = Some(message);
        response = client.chat(QUESTION, 8, json!({})).await?;
    }
    if !response.is_success() {
        probe.quirks.push(format!(
            "a plain chat request is refused: {}",
            response.error_message()
        ));
        return Ok(response);
    }
    probe.chat = true;
    let positions = positions::of_answer(&response);
    probe.logprobs.kind = positions::kind(&positions);
    probe.logprobs.largest_k = widest(&positions).min(5);
    probe.tokens.ids =
        !positions.is_empty() && positions.iter().all(|position| position.id.is_some());
    probe.tokens.top_ids =
        !positions.is_empty() && positions.iter().all(|position| position.top_has_ids);
    probe.tokens.bytes =
        !positions.is_empty() && positions.iter().all(|position| position.has_bytes);
    note_choice(probe, &positions);
    check_usage(probe, &response, positions.len() as u64);
    if probe.logprobs.kind.is_measured() {
        repeat(client, probe, more, &response, &positions).await?;
    }
    Ok(response)
}

fn widest(positions: &[PositionLogprobs]) -> u32 {
    positions
        .iter()
        .map(|position| position.top.len())
        .max()
        .unwrap_or(0) as u32
}

/// Notes a token of an answer at temperature 0 that is not the most likely one: a penalty acts on the choice.
pub(super) fn note_choice(probe: &mut Probe, positions: &[PositionLogprobs]) {
    if let Some(position) = positions::odd_choice(positions) {
        probe.logprobs.penalty_by_default = Some(true);
        probe.quirks.push(format!(
            "at temperature 0 the server chose {:?}, although {:?} is more likely by its own log-probabilities: a penalty is on by default, and log-probabilities are those before it",
            position.token,
            position.top.first().map_or("", |top| top.0.as_str())
        ));
    }
}

/// Compares `usage` with the number of tokens that were received. An end of sequence may be counted and not shown.
fn check_usage(probe: &mut Probe, response: &ProbeResponse, received: u64) {
    probe.usage.present = response.usage("prompt_tokens").is_some();
    if let Some(counted) = response.usage("completion_tokens").filter(|_| received > 0) {
        let stopped = response
            .choice()
            .get("finish_reason")
            .and_then(Value::as_str)
            == Some("stop");
        let right = counted == received || stopped && counted == received + 1;
        probe.usage.completion_right = Some(right);
        if !right {
            probe.quirks.push(format!(
                "`usage` counts {counted} tokens of an answer of {received}"
            ));
        }
    }
}

async fn repeat(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    more: Value,
    first: &ProbeResponse,
    positions: &[PositionLogprobs],
) -> Result<(), Failure> {
    let again = client.chat(QUESTION, 8, more).await?;
    if !again.is_success() {
        return Ok(());
    }
    probe.deterministic = Some(again.answer() == first.answer());
    let second = positions::of_answer(&again);
    let apart = positions
        .iter()
        .zip(&second)
        .take_while(|(a, b)| a.token == b.token)
        .filter_map(|(a, b)| positions::difference(a, b))
        .map(|(_, most)| most);
    probe.repeat_difference = apart.reduce(f64::max);
    Ok(())
}

/// Finds out how many most likely tokens the server gives.
pub(super) async fn largest_k(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
) -> Result<(), Failure> {
    let mut tried: Vec<u32> = Vec::new();
    let mut next = vec![1000, 64, 20];
    while let Some(k) = next.pop() {
        tried.push(k);
        let more = json!({ "logprobs": true, "top_logprobs": k });
        let response = client.chat(QUESTION, 3, more).await?;
        if response.is_success() {
            let received = widest(&positions::of_answer(&response)).min(k);
            probe.logprobs.largest_k = probe.logprobs.largest_k.max(received);
            if received < k {
                probe.quirks.push(format!(
                    "for {k} most likely tokens the server gives {received} without an error"
                ));
                break;
            }
            continue;
        }
        let message = response.error_message();
        let best = probe.logprobs.largest_k;
        // A limit in the error message lies between the largest k that worked and this one.
        let named = positions::numbers(&message);
        let named = named
            .into_iter()
            .filter(|n| *n > best && *n < k && !tried.contains(n));
        next = named.max().into_iter().collect();
        probe.logprobs.limit_said = Some(message);
    }
    Ok(())
}

/// Finds out whether log-probabilities are those before temperature.
pub(super) async fn temperature(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
) -> Result<(), Failure> {
    let k = probe.logprobs.largest_k.min(20);
    let mut seen = Vec::new();
    for temperature in [1.0, 0.5] {
        let more = json!({
            "logprobs": true, "top_logprobs": k, "temperature": temperature, "top_p": 1, "seed": 1,
        });
        let response = client.chat(QUESTION, 1, more).await?;
        if !response.is_success() {
            return Ok(());
        }
        seen.extend(positions::of_answer(&response).into_iter().next());
    }
    if let [one, half] = seen.as_slice()
        && let Some(slope) = positions::slope(one, half)
    {
        probe.logprobs.temperature = match slope {
            s if (s - 1.0).abs() < 0.25 => SamplingStage::Raw,
            s if (s - 2.0).abs() < 0.5 => SamplingStage::Processed,
            _ => SamplingStage::Unknown,
        };
    }
    Ok(())
}

/// A text whose continuation repeats tokens, so that penalties act on it.
const REPEATING: &str = "yes yes yes yes yes yes yes yes yes yes yes yes";

/// Finds out whether a penalty is on by default, and whether log-probabilities show penalties.
pub(super) async fn penalties(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
) -> Result<(), Failure> {
    let none = json!({
        "repeat_penalty": 1.0, "repetition_penalty": 1.0, "frequency_penalty": 0, "presence_penalty": 0,
    });
    let strong = json!({
        "repeat_penalty": 1.0, "repetition_penalty": 1.0, "frequency_penalty": 2, "presence_penalty": 2,
    });
    let plain = continued(client, probe, json!({})).await?;
    let without = continued(client, probe, none).await?;
    let with = continued(client, probe, strong).await?;
    let (Some(plain), Some(without)) = (plain, without) else {
        return Ok(());
    };
    note_choice(probe, &plain);
    if values_differ(&plain, &without) || tokens_differ(&plain, &without) {
        probe.logprobs.penalty_by_default = Some(true);
    } else {
        probe.logprobs.penalty_by_default.get_or_insert(false);
    }
    if let Some(with) = with {
        probe.logprobs.penalties = match (
            values_differ(&without, &with),
            tokens_differ(&without, &with),
        ) {
            (true, _) => SamplingStage::Processed,
            (false, true) => SamplingStage::Raw,
            // The penalty had no effect: it was ignored, or too weak.
            (false, false) => SamplingStage::Unknown,
        };
    }
    Ok(())
}

async fn continued(
    client: &mut ProbeClient<'_>,
    probe: &Probe,
    mut more: Value,
) -> Result<Option<Vec<PositionLogprobs>>, Failure> {
    if let Some(more) = more.as_object_mut() {
        more.insert(
            "logprobs".into(),
            if probe.completions {
                5.into()
            } else {
                true.into()
            },
        );
        if !probe.completions {
            more.insert("top_logprobs".into(), 5.into());
        }
    }
    let response = match probe.completions {
        true => client.complete(REPEATING.into(), 6, more).await?,
        false => client.chat(REPEATING, 6, more).await?,
    };
    let positions = positions::of_answer(&response);
    Ok((response.is_success() && !positions.is_empty()).then_some(positions))
}

/// Whether log-probabilities differ after equal tokens.
fn values_differ(a: &[PositionLogprobs], b: &[PositionLogprobs]) -> bool {
    for (a, b) in a.iter().zip(b) {
        if positions::difference(a, b).is_none_or(|(mean, _)| mean > EQUAL_WITHIN) {
            return true;
        }
        if a.token != b.token {
            return false;
        }
    }
    false
}

fn tokens_differ(a: &[PositionLogprobs], b: &[PositionLogprobs]) -> bool {
    a.iter().zip(b).any(|(a, b)| a.token != b.token)
}

/// Finds out what `usage` counts for several prompts and in streams, and whether `n` has an effect.
pub(super) async fn counts(client: &mut ProbeClient<'_>, probe: &mut Probe) -> Result<(), Failure> {
    if probe.completions {
        several_prompts(client, probe).await?;
    }
    let response = client
        .chat(QUESTION, 16, json!({ "seed": 1, "n": 2 }))
        .await?;
    if response.is_success() && choices(&response).len() < 2 {
        probe.quirks.push("`n = 2` gives one answer".into());
    }
    let more = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let response = client.chat(QUESTION, 4, more).await?;
    if response.status == 200 {
        let mut events = response
            .text
            .lines()
            .filter_map(|line| line.strip_prefix("data:"));
        let has_usage = events.any(|event| {
            let event: Value = reply_json::value(event.trim().as_bytes()).unwrap_or_default();
            event.pointer("/usage/completion_tokens").is_some()
        });
        probe.usage.in_streams = Some(has_usage);
    }
    Ok(())
}

fn choices(response: &ProbeResponse) -> &[Value] {
    let choices = response.json.get("choices").and_then(Value::as_array);
    choices.map(Vec::as_slice).unwrap_or_default()
}

async fn several_prompts(client: &mut ProbeClient<'_>, probe: &mut Probe) -> Result<(), Failure> {
    let response = client
        .complete(json!(["Hello", "The sky is"]), 4, json!({}))
        .await?;
    let choices = choices(&response);
    if !response.is_success() || choices.len() < 2 {
        probe
            .quirks
            .push("several prompts in one request are refused".into());
        return Ok(());
    }
    let at_limit =
        |choice: &Value| choice.get("finish_reason").and_then(Value::as_str) == Some("length");
    if let Some(counted) = response
        .usage("completion_tokens")
        .filter(|_| choices.iter().all(at_limit))
    {
        probe.usage.counts_all_prompts = Some(counted >= 8);
        if counted < 8 {
            probe.quirks.push(format!(
                "`usage` counts one of several prompts: {counted} tokens for answers of 8 tokens together"
            ));
        }
    }
    Ok(())
}

/// Measures tokens a second and bytes a token, for several numbers of most likely tokens.
pub(super) async fn speeds(client: &mut ProbeClient<'_>, probe: &mut Probe) -> Result<(), Failure> {
    let largest = probe.logprobs.largest_k;
    let mut ks: Vec<Option<u32>> = vec![None];
    if probe.logprobs.kind == LogprobKind::Real {
        let wanted = [1, 5, 20, 64].into_iter().filter(|k| *k <= largest);
        ks.extend(wanted.map(Some));
    }
    for k in ks {
        let more = match k {
            None => json!({}),
            Some(k) => json!({ "logprobs": true, "top_logprobs": k }),
        };
        let response = client
            .chat("Count from one to twenty in words.", 24, more)
            .await?;
        let tokens = response.usage("completion_tokens").unwrap_or(0) as f64;
        if response.is_success() && tokens > 0.0 {
            probe.speeds.push(AnswerSpeed {
                k,
                tokens_per_second: tokens / response.seconds.max(1e-6),
                bytes_per_token: response.bytes as f64 / tokens,
            });
        }
    }
    Ok(())
}
