//! Rules of a teacher behind a server, and of its budget.

use potstill_datasets::{AnswerSource, FloatType};
use potstill_teacher::http::{Api, Dialect, Endpoint, OnBreak, OnLength};
use potstill_teacher::{SignalSettings, TeacherSettings};

use super::super::RunFile;
use super::super::problem::is_written;
use super::Report;

/// Rules of `[teacher]` and `[budget]`.
pub(super) fn teacher(file: &RunFile, text: &str, report: Report<'_>) {
    match &file.teacher {
        Some(teacher) if teacher.is_served() => {
            if !source(teacher, report) {
                return;
            }
            addresses(teacher, report);
            distributions(file, teacher, report);
            requests(file, teacher, report);
            budget(file, teacher, text, report);
        }
        Some(teacher) => {
            local_only(teacher, report);
            no_budget(file, report);
        }
        None => no_budget(file, report),
    }
}

fn no_budget(file: &RunFile, report: Report<'_>) {
    if !file.budget.is_empty() {
        report(
            &["budget"],
            "no server is asked, so there is nothing to limit\nhint: leave [budget] out, or use a teacher behind a server (`provider` or `url` of [teacher])".to_owned(),
        );
    }
}

/// Keys that only a server has.
fn local_only(teacher: &TeacherSettings, report: Report<'_>) {
    let served = [
        ("provider", teacher.provider.is_some()),
        ("providers", teacher.providers.is_some()),
        ("model", teacher.model.is_some()),
        ("url", teacher.url.is_some()),
        ("key_env", teacher.key_env.is_some()),
        ("key_command", teacher.key_command.is_some()),
        ("endpoints", !teacher.endpoints.is_empty()),
        ("dialect", teacher.dialect.is_some()),
        ("method", teacher.method != Api::Chat),
        ("reasoning_model", teacher.reasoning_model.is_some()),
        ("tokenizer", teacher.tokenizer.is_some()),
        ("context", teacher.context.is_some()),
        ("longest_wait", teacher.longest_wait.is_some()),
        ("price", teacher.price.is_some()),
        ("offline", teacher.offline),
    ];
    for (key, _) in served.into_iter().filter(|(_, given)| *given) {
        report(
            &["teacher", key],
            format!(
                "the teacher runs in this process, because `path` is set\nhint: leave `{key}` out, or leave `path` out to ask a server"
            ),
        );
    }
}

/// Reports a teacher without a source, or with two. Returns false without a source, because other problems of the teacher
/// would only hide that.
fn source(teacher: &TeacherSettings, report: Report<'_>) -> bool {
    if teacher.provider.is_none() && teacher.url.is_none() && teacher.endpoints.is_empty() {
        report(
            &["teacher"],
            "no source is named\nhint: set `path` (the folder of a checkpoint), or `provider`, `url` or `endpoints` for a teacher behind a server".to_owned(),
        );
        return false;
    }
    if teacher.url.is_some() && !teacher.endpoints.is_empty() {
        report(
            &["teacher", "url"],
            "both `url` and `endpoints` name servers\nhint: leave one of the two out".to_owned(),
        );
    }
    if teacher.provider.is_none() && teacher.model.is_none() {
        report(
            &["teacher"],
            "a server needs the name of a model\nhint: add `model`".to_owned(),
        );
    }
    if teacher.providers.is_some() && teacher.provider.is_none() {
        report(
            &["teacher", "providers"],
            "no entry of the table is used\nhint: name one in `provider`, or leave `providers` out"
                .to_owned(),
        );
    }
    if teacher.dtype != FloatType::default() {
        report(
            &["teacher", "dtype"],
            "a server chooses its own type\nhint: leave `dtype` out".to_owned(),
        );
    }
    true
}

fn addresses(teacher: &TeacherSettings, report: Report<'_>) {
    if let Some(url) = &teacher.url
        && let Some(why) = bad_url(url)
    {
        report(&["teacher", "url"], why.to_owned());
    }
    if teacher.key_env.is_some() && teacher.key_command.is_some() {
        report(&["teacher", "key_command"], TWO_KEYS.to_owned());
    }
    if let Some(key) = &teacher.key_env
        && !is_variable(key)
    {
        report(&["teacher", "key_env"], NO_VARIABLE.to_owned());
    }
    for (number, endpoint) in (1..).zip(&teacher.endpoints) {
        for why in bad_endpoint(endpoint) {
            report(&["teacher", "endpoints"], format!("number {number}: {why}"));
        }
    }
}

fn bad_endpoint(endpoint: &Endpoint) -> impl Iterator<Item = &'static str> {
    let two_keys = endpoint.key_env.is_some() && endpoint.key_command.is_some();
    let no_variable = endpoint
        .key_env
        .as_ref()
        .is_some_and(|key| !is_variable(key));
    bad_url(&endpoint.url)
        .into_iter()
        .chain(two_keys.then_some(TWO_KEYS))
        .chain(no_variable.then_some(NO_VARIABLE))
}

