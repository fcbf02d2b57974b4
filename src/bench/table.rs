//! What was measured, as Markdown for people and as JSON for programs.

mod contest;

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::request::{Float, Work};
use super::sides::Measured;
pub(crate) use contest::Contest;

/// What a side measured, or why it did not.
pub(crate) type Cell = Result<Measured, String>;

/// One part in one type, on both sides.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) part: &'static str,
    /// What one repetition does, in words.
    pub(crate) what: String,
    pub(crate) work: Work,
    pub(crate) dtype: Float,
    /// That one repetition counts: read ones, or new ones where text is generated.
    pub(crate) tokens: usize,
    pub(crate) potstill: Cell,
    /// `None` without a Python that can.
    pub(crate) torch: Option<Cell>,
}

/// The peak of one text's gradient.
#[derive(Debug)]
pub(crate) struct Growth {
    pub(crate) tokens: usize,
    pub(crate) potstill: Cell,
}

/// Everything that one command measured.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// Versions, machine and model, a line each.
    pub(crate) head: Vec<String>,
    pub(crate) rows: Vec<Row>,
    /// The parts of the step, the whole first.
    pub(crate) profile: Option<Cell>,
    pub(crate) growth: Vec<Growth>,
    pub(crate) contests: Vec<Contest>,
    /// The loss alone by rows.
    pub(crate) loss_growth: Vec<Growth>,
    /// What has to be known to read the numbers.
    pub(crate) notes: Vec<String>,
}

impl Row {
    fn rate(&self, seconds: f64) -> f64 {
        self.tokens as f64 / seconds
    }

    /// How much faster Potstill is, by the best and by the median times.
    fn ratios(&self) -> Option<(f64, f64)> {
        let (ours, theirs) = (self.potstill.as_ref().ok()?, self.torch.as_ref()?);
        let theirs = theirs.as_ref().ok()?;
        let best = theirs.best() / ours.best();
        Some((best, theirs.median() / ours.median()))
    }

    /// Whether both sides computed the same, in words; the error is that they did not.
    pub(crate) fn agreement(&self) -> Option<Result<String, String>> {
        let (ours, theirs) = (self.potstill.as_ref().ok()?, self.torch.as_ref()?);
        let theirs = theirs.as_ref().ok()?;
        Some(agree(self.work, self.dtype, &ours.check, &theirs.check))
    }
}

