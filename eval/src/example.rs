//! An invented run for tests, with plausible figures from a fixed seed.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use potstill_datasets::{Arm, OwnText, RunModel, SequenceValues, Split};

use crate::cost::{CostFacts, TrainingCost};
use crate::{
    Evidence, Graded, Grader, LossCurve, LossPoint, Measurements, ModelFacts, ModelMeasurements,
    Provenance, Report, Sample, SampleAnswer, SamplingCheck, SamplingLaw, SeedMeasurements,
    SimilarPrompts, SplitFacts, SplitSize, StageFacts, StudentResult, TestText, TunedRate,
    conclude,
};

const SEED: u64 = 17;
const GROUPS: [&str; 3] = ["addition", "subtraction", "multiplication"];
/// KL, share of right answers, overconfidence and number of seeds of each model.
const MODELS: [(RunModel, f64, f64, f64, u64); 6] = [
    (RunModel::Base, 6.1, 0.0, 0.02, 1),
    (RunModel::Unigram, 2.9, 0.0, 0.05, 1),
    (RunModel::STUDENT, 0.062, 0.72, 0.01, 3),
    (RunModel::SFT, 0.094, 0.66, 0.06, 3),
    (RunModel::SAME_TOKEN, 0.142, 0.55, 0.04, 3),
    (RunModel::SMOOTHING, 0.088, 0.67, 0.05, 3),
];

fn values(kl: f64, prompts: usize) -> Vec<SequenceValues> {
    let one = |i: usize| SequenceValues {
        prompt_id: format!("p{i}"),
        sample_index: 0,
        tokens: 10 + i as u32 % 7,
        kl_nats: kl * (10 + i % 7) as f64 * (1.0 + 0.15 * ((i % 5) as f64 - 2.0)),
        nll_nats: (kl + 0.31) * (10 + i % 7) as f64,
        agree: ((10 + i % 7) as f64 * (1.0 - kl.min(6.0) / 6.5)) as u32,
        teacher_nll_nats: (0.3 + 0.002 * (i % 9) as f64) * (10 + i % 7) as f64,
        teacher_entropy_nats: (0.3 + 0.002 * (i % 9) as f64) * (10 + i % 7) as f64,
        confidence: Vec::new(),
        expected: Vec::new(),
    };
    (0..prompts).map(one).collect()
}

/// Values of a model with this KL on average, which differ a little between models and seeds.
fn varied(kl: f64, prompts: usize, model: usize, seed: usize) -> Vec<SequenceValues> {
    let wave = |i: usize, period: usize| (i % period) as f64 / (period - 1) as f64 - 0.5;
    let mut sequences = values(kl, prompts);
    for (i, sequence) in sequences.iter_mut().enumerate() {
        let noise = 0.08 * wave(7 * i + 11 * seed + 5 * model, 13);
        let change = kl * (0.02 * wave(7 * seed + 3 * model, 5) + noise);
        sequence.kl_nats += change * f64::from(sequence.tokens);
        sequence.nll_nats += change * f64::from(sequence.tokens);
    }
    sequences
}

/// Measurements of models with these KLs, the trained ones with this number of seeds.
pub(crate) fn measurements(kls: &[(RunModel, f64)], prompts: usize, seeds: usize) -> Measurements {
    let one = |(at, (model, kl)): (usize, &(RunModel, f64))| {
        let seeds = match model {
            RunModel::Trained(_) => seeds,
            _ => 1,
        };
        let seed = |seed: usize| SeedMeasurements {
            seed: seed as u64,
            values: varied(*kl, prompts, at, seed),
            graded: None,
            own_text: None,
        };
        ModelMeasurements {
            model: *model,
            seeds: (0..seeds).map(seed).collect(),
        }
    };
    Measurements {
        models: kls.iter().enumerate().map(one).collect(),
        has_distributions: true,
        resamples: 400,
        seed: SEED,
    }
}

/// Results of all models, without facts that are not measured.
pub(crate) fn results(measurements: &Measurements) -> Vec<StudentResult> {
    let one = |model| {
        let facts = ModelFacts {
            learned_from: "a|b".to_owned(),
            parameters: None,
            steps: 40,
        };
        measurements.student_result(model, facts).unwrap()
    };
    measurements.models.iter().map(one).collect()
}

/// A run with three seeds, without answers, teacher, losses and samples.
pub(crate) fn students_only(kls: &[(RunModel, f64)], prompts: usize) -> Report {
    report_of(&measurements(kls, prompts, 3))
}

