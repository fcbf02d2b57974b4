use potstill_datasets::{Signal, SignalRow};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::sampling::MAX_Z;

const VOCABULARY: usize = 60;
const TOP_K: usize = 8;

/// TeacherText that a teacher gives at the positions of a text, each over the whole vocabulary.
type TeacherText = Vec<Vec<f64>>;

fn law(temperature: f64, top_k: Option<usize>, top_p: f64, min_p: f64) -> SamplingLaw {
    SamplingLaw::Sampled {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty: 1.0,
    }
}

/// TeacherText of a teacher: some nearly certain, some flat, each with its own most likely tokens.
fn teacher(positions: usize, generator: &mut ChaCha8Rng) -> TeacherText {
    let one = |_| {
        let sharpness: f64 = generator.random_range(3.0..16.0);
        let logits = (0..VOCABULARY).map(|_| {
            let uniform: f64 = generator.random();
            sharpness * uniform.powi(6) + uniform
        });
        normalized(logits.map(f64::exp).collect())
    };
    (0..positions).map(one).collect()
}

fn normalized(weights: Vec<f64>) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// The law of the generator, over the whole vocabulary and by definition: temperature, top-k, nucleus, min-p.
fn drawn_with(p: &[f64], law: SamplingLaw) -> Vec<f64> {
    let SamplingLaw::Sampled {
        temperature,
        top_k,
        top_p,
        min_p,
        ..
    } = law
    else {
        return p.to_vec();
    };
    let q = normalized(p.iter().map(|p| p.powf(1.0 / temperature)).collect());
    let mut order: Vec<usize> = (0..q.len()).collect();
    order.sort_by(|a, b| q[*b].total_cmp(&q[*a]));
    order.truncate(top_k.unwrap_or(q.len()));
    let sum: f64 = order.iter().map(|id| q[*id]).sum();
    let mut reached = 0.0;
    let end = order.iter().position(|id| {
        reached += q[*id];
        reached >= top_p * sum
    });
    order.truncate(end.map_or(order.len(), |end| end + 1));
    let most = q[order[0]];
    order.retain(|id| q[*id] >= min_p * most);
    let mut drawn = vec![0.0; q.len()];
    for id in order {
        drawn[id] = q[id];
    }
    normalized(drawn)
}

fn draw(p: &[f64], generator: &mut ChaCha8Rng) -> u32 {
    let (uniform, mut reached): (f64, f64) = (generator.random(), 0.0);
    let place = p.iter().position(|p| {
        reached += p;
        reached > uniform
    });
    place.unwrap_or(p.len() - 1) as u32
}

/// The row that is stored: the `TOP_K` most likely tokens and the target token.
fn row(p: &[f64], target: u32, temperature: Option<f64>) -> SignalRow {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]).then(a.cmp(b)));
    let mut rank = 0;
    order.retain(|id| {
        rank += 1;
        rank <= TOP_K || *id == target as usize
    });
    let support: f64 = order.iter().map(|id| p[*id]).sum();
    let log_z = |t: f64| p.iter().map(|p| p.powf(1.0 / t)).sum::<f64>().ln() as f32;
    SignalRow {
        ids: order.iter().map(|id| *id as u32).collect(),
        logprobs: order.iter().map(|id| p[*id].ln() as f32).collect(),
        tail_logprob: (1.0 - support).ln() as f32,
        entropy: 0.0,
        log_z_at: temperature.into_iter().map(|t| Some(log_z(t))).collect(),
        draw_ids: Vec::new(),
        draw_counts: Vec::new(),
    }
}

fn signal(stored: &TeacherText, text: &[u32], temperature: Option<f64>) -> Signal {
    let rows = stored.iter().zip(text);
    Signal {
        prompt_id: "p".into(),
        sample_index: 0,
        token_ids: std::iter::once(0).chain(text.iter().copied()).collect(),
        loss_mask: (0..=text.len()).map(|at| at > 0).collect(),
        rows: rows.map(|(p, id)| row(p, *id, temperature)).collect(),
        provenance: 0,
    }
}

fn checked(law: SamplingLaw, signal: &Signal, temperature: Option<f64>) -> SamplingCheck {
    signal.validate().unwrap();
    let mut tally = SamplingTally::new(law, TOP_K);
    let temperatures: Vec<f32> = temperature.map(|t| t as f32).into_iter().collect();
    tally.add(signal, &temperatures);
    tally.check().unwrap()
}

fn text(drawn: impl Fn(&[f64]) -> Vec<f64>, p: &TeacherText, g: &mut ChaCha8Rng) -> Vec<u32> {
    p.iter().map(|p| draw(&drawn(p), g)).collect()
}

