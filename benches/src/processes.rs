//! Runs measuring processes, one implementation after the other, and collects their results.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use serde::Serialize;

use crate::machine::{DISTURBED_SHARE, ProcessorTime};
use crate::python::{SCRIPT, last_line};
use crate::request::{Implementation, MeasurementReply, MeasurementRequest};

/// An implementation and the program that runs it.
#[derive(Debug, Clone)]
pub(crate) struct Runner {
    pub(crate) implementation: Implementation,
    /// Python that runs the PyTorch script; `None` for Potstill.
    python: Option<PathBuf>,
}

impl Runner {
    pub(crate) fn potstill(implementation: Implementation) -> Runner {
        Runner {
            implementation,
            python: None,
        }
    }

    pub(crate) fn pytorch(implementation: Implementation, python: PathBuf) -> Runner {
        Runner {
            implementation,
            python: Some(python),
        }
    }

    /// Runs one measuring process to its end.
    fn run(&self, request: &MeasurementRequest) -> anyhow::Result<MeasurementReply> {
        let mut command = match &self.python {
            None => {
                let own = std::env::current_exe().context("cannot find this program's own file")?;
                let mut command = Command::new(own);
                command.arg("--worker").arg(&request.model);
                command.env("RAYON_NUM_THREADS", request.threads.to_string());
                command
            }
            Some(python) => {
                let mut command = Command::new(python);
                command.args(["-c", SCRIPT]);
                command
            }
        };
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start the measuring process")?;
        let text = serde_json::to_vec(request)?;
        // The pipe is dropped after the write, which ends the process's input. If the process died, its
        // exit code says more than the failed write.
        let written = process.stdin.take().map(|mut pipe| pipe.write_all(&text));
        let output = process.wait_with_output()?;
        if !output.status.success() {
            anyhow::bail!("{}", last_line(&output.stderr));
        }
        written
            .transpose()
            .context("the measuring process did not read its request")?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            let line = last_line(&output.stdout);
            format!("the measuring process wrote an invalid reply: {line}")
        })
    }
}

/// Results of one implementation with one number of threads, over all of its processes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Measurement {
    pub(crate) threads: usize,
    /// Seconds of each repetition of each process.
    pub(crate) seconds: Vec<f64>,
    #[serde(skip)]
    pub(crate) check: Vec<f64>,
    #[serde(skip)]
    pub(crate) parts: Vec<(String, f64)>,
    /// Seconds of the three products of the loss alone, for each repetition.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) products: Vec<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) above_bytes: Option<u64>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) note: String,
    pub(crate) before_bytes: Option<u64>,
    pub(crate) peak_bytes: Option<u64>,
    /// Share of the processors that other programs used, for each process that ran long enough to tell.
    pub(crate) others: Vec<f64>,
    pub(crate) engine: String,
}

/// A measurement, or why there is none.
pub(crate) type MeasurementResult = Result<Measurement, String>;

impl Measurement {
    pub(crate) fn best(&self) -> f64 {
        least(&self.seconds)
    }

    pub(crate) fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// Number of processes beside which other programs used more than [`DISTURBED_SHARE`].
    pub(crate) fn disturbed(&self) -> usize {
        let disturbed = |share: &&f64| **share > DISTURBED_SHARE;
        self.others.iter().filter(disturbed).count()
    }

    /// Runs one more process and adds its results.
    fn add(
        &mut self,
        runner: &Runner,
        request: &MeasurementRequest,
        progress: &mut dyn FnMut(&str),
    ) -> Result<(), String> {
        let request = &MeasurementRequest {
            threads: self.threads,
            implementation: runner.implementation,
            ..request.clone()
        };
        let begin = ProcessorTime::now();
        let reply = runner.run(request).map_err(|error| format!("{error:#}"))?;
        let others = begin
            .zip(ProcessorTime::now())
            .and_then(|(begin, end)| begin.others_until(&end, reply.cpu_s));
        let disturbance = match others {
            Some(share) if share > DISTURBED_SHARE => {
                format!(" (other programs used {:.0} %)", share * 100.0)
            }
            _ => String::new(),
        };
        progress(&format!(
            "{}, {}: {:.3} s{disturbance}",
            runner.implementation.name(),
            thread_count(self.threads),
            least(&reply.seconds)
        ));
        self.add_reply(reply, others);
        Ok(())
    }

    fn add_reply(&mut self, reply: MeasurementReply, others: Option<f64>) {
        self.seconds.extend(reply.seconds);
        self.others.extend(others);
        self.peak_bytes = self.peak_bytes.max(reply.peak_bytes);
        self.before_bytes = self.before_bytes.max(reply.before_bytes);
        self.above_bytes = self.above_bytes.max(reply.above_bytes);
        self.products.extend(reply.products);
        self.engine = reply.engine;
        self.note = reply.note;
        if self.check.is_empty() {
            self.check = reply.check;
        }
        if self.parts.len() == reply.parts.len() {
            for ((_, least), (_, seconds)) in self.parts.iter_mut().zip(reply.parts) {
                *least = least.min(seconds);
            }
        } else {
            self.parts = reply.parts;
        }
    }
}

