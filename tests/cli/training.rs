//! Trainings: learning rates that are chosen on dev, epochs, and pruned starts.

use std::fs;
use std::time::{Duration, Instant};

use potstill::datasets::row_count;
use serde_json::Value;

use crate::fixture::Run;

const RATE: &str = "learning_rate = 1e-2";
/// The last rate leaves weights that are not finite after its first step.
const RATES: &str = "learning_rates = [1e-3, 1e-2, 1e30]";

fn tuned() -> Run {
    let run = Run::new();
    run.edit(RATE, RATES);
    run.edit("test = 0.4", "dev = 0.3\ntest = 0.3");
    run
}

fn json(run: &Run, name: &str) -> Value {
    let path = run.path("runs/tiny").join(name);
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_running_mean_is_exported_and_measured_if_the_run_says_so() {
    let run = Run::new();
    run.edit("test = 0.4", "dev = 0.3\ntest = 0.3");
    run.edit("steps = 6", "steps = 6\nema = 0.5\nkeep_best = true");
    assert_eq!(run.run().code, 0);
    let report = |run: &Run| fs::read_to_string(run.path("runs/tiny/report.md")).unwrap();
    let weights = |run: &Run| {
        let path = "runs/tiny/students/student/export/model.safetensors";
        fs::read(run.path(path)).unwrap()
    };
    let (trained, trained_report) = (weights(&run), report(&run));
    assert!(trained_report.contains("## Running mean of the weights"));
    let counts = json(&run, "students/student_manifest.json")["counts"].clone();
    assert!(counts["best step"].is_u64() && counts["best step of the mean"].is_u64());

    // The training is not repeated; the export and what follows are.
    run.edit("[eval]", "[export]\nweights = \"mean\"\n\n[eval]");
    let output = run.run();
    let unchanged = "train student: up to date";
    assert!(output.stderr.contains(unchanged), "{}", output.stderr);
    assert!(weights(&run) != trained && report(&run) != trained_report);
    let card = fs::read_to_string(run.path("runs/tiny/students/student/export/README.md")).unwrap();
    assert!(card.contains("the running mean of those that were trained, with decay 0.5"));
}

#[test]
fn every_arm_gets_the_rate_that_is_best_on_dev() {
    let run = tuned();
    for stage in ["import", "collect", "curate"] {
        assert_eq!(run.potstill(&[stage, "run.toml"]).code, 0);
    }
    // Tuning does not read test: it works with a damaged file of the same size.
    let test = run.path("runs/tiny/test/shard-00000.parquet");
    let whole = fs::read(&test).unwrap();
    fs::write(&test, vec![0; whole.len()]).unwrap();
    let output = run.potstill(&["tune", "run.toml"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    fs::write(&test, whole).unwrap();
    let detectable = "smallest detectable difference: ";
    assert!(output.stderr.contains(detectable), "{}", output.stderr);
    let warning = "warning: tune sft-1e30: the loss is not finite at step 2";
    assert!(output.stderr.contains(warning), "{}", output.stderr);

    let choice = json(&run, "tuning.json");
    assert_eq!(choice["metric"], "kl");
    let rates = choice["rates"].as_array().unwrap();
    assert_eq!(rates.len(), 6);
    for arm in ["student", "sft"] {
        let of_arm = rates.iter().filter(|rate| rate["arm"] == arm);
        let of_arm: Vec<&Value> = of_arm.collect();
        assert_eq!(of_arm[2]["dev"], Value::Null);
        let chosen: Vec<bool> = (of_arm.iter())
            .map(|rate| rate["chosen"].as_bool().unwrap())
            .collect();
        let dev = |i: usize| of_arm[i]["dev"].as_f64().unwrap();
        assert_eq!(chosen, [dev(0) <= dev(1), dev(1) < dev(0), false], "{arm}");
    }

    let output = run.run();
    let line = "train student: 16 sequences, 6 steps";
    assert!(output.stderr.contains(line), "{}", output.stderr);
    for arm in ["student", "sft"] {
        let chosen = rates
            .iter()
            .find(|rate| rate["arm"] == arm && rate["chosen"] == true)
            .unwrap();
        let trained = json(&run, &format!("students/{arm}_manifest.json"));
        let rate = &trained["settings"]["train"]["schedule"]["learning_rate"];
        assert_eq!(*rate, chosen["learning_rate"]);
        let weights = |home: &str| {
            let last = format!("runs/tiny/{home}/checkpoints/step-00000006/model.safetensors");
            fs::read(run.path(&last)).unwrap()
        };
        let home = chosen["training"].as_str().unwrap();
        assert!(weights(home) == weights(&format!("students/{arm}")));
    }
    let detectable = "on dev, the difference of `student` and `sft` in KL has a standard deviation";
    assert!(output.stderr.contains(detectable), "{}", output.stderr);
    let report = fs::read_to_string(run.path("runs/tiny/report.md")).unwrap();
    assert!(report.contains("tune student-1e-2"), "{report}");
    let again = run.run();
    assert!(again.stderr.contains("nothing to do"), "{}", again.stderr);

    // Trainings that are there are not repeated for a further rate, nor for a further seed.
    run.edit("[1e-3, 1e-2, 1e30]", "[1e-3, 1e-2, 3e-3]\nseeds = 2");
    let output = run.run();
    for line in [
        "tune student-1e-2: up to date",
        "tune student-3e-3: 16 sequences, 6 steps",
        "train student-2: 16 sequences, 6 steps",
    ] {
        assert!(output.stderr.contains(line), "{line} in {}", output.stderr);
    }
    let second = json(&run, "students/student-2_manifest.json");
    let first = json(&run, "students/student_manifest.json");
    let rate = |manifest: &Value| manifest["settings"]["train"]["learning_rate"].clone();
    assert_eq!(rate(&first), rate(&second));
}

#[test]
fn a_run_that_is_killed_while_it_tunes_ends_in_the_same_bytes() {
    let whole = tuned();
    let began = Instant::now();
    whole.run();
    let took = began.elapsed();
    let expected = whole.published();
    assert!(expected.contains_key("tuning.json"));
    for part in 0..6 {
        let run = tuned();
        let mut child = run.start(&["run", "run.toml"]);
        let began = Instant::now();
        while !run.path("runs/tiny/tuning").exists() {
            let running = child.try_wait().unwrap().is_none();
            assert!(running && began.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(took * part / 10);
        child.kill().unwrap();
        child.wait().unwrap();
        run.run();
        let found = run.published();
        let names: Vec<&String> = found.keys().collect();
        assert_eq!(names, expected.keys().collect::<Vec<_>>(), "part {part}");
        for (name, bytes) in &expected {
            assert!(found[name] == *bytes, "{name} differs, part {part}");
        }
    }
}

#[test]
fn a_run_stops_if_an_arm_diverges_at_every_rate() {
    let run = tuned();
    run.edit("[1e-3, 1e-2, 1e30]", "[1e30, 1e31]");
    let output = run.potstill(&["run", "run.toml"]);
    assert_eq!(output.code, 1, "{}", output.stderr);
    let error = "error: `student` diverged at every learning rate\nhint: name lower rates";
    assert!(output.stderr.contains(error), "{}", output.stderr);
    let output = run.potstill(&["train", "run.toml"]);
    assert!(
        output.stderr.contains("`potstill tune run.toml` writes it"),
        "{}",
        output.stderr
    );
}

#[test]
fn epochs_become_steps_after_curate() {
    let run = Run::new();
    run.edit("steps = 6", "epochs = 1.5");
    let check = run.potstill(&["check", "run.toml"]);
    assert!(
        check.stdout.contains("train     up to "),
        "{}",
        check.stdout
    );
    run.run();
    let sequences = row_count(&run.path("runs/tiny/train")).unwrap();
    let steps = (1.5 * sequences as f64 / 4.0).ceil() as u64;
    let trained = json(&run, "students/student_manifest.json");
    assert_eq!(trained["counts"]["steps"], steps);
    assert_eq!(trained["settings"]["train"]["schedule"]["steps"], steps);
    assert_eq!(trained["settings"]["train"]["schedule"]["warmup_steps"], 1);
}

#[test]
fn check_measures_the_start_and_points_at_layers_that_are_not_there() {
    let run = Run::new();
    let check = run.potstill(&["check", "run.toml"]);
    assert_eq!(check.code, 0, "{}", check.stderr);
    let line = |name: &str| {
        let lines = check.stdout.lines();
        lines.clone().find(|line| line.starts_with(name)).unwrap()
    };
    assert!(line("student").ends_with("1 of 2 layers: [0]"));
    let start = line("start");
    assert!(start.contains("KL from the teacher"), "{start}");
    assert!(start.contains("tokens of prompts; a uniform distribution has"));
    for (layers, message) in [
        ("[0, 2]", "the checkpoint has no layer 2"),
        ("{ first = 2, last = 1 }", "3 layers together"),
        ("{ first = 1, last = 1 }", "would be the teacher itself"),
    ] {
        run.edit("{ every = 2 }", layers);
        let check = run.potstill(&["check", "run.toml"]);
        assert_eq!(check.code, 2, "{}", check.stderr);
        assert!(check.stderr.contains("run.toml:24:"), "{}", check.stderr);
        let key = "`layers` in [student]: ";
        assert!(check.stderr.contains(key), "{}", check.stderr);
        assert!(check.stderr.contains(message), "{}", check.stderr);
        run.edit(layers, "{ every = 2 }");
    }
    run.edit("samples = 2", "samples = 1");
    let check = run.potstill(&["check", "run.toml"]);
    assert!(
        check.stderr.contains("`samples = 4` in [collect]"),
        "{}",
        check.stderr
    );
}

#[cfg(not(feature = "mpi"))]
#[test]
fn a_build_without_mpi_refuses_to_be_one_of_several_processes() {
    let run = Run::new();
    let mut command = run.command(&["train", "run.toml"]);
    let output = run.output(command.env("OMPI_COMM_WORLD_SIZE", "2"));
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(
        output.stderr.contains("`mpirun` started 2 processes")
            && output
                .stderr
                .contains("hint: build it with `--features mpi`"),
        "{}",
        output.stderr
    );
    assert!(!run.path("runs/tiny").exists());
}
