//! Requests that examine prompts: their log-probabilities, tokens and template.

use serde_json::{Value, json};

use potstill_datasets::{ChatTemplate, Message, Role, Tokenizer, prompt_ids};

use super::answers::{QUESTION, note_choice};
use super::client::{ProbeClient, ProbeResponse};
use super::positions::{self, EQUAL_WITHIN, PositionLogprobs};
use super::{LogprobKind, Probe, ScoringApi};
use crate::http::{Dialect, Failure};

/// Beginning of a text whose continuation is easy to predict.
const BEGINNING: &str = "The capital of France is";

/// Finds out whether the server completes text. Returns the continuation, which prompts are compared with.
pub(super) async fn continuation(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
) -> Result<Vec<PositionLogprobs>, Failure> {
    let response = client
        .complete(BEGINNING.into(), 8, json!({ "logprobs": 5 }))
        .await?;
    probe.completions = response.is_success();
    let positions = positions::of_answer(&response);
    note_choice(probe, &positions);
    Ok(if response.is_success() {
        positions
    } else {
        Vec::new()
    })
}

/// Finds out how the server gives log-probabilities of a prompt, and whether they are at the right positions.
pub(super) async fn prompt_logprobs(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    answer: &[PositionLogprobs],
) -> Result<(), Failure> {
    let Some(truth) = answer.first() else {
        return Ok(());
    };
    let text = format!("{BEGINNING}{}", truth.token);
    let Some((through, positions)) = score_text(client, probe, &text).await? else {
        if probe.completions {
            probe
                .quirks
                .push("`echo` is ignored, and there are no log-probabilities of prompts".into());
        }
        return Ok(());
    };
    probe.prompt_logprobs.through = through;
    probe.prompt_logprobs.largest_k = widest(&positions);
    probe.prompt_logprobs.kind = positions::kind(&positions);
    align(probe, truth, &positions, through);
    if through == ScoringApi::PromptLogprobs {
        largest_k(client, probe, &text).await?;
    }
    if probe.prompt_logprobs.shift == Some(0) {
        find_stale_cache(client, probe).await?;
    }
    Ok(())
}

fn widest(positions: &[PositionLogprobs]) -> u32 {
    // The target token is added to the requested ones.
    positions
        .iter()
        .map(|position| position.top.len())
        .min_by_key(|n| if *n == 0 { usize::MAX } else { *n })
        .unwrap_or(0) as u32
}

/// Requests the log-probabilities of a text through whichever API gives them.
async fn score_text(
    client: &mut ProbeClient<'_>,
    probe: &Probe,
    text: &str,
) -> Result<Option<(ScoringApi, Vec<PositionLogprobs>)>, Failure> {
    let known = probe.prompt_logprobs.through;
    if probe.dialect == Some(Dialect::Sglang) {
        let body = json!({
            "text": text, "return_logprob": true, "logprob_start_len": 0, "top_logprobs_num": 20,
            "return_text_in_logprobs": true, "sampling_params": { "max_new_tokens": 1, "temperature": 0 },
        });
        let response = client.request("/generate", true, Some(&body)).await?;
        let positions = positions::of_generate(&response).filter(|positions| positions.len() > 1);
        return Ok(positions.map(|positions| (ScoringApi::Generate, positions)));
    }
    let asks_field = probe.dialect.is_none_or(|dialect| dialect == Dialect::Vllm);
    if known == ScoringApi::PromptLogprobs || asks_field {
        let response = client
            .complete(text.into(), 1, json!({ "prompt_logprobs": 20 }))
            .await?;
        let positions = positions::of_prompt(&response)
            .filter(|positions| response.is_success() && positions.len() > 1);
        if let Some(positions) = positions {
            return Ok(Some((ScoringApi::PromptLogprobs, positions)));
        }
    }
    let response = client
        .complete(text.into(), 1, json!({ "logprobs": 20, "echo": true }))
        .await?;
    let positions = positions::of_answer(&response);
    let echoed =
        response.is_success() && response.answer().starts_with(text) && positions.len() > 2;
    Ok(echoed.then_some((ScoringApi::Echo, positions)))
}

