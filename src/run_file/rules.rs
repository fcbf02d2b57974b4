//! Rules between keys of the run file. All broken rules are reported together.

mod served;

use potstill_datasets::AnswerSource;
use potstill_student::Layers;
use potstill_student::loss::Tail;

use super::problem::Problem;
use super::{AdapterExport, ExportFormat, ExportedWeights, RunFile};

/// Reports a broken rule at a key: what is wrong, and on a line of its own the hint.
type Report<'a> = &'a mut dyn FnMut(&[&str], String);

/// Message about a revision of nothing.
const NO_REPOSITORY: &str = "no repository is named that could have a revision\nhint: set `path = \"org/name\"`, or leave `revision` out";

/// Finds the rules that a run file breaks.
pub(super) fn broken(file: &RunFile, text: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut report = |key: &[&str], message: String| {
        problems.push(Problem::at_key(text, key, message));
    };
    if let Err(message) = file.import.columns.check() {
        report(&["import", "columns"], message);
    }
    answers(file, &mut report);
    served::teacher(file, text, &mut report);
    if let Some(teacher) = &file.teacher
        && teacher.revision.is_some()
        && teacher.path.is_none()
        && teacher.tokenizer.is_none()
    {
        report(&["teacher", "revision"], NO_REPOSITORY.to_owned());
    }
    signals(file, &mut report);
    collect(file, &mut report);
    curate(file, &mut report);
    student(file, &mut report);
    train(file, &mut report);
    adapter(file, &mut report);
    loss(file, &mut report);
    own_text(file, &mut report);
    export(file, &mut report);
    problems
}

fn answers(file: &RunFile, report: Report<'_>) {
    match (file.import.answers, &file.teacher, &file.score) {
        (AnswerSource::Teacher, None, _) => report(
            &["teacher"],
            "no teacher answers the prompts\nhint: add [teacher] with the `path` of a checkpoint or the `url` of a server, or set `answers = \"given\"` in [import] if the data has answers".to_owned(),
        ),
        (AnswerSource::Given, Some(_), None) => report(
            &["teacher"],
            "nothing would use the teacher, because `answers` of [import] is \"given\"\nhint: add [score] to store its distributions over the given answers, or leave [teacher] out".to_owned(),
        ),
        (AnswerSource::Given, None, Some(_)) => report(
            &["score"],
            "no teacher scores the answers\nhint: add [teacher] with the `path` of a checkpoint or the `url` of a server".to_owned(),
        ),
        _ => {}
    }
    if file.import.answers == AnswerSource::Given && file.collect.signals.is_some() {
        report(
            &["collect", "signals"],
            "the answers are given, so no distributions come with them\nhint: use [score] with `top_k` instead".to_owned(),
        );
    }
}

fn signals(file: &RunFile, report: Report<'_>) {
    match (&file.collect.signals, &file.score) {
        (Some(_), Some(_)) => report(
            &["score"],
            "`collect` already stores distributions\nhint: leave out [score], or `signals` of [collect]"
                .to_owned(),
        ),
        (None, None) if file.train.objective.has_divergence() => report(
            &["collect"],
            "there would be no distributions to learn from\nhint: add `signals = { top_k = 64 }`, or set `loss = { cross_entropy = 1.0 }` in [train] to learn from the text only".to_owned(),
        ),
        (None, None) if !file.train.controls.is_empty() => report(
            &["train", "controls"],
            "without distributions the controls would equal the student\nhint: set `controls = []`, or leave `controls` out"
                .to_owned(),
        ),
        _ => {}
    }
}

fn export(file: &RunFile, report: Report<'_>) {
    if file.export.weights == ExportedWeights::Mean && file.train.ema.is_none() {
        report(
            &["export", "weights"],
            "there is no mean of the weights, because `ema` of [train] is not set\nhint: set `ema = 0.999` in [train], or leave `weights` out".to_owned(),
        );
    }
    if file.export.gguf_type.is_some() && file.export.format == ExportFormat::Safetensors {
        report(
            &["export", "type"],
            "`type` is the type of a GGUF file, and `format` is \"safetensors\"\nhint: set `format = \"gguf\"`, or set `dtype` instead for the type of safetensors".to_owned(),
        );
    }
}

fn own_text(file: &RunFile, report: Report<'_>) {
    if file.eval.own_text.is_some() && file.local().is_none() {
        report(
            &["eval", "own_text"],
            "only a teacher in this process can score the students' own text, and [teacher] names no checkpoint\nhint: leave `own_text` out, or give `path` in [teacher]".to_owned(),
        );
    }
}