pub(crate) fn report_of(measurements: &Measurements) -> Report {
    let students = results(measurements);
    let comparisons = measurements.comparisons().unwrap();
    Report {
        run: "tiny".to_owned(),
        potstill: "0.1.0".to_owned(),
        conclusion: conclude(&Evidence::of(&students, &comparisons)),
        test: TestText::from_values(measurements.test_values()).unwrap(),
        grader: None,
        teacher: None,
        students,
        comparisons,
        sampling: None,
        splits: None,
        tuning: Vec::new(),
        means: Vec::new(),
        losses: Vec::new(),
        samples: Vec::new(),
        stages: vec![StageFacts {
            name: "collect".to_owned(),
            counts: vec![("asked".to_owned(), 48), ("kept".to_owned(), 40)],
            tokens: None,
            seconds: 12.345,
            bytes: 4096,
        }],
        seconds: 12.345,
        cost: None,
        provenance: vec![Provenance {
            what: "teacher".to_owned(),
            value: "stories260K".to_owned(),
        }],
        reproduce: vec!["potstill run tiny.toml".to_owned()],
    }
}

/// A complete run, similar to the quickstart.
pub(crate) fn report() -> Report {
    let prompts = 198;
    let mut report = students_only(&[(RunModel::STUDENT, 0.06)], prompts);
    report.run = "quickstart".to_owned();
    report.grader = Some(Grader::Number);
    report.cost = Some(CostFacts {
        training: TrainingCost {
            device_hours: 0.034_56,
            tokens: 412_800.0,
            usd_per_hour: Some(2.5),
        },
        device: "machine".to_owned(),
        tokens_per_second: 3512.0,
        predicted_bytes: Some(41_200_000),
        peak_bytes: Some(39_700_000),
    });
    let seed = |&(model, kl, right, over, _): &(RunModel, f64, f64, f64, u64), seed: u64| {
        SeedMeasurements {
            seed: SEED + seed,
            values: measured(kl, over, prompts, seed),
            graded: (model != RunModel::Unigram)
                .then(|| answers(right + 0.01 * seed as f64 * right, prompts)),
            own_text: (model != RunModel::Unigram).then(|| own_text(1.2 * kl, prompts, seed)),
        }
    };
    let models = MODELS.iter().map(|model| ModelMeasurements {
        model: model.0,
        seeds: (0..model.4).map(|index| seed(model, index)).collect(),
    });
    let measurements = Measurements {
        models: models.collect(),
        has_distributions: true,
        resamples: 400,
        seed: SEED,
    };
    let graded: Vec<(RunModel, Vec<Graded>)> = [(RunModel::Teacher, 0.985)]
        .into_iter()
        .chain(MODELS.iter().map(|(name, _, right, ..)| (*name, *right)))
        .filter(|(name, _)| *name != RunModel::Unigram)
        .map(|(name, right)| (name, answers(right, prompts)))
        .collect();
    let name = "examples/quickstart/teacher".to_owned();
    let teacher = graded.first().map(|(_, graded)| graded.as_slice());
    let teacher = measurements.teacher_result(name, Some(947_200), teacher);
    report.teacher = Some(teacher.unwrap());
    let learned = [
        "nothing",
        "the mean of the teacher's distributions",
        "the teacher's distributions",
        "text",
        "distributions of the same token",
        "text with label smoothing",
    ];
    let result = |(model, learned): (&ModelMeasurements, &str)| {
        let is_trained = matches!(model.model, RunModel::Trained(_));
        let facts = ModelFacts {
            learned_from: learned.to_owned(),
            parameters: Some(221_440),
            steps: if is_trained { 600 } else { 0 },
        };
        measurements.student_result(model, facts).unwrap()
    };
    report.students = measurements
        .models
        .iter()
        .zip(learned)
        .map(result)
        .collect();
    report.comparisons = measurements.comparisons().unwrap();
    report.tuning = tuning();
    report.sampling = Some(SamplingCheck {
        positions: 88_412,
        mean_nats: 0.0004,
        entropy_nats: 0.3057,
        z: 0.31,
        law: SamplingLaw::PLAIN,
        law_mean_nats: Some(0.0004),
        law_z: Some(0.31),
        floor_nats: None,
        cut_mass: None,
    });
    report.splits = Some(splits());
    report.conclusion = conclude(&Evidence {
        teacher: report.teacher.as_ref(),
        tuning: &report.tuning,
        sampling: report.sampling.as_ref(),
        ..Evidence::of(&report.students, &report.comparisons)
    });
    report.losses = MODELS[2..]
        .iter()
        .map(|(name, kl, ..)| curve(*name, *kl))
        .collect();
    report.samples = (0..30).map(|i| sample(i, &graded)).collect();
    report.stages = stages();
    report.seconds = report.stages.iter().map(|stage| stage.seconds).sum();
    report.provenance = provenance();
    report.reproduce = vec![
        "git clone https://example.org/potstill && cd potstill".to_owned(),
        "cargo run --release -- run examples/quickstart.toml".to_owned(),
    ];
    report
}