/// Finds the distribution of an answer's token among those of a prompt that ends with this token.
fn align(
    probe: &mut Probe,
    truth: &PositionLogprobs,
    positions: &[PositionLogprobs],
    through: ScoringApi,
) {
    // The prompt's last token. An echo has the sampled token after it.
    let last = match through {
        ScoringApi::Echo => positions
            .iter()
            .rposition(|position| position.token == truth.token),
        _ => positions.len().checked_sub(1),
    };
    let Some(last) = last else { return };
    let kinds = [probe.logprobs.kind, probe.prompt_logprobs.kind];
    let is_normalized = !kinds.contains(&LogprobKind::Logits);
    let candidates = [0_i32, -1, 1].into_iter().filter_map(|shift| {
        let position = positions.get(last.checked_add_signed(shift as isize)?)?;
        let mean = match is_normalized {
            true => positions::difference(truth, position)?.0,
            false => positions::difference_up_to_constant(truth, position)?,
        };
        Some((shift, mean))
    });
    let Some((shift, mean)) = candidates.min_by(|a, b| a.1.total_cmp(&b.1)) else {
        probe.quirks.push(
            "log-probabilities of a prompt match those of the answer with the same text at no position"
                .into(),
        );
        return;
    };
    if mean > 2.0 * EQUAL_WITHIN {
        probe.quirks.push(format!(
            "log-probabilities of a prompt differ from those of the answer with the same text by {mean:.2} nats"
        ));
        return;
    }
    probe.prompt_logprobs.shift = Some(shift);
    probe.prompt_logprobs.difference = Some(mean);
    if shift != 0 {
        let (by, which) = (shift.abs(), if shift < 0 { "early" } else { "late" });
        probe.quirks.push(format!(
            "log-probabilities of prompts are off by {by}: the distribution that predicts a token stands {by} too {which}"
        ));
    }
}

async fn largest_k(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    text: &str,
) -> Result<(), Failure> {
    let mut tried = vec![20];
    let mut next = vec![1000, 64];
    while let Some(k) = next.pop() {
        tried.push(k);
        let response = client
            .complete(text.into(), 1, json!({ "prompt_logprobs": k }))
            .await?;
        let best = probe.prompt_logprobs.largest_k;
        if response.is_success() {
            let received = widest(&positions::of_prompt(&response).unwrap_or_default()).min(k);
            probe.prompt_logprobs.largest_k = best.max(received);
            continue;
        }
        let message = response.error_message.clone();
        let named = positions::numbers(&message);
        let named = named
            .into_iter()
            .filter(|n| *n > best && *n < k && !tried.contains(n));
        next = named.max().into_iter().collect();
        probe.prompt_logprobs.limit_said = Some(message);
    }
    Ok(())
}

/// Scores the same text twice, first new to the server and then cached. The text is longer than a block of any cache.
async fn find_stale_cache(client: &mut ProbeClient<'_>, probe: &mut Probe) -> Result<(), Failure> {
    let seed = client.nonce;
    let text: String = (0..24_u64)
        .map(|n| {
            format!(
                "Note {}: the {} th parcel went north. ",
                seed % 9973 + n * 37,
                n + 1
            )
        })
        .collect();
    let Some((_, cold)) = score_text(client, probe, &text).await? else {
        return Ok(());
    };
    let warm = score_text(client, probe, &text)
        .await?
        .map(|(_, positions)| positions);
    let warm = warm.unwrap_or_default();
    let fewer = warm.len() != cold.len()
        || cold
            .iter()
            .zip(&warm)
            .any(|(a, b)| a.top.is_empty() != b.top.is_empty());
    let apart = cold
        .iter()
        .zip(&warm)
        .filter_map(|(a, b)| positions::difference(a, b));
    let (means, most) = apart.fold((Vec::new(), 0.0_f64), |(mut means, most), (mean, m)| {
        means.push(mean);
        (means, most.max(m))
    });
    let mean = means.iter().sum::<f64>() / means.len().max(1) as f64;
    probe.prompt_logprobs.stale = Some(fewer || mean > EQUAL_WITHIN);
    probe.prompt_logprobs.stale_difference = Some(most);
    Ok(())
}

