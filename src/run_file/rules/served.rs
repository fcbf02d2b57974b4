//! Rules of a teacher behind a server, and of its budget.

use potstill_datasets::{AnswerSource, FloatType};

use super::super::place::is_written;
use super::super::{Dialect, Endpoint, Method, OnBreak, OnLength, RunFile, Teacher};

type Broken<'a> = &'a mut dyn FnMut(&[&str], String);

pub(super) fn teacher(file: &RunFile, text: &str, broken: Broken<'_>) {
    match &file.teacher {
        Some(teacher) if teacher.is_served() => {
            if !where_it_is(teacher, broken) {
                return;
            }
            addresses(teacher, broken);
            distributions(file, teacher, broken);
            what_it_can(file, teacher, broken);
            budget(file, teacher, text, broken);
        }
        Some(teacher) => {
            local_only(teacher, broken);
            no_budget(file, broken);
        }
        None => no_budget(file, broken),
    }
}

fn no_budget(file: &RunFile, broken: Broken<'_>) {
    if !file.budget.is_empty() {
        broken(
            &["budget"],
            "no server is asked, so there is nothing to cap: leave [budget] out, or ask a teacher behind a server (`provider` or `url` of [teacher])".to_owned(),
        );
    }
}

/// Keys that only a server has.
fn local_only(teacher: &Teacher, broken: Broken<'_>) {
    let served = [
        ("provider", teacher.provider.is_some()),
        ("providers", teacher.providers.is_some()),
        ("model", teacher.model.is_some()),
        ("url", teacher.url.is_some()),
        ("key_env", teacher.key_env.is_some()),
        ("key_command", teacher.key_command.is_some()),
        ("endpoints", !teacher.endpoints.is_empty()),
        ("dialect", teacher.dialect.is_some()),
        ("method", teacher.method != Method::Chat),
        ("reasoning_model", teacher.reasoning_model.is_some()),
        ("tokenizer", teacher.tokenizer.is_some()),
        ("context", teacher.context.is_some()),
        ("price", teacher.price.is_some()),
        ("offline", teacher.offline),
    ];
    for (key, _) in served.into_iter().filter(|(_, given)| *given) {
        broken(
            &["teacher", key],
            "the teacher runs here, since `path` is given: leave this out, or leave `path` out to ask a server".to_owned(),
        );
    }
}

/// Whether anybody is named; what else is wrong with a teacher would only hide that.
fn where_it_is(teacher: &Teacher, broken: Broken<'_>) -> bool {
    if teacher.provider.is_none() && teacher.url.is_none() && teacher.endpoints.is_empty() {
        broken(
            &["teacher"],
            "nobody is named: give `path` (the folder of a checkpoint), or `provider`, `url` or `endpoints` for a teacher behind a server".to_owned(),
        );
        return false;
    }
    if teacher.url.is_some() && !teacher.endpoints.is_empty() {
        broken(
            &["teacher", "url"],
            "`endpoints` names the servers already: leave one of both out".to_owned(),
        );
    }
    if teacher.provider.is_none() && teacher.model.is_none() {
        broken(
            &["teacher"],
            "the server has to be told which model: add `model`".to_owned(),
        );
    }
    if teacher.providers.is_some() && teacher.provider.is_none() {
        broken(
            &["teacher", "providers"],
            "nothing of it is used: name one of its entries in `provider`".to_owned(),
        );
    }
    if teacher.dtype != FloatType::default() {
        broken(
            &["teacher", "dtype"],
            "what a server computes in is its own affair: leave this out".to_owned(),
        );
    }
    true
}

fn addresses(teacher: &Teacher, broken: Broken<'_>) {
    if let Some(url) = &teacher.url
        && let Some(why) = bad_url(url)
    {
        broken(&["teacher", "url"], why);
    }
    if teacher.key_env.is_some() && teacher.key_command.is_some() {
        broken(
            &["teacher", "key_command"],
            "the key comes from `key_env` already: leave one of both out".to_owned(),
        );
    }
    if let Some(key) = &teacher.key_env
        && !is_variable(key)
    {
        broken(&["teacher", "key_env"], no_variable());
    }
    for (number, endpoint) in teacher.endpoints.iter().enumerate() {
        for why in bad_endpoint(endpoint) {
            broken(
                &["teacher", "endpoints"],
                format!("number {}: {why}", number + 1),
            );
        }
    }
}