fn collect(file: &RunFile, report: Report<'_>) {
    if let Some(reasoning) = &file.collect.reasoning
        && (reasoning.open.is_empty() || reasoning.close.is_empty())
    {
        report(
            &["collect", "reasoning"],
            "`open` and `close` must not be empty\nhint: leave `reasoning` out if the teacher does not mark its reasoning".to_owned(),
        );
    }
    if file.collect.stop.iter().any(String::is_empty) {
        report(
            &["collect", "stop"],
            "an empty text would end every answer at once\nhint: leave the empty text out"
                .to_owned(),
        );
    }
}

fn curate(file: &RunFile, report: Report<'_>) {
    let (dev, test) = (file.curate.dev, file.curate.test);
    if dev + test >= 1.0 {
        report(
            &["curate", "test"],
            format!(
                "with `dev`, which is {dev}, it leaves no prompt to train on\nhint: lower `test` or `dev`, so that their sum is below 1"
            ),
        );
    }
}

fn student(file: &RunFile, report: Report<'_>) {
    let student = &file.student;
    if student.layers.is_some() && student.random.is_some() {
        report(
            &["student", "layers"],
            "a student is either pruned (`layers`) or `random`\nhint: leave one of the two out"
                .to_owned(),
        );
    }
    if student.intermediate_size.is_some() && student.random.is_some() {
        report(
            &["student", "intermediate_size"],
            "a student is either pruned (`intermediate_size`) or `random`\nhint: leave one of the two out"
                .to_owned(),
        );
    }
    if student.template.is_some() && file.teacher.is_some() {
        report(
            &["student", "template"],
            "a student uses the chat template of its teacher\nhint: set `template` in [teacher] instead"
                .to_owned(),
        );
    }
    if let (Some(own), Some(teacher)) = (&student.template_arguments, &file.teacher)
        && file.has_signals()
        && *own != teacher.template_arguments
    {
        report(
            &["student", "template_arguments"],
            "a student that learns from distributions learns the teacher's own tokens, so it needs the teacher's arguments\nhint: leave `template_arguments` of [student] out, and set them in [teacher]"
                .to_owned(),
        );
    }
    if student.path.is_none() && file.teacher.is_none() {
        report(
            &["student"],
            "without a teacher, the student has no checkpoint to start from\nhint: set `path` to a folder with a tokenizer and config.json"
                .to_owned(),
        );
        return;
    }
    if student.revision.is_some() && student.path.is_none() {
        report(&["student", "revision"], NO_REPOSITORY.to_owned());
    }
    let keeps_all = Layers::Every { every: 1 };
    let is_pruned = student.intermediate_size.is_some()
        || (student.layers.as_ref()).is_some_and(|layers| *layers != keeps_all);
    // `served` reports the absent path of a student whose teacher is behind a server.
    if file.served().is_none() && student.path.is_none() && student.random.is_none() && !is_pruned {
        report(
            &["student"],
            "the student would be the teacher itself\nhint: set `layers = { first = 8, last = 7 }` or another choice of layers, or `random = { … }`, or `path`"
                .to_owned(),
        );
    }
}

fn train(file: &RunFile, report: Report<'_>) {
    let train = &file.train;
    if train.micro_batch > train.batch {
        let (part, whole) = (train.micro_batch, train.batch);
        report(
            &["train", "micro_batch"],
            format!(
                "{part} is more than `batch`, which is {whole}\nhint: lower `micro_batch`, or raise `batch`"
            ),
        );
    }
    if train.replicas > train.batch {
        let (replicas, batch) = (train.replicas, train.batch);
        report(
            &["train", "replicas"],
            format!(
                "{replicas} is more than `batch`, which is {batch}, so a replica would have nothing to do\nhint: lower `replicas`, or raise `batch`"
            ),
        );
    }
    if train.steps.is_some() && train.epochs.is_some() {
        report(
            &["train", "epochs"],
            "both `steps` and `epochs` say how long to train\nhint: leave one of the two out"
                .to_owned(),
        );
    }
    if let Some(whole) = train.steps
        && train.warmup > whole as f64
    {
        let part = train.warmup;
        report(
            &["train", "warmup"],
            format!(
                "{part} is more than `steps`, which is {whole}\nhint: lower `warmup`, or raise `steps`; a `warmup` below 1 is a share of the steps"
            ),
        );
    }
    learning_rates(file, report);
    let controls = &train.controls;
    if (1..controls.len()).any(|i| controls[..i].contains(&controls[i])) {
        report(
            &["train", "controls"],
            "a control is named twice\nhint: name each control once".to_owned(),
        );
    }
}