/// Generates values of a model that was trained with one seed. The seed and the prompt change the KL a little.
fn measured(kl: f64, over: f64, prompts: usize, seed: u64) -> Vec<SequenceValues> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + seed + (1000.0 * kl) as u64);
    let of_seed = 1.0 + 0.02 * (seed as f64 - 1.0);
    let mut sequences = values(kl, prompts);
    for sequence in &mut sequences {
        sequence.kl_nats *= of_seed * (0.9 + 0.2 * rng.random::<f64>());
        sequence.nll_nats = sequence.kl_nats + sequence.teacher_nll_nats;
        for _ in 0..sequence.tokens {
            let q = 0.15 + 0.85 * rng.random::<f64>().sqrt();
            let p = q - over + 0.1 * (rng.random::<f64>() - 0.5);
            sequence.confidence.push(q as f32);
            sequence.expected.push(p.clamp(0.0, 1.0) as f32);
        }
    }
    sequences
}

fn own_text(kl: f64, prompts: usize, seed: u64) -> Vec<OwnText> {
    let mut rng = ChaCha8Rng::seed_from_u64(2 * SEED + seed + (1000.0 * kl) as u64);
    let mut one = |i| {
        let tokens = rng.random_range(8..20);
        OwnText {
            prompt_id: format!("p{i}"),
            sample_index: 0,
            tokens,
            reverse_kl_nats: kl * f64::from(tokens) * (0.5 + rng.random::<f64>()),
        }
    };
    (0..prompts).map(&mut one).collect()
}

fn tuning() -> Vec<TunedRate> {
    let trial = |arm, learning_rate, dev, chosen| TunedRate {
        arm,
        learning_rate,
        dev,
        chosen,
    };
    vec![
        trial(Arm::Student, 0.00075, Some(0.0711), false),
        trial(Arm::Student, 0.0015, Some(0.0634), true),
        trial(Arm::Student, 0.003, Some(0.0802), false),
        trial(Arm::Sft, 0.00075, Some(0.0958), true),
        trial(Arm::Sft, 0.0015, Some(0.0991), false),
        trial(Arm::Sft, 0.003, Some(0.1247), false),
    ]
}

fn splits() -> SplitFacts {
    let size = |split, prompts, sequences| SplitSize {
        split,
        prompts,
        sequences,
    };
    let similar = |split, prompt: &str, train_prompt: &str| SimilarPrompts {
        split,
        prompt: prompt.to_owned(),
        train_prompt: train_prompt.to_owned(),
        similarity: 0.8342,
    };
    SplitFacts {
        sizes: vec![
            size(Split::Train, 1604, 6301),
            size(Split::Dev, 198, 792),
            size(Split::Test, 198, 792),
        ],
        near_duplicates: 2,
        near_duplicates_in_test: 1,
        similar: vec![
            similar(Split::Test, "What is 12 + 30?", "What's 12 + 30?"),
            similar(Split::Dev, "What is 7 - <b>2</b>?", "What is 7 - 2?"),
        ],
    }
}

/// Generates graded answers. Multiplication is harder, and a model with a larger share of right answers is right on all
/// prompts of a weaker model.
fn answers(right: f64, prompts: usize) -> Vec<Graded> {
    let one = |i: usize| {
        let difficulty = (i * 61 % 199) as f64 / 199.0 + if i % 3 == 2 { 0.12 } else { -0.06 };
        Graded {
            prompt_id: format!("p{i}"),
            group: Some(GROUPS[i % 3].to_owned()),
            correct: difficulty.clamp(0.0, 0.999) < right,
        }
    };
    (0..prompts).map(one).collect()
}

