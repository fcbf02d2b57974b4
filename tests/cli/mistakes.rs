//! Common mistakes of new users and the messages they cause. `docs/mistakes.md` is generated from this
//! list.

use std::fs;

use crate::docs::check_page;
use crate::fixture::{Run, VOCABULARY, write_model, write_tokenizer};

const INTRO: &str = "# Common mistakes

This page shows common mistakes with the messages of Potstill, on the tiny run of its tests. Exit code 2 means a mistake in the run file, in the flags or in a file that they name; exit code 1 means any other failure. `potstill check FILE` finds most mistakes without computing anything.

The page is generated from `tests/cli/mistakes.rs`; `POTSTILL_UPDATE=1 cargo test --release --workspace --test cli -- docs mistakes` updates it.
";

struct Mistake {
    /// Heading that names the mistake.
    title: &'static str,
    /// Makes the mistake in a run that works.
    make: fn(&Run),
    command: &'static [&'static str],
    /// Texts that the message must contain: the position and the hint.
    message: &'static [&'static str],
}

const CHECK: &[&str] = &["check", "run.toml"];
const RUN: &[&str] = &["run", "run.toml"];

const MISTAKES: &[Mistake] = &[
    Mistake {
        title: "No run file given",
        make: |_| {},
        command: &["run"],
        message: &["<FILE>", "Usage"],
    },
    Mistake {
        title: "A run file that does not exist",
        make: |_| {},
        command: &["check", "rum.toml"],
        message: &[
            "cannot read the run file rum.toml",
            "hint: give the path of a TOML file",
        ],
    },
    Mistake {
        title: "The data file given as the run file",
        make: |_| {},
        command: &["run", "prompts.jsonl"],
        message: &[
            "prompts.jsonl is not a run file",
            "init --data prompts.jsonl",
        ],
    },
    Mistake {
        title: "A misspelt key",
        make: |run| run.edit("steps = 6", "step = 6"),
        command: CHECK,
        message: &["run.toml:27:1", "did you mean `steps`?"],
    },
    Mistake {
        title: "A key in the wrong table",
        make: |run| run.edit("steps = 6", "steps = 6\ntemperature = 0.7"),
        command: CHECK,
        message: &["run.toml:28:1", "`temperature` is a key of [collect]"],
    },
    Mistake {
        title: "A misspelt table",
        make: |run| run.edit("[teacher]", "[techer]"),
        command: CHECK,
        message: &["run.toml:9:2", "did you mean `teacher`?"],
    },
    Mistake {
        title: "A string in place of a number",
        make: |run| run.edit("steps = 6", "steps = \"6\""),
        command: CHECK,
        message: &["run.toml:27:9", "expected a number"],
    },
    Mistake {
        title: "A learning rate of 0",
        make: |run| run.edit("learning_rate = 1e-2", "learning_rate = 0"),
        command: CHECK,
        message: &[
            "`learning_rate` in [train]",
            "0 is out of range",
            "hint: set a number above 0",
        ],
    },
    Mistake {
        title: "A micro-batch larger than the batch",
        make: |run| run.edit("micro_batch = 2", "micro_batch = 8"),
        command: CHECK,
        message: &["`micro_batch` in [train]: 8 is more than `batch`, which is 4"],
    },
    Mistake {
        title: "No signals requested",
        make: |run| run.edit("signals = { top_k = 6 }\n", ""),
        command: CHECK,
        message: &["[collect]", "add `signals = { top_k = 64 }`"],
    },
    Mistake {
        title: "A student that is identical to its teacher",
        make: |run| run.edit("[student]\nlayers = { every = 2 }", "[student]"),
        command: CHECK,
        message: &["[student]", "set `layers = { first"],
    },
    Mistake {
        title: "An environment variable that is not set",
        make: |run| run.edit("\"model\"", "\"${POTSTILL_REAL}/model\""),
        command: CHECK,
        message: &["POTSTILL_REAL is not set", "run `export POTSTILL_REAL=…`"],
    },
    Mistake {
        title: "A wrong path to the data",
        make: |run| run.edit("prompts.jsonl", "promts.jsonl"),
        command: CHECK,
        message: &["`path` in [import]", "the file promts.jsonl does not exist"],
    },
    Mistake {
        title: "A CSV file named JSONL",
        make: |run| run.write("prompts.jsonl", "text,answer\nOnce,upon\n"),
        command: CHECK,
        message: &["prompts.jsonl:1"],
    },
    Mistake {
        title: "A misspelt column",
        make: |run| run.edit("text = \"text\"", "text = \"txt\""),
        command: CHECK,
        message: &["has no column `txt`", "`text`"],
    },
    Mistake {
        title: "A teacher's folder without `config.json`",
        make: |run| fs::remove_file(run.path("model/config.json")).unwrap(),
        command: CHECK,
        message: &["`path` in [teacher]", "model has no config.json"],
    },
    Mistake {
        title: "A base model without a chat template",
        make: |run| run.edit("template = \"plain\"\n", ""),
        command: CHECK,
        message: &["model has no chat template", "hint: set `template`"],
    },
    Mistake {
        title: "A student whose tokenizer differs from the teacher's",
        make: |run| {
            write_model(&run.path("other"), VOCABULARY + 1);
            let special = ["<unk>", "<s>", "</s>", "<extra>"];
            write_tokenizer(&run.path("other"), &special, "</s>");
            run.edit(
                "[student]\nlayers = { every = 2 }",
                "[student]\npath = \"other\"",
            );
        },
        command: CHECK,
        message: &[
            "differs from the teacher's in model",
            "hint: remove `path` of [student]",
        ],
    },
    Mistake {
        title: "A tokenizer larger than the model's embedding",
        make: |run| write_model(&run.path("model"), VOCABULARY - 9),
        command: CHECK,
        message: &["come from different checkpoints"],
    },
    Mistake {
        title: "A prompt too long for the teacher's context",
        make: |run| {
            let line = "{\"text\": \"this one is longer than the model can hold\"}\n";
            run.write("prompts.jsonl", line);
        },
        command: CHECK,
        message: &[
            "prompts.jsonl:1",
            "context of 48",
            "`max_new_tokens` in [collect]",
        ],
    },
    Mistake {
        title: "A GPU requested from a build for CPUs",
        make: |_| {},
        command: &["run", "run.toml", "--device", "cuda"],
        message: &["no device `cuda`", "computes on cpu"],
    },
    Mistake {
        title: "A run directory that belongs to another run",
        make: |run| {
            run.potstill(&["import", "run.toml"]);
            run.edit("name = \"tiny\"", "name = \"other\"");
        },
        command: &["run", "run.toml", "--run-dir", "runs/tiny"],
        message: &[
            "run directory of \"tiny\", not of \"other\"",
            "--run-dir DIR",
        ],
    },
    Mistake {
        title: "No answer finished",
        make: |run| {
            run.edit("keep = \"all\"", "keep = \"finished\"");
            run.edit("max_new_tokens = 12", "max_new_tokens = 1");
        },
        command: RUN,
        message: &[
            "cut at `max_new_tokens`",
            "raise `max_new_tokens` in [collect]",
        ],
    },
    Mistake {
        title: "No prompt left to train on",
        make: |run| run.edit("test = 0.4", "dev = 0\ntest = 0.9999999"),
        command: RUN,
        message: &[
            "0 answers are left to train on",
            "lower `dev` or `test` in [curate]",
        ],
    },
];

#[test]
fn mistakes_cause_helpful_messages() {
    assert!(MISTAKES.len() >= 20);
    let mut page = INTRO.to_owned();
    for (number, mistake) in MISTAKES.iter().enumerate() {
        let run = Run::new();
        (mistake.make)(&run);
        let output = run.potstill(mistake.command);
        assert!(
            [1, 2].contains(&output.code),
            "{}: {}",
            mistake.title,
            output.stderr
        );
        let message = output.stderr.split_once("error: ");
        let (_, message) =
            message.unwrap_or_else(|| panic!("{}: {}", mistake.title, output.stderr));
        for part in mistake.message {
            assert!(
                message.contains(part),
                "{}: no {part:?} in {message}",
                mistake.title
            );
        }
        page += &format!(
            "\n## {}. {}\n\n`potstill {}`, exit code {}:\n\n```\nerror: {}\n```\n",
            number + 1,
            mistake.title,
            mistake.command.join(" "),
            output.code,
            message.trim_end()
        );
    }
    check_page("docs/mistakes.md", &page);
}
