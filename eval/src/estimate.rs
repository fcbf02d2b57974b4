//! Estimates of figures and of differences, their variances, intervals and p-values.
//!
//! A figure is a ratio Σ value / Σ weight over prompts and training seeds: nats per token, or right answers per answer.
//! A difference is a ratio minus another over the same prompts. Two models of one seed have the same start and the same
//! order of the data, so seeds are paired as well.
//!
//! Both prompts and seeds are random, and crossed with each other. The variance between prompts and the variance between
//! seeds are those of the delete-one jackknife (Efron & Stein 1981; for seeds with equal weights it is the variance of
//! the paired t-test). Each contains the residual variance of single cells, which is therefore subtracted once:
//! v = v_prompts + v_seeds − v_cells, at least the larger of the two.
//!
//! The statistic mean / √v is compared with a mixture of two t distributions, with prompts − 1 and with seeds − 1 degrees
//! of freedom, weighted by their shares of the variance. Prompts with many tokens count more than others, so their number
//! is the effective one, (Σ weight)² / Σ weight² (Kish 1965, Survey Sampling, §11.7). Where one of the variances is negligible, this is the t-test over
//! the other. In between, Satterthwaite's degrees of freedom claim an effect in 8 % of runs without one (3 seeds,
//! v_seeds = 10 v_prompts) and adding the half-widths in quadrature in 2.4 % (v_seeds = v_prompts); the mixture stays
//! between 3.4 and 5.2 % for 40 prompts and more. `examples/false_positives.rs` measures this for whole reports.
//!
//! With fewer than [`MIN_SEEDS`] seeds nothing is claimed about training in general. The estimate is then about these
//! models alone, and its variance is that between prompts.
//!
//! The jackknife needs no resamples, and for few prompts its coverage is better than that of the percentile bootstrap,
//! also with the expansion of Hesterberg (2015), because the weights of prompts differ.

use std::collections::HashMap;

use crate::error::Error;
use crate::interval::Interval;
use crate::student_t::{critical, two_sided};

/// Smallest number of seeds for an estimate about training in general. With two, the variance between seeds has one
/// degree of freedom, and an interval is six times as wide as with many.
pub const MIN_SEEDS: usize = 3;

/// Level of a claim, and of what intervals leave out.
pub const LEVEL: f64 = 0.05;

/// Power at which a difference is called detectable.
const POWER: f64 = 0.8;

/// Sum of a figure's values and sum of its weights over the records of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct WeightedSum {
    pub(crate) value: f64,
    pub(crate) weight: f64,
}

/// Sums of one figure of one model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PromptSums<'a> {
    /// Ids of the prompts in the order of their first record.
    pub(crate) prompts: Vec<&'a str>,
    /// Sums of each prompt, for each training seed.
    pub(crate) seeds: Vec<Vec<WeightedSum>>,
}

