//! `score`: the teacher's distributions over answers that were collected without them.
//!
//! A unit is a row of `completions/`, and `signals/` has the same shards and rows. Distributions that complete together
//! become one frame of the store in `.work/score-<key>/`, synced before they count.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use potstill_datasets::{
    PromptedAnswer, PromptedAnswers, Provenance, Published, Signal, Store, Tables, UnitIndex,
    publish_signals, row_count,
};
use potstill_teacher::http::{RequestLog, TokenEstimate};
use potstill_teacher::{
    HttpTeacher, LocalTeacher, Sampling, ScoreRequest, ScoreSettings, ScoringOptions, Teacher,
};
use serde_json::{Value, json};

use super::acquire::{self, Acquisition, REQUESTS_FILE};
use super::collect::{is_published, open_local};
use super::{
    Context, StageOutcome, StageSummary, checkpoint, counts, forecast, import, known, probe,
    run_stage_again, sampling, served,
};
use crate::run_dir::{Counts, StagePlan, settings_of, short};
use crate::run_file::Loaded;

/// Folder with the answers that could not be scored.
pub(crate) const UNSCORED: &str = "unscored";

/// Scores every answer that is not scored yet, and publishes the distributions.
///
/// # Errors
/// When answers are not published; when a local teacher cannot encode an answer, or the answer is longer than its
/// context; when a server cannot be used, a cap is reached, or the disk refuses. What was scored stays.
pub fn score(context: &Context) -> anyhow::Result<StageOutcome> {
    let run = &context.run;
    let Some(settings) = &run.settings.score else {
        bail!(
            "{} has no [score]\nhint: add it with `top_k = 64`, and take `signals` out of [collect]",
            run.path.display()
        );
    };
    let mut scorer = Scorer::open(context, settings)?;
    let plan = known(context, "score", "signals", || {
        let completions = context.dir.require("completions", "collect", run)?;
        Ok(scorer.plan(completions.content_hash()))
    })?;
    let Some(plan) = plan else {
        if let Some(Teacher::Http(http)) = &scorer.teacher {
            let imported = import::read(run, context.limit)?;
            let spent = RequestLog::read_spending(&context.dir.path(REQUESTS_FILE))?;
            let forecast = served::scores_ahead(run, http, settings, &imported, &spent);
            context.console.output(&forecast?);
        }
        return Ok(StageOutcome::WouldRun);
    };
    let again = context.retry_failures && has_failures(context)?;
    let folder = work_name(&plan);
    if let Some(Teacher::Http(http)) = &scorer.teacher
        && context.dry_run
        && (again || !is_settled(context, &plan)?)
    {
        scorer.say_forecast(http, &folder)?;
    }
    let mut finished_work = None;
    let outcome = run_stage_again(context, &plan, again, |out| {
        let work = context.dir.work_path(&folder, &plan)?;
        let Some(published) = scorer.run(&work, out)? else {
            return Ok(None);
        };
        // While the journal is there, failures can be asked for again without paying for the rest.
        if published.failures == 0 {
            finished_work = Some(work);
        }
        let signals = out.join("signals");
        let sampling = sampling::check(context, "score", &signals, settings.top_k)?;
        let mut summary = StageSummary::new(scorer.counts(&published));
        summary.measures = sampling.map_or_else(BTreeMap::new, |check| check.to_measures());
        Ok(Some(summary))
    })?;
    if let Some(work) = finished_work {
        fs::remove_dir_all(&work).with_context(|| format!("cannot delete {}", work.display()))?;
    }
    Ok(outcome)
}

/// The input of a training or an evaluation that `score` wrote, for its key.
pub(crate) fn input(context: &Context) -> anyhow::Result<Option<(String, String)>> {
    if context.run.settings.score.is_none() {
        return Ok(None);
    }
    let manifest = context.dir.require("signals", "score", &context.run)?;
    Ok(Some(("signals".to_owned(), manifest.content_hash())))
}

/// The folder below `.work/` with the distributions that the present settings continue; `None` without `[score]`.
///
/// # Errors
/// When the teacher cannot be used, or no answers are published.
pub(super) fn work_folder(context: &Context) -> anyhow::Result<Option<String>> {
    let run = &context.run;
    let Some(settings) = &run.settings.score else {
        return Ok(None);
    };
    let completions = context.dir.require("completions", "collect", run)?;
    let plan = Scorer::open(context, settings)?.plan(completions.content_hash());
    Ok(Some(work_name(&plan)))
}