/// Losses of the first three steps, or what each part gives to compare.
fn agree(work: Work, dtype: Float, ours: &[f64], theirs: &[f64]) -> Result<String, String> {
    let compared = match work {
        Work::Step => ours.len().min(theirs.len()).min(3),
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
    if work == Work::Decode {
        let same = pairs().filter(|(a, b)| a == b).count() as f64 / compared as f64;
        let said = format!("{:.1} % of the tokens", same * 100.0);
        // After a tie that fell the other way, the rest of an answer is another text.
        return if same > 0.5 { Ok(said) } else { Err(said) };
    }
    // Logits and gradients are as large as they are; losses and means are held to the tolerance itself.
    let scale = |value: f64| match work {
        Work::Prefill | Work::Loss => value.abs().max(1.0),
        _ => 1.0,
    };
    let differences = || pairs().map(|(a, b)| (a - b).abs() / scale(*a));
    let largest = differences().fold(0.0, f64::max);
    let numbers = |values: &[f64]| {
        let values: Vec<String> = values.iter().map(|v| format!("{v:.5}")).collect();
        values.join(", ")
    };
    let said = match work {
        Work::Step => format!("losses {} and {}", numbers(ours), numbers(theirs)),
        _ => format!("to {largest:.0e}"),
    };
    // One by one, since the largest of numbers hides one that is none.
    if differences().all(|difference| difference <= dtype.tolerance()) {
        Ok(said)
    } else {
        Err(format!("{} and {}", numbers(ours), numbers(theirs)))
    }
}

impl Table {
    /// Parts on which the two sides do not agree, with what each gave.
    pub(crate) fn disagreements(&self) -> Vec<String> {
        let of_row = |row: &Row| {
            let why = row.agreement()?.err()?;
            Some(format!("{} {}: {why}", row.part, row.dtype.name()))
        };
        let rows = self.rows.iter().filter_map(of_row);
        rows.chain(self.contests.iter().flat_map(Contest::disagreements))
            .collect()
    }

    /// What all processes measured that ran in turn with others.
    pub(crate) fn measured(&self) -> impl Iterator<Item = &Measured> {
        let rows = self.rows.iter().flat_map(|row| {
            let sides = [Some(&row.potstill), row.torch.as_ref()];
            sides.into_iter().flatten().flatten()
        });
        rows.chain(self.contests.iter().flat_map(Contest::cells))
    }

    fn disturbed(&self) -> usize {
        self.measured().map(Measured::disturbed).sum()
    }

    pub(crate) fn markdown(&self) -> String {
        let mut out = self.head.join("  \n") + "\n";
        if self.disturbed() > 0 {
            let (count, of) = (self.disturbed(), self.processes());
            let _ = write!(
                out,
                "\n**The machine was not quiet: beside {count} of {of} measuring processes, others took over 5 % of the processors.**\n"
            );
        }
        for note in &self.notes {
            let _ = write!(out, "\n{note}\n");
        }
        if !self.rows.is_empty() {
            out += &self.rates();
        }
        out += &self.peaks();
        out += &self.shares();
        out += &self.growths();
        for contest in &self.contests {
            out += &contest.markdown();
        }
        out += &self.loss_growths();
        out
    }

    fn loss_growths(&self) -> String {
        if self.loss_growth.is_empty() {
            return String::new();
        }
        let mut out = "\n| positions of the loss alone, forward and backward | memory above inputs and gradients | seconds |\n|---:|---:|---:|\n".to_owned();
        for Growth { tokens, potstill } in &self.loss_growth {
            let _ = match potstill {
                Ok(m) => writeln!(
                    out,
                    "| {tokens} | {} | {:.2} |",
                    megabytes(m.above_bytes),
                    m.best()
                ),
                Err(why) => writeln!(out, "| {tokens} | failed: {why} | |"),
            };
        }
        out
    }

    fn processes(&self) -> usize {
        self.measured().map(|measured| measured.others.len()).sum()
    }

    fn rates(&self) -> String {
        let mut out = "\n| part | type | Potstill, tokens/s | PyTorch, tokens/s | ratio | both computed the same |\n|---|---|---:|---:|---:|---|\n".to_owned();
        for row in &self.rows {
            let cell = |cell: Option<&Cell>| match cell {
                None => "not measured".to_owned(),
                Some(Err(why)) => format!("failed: {}", why.replace('|', "/")),
                Some(Ok(m)) => format!(
                    "{} ({}), {}",
                    short(row.rate(m.best())),
                    short(row.rate(m.median())),
                    threads(m.threads)
                ),
            };
            let ratio = row.ratios().map_or_else(String::new, |(best, median)| {
                format!("{best:.2} ({median:.2})")
            });
            let agreement = match row.agreement() {
                None => String::new(),
                Some(Ok(said)) => said,
                Some(Err(said)) => format!("**NO**: {said}"),
            };
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {ratio} | {agreement} |",
                row.part,
                row.dtype.name(),
                cell(Some(&row.potstill)),
                cell(row.torch.as_ref()),
            );
        }
        out += "\nThe best (median) of all repetitions, each side with its best number of threads; the two sides ran in turn, in processes of their own. One repetition is:\n\n";
        let mut said: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !said.contains(&row.part) {
                said.push(row.part);
                let _ = writeln!(out, "- {}: {}", row.part, row.what);
            }
        }
        out
    }

    fn peaks(&self) -> String {
        let mut out = String::new();
        for row in self.rows.iter().filter(|row| row.work == Work::Step) {
            let bytes = |cell: Option<&Cell>, of: fn(&Measured) -> Option<u64>| {
                cell.and_then(|cell| cell.as_ref().ok()).and_then(of)
            };
            let line = |name: &str, of: fn(&Measured) -> Option<u64>| {
                let ours = bytes(Some(&row.potstill), of);
                let theirs = bytes(row.torch.as_ref(), of);
                let ratio = ours.zip(theirs).map_or_else(String::new, |(ours, theirs)| {
                    format!("{:.2}", ours as f64 / theirs as f64)
                });
                let [ours, theirs] = [ours, theirs].map(megabytes);
                let dtype = row.dtype.name();
                format!("| {name}, {dtype} | {ours} | {theirs} | {ratio} |\n")
            };
            out += &line("the most in a step", |m| m.peak_bytes);
            out += &line("before the first step", |m| m.before_bytes);
        }
        if out.is_empty() {
            return out;
        }
        format!(
            "\n| resident memory, the whole process | Potstill | PyTorch | ratio |\n|---|---:|---:|---:|\n{out}"
        )
    }

    fn shares(&self) -> String {
        let measured = match &self.profile {
            None => return String::new(),
            Some(Err(why)) => return format!("\nThe profile of the step failed: {why}\n"),
            Some(Ok(measured)) => measured,
        };
        let whole = measured.parts.first().map_or(1.0, |(_, seconds)| *seconds);
        let mut out = format!(
            "\n| part of Potstill's step, f32, {} | ms | share |\n|---|---:|---:|\n",
            threads(measured.threads)
        );
        for (name, seconds) in &measured.parts {
            let share = 100.0 * seconds / whole;
            let _ = writeln!(out, "| {name} | {:.1} | {share:.1} % |", seconds * 1e3);
        }
        out
    }

    fn growths(&self) -> String {
        if self.growth.is_empty() {
            return String::new();
        }
        let mut out =
            "\n| tokens of one text, forward and backward, f32 | before | peak | more a token | seconds |\n|---:|---:|---:|---:|---:|\n"
                .to_owned();
        let mut slopes = Vec::new();
        let mut last: Option<(usize, u64)> = None;
        for Growth { tokens, potstill } in &self.growth {
            let measured = match potstill {
                Ok(measured) => measured,
                Err(why) => {
                    let _ = writeln!(out, "| {tokens} | failed: {why} | | | |");
                    continue;
                }
            };
            let mut slope = String::new();
            if let (Some((before, less)), Some(peak)) = (last, measured.peak_bytes) {
                let more = (peak as f64 - less as f64) / (tokens - before).max(1) as f64;
                slopes.push(more);
                slope = format!("{:.0} KB", more / 1e3);
            }
            last = measured.peak_bytes.map(|peak| (*tokens, peak));
            let [before, peak] = [measured.before_bytes, measured.peak_bytes].map(megabytes);
            let seconds = measured.best();
            let _ = writeln!(
                out,
                "| {tokens} | {before} | {peak} | {slope} | {seconds:.2} |"
            );
        }
        let least = slopes.iter().copied().fold(f64::INFINITY, f64::min);
        let most = slopes.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if slopes.len() >= 2 {
            let _ = write!(
                out,
                "\nA token more costs from {:.0} to {:.0} KB over these lengths.\n",
                least / 1e3,
                most / 1e3
            );
        }
        out
    }

    pub(crate) fn json(&self) -> String {
        let grown = |g: &Growth| json!({ "tokens": g.tokens, "potstill": value(&g.potstill, g.tokens as f64) });
        let growth = self.growth.iter().map(grown);
        let loss_growth = self.loss_growth.iter().map(grown);
        let profile = self.profile.as_ref().map(|cell| match cell {
            Err(why) => json!({ "failed": why }),
            Ok(measured) => {
                let part =
                    |(name, seconds): &(String, f64)| json!({ "part": name, "seconds": seconds });
                let parts: Vec<Value> = measured.parts.iter().map(part).collect();
                json!({ "threads": measured.threads, "parts": parts })
            }
        });
        json!({
            "head": self.head,
            "notes": self.notes,
            "disturbed": self.disturbed(),
            "rows": self.rows.iter().map(Row::json).collect::<Vec<Value>>(),
            "profile": profile,
            "memory": growth.collect::<Vec<Value>>(),
            "contests": self.contests.iter().map(Contest::json).collect::<Vec<Value>>(),
            "loss_memory": loss_growth.collect::<Vec<Value>>(),
        })
        .to_string()
    }
}

impl Row {
    fn json(&self) -> Value {
        let tokens = self.tokens as f64;
        let agreement = self.agreement();
        json!({
            "part": self.part,
            "dtype": self.dtype.name(),
            "what": self.what,
            "tokens": self.tokens,
            "potstill": value(&self.potstill, tokens),
            "torch": self.torch.as_ref().map(|cell| value(cell, tokens)),
            "ratio": self.ratios().map(|(best, _)| best),
            "ratio_of_medians": self.ratios().map(|(_, median)| median),
            "same": agreement.as_ref().map(Result::is_ok),
        })
    }
}

fn value(cell: &Cell, tokens: f64) -> Value {
    match cell {
        Err(why) => json!({ "failed": why }),
        Ok(measured) => {
            let mut value = json!(measured);
            value["tokens_per_second"] = json!(tokens / measured.best());
            value
        }
    }
}

pub(crate) fn threads(count: usize) -> String {
    match count {
        1 => "1 thread".to_owned(),
        _ => format!("{count} threads"),
    }
}

/// Three digits, or all before the point.
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
mod tests;
