//! Rules between keys of the run file. All that are broken are reported together.

mod served;

use potstill_datasets::AnswerSource;
use potstill_student::loss::Tail;

use super::RunFile;
use super::place::Problem;

/// Reports a broken rule at a key.
type Broken<'a> = &'a mut dyn FnMut(&[&str], String);

pub(super) fn broken(file: &RunFile, text: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut broken = |key: &[&str], message: String| {
        problems.push(Problem::at_key(text, key, message));
    };
    if let Err(message) = file.import.columns.check() {
        broken(&["import", "columns"], message);
    }
    answers(file, &mut broken);
    served::teacher(file, text, &mut broken);
    signals(file, &mut broken);
    if let Some(reasoning) = &file.collect.reasoning
        && (reasoning.open.is_empty() || reasoning.close.is_empty())
    {
        broken(
            &["collect", "reasoning"],
            "`open` and `close` may not be empty; leave `reasoning` out where the teacher does not mark it".to_owned(),
        );
    }
    if file.collect.stop.iter().any(String::is_empty) {
        broken(
            &["collect", "stop"],
            "an empty text would end every answer at once: leave it out".to_owned(),
        );
    }
    student(file, &mut broken);
    train(file, &mut broken);
    problems
}

fn answers(file: &RunFile, broken: Broken<'_>) {
    match (file.import.answers, &file.teacher, &file.score) {
        (AnswerSource::Teacher, None, _) => broken(
            &["teacher"],
            "nobody answers: add [teacher] with the `path` of a checkpoint or the `url` of a server, or set `answers = \"given\"` in [import] where the data has answers".to_owned(),
        ),
        (AnswerSource::Given, Some(_), None) => broken(
            &["teacher"],
            "it would not be asked, since `answers` of [import] is \"given\": add [score] to take its distributions over the given answers, or leave [teacher] out".to_owned(),
        ),
        (AnswerSource::Given, None, Some(_)) => broken(
            &["score"],
            "nobody scores: add [teacher] with the `path` of a checkpoint".to_owned(),
        ),
        _ => {}
    }
    if file.import.answers == AnswerSource::Given && file.collect.signals.is_some() {
        broken(
            &["collect", "signals"],
            "the teacher is not asked for answers, so none come with them: use [score] with `top_k` in its place".to_owned(),
        );
    }
}

fn signals(file: &RunFile, broken: Broken<'_>) {
    match (&file.collect.signals, &file.score) {
        (Some(_), Some(_)) => broken(
            &["score"],
            "`collect` stores distributions already: leave out [score], or `signals` of [collect]"
                .to_owned(),
        ),
        (None, None) if file.train.objective.has_divergence() => broken(
            &["collect"],
            "there would be no distributions to learn from: add `signals = { top_k = 64 }`, or set `loss = { cross_entropy = 1.0 }` in [train] to learn from the text alone".to_owned(),
        ),
        (None, None) if !file.train.controls.is_empty() => broken(
            &["train", "controls"],
            "without distributions the controls would be the student itself: set `controls = []`"
                .to_owned(),
        ),
        _ => {}
    }
}

fn student(file: &RunFile, broken: Broken<'_>) {
    let student = &file.student;
    if student.every.is_some() && student.random.is_some() {
        broken(
            &["student", "every"],
            "a student is either cut from a checkpoint (`every`) or `random`, not both".to_owned(),
        );
    }
    if student.template.is_some() && file.teacher.is_some() {
        broken(
            &["student", "template"],
            "a student reads text as its teacher does: set `template` in [teacher] instead"
                .to_owned(),
        );
    }
    if student.path.is_none() && file.teacher.is_none() {
        broken(
            &["student"],
            "without a teacher it needs a `path`: a folder with tokenizer and config.json"
                .to_owned(),
        );
        return;
    }
    let cuts = student.every.is_some_and(|every| every > 1);
    // A served teacher's weights are not here: `served` says that a path is needed.
    if file.served().is_none() && student.path.is_none() && student.random.is_none() && !cuts {
        broken(
            &["student"],
            "the student would be the teacher itself: set `every = 2`, or `random = { … }`, or `path`"
                .to_owned(),
        );
    }
    if let Some(random) = &student.random {
        let (heads, key_value_heads) = (random.heads, random.key_value_heads());
        if random.hidden_size % heads != 0 || random.hidden_size / heads % 2 != 0 {
            broken(
                &["student", "random", "heads"],
                format!(
                    "`hidden_size` {} must be `heads` {heads} times an even number",
                    random.hidden_size
                ),
            );
        }
        if heads % key_value_heads != 0 {
            broken(
                &["student", "random", "key_value_heads"],
                format!("{key_value_heads} does not divide `heads`, which is {heads}"),
            );
        }
    }
}

