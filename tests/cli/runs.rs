//! Whole runs: repeated, with more prompts, with changed settings, and killed.

use std::fs;
use std::time::{Duration, Instant};

use potstill::datasets::{Completion, Signal, read_shard};
use serde_json::json;

use crate::fixture::{Run, interrupt};

#[test]
fn a_run_publishes_each_stage_and_a_second_run_does_nothing() {
    let run = Run::new();
    let check = run.potstill(&["check", "run.toml"]);
    assert_eq!(check.code, 0, "{}", check.stderr);
    insta::assert_snapshot!("check", check.stdout);
    assert!(!run.path("runs").exists(), "`check` leaves nothing behind");
    let dry = run.potstill(&["run", "run.toml", "--dry-run"]);
    insta::assert_snapshot!("dry_run", dry.stderr);

    let output = run.run();
    // Small students are trained in parallel, and finish in any order.
    let mut lines: Vec<&str> = output.stderr.lines().collect();
    let trained = |line: &&&str| line.starts_with("train ");
    let first = lines.iter().position(|line| trained(&line)).unwrap();
    let count = lines.iter().filter(trained).count();
    lines[first..first + count].sort_unstable();
    insta::assert_snapshot!("run", lines.join("\n"));
    for name in [
        "run.toml",
        "ledger.jsonl",
        "prompts/shard-00000.parquet",
        "completions/shard-00000.parquet",
        "signals/shard-00000.parquet",
        "train_manifest.json",
        "dev/shard-00000.parquet",
        "test/shard-00000.parquet",
        "dropped/shard-00000.parquet",
        "curation.json",
        "students/student/metrics.jsonl",
        "students/student/tensorboard/events.out.tfevents.potstill",
        "students/student/export/model.safetensors",
        "students/student/export/config.json",
        "students/student/export/tokenizer.json",
        "students/student/export/README.md",
        "students/untrained/eval/test/samples.parquet",
        "students/sft/eval/test_results.json",
        "students/sft/export_manifest.json",
        "report.md",
        "report.json",
        "_manifest.json",
    ] {
        assert!(run.path("runs/tiny").join(name).is_file(), "{name}");
    }
    let before = run.published();
    // Other tools read a table by the path of its folder, and take all files in the folder for Parquet.
    let tables = |name: &&String| name.ends_with(".parquet");
    for shard in before.keys().filter(tables) {
        let (folder, _) = shard.rsplit_once('/').unwrap();
        for file in before
            .keys()
            .filter(|name| name.starts_with(&format!("{folder}/")))
        {
            assert!(
                file.ends_with(".parquet"),
                "{file} is in the folder of a table"
            );
        }
    }
    let again = run.run();
    insta::assert_snapshot!("second_run", again.stderr);
    assert!(before == run.published());
}

