//! Results of a benchmark as Markdown and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::comparison::{Comparison, outside_products, result_json};
use crate::processes::{Measurement, MeasurementResult, least, median, thread_count};
use crate::request::{Implementation, Workload};

/// Peak memory at one length.
#[derive(Debug)]
pub(crate) struct MemoryAtLength {
    /// Tokens of the text, or rows of the loss alone.
    pub(crate) tokens: usize,
    pub(crate) potstill: MeasurementResult,
}

/// Results of all measured parts.
#[derive(Debug, Default)]
pub(crate) struct BenchmarkResults {
    /// Lines about model, machine and versions.
    pub(crate) head: Vec<String>,
    /// Remarks that are necessary to read the numbers.
    pub(crate) notes: Vec<String>,
    /// Potstill and PyTorch, each with its best number of threads; one table for all.
    pub(crate) rates: Vec<Comparison>,
    /// The parts of a step; the first one is the whole step.
    pub(crate) profile: Option<MeasurementResult>,
    /// Memory of one forward and backward pass by tokens of the text.
    pub(crate) memory: Vec<MemoryAtLength>,
    /// The loss alone, and steps with different forms of the loss; a table for each.
    pub(crate) losses: Vec<Comparison>,
    /// Memory of the loss alone by rows.
    pub(crate) loss_memory: Vec<MemoryAtLength>,
}

impl BenchmarkResults {
    fn comparisons(&self) -> impl Iterator<Item = &Comparison> {
        self.rates.iter().chain(&self.losses)
    }

    /// Describes each implementation that did not compute the same as Potstill.
    pub(crate) fn disagreements(&self) -> Vec<String> {
        self.comparisons()
            .flat_map(Comparison::disagreements)
            .collect()
    }

    fn measurements(&self) -> impl Iterator<Item = &Measurement> {
        let measurements = self.comparisons().flat_map(Comparison::measurements);
        measurements.map(|(_, measurement)| measurement)
    }

    /// Names and versions of the libraries that computed, on one line.
    pub(crate) fn engines(&self) -> Option<String> {
        let mut engines: Vec<&str> = Vec::new();
        for measurement in self.measurements() {
            if !engines.contains(&measurement.engine.as_str()) {
                engines.push(&measurement.engine);
            }
        }
        (!engines.is_empty()).then(|| engines.join("; "))
    }

    fn disturbed(&self) -> usize {
        self.measurements().map(Measurement::disturbed).sum()
    }

    pub(crate) fn json(&self) -> String {
        let memory = |lengths: &[MemoryAtLength]| -> Vec<Value> {
            let length = |m: &MemoryAtLength| json!({ "tokens": m.tokens, "potstill": result_json(&m.potstill, m.tokens) });
            lengths.iter().map(length).collect()
        };
        let profile = self.profile.as_ref().map(|result| match result {
            Err(why) => json!({ "failed": why }),
            Ok(measurement) => {
                let part =
                    |(name, seconds): &(String, f64)| json!({ "part": name, "seconds": seconds });
                let parts: Vec<Value> = measurement.parts.iter().map(part).collect();
                json!({ "threads": measurement.threads, "parts": parts })
            }
        });
        json!({
            "head": self.head,
            "notes": self.notes,
            "disturbed": self.disturbed(),
            "comparisons": self.comparisons().map(Comparison::json).collect::<Vec<Value>>(),
            "profile": profile,
            "memory": memory(&self.memory),
            "loss_memory": memory(&self.loss_memory),
        })
        .to_string()
    }

    pub(crate) fn markdown(&self) -> String {
        let mut out = self.head.join("  \n") + "\n";
        let disturbed = self.disturbed();
        if disturbed > 0 {
            let processes: usize = self.measurements().map(|m| m.others.len()).sum();
            let _ = write!(
                out,
                "\n**The machine was not quiet: beside {disturbed} of {processes} measuring processes, other programs used over 5 % of the processors.**\n"
            );
        }
        for note in &self.notes {
            let _ = write!(out, "\n{note}\n");
        }
        out += &self.rates_table();
        out += &self.step_memory_table();
        out += &self.profile_table();
        out += &self.memory_table();
        for comparison in &self.losses {
            out += &match comparison.workload {
                Workload::Loss => loss_table(comparison),
                _ => step_table(comparison),
            };
        }
        out += &self.loss_memory_table();
        out
    }