fn curve(name: RunModel, kl: f64) -> LossCurve {
    let mut rng = ChaCha8Rng::seed_from_u64(name.to_string().len() as u64);
    let point = |step: u64| {
        let noise = 0.8 + 0.4 * rng.random::<f64>();
        let forward_kl = (kl + 5.2 * (-(step as f64) / 45.0).exp()) * noise;
        let cross_entropy = forward_kl + 0.32;
        LossPoint {
            step,
            loss: if name == RunModel::SFT {
                cross_entropy
            } else {
                forward_kl
            },
            forward_kl,
            cross_entropy,
        }
    };
    LossCurve {
        name,
        points: (1..=600).map(point).collect(),
    }
}

fn sample(i: usize, graded: &[(RunModel, Vec<Graded>)]) -> Sample {
    let (a, b) = (100 + 37 * i % 900, 11 + 53 * i % 89);
    let (sign, result) = match i % 3 {
        0 => ("+", a + b),
        1 => ("-", a - b),
        _ => ("×", a * (b % 9 + 1)),
    };
    let b = if i % 3 == 2 { b % 9 + 1 } else { b };
    let answer = |(model, graded): &(RunModel, Vec<Graded>)| {
        let correct = graded[i].correct;
        let given = if correct { result } else { result + 10 };
        let text = match *model {
            RunModel::Base => "7 7 carry +++ 4 then <b>1</b> 1 1 & 9 9 9 9".to_owned(),
            _ => format!("{a} {sign} {b} = {given}\n#### {given}"),
        };
        SampleAnswer {
            model: *model,
            reasoning: (*model != RunModel::Base).then(|| {
                format!("Ones: {} {sign} {} is {}, carry 0.\nTens: {} and {}.\nSo {a} {sign} {b} makes {given}.", a % 10, b % 10, given % 10, a / 10 % 10, b / 10)
            }),
            answer: text,
            correct: Some(correct),
            finished: *model != RunModel::Base,
        }
    };
    Sample {
        prompt_id: format!("p{i}"),
        group: Some(GROUPS[i % 3].to_owned()),
        prompt: match i {
            4 => format!("What is {a} {sign} {b}? <script>alert(\"x\")</script> & 'more'"),
            _ => format!("What is {a} {sign} {b}?"),
        },
        reference: Some(result.to_string()),
        answers: graded.iter().map(answer).collect(),
    }
}

fn stages() -> Vec<StageFacts> {
    let stage = |name: &str, counts: &[(&str, u64)], tokens, seconds, bytes| StageFacts {
        name: name.to_owned(),
        counts: counts.iter().map(|(n, c)| ((*n).to_owned(), *c)).collect(),
        tokens,
        seconds,
        bytes,
    };
    vec![
        stage("import", &[("prompts", 2000)], None, 0.21, 91_204),
        stage(
            "collect",
            &[("answers", 2000)],
            Some(88_412),
            61.4,
            2_730_112,
        ),
        stage(
            "grade",
            &[("right", 1961), ("wrong", 39)],
            None,
            0.2,
            40_018,
        ),
        stage(
            "curate",
            &[("to train on", 6301), ("for dev", 792), ("for test", 792)],
            None,
            0.1,
            22_001,
        ),
        stage(
            "train student",
            &[("steps", 600)],
            Some(840_300),
            88.0,
            913_004,
        ),
        stage("train sft", &[("steps", 600)], Some(840_300), 86.1, 913_004),
        stage(
            "train same_token",
            &[("steps", 600)],
            Some(840_300),
            88.9,
            913_004,
        ),
        stage("eval", &[("sequences", 196)], Some(8_811), 21.5, 61_000),
    ]
}

fn provenance() -> Vec<Provenance> {
    [
        ("teacher", "examples/quickstart/teacher"),
        (
            "revision",
            "sha256 5f0c1a1f8c42b77a3d8e1bb84bb2d0d7fd6cf6b0a6b6c9b7e37b0a5f1f2b3c4d",
        ),
        ("engine", "potstill 0.1.0"),
        ("dtype", "f32"),
        ("sampling", "temperature 1, top-p 1, at most 96 tokens"),
        ("licence", "MIT OR Apache-2.0"),
        (
            "prompts",
            "sha256 0d1f5a9ee0cc7d0f8f4c2d3f62b5bb0a1f8c42b77a3d8e1bb84bb2d0d7fd6cf6",
        ),
    ]
    .map(|(what, value)| Provenance {
        what: what.to_owned(),
        value: value.to_owned(),
    })
    .to_vec()
}
