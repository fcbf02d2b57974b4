//! What is said while a run goes on: bars on a terminal, plain lines elsewhere. All of
//! it goes to stderr; stdout carries what was asked for.

// This is the one place that prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Between two plain lines about the same work.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Where a run's talk goes.
#[derive(Clone)]
pub struct Talk {
    verbose: bool,
    /// On a terminal only.
    bars: Option<MultiProgress>,
}

impl Talk {
    /// Bars if stderr is a terminal; `verbose` lets [`Talk::detail`] through.
    pub fn new(verbose: bool) -> Talk {
        let terminal = std::io::stderr().is_terminal();
        Talk {
            verbose,
            bars: terminal.then(MultiProgress::new),
        }
    }

    /// Says a line.
    pub fn line(&self, text: &str) {
        match &self.bars {
            Some(bars) => bars.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Says a line that only `-v` asks for.
    pub fn detail(&self, text: &str) {
        if self.verbose {
            self.line(text);
        }
    }

    /// Puts data on stdout.
    pub fn data(&self, text: &str) {
        match &self.bars {
            Some(bars) => bars.suspend(|| println!("{text}")),
            None => println!("{text}"),
        }
    }

    /// Begins to show work of `total` parts, `done` of which were done before.
    pub fn work(&self, stage: &str, unit: &'static str, done: u64, total: u64) -> Work {
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new(total).with_position(done));
            let style = ProgressStyle::with_template(
                "{prefix:>10} [{bar:30}] {pos}/{len} {msg}, {eta} left",
            );
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(stage.to_owned());
            bar.reset_eta();
            bar
        });
        let now = Instant::now();
        Work {
            talk: self.clone(),
            bar,
            stage: stage.to_owned(),
            unit,
            began: now,
            said: now,
            before: done,
            done,
            total,
            tokens: 0,
        }
    }
}

/// Work that is shown while it goes on. Dropping it takes its bar away.
pub struct Work {
    talk: Talk,
    bar: Option<ProgressBar>,
    stage: String,
    unit: &'static str,
    began: Instant,
    said: Instant,
    /// Parts that were done before this process began.
    before: u64,
    done: u64,
    total: u64,
    tokens: u64,
}

impl Work {
    /// Shows how far it is: parts done, and tokens so far in this process.
    pub fn show(&mut self, done: u64, tokens: u64, note: &str) {
        (self.done, self.tokens) = (done, tokens);
        let seconds = self.began.elapsed().as_secs_f64().max(1e-3);
        let mut facts = self.unit.to_owned();
        if tokens > 0 {
            facts += &format!(", {:.0} tokens/s", tokens as f64 / seconds);
        }
        if !note.is_empty() {
            facts += &format!(", {note}");
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(facts);
            }
            None if self.said.elapsed() >= LINE_EVERY => {
                self.said = Instant::now();
                let left = left(seconds, done - self.before, self.total.saturating_sub(done));
                self.talk.line(&format!(
                    "{}: {done}/{} {facts}{left}",
                    self.stage, self.total
                ));
            }
            None => {}
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn left(seconds: f64, done: u64, rest: u64) -> String {
    if done == 0 {
        return String::new();
    }
    format!(", {} left", duration(seconds / done as f64 * rest as f64))
}

/// Seconds as a person says them.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 if seconds < 9.95 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::duration;

    #[test]
    fn durations_read_well() {
        let said: Vec<String> = [0.04, 9.94, 9.96, 59.6, 61.0, 7322.0]
            .map(duration)
            .to_vec();
        assert_eq!(
            said,
            [
                "0.0 s",
                "9.9 s",
                "10 s",
                "1 min 0 s",
                "1 min 1 s",
                "2 h 2 min"
            ]
        );
    }
}
