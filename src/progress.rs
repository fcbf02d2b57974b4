//! Output of the program: progress lines on a terminal, plain lines elsewhere, events with `--json`.
//! Progress and remarks go to stderr, data goes to stdout.
//!
//! This is the one file that prints, so every text passes through [`visible`] or [`visible_line`] here: names, answers
//! and messages that come from outside cannot control the terminal.

use std::io::{ErrorKind, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{DecimalBytes, MultiProgress, ProgressBar, ProgressStyle};
use potstill_datasets::{visible, visible_json, visible_line};

use crate::events::{Event, duration};

mod line;

use line::terminal_line;

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
    /// Print errors, and of the rest only the data that the command was asked for.
    pub quiet: bool,
    /// Print events on stdout.
    pub json: bool,
}

/// Prints the events of a run.
#[derive(Clone)]
pub struct Console {
    options: OutputOptions,
    /// Progress lines; `None` if stderr is not a terminal.
    bars: Option<MultiProgress>,
}

impl Console {
    /// A console with progress lines if stderr is a terminal.
    pub fn new(options: OutputOptions) -> Console {
        let terminal = std::io::stderr().is_terminal() && !options.quiet;
        Console {
            options,
            bars: terminal.then(MultiProgress::new),
        }
    }

    /// Prints an event: as text for people, and with `--json` as a line of JSON.
    pub fn emit(&self, event: &Event) {
        let OutputOptions { json, quiet, .. } = self.options;
        if json {
            self.print(&visible_json(&event.json()));
        }
        let Some(text) = event.text() else {
            return;
        };
        let is_shown = match event {
            Event::Error { .. } => true,
            Event::Output { .. } => !json,
            Event::Verdict { .. } => !json && !quiet,
            _ => !quiet,
        };
        match is_shown {
            true if event.is_data() => self.print(&visible(&text)),
            true => self.say(&text),
            false => {}
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

    /// Prints data on stdout with colours. Each part is text with the codes of its style, or without a style.
    pub(crate) fn styled(&self, parts: &[(Option<&'static str>, String)]) {
        let shown = parts.iter().map(|(codes, text)| match codes {
            Some(codes) => format!("\u{1b}[{codes}m{}\u{1b}[0m", visible(text)),
            None => visible(text).into_owned(),
        });
        self.print(&shown.collect::<String>());
    }

    /// Writes lines to stderr, above the progress lines.
    fn say(&self, text: &str) {
        match &self.bars {
            Some(bars) => bars.suspend(|| say(text)),
            None => say(text),
        }
    }

    /// Writes text that is safe to show to stdout.
    fn print(&self, text: &str) {
        let write = || writeln!(std::io::stdout(), "{text}");
        let written = match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        };
        match written {
            // A reader that closed the pipe, such as `head`, does not stop the run.
            Err(e) if e.kind() != ErrorKind::BrokenPipe => {
                self.say(&format!(
                    "error: cannot write to stdout: {e}\nhint: finished work is kept, and the same command resumes"
                ));
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
            let bar = bars.add(ProgressBar::new(total));
            // The template cuts the line at the width that the terminal has when it is drawn.
            let style = ProgressStyle::with_template("{wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
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

/// Progress of a stage. Its line is removed when this is dropped.
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
    }

    /// Shows the number of parts that are done, and of tokens that this process has seen.
    pub fn update(&mut self, done: u64, tokens: u64, note: &str) {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-3);
        self.emit_event(done, tokens, seconds, note);
        if let Some(bar) = &self.bar {
            let share = (self.total > 0).then(|| done as f64 / self.total as f64);
            let note = (!note.is_empty()).then(|| note.to_owned());
            let rate = self.rate(done, tokens, seconds);
            let facts: Vec<String> = rate.into_iter().chain(note).collect();
            let left = self.left(done, seconds);
            let line = terminal_line(&self.stage, share, &self.parts(done, "/"), left, &facts);
            bar.set_message(visible_line(&line).into_owned());
        } else if self.last_line.elapsed() >= LINE_EVERY && !self.console.options.quiet {
            self.last_line = Instant::now();
            let between = if self.unit == BYTES { " of " } else { "/" };
            let mut facts = vec![self.parts(done, between)];
            facts.extend(self.rate(done, tokens, seconds));
            facts.extend((!note.is_empty()).then(|| note.to_owned()));
            facts.extend(self.left(done, seconds));
            say(&visible_line(&format!(
                "{}: {}",
                self.stage,
                facts.join(", ")
            )));
        }
    }

    /// Describes how many parts are done, such as `12/40 answers`.
    fn parts(&self, done: u64, between: &str) -> String {
        match self.unit {
            BYTES => format!("{}{between}{}", size(done), size(self.total)),
            unit => format!("{done}{between}{} {unit}", self.total),
        }
    }

    /// Describes the speed of this process; `None` where neither bytes nor tokens are counted.
    fn rate(&self, done: u64, tokens: u64, seconds: f64) -> Option<String> {
        let done_here = done.saturating_sub(self.done_before);
        match self.unit {
            BYTES => Some(format!("{}/s", size((done_here as f64 / seconds) as u64))),
            _ if tokens > 0 => Some(format!("{:.0} tokens/s", tokens as f64 / seconds)),
            _ => None,
        }
    }

    /// Describes the time that the rest will take; `None` before anything is done.
    fn left(&self, done: u64, seconds: f64) -> Option<String> {
        let done_here = done.saturating_sub(self.done_before);
        let rest = self.total.saturating_sub(done) as f64;
        (done_here > 0).then(|| format!("{} left", duration(seconds / done_here as f64 * rest)))
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

/// Writes lines to stderr. That nobody reads them, or that the terminal is gone, does not stop the run.
fn say(text: &str) {
    let line = format!("{}\n", visible(text));
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Prints an error for which there is no [`Console`] yet.
pub fn fail(message: &str) {
    say(&format!("error: {message}"));
}

/// Prints that the system refuses memory. Does not allocate. A process that cannot go on without that memory ends after
/// this.
pub fn out_of_memory(bytes: usize) {
    let _ = writeln!(
        std::io::stderr(),
        "error: the system refuses another {bytes} bytes of memory\nhint: stop other programs, or raise the limit (`ulimit -v`); finished work is kept, and the same command resumes"
    );
}

/// Prints what is wrong with the command line, or the help or version that it asks for. Returns the exit code.
pub fn command_line(error: &clap::Error) -> u8 {
    let plain = error.render().to_string();
    // clap repeats the arguments. Its colours are left out if these contain controls.
    if visible(&plain) != plain {
        say(plain.trim_end());
    } else if let Err(e) = error.print()
        && e.kind() != ErrorKind::BrokenPipe
    {
        fail(&format!("cannot write: {e}"));
        return 1;
    }
    u8::try_from(error.exit_code()).unwrap_or(1)
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
    let default_shown = default.map_or(String::new(), |default| format!(" [{default}]"));
    let shown = visible_line(&format!("{question}{default_shown}: ")).into_owned();
    let _ = std::io::stderr().write_all(shown.as_bytes());
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
