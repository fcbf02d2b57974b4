//! Several ways to compute one loss, beside one another: the loss alone, and steps with it.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Cell, agree, megabytes, short, value};
use crate::bench::request::{Float, How, LossShape, Work};
use crate::bench::sides::{Measured, least, median};

/// One request, computed in several ways.
#[derive(Debug)]
pub(crate) struct Contest {
    pub(crate) part: &'static str,
    /// What one repetition does, in words.
    pub(crate) what: String,
    pub(crate) work: Work,
    pub(crate) dtype: Float,
    /// Of a step.
    pub(crate) tokens: usize,
    pub(crate) shape: LossShape,
    /// Potstill first.
    pub(crate) sides: Vec<(How, Cell)>,
}

/// Potstill against the better of PyTorch's forms, by the time of the whole op.
#[derive(Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) other: How,
    /// How many times as fast Potstill is, by the best and by the median times.
    pub(crate) whole: [f64; 2],
    /// Potstill's time outside the products, as a share of the other's; likewise.
    pub(crate) outside: [f64; 2],
    /// Potstill's memory above inputs and gradients, as a share of the other's.
    pub(crate) memory: Option<f64>,
}

/// Seconds of the whole op less those of its products, by the best and by the median times.
fn outside(measured: &Measured) -> [f64; 2] {
    [least, median].map(|of| of(&measured.seconds) - of(&measured.products))
}

impl LossShape {
    /// Of a product, 2·n·d·v.
    fn operations(self) -> f64 {
        2.0 * self.rows as f64 * self.width as f64 * self.vocab as f64
    }

    /// Of the logits that the kernels' passes are measured on.
    fn chunk_bytes(self, dtype: Float) -> f64 {
        (self.rows.min(self.chunk_rows) * self.vocab * dtype.bytes()) as f64
    }
}

impl Contest {
    fn measured(&self) -> impl Iterator<Item = (How, &Measured)> {
        let sides = self.sides.iter();
        sides.filter_map(|(how, cell)| Some((*how, cell.as_ref().ok()?)))
    }

    pub(crate) fn cells(&self) -> impl Iterator<Item = &Measured> {
        self.measured().map(|(_, measured)| measured)
    }

    pub(crate) fn verdict(&self) -> Option<Verdict> {
        let (_, ours) = self.measured().find(|(how, _)| *how == How::Fused)?;
        let forms = self
            .measured()
            .filter(|(how, _)| [How::Eager, How::Compile].contains(how));
        let (other, theirs) = forms.min_by(|(_, a), (_, b)| a.best().total_cmp(&b.best()))?;
        let [mine, its] = [ours, theirs].map(outside);
        let bytes = ours.above_bytes.zip(theirs.above_bytes);
        Some(Verdict {
            other,
            whole: [theirs.best() / ours.best(), theirs.median() / ours.median()],
            outside: [mine[0] / its[0], mine[1] / its[1]],
            memory: bytes.map(|(mine, its)| mine as f64 / its as f64),
        })
    }

    /// Whether a side computed what the first did; `None` for the first, and where there is nothing to compare.
    fn agreement(&self, index: usize) -> Option<Result<String, String>> {
        let (_, ours) = self.sides.first()?;
        let (how, theirs) = self.sides.get(index).filter(|_| index > 0)?;
        let (ours, theirs) = (ours.as_ref().ok()?, theirs.as_ref().ok()?);
        how.same_loss()
            .then(|| agree(self.work, self.dtype, &ours.check, &theirs.check))
    }

    pub(crate) fn disagreements(&self) -> Vec<String> {
        let of_side = |index: usize| {
            let why = self.agreement(index)?.err()?;
            let (how, _) = self.sides.get(index)?;
            let (part, dtype) = (self.part, self.dtype.name());
            Some(format!("{part} {dtype}, {}: {why}", how.name()))
        };
        (0..self.sides.len()).filter_map(of_side).collect()
    }

    pub(crate) fn markdown(&self) -> String {
        match self.work {
            Work::Loss => self.loss(),
            _ => self.step(),
        }
    }

    /// A line for each side, of what `cells` gives for what it measured.
    fn lines(&self, columns: usize, cells: impl Fn(How, &Measured) -> String) -> String {
        let mut out = String::new();
        for (index, (how, cell)) in self.sides.iter().enumerate() {
            let agreement = match self.agreement(index) {
                None => String::new(),
                Some(Ok(said)) => said,
                Some(Err(said)) => format!("**NO**: {said}"),
            };
            let name = how.name();
            let _ = match cell {
                Ok(measured) => {
                    writeln!(out, "| {name} | {} | {agreement} |", cells(*how, measured))
                }
                Err(why) => {
                    let empty = " |".repeat(columns);
                    writeln!(out, "| {name} | failed: {}{empty} |", why.replace('|', "/"))
                }
            };
        }
        out
    }

