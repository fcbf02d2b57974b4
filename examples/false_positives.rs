//! Measures by simulation how often a whole report is wrong: how often it claims an effect of distillation where there
//! is none, how often its intervals contain the true difference, and how often it finds a difference of the size that
//! it prints as detectable.
//!
//! cargo run --release --example false_positives -- [REPLICATIONS] [SEED] [SEED_EFFECT] [SHAPE] [PROMPTS]
//!
//! Each replication draws the measurements of a student, an SFT control, a `same_token` control and a base, and goes the
//! way of a report: `Measurements`, comparisons, conclusion. A value is mean + prompt effect + seed effect + residual,
//! and prompts differ in their number of tokens. Effects are correlated between models. With fewer than 3 seeds a report
//! speaks about its models, so their own true difference is zero then, whatever their seeds.

// The lint keeps libraries from printing; an example program prints its results.
#![allow(clippy::print_stdout)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use potstill::datasets::RunModel;
use potstill::eval::{
    Evidence, Figure, Finding, LEVEL, MIN_SEEDS, Measurements, ModelFacts, ModelMeasurements,
    SeedMeasurements, SequenceValues, conclude,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Mean KL of all trained models, nats per token.
const MEAN: f64 = 0.1;
/// Standard deviations of the prompt effect and of the residual, as shares of the mean.
const PROMPT_EFFECT: f64 = 0.4;
const RESIDUAL: f64 = 0.1;
/// Trained models: the student comes first.
const TRAINED: [RunModel; 3] = [RunModel::STUDENT, RunModel::SFT, RunModel::SAME_TOKEN];

/// Distribution of the prompt effects.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Shape {
    Normal,
    /// Lognormal for each model, so that the difference of two models is symmetric.
    Skewed,
    /// Lognormal for the student and normal for the others, so that the difference is skewed to one side.
    OneSided,
}

/// Conditions of a simulation.
#[derive(Debug, Clone, Copy)]
struct Conditions {
    shape: Shape,
    prompts: usize,
    seeds: usize,
    correlation: f64,
    /// Standard deviation of the seed effect, as a share of the mean.
    seed_effect: f64,
}

/// Shares of replications, and means over them.
#[derive(Debug, Clone, Copy, Default)]
struct Rates {
    /// Reports that say that distillation helps or hurts.
    about_method: f64,
    /// Reports that say that the student is closer or further than the SFT control.
    about_models: f64,
    /// Primary comparisons with p ≤ 0.05, whether or not the report may claim something from them.
    significant: f64,
    /// Reports with a verdict on at least one of the other comparisons that have no effect.
    any_other: f64,
    /// Intervals of the primary comparison that contain the true difference.
    covered: f64,
    /// Mean of the detectable difference that the report prints.
    detectable: f64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let replications = args.next().map_or(Ok(2000), |text| text.parse::<usize>())?;
    let seed = args.next().map_or(Ok(1), |text| text.parse::<u64>())?;
    let seed_effect = args.next().map_or(Ok(0.05), |text| text.parse::<f64>())?;
    // Only the rows of this shape (`Normal`, `Skewed`, `OneSided`) and this number of prompts, if they are given.
    let only_shape = args.next();
    let only_prompts = args.next().map(|text| text.parse::<usize>()).transpose()?;
    let mut cells = Vec::new();
    for shape in [Shape::Normal, Shape::Skewed, Shape::OneSided] {
        for prompts in [6, 15, 40, 400] {
            for seeds in [1, 3, 5] {
                for correlation in [0.0, 0.6, 0.95] {
                    cells.push(Conditions {
                        shape,
                        prompts,
                        seeds,
                        correlation,
                        seed_effect,
                    });
                }
            }
        }
    }
    let cells: Vec<(usize, Conditions)> = (cells.into_iter().enumerate())
        .filter(|(_, cell)| {
            only_shape
                .as_ref()
                .is_none_or(|only| format!("{:?}", cell.shape) == *only)
        })
        .filter(|(_, cell)| only_prompts.is_none_or(|only| cell.prompts == only))
        .collect();
    println!(
        "{replications} replications for each row, seed effect {seed_effect}; all rates in %\n\n\
         | prompt effects | prompts | seeds | correlation | helps or hurts | closer or further | p ≤ 0.05 | any other | coverage | power |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    );
    let rows: Mutex<Vec<Option<String>>> = Mutex::new(vec![None; cells.len()]);
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || -> Result<(), String> {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((index, cell)) = cells.get(at) else {
                return Ok(());
            };
            // Each row has random numbers of its own, so that their errors are independent.
            let row_seed = seed.wrapping_mul(1000) + 2 * *index as u64;
            let row = row(*cell, replications, row_seed).map_err(|error| error.to_string())?;
            // Rows are printed in order, each as soon as those before it are there.
            let mut rows = rows.lock().unwrap_or_else(PoisonError::into_inner);
            rows[at] = Some(row);
            let printed = rows.iter_mut().take_while(|row| row.is_some());
            for row in printed {
                let text = row.replace(String::new()).unwrap_or_default();
                if !text.is_empty() {
                    println!("{text}");
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            let end = worker.join();
            end.unwrap_or_else(|_| Err("a worker failed".to_owned()))
        })
    })?;
    Ok(())
}

