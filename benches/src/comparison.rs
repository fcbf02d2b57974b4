//! Several implementations of one workload: whether they computed the same, and which is faster.

use serde::Serialize;
use serde_json::{Value, json};

use crate::processes::{Measurement, MeasurementResult, least, median};
use crate::request::{FloatType, Implementation, LossShape, Workload};

/// Number of losses that are compared of a training step. Later ones differ too much by rounding.
const COMPARED_STEPS: usize = 3;

/// One workload and the result of each implementation.
#[derive(Debug)]
pub(crate) struct Comparison {
    pub(crate) part: &'static str,
    /// Description of one repetition.
    pub(crate) description: String,
    pub(crate) workload: Workload,
    pub(crate) float: FloatType,
    /// Tokens that one repetition counts: those read, or the new ones where text is generated; for the
    /// loss alone its rows.
    pub(crate) tokens: usize,
    /// Shape of the loss; all zeros for other workloads.
    pub(crate) shape: LossShape,
    /// The first entry is Potstill with the fused loss.
    pub(crate) results: Vec<(Implementation, MeasurementResult)>,
}

/// Potstill against the faster of PyTorch's forms. Pairs are by the best and by the median times.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct AgainstPyTorch {
    pub(crate) implementation: Implementation,
    /// PyTorch's time divided by Potstill's.
    pub(crate) ratio: [f64; 2],
    /// Potstill's time outside the products as a share of PyTorch's; for the loss alone.
    pub(crate) outside: Option<[f64; 2]>,
    /// Potstill's memory beyond inputs and gradients as a share of PyTorch's; for the loss alone.
    pub(crate) memory: Option<f64>,
}

/// Rate of one pass over a chunk of logits.
#[derive(Debug, Serialize)]
pub(crate) struct PassRate {
    pub(crate) pass: String,
    pub(crate) seconds: f64,
    pub(crate) bytes_per_second: f64,
}

/// Seconds of the whole loss less those of its products, by the best and by the median times.
pub(crate) fn outside_products(measurement: &Measurement) -> [f64; 2] {
    [least, median].map(|of| of(&measurement.seconds) - of(&measurement.products))
}

impl Comparison {
    /// Every implementation that was measured successfully.
    pub(crate) fn measurements(&self) -> impl Iterator<Item = (Implementation, &Measurement)> {
        let results = self.results.iter();
        results
            .filter_map(|(implementation, result)| Some((*implementation, result.as_ref().ok()?)))
    }

    /// Compares Potstill with the faster of PyTorch's forms; `None` without either.
    pub(crate) fn against_pytorch(&self) -> Option<AgainstPyTorch> {
        let of_potstill =
            |(implementation, _): &(Implementation, _)| *implementation == Implementation::Fused;
        let (_, ours) = self.measurements().find(of_potstill)?;
        let (implementation, theirs) = self
            .measurements()
            .filter(|(implementation, _)| implementation.is_pytorch())
            .min_by(|(_, a), (_, b)| a.best().total_cmp(&b.best()))?;
        let bytes = ours.above_bytes.zip(theirs.above_bytes);
        let outside = (self.workload == Workload::Loss).then(|| {
            let [ours, theirs] = [ours, theirs].map(outside_products);
            [ours[0] / theirs[0], ours[1] / theirs[1]]
        });
        Some(AgainstPyTorch {
            implementation,
            ratio: [theirs.best() / ours.best(), theirs.median() / ours.median()],
            outside,
            memory: bytes.map(|(ours, theirs)| ours as f64 / theirs as f64),
        })
    }

    /// Whether an implementation computed the same as the first one, with the compared numbers; the error
    /// has them too. `None` for the first one, for other losses, and where a result is missing.
    pub(crate) fn agreement(&self, index: usize) -> Option<Result<String, String>> {
        let (_, ours) = self.results.first()?;
        let (implementation, theirs) = self.results.get(index).filter(|_| index > 0)?;
        let (ours, theirs) = (ours.as_ref().ok()?, theirs.as_ref().ok()?);
        implementation
            .computes_requested_loss()
            .then(|| agree(self.workload, self.float, &ours.check, &theirs.check))
    }

    /// The agreement as a cell of a table.
    pub(crate) fn agreement_cell(&self, index: usize) -> String {
        match self.agreement(index) {
            None => String::new(),
            Some(Ok(numbers)) => numbers,
            Some(Err(numbers)) => format!("**NO**: {numbers}"),
        }
    }

    /// Describes each implementation that did not compute the same as the first one.
    pub(crate) fn disagreements(&self) -> Vec<String> {
        let disagreement = |index: usize| {
            let numbers = self.agreement(index)?.err()?;
            let (implementation, _) = self.results.get(index)?;
            let (part, float) = (self.part, self.float.name());
            Some(format!(
                "{part} {float}, {}: {numbers}",
                implementation.name()
            ))
        };
        (0..self.results.len()).filter_map(disagreement).collect()
    }