    fn step(&self) -> String {
        let tokens = self.tokens as f64;
        let lines = self.lines(3, |_, m| {
            let rates = format!(
                "{} ({})",
                short(tokens / m.best()),
                short(tokens / m.median())
            );
            let [most, before] = [m.peak_bytes, m.before_bytes].map(megabytes);
            format!("{rates} | {most} | {before}")
        });
        format!(
            "\n| step, {} | tokens/s | the most memory in a step | before the first | losses |\n|---|---:|---:|---:|---|\n{lines}\nThe best (median) of all repetitions, on all cores; memory is that of the whole process. One repetition is: {}\n",
            self.dtype.name(),
            self.what
        )
    }

    fn loss(&self) -> String {
        let lines = self.lines(6, |how, m| {
            let work = self.shape.operations() * how.products() as f64;
            let seconds = |of: fn(&[f64]) -> f64| {
                let (whole, products) = (of(&m.seconds), of(&m.products));
                [whole, products, whole - products]
            };
            let (best, middle) = (seconds(least), seconds(median));
            let times: Vec<String> = best
                .iter()
                .zip(middle)
                .map(|(best, median)| format!("{best:.3} ({median:.3})"))
                .collect();
            format!(
                "{} | {} | {:.0} | {:.0}",
                times.join(" | "),
                megabytes(m.above_bytes),
                work / 1e9,
                work / 1e9 / least(&m.products)
            )
        });
        let mut out = format!(
            "\n| loss, {} | whole, s | its products alone, s | outside them, s | memory above inputs and gradients | products' GFLOP | their GFLOP/s | computed the same |\n|---|---:|---:|---:|---:|---:|---:|---|\n{lines}\nThe best (median) of all repetitions, on all cores; op and products ran in turn in one process. One repetition is: {}\n",
            self.dtype.name(),
            self.what
        );
        if let Some(verdict) = self.verdict() {
            let memory = verdict.memory.map_or_else(
                || "memory not known".to_owned(),
                |share| format!("{share:.2} of its memory"),
            );
            let _ = write!(
                out,
                "\nPotstill against {}, the faster of PyTorch's two: {:.2} ({:.2}) times as fast, {:.2} ({:.2}) of its time outside the products, {memory}.\n",
                verdict.other.name(),
                verdict.whole[0],
                verdict.whole[1],
                verdict.outside[0],
                verdict.outside[1],
            );
        }
        for (how, measured) in self.measured() {
            out += &self.passes(how, measured);
            if !measured.note.is_empty() {
                let _ = write!(out, "\n{}: {}\n", how.name(), measured.note);
            }
        }
        out
    }

    /// Bytes a second of each pass over a chunk of logits, beside those of a copy.
    fn rates(&self, measured: &Measured) -> Vec<(String, f64, f64)> {
        let bytes = self.shape.chunk_bytes(self.dtype);
        let rate = |(name, seconds): &(String, f64)| {
            // The statistics are read off; the others read and write.
            let passes = if name == "statistics" { 1.0 } else { 2.0 };
            (name.clone(), *seconds, passes * bytes / seconds)
        };
        measured.parts.iter().map(rate).collect()
    }

    fn passes(&self, how: How, measured: &Measured) -> String {
        let rates = self.rates(measured);
        if rates.is_empty() {
            return String::new();
        }
        let copy = rates.iter().find(|(name, ..)| name == "copy");
        let share = |rate: f64| match copy {
            Some((_, _, copy)) if rate != *copy => format!(", {:.2} of the copy's", rate / copy),
            _ => String::new(),
        };
        let said: Vec<String> = rates
            .iter()
            .map(|(name, seconds, rate)| {
                let (ms, gb) = (seconds * 1e3, rate / 1e9);
                format!("{name} {ms:.2} ms, {gb:.1} GB/s{}", share(*rate))
            })
            .collect();
        let chunk = self.shape.rows.min(self.shape.chunk_rows);
        format!(
            "\n{}, passes over {chunk} × {} logits: {}.\n",
            how.name(),
            self.shape.vocab,
            said.join("; ")
        )
    }

    pub(crate) fn json(&self) -> Value {
        let side = |(index, (how, cell)): (usize, &(How, Cell))| {
            let mut side = value(cell, self.tokens as f64);
            side["how"] = json!(how);
            side["same"] = json!(self.agreement(index).map(|a| a.is_ok()));
            if let (Work::Loss, Ok(measured)) = (self.work, cell) {
                side["tokens_per_second"] = json!(self.shape.rows as f64 / measured.best());
                side["outside_seconds"] = json!(outside(measured));
                side["product_operations"] = json!(self.shape.operations() * how.products() as f64);
                let rates = self.rates(measured).into_iter();
                let rates = rates.map(|(name, seconds, rate)| json!({ "pass": name, "seconds": seconds, "bytes_per_second": rate }));
                side["passes"] = rates.collect();
            }
            side
        };
        let verdict = self.verdict().filter(|_| self.work == Work::Loss);
        json!({
            "part": self.part,
            "dtype": self.dtype.name(),
            "what": self.what,
            "shape": (self.work == Work::Loss).then_some(self.shape),
            "sides": self.sides.iter().enumerate().map(side).collect::<Vec<Value>>(),
            "against": verdict.map(|v| json!({
                "how": v.other, "ratio": v.whole, "outside": v.outside, "memory": v.memory,
            })),
        })
    }
}

#[cfg(test)]
mod tests;
