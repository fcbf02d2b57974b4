//! Questions about prompts: their log-probabilities, tokens and template.

use serde_json::{Value, json};

use potstill_datasets::{ChatTemplate, Message, Role, Tokenizer, prompt_ids};

use super::answers::QUESTION;
use super::ask::{Asked, Told, ask, complete};
use super::read::{self, ALIKE, Place};
use super::{Probe, Through};
use crate::http::{Dialect, Failure};

const BEGUN: &str = "The capital of France is";

/// Whether it completes text; gives the continuation that prompts are later compared with.
pub(super) async fn continuation(
    asked: &mut Asked<'_>,
    probe: &mut Probe,
) -> Result<Vec<Place>, Failure> {
    let told = complete(asked, BEGUN.into(), 8, json!({ "logprobs": 5 })).await?;
    probe.completions = told.is_good();
    let places = read::places(&told);
    if let Some(place) = read::odd_choice(&places) {
        probe.logprobs.penalty_by_default = Some(true);
        probe.quirks.push(format!(
            "at temperature 0 it went on with {:?} where {:?} is likelier by its own log-probabilities: a penalty is on by default, and log-probabilities are those before it",
            place.token,
            place.top.first().map_or("", |top| top.0.as_str())
        ));
    }
    Ok(if told.is_good() { places } else { Vec::new() })
}

/// How log-probabilities of a prompt are had, and whether they stand where they belong.
pub(super) async fn prompted(
    asked: &mut Asked<'_>,
    probe: &mut Probe,
    answer: &[Place],
) -> Result<(), Failure> {
    let Some(truth) = answer.first() else {
        return Ok(());
    };
    let text = format!("{BEGUN}{}", truth.token);
    let Some((through, places)) = scored(asked, probe, &text).await? else {
        if probe.completions {
            probe
                .quirks
                .push("`echo` is ignored, and there are no log-probabilities of prompts".into());
        }
        return Ok(());
    };
    probe.prompt_logprobs.through = through;
    probe.prompt_logprobs.largest_k = widest(&places);
    align(probe, truth, &places, through);
    if through == Through::PromptLogprobs {
        largest_k(asked, probe, &text).await?;
    }
    if probe.prompt_logprobs.shift == Some(0) {
        stale(asked, probe).await?;
    }
    Ok(())
}

fn widest(places: &[Place]) -> u32 {
    // The realised token is added to those asked for.
    places
        .iter()
        .map(|place| place.top.len())
        .min_by_key(|n| if *n == 0 { usize::MAX } else { *n })
        .unwrap_or(0) as u32
}

/// Asks for the log-probabilities of a text through whichever door there is.
async fn scored(
    asked: &mut Asked<'_>,
    probe: &Probe,
    text: &str,
) -> Result<Option<(Through, Vec<Place>)>, Failure> {
    let known = probe.prompt_logprobs.through;
    if probe.dialect == Some(Dialect::Sglang) {
        let body = json!({
            "text": text, "return_logprob": true, "logprob_start_len": 0, "top_logprobs_num": 20,
            "return_text_in_logprobs": true, "sampling_params": { "max_new_tokens": 1, "temperature": 0 },
        });
        let told = ask(asked, "/generate", true, Some(&body)).await?;
        let places = read::generate_places(&told).filter(|places| places.len() > 1);
        return Ok(places.map(|places| (Through::Generate, places)));
    }
    let asks_field = probe.dialect.is_none_or(|dialect| dialect == Dialect::Vllm);
    if known == Through::PromptLogprobs || asks_field {
        let told = complete(asked, text.into(), 1, json!({ "prompt_logprobs": 20 })).await?;
        let places = read::prompt_places(&told).filter(|places| told.is_good() && places.len() > 1);
        if let Some(places) = places {
            return Ok(Some((Through::PromptLogprobs, places)));
        }
    }
    let told = complete(
        asked,
        text.into(),
        1,
        json!({ "logprobs": 20, "echo": true }),
    )
    .await?;
    let places = read::places(&told);
    let echoed = told.is_good() && told.answer().starts_with(text) && places.len() > 2;
    Ok(echoed.then_some((Through::Echo, places)))
}

