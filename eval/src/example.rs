//! An invented run for tests, with plausible figures from a fixed seed.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use potstill_datasets::{RunModel, SequenceValues};

use crate::{
    Evidence, Graded, Grader, Heldout, LossCurve, LossPoint, Measurements, ModelFacts,
    ModelMeasurements, Provenance, Report, Sample, SampleAnswer, SeedMeasurements, StageFacts,
    StudentResult, conclude,
};

const SEED: u64 = 17;
const GROUPS: [&str; 3] = ["addition", "subtraction", "multiplication"];
/// Name, KL, share of right answers, and overconfidence of each model.
const MODELS: [(RunModel, f64, f64, f64); 4] = [
    (RunModel::Base, 6.1, 0.0, 0.02),
    (RunModel::STUDENT, 0.062, 0.72, 0.01),
    (RunModel::SFT, 0.094, 0.66, 0.06),
    (RunModel::SHUFFLED, 0.91, 0.18, 0.17),
];

/// Values of a model with this KL. Prompts have the same difficulty for all models; models and seeds differ a little.
fn values(kl: f64, prompts: usize, model: usize, seed: usize) -> Vec<SequenceValues> {
    let wave = |i: usize, period: usize| (i % period) as f64 / (period - 1) as f64 - 0.5;
    let of_seed = 0.02 * wave(7 * seed + 3 * model, 5);
    let one = |i: usize| {
        let tokens = 10 + i % 7;
        let noise = 0.08 * wave(7 * i + 11 * seed + 5 * model, 13);
        let kl = kl * (1.0 + 0.6 * wave(i, 5) + of_seed + noise);
        let teacher = (0.3 + 0.002 * (i % 9) as f64) * tokens as f64;
        SequenceValues {
            prompt_id: format!("p{i}"),
            sample_index: 0,
            tokens: tokens as u32,
            kl_nats: kl * tokens as f64,
            nll_nats: (kl + 0.31) * tokens as f64,
            agree: (tokens as f64 * (1.0 - kl.min(6.0) / 6.5)) as u32,
            teacher_nll_nats: teacher,
            teacher_entropy_nats: teacher,
            confidence: Vec::new(),
            expected: Vec::new(),
        }
    };
    (0..prompts).map(one).collect()
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
            values: values(*kl, prompts, at, seed),
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
        heldout: Heldout::from_values(measurements.heldout()).unwrap(),
        grader: None,
        teacher: None,
        students,
        comparisons,
        sampling: None,
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
        provenance: vec![Provenance {
            what: "teacher".to_owned(),
            value: "stories260K".to_owned(),
        }],
        reproduce: vec!["potstill run tiny.toml".to_owned()],
    }
}

/// A complete run with three seeds, similar to the quickstart.
pub(crate) fn report() -> Report {
    let prompts = 198;
    let kls: Vec<(RunModel, f64)> = MODELS.iter().map(|(name, kl, ..)| (*name, *kl)).collect();
    let mut measured = measurements(&kls, prompts, 3);
    for (model, (_, _, right, over)) in measured.models.iter_mut().zip(MODELS) {
        for seed in &mut model.seeds {
            seed.graded = Some(answers(right + 0.01 * seed.seed as f64, prompts));
            add_probabilities(&mut seed.values, over);
        }
    }
    let mut report = report_of(&measured);
    report.run = "quickstart".to_owned();
    report.grader = Some(Grader::Number);
    let graded: Vec<(RunModel, Vec<Graded>)> = [(RunModel::Teacher, 0.985)]
        .into_iter()
        .chain(MODELS.iter().map(|(name, _, right, _)| (*name, *right)))
        .map(|(name, right)| (name, answers(right, prompts)))
        .collect();
    let teacher = measured.teacher_result(
        "examples/quickstart/teacher".to_owned(),
        Some(947_200),
        Some(&graded[0].1),
    );
    report.teacher = Some(teacher.unwrap());
    let learned = [
        "nothing",
        "the teacher's distributions",
        "text",
        "shuffled distributions",
    ];
    for (at, student) in report.students.iter_mut().enumerate() {
        student.learned_from = learned[at].to_owned();
        student.parameters = Some(221_440);
        student.steps = if at == 0 { 0 } else { 600 };
    }
    report.conclusion = conclude(&Evidence {
        teacher: report.teacher.as_ref(),
        ..Evidence::of(&report.students, &report.comparisons)
    });
    report.losses = MODELS[1..]
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

/// Adds probabilities by which the model is overconfident by `over` on average.
fn add_probabilities(sequences: &mut [SequenceValues], over: f64) {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for sequence in sequences {
        for _ in 0..sequence.tokens {
            let q = 0.15 + 0.85 * rng.random::<f64>().sqrt();
            let p = q - over + 0.1 * (rng.random::<f64>() - 0.5);
            sequence.confidence.push(q as f32);
            sequence.expected.push(p.clamp(0.0, 1.0) as f32);
        }
    }
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
            &[("to train on", 1765), ("held out", 196)],
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
            "train shuffled",
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
