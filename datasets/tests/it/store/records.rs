//! Strategies for records of any content that the rules allow.

use potstill_datasets::{
    Completion, Dropped, FinishReason, Message, OwnText, Prompt, Provenance, Role, SampledToken,
    Selected, SequenceValues, Signal, SignalRow, Spelling, TaskSample, ToolCall, TopToken, Usage,
    Verdict,
};
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;

pub(super) fn provenances() -> Vec<Provenance> {
    let provenance = |teacher: &str, licence: Option<&str>| Provenance {
        teacher: teacher.into(),
        revision: "abc".into(),
        engine: "potstill 0.1.0".into(),
        dtype: "f32".into(),
        tokenizer: "t".into(),
        template: "m \"quoted\" ü".into(),
        sampling: "{}".into(),
        temperatures: vec![0.1, 2.0],
        licence: licence.map(str::to_owned),
    };
    vec![provenance("one", None), provenance("two", Some("MIT"))]
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z ]{0,12}",
        "\\PC{0,8}",
        Just("\0\n\u{feff}\u{1f600}".to_owned())
    ]
}

fn logprob() -> impl Strategy<Value = f32> {
    prop_oneof![-50.0_f32..=0.0, Just(f32::NEG_INFINITY), Just(-0.0)]
}

fn tool_calls() -> impl Strategy<Value = Vec<ToolCall>> {
    let call = (option::of(text()), text(), text()).prop_map(|(id, name, arguments)| ToolCall {
        id,
        name,
        arguments,
    });
    vec(call, 0..3)
}

fn message() -> impl Strategy<Value = Message> {
    let role = prop::sample::select(Role::ALL.to_vec());
    (
        role,
        text(),
        option::of(text()),
        tool_calls(),
        option::of(text()),
    )
        .prop_map(
            |(role, content, reasoning, tool_calls, tool_call_id)| Message {
                role,
                content,
                reasoning,
                tool_calls,
                tool_call_id,
            },
        )
}

pub(super) fn prompt() -> impl Strategy<Value = Prompt> {
    (
        vec(message(), 0..4),
        option::of(text()),
        [option::of(text()), option::of(text())],
        text(),
    )
        .prop_map(|(messages, tools, [reference, group], source)| Prompt {
            group,
            ..Prompt::new(messages, tools, reference, source)
        })
}

fn token() -> impl Strategy<Value = SampledToken> {
    // Some are longer than what is held in place.
    let bytes =
        || prop_oneof![vec(any::<u8>(), 0..4), vec(any::<u8>(), 20..26)].prop_map(Spelling::from);
    let top = (option::of(any::<u32>()), bytes(), logprob())
        .prop_map(|(id, bytes, logprob)| TopToken { id, bytes, logprob });
    (bytes(), option::of(any::<u32>()), logprob(), vec(top, 0..4)).prop_map(
        |(bytes, id, logprob, top)| SampledToken {
            bytes,
            id,
            logprob,
            top,
        },
    )
}

pub(super) fn completion() -> impl Strategy<Value = Completion> {
    let reason = prop::sample::select(FinishReason::ALL.to_vec());
    let texts = (text(), option::of(text()), text());
    (
        texts,
        any::<[u32; 3]>(),
        tool_calls(),
        reason,
        vec(token(), 0..5),
        0..2_u32,
    )
        .prop_map(
            |(
                (prompt_id, reasoning, answer),
                [sample_index, prompt_tokens, completion_tokens],
                calls,
                reason,
                tokens,
                p,
            )| {
                Completion {
                    prompt_id,
                    sample_index,
                    reasoning,
                    answer,
                    tool_calls: calls,
                    finish_reason: reason,
                    usage: Usage {
                        prompt_tokens,
                        completion_tokens,
                    },
                    tokens,
                    provenance: p,
                }
            },
        )
}

/// A distribution over `realised`, other ids and a tail, from weights; without a tail where its weight is 0. With
/// `draws` from the tail where there is one, of ids that no support has.
fn signal_row(realised: u32, temperatures: usize, draws: u32) -> impl Strategy<Value = SignalRow> {
    let ids = btree_set(0..60_u32, 0..8);
    let log_z = vec(option::of(-5.0_f32..5.0), temperatures);
    (
        ids,
        vec(0.001_f64..1.0, 9),
        prop_oneof![Just(0.0), 1e-9..1.0],
        0.0_f32..9.0,
        log_z,
        60..90_u32,
    )
        .prop_map(
            move |(mut ids, mut weights, tail, entropy, log_z_at, drawn)| {
                let (draw_ids, draw_counts) = match draws {
                    0 => (vec![], vec![]),
                    _ if tail == 0.0 => (vec![], vec![]),
                    1 => (vec![drawn], vec![1]),
                    m => (vec![drawn, drawn + 7], vec![m - 1, 1]),
                };
                ids.insert(realised);
                weights.truncate(ids.len());
                weights.sort_by(|a, b| b.total_cmp(a));
                let total = weights.iter().sum::<f64>() + tail;
                SignalRow {
                    // Any order is legal beside the right one of the log-probabilities.
                    ids: ids.into_iter().rev().collect(),
                    logprobs: weights
                        .iter()
                        .map(|weight| (weight / total).ln() as f32)
                        .collect(),
                    tail_logprob: (tail / total).ln() as f32,
                    entropy,
                    log_z_at,
                    draw_ids,
                    draw_counts,
                }
            },
        )
}