pub(crate) fn least(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(f64::INFINITY, f64::min)
}

pub(crate) fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2).copied();
    let lower = sorted.get(sorted.len().saturating_sub(1) / 2).copied();
    match (lower, upper) {
        (Some(lower), Some(upper)) => (lower + upper) / 2.0,
        _ => f64::NAN,
    }
}

pub(crate) fn thread_count(count: usize) -> String {
    match count {
        1 => "1 thread".to_owned(),
        _ => format!("{count} threads"),
    }
}

/// Measures a request with all runners, in turn so that all see the same state of the machine.
///
/// First each runs once with each number of threads; then each runs with its best number until it had
/// `rounds` processes. A runner that failed, or that takes long, is not run again.
pub(crate) fn measure(
    request: &MeasurementRequest,
    runners: &[Runner],
    threads: &[usize],
    rounds: usize,
    progress: &mut dyn FnMut(&str),
) -> Vec<MeasurementResult> {
    let mut attempts: Vec<Vec<MeasurementResult>> = vec![Vec::new(); runners.len()];
    for &threads in threads {
        for (runner, attempts) in runners.iter().zip(&mut attempts) {
            if attempts.last().is_some_and(|last| !repeats(last, request)) {
                continue;
            }
            let mut measurement = Measurement {
                threads,
                ..Measurement::default()
            };
            let added = measurement.add(runner, request, progress);
            attempts.push(added.map(|()| measurement));
        }
    }
    let mut results: Vec<MeasurementResult> = attempts.into_iter().map(fastest).collect();
    for _ in 1..rounds {
        for (runner, result) in runners.iter().zip(&mut results) {
            if !repeats(result, request) {
                continue;
            }
            if let Ok(measurement) = result
                && let Err(why) = measurement.add(runner, request, progress)
            {
                *result = Err(why);
            }
        }
    }
    results
}

/// Whether to run another process: the best repetition is at most twice the time budget.
fn repeats(result: &MeasurementResult, request: &MeasurementRequest) -> bool {
    let best = result.as_ref().map(Measurement::best);
    best.is_ok_and(|seconds| seconds <= 2.0 * request.budget_s)
}

/// The attempt with the best repetition; a failure only if all failed.
fn fastest(attempts: Vec<MeasurementResult>) -> MeasurementResult {
    let seconds = |result: &MeasurementResult| {
        let best = result.as_ref().map(Measurement::best);
        best.unwrap_or(f64::INFINITY)
    };
    let fastest = attempts
        .into_iter()
        .min_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    fastest.unwrap_or_else(|| Err("it was not tried".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::tests::loss_request;

    fn measurement(threads: usize, seconds: &[f64]) -> Measurement {
        Measurement {
            threads,
            seconds: seconds.to_vec(),
            ..Measurement::default()
        }
    }

    #[test]
    fn best_and_median_are_over_all_repetitions() {
        let measured = measurement(1, &[3.0, 1.0, 2.0, 5.0]);
        assert_eq!((measured.best(), measured.median()), (1.0, 2.5));
        assert_eq!(measurement(1, &[4.0]).median(), 4.0);
        assert!(measurement(1, &[]).median().is_nan());
    }

    #[test]
    fn the_best_number_of_threads_is_taken_and_a_failure_only_if_all_failed() {
        let failure = || Err("no".to_owned());
        let attempts = vec![
            Ok(measurement(1, &[2.0])),
            Ok(measurement(2, &[1.5, 3.0])),
            failure(),
        ];
        assert_eq!(fastest(attempts).unwrap().threads, 2);
        assert_eq!(fastest(vec![failure(), failure()]), failure());
    }

    #[test]
    fn a_failed_or_long_measurement_is_not_repeated() {
        let request = loss_request();
        assert!(repeats(&Ok(measurement(1, &[9.0, 1.5])), &request));
        assert!(!repeats(&Ok(measurement(1, &[2.5])), &request));
        assert!(!repeats(&Err("no".to_owned()), &request));
    }

    #[test]
    fn a_process_that_does_not_start_says_why() {
        let runner = Runner::pytorch(Implementation::Eager, "/nowhere/python".into());
        let mut lines = Vec::new();
        let mut progress = |line: &str| lines.push(line.to_owned());
        let results = measure(&loss_request(), &[runner], &[1], 2, &mut progress);
        let why = results.into_iter().next().unwrap().unwrap_err();
        assert!(why.starts_with("cannot start"), "{why}");
        assert!(lines.is_empty());
    }
}