/// Mean and variance of z over texts that are drawn by a law.
fn spread(law: SamplingLaw, temperature: Option<f64>) -> (f64, f64) {
    let mut generator = ChaCha8Rng::seed_from_u64(7);
    let runs = 400;
    let z: Vec<f64> = (0..runs)
        .map(|_| {
            let p = teacher(300, &mut generator);
            let text = text(|p| drawn_with(p, law), &p, &mut generator);
            let check = checked(law, &signal(&p, &text, temperature), temperature);
            check.law_z.unwrap()
        })
        .collect();
    let mean = z.iter().sum::<f64>() / runs as f64;
    let variance = z.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / (runs - 1) as f64;
    (mean, variance)
}

/// z has mean 0 and variance 1 for text that is drawn as the law says: 4 standard errors of 400 runs.
#[test]
fn z_of_sampled_text_is_standard() {
    let laws = [
        (law(1.0, None, 1.0, 0.0), None),
        (law(0.7, None, 1.0, 0.0), None),
        (law(0.7, None, 1.0, 0.0), Some(0.7)),
        (law(1.4, None, 1.0, 0.0), None),
        (law(1.0, None, 0.8, 0.0), None),
        (law(0.7, None, 0.8, 0.0), None),
        (law(0.7, None, 0.95, 0.0), Some(0.7)),
        (law(1.0, Some(5), 1.0, 0.0), None),
        (law(0.8, Some(20), 0.9, 0.0), None),
        (law(0.8, None, 1.0, 0.1), None),
    ];
    for (law, temperature) in laws {
        let (mean, variance) = spread(law, temperature);
        assert!(mean.abs() < 0.2, "{law:?}: mean of z is {mean}");
        assert!(
            (variance - 1.0).abs() < 0.29,
            "{law:?}: variance of z is {variance}"
        );
    }
}

/// A support that contains the drawn token is not a partition that was fixed before the draw.
#[test]
fn the_target_token_outside_the_top_k_counts_as_one_of_the_others() {
    let p = [0.5, 0.3, 0.1, 0.1];
    let stored = SignalRow {
        ids: vec![0, 1, 3],
        logprobs: [0.5_f32, 0.3, 0.1].map(f32::ln).to_vec(),
        tail_logprob: 0.1_f32.ln(),
        ..row(&p, 3, None)
    };
    let mut tokens = Vec::new();
    let buckets = Buckets::new(stored.view(), Some(3), 2, &mut tokens);
    assert_eq!((buckets.tokens.len(), buckets.target), (2, None));
    assert!((buckets.rest - 0.2).abs() < 1e-7);
    assert!((buckets.surprisal(None) + 0.2_f64.ln()).abs() < 1e-6);
}

#[test]
fn floor_and_cut_mass_are_those_of_the_definition() {
    let mut generator = ChaCha8Rng::seed_from_u64(3);
    let p = teacher(500, &mut generator);
    let law = law(0.7, None, 0.8, 0.0);
    let text = text(|p| p.to_vec(), &p, &mut generator);
    let tempered = |p: &Vec<f64>| normalized(p.iter().map(|p| p.powf(1.0 / 0.7)).collect());
    // KL over the buckets of the k most likely tokens and all others.
    let divergence = |p: &Vec<f64>| {
        let q = tempered(p);
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
        let bucket = |q: &[f64]| {
            let mut of: Vec<f64> = order.iter().take(TOP_K).map(|id| q[*id]).collect();
            of.push(1.0 - of.iter().sum::<f64>());
            of
        };
        let pairs = bucket(p).into_iter().zip(bucket(&q));
        pairs.map(|(p, q)| p * (p / q).ln()).sum::<f64>()
    };
    let cut = |p: &Vec<f64>| {
        let drawn = drawn_with(p, law);
        let cut = p.iter().zip(&drawn).filter(|(_, q)| **q == 0.0);
        cut.map(|(p, _)| p).sum::<f64>()
    };
    let mean = |of: &dyn Fn(&Vec<f64>) -> f64| p.iter().map(of).sum::<f64>() / p.len() as f64;
    let (floor, cut) = (mean(&divergence), mean(&cut));
    let exact = checked(law, &signal(&p, &text, Some(0.7)), Some(0.7));
    let found = exact.floor_nats.unwrap();
    assert!((found - floor).abs() < 1e-5, "{found} is not {floor}");
    // Without log_z_at both are bounded from below, and the bound is close.
    let bound = checked(law, &signal(&p, &text, None), None);
    let found = bound.floor_nats.unwrap();
    assert!(found < floor && found > 0.5 * floor, "{found} of {floor}");
    for check in [exact, bound] {
        let found = check.cut_mass.unwrap();
        assert!(found < cut + 0.01 && found > 0.5 * cut, "{found} of {cut}");
    }
}

