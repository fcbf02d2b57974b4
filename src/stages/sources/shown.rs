//! Output of a download.

use std::ops::ControlFlow;
use std::time::Instant;

use potstill_teacher::hub::{FetchEvent, SnapshotPlan};

use crate::events::duration;
use crate::interrupt;
use crate::progress::{Console, StageProgress, size};

/// The output of one repository's download.
pub(super) struct Download<'a> {
    console: &'a Console,
    /// Name of the repository.
    name: &'a str,
    progress: Option<StageProgress>,
    began: Option<Instant>,
}

impl Download<'_> {
    pub(super) fn new<'a>(console: &'a Console, name: &'a str) -> Download<'a> {
        Download {
            console,
            name,
            progress: None,
            began: None,
        }
    }

    /// Says what is absent: as a remark if it is fetched now, and on stdout if not.
    pub(super) fn announce(&mut self, plan: &SnapshotPlan, is_now: bool) {
        let (files, bytes) = plan.missing();
        let free = plan.free_bytes();
        let free = free.map_or(String::new(), |free| {
            format!(", which has {} free", size(free))
        });
        let files = match files {
            1 => "1 file".to_owned(),
            n => format!("{n} files"),
        };
        let what = format!(
            "{} at {}: {files}, {} to {}{free}",
            self.name,
            plan.commit().get(..12).unwrap_or(plan.commit()),
            size(bytes),
            plan.cache().display()
        );
        if is_now {
            self.began = Some(Instant::now());
            self.console.note(&format!("fetching {what}"));
        } else {
            self.console.output(&format!("to fetch  {what}"));
        }
    }

    /// Shows a report of the download, and asks to stop if the user does.
    pub(super) fn shown(&mut self, event: FetchEvent) -> ControlFlow<()> {
        match event {
            FetchEvent::Progress { done, total, file } => {
                let start = || self.console.progress("fetch", "bytes", done, total);
                let progress = self.progress.get_or_insert_with(start);
                progress.set_total(total);
                progress.update(done, 0, &file);
            }
            FetchEvent::Waiting { what, why, seconds } => {
                let text =
                    format!("cannot get {what}: {why}; the next attempt is in {seconds:.1} s");
                self.console.note(&text);
            }
            FetchEvent::Remark(text) => self.console.note(&text),
            FetchEvent::Tick => {}
        }
        interrupt::control_flow()
    }

    /// Says that an announced download is complete.
    pub(super) fn finished(&mut self) {
        self.progress = None;
        if let Some(began) = self.began {
            let time = duration(began.elapsed().as_secs_f64());
            self.console
                .note(&format!("fetched {}, in {time}", self.name));
        }
    }
}
