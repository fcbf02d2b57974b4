use std::path::Path;

use potstill_datasets::{AnswerSource, FloatType, KeptAnswers};
use potstill_student::Control;

use super::*;

const WHOLE: &str = r#"[run]
name = "tiny"
seed = 17

[import]
path = "prompts.jsonl"
columns = { question = "question", answer = "answer" }

[teacher]
path = "models/tiny"

[collect]
signals = { top_k = 64, temperatures = [2.0] }

[student]
every = 2

[train]
steps = 40
batch = 8
micro_batch = 4
learning_rate = 5e-4
warmup = 5
loss = { forward_kl = 1.0 }
"#;

fn said(text: &str) -> String {
    match parse(Path::new("tiny.toml"), text) {
        Ok(_) => "fine".to_owned(),
        Err(e) => e.to_string(),
    }
}

#[test]
fn a_cap_needs_the_longest_answer_only_where_answers_are_asked_for() {
    let said = |import: &str, tables: &str| {
        said(&format!(
            r#"[run]
name = "tiny"

[import]
path = "prompts.jsonl"
columns = {{ instruction = "question", output = "answer" }}
{import}
[teacher]
url = "http://127.0.0.1:1/v1"
model = "m"
tokenizer = "models/tiny"
price = {{ input = 1.0, output = 2.0 }}

[budget]
usd = 1
tokens = 1000

{tables}
[student]
path = "models/tiny"

[train]
steps = 40
batch = 8
learning_rate = 5e-4
"#
        ))
    };
    let given = "answers = \"given\"\n";
    assert_eq!(said(given, "[score]\ntop_k = 4\n"), "fine");
    let limit = "[collect]\nmax_new_tokens = 9\nsignals = { top_k = 4 }\n";
    assert_eq!(said("", limit), "fine");
    let open = said("", "[collect]\nsignals = { top_k = 4 }\n");
    assert_eq!(open.matches("set `max_new_tokens`").count(), 2, "{open}");
}

