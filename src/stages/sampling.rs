//! The sampling test of `collect` and `score`: whether the answers are a sample of the distributions that are stored for
//! them.

use std::path::Path;

use potstill_datasets::{AnswerSource, FolderRows, Manifest, Signal};
use potstill_eval::{SamplingCheck, SamplingLaw, SamplingTally};

use super::Context;
use crate::events::Event;
use crate::run_file::RunFile;

/// Tests the distributions of a folder, and warns of a fault. `None` if there are no distributions.
///
/// # Errors
/// When a shard cannot be read.
pub(super) fn check(
    context: &Context,
    stage: &str,
    signals: &Path,
    top_k: usize,
) -> anyhow::Result<Option<SamplingCheck>> {
    let mut tally = SamplingTally::new(law(&context.run.settings), top_k);
    let mut rows = FolderRows::<Signal>::open(signals)?;
    while let Some(signal) = rows.next() {
        let signal = signal?;
        let footer = rows.footer();
        let provenance = footer.and_then(|f| f.provenance.get(signal.provenance as usize));
        tally.add(&signal, provenance.map_or(&[], |p| &p.temperatures));
    }
    let check = tally.check();
    if let Some(fault) = check.as_ref().and_then(SamplingCheck::fault) {
        context.console.emit(&Event::Warning {
            text: format!("{stage}: {fault}"),
        });
    }
    Ok(check)
}

/// Reads the result of the test from the manifest of the stage that wrote the distributions.
///
/// # Errors
/// When the manifest cannot be read.
pub(super) fn published(context: &Context) -> anyhow::Result<Option<SamplingCheck>> {
    let file = &context.run.settings;
    let home = match file.score {
        Some(_) => "signals",
        None => "completions",
    };
    let manifest = Manifest::read(&context.dir.path(home))?;
    let measures = manifest.map(|manifest| manifest.measures);
    Ok(measures.and_then(|measures| SamplingCheck::from_measures(&measures, law(file))))
}

/// Returns the law of the answers by the run file.
pub(super) fn law(file: &RunFile) -> SamplingLaw {
    let collect = &file.collect;
    match file.import.answers {
        AnswerSource::Given => SamplingLaw::Given,
        AnswerSource::Teacher => SamplingLaw::Sampled {
            temperature: collect.temperature,
            top_k: collect.top_k,
            top_p: collect.top_p,
            min_p: collect.min_p,
            repetition_penalty: collect.repetition_penalty,
        },
    }
}