    /// Rate of each pass over a chunk of logits.
    pub(crate) fn pass_rates(&self, measurement: &Measurement) -> Vec<PassRate> {
        if self.workload != Workload::Loss {
            return Vec::new();
        }
        let bytes = self.shape.chunk_bytes(self.float);
        let rate = |(name, seconds): &(String, f64)| {
            // The statistics only read the logits; the other passes read and write.
            let passes = if name == "statistics" { 1.0 } else { 2.0 };
            PassRate {
                pass: name.clone(),
                seconds: *seconds,
                bytes_per_second: passes * bytes / seconds,
            }
        };
        measurement.parts.iter().map(rate).collect()
    }

    pub(crate) fn json(&self) -> Value {
        let result =
            |(index, (implementation, result)): (usize, &(Implementation, MeasurementResult))| {
                let mut value = result_json(result, self.tokens);
                value["implementation"] = json!(implementation);
                value["same"] = json!(self.agreement(index).map(|a| a.is_ok()));
                if let (Workload::Loss, Ok(measurement)) = (self.workload, result) {
                    let products = implementation.products() as f64;
                    value["outside_seconds"] = json!(outside_products(measurement));
                    value["product_operations"] = json!(self.shape.operations() * products);
                    value["passes"] = json!(self.pass_rates(measurement));
                }
                value
            };
        json!({
            "part": self.part,
            "dtype": self.float.name(),
            "description": self.description,
            "tokens": self.tokens,
            "shape": (self.workload == Workload::Loss).then_some(self.shape),
            "results": self.results.iter().enumerate().map(result).collect::<Vec<Value>>(),
            "against": self.against_pytorch(),
        })
    }
}

/// A result with its rate, or the reason of a failure.
pub(crate) fn result_json(result: &MeasurementResult, tokens: usize) -> Value {
    match result {
        Err(why) => json!({ "failed": why }),
        Ok(measurement) => {
            let mut value = json!(measurement);
            value["tokens_per_second"] = json!(tokens as f64 / measurement.best());
            value
        }
    }
}