    fn rates_table(&self) -> String {
        if self.rates.is_empty() {
            return String::new();
        }
        let mut out = "\n| part | type | Potstill, tokens/s | PyTorch, tokens/s | ratio | both computed the same |\n|---|---|---:|---:|---:|---|\n".to_owned();
        for comparison in &self.rates {
            let cell = |index: usize| match comparison.results.get(index) {
                None => "not measured".to_owned(),
                Some((_, Err(why))) => format!("failed: {}", why.replace('|', "/")),
                Some((_, Ok(m))) => format!(
                    "{}, {}",
                    best_and_median_rate(comparison.tokens, m),
                    thread_count(m.threads)
                ),
            };
            let against = comparison.against_pytorch();
            let ratio = against.map_or_else(String::new, |against| {
                let [best, median] = against.ratio;
                format!("{best:.2} ({median:.2})")
            });
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {ratio} | {} |",
                comparison.part,
                comparison.float.name(),
                cell(0),
                cell(1),
                comparison.agreement_cell(1)
            );
        }
        out += "\nThe best (median) of all repetitions, each side with its best number of threads; the two sides ran in turn, in processes of their own. One repetition is:\n\n";
        let mut described: Vec<&str> = Vec::new();
        for comparison in &self.rates {
            if !described.contains(&comparison.part) {
                described.push(comparison.part);
                let _ = writeln!(out, "- {}: {}", comparison.part, comparison.description);
            }
        }
        out
    }

    fn step_memory_table(&self) -> String {
        let mut out = String::new();
        for comparison in self.rates.iter().filter(|c| c.workload == Workload::Step) {
            let line = |name: &str, of: fn(&Measurement) -> Option<u64>| {
                let bytes = |index: usize| {
                    let (_, result) = comparison.results.get(index)?;
                    of(result.as_ref().ok()?)
                };
                let (ours, theirs) = (bytes(0), bytes(1));
                let ratio = ours.zip(theirs).map_or_else(String::new, |(ours, theirs)| {
                    format!("{:.2}", ours as f64 / theirs as f64)
                });
                let [ours, theirs] = [ours, theirs].map(megabytes);
                let float = comparison.float.name();
                format!("| {name}, {float} | {ours} | {theirs} | {ratio} |\n")
            };
            out += &line("peak in a step", |m| m.peak_bytes);
            out += &line("before the first step", |m| m.before_bytes);
        }
        if out.is_empty() {
            return out;
        }
        format!(
            "\n| resident memory, the whole process | Potstill | PyTorch | ratio |\n|---|---:|---:|---:|\n{out}"
        )
    }

    fn profile_table(&self) -> String {
        let measurement = match &self.profile {
            None => return String::new(),
            Some(Err(why)) => return format!("\nThe profile of the step failed: {why}\n"),
            Some(Ok(measurement)) => measurement,
        };
        let whole = measurement
            .parts
            .first()
            .map_or(1.0, |(_, seconds)| *seconds);
        let mut out = format!(
            "\n| part of Potstill's step, f32, {} | ms | share |\n|---|---:|---:|\n",
            thread_count(measurement.threads)
        );
        for (name, seconds) in &measurement.parts {
            let share = 100.0 * seconds / whole;
            let _ = writeln!(out, "| {name} | {:.1} | {share:.1} % |", seconds * 1e3);
        }
        out
    }

    fn memory_table(&self) -> String {
        if self.memory.is_empty() {
            return String::new();
        }
        let mut out =
            "\n| tokens of one text, forward and backward, f32 | before | peak | for each further token | seconds |\n|---:|---:|---:|---:|---:|\n"
                .to_owned();
        let mut slopes = Vec::new();
        let mut last: Option<(usize, u64)> = None;
        for MemoryAtLength { tokens, potstill } in &self.memory {
            let measurement = match potstill {
                Ok(measurement) => measurement,
                Err(why) => {
                    let _ = writeln!(out, "| {tokens} | failed: {why} | | | |");
                    continue;
                }
            };
            let mut slope = String::new();
            if let (Some((fewer, less)), Some(peak)) = (last, measurement.peak_bytes) {
                let bytes = (peak as f64 - less as f64) / (tokens - fewer).max(1) as f64;
                slopes.push(bytes);
                slope = format!("{:.0} KB", bytes / 1e3);
            }
            last = measurement.peak_bytes.map(|peak| (*tokens, peak));
            let [before, peak] = [measurement.before_bytes, measurement.peak_bytes].map(megabytes);
            let seconds = measurement.best();
            let _ = writeln!(
                out,
                "| {tokens} | {before} | {peak} | {slope} | {seconds:.2} |"
            );
        }
        if slopes.len() >= 2 {
            let most = slopes.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let _ = write!(
                out,
                "\nA further token costs from {:.0} to {:.0} KB over these lengths.\n",
                least(&slopes) / 1e3,
                most / 1e3
            );
        }
        out
    }

    fn loss_memory_table(&self) -> String {
        if self.loss_memory.is_empty() {
            return String::new();
        }
        let mut out = "\n| positions of the loss alone, forward and backward | memory above inputs and gradients | seconds |\n|---:|---:|---:|\n".to_owned();
        for MemoryAtLength { tokens, potstill } in &self.loss_memory {
            let _ = match potstill {
                Ok(m) => {
                    let memory = megabytes(m.above_bytes);
                    writeln!(out, "| {tokens} | {memory} | {:.2} |", m.best())
                }
                Err(why) => writeln!(out, "| {tokens} | failed: {why} | |"),
            };
        }
        out
    }
}

