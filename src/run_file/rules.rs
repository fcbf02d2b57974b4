//! Rules between keys of the run file. All that are broken are reported together.

mod served;

use super::place::Problem;
use super::{Answers, Columns, Loss, RunFile, Tail};

pub(super) fn broken(file: &RunFile, text: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut broken = |key: &[&str], message: String| {
        problems.push(Problem::at_key(text, key, message));
    };
    if let Some(message) = columns(&file.import.columns) {
        broken(&["import", "columns"], message.to_owned());
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

fn answers(file: &RunFile, broken: &mut dyn FnMut(&[&str], String)) {
    match (file.import.answers, &file.teacher, &file.score) {
        (Answers::Teacher, None, _) => broken(
            &["teacher"],
            "nobody answers: add [teacher] with the `path` of a checkpoint or the `url` of a server, or set `answers = \"given\"` in [import] where the data has answers".to_owned(),
        ),
        (Answers::Given, Some(_), None) => broken(
            &["teacher"],
            "it would not be asked, since `answers` of [import] is \"given\": add [score] to take its distributions over the given answers, or leave [teacher] out".to_owned(),
        ),
        (Answers::Given, None, Some(_)) => broken(
            &["score"],
            "nobody scores: add [teacher] with the `path` of a checkpoint".to_owned(),
        ),
        _ => {}
    }
    if file.import.answers == Answers::Given && file.collect.signals.is_some() {
        broken(
            &["collect", "signals"],
            "the teacher is not asked for answers, so none come with them: use [score] with `top_k` in its place".to_owned(),
        );
    }
}

fn signals(file: &RunFile, broken: &mut dyn FnMut(&[&str], String)) {
    match (&file.collect.signals, &file.score) {
        (Some(_), Some(_)) => broken(
            &["score"],
            "`collect` stores distributions already: leave out [score], or `signals` of [collect]"
                .to_owned(),
        ),
        (None, None) if file.train.loss.has_divergence() => broken(
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

fn columns(columns: &Columns) -> Option<&'static str> {
    let given = [
        &columns.text,
        &columns.question,
        &columns.messages,
        &columns.instruction,
    ];
    if given.iter().filter(|c| c.is_some()).count() != 1 {
        return Some(
            "expected exactly one of `text`, `question` (with `answer`, if there is one), `messages` or `instruction` (with `input` and `output`)",
        );
    }
    if columns.answer.is_some() && columns.question.is_none() {
        return Some("`answer` goes with `question` only");
    }
    if (columns.input.is_some() || columns.output.is_some()) && columns.instruction.is_none() {
        return Some("`input` and `output` go with `instruction` only");
    }
    None
}

fn student(file: &RunFile, broken: &mut dyn FnMut(&[&str], String)) {
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
    let cuts = student.every.is_some_and(|every| every.get() > 1);
    // A served teacher's weights are not here: `served` says that a path is needed.
    if file.served().is_none() && student.path.is_none() && student.random.is_none() && !cuts {
        broken(
            &["student"],
            "the student would be the teacher itself: set `every = 2`, or `random = { … }`, or `path`"
                .to_owned(),
        );
    }
    if let Some(random) = &student.random {
        let heads = random.heads.get();
        let key_value_heads = random.key_value_heads.map_or(heads, |h| h.get());
        if random.hidden_size.get() % heads != 0 || random.hidden_size.get() / heads % 2 != 0 {
            broken(
                &["student", "random", "heads"],
                format!(
                    "`hidden_size` {} must be `heads` {heads} times an even number",
                    random.hidden_size.get()
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

fn loss(file: &RunFile, broken: &mut dyn FnMut(&[&str], String)) {
    let loss = &file.train.loss;
    let at = |key| ["train", "loss", key];
    let (cross_entropy, temperature) = (loss.cross_entropy.get(), loss.temperature.get());
    if !loss.has_divergence() && cross_entropy == 0.0 {
        broken(
            &["train", "loss"],
            "every weight is 0, so nothing would be learned: give `forward_kl` or `cross_entropy` a weight"
                .to_owned(),
        );
    }
    if loss.label_smoothing.get() > 0.0 && cross_entropy == 0.0 {
        broken(
            &at("label_smoothing"),
            "it is a share of the cross-entropy, which has no weight: give `cross_entropy` one"
                .to_owned(),
        );
    }
    if temperature != 1.0 && !loss.has_divergence() {
        broken(
            &at("temperature"),
            "the cross-entropy is taken at temperature 1, and there is no divergence: leave it out"
                .to_owned(),
        );
    }
    if loss.temperature_squared && temperature == 1.0 {
        broken(
            &at("temperature_squared"),
            "the square of temperature 1 changes nothing: leave it out, or set `temperature`"
                .to_owned(),
        );
    }
    let stored = match (&file.collect.signals, &file.score) {
        (Some(signals), _) => Some((
            &signals.temperatures,
            signals.tail_draws,
            "`signals` of [collect]",
        )),
        (None, Some(score)) => Some((&score.temperatures, score.tail_draws, "[score]")),
        (None, None) => None,
    };
    let Some((temperatures, tail_draws, place)) = stored else {
        return;
    };
    let kept = |t: &super::Positive| t.get() as f32 == temperature as f32;
    if temperature != 1.0 && loss.tail != Tail::Draws && !temperatures.iter().any(kept) {
        broken(
            &at("temperature"),
            format!(
                "the signals would not hold what temperature {temperature} needs: add `temperatures = [{temperature}]` to {place}"
            ),
        );
    }
    if loss.tail != Tail::Draws {
        return;
    }
    if tail_draws.get() == 0 {
        broken(
            &at("tail"),
            format!("there would be no draws: add `tail_draws = 50` to {place}, or use \"bucket\""),
        );
    }
    if temperature != 1.0 {
        broken(
            &at("temperature"),
            "draws are of the distribution at temperature 1: leave it out, or set `tail = \"bucket\"`"
                .to_owned(),
        );
    }
    let forward_kl_alone = Loss {
        forward_kl: loss.forward_kl,
        cross_entropy: loss.cross_entropy,
        label_smoothing: loss.label_smoothing,
        tail: loss.tail,
        temperature: loss.temperature,
        temperature_squared: loss.temperature_squared,
        ..Loss::default()
    };
    if *loss != forward_kl_alone {
        broken(
            &at("tail"),
            "draws give no unbiased gradient of any divergence but `forward_kl`: leave the others out, or use \"bucket\""
                .to_owned(),
        );
    }
}

fn train(file: &RunFile, broken: &mut dyn FnMut(&[&str], String)) {
    let train = &file.train;
    if train.micro_batch > train.batch {
        broken(
            &["train", "micro_batch"],
            format!(
                "{} is more than `batch`, which is {}",
                train.micro_batch.get(),
                train.batch.get()
            ),
        );
    }
    if train.warmup.get() > train.steps.get() {
        broken(
            &["train", "warmup"],
            format!(
                "{} is more than `steps`, which is {}",
                train.warmup.get(),
                train.steps.get()
            ),
        );
    }
    if train.min_learning_rate.get() > train.learning_rate.get() {
        broken(
            &["train", "min_learning_rate"],
            format!(
                "{} is more than `learning_rate`, which is {}",
                train.min_learning_rate.get(),
                train.learning_rate.get()
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