pub(super) fn signal() -> impl Strategy<Value = Signal> {
    (
        vec((0..60_u32, any::<bool>()), 0..12),
        (0..3_usize, 0..4_u32),
        text(),
        any::<u32>(),
        0..2_u32,
    )
        .prop_flat_map(
            |(mut tokens, (temperatures, draws), prompt_id, sample_index, provenance)| {
                if let Some(first) = tokens.first_mut() {
                    first.1 = false;
                }
                let (token_ids, loss_mask): (Vec<u32>, Vec<bool>) = tokens.iter().copied().unzip();
                let rows: Vec<_> = tokens
                    .iter()
                    .filter(|(_, loss)| *loss)
                    .map(|(id, _)| signal_row(*id, temperatures, draws))
                    .collect();
                rows.prop_map(move |rows| Signal {
                    prompt_id: prompt_id.clone(),
                    sample_index,
                    token_ids: token_ids.clone(),
                    loss_mask: loss_mask.clone(),
                    rows: rows.into_iter().collect(),
                    provenance,
                })
            },
        )
}

pub(super) fn selected() -> impl Strategy<Value = Selected> {
    (any::<[u32; 3]>(), text()).prop_map(|([shard, row, sample_index], prompt_id)| Selected {
        shard,
        row,
        prompt_id,
        sample_index,
    })
}

pub(super) fn dropped() -> impl Strategy<Value = Dropped> {
    (text(), any::<u32>(), text()).prop_map(|(prompt_id, sample_index, reason)| Dropped {
        prompt_id,
        sample_index,
        reason,
    })
}

pub(super) fn sequence_values() -> impl Strategy<Value = SequenceValues> {
    (
        text(),
        any::<[u32; 2]>(),
        [0.0..1e4_f64, 0.0..1e4, -1e-300..1e300, 0.0..1e4],
        vec([0.0..1.0_f32, 0.0..1.0], 0..9),
    )
        .prop_map(|(prompt_id, counts, sums, probabilities)| {
            let [sample_index, agree] = counts;
            let [kl_nats, nll_nats, teacher_nll_nats, teacher_entropy_nats] = sums;
            SequenceValues {
                prompt_id,
                sample_index,
                tokens: probabilities.len() as u32,
                kl_nats,
                nll_nats,
                agree,
                teacher_nll_nats,
                teacher_entropy_nats,
                confidence: probabilities.iter().map(|[q, _]| *q).collect(),
                expected: probabilities.iter().map(|[_, p]| *p).collect(),
            }
        })
}

pub(super) fn verdict() -> impl Strategy<Value = Verdict> {
    (
        text(),
        any::<u32>(),
        text(),
        any::<bool>(),
        option::of(text()),
    )
        .prop_map(
            |(prompt_id, sample_index, grader, correct, extracted)| Verdict {
                prompt_id,
                sample_index,
                grader,
                correct,
                extracted,
            },
        )
}

pub(super) fn task_sample() -> impl Strategy<Value = TaskSample> {
    (
        text(),
        option::of(text()),
        text(),
        option::of(text()),
        any::<[bool; 2]>(),
        any::<u32>(),
    )
        .prop_map(
            |(prompt_id, reasoning, answer, extracted, [correct, finished], tokens)| TaskSample {
                prompt_id,
                reasoning,
                answer,
                extracted,
                correct,
                finished,
                tokens,
            },
        )
}

pub(super) fn own_text() -> impl Strategy<Value = OwnText> {
    (text(), any::<[u32; 2]>(), 0.0..1e4_f64).prop_map(
        |(prompt_id, [sample_index, tokens], reverse_kl_nats)| OwnText {
            prompt_id,
            sample_index,
            tokens,
            reverse_kl_nats,
        },
    )
}

/// Creates signals with `positions` positions and a support of `support`, which differ in `sample_index`.
pub(super) fn signals(count: u32, positions: usize, support: u32) -> Vec<Signal> {
    let row = |seed: u32| SignalRow {
        ids: (0..support).map(|k| k * 7 + seed % 7).collect(),
        logprobs: (0..support)
            .map(|k| -0.01 * (seed % 5) as f32 - (support as f32).ln() - k as f32)
            .collect(),
        tail_logprob: -20.0,
        entropy: seed as f32,
        log_z_at: vec![Some(0.5)],
        draw_ids: Vec::new(),
        draw_counts: Vec::new(),
    };
    let signal = |index: u32| Signal {
        prompt_id: format!("{:032x}", index / 2),
        sample_index: index,
        token_ids: (0..=positions as u32).map(|t| (index + t) % 7).collect(),
        loss_mask: (0..=positions).map(|t| t > 0).collect(),
        rows: (1..=positions as u32).map(|t| row(index + t)).collect(),
        provenance: index % 2,
    };
    (0..count).map(signal).collect()
}