/// A line for each implementation; `cells` gives the columns between its name and the agreement.
fn lines(
    comparison: &Comparison,
    columns: usize,
    cells: impl Fn(Implementation, &Measurement) -> String,
) -> String {
    let mut out = String::new();
    for (index, (implementation, result)) in comparison.results.iter().enumerate() {
        let name = implementation.name();
        let _ = match result {
            Ok(measurement) => {
                let cells = cells(*implementation, measurement);
                let agreement = comparison.agreement_cell(index);
                writeln!(out, "| {name} | {cells} | {agreement} |")
            }
            Err(why) => {
                let empty = " |".repeat(columns);
                writeln!(out, "| {name} | failed: {}{empty} |", why.replace('|', "/"))
            }
        };
    }
    out
}

fn step_table(comparison: &Comparison) -> String {
    let lines = lines(comparison, 3, |_, m| {
        let rates = best_and_median_rate(comparison.tokens, m);
        let [peak, before] = [m.peak_bytes, m.before_bytes].map(megabytes);
        format!("{rates} | {peak} | {before}")
    });
    format!(
        "\n| step, {} | tokens/s | peak memory in a step | before the first | losses |\n|---|---:|---:|---:|---|\n{lines}\nThe best (median) of all repetitions, on all cores; memory is that of the whole process. One repetition is: {}\n",
        comparison.float.name(),
        comparison.description
    )
}

fn loss_table(comparison: &Comparison) -> String {
    let lines = lines(comparison, 6, |implementation, m| {
        let operations = comparison.shape.operations() * implementation.products() as f64;
        let outside = outside_products(m);
        let pairs = [
            [m.best(), m.median()],
            [least(&m.products), median(&m.products)],
            outside,
        ];
        let times = pairs.map(|[best, median]| format!("{best:.3} ({median:.3})"));
        format!(
            "{} | {} | {:.0} | {:.0}",
            times.join(" | "),
            megabytes(m.above_bytes),
            operations / 1e9,
            operations / 1e9 / least(&m.products)
        )
    });
    let mut out = format!(
        "\n| loss, {} | whole, s | its products alone, s | outside them, s | memory above inputs and gradients | products' GFLOP | their GFLOP/s | computed the same |\n|---|---:|---:|---:|---:|---:|---:|---|\n{lines}\nThe best (median) of all repetitions, on all cores; the whole and its products ran in turn in one process. One repetition is: {}\n",
        comparison.float.name(),
        comparison.description
    );
    if let Some(against) = comparison.against_pytorch() {
        let memory = against.memory.map_or_else(
            || "memory not known".to_owned(),
            |share| format!("{share:.2} of its memory"),
        );
        let [ratio, median_ratio] = against.ratio;
        let [outside, median_outside] = against.outside.unwrap_or([f64::NAN; 2]);
        let _ = write!(
            out,
            "\nPotstill against {}, the faster of PyTorch's two: {ratio:.2} ({median_ratio:.2}) times as fast, {outside:.2} ({median_outside:.2}) of its time outside the products, {memory}.\n",
            against.implementation.name(),
        );
    }
    for (implementation, measurement) in comparison.measurements() {
        out += &pass_lines(comparison, implementation, measurement);
        if !measurement.note.is_empty() {
            let _ = write!(out, "\n{}: {}\n", implementation.name(), measurement.note);
        }
    }
    out
}

