//! Formats errors for people: the chain of contexts and causes first, then each hint on a
//! line of its own.
//!
//! In all crates the `Display` of an error is `what is wrong`, or `what is wrong\nhint: what to do`.

/// Separates what is wrong from what to do about it, in the `Display` of an error.
const HINT: &str = "\nhint: ";

/// Formats a chain of errors as `context: cause`, followed by the hints of all its errors.
///
/// Many errors repeat their cause in their own message, so a cause whose text has occurred
/// already is left out, and so is a hint.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut problem = String::new();
    let mut hints: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        let what = take_hints(&text, &mut hints);
        if problem.is_empty() {
            problem = what.to_owned();
        } else if !problem.contains(what) {
            problem += &format!(": {what}");
        }
    }
    with_hints(&problem, &hints)
}

/// Returns what is wrong according to the `Display` of an error, and adds its new hints to `hints`.
pub(crate) fn take_hints<'a>(text: &'a str, hints: &mut Vec<String>) -> &'a str {
    let mut parts = text.split(HINT);
    let what = parts.next().unwrap_or_default();
    for hint in parts.map(str::trim_end) {
        if !hints.iter().any(|known| known == hint) {
            hints.push(hint.to_owned());
        }
    }
    what
}

/// Adds hints to a message, each on a line of its own.
pub(crate) fn with_hints(message: &str, hints: &[String]) -> String {
    let add = |text: String, hint: &String| with_hint(&text, hint);
    hints.iter().fold(message.to_owned(), add)
}

/// Adds a hint to a message.
pub(crate) fn with_hint(message: &str, hint: &str) -> String {
    format!("{message}{HINT}{hint}")
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::{message, with_hint};

    #[test]
    fn contexts_come_first_and_hints_last() {
        let error = anyhow!("x.json is empty\nhint: write it again")
            .context("cannot read the model")
            .context("train student");
        assert_eq!(
            message(&error),
            "train student: cannot read the model: x.json is empty\nhint: write it again"
        );
    }

    #[test]
    fn a_context_with_a_hint_keeps_its_own_hint() {
        let error = anyhow!("connection refused\nhint: start the server")
            .context("cannot reach http://x\nhint: check `url` of [teacher]");
        assert_eq!(
            message(&error),
            "cannot reach http://x: connection refused\nhint: check `url` of [teacher]\nhint: start the server"
        );
    }

    #[test]
    fn a_cause_that_its_context_repeats_is_printed_once() {
        let cause = anyhow!("no such column\nhint: name another");
        let repeated = cause.to_string();
        let error = Err::<(), _>(cause)
            .context(format!("data.csv: {repeated}"))
            .unwrap_err();
        assert_eq!(
            message(&error),
            "data.csv: no such column\nhint: name another"
        );
    }

    #[test]
    fn a_hint_is_added_on_a_line_of_its_own() {
        let text = with_hint(&message(&anyhow!("the disk is full")), "free some space");
        assert_eq!(text, "the disk is full\nhint: free some space");
    }
}