fn row(cell: Conditions, replications: usize, seed: u64) -> Result<String, potstill::eval::Error> {
    let null = simulate(cell, 0.0, replications, seed)?;
    let effect = simulate(cell, null.detectable, replications, seed + 1)?;
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    Ok(format!(
        "| {:?} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
        cell.shape,
        cell.prompts,
        cell.seeds,
        cell.correlation,
        percent(null.about_method),
        percent(null.about_models),
        percent(null.significant),
        percent(null.any_other),
        percent(null.covered),
        percent(effect.significant),
    ))
}

/// Draws `replications` runs in which the student's KL is larger by `difference` than those of the trained controls, and
/// concludes from each.
fn simulate(
    cell: Conditions,
    difference: f64,
    replications: usize,
    seed: u64,
) -> Result<Rates, potstill::eval::Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut run = empty_run(cell);
    let mut rates = Rates::default();
    for _ in 0..replications {
        draw(&mut run, cell, difference, &mut rng);
        let mut students = Vec::new();
        for model in &run.models {
            let facts = ModelFacts {
                learned_from: String::new(),
                parameters: None,
                steps: 0,
            };
            students.push(run.student_result(model, facts)?);
        }
        let comparisons = run.comparisons()?;
        let finding = conclude(&Evidence::of(&students, &comparisons)).finding;
        let count = |holds: bool| f64::from(u8::from(holds)) / replications as f64;
        rates.about_method += count(matches!(finding, Finding::Helps | Finding::Hurts));
        let about_models = [Finding::StudentCloser, Finding::StudentFurther];
        rates.about_models += count(about_models.contains(&finding));
        let is_null = |c: &&potstill::eval::Comparison| !c.primary && c.right != RunModel::Base;
        let mut others = comparisons.iter().filter(is_null);
        rates.any_other += count(others.any(|c| c.adjusted_p <= LEVEL));
        for primary in comparisons.iter().filter(|c| c.primary) {
            debug_assert_eq!(primary.metric, Figure::Kl);
            rates.significant += count(primary.p_value <= LEVEL);
            let interval = primary.difference;
            rates.covered += count(interval.low <= difference && difference <= interval.high);
            rates.detectable += primary.detectable.unwrap_or_default() / replications as f64;
        }
    }
    Ok(rates)
}

/// Measurements with the right number of models, seeds and prompts, whose values are drawn later.
fn empty_run(cell: Conditions) -> Measurements {
    let value = |i: usize| SequenceValues {
        prompt_id: format!("p{i}"),
        sample_index: 0,
        tokens: 0,
        kl_nats: 0.0,
        nll_nats: 0.0,
        agree: 0,
        teacher_nll_nats: 0.0,
        teacher_entropy_nats: 0.0,
        confidence: Vec::new(),
        expected: Vec::new(),
    };
    let seed = |seed: usize| SeedMeasurements {
        seed: seed as u64,
        values: (0..cell.prompts).map(value).collect(),
        graded: None,
        own_text: None,
    };
    let model = |model: RunModel| ModelMeasurements {
        model,
        seeds: match model {
            RunModel::Base => vec![seed(0)],
            _ => (0..cell.seeds).map(seed).collect(),
        },
    };
    let models = TRAINED.into_iter().chain([RunModel::Base]);
    Measurements {
        models: models.map(model).collect(),
        has_distributions: true,
        resamples: 1,
        seed: 1,
    }
}

