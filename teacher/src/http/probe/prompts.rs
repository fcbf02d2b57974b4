//! Questions about prompts: their log-probabilities, tokens and template.

use serde_json::{Value, json};

use potstill_datasets::{ChatTemplate, Message, Role, Tokenizer, prompt_ids};

use super::answers::QUESTION;
use super::ask::{ProbeClient, ProbeResponse, ask, complete};
use super::read::{self, ALIKE, PositionLogprobs};
use super::{Probe, ScoringApi};
use crate::http::{Dialect, Failure};

const BEGUN: &str = "The capital of France is";

/// Whether it completes text; gives the continuation that prompts are later compared with.
pub(super) async fn continuation(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
) -> Result<Vec<PositionLogprobs>, Failure> {
    let response = complete(client, BEGUN.into(), 8, json!({ "logprobs": 5 })).await?;
    probe.completions = response.is_good();
    let positions = read::positions(&response);
    if let Some(position) = read::odd_choice(&positions) {
        probe.logprobs.penalty_by_default = Some(true);
        probe.quirks.push(format!(
            "at temperature 0 it went on with {:?} where {:?} is likelier by its own log-probabilities: a penalty is on by default, and log-probabilities are those before it",
            position.token,
            position.top.first().map_or("", |top| top.0.as_str())
        ));
    }
    Ok(if response.is_good() {
        positions
    } else {
        Vec::new()
    })
}

/// How log-probabilities of a prompt are had, and whether they stand where they belong.
pub(super) async fn prompted(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    answer: &[PositionLogprobs],
) -> Result<(), Failure> {
    let Some(truth) = answer.first() else {
        return Ok(());
    };
    let text = format!("{BEGUN}{}", truth.token);
    let Some((through, positions)) = scored(client, probe, &text).await? else {
        if probe.completions {
            probe
                .quirks
                .push("`echo` is ignored, and there are no log-probabilities of prompts".into());
        }
        return Ok(());
    };
    probe.prompt_logprobs.through = through;
    probe.prompt_logprobs.largest_k = widest(&positions);
    align(probe, truth, &positions, through);
    if through == ScoringApi::PromptLogprobs {
        largest_k(client, probe, &text).await?;
    }
    if probe.prompt_logprobs.shift == Some(0) {
        stale(client, probe).await?;
    }
    Ok(())
}

fn widest(positions: &[PositionLogprobs]) -> u32 {
    // The realised token is added to those asked for.
    positions
        .iter()
        .map(|position| position.top.len())
        .min_by_key(|n| if *n == 0 { usize::MAX } else { *n })
        .unwrap_or(0) as u32
}

/// Asks for the log-probabilities of a text through whichever door there is.
async fn scored(
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
        let response = ask(client, "/generate", true, Some(&body)).await?;
        let positions = read::generate_places(&response).filter(|positions| positions.len() > 1);
        return Ok(positions.map(|positions| (ScoringApi::Generate, positions)));
    }
    let asks_field = probe.dialect.is_none_or(|dialect| dialect == Dialect::Vllm);
    if known == ScoringApi::PromptLogprobs || asks_field {
        let response = complete(client, text.into(), 1, json!({ "prompt_logprobs": 20 })).await?;
        let positions = read::prompt_places(&response)
            .filter(|positions| response.is_good() && positions.len() > 1);
        if let Some(positions) = positions {
            return Ok(Some((ScoringApi::PromptLogprobs, positions)));
        }
    }
    let response = complete(
        client,
        text.into(),
        1,
        json!({ "logprobs": 20, "echo": true }),
    )
    .await?;
    let positions = read::positions(&response);
    let echoed = response.is_good() && response.answer().starts_with(text) && positions.len() > 2;
    Ok(echoed.then_some((ScoringApi::Echo, positions)))
}

/// Finds the distribution that an answer had among those of the prompt that ends with the same token.
fn align(
    probe: &mut Probe,
    truth: &PositionLogprobs,
    positions: &[PositionLogprobs],
    through: ScoringApi,
) {
    // The prompt's last token; behind it an echo has the token that was sampled.
    let last = match through {
        ScoringApi::Echo => positions
            .iter()
            .rposition(|position| position.token == truth.token),
        _ => positions.len().checked_sub(1),
    };
    let Some(last) = last else { return };
    let candidates = [0_i32, -1, 1].into_iter().filter_map(|shift| {
        let position = positions.get(last.checked_add_signed(shift as isize)?)?;
        let (mean, _) = read::difference(truth, position)?;
        Some((shift, mean))
    });
    let Some((shift, mean)) = candidates.min_by(|a, b| a.1.total_cmp(&b.1)) else {
        probe.quirks.push(
            "log-probabilities of a prompt fit those of the answer with the same text nowhere"
                .into(),
        );
        return;
    };
    if mean > 2.0 * ALIKE {
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
        let response = complete(client, text.into(), 1, json!({ "prompt_logprobs": k })).await?;
        let best = probe.prompt_logprobs.largest_k;
        if response.is_good() {
            let came = widest(&read::prompt_places(&response).unwrap_or_default()).min(k);
            probe.prompt_logprobs.largest_k = best.max(came);
            continue;
        }
        let said = response.complaint();
        let named = read::numbers(&said);
        let named = named
            .into_iter()
            .filter(|n| *n > best && *n < k && !tried.contains(n));
        next = named.max().into_iter().collect();
        probe.prompt_logprobs.limit_said = Some(said);
    }
    Ok(())
}

