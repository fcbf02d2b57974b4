//! Graders, which decide whether an answer is right, given a reference.
//!
//! Answer and reference are parsed in the same way. First the *final answer* is extracted: the text after the last
//! `####` (GSM8K), `Answer:` or `answer is`, or in the last `\boxed{…}`, or the whole text if none of these markers
//! occurs. Then [`Grader::Exact`] compares text, and [`Grader::Number`] compares the last number in the text.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod number;

use number::Number;

/// Rule that decides whether an answer is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Grader {
    /// The final answer equals the reference. White space at both ends is ignored, and a run of white space counts as
    /// one space; case matters. If the reference is one line, the final answer is one line too, and a full stop at its
    /// end that the reference lacks is ignored.
    Exact,
    /// The last number of the final answer equals that of the reference, exactly. `1,234.50`, `$1234.5` and `1234.5`
    /// are equal, and so are `3/4`, `\frac{3}{4}` and `0.75`; a comma separates thousands. The units `$` and `%` are
    /// ignored: `50%` is 50. If the final answer has no number, the last number of the whole answer counts.
    Number,
}

/// Grade of one answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grade {
    /// Whether the answer is right.
    pub correct: bool,
    /// Text or number that was compared; `None` if the answer has none. A number is written without separators and units,
    /// `1234.5` or `3/4`.
    pub extracted: Option<String>,
}

impl Grader {
    /// Name in the run file and in `verdicts/`.
    pub fn name(self) -> &'static str {
        match self {
            Grader::Exact => "exact",
            Grader::Number => "number",
        }
    }

    /// Rule for right answers, for the report.
    pub fn rule(self) -> &'static str {
        match self {
            Grader::Exact => "the final answer equals the reference",
            Grader::Number => "the last number of the final answer equals the reference's",
        }
    }

    /// Extracts from `reference` the text or number that answers are compared with. `None` if the reference is empty or
    /// has no number, so that no answer can be right.
    pub fn expected(self, reference: &str) -> Option<String> {
        match self {
            Grader::Exact => {
                let several_lines = trim(tail(reference)).contains('\n');
                exact(reference, several_lines)
            }
            Grader::Number => last_number(reference).map(|n| n.to_string()),
        }
    }

    /// Grades `answer`. No answer is right if the reference has no [`expected`](Self::expected) text or number.
    pub fn grade(self, answer: &str, reference: &str) -> Grade {
        match self {
            Grader::Exact => {
                let several_lines = trim(tail(reference)).contains('\n');
                let expected = exact(reference, several_lines);
                let mut extracted = exact(answer, several_lines);
                if let (Some(found), Some(expected)) = (&mut extracted, &expected)
                    && found.len() > 1
                    && found.ends_with('.')
                    && !expected.ends_with('.')
                {
                    found.pop();
                }
                Grade {
                    correct: extracted.is_some() && extracted == expected,
                    extracted,
                }
            }
            Grader::Number => {
                let (found, expected) = (last_number(answer), last_number(reference));
                Grade {
                    correct: found.is_some() && found == expected,
                    extracted: found.map(|n| n.to_string()),
                }
            }
        }
    }
}

/// Extracts the final answer with single spaces, as one line or as all lines after the marker.
fn exact(text: &str, several_lines: bool) -> Option<String> {
    let tail = trim(tail(text));
    let tail = match several_lines {
        true => tail,
        false => final_line(text, tail),
    };
    let words: Vec<&str> = trim(tail).split_whitespace().collect();
    Some(words.join(" ")).filter(|words| !words.is_empty())
}

/// Returns the first line of `tail` if `text` has a marker, or else the whole `tail`.
fn final_line<'a>(text: &str, tail: &'a str) -> &'a str {
    if tail.len() == trim(text).len() {
        return tail;
    }
    tail.lines().next().unwrap_or(tail)
}

fn last_number(text: &str) -> Option<Number> {
    let tail = trim(tail(text));
    number::last(final_line(text, tail)).or_else(|| number::last(text))
}

/// Removes white space and Markdown emphasis around an answer.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || c == '*')
}

/// Returns the text after the last marker, or the whole text.
fn tail(text: &str) -> &str {
    let hashes = text.rfind("####").map(|at| (at, text.get(at + 4..)));
    // Only ASCII letters change, so byte offsets are the same in both strings.
    let lower = text.to_ascii_lowercase();
    let answer = lower
        .rmatch_indices("answer")
        .find_map(|(at, word)| Some((at, answer_start(&lower, at + word.len())?)))
        .map(|(at, from)| (at, text.get(from..)));
    let boxed = text
        .rmatch_indices("\\boxed{")
        .find_map(|(at, mark)| Some((at, Some(in_braces(text.get(at + mark.len()..)?)?))));
    [hashes, answer, boxed]
        .into_iter()
        .flatten()
        .max_by_key(|(at, _)| *at)
        .and_then(|(_, tail)| tail)
        .unwrap_or(text)
}

/// Returns the offset of the answer after the word "answer" that ends at `from`: after a colon, or after "is" with an
/// optional colon. `None` if the word is not a marker.
fn answer_start(lower: &str, from: usize) -> Option<usize> {
    let rest = lower.get(from..)?;
    let word = rest.trim_start_matches([' ', '*']);
    if let Some(after) = word.strip_prefix(':') {
        return Some(lower.len() - after.len());
    }
    let after = word.strip_prefix("is").filter(|_| rest.starts_with(' '))?;
    if after.starts_with(|c: char| c.is_alphanumeric()) {
        return None;
    }
    let after = after.trim_start_matches([' ', '*']);
    let after = after.strip_prefix(':').unwrap_or(after);
    Some(lower.len() - after.len())
}

