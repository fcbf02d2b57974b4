//! What is said while a run goes on: bars on a terminal, plain lines elsewhere, events
//! with `--json`. Console goes to stderr; stdout carries what was asked for.

// This is the one place that prints.
#![allow(clippy::print_stderr)]

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::events::Event;

/// Between two plain lines about the same work.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Between two events about the same work.
const EVENT_EVERY: Duration = Duration::from_secs(1);

/// How much is said, and in which form.
#[derive(Debug, Clone, Copy, Default)]
pub struct OutputOptions {
    /// Say more.
    pub verbose: bool,
    /// Say errors only.
    pub quiet: bool,
    /// Put events on stdout.
    pub json: bool,
}

/// Where a run's talk goes.
#[derive(Clone)]
pub struct Console {
    output: OutputOptions,
    /// On a terminal only.
    bars: Option<MultiProgress>,
}

impl Console {
    /// Bars if stderr is a terminal.
    pub fn new(output: OutputOptions) -> Console {
        let terminal = std::io::stderr().is_terminal() && !output.quiet;
        Console {
            output,
            bars: terminal.then(MultiProgress::new),
        }
    }

    /// Says that something happened: to people, and with `--json` as an event.
    pub fn say(&self, event: &Event) {
        if self.output.json {
            self.stdout(&event.json());
        }
        match event.line() {
            Some(_) if event.is_data() && self.output.json => {}
            Some(line) if event.is_data() => self.stdout(&line),
            Some(line) if event.is_error() || !self.output.quiet => match &self.bars {
                Some(bars) => bars.suspend(|| eprintln!("{line}")),
                None => eprintln!("{line}"),
            },
            _ => {}
        }
    }

    /// Says a line.
    pub fn line(&self, text: &str) {
        let text = text.to_owned();
        self.say(&Event::Note { text });
    }

    /// Says a line that only `-v` asks for.
    pub fn detail(&self, text: &str) {
        if self.output.verbose {
            self.line(text);
        }
    }

    /// Puts data on stdout.
    pub fn data(&self, text: &str) {
        let text = text.to_owned();
        self.say(&Event::Output { text });
    }

    fn stdout(&self, text: &str) {
        let write = || writeln!(std::io::stdout(), "{text}");
        let written = match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        };
        match written {
            // A reader that has seen enough is no reason to stop.
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
                eprintln!("error: cannot write to stdout: {e}");
                std::process::exit(1);
            }
            _ => {}
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
            console: self.clone(),
            bar,
            stage: stage.to_owned(),
            unit,
            began: now,
            said: now,
            told: None,
            before: done,
            done,
            total,
            tokens: 0,
        }
    }
}

/// Work that is shown while it goes on. Dropping it takes its bar away.
pub struct Work {
    console: Console,
    bar: Option<ProgressBar>,
    stage: String,
    unit: &'static str,
    began: Instant,
    said: Instant,
    /// When the last event was.
    told: Option<Instant>,
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
        self.tell(seconds, note);
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
            None if self.said.elapsed() >= LINE_EVERY && !self.console.output.quiet => {
                self.said = Instant::now();
                let left = left(seconds, done - self.before, self.total.saturating_sub(done));
                eprintln!("{}: {done}/{} {facts}{left}", self.stage, self.total);
            }
            None => {}
        }
    }

    /// With `--json`: the first, and then one a second.
    fn tell(&mut self, seconds: f64, note: &str) {
        let soon = self.told.is_some_and(|told| told.elapsed() < EVENT_EVERY);
        if !self.console.output.json || soon {
            return;
        }
        self.told = Some(Instant::now());
        self.console.emit(&Event::Progress {
            stage: self.stage.clone(),
            done: self.done,
            total: self.total,
            unit: self.unit.to_owned(),
            tokens: self.tokens,
            seconds: (seconds * 1e3).round() / 1e3,
            note: (!note.is_empty()).then(|| note.to_owned()),
        });
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

/// Whether somebody sits before the terminal who can be asked.
pub fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Whether text on stdout may have colours.
pub fn colours() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stdout().is_terminal() && !refused
}

/// Asks a question on the terminal; an empty answer takes the default.
///
/// # Errors
/// When the terminal gives no answer.
pub fn ask(question: &str, default: Option<&str>) -> anyhow::Result<String> {
    match default {
        Some(default) => eprint!("{question} [{default}]: "),
        None => eprint!("{question}: "),
    }
    let mut answer = String::new();
    let read = std::io::stdin().read_line(&mut answer);
    if read.context("cannot read the answer")? == 0 {
        anyhow::bail!("no answer was given, so nothing was written");
    }
    let answer = answer.trim();
    Ok(match answer.is_empty() {
        true => default.unwrap_or_default().to_owned(),
        false => answer.to_owned(),
    })
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