/// Finds out whether prompts may be token ids, and whether the server's tokens and template are the local ones.
pub(super) async fn tokens(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    local: Option<(&Tokenizer, &ChatTemplate)>,
    first: &ProbeResponse,
    answer: &[PositionLogprobs],
) -> Result<(), Failure> {
    let Some((tokenizer, template)) = local else {
        return Ok(());
    };
    if let Ok(ids) = tokenizer.encode(BEGINNING, false)
        && probe.completions
    {
        let response = client
            .complete(json!(ids), 4, json!({ "logprobs": 2 }))
            .await?;
        let first_token = answer
            .first()
            .map_or("", |position| position.token.as_str());
        probe.tokens.id_prompts =
            response.is_success() && response.answer().starts_with(first_token);
    }
    let messages = [Message::text(Role::User, QUESTION)];
    if let Ok(ids) = prompt_ids(tokenizer, template, &messages, None, None) {
        compare_template(client, probe, &ids, tokenizer, first).await?;
    }
    compare_tokens(client, probe, tokenizer).await
}

async fn compare_template(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    ids: &[u32],
    tokenizer: &Tokenizer,
    first: &ProbeResponse,
) -> Result<(), Failure> {
    let counted = first
        .usage("prompt_tokens")
        .map(|count| count == ids.len() as u64);
    probe.usage.prompt_right = counted;
    let theirs = first.json.get("prompt_token_ids").and_then(Value::as_array);
    if let Some(theirs) = theirs {
        let theirs = theirs.iter().map(Value::as_u64);
        probe.tokens.same_template = Some(theirs.eq(ids.iter().map(|id| Some(u64::from(*id)))));
        return Ok(());
    }
    if probe.dialect == Some(Dialect::LlamaServer) {
        let mut body = json!({ "messages": [{ "role": "user", "content": QUESTION }] });
        client.add_template_arguments(&mut body);
        let response = client.request("/apply-template", true, Some(&body)).await?;
        let theirs = response.json.get("prompt").and_then(Value::as_str);
        let ours = tokenizer.decode(ids, false).ok();
        probe.tokens.same_template = theirs.zip(ours).map(|(a, b)| a == b);
        return Ok(());
    }
    // Only the number of tokens is known. Another template would hardly have the same number.
    probe.tokens.same_template = counted;
    Ok(())
}

/// A text with spaces, digits and line ends, which tokenizers split differently.
const TOKENIZED: &str = "Hello world\n\n1.";

async fn compare_tokens(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    tokenizer: &Tokenizer,
) -> Result<(), Failure> {
    let (path, body) = match probe.dialect {
        Some(Dialect::Vllm | Dialect::Sglang) => (
            "/tokenize",
            json!({ "model": client.settings.model, "prompt": TOKENIZED, "add_special_tokens": false }),
        ),
        Some(Dialect::LlamaServer) => ("/tokenize", json!({ "content": TOKENIZED })),
        Some(Dialect::LlamaCppPython) => ("/extras/tokenize", json!({ "input": TOKENIZED })),
        _ => return Ok(()),
    };
    let response = client.request(path, true, Some(&body)).await?;
    let theirs = response.json.get("tokens").and_then(Value::as_array);
    if let (Some(theirs), Ok(ours)) = (theirs, tokenizer.encode(TOKENIZED, false)) {
        let theirs = theirs.iter().map(Value::as_u64);
        probe.tokens.same_as_local = Some(theirs.eq(ours.iter().map(|id| Some(u64::from(*id)))));
    }
    Ok(())
}
