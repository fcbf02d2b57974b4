//! The sampling test of the report.

use potstill_datasets::Split;
use potstill_eval::{SamplingCheck, SamplingTally};

use crate::stages::rows::SelectedRows;
use crate::stages::{Context, sampling};

/// Returns the test's result for the report: that of the stage that wrote the distributions or, if the distributions of
/// the test answers show a fault now that the stage did not find, that of the test answers. Their rows are not filtered,
/// so they are a sample as well.
///
/// # Errors
/// When a manifest or a shard cannot be read.
pub(super) fn for_report(context: &Context) -> anyhow::Result<Option<SamplingCheck>> {
    let published = sampling::published(context)?;
    let is_fault = |check: &Option<SamplingCheck>| {
        let check = check.as_ref();
        check.is_some_and(|check| check.fault().is_some())
    };
    if is_fault(&published) {
        return Ok(published);
    }
    let of_test = of_test_answers(context)?;
    Ok(match is_fault(&of_test) {
        true => of_test,
        false => published,
    })
}

/// Tests the distributions of the test answers. `None` if there are none.
fn of_test_answers(context: &Context) -> anyhow::Result<Option<SamplingCheck>> {
    let file = &context.run.settings;
    let Some((signals, _)) = file.signals() else {
        return Ok(None);
    };
    let temperatures: Vec<f32> = signals.temperatures.iter().map(|t| *t as f32).collect();
    let mut tally = SamplingTally::new(sampling::law(file), signals.top_k);
    let mut rows = SelectedRows::open(context, Split::Test)?;
    for position in 0..rows.list.len() {
        tally.add(&rows.get(position)?, &temperatures);
    }
    Ok(tally.check())
}
