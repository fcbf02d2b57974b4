//! Runs both sides in child processes, in turn, and keeps what they measured.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use serde::Serialize;

use super::peer::{SCRIPT, last_line};
use super::quiet::{QUIET, Usage};
use super::request::{How, Reply, Request};
use super::table::threads;

/// What is measured.
#[derive(Debug, Clone)]
pub(crate) struct Side {
    pub(crate) how: How,
    /// The Python that runs the peer; `None` for Potstill.
    python: Option<PathBuf>,
}

impl Side {
    pub(crate) fn potstill(how: How) -> Side {
        Side { how, python: None }
    }

    pub(crate) fn torch(how: How, python: PathBuf) -> Side {
        let python = Some(python);
        Side { how, python }
    }
}

/// What a side measured with one number of threads, over all of its processes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Measured {
    pub(crate) threads: usize,
    /// Of each repetition of each process.
    pub(crate) seconds: Vec<f64>,
    #[serde(skip)]
    pub(crate) check: Vec<f64>,
    #[serde(skip)]
    pub(crate) parts: Vec<(String, f64)>,
    /// The three products of the loss alone, of each repetition.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) products: Vec<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) above_bytes: Option<u64>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) note: String,
    pub(crate) before_bytes: Option<u64>,
    pub(crate) peak_bytes: Option<u64>,
    /// Of each process that ran long enough to tell, the share of the processors that went to others.
    pub(crate) others: Vec<f64>,
    pub(crate) engine: String,
}

impl Measured {
    pub(crate) fn best(&self) -> f64 {
        least(&self.seconds)
    }

    pub(crate) fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// Processes beside which others took more of the machine than a quiet one has.
    pub(crate) fn disturbed(&self) -> usize {
        self.others.iter().filter(|share| **share > QUIET).count()
    }

