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
layers = { every = 2 }

[train]
steps = 40
batch = 8
micro_batch = 4
learning_rate = 5e-4
warmup = 5
loss = { forward_kl = 1.0 }
"#;

/// Errors of a run file, or `fine`.
fn errors_of(text: &str) -> String {
    match parse(Path::new("tiny.toml"), text) {
        Ok(_) => "fine".to_owned(),
        Err(e) => e.to_string(),
    }
}

#[test]
fn a_budget_needs_the_longest_answer_only_if_answers_are_collected() {
    let errors = |import: &str, tables: &str| {
        errors_of(&format!(
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
    assert_eq!(errors(given, "[score]\ntop_k = 4\n"), "fine");
    let limit = "[collect]\nmax_new_tokens = 9\nsignals = { top_k = 4 }\n";
    assert_eq!(errors("", limit), "fine");
    let open = errors("", "[collect]\nsignals = { top_k = 4 }\n");
    assert_eq!(open.matches("set `max_new_tokens`").count(), 2, "{open}");
}

#[test]
fn the_examples_are_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let files = std::fs::read_dir(folder)
        .unwrap()
        .map(|f| f.unwrap().path());
    let mut seen = 0;
    for path in files.filter(|p| p.extension().is_some_and(|e| e == "toml")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let errors = errors_of(&text.replace("${POTSTILL_REAL}", "real"));
        assert_eq!(errors, "fine", "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 5);
}

#[test]
fn defaults_fill_in_absent_keys() {
    let file = parse(Path::new("tiny.toml"), WHOLE).unwrap();
    assert_eq!(file.train.chunk_rows, 256);
    assert_eq!(file.train.controls, [Control::Sft]);
    assert_eq!(file.train.objective.cross_entropy, 0.0);
    assert_eq!(file.curate.keep, KeptAnswers::Finished);
    assert_eq!(file.teacher.unwrap().dtype, FloatType::F32);
    assert_eq!(file.import.answers, AnswerSource::Teacher);
}

#[test]
fn dev_and_test_leave_prompts_to_train_on() {
    let errors = |curate: &str| errors_of(&format!("{WHOLE}\n[curate]\n{curate}\n"));
    assert_eq!(errors("dev = 0\ntest = 0.99"), "fine");
    assert_eq!(errors("dev = 0.5\ntest = 0.49"), "fine");
    for curate in ["dev = 0.5\ntest = 0.5", "test = 0.95"] {
        let error = errors(curate);
        assert!(
            error.contains("`test` in [curate]: with `dev`, which is 0."),
            "{error}"
        );
    }
    assert!(errors("dev = 1").contains("1 is out of range"));
    assert!(errors("test = 0").contains("0 is out of range"));
}

#[test]
fn a_mean_is_exported_only_if_there_is_one() {
    let text = format!("{WHOLE}\n[export]\nweights = \"mean\"\n");
    let error = errors_of(&text);
    assert!(
        error.contains("`weights` in [export]: there is no mean"),
        "{error}"
    );
    let with_ema = text.replace("warmup = 5", "warmup = 5\nema = 0.9");
    assert_eq!(errors_of(&with_ema), "fine");
}

#[test]
fn without_distributions_the_default_is_no_controls() {
    let text_only = WHOLE
        .replace("signals = { top_k = 64, temperatures = [2.0] }\n", "")
        .replace("{ forward_kl = 1.0 }", "{ cross_entropy = 1.0 }");
    let file = parse(Path::new("tiny.toml"), &text_only).unwrap();
    assert_eq!(file.train.controls, []);
    let errors = errors_of(&text_only.replace("warmup = 5", "controls = [\"sft\"]"));
    assert!(
        errors.contains("`controls` in [train]: without distributions"),
        "{errors}"
    );
}

#[test]
fn paths_are_resolved() {
    let file = parse(Path::new("folder/tiny.toml"), WHOLE).unwrap();
    assert_eq!(
        file.import.path.as_path(),
        Path::new("folder/prompts.jsonl")
    );
    let teacher = file.teacher.unwrap();
    assert_eq!(
        teacher.path.unwrap().as_path(),
        Path::new("folder/models/tiny")
    );
    assert_eq!(teacher.template, None);
}

#[test]
fn a_loss_lists_its_divergences() {
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

/// Edits of [`WHOLE`], one for each kind of mistake.
#[test]
fn each_mistake_is_reported_at_its_place() {
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
        (
            "not a number",
            "learning_rate = 5e-4",
            "learning_rate = nan",
        ),
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
        ("no teacher", "[teacher]\npath = \"models/tiny\"\n", ""),
        (
            "given answers with signals",
            "[teacher]\npath = \"models/tiny\"\n",
            "answers = \"given\"\n",
        ),
        (
            "no distributions",
            "signals = { top_k = 64, temperatures = [2.0] }",
            "",
        ),
        (
            "distributions stored twice",
            "[student]",
            "[score]\ntop_k = 8\n[student]",
        ),
        (
            "a student that equals its teacher",
            "layers = { every = 2 }",
            "",
        ),
        (
            "pruned and random",
            "layers = { every = 2 }",
            "intermediate_size = 8\nrandom = { hidden_size = 64, intermediate_size = 128, layers = 2, heads = 3 }",
        ),
        ("no weight", "forward_kl = 1.0", "forward_kl = 0.0"),
        (
            "label smoothing without a cross-entropy",
            "forward_kl = 1.0",
            "forward_kl = 1.0, label_smoothing = 0.1",
        ),
        (
            "a mixture with a share of 1",
            "forward_kl = 1.0",
            "skew_kl = { alpha = 1.0 }",
        ),
        (
            "a temperature that is not stored",
            "forward_kl = 1.0",
            "forward_kl = 1.0, temperature = 3.0",
        ),
        (
            "the square of temperature 1",
            "forward_kl = 1.0",
            "forward_kl = 1.0, temperature_squared = true",
        ),
        (
            "tail draws that are not stored, for another divergence, at another temperature",
            "forward_kl = 1.0",
            "jsd = { beta = 0.5 }, tail = \"draws\", temperature = 2.0",
        ),
        (
            "a control twice",
            "warmup = 5",
            "controls = [\"sft\", \"sft\"]",
        ),
        (
            "both steps and epochs",
            "steps = 40",
            "steps = 40\nepochs = 2.5",
        ),
        ("half a step of warm-up", "warmup = 5", "warmup = 5.5"),
        (
            "a rate and a list of rates",
            "warmup = 5",
            "learning_rates = [1e-3, 1e-4]",
        ),
        (
            "a single rate to choose from",
            "learning_rate = 5e-4",
            "learning_rates = [1e-3]",
        ),
        (
            "a rate twice, and below the lowest rate",
            "learning_rate = 5e-4",
            "learning_rates = [1e-3, 1e-3]\nmin_learning_rate = 2e-3",
        ),
        (
            "a list of rates without dev",
            "learning_rate = 5e-4\nwarmup = 5\nloss = { forward_kl = 1.0 }\n",
            "learning_rates = [1e-3, 1e-4]\n\n[curate]\ndev = 0\n",
        ),
        ("layers that are not in order", "{ every = 2 }", "[0, 2, 1]"),
        (
            "layers by two rules",
            "{ every = 2 }",
            "{ every = 2, first = 8 }",
        ),
        ("unknown rule of layers", "{ every = 2 }", "{ evry = 2 }"),
        ("layers that are a number", "{ every = 2 }", "2"),
        ("unknown control", "warmup = 5", "controls = [\"stf\"]"),
        ("a key that is not ASCII", "seed = 17", "\"sé\" = 1"),
    ];
    let mut all = String::new();
    for (title, from, to) in edits {
        assert!(WHOLE.contains(from), "{title}");
        all += &format!("# {title}\n{}\n\n", errors_of(&WHOLE.replacen(from, to, 1)));
    }
    let several = WHOLE
        .replace("micro_batch = 4", "micro_batch = 9")
        .replace("warmup = 5", "warmup = 50\nmin_learning_rate = 1");
    all += &format!("# several rules between keys\n{}\n\n", errors_of(&several));
    all += &format!("# an empty file\n{}\n", errors_of(""));
    insta::assert_snapshot!(all);
}
