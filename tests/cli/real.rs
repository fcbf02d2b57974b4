//! The example run files. Those with real models are only parsed if the models are absent.

use std::path::Path;
use std::process::Command;

fn potstill(arguments: &[&str], real: &str, dir: &Path) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_potstill"));
    let output = command
        .args(arguments)
        .env("POTSTILL_REAL", real)
        .current_dir(dir)
        .output()
        .unwrap();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn examples_parse() {
    for name in ["smollm2-gsm8k", "stories260k"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("examples")
            .join(format!("{name}.toml"));
        let temp = tempfile::tempdir().unwrap();
        let (code, stderr) = potstill(&["check", path.to_str().unwrap()], "/nowhere", temp.path());
        // The error is about the missing data, not about the run file.
        assert_eq!(code, 2);
        assert!(stderr.contains("/nowhere/"), "{stderr}");
    }
}

/// The quickstart needs no environment variable and no file besides those in the repository.
#[test]
fn the_quickstart_is_complete() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/quickstart.toml");
    let temp = tempfile::tempdir().unwrap();
    let (code, stderr) = potstill(&["check", path.to_str().unwrap()], "", temp.path());
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn stories260k_runs_whole() {
    let Ok(real) = std::env::var("POTSTILL_REAL") else {
        eprintln!("skipped: POTSTILL_REAL is not set");
        return;
    };
    if !Path::new(&real)
        .join("models/stories260K/model.safetensors")
        .exists()
    {
        eprintln!("skipped: POTSTILL_REAL has no models/stories260K");
        return;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/stories260k.toml");
    let temp = tempfile::tempdir().unwrap();
    let (code, stderr) = potstill(&["run", path.to_str().unwrap()], &real, temp.path());
    assert_eq!(code, 0, "{stderr}");
    let report = std::fs::read_to_string(temp.path().join("runs/stories260k/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let conclusion = |left: &str, right: &str| {
        let all = report["comparisons"].as_array().unwrap();
        let found = all
            .iter()
            .find(|c| c["metric"] == "kl" && c["left"] == left && c["right"] == right);
        found.unwrap()["verdict"].as_str().unwrap().to_owned()
    };
    assert_eq!(conclusion("student", "untrained"), "better", "{report:#}");
    assert_eq!(conclusion("student", "unigram"), "better", "{report:#}");
}