fn bad_endpoint(endpoint: &Endpoint) -> Vec<String> {
    let mut why: Vec<String> = bad_url(&endpoint.url).into_iter().collect();
    if endpoint.key_env.is_some() && endpoint.key_command.is_some() {
        why.push("give `key_env` or `key_command`, not both".to_owned());
    }
    if endpoint
        .key_env
        .as_ref()
        .is_some_and(|key| !is_variable(key))
    {
        why.push(no_variable());
    }
    why
}

/// A key that was pasted where a variable's name belongs must not be repeated in an error.
fn no_variable() -> String {
    "expected the name of an environment variable (letters, digits and `_`), never the key itself"
        .to_owned()
}

fn is_variable(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !name.is_empty() && name.len() <= 64 && name.chars().all(legal)
}

fn bad_url(url: &str) -> Option<String> {
    let Some((scheme, rest)) = url.split_once("://") else {
        return Some("expected a URL such as `https://api.example.com/v1`".to_owned());
    };
    if !["http", "https"].contains(&scheme) || rest.is_empty() {
        return Some("expected a URL that begins with `https://` or `http://`".to_owned());
    }
    let host = rest.split('/').next().unwrap_or_default();
    if host.contains('@') || rest.contains(['?', '#']) {
        return Some(
            "a URL with a user, a query or a fragment may hold a key, and keys do not belong into files: use `key_env`".to_owned(),
        );
    }
    None
}

fn distributions(file: &RunFile, teacher: &Teacher, broken: Broken<'_>) {
    let collect = &file.collect;
    for (place, signals) in [
        (
            "collect",
            collect
                .signals
                .as_ref()
                .map(|s| (&s.temperatures, s.tail_draws)),
        ),
        (
            "score",
            file.score.as_ref().map(|s| (&s.temperatures, s.tail_draws)),
        ),
    ] {
        let Some((temperatures, tail_draws)) = signals else {
            continue;
        };
        if teacher.tokenizer.is_none() {
            broken(
                &["teacher"],
                "distributions are over token ids: name the folder of the model's tokenizer in `tokenizer`".to_owned(),
            );
        }
        let key: &[&str] = match place {
            "collect" => &["collect", "signals"],
            _ => &["score"],
        };
        if !temperatures.is_empty() {
            broken(
                key,
                "a server gives its likeliest tokens alone, not what other temperatures need: leave `temperatures` out".to_owned(),
            );
        }
        if tail_draws.get() > 0 {
            broken(
                key,
                "a server gives its likeliest tokens alone, so nothing can be drawn from the rest: leave `tail_draws` out".to_owned(),
            );
        }
    }
}

fn what_it_can(file: &RunFile, teacher: &Teacher, broken: Broken<'_>) {
    let collect = &file.collect;
    if teacher.method == Method::Completions && teacher.tokenizer.is_none() {
        broken(
            &["teacher", "method"],
            "prompts are rendered here: name the folder of the model's tokenizer in `tokenizer`"
                .to_owned(),
        );
    }
    if collect.on_break == OnBreak::Continue && !collect.stream {
        broken(
            &["collect", "on_break"],
            "what broke off is known of streamed answers alone: set `stream = true`".to_owned(),
        );
    }
    let continues =
        collect.on_length == OnLength::Continue || collect.on_break == OnBreak::Continue;
    if continues && teacher.dialect == Some(Dialect::Openai) && teacher.method == Method::Chat {
        let key = match collect.on_length {
            OnLength::Continue => "on_length",
            _ => "on_break",
        };
        broken(
            &["collect", key],
            "OpenAI's chat API cannot go on from an answer: use another policy".to_owned(),
        );
    }
    if file.student.path.is_none() {
        broken(
            &["student"],
            "the teacher's weights are not here: name the checkpoint that the student starts from in `path`".to_owned(),
        );
    }
}

fn budget(file: &RunFile, teacher: &Teacher, text: &str, broken: Broken<'_>) {
    let budget = &file.budget;
    if budget.usd.is_some() && teacher.price.is_none() && teacher.provider.is_none() {
        broken(
            &["budget", "usd"],
            "what a token costs is not known: add `price = { input = …, output = … }` to [teacher], USD for a million tokens".to_owned(),
        );
    }
    // Scoring asks for one token, whatever the answers are.
    if file.import.answers == AnswerSource::Given {
        return;
    }
    let capped = [
        ("usd", budget.usd.is_some()),
        ("tokens", budget.tokens.is_some()),
    ];
    for (key, _) in capped.into_iter().filter(|(_, given)| *given) {
        if !is_written(text, "collect", "max_new_tokens") {
            broken(
                &["budget", key],
                "what a request may cost depends on its longest answer, which nobody chose: set `max_new_tokens` in [collect]".to_owned(),
            );
        }
    }
}
