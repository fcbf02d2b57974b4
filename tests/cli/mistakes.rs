//! The mistakes that newcomers make. `docs/mistakes.md` is made from this list.

use std::fs;

use crate::docs::is_current;
use crate::fixture::{Run, VOCABULARY, write_model, write_tokenizer};

const INTRO: &str = "# Mistakes that everybody makes once

Each with what Potstill says about it, on the tiny run of its tests. Exit code 2 is a mistake in the run file, the flags or what they name; 1 is everything else that fails. `potstill check FILE` finds most of them without computing anything.

This page is made from `tests/cli/mistakes.rs`: `POTSTILL_UPDATE=1 cargo test --release --workspace --test cli -- docs mistakes` writes it again.
";

struct Mistake {
    /// What was done, as a heading.
    title: &'static str,
    /// How a run that works is broken.
    breaks: fn(&Run),
    command: &'static [&'static str],
    /// What the message has to contain: the place, and the way out.
    says: &'static [&'static str],
}

const CHECK: &[&str] = &["check", "run.toml"];
const RUN: &[&str] = &["run", "run.toml"];

const MISTAKES: &[Mistake] = &[
    Mistake {
        title: "No run file named",
        breaks: |_| {},
        command: &["run"],
        says: &["<FILE>", "Usage"],
    },
    Mistake {
        title: "A run file that is not there",
        breaks: |_| {},
        command: &["check", "rum.toml"],
        says: &[
            "cannot read the run file rum.toml",
            "takes the path of a TOML file",
        ],
    },
    Mistake {
        title: "The data in place of the run file",
        breaks: |_| {},
        command: &["run", "prompts.jsonl"],
        says: &[
            "prompts.jsonl is not a run file",
            "init --data prompts.jsonl",
        ],
    },
    Mistake {
        title: "A key misspelt",
        breaks: |run| run.edit("steps = 6", "step = 6"),
        command: CHECK,
        says: &["run.toml:27:1", "did you mean `steps`?"],
    },
    Mistake {
        title: "A key in the wrong table",
        breaks: |run| run.edit("steps = 6", "steps = 6\ntemperature = 0.7"),
        command: CHECK,
        says: &["run.toml:28:1", "it belongs into [collect]"],
    },
    Mistake {
        title: "A table misspelt",
        breaks: |run| run.edit("[teacher]", "[techer]"),
        command: CHECK,
        says: &["run.toml:9:2", "did you mean `teacher`?"],
    },
    Mistake {
        title: "Text where a number belongs",
        breaks: |run| run.edit("steps = 6", "steps = \"6\""),
        command: CHECK,
        says: &["run.toml:27:9", "expected a number"],
    },
    Mistake {
        title: "A learning rate of 0",
        breaks: |run| run.edit("learning_rate = 1e-2", "learning_rate = 0"),
        command: CHECK,
        says: &[
            "`learning_rate` in [train]",
            "expected a number above 0, not 0",
        ],
    },
    Mistake {
        title: "A micro-batch larger than the batch",
        breaks: |run| run.edit("micro_batch = 2", "micro_batch = 8"),
        command: CHECK,
        says: &["`micro_batch` in [train]: 8 is more than `batch`, which is 4"],
    },
    Mistake {
        title: "No signals asked for",
        breaks: |run| run.edit("signals = { top_k = 6 }\n", ""),
        command: CHECK,
        says: &["[collect]", "add `signals = { top_k = 64 }`"],
    },
    Mistake {
        title: "The teacher as its own student",
        breaks: |run| run.edit("[student]\nevery = 2", "[student]"),
        command: CHECK,
        says: &["[student]", "set `every = 2`"],
    },
    Mistake {
        title: "An environment variable that is not set",
        breaks: |run| run.edit("\"model\"", "\"${POTSTILL_REAL}/model\""),
        command: CHECK,
        says: &["POTSTILL_REAL is not set", "`export POTSTILL_REAL=…`"],
    },
    Mistake {
        title: "A wrong path to the data",
        breaks: |run| run.edit("prompts.jsonl", "promts.jsonl"),
        command: CHECK,
        says: &["`path` in [import]", "there is no file promts.jsonl"],
    },
    Mistake {
        title: "A CSV file named JSONL",
        breaks: |run| run.write("prompts.jsonl", "text,answer\nOnce,upon\n"),
        command: CHECK,
        says: &["prompts.jsonl:1"],
    },
    Mistake {
        title: "A column misspelt",
        breaks: |run| run.edit("text = \"text\"", "text = \"txt\""),
        command: CHECK,
        says: &["has no column `txt`", "`text`"],
    },
    Mistake {
        title: "A teacher's folder without `config.json`",
        breaks: |run| fs::remove_file(run.path("model/config.json")).unwrap(),
        command: CHECK,
        says: &["`path` in [teacher]", "model has no config.json"],
    },
    Mistake {
        title: "A base model without a chat template",
        breaks: |run| run.edit("template = \"plain\"\n", ""),
        command: CHECK,
        says: &["model has no chat template", "set `template = \"plain\"`"],
    },
    Mistake {
        title: "A student with another tokenizer than the teacher's",
        breaks: |run| {
            write_model(&run.path("other"), VOCABULARY + 1);
            let special = ["<unk>", "<s>", "</s>", "<extra>"];
            write_tokenizer(&run.path("other"), &special, "</s>");
            run.edit("[student]\nevery = 2", "[student]\npath = \"other\"");
        },
        command: CHECK,
        says: &[
            "is not that of the teacher in model",
            "leave `path` of [student] out",
        ],
    },
    Mistake {
        title: "A tokenizer larger than the model's embedding",
        breaks: |run| write_model(&run.path("model"), VOCABULARY - 9),
        command: CHECK,
        says: &["are not of one checkpoint"],
    },
    Mistake {
        title: "A prompt too long for the teacher's context",
        breaks: |run| {
            let line = "{\"text\": \"this one is longer than the model can hold\"}\n";
            run.write("prompts.jsonl", line);
        },
        command: CHECK,
        says: &[
            "prompts.jsonl:1",
            "context of 48",
            "`max_new_tokens` in [collect]",
        ],
    },
    Mistake {
        title: "A GPU asked of a build for CPUs",
        breaks: |_| {},
        command: &["run", "run.toml", "--device", "cuda"],
        says: &["no device `cuda`", "computes on cpu"],
    },
    Mistake {
        title: "The run directory of another run",
        breaks: |run| {
            run.potstill(&["import", "run.toml"]);
            run.edit("name = \"tiny\"", "name = \"other\"");
        },
        command: &["run", "run.toml", "--run-dir", "runs/tiny"],
        says: &[
            "run directory of \"tiny\", not of \"other\"",
            "--run-dir DIR",
        ],
    },
    Mistake {
        title: "No answer that finished",
        breaks: |run| {
            run.edit("keep = \"all\"", "keep = \"finished\"");
            run.edit("max_new_tokens = 12", "max_new_tokens = 1");
        },
        command: RUN,
        says: &[
            "cut at `max_new_tokens`",
            "raise `max_new_tokens` in [collect]",
        ],
    },
    Mistake {
        title: "Everything held out",
        breaks: |run| run.edit("heldout = 0.4", "heldout = 0.9999999"),
        command: RUN,
        says: &[
            "0 answers would be left to train on",
            "lower `heldout` in [curate]",
        ],
    },
];

#[test]
fn mistakes_get_a_message_that_helps() {
    assert!(MISTAKES.len() >= 20);
    let mut page = INTRO.to_owned();
    for (number, mistake) in MISTAKES.iter().enumerate() {
        let run = Run::new();
        (mistake.breaks)(&run);
        let said = run.potstill(mistake.command);
        assert!(
            [1, 2].contains(&said.code),
            "{}: {}",
            mistake.title,
            said.stderr
        );
        let message = said.stderr.split_once("error: ");
        let (_, message) = message.unwrap_or_else(|| panic!("{}: {}", mistake.title, said.stderr));
        for part in mistake.says {
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
            said.code,
            message.trim_end()
        );
    }
    is_current("docs/mistakes.md", &page);
}