fn draw(run: &mut Measurements, cell: Conditions, difference: f64, rng: &mut ChaCha8Rng) {
    let tokens: Vec<u32> = (0..cell.prompts)
        .map(|_| rng.random_range(10..60))
        .collect();
    let common: Vec<f64> = (0..cell.prompts).map(|_| normal(rng)).collect();
    let common_seeds: Vec<f64> = (0..cell.seeds).map(|_| normal(rng)).collect();
    // With few seeds the report is about the models, whose own difference is then the true one.
    let seed_correlation = match cell.seeds < MIN_SEEDS {
        true => 1.0,
        false => cell.correlation,
    };
    let mix = |common: f64, own: f64, correlation: f64| {
        correlation.sqrt() * common + (1.0 - correlation).sqrt() * own
    };
    for model in &mut run.models {
        let is_student = model.model == RunModel::STUDENT;
        let mean = match model.model {
            RunModel::Base => 40.0 * MEAN,
            _ if is_student => MEAN + difference,
            _ => MEAN,
        };
        let prompts: Vec<f64> = common
            .iter()
            .map(|common| {
                let effect = mix(*common, normal(rng), cell.correlation);
                match cell.shape {
                    Shape::Skewed => lognormal(effect),
                    Shape::OneSided if is_student => lognormal(effect),
                    _ => effect,
                }
            })
            .collect();
        for (seed, common) in model.seeds.iter_mut().zip(&common_seeds) {
            let of_seed = cell.seed_effect * mix(*common, normal(rng), seed_correlation);
            for (i, value) in seed.values.iter_mut().enumerate() {
                let weight = f64::from(tokens[i]);
                let residual = RESIDUAL * normal(rng);
                let kl = mean + MEAN * (PROMPT_EFFECT * prompts[i] + of_seed + residual);
                value.tokens = tokens[i];
                value.kl_nats = weight * kl;
                // A sample of the text adds noise to the NLL, and half of all tokens agree at random.
                value.nll_nats = weight * (kl + 0.3) + 0.3 * weight.sqrt() * normal(rng);
                let agree = 0.5 * weight + 0.5 * weight.sqrt() * normal(rng);
                value.agree = agree.clamp(0.0, weight).round() as u32;
            }
        }
    }
}

/// Draws from the normal distribution (Box and Muller).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

/// Turns a normal effect into a lognormal one with mean 0, variance 1 and skewness 1.75 (σ = 0.5).
fn lognormal(effect: f64) -> f64 {
    const SIGMA: f64 = 0.5;
    let square = SIGMA * SIGMA;
    let deviation = (square.exp() * (square.exp() - 1.0)).sqrt();
    ((SIGMA * effect).exp() - (square / 2.0).exp()) / deviation
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPLICATIONS: usize = 400;

    /// Bounds that a rate of 5 % leaves once in 10,000 runs: 20 ± 3.9 · √19 of 400.
    const HIGHEST: f64 = 37.0 / 400.0;
    const LOWEST: f64 = 3.0 / 400.0;

    fn rates(prompts: usize, seeds: usize, shape: Shape, difference: f64) -> Rates {
        let cell = Conditions {
            shape,
            prompts,
            seeds,
            correlation: 0.6,
            seed_effect: 0.05,
        };
        simulate(cell, difference, REPLICATIONS, 7).unwrap()
    }

    #[test]
    fn claims_without_an_effect_are_rare_and_intervals_cover_the_truth() {
        for (prompts, seeds) in [(40, 1), (40, 3), (60, 5)] {
            for shape in [Shape::Normal, Shape::Skewed] {
                let found = rates(prompts, seeds, shape, 0.0);
                let (claims, none) = match seeds < MIN_SEEDS {
                    true => (found.about_models, found.about_method),
                    false => (found.about_method, found.about_models),
                };
                assert!(
                    (LOWEST..HIGHEST).contains(&claims),
                    "{prompts} {seeds}: {found:?}"
                );
                assert_eq!(none, 0.0, "{prompts} {seeds}: {found:?}");
                assert!(found.any_other < HIGHEST, "{prompts} {seeds}: {found:?}");
                assert!(
                    1.0 - found.covered < HIGHEST,
                    "{prompts} {seeds}: {found:?}"
                );
                let effect = rates(prompts, seeds, shape, found.detectable);
                assert!(
                    (0.68..0.92).contains(&effect.significant),
                    "{prompts} {seeds}: {effect:?}"
                );
            }
        }
    }

    #[test]
    fn few_prompts_are_never_a_claim() {
        for seeds in [1, 5] {
            let found = rates(15, seeds, Shape::Normal, 10.0 * MEAN);
            assert_eq!((found.about_method, found.about_models), (0.0, 0.0));
            assert!(found.significant > 0.999, "{found:?}");
        }
    }
}