/// Compares the numbers of two implementations and gives those that show how well they agree.
fn agree(
    workload: Workload,
    float: FloatType,
    ours: &[f64],
    theirs: &[f64],
) -> Result<String, String> {
    let compared = match workload {
        Workload::Step => ours.len().min(theirs.len()).min(COMPARED_STEPS),
        _ => ours.len(),
    };
    let (ours, theirs) = (ours.get(..compared), theirs.get(..compared));
    let (Some(ours), Some(theirs)) = (ours, theirs) else {
        return Err("the two sides gave different amounts of numbers".to_owned());
    };
    if compared == 0 {
        return Err("there is nothing to compare".to_owned());
    }
    let pairs = || ours.iter().zip(theirs);
    if workload == Workload::Decode {
        let same = pairs().filter(|(a, b)| a == b).count() as f64 / compared as f64;
        let text = format!("{:.1} % of the tokens", same * 100.0);
        // After a near tie that went the other way, the rest of an answer is a different text.
        return if same > 0.5 { Ok(text) } else { Err(text) };
    }
    // Logits and gradients are compared by their relative difference, losses and means by the absolute one.
    let scale = |value: f64| match workload {
        Workload::Prefill | Workload::Loss => value.abs().max(1.0),
        _ => 1.0,
    };
    let differences = || pairs().map(|(a, b)| (a - b).abs() / scale(*a));
    let numbers = |values: &[f64]| {
        let values: Vec<String> = values.iter().map(|v| format!("{v:.5}")).collect();
        values.join(", ")
    };
    let both = format!("{} and {}", numbers(ours), numbers(theirs));
    // Each difference is tested by itself, since `f64::max` ignores NaN.
    if !differences().all(|difference| difference <= float.tolerance()) {
        return Err(both);
    }
    Ok(match workload {
        Workload::Step => format!("losses {both}"),
        _ => format!("to {:.0e}", differences().fold(0.0, f64::max)),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A measurement of a step with two threads.
    pub(crate) fn step_measurement(seconds: &[f64], check: &[f64]) -> Measurement {
        Measurement {
            threads: 2,
            seconds: seconds.to_vec(),
            check: check.to_vec(),
            others: vec![0.01; seconds.len()],
            before_bytes: Some(700_000_000),
            peak_bytes: Some(2_000_000_000),
            engine: "potstill".to_owned(),
            ..Measurement::default()
        }
    }

    /// A step in f32 by Potstill and, if given, PyTorch.
    pub(crate) fn step(
        potstill: MeasurementResult,
        pytorch: Option<MeasurementResult>,
    ) -> Comparison {
        let pytorch = pytorch.map(|result| (Implementation::Eager, result));
        Comparison {
            part: "step",
            description: "512 tokens, and so on".to_owned(),
            workload: Workload::Step,
            float: FloatType::F32,
            tokens: 512,
            shape: LossShape::default(),
            results: [(Implementation::Fused, potstill)]
                .into_iter()
                .chain(pytorch)
                .collect(),
        }
    }

    fn loss_measurement(seconds: &[f64], products: &[f64], megabytes: u64) -> Measurement {
        Measurement {
            products: products.to_vec(),
            above_bytes: Some(megabytes * 1_000_000),
            ..step_measurement(seconds, &[9.4, 0.7])
        }
    }

    /// The loss alone by five implementations, of which the last failed.
    pub(crate) fn loss() -> Comparison {
        let pass = |name: &str, seconds: f64| (name.to_owned(), seconds);
        let ours = Measurement {
            parts: vec![
                pass("statistics", 0.01),
                pass("gradient", 0.02),
                pass("copy", 0.016),
            ],
            ..loss_measurement(&[2.5, 3.0], &[2.25, 2.5], 50)
        };
        let eager = Measurement {
            note: "gradient by hand".to_owned(),
            parts: vec![pass("copy", 0.01)],
            ..loss_measurement(&[5.0], &[3.0], 800)
        };
        let compiled = loss_measurement(&[3.0, 4.0], &[2.0, 2.0], 400);
        let liger = loss_measurement(&[6.0], &[5.0], 100);
        Comparison {
            part: "loss",
            description: "2000 states, and so on".to_owned(),
            workload: Workload::Loss,
            float: FloatType::F32,
            tokens: 2000,
            shape: LossShape {
                rows: 2000,
                width: 500,
                vocab: 50_000,
                chunk_rows: 250,
            },
            results: vec![
                (Implementation::Fused, Ok(ours)),
                (Implementation::Eager, Ok(eager)),
                (Implementation::Compile, Ok(compiled)),
                (Implementation::LigerJsd, Ok(liger)),
                (Implementation::LigerKl, Err("no module | liger".to_owned())),
            ],
        }
    }

    #[test]
    fn the_faster_form_of_pytorch_counts() {
        let expected = AgainstPyTorch {
            implementation: Implementation::Compile,
            ratio: [1.2, 3.5 / 2.75],
            outside: Some([0.25, 0.375 / 1.5]),
            memory: Some(0.125),
        };
        assert_eq!(loss().against_pytorch(), Some(expected));
        let alone = step(Ok(step_measurement(&[2.0], &[9.3])), None);
        assert_eq!(alone.against_pytorch(), None);
        assert_eq!(alone.disagreements(), Vec::<String>::new());
    }

    #[test]
    fn a_difference_is_reported_with_the_numbers() {
        let pair = |ours: &[f64], theirs: &[f64]| {
            let [ours, theirs] = [ours, theirs].map(|check| Ok(step_measurement(&[1.0], check)));
            step(ours, Some(theirs)).disagreements()
        };
        assert_eq!(pair(&[9.3], &[9.3009]), Vec::<String>::new());
        assert_eq!(
            pair(&[9.3, 9.2], &[9.3, 9.22]),
            ["step f32, PyTorch: 9.30000, 9.20000 and 9.30000, 9.22000"]
        );
        assert_eq!(pair(&[f64::NAN, 9.2], &[9.3, 9.2]).len(), 1);
        assert_eq!(pair(&[], &[]).len(), 1);
    }

    #[test]
    fn answers_agree_by_their_tokens() {
        let of =
            |ours: &[f64], theirs: &[f64]| agree(Workload::Decode, FloatType::F32, ours, theirs);
        assert_eq!(
            of(&[1.0, 2.0], &[1.0, 2.0]),
            Ok("100.0 % of the tokens".to_owned())
        );
        assert!(of(&[1.0, 2.0, 3.0], &[1.0, 5.0, 6.0]).is_err());
        assert!(of(&[1.0, 2.0], &[1.0]).is_err());
    }

    #[test]
    fn an_implementation_that_computed_something_else_is_reported() {
        let mut comparison = loss();
        if let Some((_, Ok(compiled))) = comparison.results.get_mut(2) {
            compiled.check = vec![9.4, 0.8];
        }
        assert_eq!(
            comparison.disagreements(),
            ["loss f32, PyTorch, compiled: 9.40000, 0.70000 and 9.40000, 0.80000"]
        );
        let value = comparison.json();
        assert_eq!(value["results"][1]["same"], true);
        assert_eq!(value["results"][2]["same"], false);
        assert_eq!(value["results"][3]["same"], Value::Null);
        assert_eq!(value["results"][3]["product_operations"], 4.0e11);
        assert_eq!(value["against"]["memory"], 0.125);
    }

    #[test]
    fn json_has_rates_and_failures() {
        let ours = step_measurement(&[2.0, 4.0], &[9.3]);
        let value = step(Ok(ours), Some(Err("no torch".to_owned()))).json();
        assert_eq!(value["results"][0]["tokens_per_second"], 256.0);
        assert_eq!(value["results"][1]["failed"], "no torch");
        assert_eq!(value["results"][1]["same"], Value::Null);
        assert_eq!(value["against"], Value::Null);
    }
}