    fn add(&mut self, reply: Reply, others: Option<f64>) {
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

/// Measures a request on all sides, in turn so that all see the same machine: once with each number
/// of threads, then each with its best until it had `rounds` processes. What failed says why, and
/// is not tried again; neither is what takes long.
pub(crate) fn measure(
    request: &Request,
    sides: &[Side],
    threads: &[usize],
    rounds: usize,
    say: &mut dyn FnMut(&str),
) -> Vec<Result<Measured, String>> {
    let mut tried: Vec<Vec<Result<Measured, String>>> = vec![Vec::new(); sides.len()];
    for &threads in threads {
        let request = Request {
            threads,
            ..request.clone()
        };
        for (side, tried) in sides.iter().zip(&mut tried) {
            if tried.last().is_some_and(|last| !again(last, &request)) {
                continue;
            }
            let mut measured = Measured {
                threads,
                ..Measured::default()
            };
            tried.push(run(side, &request, &mut measured, say).map(|()| measured));
        }
    }
    let mut best: Vec<Result<Measured, String>> = tried.into_iter().map(fastest).collect();
    for _ in 1..rounds {
        for (side, best) in sides.iter().zip(&mut best) {
            if !again(best, request) {
                continue;
            }
            if let Ok(measured) = best {
                let request = Request {
                    threads: measured.threads,
                    ..request.clone()
                };
                if let Err(why) = run(side, &request, measured, say) {
                    *best = Err(why);
                }
            }
        }
    }
    best
}

/// Whether a side is worth another process: its repetitions are not far over the budget for all.
fn again(measured: &Result<Measured, String>, request: &Request) -> bool {
    let best = measured.as_ref().map(Measured::best);
    best.is_ok_and(|seconds| seconds <= 2.0 * request.budget_s)
}

fn fastest(tried: Vec<Result<Measured, String>>) -> Result<Measured, String> {
    let slowest_first = |a: &Result<Measured, String>, b: &Result<Measured, String>| {
        let seconds = |tried: &Result<Measured, String>| {
            let best = tried.as_ref().map(Measured::best);
            best.unwrap_or(f64::INFINITY)
        };
        seconds(b).total_cmp(&seconds(a))
    };
    let best = tried.into_iter().max_by(slowest_first);
    best.unwrap_or_else(|| Err("it was not tried".to_owned()))
}

/// One process.
fn run(
    side: &Side,
    request: &Request,
    measured: &mut Measured,
    say: &mut dyn FnMut(&str),
) -> Result<(), String> {
    let name = side.how.name();
    let begin = Usage::now();
    let request = &Request {
        how: side.how,
        ..request.clone()
    };
    let reply = ask(side, request).map_err(|error| format!("{error:#}"))?;
    let others = begin
        .zip(Usage::now())
        .and_then(|(begin, end)| begin.others_until(&end, reply.cpu_s));
    let best = least(&reply.seconds);
    let beside = match others {
        Some(share) if share > QUIET => format!(" ({:.0} % went to others)", share * 100.0),
        _ => String::new(),
    };
    let threads = threads(request.threads);
    say(&format!("{name}, {threads}: {best:.3} s{beside}"));
    measured.add(reply, others);
    Ok(())
}

fn ask(side: &Side, request: &Request) -> anyhow::Result<Reply> {
    let mut command = match &side.python {
        None => {
            let own = std::env::current_exe().context("cannot find this program's own file")?;
            let mut command = Command::new(own);
            command.args(["bench", "--child"]).arg(&request.model);
            command.env("RAYON_NUM_THREADS", request.threads.to_string());
            command
        }
        Some(python) => {
            let mut command = Command::new(python);
            command.args(["-c", SCRIPT]);
            command
        }
    };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the process that measures")?;
    let text = serde_json::to_vec(request)?;
    // Dropped at once, which ends what the child reads. One that died is told by its exit code.
    let written = child.stdin.take().map(|mut pipe| pipe.write_all(&text));
    let output = child.wait_with_output()?;
    if !output.status.success() {
        anyhow::bail!("{}", last_line(&output.stderr));
    }
    written.transpose().context("it did not read its request")?;
    serde_json::from_slice(&output.stdout).with_context(|| {
        let said = last_line(&output.stdout);
        format!("it answered what is no result: {said}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn took(threads: usize, seconds: &[f64]) -> Measured {
        Measured {
            threads,
            seconds: seconds.to_vec(),
            ..Measured::default()
        }
    }

    #[test]
    fn best_and_median_are_of_all_repetitions() {
        let measured = took(1, &[3.0, 1.0, 2.0, 5.0]);
        assert_eq!((measured.best(), measured.median()), (1.0, 2.5));
        assert_eq!(took(1, &[4.0]).median(), 4.0);
        assert!(took(1, &[]).median().is_nan());
    }

    #[test]
    fn the_best_number_of_threads_is_taken_and_a_failure_only_where_all_failed() {
        let no = || Err("no".to_owned());
        let tried = vec![Ok(took(1, &[2.0])), Ok(took(2, &[1.5, 3.0])), no()];
        assert_eq!(fastest(tried).unwrap().threads, 2);
        assert_eq!(fastest(vec![no(), no()]), no());
    }

    #[test]
    fn what_failed_or_takes_long_is_not_measured_again() {
        let text = r#"{"part":"step","model":"m","dtype":"f32","device":"cpu","threads":1,"warm_up":0,
            "repetitions":1,"budget_s":1.0,"ids":[],"support":[],"logprobs":[],"top_k":1,
            "new_tokens":1,"learning_rate":0.0,"weight_decay":0.0,"clip":0.0}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert!(again(&Ok(took(1, &[9.0, 1.5])), &request));
        assert!(!again(&Ok(took(1, &[2.5])), &request));
        assert!(!again(&Err("no".to_owned()), &request));
    }

    #[test]
    fn a_child_that_fails_says_why() {
        let side = Side::torch(How::Eager, "/nowhere/python".into());
        let text = r#"{"part":"step","model":"m","dtype":"f32","device":"cpu","threads":1,"warm_up":0,
            "repetitions":1,"budget_s":1.0,"ids":[],"support":[],"logprobs":[],"top_k":1,
            "new_tokens":1,"learning_rate":0.0,"weight_decay":0.0,"clip":0.0}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        let mut lines = Vec::new();
        let mut say = |line: &str| lines.push(line.to_owned());
        let results = measure(&request, &[side], &[1], 2, &mut say);
        let why = results.into_iter().next().unwrap().unwrap_err();
        assert!(why.starts_with("cannot start"), "{why}");
        assert!(lines.is_empty());
    }
}