/// Faults that are planted in the signals or in the text of 5,000 positions, each of which has to be found.
#[test]
fn planted_faults_are_found() {
    let mut generator = ChaCha8Rng::seed_from_u64(11);
    let p = teacher(5000, &mut generator);
    let plain = SamplingLaw::PLAIN;
    let sampled = text(|p| p.to_vec(), &p, &mut generator);
    let tempered = |t: f64, p: &TeacherText| -> TeacherText {
        p.iter()
            .map(|p| drawn_with(p, law(t, None, 1.0, 0.0)))
            .collect()
    };
    let mut shifted = p.clone();
    shifted.rotate_right(1);
    let mut stale = p.clone();
    stale.shuffle(&mut generator);
    let noisy = |p: &Vec<f64>, g: &mut ChaCha8Rng| {
        let noise = p.iter().map(|p| p * (2.5 * g.random::<f64>()).exp());
        normalized(noise.collect())
    };
    let other: TeacherText = p.iter().map(|p| noisy(p, &mut generator)).collect();
    let cold = text(
        |p| drawn_with(p, law(0.7, None, 1.0, 0.0)),
        &p,
        &mut generator,
    );
    let nucleus = text(
        |p| drawn_with(p, law(1.0, None, 0.95, 0.0)),
        &p,
        &mut generator,
    );
    let cold_law = law(0.7, None, 0.9, 0.0);
    let cold_nucleus = text(|p| drawn_with(p, cold_law), &p, &mut generator);
    let cases = [
        ("nothing", plain, &p, &sampled, None),
        (
            "shift by one",
            plain,
            &shifted,
            &sampled,
            Some("shift by one"),
        ),
        ("stale cache", plain, &stale, &sampled, Some("stale cache")),
        (
            "another model",
            plain,
            &other,
            &sampled,
            Some("another model"),
        ),
        (
            "tempered signals",
            plain,
            &tempered(0.7, &p),
            &sampled,
            Some("another model"),
        ),
        (
            "flattened signals",
            plain,
            &tempered(1.4, &p),
            &sampled,
            Some("lower temperature"),
        ),
        ("text at 0.7", plain, &p, &cold, Some("lower temperature")),
        ("a nucleus", plain, &p, &nucleus, Some("nucleus")),
        ("nothing at 0.7", cold_law, &p, &cold_nucleus, None),
        (
            "shift at 0.7",
            cold_law,
            &shifted,
            &cold_nucleus,
            Some("shift by one"),
        ),
        ("ignored settings", cold_law, &p, &sampled, Some("ignores")),
        (
            "another model at 0.7",
            cold_law,
            &other,
            &cold_nucleus,
            Some("another"),
        ),
    ];
    for (name, law, stored, text, cause) in cases {
        let check = checked(law, &signal(stored, text, None), None);
        let fault = check.fault();
        match (fault, cause) {
            (None, None) => assert!(check.law_z.unwrap().abs() < MAX_Z),
            (Some(fault), Some(cause)) => assert!(fault.contains(cause), "{name}: {fault}"),
            (fault, _) => panic!("{name}: {fault:?}"),
        }
    }
    // Given text has no law, so it has no fault, whatever z is.
    let given = checked(SamplingLaw::Given, &signal(&p, &cold, None), None);
    assert!(given.z < -MAX_Z && given.fault().is_none() && given.sft_bias().is_none());
}

/// A server that gives fewer tokens than `top_k`, and rows that are whole distributions.
#[test]
fn short_rows_are_not_biased() {
    let p = vec![vec![0.5, 0.3, 0.1, 0.1]];
    // 3 tokens of each position, and the target token besides.
    let with = |target: u32| signal(&p, &[target], None);
    assert_eq!(
        stored_tokens(&with(1), TOP_K),
        TOP_K,
        "the whole vocabulary"
    );
    let mut short = with(1);
    short.rows.change_rows(|_, row| {
        row.ids.truncate(3);
        row.logprobs.truncate(3);
        row.tail_logprob = 0.1_f32.ln();
    });
    assert_eq!(stored_tokens(&short, TOP_K), 2);
    assert_eq!(stored_tokens(&short, 3), 3);
    assert_eq!(stored_tokens(&short, 2), 2);
}

#[test]
fn measures_are_read_back() {
    let mut generator = ChaCha8Rng::seed_from_u64(3);
    let p = teacher(50, &mut generator);
    let text = text(|p| p.to_vec(), &p, &mut generator);
    for law in [
        SamplingLaw::PLAIN,
        SamplingLaw::Given,
        law(0.7, None, 0.9, 0.0),
    ] {
        let check = checked(law, &signal(&p, &text, None), None);
        let read = SamplingCheck::from_measures(&check.to_measures(), law);
        assert_eq!(read, Some(check));
    }
    assert_eq!(SamplingTally::new(SamplingLaw::PLAIN, TOP_K).check(), None);
}
