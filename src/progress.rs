//! Output of the program: progress bars on a terminal, plain lines elsewhere, events with `--json`.
//! Progress and remarks go to stderr, data goes to stdout.

// This is the one file that prints.
#![allow(clippy::print_stderr)]

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{DecimalBytes, MultiProgress, ProgressBar, ProgressStyle};

use crate::events::{Event, duration};

/// Shortest time between two plain lines about the same stage.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Shortest time between two progress events of the same stage.
const EVENT_EVERY: Duration = Duration::from_secs(1);

/// The unit of parts that are shown as an amount of data.
const BYTES: &str = "bytes";

/// A number of bytes for people, such as `2.90 GB`; a GB is 10⁹ bytes.
pub fn size(bytes: u64) -> String {
    DecimalBytes(bytes).to_string()
}

/// Amount and form of the output.
#[derive(Debug, Clone, Copy, Default)]
pub struct OutputOptions {
    /// Print details too.
    pub verbose: bool,
    /// Print errors only.
    pub quiet: bool,
    /// Print events on stdout.
    pub json: bool,
}

/// Prints the events of a run.
#[derive(Clone)]
pub struct Console {
    options: OutputOptions,
    /// Progress bars; `None` if stderr is not a terminal.
    bars: Option<MultiProgress>,
}

impl Console {
    /// A console with progress bars if stderr is a terminal.
    pub fn new(options: OutputOptions) -> Console {
        let terminal = std::io::stderr().is_terminal() && !options.quiet;
        Console {
            options,
            bars: terminal.then(MultiProgress::new),
        }
    }

    /// Prints an event: as text for people, and with `--json` as a line of JSON.
    pub fn emit(&self, event: &Event) {
        if self.options.json {
            self.print(&event.json());
        }
        match event.text() {
            Some(_) if event.is_data() && self.options.json => {}
            Some(text) if event.is_data() => self.print(&text),
            Some(text) if event.is_error() || !self.options.quiet => match &self.bars {
                Some(bars) => bars.suspend(|| eprintln!("{text}")),
                None => eprintln!("{text}"),
            },
            _ => {}
        }
    }

    /// Prints a remark.
    pub fn note(&self, text: &str) {
        let text = text.to_owned();
        self.emit(&Event::Note { text });
    }

    /// Prints a remark if `--verbose` was given.
    pub fn detail(&self, text: &str) {
        if self.options.verbose {
            self.note(text);
        }
    }

    /// Prints data on stdout.
    pub fn output(&self, text: &str) {
        let text = text.to_owned();
        self.emit(&Event::Output { text });
    }

    fn print(&self, text: &str) {
        let write = || writeln!(std::io::stdout(), "{text}");
        let written = match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        };
        match written {
            // A reader that closed the pipe, such as `head`, does not stop the run.
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
                eprintln!("error: cannot write to stdout: {e}");
                std::process::exit(1);
            }
            _ => {}
        }
    }

    /// Starts to show the progress of a stage that has `total` parts, of which earlier processes did
    /// `done`.
    pub fn progress(
        &self,
        stage: &str,
        unit: &'static str,
        done: u64,
        total: u64,
    ) -> StageProgress {
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new(total).with_position(done));
            let style = ProgressStyle::with_template(match unit {
                BYTES => "{prefix:>10} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} {msg}, {decimal_bytes_per_sec}, {eta} left",
                _ => "{prefix:>10} [{bar:30}] {pos}/{len} {msg}, {eta} left",
            });
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(stage.to_owned());
            bar.reset_eta();
            bar
        });
        let now = Instant::now();
        StageProgress {
            console: self.clone(),
            bar,
            stage: stage.to_owned(),
            unit,
            started: now,
            last_line: now,
            last_event: None,
            done_before: done,
            total,
        }
    }
}

/// Progress of a stage. Its bar is removed when this is dropped.
pub struct StageProgress {
    console: Console,
    bar: Option<ProgressBar>,
    stage: String,
    unit: &'static str,
    started: Instant,
    last_line: Instant,
    last_event: Option<Instant>,
    /// Number of parts that earlier processes did.
    done_before: u64,
    total: u64,
}

impl StageProgress {
    /// Changes the number of all parts.
    pub fn set_total(&mut self, total: u64) {
        self.total = total;
        if let Some(bar) = &self.bar {
            bar.set_length(total);
        }
    }

    /// Shows the number of parts that are done, and of tokens that this process has seen.
    pub fn update(&mut self, done: u64, tokens: u64, note: &str) {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-3);
        self.emit_event(done, tokens, seconds, note);
        let is_bytes = self.unit == BYTES;
        let mut facts = if is_bytes {
            String::new()
        } else {
            self.unit.to_owned()
        };
        if tokens > 0 {
            facts += &format!(", {:.0} tokens/s", tokens as f64 / seconds);
        }
        if !note.is_empty() {
            facts += &format!("{}{note}", if is_bytes { "" } else { ", " });
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(facts);
            }
            None if self.last_line.elapsed() >= LINE_EVERY && !self.console.options.quiet => {
                self.last_line = Instant::now();
                let done_here = done.saturating_sub(self.done_before);
                let rest = self.total.saturating_sub(done);
                let left = match done_here {
                    0 => String::new(),
                    _ => format!(
                        ", {} left",
                        duration(seconds / done_here as f64 * rest as f64)
                    ),
                };
                let (stage, total) = (&self.stage, self.total);
                if is_bytes {
                    let rate = size((done_here as f64 / seconds) as u64);
                    let (done, total) = (size(done), size(total));
                    eprintln!("{stage}: {done} of {total} {facts}, {rate}/s{left}");
                } else {
                    eprintln!("{stage}: {done}/{total} {facts}{left}");
                }
            }
            None => {}
        }
    }

    fn emit_event(&mut self, done: u64, tokens: u64, seconds: f64, note: &str) {
        let is_recent = |last: Instant| last.elapsed() < EVENT_EVERY;
        if !self.console.options.json || self.last_event.is_some_and(is_recent) {
            return;
        }
        self.last_event = Some(Instant::now());
        self.console.emit(&Event::Progress {
            stage: self.stage.clone(),
            done,
            total: self.total,
            unit: self.unit.to_owned(),
            tokens,
            seconds: (seconds * 1e3).round() / 1e3,
            note: (!note.is_empty()).then(|| note.to_owned()),
        });
    }
}

impl Drop for StageProgress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Whether questions can be asked: stdin and stderr are terminals.
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