#[test]
fn every_example_is_fine() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let files = std::fs::read_dir(folder)
        .unwrap()
        .map(|f| f.unwrap().path());
    let mut seen = 0;
    for path in files.filter(|p| p.extension().is_some_and(|e| e == "toml")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let said = said(&text.replace("${POTSTILL_REAL}", "real"));
        assert_eq!(said, "fine", "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 5);
}

#[test]
fn a_whole_file_is_fine_and_defaults_fill_the_rest() {
    let file = parse(Path::new("tiny.toml"), WHOLE).unwrap();
    assert_eq!(file.train.chunk_rows, 256);
    assert_eq!(file.train.controls, [Control::Sft, Control::Shuffled]);
    assert_eq!(file.train.objective.cross_entropy, 0.0);
    assert_eq!(file.curate.keep, KeptAnswers::Finished);
    assert_eq!(file.teacher.unwrap().dtype, FloatType::F32);
    assert_eq!(file.import.answers, AnswerSource::Teacher);
}

#[test]
fn a_loss_is_what_the_trainer_takes() {
    let text = WHOLE.replace(
        "{ forward_kl = 1.0 }",
        "{ forward_kl = 0.5, jsd = { beta = 0.1 }, skew_kl = { weight = 0.0, alpha = 0.1 }, cross_entropy = 0.25, label_smoothing = 0.1, temperature = 2.0, tail = \"renormalize\" }",
    );
    let file = parse(Path::new("tiny.toml"), &text).unwrap();
    let objective = file.train.objective;
    let terms = objective.divergences();
    let names = terms.iter();
    let names: Vec<_> = names.map(|t| (t.divergence.name(), t.weight)).collect();
    assert_eq!(names, [("forward_kl", 0.5), ("jsd", 1.0)]);
    assert_eq!(
        (objective.cross_entropy, objective.temperature),
        (0.25, 2.0)
    );
    objective.check().unwrap();
}

/// One edit of [`WHOLE`] a kind of mistake, and what is said about it.
#[test]
fn each_mistake_is_said_with_its_place() {
    let edits = [
        ("unknown key", "steps = 40", "step = 40"),
        ("unknown table", "[student]", "[students]"),
        ("unknown inner key", "top_k = 64", "topk = 64"),
        (
            "missing key",
            "path = \"models/tiny\"\n",
            "dtype = \"f32\"\n",
        ),
        ("wrong type", "steps = 40", "steps = \"forty\""),
        ("a count of zero", "batch = 8", "batch = 0"),
        ("half a step", "steps = 40", "steps = 40.5"),
        (
            "negative rate",
            "learning_rate = 5e-4",
            "learning_rate = -5e-4",
        ),
        ("no number", "learning_rate = 5e-4", "learning_rate = nan"),
        (
            "unknown choice",
            "path = \"models/tiny\"",
            "path = \"m\"\ndtype = \"int8\"",
        ),
        (
            "a name with a slash",
            "name = \"tiny\"",
            "name = \"../tiny\"",
        ),
        ("a bad temperature", "[2.0]", "[2.0, 0.0]"),
        ("not TOML", "seed = 17", "seed = = 17"),
        ("a key twice", "seed = 17", "seed = 17\nseed = 18"),
        (
            "an unset variable",
            "models/tiny",
            "${POTSTILL_NO_SUCH_VARIABLE}/tiny",
        ),
        (
            "two kinds of columns",
            "{ question",
            "{ text = \"t\", question",
        ),
        ("nobody answers", "[teacher]\npath = \"models/tiny\"\n", ""),
        (
            "given answers with signals",
            "[teacher]\npath = \"models/tiny\"\n",
            "answers = \"given\"\n",
        ),
        (
            "no signals",
            "signals = { top_k = 64, temperatures = [2.0] }",
            "",
        ),
        (
            "signals twice",
            "[student]",
            "[score]\ntop_k = 8\n[student]",
        ),
        ("student is the teacher", "every = 2", ""),
        (
            "heads that do not divide",
            "every = 2",
            "random = { hidden_size = 64, intermediate_size = 128, layers = 2, heads = 3 }",
        ),
        ("nothing to learn", "forward_kl = 1.0", "forward_kl = 0.0"),
        (
            "smoothing of nothing",
            "forward_kl = 1.0",
            "forward_kl = 1.0, label_smoothing = 0.1",
        ),
        (
            "a mixture with nothing of one side",
            "forward_kl = 1.0",
            "skew_kl = { alpha = 1.0 }",
        ),
        (
            "a temperature that is not stored",
            "forward_kl = 1.0",
            "forward_kl = 1.0, temperature = 3.0",
        ),
        (
            "a square of nothing",
            "forward_kl = 1.0",
            "forward_kl = 1.0, temperature_squared = true",
        ),
        (
            "draws that are not stored, of too much",
            "forward_kl = 1.0",
            "jsd = { beta = 0.5 }, tail = \"draws\", temperature = 2.0",
        ),
        (
            "a control twice",
            "warmup = 5",
            "controls = [\"sft\", \"sft\"]",
        ),
        ("unknown control", "warmup = 5", "controls = [\"stf\"]"),
        ("non-ASCII before the place", "seed = 17", "\"sé\" = 1"),
    ];
    let mut all = String::new();
    for (title, from, to) in edits {
        assert!(WHOLE.contains(from), "{title}");
        all += &format!("# {title}\n{}\n\n", said(&WHOLE.replacen(from, to, 1)));
    }
    let several = WHOLE
        .replace("micro_batch = 4", "micro_batch = 9")
        .replace("warmup = 5", "warmup = 50\nmin_learning_rate = 1");
    all += &format!("# several rules between keys\n{}\n\n", said(&several));
    all += &format!("# an empty file\n{}\n", said(""));
    insta::assert_snapshot!(all);
}