/// The same text twice: new to the server, then cached. It is longer than a block of any cache.
async fn stale(client: &mut ProbeClient<'_>, probe: &mut Probe) -> Result<(), Failure> {
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
    let Some((_, cold)) = scored(client, probe, &text).await? else {
        return Ok(());
    };
    let warm = scored(client, probe, &text)
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
        .filter_map(|(a, b)| read::difference(a, b));
    let (means, most) = apart.fold((Vec::new(), 0.0_f64), |(mut means, most), (mean, m)| {
        means.push(mean);
        (means, most.max(m))
    });
    let mean = means.iter().sum::<f64>() / means.len().max(1) as f64;
    probe.prompt_logprobs.stale = Some(fewer || mean > ALIKE);
    probe.prompt_logprobs.stale_difference = Some(most);
    Ok(())
}

/// Whether prompts may be token ids, and whether the server's tokens and template are the local ones.
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
    if let Ok(ids) = tokenizer.encode(BEGUN, false)
        && probe.completions
    {
        let response = complete(client, json!(ids), 4, json!({ "logprobs": 2 })).await?;
        let begun = answer
            .first()
            .map_or("", |position| position.token.as_str());
        probe.tokens.id_prompts = response.is_good() && response.answer().starts_with(begun);
    }
    let messages = [Message::text(Role::User, QUESTION)];
    if let Ok(ids) = prompt_ids(tokenizer, template, &messages, None, None) {
        same_template(client, probe, &ids, tokenizer, first).await?;
    }
    same_tokens(client, probe, tokenizer).await
}

async fn same_template(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    ids: &[u32],
    tokenizer: &Tokenizer,
    first: &ProbeResponse,
) -> Result<(), Failure> {
    let counted = first
        .used("prompt_tokens")
        .map(|said| said == ids.len() as u64);
    probe.usage.prompt_right = counted;
    let theirs = first.json.get("prompt_token_ids").and_then(Value::as_array);
    if let Some(theirs) = theirs {
        let theirs = theirs.iter().map(Value::as_u64);
        probe.tokens.same_template = Some(theirs.eq(ids.iter().map(|id| Some(u64::from(*id)))));
        return Ok(());
    }
    if probe.dialect == Some(Dialect::LlamaServer) {
        let body = json!({ "messages": [{ "role": "user", "content": QUESTION }] });
        let response = ask(client, "/apply-template", true, Some(&body)).await?;
        let theirs = response.json.get("prompt").and_then(Value::as_str);
        let ours = tokenizer.decode(ids, false).ok();
        probe.tokens.same_template = theirs.zip(ours).map(|(a, b)| a == b);
        return Ok(());
    }
    // The number of tokens is all there is: another template would hardly have the same.
    probe.tokens.same_template = counted;
    Ok(())
}

/// A text with blanks, digits and line ends, which tokenizers cut differently.
const TOKENIZED: &str = "Hello world\n\n1.";

async fn same_tokens(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    tokenizer: &Tokenizer,
) -> Result<(), Failure> {
    let (path, body) = match probe.dialect {
        Some(Dialect::Vllm | Dialect::Sglang) => (
            "/tokenize",
            json!({ "model": client.request.model, "prompt": TOKENIZED, "add_special_tokens": false }),
        ),
        Some(Dialect::LlamaServer) => ("/tokenize", json!({ "content": TOKENIZED })),
        Some(Dialect::LlamaCppPython) => ("/extras/tokenize", json!({ "input": TOKENIZED })),
        _ => return Ok(()),
    };
    let response = ask(client, path, true, Some(&body)).await?;
    let theirs = response.json.get("tokens").and_then(Value::as_array);
    if let (Some(theirs), Ok(ours)) = (theirs, tokenizer.encode(TOKENIZED, false)) {
        let theirs = theirs.iter().map(Value::as_u64);
        probe.tokens.same_as_local = Some(theirs.eq(ours.iter().map(|id| Some(u64::from(*id)))));
    }
    Ok(())
}
