//! The content of the report, and opening it in a browser.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fixture::Run;

/// Each seed trains a student of its own, the report shows the variation over seeds, and an additional
/// seed trains only the new models.
#[test]
fn seeds_are_trained_and_counted() {
    let run = Run::new();
    run.run();
    let one: Value = report(&run);
    run.edit("steps = 6", "steps = 6\nseeds = 3");
    let output = run.run();
    assert!(
        output.stderr.contains("train student: up to date"),
        "{}",
        output.stderr
    );
    let found = run.published();
    let weights = |name: &str| &found[&format!("students/{name}/export/model.safetensors")];
    assert!(weights("student") != weights("student-2"));
    assert!(weights("sft") != weights("sft-2"));

    let three = report(&run);
    let students = three["students"].as_array().unwrap();
    let names: Vec<&str> = students.iter().filter_map(|s| s["name"].as_str()).collect();
    assert_eq!(names, ["untrained", "unigram", "student", "sft"]);
    let student = &students[2];
    let kl = |i: usize| student["seeds"][i]["kl"].as_f64().unwrap();
    assert_eq!(
        kl(0),
        one["students"][2]["kl"]["mean"].as_f64().unwrap(),
        "the first seed is the run's own"
    );
    let mean = student["kl"]["mean"].as_f64().unwrap();
    assert!((mean - (kl(0) + kl(1) + kl(2)) / 3.0).abs() < 1e-9);
    let width = |report: &Value| {
        let difference = &report["comparisons"][0]["difference"];
        difference["high"].as_f64().unwrap() - difference["low"].as_f64().unwrap()
    };
    assert_eq!(three["comparisons"][0]["seeds"], 3);
    assert!(width(&three) > width(&one));
    let markdown = fs::read_to_string(run.path("runs/tiny/report.md")).unwrap();
    assert!(markdown.contains("### All figures by seed"), "{markdown}");
}

fn report(run: &Run) -> Value {
    serde_json::from_slice(&fs::read(run.path("runs/tiny/report.json")).unwrap()).unwrap()
}

/// A script named `xdg-open` replaces the desktop's program.
#[cfg(target_os = "linux")]
#[test]
fn a_report_is_opened() {
    use std::os::unix::fs::PermissionsExt;

    let run = Run::new();
    run.run();
    let (bin, seen) = (run.path("bin"), run.path("seen"));
    fs::create_dir(&bin).unwrap();
    let open = |run: &Run| {
        let mut command = run.command(&["report", "run.toml", "--open"]);
        let output = command.env("PATH", &bin).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let stderr = open(&run);
    assert!(stderr.contains("report.html in a browser"), "{stderr}");

    let program = bin.join("xdg-open");
    let script = format!("#!/bin/sh\necho \"$1\" > {}\n", seen.display());
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    open(&run);
    let deadline = Instant::now() + Duration::from_secs(20);
    let opened = loop {
        match fs::read_to_string(&seen) {
            Ok(text) if text.ends_with('\n') => break text,
            _ => assert!(Instant::now() < deadline, "nothing was opened"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(
        opened.trim_end().ends_with("runs/tiny/report.html"),
        "{opened}"
    );
}