fn adapter(file: &RunFile, report: Report<'_>) {
    if let Some(adapter) = &file.train.adapter
        && adapter.path.is_some()
        && adapter.has_shape()
    {
        report(
            &["train", "adapter", "path"],
            "the adapter in `path` has its own layers, ranks and scales\nhint: leave out `rank`, `alpha`, `rslora`, `targets` and the patterns, or leave out `path`".to_owned(),
        );
    }
    if file.export.adapter != AdapterExport::Separate {
        return;
    }
    let key = ["export", "adapter"];
    if file.train.adapter.is_none() {
        report(
            &key,
            "there would be no adapter\nhint: add [train.adapter], or leave `adapter` out of [export]".to_owned(),
        );
    }
    if file.student.random.is_some() || file.student.is_pruned() {
        report(
            &key,
            "an adapter alone would belong to a start that no checkpoint holds\nhint: set `adapter = \"merged\"`, or let the student start from a whole checkpoint".to_owned(),
        );
    }
    if file.export.format == ExportFormat::Gguf {
        report(
            &key,
            "an adapter alone is not written as GGUF\nhint: set `adapter = \"merged\"`, or leave `format` out".to_owned(),
        );
    }
}

fn learning_rates(file: &RunFile, report: Report<'_>) {
    let train = &file.train;
    let key = ["train", "learning_rates"];
    let listed = &train.learning_rates;
    if !listed.is_empty() && train.learning_rate.is_some() {
        report(
            &key,
            "`learning_rate` is set too\nhint: leave one of the two out".to_owned(),
        );
    }
    if !listed.is_empty() && file.curate.dev == 0.0 {
        report(
            &key,
            "no prompts are kept for dev, on which the rate is chosen\nhint: raise `dev` in [curate], or set `learning_rate` in place of `learning_rates`"
                .to_owned(),
        );
    }
    if listed.len() == 1 {
        report(
            &key,
            "there is nothing to choose from a single rate\nhint: name several rates, or set `learning_rate`"
                .to_owned(),
        );
    }
    if (1..listed.len()).any(|i| listed[..i].contains(&listed[i])) {
        report(
            &key,
            "a rate is named twice\nhint: name each rate once".to_owned(),
        );
    }
    let rates = train.rates(file.student.default_learning_rate());
    let lowest = rates.iter().copied().fold(f64::INFINITY, f64::min);
    let low = train.min_learning_rate;
    if low > lowest {
        let rate = match listed.is_empty() {
            true => "`learning_rate`, which is",
            false => "the lowest of `learning_rates`, which is",
        };
        report(
            &["train", "min_learning_rate"],
            format!("{low} is more than {rate} {lowest}\nhint: lower `min_learning_rate`"),
        );
    }
}

fn loss(file: &RunFile, report: Report<'_>) {
    let loss = &file.train.objective;
    let at = |key| ["train", "loss", key];
    for (key, message) in loss.broken_rules() {
        match key {
            "" => report(&["train", "loss"], message),
            key => report(&at(key), message),
        }
    }
    if loss.label_smoothing > 0.0 && loss.cross_entropy == 0.0 {
        report(
            &at("label_smoothing"),
            "`label_smoothing` is a share of the cross-entropy, which has no weight\nhint: give `cross_entropy` a weight, or leave `label_smoothing` out"
                .to_owned(),
        );
    }
    if loss.temperature != 1.0 && !loss.has_divergence() {
        report(
            &at("temperature"),
            "the cross-entropy is taken at temperature 1, and the loss has no divergence\nhint: leave `temperature` out"
                .to_owned(),
        );
    }
    if loss.temperature_squared && loss.temperature == 1.0 {
        report(
            &at("temperature_squared"),
            "the square of temperature 1 changes nothing\nhint: leave `temperature_squared` out, or set `temperature`"
                .to_owned(),
        );
    }
    let Some((signals, table)) = file.signals() else {
        return;
    };
    let temperature = loss.temperature;
    let is_kept = |t: &f64| *t as f32 == temperature as f32;
    if loss.tail == Tail::Draws {
        if signals.tail_draws == 0 {
            report(
                &at("tail"),
                format!(
                    "no tail draws would be stored\nhint: add `tail_draws = 50` to {table}, or set `tail = \"bucket\"`"
                ),
            );
        }
    } else if temperature != 1.0 && !signals.temperatures.iter().any(is_kept) {
        report(
            &at("temperature"),
            format!(
                "the signals would not hold what temperature {temperature} needs\nhint: add `temperatures = [{temperature}]` to {table}"
            ),
        );
    }
}