const TWO_KEYS: &str =
    "both `key_env` and `key_command` give the key\nhint: leave one of the two out";

/// A key that was pasted where a variable's name belongs must not be repeated in a message.
const NO_VARIABLE: &str = "this is not the name of an environment variable (letters, digits and `_`)\nhint: put the key into a variable, and write the variable's name here";

fn is_variable(name: &str) -> bool {
    let is_legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !name.is_empty() && name.len() <= 64 && name.chars().all(is_legal)
}

fn bad_url(url: &str) -> Option<&'static str> {
    let Some((scheme, rest)) = url.split_once("://") else {
        return Some("this is not a URL\nhint: write it as `https://api.example.com/v1`");
    };
    if !["http", "https"].contains(&scheme) || rest.is_empty() {
        return Some("this URL is not of http\nhint: begin it with `https://` or `http://`");
    }
    let host = rest.split('/').next().unwrap_or_default();
    if host.contains('@') || rest.contains(['?', '#']) {
        return Some(
            "a URL with a user, a query or a fragment may hold a key, and keys must not be in files\nhint: use `key_env`",
        );
    }
    None
}

fn distributions(file: &RunFile, teacher: &TeacherSettings, report: Report<'_>) {
    let collected = file.collect.signals.clone();
    let scored = file.score.as_ref().map(|score| score.signals());
    let tables: [(&[&str], Option<SignalSettings>); 2] =
        [(&["collect", "signals"], collected), (&["score"], scored)];
    for (key, signals) in tables {
        let Some(signals) = signals else {
            continue;
        };
        if teacher.tokenizer.is_none() {
            report(
                &["teacher"],
                "distributions are over token ids, which need a tokenizer\nhint: name the folder of the model's tokenizer in `tokenizer`".to_owned(),
            );
        }
        if !signals.temperatures.is_empty() {
            report(
                key,
                "a server gives its most likely tokens only, not what other temperatures need\nhint: leave `temperatures` out".to_owned(),
            );
        }
        if signals.tail_draws > 0 {
            report(
                key,
                "a server gives its most likely tokens only, so nothing can be drawn from the tail\nhint: leave `tail_draws` out".to_owned(),
            );
        }
    }
}

/// Rules of the requests that a server can serve.
fn requests(file: &RunFile, teacher: &TeacherSettings, report: Report<'_>) {
    let collect = &file.collect;
    if teacher.method == Api::Completions && teacher.tokenizer.is_none() {
        report(
            &["teacher", "method"],
            "prompts for the completions API are rendered by Potstill, which needs a tokenizer\nhint: name the folder of the model's tokenizer in `tokenizer`"
                .to_owned(),
        );
    }
    if collect.on_break == OnBreak::Continue && !collect.stream {
        report(
            &["collect", "on_break"],
            "only a streamed answer can be continued from where it broke\nhint: set `stream = true`, or leave `on_break` out".to_owned(),
        );
    }
    let continues =
        collect.on_length == OnLength::Continue || collect.on_break == OnBreak::Continue;
    if continues && teacher.dialect == Some(Dialect::Openai) && teacher.method == Api::Chat {
        let key = match collect.on_length {
            OnLength::Continue => "on_length",
            _ => "on_break",
        };
        report(
            &["collect", key],
            format!(
                "OpenAI's chat API cannot continue an answer\nhint: give `{key}` another value"
            ),
        );
    }
    if file.student.path.is_none() {
        report(
            &["student"],
            "the weights of a teacher behind a server are not available\nhint: name the checkpoint that the student starts from in `path`".to_owned(),
        );
    }
}

fn budget(file: &RunFile, teacher: &TeacherSettings, text: &str, report: Report<'_>) {
    let budget = &file.budget;
    if budget.usd.is_some() && teacher.price.is_none() && teacher.provider.is_none() {
        report(
            &["budget", "usd"],
            "the price of a token is not known\nhint: add `price = { input = …, output = … }` to [teacher], in USD for a million tokens".to_owned(),
        );
    }
    // Scoring requests one token, however long the answers are.
    if file.import.answers == AnswerSource::Given {
        return;
    }
    let capped = [
        ("usd", budget.usd.is_some()),
        ("tokens", budget.tokens.is_some()),
    ];
    for (key, _) in capped.into_iter().filter(|(_, given)| *given) {
        if !is_written(text, "collect", "max_new_tokens") {
            report(
                &["budget", key],
                "the cost of a request depends on its longest answer, which the run file does not set\nhint: set `max_new_tokens` in [collect]".to_owned(),
            );
        }
    }
}