impl<'a> PromptSums<'a> {
    /// Adds up the records of one seed, given as (prompt, value, weight).
    pub(crate) fn of_seed(records: impl Iterator<Item = (&'a str, f64, f64)>) -> PromptSums<'a> {
        let mut prompts: Vec<&str> = Vec::new();
        let mut cells: Vec<WeightedSum> = Vec::new();
        let mut places: HashMap<&str, usize> = HashMap::new();
        for (prompt, value, weight) in records {
            let place = *places.entry(prompt).or_insert(prompts.len());
            if place == prompts.len() {
                prompts.push(prompt);
                cells.push(WeightedSum::default());
            }
            cells[place].value += value;
            cells[place].weight += weight;
        }
        PromptSums {
            prompts,
            seeds: vec![cells],
        }
    }

    /// Adds the sums of a further seed.
    ///
    /// # Errors
    /// If it has other prompts.
    pub(crate) fn with_seed(mut self, further: PromptSums<'a>) -> Result<PromptSums<'a>, Error> {
        self.check_same_prompts(&further)?;
        self.seeds.extend(further.seeds);
        Ok(self)
    }

    /// Checks that two models have the same prompts in the same order.
    ///
    /// # Errors
    /// If they have not.
    pub(crate) fn check_same_prompts(&self, other: &PromptSums<'_>) -> Result<(), Error> {
        let (left, right) = (&self.prompts, &other.prompts);
        let differs = |i: &usize| left.get(*i) != right.get(*i);
        let name = |prompt: Option<&&str>| prompt.map_or("absent", |id| *id).to_owned();
        match (0..left.len().max(right.len())).find(differs) {
            None => Ok(()),
            Some(position) => Err(Error::NotPaired {
                position,
                left: name(left.get(position)),
                right: name(right.get(position)),
            }),
        }
    }

    /// Ratio over the prompts of one seed.
    pub(crate) fn ratio_of_seed(&self, seed: usize) -> f64 {
        let total = self.total_of_seed(seed);
        total.value / total.weight
    }

    /// Sums over all prompts of one seed. A model that was measured once counts as the same model for each seed.
    fn total_of_seed(&self, seed: usize) -> WeightedSum {
        sum(self.seeds[seed % self.seeds.len()].iter().copied())
    }

    /// Sums over `seeds` seeds for each prompt.
    pub(crate) fn by_prompt(&self, seeds: usize) -> Vec<WeightedSum> {
        let over_seeds = |prompt: usize| sum((0..seeds).map(|seed| self.cell(prompt, seed)));
        (0..self.prompts.len()).map(over_seeds).collect()
    }

    fn cell(&self, prompt: usize, seed: usize) -> WeightedSum {
        self.seeds[seed % self.seeds.len()][prompt]
    }

    /// Influence of each cell on the ratio, in the order of prompts, for each seed: the derivative of the ratio with
    /// respect to the weight of the cell, times the number of cells.
    fn influence(&self, seeds: usize) -> Vec<Vec<f64>> {
        let prompts = self.prompts.len();
        let total = sum((0..seeds).map(|seed| self.total_of_seed(seed)));
        let (ratio, cells) = (total.value / total.weight, (prompts * seeds) as f64);
        let of_cell = |cell: WeightedSum| (cell.value - ratio * cell.weight) * cells / total.weight;
        (0..seeds)
            .map(|seed| {
                let prompts = 0..prompts;
                prompts.map(|i| of_cell(self.cell(i, seed))).collect()
            })
            .collect()
    }
}

fn sum(cells: impl Iterator<Item = WeightedSum>) -> WeightedSum {
    cells.fold(WeightedSum::default(), |total, cell| WeightedSum {
        value: total.value + cell.value,
        weight: total.weight + cell.weight,
    })
}

/// Ratios without one of the units, for each unit.
fn leave_one_out(units: &[WeightedSum]) -> impl Iterator<Item = f64> {
    let total = sum(units.iter().copied());
    let without = move |unit: &WeightedSum| match total.weight - unit.weight {
        weight if weight > 0.0 => (total.value - unit.value) / weight,
        _ => total.value / total.weight,
    };
    units.iter().map(without)
}

/// A figure or a difference, with its variances.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Estimate {
    /// The ratio, or the difference of two ratios.
    pub(crate) mean: f64,
    /// Number of prompts.
    pub(crate) prompts: usize,
    /// Degrees of freedom of the variance between prompts.
    prompt_freedom: f64,
    /// Number of seeds that the estimate is over.
    pub(crate) seeds: usize,
    /// Variance of the mean between prompts.
    prompt_variance: f64,
    /// Variance of the mean between seeds; 0 with fewer than [`MIN_SEEDS`].
    seed_variance: f64,
    /// Variance of the mean within cells; 0 with fewer than [`MIN_SEEDS`].
    cell_variance: f64,
}

impl Estimate {
    /// Estimates a ratio.
    pub(crate) fn of(sums: &PromptSums<'_>) -> Estimate {
        Estimate::over(&[(1.0, sums)])
    }

    /// Estimates the difference of two ratios over the same prompts.
    pub(crate) fn difference(left: &PromptSums<'_>, right: &PromptSums<'_>) -> Estimate {
        Estimate::over(&[(1.0, left), (-1.0, right)])
    }

    /// Estimates a sum of ratios with signs.
    fn over(parts: &[(f64, &PromptSums<'_>)]) -> Estimate {
        let prompts = parts.iter().map(|(_, sums)| sums.prompts.len());
        let prompts = prompts.min().unwrap_or_default();
        let seeds = parts.iter().map(|(_, sums)| sums.seeds.len());
        let seeds = seeds.max().unwrap_or_default();
        let mut mean = 0.0;
        let mut without_prompt = vec![0.0; prompts];
        let mut without_seed = vec![0.0; seeds];
        let mut shares = vec![0.0; prompts];
        let mut influence = vec![vec![0.0; prompts]; seeds];
        for (sign, sums) in parts {
            let by_prompt = sums.by_prompt(seeds);
            let by_seed: Vec<WeightedSum> =
                (0..seeds).map(|seed| sums.total_of_seed(seed)).collect();
            let total = sum(by_seed.iter().copied());
            mean += sign * total.value / total.weight;
            add(&mut without_prompt, *sign, leave_one_out(&by_prompt));
            let part = total.weight * parts.len() as f64;
            add(
                &mut shares,
                1.0 / part,
                by_prompt.iter().map(|cell| cell.weight),
            );
            if seeds >= MIN_SEEDS {
                add(&mut without_seed, *sign, leave_one_out(&by_seed));
                for (all, of_seed) in influence.iter_mut().zip(sums.influence(seeds)) {
                    add(all, *sign, of_seed.into_iter());
                }
            }
        }
        let mut estimate = Estimate {
            mean,
            prompts,
            prompt_freedom: effective_count(&shares) - 1.0,
            seeds,
            prompt_variance: jackknife(mean, &without_prompt),
            seed_variance: 0.0,
            cell_variance: 0.0,
        };
        if seeds >= MIN_SEEDS {
            estimate.seed_variance = jackknife(mean, &without_seed);
            estimate.cell_variance = cell_variance(&influence, prompts);
        }
        estimate
    }

    /// Standard error of the mean.
    pub(crate) fn error(&self) -> f64 {
        let (prompt, seed) = (self.prompt_variance, self.seed_variance);
        let total = prompt + seed - self.cell_variance;
        total.max(prompt).max(seed).sqrt()
    }

    /// Returns P(|T| ≥ t) under the mixture of two t distributions.
    fn tail(&self, t: f64) -> f64 {
        let over_prompts = two_sided(t, self.prompt_freedom);
        if self.seeds < MIN_SEEDS {
            return over_prompts;
        }
        let variances = self.prompt_variance + self.seed_variance;
        let share = match variances > 0.0 {
            true => self.seed_variance / variances,
            false => 0.0,
        };
        (1.0 - share) * over_prompts + share * two_sided(t, (self.seeds - 1) as f64)
    }

    /// Probability of a mean at least as far from zero if the true mean is zero; 1 with fewer than two prompts.
    pub(crate) fn p_value(&self) -> f64 {
        match self.error() {
            _ if self.prompts < 2 || self.mean == 0.0 => 1.0,
            error if error > 0.0 => self.tail((self.mean / error).abs()),
            _ => 0.0,
        }
    }

    /// 95 % interval of the mean; a point with fewer than two prompts.
    pub(crate) fn interval(&self) -> Interval {
        let half_width = match self.prompts < 2 {
            true => 0.0,
            false => critical(LEVEL, |t| self.tail(t)) * self.error(),
        };
        Interval {
            mean: self.mean,
            low: self.mean - half_width,
            high: self.mean + half_width,
            prompts: self.prompts,
        }
    }

    /// Smallest true difference that a test at `level` finds with 80 % power; `None` with fewer than two prompts.
    pub(crate) fn detectable(&self, level: f64) -> Option<f64> {
        (self.prompts > 1).then(|| multiplier(level, |t| self.tail(t)) * self.error())
    }

    /// Critical value at [`LEVEL`] over that without the variance between seeds, at least 1.
    pub(crate) fn widening(&self) -> f64 {
        match self.prompts < 2 || self.seeds < MIN_SEEDS {
            true => 1.0,
            false => {
                let over_prompts = |t| two_sided(t, self.prompt_freedom);
                critical(LEVEL, |t| self.tail(t)) / critical(LEVEL, over_prompts)
            }
        }
    }

    /// Standard deviation between prompts: the standard error over prompts times √prompts.
    pub(crate) fn prompt_deviation(&self) -> f64 {
        (self.prompt_variance * self.prompts as f64).sqrt()
    }
}

/// Number of standard errors between zero and the smallest true difference that is found with 80 % power, for a test
/// whose statistic has this two-sided tail: the critical value plus the 80th percentile (Bloom 1995, Evaluation Review
/// 19(5)).
pub(crate) fn multiplier(level: f64, tail: impl Fn(f64) -> f64) -> f64 {
    critical(level, &tail) + critical(2.0 * (1.0 - POWER), &tail)
}

/// Effective number of prompts with these shares of all weight, at least 2.
fn effective_count(shares: &[f64]) -> f64 {
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    (1.0 / squares).max(2.0)
}

fn add(totals: &mut [f64], factor: f64, values: impl Iterator<Item = f64>) {
    for (total, value) in totals.iter_mut().zip(values) {
        *total += factor * value;
    }
}

/// Jackknife variance from the estimates without one unit, about the estimate itself.
fn jackknife(mean: f64, without: &[f64]) -> f64 {
    let count = without.len() as f64;
    let squares: f64 = without.iter().map(|x| (x - mean).powi(2)).sum();
    (count - 1.0) / count * squares
}

/// Variance of the mean that the interaction of prompt and seed explains, from the two-way analysis of variance.
fn cell_variance(influence: &[Vec<f64>], prompts: usize) -> f64 {
    let seeds = influence.len();
    let of_prompt = |i: usize| influence.iter().map(|row| row[i]).sum::<f64>() / seeds as f64;
    let by_prompt: Vec<f64> = (0..prompts).map(of_prompt).collect();
    let mut squares = 0.0;
    for row in influence {
        let of_seed = row.iter().sum::<f64>() / prompts as f64;
        let both = row.iter().zip(&by_prompt);
        squares += both
            .map(|(x, prompt)| (x - prompt - of_seed).powi(2))
            .sum::<f64>();
    }
    let freedom = (prompts - 1) * (seeds - 1);
    match freedom {
        0 => 0.0,
        _ => squares / freedom as f64 / (prompts * seeds) as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 40] = [
        "00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13", "14",
        "15", "16", "17", "18", "19", "20", "21", "22", "23", "24", "25", "26", "27", "28", "29",
        "30", "31", "32", "33", "34", "35", "36", "37", "38", "39",
    ];

    /// Two models with made-up values, the same as in the Python that computed the expected numbers. With `own_weights`
    /// the models have different numbers of tokens.
    pub(crate) fn models(
        prompts: usize,
        seeds: usize,
        own_weights: bool,
    ) -> (PromptSums<'static>, PromptSums<'static>) {
        let share = |value: usize, period: usize, scale: f64| (value % period) as f64 / scale;
        let left = |i: usize, s: usize| {
            let weight = 10.0 + share(7 * i, 5, 1.0);
            let mean = 1.0 + share(5 * i, 7, 10.0) + (s * s) as f64 / 50.0;
            (weight * (mean + share(3 * i + 5 * s, 4, 40.0)), weight)
        };
        let right = |i: usize, s: usize| {
            let weight = match own_weights {
                true => 10.0 + share(3 * i + s, 4, 1.0),
                false => 10.0 + share(7 * i, 5, 1.0),
            };
            let mean = 1.3 + share(5 * i, 7, 12.0) + s as f64 / 25.0;
            (weight * (mean + share(2 * i + 3 * s, 5, 50.0)), weight)
        };
        let sums = |cell: &dyn Fn(usize, usize) -> (f64, f64)| PromptSums {
            prompts: NAMES[..prompts].to_vec(),
            seeds: (0..seeds)
                .map(|s| {
                    let cells = (0..prompts).map(|i| cell(i, s));
                    cells
                        .map(|(value, weight)| WeightedSum { value, weight })
                        .collect()
                })
                .collect(),
        };
        (sums(&left), sums(&right))
    }

    /// The expected numbers are from numpy and scipy: np.delete for the jackknife, least squares over dummy variables for the
    /// interaction, brentq for the critical value.
    #[test]
    fn differences_equal_those_of_scipy() {
        for (prompts, seeds, own_weights, expected) in [
            (
                8,
                1,
                false,
                [
                    -0.262239583333,
                    -0.314906805012,
                    -0.209572361655,
                    8.08420812231e-06,
                    0.0725749636716,
                ],
            ),
            (
                8,
                3,
                false,
                [
                    -0.262586805556,
                    -0.291652977249,
                    -0.233520633862,
                    0.000358289769865,
                    0.0391357813026,
                ],
            ),
            (
                8,
                3,
                true,
                [
                    -0.256308121981,
                    -0.294388135463,
                    -0.218228108498,
                    0.000501357483453,
                    0.0516342615627,
                ],
            ),
            (
                40,
                5,
                true,
                [
                    -0.210244565217,
                    -0.300953425754,
                    -0.119535704681,
                    0.00300776730395,
                    0.121665974986,
                ],
            ),
        ] {
            let (left, right) = models(prompts, seeds, own_weights);
            let estimate = Estimate::difference(&left, &right);
            let Interval {
                mean, low, high, ..
            } = estimate.interval();
            let detectable = estimate.detectable(LEVEL).unwrap();
            let found = [mean, low, high, estimate.p_value(), detectable];
            for (found, expected) in found.iter().zip(expected) {
                let error = (found / expected - 1.0).abs();
                assert!(
                    error < 1e-6,
                    "{prompts} {seeds}: {found} instead of {expected}"
                );
            }
        }
    }

    /// An interval that ends at zero belongs to p = 0.05.
    #[test]
    fn interval_and_p_value_agree() {
        for seeds in [1, 3, 5] {
            let (left, mut right) = models(20, seeds, false);
            let interval = Estimate::difference(&left, &right).interval();
            for cell in right.seeds.iter_mut().flatten() {
                cell.value += interval.high * cell.weight;
            }
            let p = Estimate::difference(&left, &right).p_value();
            assert!((p - 0.05).abs() < 1e-9, "{seeds}: {p}");
        }
    }

    /// With equal weights and the same prompts' difference for each seed, only the variance between seeds is left, which is
    /// that of the paired t-test.
    #[test]
    fn seeds_are_paired() {
        let seed = |values: [f64; 2]| PromptSums {
            prompts: vec!["a", "b"],
            seeds: vec![
                values
                    .map(|value| WeightedSum { value, weight: 1.0 })
                    .to_vec(),
            ],
        };
        let all = |seeds: [[f64; 2]; 3]| {
            let mut sums = seed(seeds[0]);
            for further in &seeds[1..] {
                sums = sums.with_seed(seed(*further)).unwrap();
            }
            sums
        };
        // Both models vary by 0.5 between seeds, in step; the differences are 0.10, 0.11 and 0.12.
        let left = all([[1.0, 2.0], [1.5, 2.5], [2.0, 3.0]]);
        let right = all([[0.9, 1.9], [1.39, 2.39], [1.88, 2.88]]);
        // python: scipy.stats.ttest_1samp([0.10, 0.11, 0.12], 0).pvalue
        let estimate = Estimate::difference(&left, &right);
        assert!(
            (estimate.p_value() - 0.002_743_489_4).abs() < 1e-8,
            "{}",
            estimate.p_value()
        );
        let swapped = all([[1.39, 2.39], [1.88, 2.88], [0.9, 1.9]]);
        assert!(
            Estimate::difference(&left, &swapped).p_value() > 0.5,
            "pairing matters"
        );
    }

    #[test]
    fn fewer_than_three_seeds_are_not_a_sample_of_seeds() {
        let (left, right) = models(20, 2, false);
        let estimate = Estimate::difference(&left, &right);
        assert_eq!(estimate.seed_variance, 0.0);
        let p = two_sided(estimate.mean / estimate.error(), estimate.prompt_freedom);
        assert_eq!(estimate.p_value(), p);
    }

    #[test]
    fn a_model_that_was_measured_once_counts_for_each_seed() {
        let (left, right) = models(10, 3, false);
        let once = PromptSums {
            seeds: right.seeds[..1].to_vec(),
            ..right.clone()
        };
        let thrice = PromptSums {
            seeds: vec![right.seeds[0].clone(); 3],
            ..right
        };
        assert_eq!(
            Estimate::difference(&left, &once),
            Estimate::difference(&left, &thrice)
        );
    }

    #[test]
    fn one_prompt_is_a_point_without_a_claim() {
        let sums = PromptSums::of_seed([("a", 2.0, 4.0), ("a", 4.0, 2.0)].into_iter());
        let estimate = Estimate::of(&sums);
        let interval = estimate.interval();
        assert_eq!(
            (interval.low, interval.mean, interval.high),
            (1.0, 1.0, 1.0)
        );
        assert_eq!(
            (estimate.p_value(), estimate.detectable(LEVEL)),
            (1.0, None)
        );
    }

    #[test]
    fn a_constant_difference_is_certain() {
        let (left, _) = models(20, 1, false);
        let mut right = left.clone();
        for cell in &mut right.seeds[0] {
            cell.value += 0.25 * cell.weight;
        }
        let estimate = Estimate::difference(&left, &right);
        assert!((estimate.mean + 0.25).abs() < 1e-12);
        assert!(estimate.p_value() < 1e-12);
        assert_eq!(Estimate::difference(&left, &left).p_value(), 1.0);
    }
}
