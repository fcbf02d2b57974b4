//! The forecast of `collect` for a dry run: nothing is written, so journals are only read.

use potstill_datasets::{Store, UnitIndex};
use potstill_teacher::http::{RequestLog, TokenEstimate};

use super::source::CollectSource;
use super::{add_published, has_failures, index_units, published_answers};
use crate::run_dir::{EarlierOutput, NotYetWritten};
use crate::stages::acquire::REQUESTS_FILE;
use crate::stages::{Context, StageOutcome, forecast, import, settled, would_run};

/// Says what `collect` would do: whether it would run, what it would ask a server for, and what would become of its
/// present output.
pub(super) fn preview(context: &Context, source: &CollectSource) -> anyhow::Result<StageOutcome> {
    let required = context.dir.require("prompts", "import", &context.run);
    let (prompts, because) = match required {
        Ok(manifest) => (manifest.content_hash(), None),
        Err(error) => match error.downcast::<NotYetWritten>() {
            Ok(before) => (String::new(), Some(before.stage)),
            Err(error) => return Err(error),
        },
    };
    let plan = source.plan(context, prompts);
    let again = context.retry_failures && has_failures(context)?;
    if because.is_none()
        && let Some(outcome) = settled(context, &plan, again)?
    {
        return Ok(outcome);
    }
    let (index, estimate) = match because.is_some() || source.is_given() {
        true => index_data(context, source)?,
        false => index_units(context, source)?,
    };
    let work = context.dir.path(".work").join(source.work_folder());
    let mut store = Store::counted(&work.join("journal.bin"), &index)?;
    add_published(context, source, &mut store, &index)?;
    let is_same = published_answers(context)?.as_ref() == Some(&source.answers);
    let earlier = match store.unlisted() == 0 && is_same {
        true => EarlierOutput::Replace,
        false => EarlierOutput::Keep,
    };
    let outcome = would_run(context, &plan, earlier, because, None)?;
    if let Some(http) = source.http() {
        let missing = store.tally().to_ask(context.retry_failures);
        let spent = RequestLog::read_spending(&context.dir.path(REQUESTS_FILE))?;
        let budget = &context.run.settings.budget;
        let forecast = forecast::of_answers(http, budget, &estimate, missing, &spent);
        context.console.output(&forecast);
    }
    Ok(outcome)
}

/// As [`index_units`], from the data file: where `import` would run first, or the data has the answers.
fn index_data(
    context: &Context,
    source: &CollectSource,
) -> anyhow::Result<(UnitIndex, TokenEstimate)> {
    let settings = import::settings_of(&context.run, context.limit)?;
    let mut estimate = TokenEstimate::default();
    let mut prompts: Vec<(String, u32)> = Vec::new();
    for row in import::rows(&context.run, &settings)? {
        let row = row?;
        if row.is_new_prompt {
            if let Some(http) = source.http() {
                http.estimate_prompt(&mut estimate, &row.prompt)?;
                (1..source.samples.of(prompts.len())).for_each(|_| estimate.again());
            }
            prompts.push((row.prompt.id, source.samples.of(prompts.len())));
        }
        if source.is_given()
            && let Some((_, samples)) = prompts.get_mut(row.prompt_number)
        {
            *samples += u32::try_from(row.answers.len())?;
        }
    }
    let total = prompts.iter().map(|(_, samples)| *samples as usize).sum();
    let units = prompts.into_iter().flat_map(|(id, samples)| {
        (0..samples).map(move |sample| Ok::<_, anyhow::Error>((id.clone(), sample)))
    });
    Ok((UnitIndex::new(total, units)?, estimate))
}