/// Rules of `loss` of `[train]`.
fn loss(file: &RunFile, broken: Broken<'_>) {
    let loss = &file.train.objective;
    let at = |key| ["train", "loss", key];
    for (key, message) in loss.broken_rules() {
        match key {
            "" => broken(&["train", "loss"], message),
            key => broken(&at(key), message),
        }
    }
    if loss.label_smoothing > 0.0 && loss.cross_entropy == 0.0 {
        broken(
            &at("label_smoothing"),
            "`label_smoothing` is a share of the cross-entropy, which has no weight\nhint: give `cross_entropy` a weight, or leave `label_smoothing` out"
                .to_owned(),
        );
    }
    if loss.temperature != 1.0 && !loss.has_divergence() {
        broken(
            &at("temperature"),
            "the cross-entropy is taken at temperature 1, and the loss has no divergence\nhint: leave `temperature` out"
                .to_owned(),
        );
    }
    if loss.temperature_squared && loss.temperature == 1.0 {
        broken(
            &at("temperature_squared"),
            "the square of temperature 1 changes nothing\nhint: leave `temperature_squared` out, or set `temperature`"
                .to_owned(),
        );
    }
    stored_signals(file, broken);
}

/// What the loss needs of the stored signals.
fn stored_signals(file: &RunFile, broken: Broken<'_>) {
    let loss = &file.train.objective;
    let (temperatures, tail_draws, table) = match (&file.collect.signals, &file.score) {
        (Some(signals), _) => (
            &signals.temperatures,
            signals.tail_draws,
            "`signals` of [collect]",
        ),
        (None, Some(score)) => (&score.temperatures, score.tail_draws, "[score]"),
        (None, None) => return,
    };
    let is_kept = |t: &super::Positive| t.get() as f32 == loss.temperature as f32;
    if loss.tail == Tail::Draws {
        if tail_draws.get() == 0 {
            broken(
                &["train", "loss", "tail"],
                format!(
                    "no tail draws would be stored\nhint: add `tail_draws = 50` to {table}, or set `tail = \"bucket\"`"
                ),
            );
        }
    } else if loss.temperature != 1.0 && !temperatures.iter().any(is_kept) {
        let temperature = loss.temperature;
        broken(
            &["train", "loss", "temperature"],
            format!(
                "the signals would not hold what temperature {temperature} needs\nhint: add `temperatures = [{temperature}]` to {table}"
            ),
        );
    }
}

fn train(file: &RunFile, broken: Broken<'_>) {
    let train = &file.train;
    if train.micro_batch > train.batch {
        broken(
            &["train", "micro_batch"],
            format!(
                "{} is more than `batch`, which is {}",
                train.micro_batch, train.batch
            ),
        );
    }
    if train.warmup > train.steps {
        broken(
            &["train", "warmup"],
            format!(
                "{} is more than `steps`, which is {}",
                train.warmup, train.steps
            ),
        );
    }
    if train.min_learning_rate > train.learning_rate {
        broken(
            &["train", "min_learning_rate"],
            format!(
                "{} is more than `learning_rate`, which is {}",
                train.min_learning_rate, train.learning_rate
            ),
        );
    }
    loss(file, broken);
    let twice = |i: &usize| train.controls[..*i].contains(&train.controls[*i]);
    if (0..train.controls.len()).any(|i| twice(&i)) {
        broken(
            &["train", "controls"],
            "a control is named twice".to_owned(),
        );
    }
}