/// Finds the distribution that an answer had among those of the prompt that ends with the same token.
fn align(probe: &mut Probe, truth: &Place, places: &[Place], through: Through) {
    // The prompt's last token; behind it an echo has the token that was sampled.
    let last = match through {
        Through::Echo => places.iter().rposition(|place| place.token == truth.token),
        _ => places.len().checked_sub(1),
    };
    let Some(last) = last else { return };
    let candidates = [0_i32, -1, 1].into_iter().filter_map(|shift| {
        let place = places.get(last.checked_add_signed(shift as isize)?)?;
        let (mean, _) = read::difference(truth, place)?;
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

async fn largest_k(asked: &mut Asked<'_>, probe: &mut Probe, text: &str) -> Result<(), Failure> {
    let mut tried = vec![20];
    let mut next = vec![1000, 64];
    while let Some(k) = next.pop() {
        tried.push(k);
        let told = complete(asked, text.into(), 1, json!({ "prompt_logprobs": k })).await?;
        let best = probe.prompt_logprobs.largest_k;
        if told.is_good() {
            let came = widest(&read::prompt_places(&told).unwrap_or_default()).min(k);
            probe.prompt_logprobs.largest_k = best.max(came);
            continue;
        }
        let said = told.complaint();
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
async fn stale(asked: &mut Asked<'_>, probe: &mut Probe) -> Result<(), Failure> {
    let seed = asked.nonce;
    let text: String = (0..24_u64)
        .map(|n| {
            format!(
                "Note {}: the {} th parcel went north. ",
                seed % 9973 + n * 37,
                n + 1
            )
        })
        .collect();
    let Some((_, cold)) = scored(asked, probe, &text).await? else {
        return Ok(());
    };
    let warm = scored(asked, probe, &text).await?.map(|(_, places)| places);
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
    asked: &mut Asked<'_>,
    probe: &mut Probe,
    local: Option<(&Tokenizer, &ChatTemplate)>,
    first: &Told,
    answer: &[Place],
) -> Result<(), Failure> {
    let Some((tokenizer, template)) = local else {
        return Ok(());
    };
    if let Ok(ids) = tokenizer.encode(BEGUN, false)
        && probe.completions
    {
        let told = complete(asked, json!(ids), 4, json!({ "logprobs": 2 })).await?;
        let begun = answer.first().map_or("", |place| place.token.as_str());
        probe.tokens.id_prompts = told.is_good() && told.answer().starts_with(begun);
    }
    let messages = [Message::text(Role::User, QUESTION)];
    if let Ok(ids) = prompt_ids(tokenizer, template, &messages, None, None) {
        same_template(asked, probe, &ids, tokenizer, first).await?;
    }
    same_tokens(asked, probe, tokenizer).await
}

async fn same_template(
    asked: &mut Asked<'_>,
    probe: &mut Probe,
    ids: &[u32],
    tokenizer: &Tokenizer,
    first: &Told,
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
        let told = ask(asked, "/apply-template", true, Some(&body)).await?;
        let theirs = told.json.get("prompt").and_then(Value::as_str);
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
    asked: &mut Asked<'_>,
    probe: &mut Probe,
    tokenizer: &Tokenizer,
) -> Result<(), Failure> {
    let (path, body) = match probe.dialect {
        Some(Dialect::Vllm | Dialect::Sglang) => (
            "/tokenize",
            json!({ "model": asked.asking.model, "prompt": TOKENIZED, "add_special_tokens": false }),
        ),
        Some(Dialect::LlamaServer) => ("/tokenize", json!({ "content": TOKENIZED })),
        Some(Dialect::LlamaCppPython) => ("/extras/tokenize", json!({ "input": TOKENIZED })),
        _ => return Ok(()),
    };
    let told = ask(asked, path, true, Some(&body)).await?;
    let theirs = told.json.get("tokens").and_then(Value::as_array);
    if let (Some(theirs), Ok(ours)) = (theirs, tokenizer.encode(TOKENIZED, false)) {
        let theirs = theirs.iter().map(Value::as_u64);
        probe.tokens.same_as_local = Some(theirs.eq(ours.iter().map(|id| Some(u64::from(*id)))));
    }
    Ok(())
}