/// The passes over a chunk of logits, with their share of a copy's rate.
fn pass_lines(
    comparison: &Comparison,
    implementation: Implementation,
    measurement: &Measurement,
) -> String {
    let rates = comparison.pass_rates(measurement);
    if rates.is_empty() {
        return String::new();
    }
    let copy = rates.iter().find(|rate| rate.pass == "copy");
    let passes: Vec<String> = rates
        .iter()
        .map(|rate| {
            let share = match copy {
                Some(copy) if rate.pass != copy.pass => format!(
                    ", {:.2} of the copy's",
                    rate.bytes_per_second / copy.bytes_per_second
                ),
                _ => String::new(),
            };
            format!(
                "{} {:.2} ms, {:.1} GB/s{share}",
                rate.pass,
                rate.seconds * 1e3,
                rate.bytes_per_second / 1e9
            )
        })
        .collect();
    let shape = comparison.shape;
    format!(
        "\n{}, passes over {} × {} logits: {}.\n",
        implementation.name(),
        shape.rows.min(shape.chunk_rows),
        shape.vocab,
        passes.join("; ")
    )
}

/// Tokens a second, by the best and the median repetition.
fn best_and_median_rate(tokens: usize, measurement: &Measurement) -> String {
    let [best, median] =
        [measurement.best(), measurement.median()].map(|seconds| short(tokens as f64 / seconds));
    format!("{best} ({median})")
}

/// A rate with three significant digits, or all digits before the point.
fn short(rate: f64) -> String {
    match rate {
        _ if rate >= 99.95 => format!("{rate:.0}"),
        _ if rate >= 9.995 => format!("{rate:.1}"),
        _ => format!("{rate:.2}"),
    }
}

fn megabytes(bytes: Option<u64>) -> String {
    bytes.map_or_else(
        || "not known".to_owned(),
        |bytes| format!("{:.0} MB", bytes as f64 / 1e6),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comparison::tests::{loss, step, step_measurement};
    use crate::request::FloatType;

    fn results(rates: Vec<Comparison>) -> BenchmarkResults {
        BenchmarkResults {
            head: vec!["Potstill".to_owned(), "a machine".to_owned()],
            rates,
            ..BenchmarkResults::default()
        }
    }

    #[test]
    fn the_markdown_of_rates_profile_and_memory() {
        let ours = step_measurement(&[2.0, 4.0], &[9.31545, 9.1]);
        let theirs = Measurement {
            threads: 1,
            others: vec![0.2],
            ..step_measurement(&[4.0, 5.0], &[9.31546, 9.1, 8.9])
        };
        let mut all = results(vec![
            step(Ok(ours.clone()), Some(Ok(theirs))),
            Comparison {
                float: FloatType::Bf16,
                ..step(Err("no bf16 | here".to_owned()), Some(Ok(ours.clone())))
            },
        ]);
        all.notes.push("A note.".to_owned());
        all.profile = Some(Ok(Measurement {
            parts: vec![
                ("the whole step".to_owned(), 2.0),
                ("attention".to_owned(), 0.5),
            ],
            ..ours.clone()
        }));
        let memory = |tokens, peak_bytes| MemoryAtLength {
            tokens,
            potstill: Ok(Measurement {
                peak_bytes: Some(peak_bytes),
                ..ours.clone()
            }),
        };
        all.memory = vec![
            memory(512, 1_000_000_000),
            memory(1024, 1_512_000_000),
            memory(2048, 2_536_000_000),
        ];
        insta::assert_snapshot!(all.markdown());
    }

    #[test]
    fn the_markdown_of_losses() {
        let mut step_plain = loss();
        (step_plain.part, step_plain.workload) = ("step-plain", Workload::Step);
        step_plain.tokens = 512;
        step_plain.results.truncate(2);
        step_plain.results[1].0 = Implementation::Plain;
        insta::assert_snapshot!(loss_table(&loss()) + &step_table(&step_plain));
    }

    #[test]
    fn without_pytorch_there_is_no_ratio() {
        let text = results(vec![step(Ok(step_measurement(&[2.0], &[9.3])), None)]).markdown();
        let line = "| step | f32 | 256 (256), 2 threads | not measured |  |  |";
        assert!(text.contains(line), "{text}");
        assert!(!text.contains("not quiet"), "{text}");
    }
}