fn work_name(plan: &StagePlan) -> String {
    format!("score-{}", short(&plan.key()))
}

/// Whether the output of a plan is published, now or earlier.
fn is_settled(context: &Context, plan: &StagePlan) -> anyhow::Result<bool> {
    Ok(is_published(context, plan)? || context.dir.find_earlier(plan)?.is_some())
}

fn has_failures(context: &Context) -> anyhow::Result<bool> {
    let manifest = context.dir.published("signals")?;
    Ok(manifest.is_some_and(|m| m.counts.get("failures").is_some_and(|n| *n > 0)))
}

/// The teacher that scores, and its settings.
struct Scorer<'a> {
    context: &'a Context,
    options: ScoringOptions,
    /// Settings of the published stage.
    settings: Value,
    /// Folder of a local teacher's checkpoint.
    checkpoint: Option<PathBuf>,
    /// The teacher; a local one once it is needed.
    teacher: Option<Teacher>,
    /// Fingerprint of the teacher's tokenizer.
    tokenizer: String,
}

impl<'a> Scorer<'a> {
    /// The teacher that the run file names. No model is loaded and nothing is sent.
    fn open(context: &'a Context, settings: &ScoreSettings) -> anyhow::Result<Scorer<'a>> {
        let run = &context.run;
        let options = ScoringOptions {
            signals: settings.signals(),
            seed: u64::from(run.settings.run.seed),
            batch: settings.batch,
            window: settings.window,
        };
        if run.settings.served().is_some() {
            let http = served::http_teacher(run)?;
            probe::check(run, &http, &context.dir.path(""))?;
            let encoder = http.encoder.as_ref();
            let encoder = encoder.context("[score] needs the `tokenizer` of [teacher]")?;
            return Ok(Scorer {
                context,
                settings: json!({
                    "served": http.client.request.model,
                    "tokenizer": encoder.tokenizer().fingerprint(),
                    "template": encoder.template().hash(),
                    "licence": http.provenance.licence,
                    "reasoning": settings_of(&run.settings.collect.reasoning)?,
                    "score": { "top_k": options.signals.top_k, "window": options.window },
                }),
                options,
                checkpoint: None,
                tokenizer: encoder.tokenizer().fingerprint().to_owned(),
                teacher: Some(Teacher::Http(Box::new(http))),
            });
        }
        let folder = checkpoint::teacher(run)?;
        Ok(Scorer {
            context,
            settings: local_settings(run, &folder, settings)?,
            options,
            tokenizer: checkpoint::tokenizer(&folder)?.fingerprint().to_owned(),
            checkpoint: Some(folder),
            teacher: None,
        })
    }

    fn plan(&self, completions: String) -> StagePlan {
        let mut outputs = vec!["signals".to_owned()];
        if self.checkpoint.is_none() {
            outputs.insert(0, UNSCORED.to_owned());
        }
        StagePlan {
            stage: "score".to_owned(),
            home: "signals".to_owned(),
            outputs,
            settings: self.settings.clone(),
            inputs: BTreeMap::from([("completions".to_owned(), completions)]),
        }
    }

    /// Writes the forecast of a dry run to stdout.
    fn say_forecast(&self, http: &HttpTeacher, folder: &str) -> anyhow::Result<()> {
        let (index, estimate) = self.index_units()?;
        let work = self.context.dir.path(".work").join(folder);
        let store = Store::<Signal>::counted(&work.join("journal.bin"), &index)?;
        let missing = store.tally().to_ask(self.context.retry_failures);
        let spent = RequestLog::read_spending(&self.context.dir.path(REQUESTS_FILE))?;
        let (tokens, budget) = (estimate.tokens(missing), &self.context.run.settings.budget);
        let forecast = forecast::of_scores(http, budget, tokens, missing, &spent);
        self.context.console.output(&forecast);
        Ok(())
    }

    fn answers(&self) -> anyhow::Result<PromptedAnswers> {
        let dir = &self.context.dir;
        let (completions, prompts) = (dir.verified("completions")?, dir.verified("prompts")?);
        Ok(PromptedAnswers::open(
            &completions,
            &prompts,
            &self.tokenizer,
        )?)
    }

    /// Reads the names of all units, and estimates the tokens of their texts where a server scores them.
    fn index_units(&self) -> anyhow::Result<(UnitIndex, TokenEstimate)> {
        let mut estimate = TokenEstimate::default();
        let count = row_count(&self.context.dir.verified("completions")?)?;
        let names = self.answers()?.map(|answer| {
            let PromptedAnswer {
                prompt,
                completion,
                own_ids,
            } = answer?;
            if let Some(Teacher::Http(http)) = &self.teacher {
                let window = self.options.window;
                http.estimate_answer(&mut estimate, &prompt, &completion, own_ids, window);
            }
            Ok::<_, anyhow::Error>((completion.prompt_id, completion.sample_index))
        });
        let index = UnitIndex::new(count, names)?;
        Ok((index, estimate))
    }

    /// Scores what is missing, and writes the tables. `None` if the user asked for a stop.
    fn run(&mut self, work: &Path, out: &Path) -> anyhow::Result<Option<Published>> {
        let (index, estimate) = self.index_units()?;
        let mut store = Store::open(&work.join("journal.bin"), &index)?;
        drop(index);
        let to_ask = acquire::say_present(self.context, "score", "scored", &store);
        let mut requests = self.answers()?.zip(0..).map(|(answer, ordinal)| {
            let request = ScoreRequest {
                ordinal,
                answer: answer?,
            };
            Ok((ordinal, request))
        });
        let mut teacher = match self.teacher.take() {
            Some(teacher) => teacher,
            None => self.open_local()?,
        };
        if to_ask > 0 {
            let (tokens, budget) = (estimate.tokens(to_ask), &self.context.run.settings.budget);
            let acquisition = Acquisition {
                stage: "score",
                store: &mut store,
                units: &mut requests,
                forecast: &|http, spent| forecast::of_scores(http, budget, tokens, to_ask, spent),
                work: &|teacher, exchange| teacher.score(&self.options, exchange),
            };
            if acquisition.run(self.context, &mut teacher)?.is_none() {
                return Ok(None);
            }
        }
        self.publish(&mut store, &teacher, out).map(Some)
    }

    fn open_local(&self) -> anyhow::Result<Teacher> {
        let folder = self.checkpoint.as_ref();
        let folder = folder.context("the teacher is neither local nor behind a server")?;
        Ok(Teacher::Local(Box::new(LocalTeacher {
            local: open_local(self.context, folder)?,
            batch: self.options.batch,
            sampling: Sampling::default(),
            stop: Vec::new(),
            seed: self.options.seed,
            signals: Some(self.options.clone()),
        })))
    }

    fn publish(
        &self,
        store: &mut Store<Signal>,
        teacher: &Teacher,
        out: &Path,
    ) -> anyhow::Result<Published> {
        let of_teacher = teacher.provenance();
        let published = publish_signals(
            store,
            &self.context.dir.verified("completions")?,
            &|answers| Provenance {
                sampling: answers.sampling,
                ..of_teacher.clone()
            },
            &Tables {
                completions: None,
                signals: Some(out.join("signals")),
                tail_draws: self.options.signals.tail_draws > 0,
                failures: self.checkpoint.is_none().then(|| out.join(UNSCORED)),
            },
        )?;
        if let Some(first) = &published.first_failure
            && published.answers == 0
        {
            bail!(
                "none of {} answers could be scored; the first failure: {first}\nhint: `potstill probe` says what this server can do, and `--retry-failures` asks again",
                published.failures
            );
        }
        Ok(published)
    }

    fn counts(&self, published: &Published) -> Counts {
        let answers = ("answers", published.answers);
        let distributions = ("distributions", published.tokens);
        match self.checkpoint {
            Some(_) => counts([answers, distributions]),
            None => counts([answers, distributions, ("failures", published.failures)]),
        }
    }
}

/// Settings that a local teacher's distributions depend on.
fn local_settings(run: &Loaded, folder: &Path, settings: &ScoreSettings) -> anyhow::Result<Value> {
    let teacher = checkpoint::teacher_table(run)?;
    let mut all = json!({
        "teacher": checkpoint::content_hash(folder)?,
        "dtype": settings_of(&teacher.dtype)?,
        "template": checkpoint::template(run, folder)?.hash(),
        "licence": teacher.licence,
        "reasoning": settings_of(&run.settings.collect.reasoning)?,
        "score": settings_of(&settings.signals())?,
    });
    if settings.tail_draws > 0 {
        all["seed"] = json!(run.settings.run.seed);
    }
    Ok(all)
}