#[test]
fn only_new_prompts_are_sent_to_the_teacher() {
    let run = Run::new();
    run.run();
    run.write_prompts(20);
    let output = run.run();
    let line = output
        .stderr
        .lines()
        .find(|line| line.contains("to ask for"))
        .unwrap();
    insta::assert_snapshot!(line, @"collect: 24 of 40 answers are there (24 of them published), 16 to ask for");
    let kept = fs::read_dir(run.path("runs/tiny/earlier")).unwrap();
    let mut kept = kept.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(!kept.any(|name| name.starts_with("collect-")));
    let ledger = fs::read_to_string(run.path("runs/tiny/ledger.jsonl")).unwrap();
    assert!(ledger.contains(r#""asked":16"#), "{ledger}");

    run.potstill(&["import", "run.toml", "--limit", "4"]);
    let fewer = run.potstill(&["collect", "run.toml"]);
    assert!(fewer.stderr.contains("kept as"), "{}", fewer.stderr);
    let back = run.run();
    assert!(!back.stderr.contains("to ask for"), "{}", back.stderr);
}

#[test]
fn a_changed_setting_keeps_the_old_output() {
    let run = Run::new();
    run.run();
    let first = fs::read(run.path("runs/tiny/completions/shard-00000.parquet")).unwrap();
    run.edit("max_new_tokens = 12", "max_new_tokens = 10");
    let output = run.run();
    let kept = "collect: the earlier output is kept as runs/tiny/earlier/collect-";
    assert!(output.stderr.contains(kept), "{}", output.stderr);
    let trained = "kept as runs/tiny/earlier/train-student-";
    assert!(output.stderr.contains(trained), "{}", output.stderr);
    let entry = output.stderr.split_once(kept).unwrap().1;
    let entry = format!("runs/tiny/earlier/collect-{}", &entry[..12]);
    let old = run.path(&format!("{entry}/completions/shard-00000.parquet"));
    assert!(first == fs::read(old).unwrap());
    // With the first setting again, the answers that were collected for it are reused.
    run.edit("max_new_tokens = 10", "max_new_tokens = 12");
    let back = run.run();
    assert!(!back.stderr.contains("to ask for"), "{}", back.stderr);
    assert!(first == fs::read(run.path("runs/tiny/completions/shard-00000.parquet")).unwrap());
}

#[test]
fn sampling_settings_draws_and_packing_are_recorded() {
    let run = Run::new();
    let recorded = || {
        let manifest = |name: &str| -> serde_json::Value {
            let text = fs::read(run.path("runs/tiny").join(name)).unwrap();
            serde_json::from_slice(&text).unwrap()
        };
        let collect = manifest("completions_manifest.json");
        let train = manifest("students/student_manifest.json");
        [
            collect["settings"]["answers"]["top_k"].clone(),
            collect["settings"]["answers"]["min_p"].clone(),
            collect["settings"]["answers"]["repetition_penalty"].clone(),
            collect["settings"]["answers"]["stop"].clone(),
            collect["settings"]["answers"]["signals"].clone(),
            train["settings"]["train"]["packing"].clone(),
        ]
    };
    run.run();
    let signals = json!({ "top_k": 6.0, "temperatures": [], "tail_draws": 0.0 });
    let none = json!(null);
    let expected = [
        none.clone(),
        json!(0.0),
        json!(1.0),
        json!([]),
        signals,
        json!(false),
    ];
    assert_eq!(recorded(), expected);
    run.edit(
        "samples = 2",
        "samples = 2\ntop_k = 40\nmin_p = 0.05\nrepetition_penalty = 1.1\nstop = [\"##\"]",
    );
    run.edit("{ top_k = 6 }", "{ top_k = 6, tail_draws = 3 }");
    run.edit("micro_batch = 2", "micro_batch = 2\npacking = true");
    run.run();
    let expected = [
        json!(40),
        json!(0.05),
        json!(1.1),
        json!(["##"]),
        json!({ "top_k": 6.0, "temperatures": [], "tail_draws": 3.0 }),
        json!(true),
    ];
    assert_eq!(recorded(), expected);
}

#[test]
fn a_stage_runs_again_only_for_its_own_settings() {
    let run = Run::new();
    run.run();
    run.edit("resamples = 100", "resamples = 200");
    let output = run.run();
    for stage in [
        "import",
        "collect",
        "curate",
        "train student",
        "export student",
        "eval student",
    ] {
        assert!(
            output.stderr.contains(&format!("{stage}: up to date")),
            "{}",
            output.stderr
        );
    }
    assert!(
        !output.stderr.contains("report: up to date"),
        "{}",
        output.stderr
    );
}

/// A run that is killed with SIGKILL at ten moments, and then run again, gives the same bytes.
#[test]
fn a_killed_run_ends_in_the_same_bytes() {
    let whole = Run::new();
    let began = Instant::now();
    whole.run();
    let took = began.elapsed();
    let expected = whole.published();
    for part in 1..=10 {
        let run = Run::new();
        let mut child = run.start(&["run", "run.toml"]);
        std::thread::sleep(took * part / 11);
        child.kill().unwrap();
        child.wait().unwrap();
        run.run();
        let found = run.published();
        let names = |files: &std::collections::BTreeMap<String, Vec<u8>>| -> Vec<String> {
            files.keys().cloned().collect()
        };
        assert_eq!(names(&found), names(&expected), "killed at {part}/11");
        for (name, bytes) in &expected {
            assert!(
                found[name] == *bytes,
                "{name} differs after a kill at {part}/11"
            );
        }
    }
}

/// `score` gives the same distributions as `collect` does with the answers, also after a kill.
#[test]
fn score_gives_what_collect_would_have() {
    let signals = "signals = { top_k = 6 }\n";
    let whole = Run::new();
    whole.run();
    let file = "signals/shard-00000.parquet";
    let expected = whole.published();

    let run = Run::new();
    run.edit(signals, "");
    run.edit("[curate]", "[score]\ntop_k = 6\nbatch = 5\n\n[curate]");
    let mut child = run.start(&["run", "run.toml"]);
    let work = run.path("runs/tiny/.work");
    let began = Instant::now();
    let scoring = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with("score-");
    while !fs::read_dir(&work).is_ok_and(|mut e| e.any(|e| e.is_ok_and(|e| scoring(&e)))) {
        let running = child.try_wait().unwrap().is_none();
        assert!(running && began.elapsed() < Duration::from_secs(60));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    run.run();
    let found = run.published();
    assert!(found[file] == expected[file]);
    let weights = "students/student/export/model.safetensors";
    assert!(found[weights] == expected[weights]);
    let again = run.run();
    assert!(
        again.stderr.contains("score: up to date (24 answers, "),
        "{}",
        again.stderr
    );

    // Conversely, `score` does not repeat `collect` for answers that have distributions already.
    whole.edit(signals, "");
    whole.edit("[curate]", "[score]\ntop_k = 3\n\n[curate]");
    let output = whole.run();
    assert!(
        output.stderr.contains("collect: all 24 answers are there"),
        "{}",
        output.stderr
    );
    assert!(
        output.stderr.contains("score: 24 answers, "),
        "{}",
        output.stderr
    );
    assert!(found[file].len() > whole.published()[file].len());
}

/// Tail draws are stored with the distributions, by `collect` and by `score`.
#[test]
fn draws_are_the_same_from_collect_and_from_score() {
    let signals = |run: &Run| -> Vec<Signal> {
        let path = run.path("runs/tiny/signals/shard-00000.parquet");
        let rows = read_shard(&path).unwrap();
        rows.collect::<Result<_, _>>().unwrap()
    };
    let with = |run: &Run, command: &str| {
        let output = run.potstill(&[command, "run.toml"]);
        assert_eq!(output.code, 0, "{}", output.stderr);
    };
    let none = Run::new();
    let whole = Run::new();
    whole.edit("top_k = 6", "top_k = 6, tail_draws = 3");
    let after = Run::new();
    after.edit("signals = { top_k = 6 }\n", "");
    after.edit(
        "[curate]",
        "[score]\ntop_k = 6\ntail_draws = 3\nbatch = 7\n\n[curate]",
    );
    for run in [&none, &whole, &after] {
        with(run, "import");
        with(run, "collect");
    }
    with(&after, "score");
    let drawn = signals(&whole);
    assert_eq!(drawn, signals(&after));
    let mut without = drawn.clone();
    for signal in &mut without {
        signal.rows.change_rows(|_, row| {
            assert_eq!(row.draw_counts.iter().sum::<u32>(), 3);
            row.draw_ids.clear();
            row.draw_counts.clear();
        });
    }
    assert_eq!(without, signals(&none));

    // Another number of draws makes the stage run again.
    after.edit("tail_draws = 3", "tail_draws = 4");
    with(&after, "score");
    assert!(
        signals(&after)
            .iter()
            .flat_map(|s| &s.rows)
            .all(|row| { row.draw_counts.iter().sum::<u32>() == 4 })
    );
}

/// Without distributions a student learns from the text as the control `sft` does. Their weights differ by
/// rounding, since the control's statistics cover the teacher's support.
#[test]
fn a_student_of_the_text_alone_is_the_sft_control() {
    let losses = |run: &Run, name: &str| -> Vec<f64> {
        let path = format!("runs/tiny/students/{name}/metrics.jsonl");
        let text = std::fs::read_to_string(run.path(&path)).unwrap();
        let lines = text.lines().map(serde_json::from_str);
        let lines: Vec<serde_json::Value> = lines.collect::<Result<_, _>>().unwrap();
        let of = |line: &serde_json::Value| line["cross_entropy"].as_f64().unwrap();
        lines.iter().map(of).collect()
    };
    let max_difference = |a: &[f64], b: &[f64]| {
        let off = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        off.fold(0.0, f64::max)
    };
    let whole = Run::new();
    whole.run();
    let run = Run::new();
    run.edit("signals = { top_k = 6 }\n", "");
    run.edit(
        "steps = 6",
        "steps = 6\ncontrols = []\nloss = { cross_entropy = 1.0 }",
    );
    run.run();
    let text = losses(&run, "student");
    assert_eq!(text.len(), 6);
    assert!(max_difference(&text, &losses(&whole, "sft")) < 1e-4);
    assert!(max_difference(&text, &losses(&whole, "student")) > 1e-2);
    assert!(!run.path("runs/tiny/signals").exists());
}

/// The data's own answers are used without a teacher; another column of answers makes `collect` run again.
#[test]
fn students_learn_from_given_answers() {
    let run = Run::new();
    let line = |i: i32| format!("{{\"q\":\"Story {i}\",\"a\":\"once {i}\",\"b\":\"twice {i}\"}}\n");
    run.write("prompts.jsonl", &(0..12).map(line).collect::<String>());
    run.write(
        "run.toml",
        r#"[run]
name = "tiny"
[import]
path = "prompts.jsonl"
columns = { instruction = "q", output = "a" }
answers = "given"
[curate]
test = 0.4
[student]
path = "model"
template = "plain"
layers = { every = 2 }
[train]
steps = 3
batch = 4
loss = { cross_entropy = 1.0 }
controls = []
[eval]
resamples = 50
"#,
    );
    let check = run.potstill(&["check", "run.toml"]);
    assert!(
        check.stdout.contains("answers   12 of the data"),
        "{}",
        check.stderr
    );
    // Without a teacher the template is the student's, so the message names the student's table.
    run.edit("template = \"plain\"\n", "");
    let check = run.potstill(&["check", "run.toml"]);
    assert_eq!(check.code, 2, "{}", check.stderr);
    assert!(check.stderr.contains("[student]"), "{}", check.stderr);
    assert!(!check.stderr.contains("[teacher]"), "{}", check.stderr);
    run.edit(
        "layers = { every = 2 }\n",
        "template = \"plain\"\nlayers = { every = 2 }\n",
    );
    run.run();
    let answers = "completions/shard-00000.parquet";
    let first = run.published().remove(answers).unwrap();
    let report = fs::read_to_string(run.path("runs/tiny/report.md")).unwrap();
    assert!(
        report.contains("| student | the data's text by cross-entropy only |"),
        "{report}"
    );
    assert!(!report.contains("| student − untrained | KL |"), "{report}");
    assert!(run.run().stderr.contains("nothing to do"));
    run.edit("output = \"a\"", "output = \"b\"");
    run.run();
    assert!(first != run.published()[answers]);
    // `answer` names the answers as well as `output` does, and they are references besides.
    run.edit(
        "{ instruction = \"q\", output",
        "{ question = \"q\", answer",
    );
    let second = run.published().remove(answers).unwrap();
    run.run();
    assert_eq!(second, run.published()[answers]);
    run.edit(
        "{ question = \"q\", answer",
        "{ instruction = \"q\", output",
    );
    run.write("prompts.jsonl", "{\"q\":\"Story\",\"b\":null}\n");
    let output = run.potstill(&["run", "run.toml"]);
    assert_eq!(output.code, 1, "{}", output.stderr);
    assert!(
        output.stderr.contains("prompts.jsonl:1 has no answer"),
        "{}",
        output.stderr
    );
}

/// Reasoning within the text of a given answer is separated from the answer, for templates and graders.
#[test]
fn reasoning_is_separated_from_given_answers() {
    let run = Run::new();
    let line = |i: i32| {
        format!("{{\"q\":\"Story {i}\",\"a\":\"<think>\\nhm {i}\\n</think>\\n\\nonce\"}}\n")
    };
    run.write("prompts.jsonl", &(0..4).map(line).collect::<String>());
    run.edit(
        "columns = { text = \"text\" }",
        "columns = { instruction = \"q\", output = \"a\" }\nanswers = \"given\"",
    );
    run.edit(
        "signals = { top_k = 6 }",
        "reasoning = { open = \"<think>\", close = \"</think>\" }",
    );
    run.edit("[curate]", "[score]\ntop_k = 6\n\n[curate]");
    for stage in ["import", "collect"] {
        let output = run.potstill(&[stage, "run.toml"]);
        assert_eq!(output.code, 0, "{}", output.stderr);
    }
    let shard = run.path("runs/tiny/completions/shard-00000.parquet");
    let mut answers = read_shard::<Completion>(&shard).unwrap();
    let first = answers.next().unwrap().unwrap();
    assert_eq!(first.reasoning.as_deref(), Some("\nhm 0\n"));
    assert_eq!(first.answer, "\n\nonce");
    let shown = run.potstill(&["render", "run.toml", "--rows", "1"]).stdout;
    assert!(shown.contains("⟦<think>\n  hm 0\n  </think>"), "{shown}");
}

/// Wrong answers are not trained on, or they are with `wrong = "keep"`; each model answers the prompts of test.
#[test]
fn answers_are_graded() {
    let run = Run::new();
    let line = |i: i32| {
        format!(
            "{{\"text\":\"Story {i}\",\"a\":{i},\"kind\":\"k{}\"}}\n",
            i % 2
        )
    };
    run.write("prompts.jsonl", &(0..12).map(line).collect::<String>());
    run.edit(
        "columns = { text = \"text\" }",
        "columns = { question = \"text\", answer = \"a\", group = \"kind\" }",
    );
    run.edit("[curate]", "[grade]\ngrader = \"exact\"\n\n[curate]");
    run.edit(
        "resamples = 100",
        "resamples = 100\nanswers = { grader = \"number\", max_new_tokens = 4 }",
    );
    let output = run.potstill(&["run", "run.toml"]);
    assert_eq!(output.code, 1, "{}", output.stderr);
    assert!(
        output.stderr.contains("0 answers are left to train on")
            && output.stderr.contains(" because it is graded wrong"),
        "{}",
        output.stderr
    );
    run.edit("keep = \"all\"", "keep = \"all\"\nwrong = \"keep\"");
    run.run();
    let json = fs::read_to_string(run.path("runs/tiny/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    let groups = report["teacher"]["accuracy"]["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 2);
    assert_eq!(report["comparisons"].as_array().unwrap().len(), 9);
    assert!(run.run().stderr.contains("nothing to do"));
}

#[test]
fn ctrl_c_saves_the_state_and_prints_the_resume_command() {
    let run = Run::new();
    run.edit("steps = 6", "steps = 100000");
    run.edit("checkpoint_every = 2", "checkpoint_every = 100000");
    let child = run.start(&["run", "run.toml"]);
    let metrics = run.path("runs/tiny/students/student/metrics.jsonl");
    let began = Instant::now();
    while fs::metadata(&metrics).map_or(0, |m| m.len()) == 0 {
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "training did not begin"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let (code, stderr) = interrupt(child);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stderr.contains("stopping after the current batch; Ctrl-C again exits at once"),
        "{stderr}"
    );
    assert!(
        stderr.contains("stopped; finished work is kept\nhint: `potstill run run.toml` resumes"),
        "{stderr}"
    );
    assert!(
        fs::read_dir(run.path("runs/tiny/students/student/checkpoints"))
            .unwrap()
            .count()
            > 0
    );
}

#[test]
fn reports_contain_all_sections() {
    let run = Run::new();
    let output = run.run();
    assert!(output.stdout.contains("test KL"), "{}", output.stdout);
    let markdown = fs::read_to_string(run.path("runs/tiny/report.md")).unwrap();
    for part in [
        "# tiny",
        "| untrained |",
        "| sft |",
        "| **student − sft** (primary) | KL |",
        "| collect |",
        "| teacher | model |",
    ] {
        assert!(markdown.contains(part), "{part} in {markdown}");
    }
    let json = fs::read_to_string(run.path("runs/tiny/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["comparisons"].as_array().unwrap().len(), 7);
}