/// Returns the text up to the brace that closes an open one; `None` if that brace is missing.
fn in_braces(text: &str) -> Option<&str> {
    let mut depth = 1;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return text.get(..at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn right(grader: Grader, answer: &str, reference: &str) {
        let grade = grader.grade(answer, reference);
        assert!(grade.correct, "{answer:?} {reference:?} {grade:?}");
    }

    #[track_caller]
    fn wrong(grader: Grader, answer: &str, reference: &str) {
        let grade = grader.grade(answer, reference);
        assert!(!grade.correct, "{answer:?} {reference:?} {grade:?}");
    }

    fn extracted(grader: Grader, answer: &str) -> Option<String> {
        grader.grade(answer, "0").extracted
    }

    #[test]
    fn the_final_answer_follows_the_last_marker() {
        let final_answer = |text| extracted(Grader::Exact, text).unwrap();
        assert_eq!(final_answer("2 + 2 = 4\n#### 4"), "4");
        assert_eq!(final_answer("#### 3\nNo, wait.\n#### 4"), "4");
        assert_eq!(final_answer("Answer: 3. Checking … the answer is 4"), "4");
        assert_eq!(final_answer("#### 3\nSo \\boxed{4} it is."), "4");
        assert_eq!(final_answer("\\boxed{3}\n#### 4"), "4");
        assert_eq!(final_answer("FINAL ANSWER: Paris"), "Paris");
        assert_eq!(final_answer("**Answer:** Paris"), "Paris");
        assert_eq!(final_answer("**Final Answer**: Paris"), "Paris");
        assert_eq!(final_answer("Answer:\n\n  Paris\n\nGlad to help!"), "Paris");
        assert_eq!(final_answer("The answer is: **Paris**"), "Paris");
        assert_eq!(final_answer("The answer is **Paris**"), "Paris");
        assert_eq!(final_answer("\\boxed{\\frac{1}{2}}"), "\\frac{1}{2}");
        assert_eq!(final_answer("just Paris"), "just Paris");
        assert_eq!(final_answer("İstanbul’s answer: Ü"), "Ü");
    }

    #[test]
    fn words_that_resemble_a_marker_are_ignored() {
        let final_answer = |text| extracted(Grader::Exact, text).unwrap();
        assert_eq!(final_answer("answers: many"), "answers: many");
        assert_eq!(
            final_answer("the answer isn't here"),
            "the answer isn't here"
        );
        assert_eq!(
            final_answer("my answer island\nis big"),
            "my answer island is big",
            "the whole text, since there is no marker"
        );
        assert_eq!(final_answer("### 4"), "### 4");
        assert_eq!(
            final_answer("Answer: 4 \\boxed{5"),
            "4 \\boxed{5",
            "cut off"
        );
    }

    #[test]
    fn exact_normalises_only_white_space() {
        right(Grader::Exact, "  New\u{a0}York\t City \n", "New York City");
        right(Grader::Exact, "The answer is Paris.", "Paris");
        right(Grader::Exact, "Answer: 4", "some steps\n#### 4");
        right(Grader::Exact, "Answer: e.g.", "e.g.");
        right(Grader::Exact, "Answer: a\nb\n", "a\nb");
        wrong(Grader::Exact, "Answer: a b", "ab");
        wrong(Grader::Exact, "paris", "Paris");
        wrong(Grader::Exact, "4.0", "4");
        wrong(Grader::Exact, "Paris, France", "Paris");
        wrong(Grader::Exact, "Paris", "Paris.");
    }

    #[test]
    fn an_empty_answer_is_never_right() {
        for grader in [Grader::Exact, Grader::Number] {
            for empty in ["", "  \n", "Answer:", "####", "\\boxed{}", "**"] {
                wrong(grader, empty, "");
                wrong(grader, empty, "4");
                wrong(grader, "4", empty);
                assert_eq!(grader.expected(empty), None, "{grader:?} {empty:?}");
            }
        }
        assert_eq!(Grader::Number.expected("no number"), None);
        assert_eq!(
            Grader::Number.grade("I cannot say", "4"),
            Grade {
                correct: false,
                extracted: None
            }
        );
    }

    #[test]
    fn gsm8k_references_and_answers() {
        let reference = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72";
        assert_eq!(Grader::Number.expected(reference).unwrap(), "72");
        right(Grader::Number, "She sold 72 clips.", reference);
        right(Grader::Number, "48 + 24 = 72.", reference);
        right(Grader::Number, "#### 72.00\nThat took 3 steps.", reference);
        right(Grader::Number, "The answer is $72", reference);
        wrong(Grader::Number, "48 + 24 = 72, not 24", reference);
        wrong(Grader::Number, "#### 720", reference);
        wrong(Grader::Number, "7 2", reference);
        right(Grader::Number, "#### 2,125", "#### 2125");
        right(Grader::Number, "-10", "#### -10");
    }

    #[test]
    fn a_final_answer_without_a_number_falls_back_to_the_text() {
        right(Grader::Number, "The answer is as follows:\n3 + 4 = 7", "7");
        right(Grader::Number, "3 + 4 = 7\n####", "7");
        wrong(Grader::Number, "The answer is 6.\n3 + 4 = 7", "7");
    }

    #[test]
    fn graders_are_written_in_lower_case() {
        for grader in [Grader::Exact, Grader::Number] {
            let text = serde_json::to_string(&grader).unwrap();
            assert_eq!(text, format!("\"{}\"", grader.name()));
            assert_eq!(serde_json::from_str::<Grader>(&text).unwrap(), grader);
        }
    }
}
