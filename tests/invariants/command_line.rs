//! The commands and flags of `potstill`.

use std::collections::BTreeMap;
use std::process::Command;

/// Flags are operational. New hyperparameters belong in the run file.
#[test]
fn the_command_line_is_frozen() {
    let help = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_potstill"));
        let output = command.args(arguments).arg("--help").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let flags = |help: &str| -> Vec<String> {
        let words = help.split(|c: char| c.is_whitespace() || c == ',');
        words
            .filter(|w| w.starts_with("--"))
            .map(str::to_owned)
            .collect()
    };
    let commands = [
        "run", "check", "probe", "import", "collect", "score", "grade", "curate", "tune", "train",
        "export", "eval",
    ];
    let listed: BTreeMap<&str, Vec<String>> =
        commands.iter().map(|c| (*c, flags(&help(&[c])))).collect();
    let frozen = [
        "--run-dir",
        "--device",
        "--limit",
        "--dry-run",
        "--verbose",
        "--quiet",
        "--json",
        "--help",
    ];
    let (help_flag, rest) = frozen.split_last().unwrap();
    let with_retry = [rest, &["--retry-failures", help_flag]].concat();
    for (command, flags) in listed {
        let can_retry = ["run", "collect", "score"].contains(&command);
        let expected = if can_retry { &with_retry[..] } else { &frozen };
        assert_eq!(flags, expected, "potstill {command}");
    }
    let of_plan = ["--memory-gb", "--usd-per-hour", "--answer-tokens"];
    let mut plan = flags(&help(&["plan"]));
    plan.retain(|flag| of_plan.contains(&flag.as_str()));
    assert_eq!(plan, of_plan);
    let with_open = [rest, &["--open", help_flag]].concat();
    assert_eq!(flags(&help(&["report"])), with_open);
    assert_eq!(
        flags(&help(&["init"])),
        ["--data", "--teacher", "--name", "--force", "--help"]
    );
    assert_eq!(
        flags(&help(&["clean"])),
        ["--run-dir", "--yes", "--json", "--help"]
    );
    assert_eq!(flags(&help(&["render"])), ["--rows", "--run-dir", "--help"]);
    assert_eq!(
        flags(&help(&["check-loss"])),
        ["--run-dir", "--device", "--help"]
    );
    for command in ["schema", "completions"] {
        assert_eq!(flags(&help(&[command])), ["--help"]);
    }
    let all = help(&[]);
    let section = all
        .split("Commands:\n")
        .nth(1)
        .unwrap()
        .split("\n\n")
        .next()
        .unwrap();
    let names: Vec<&str> = section
        .lines()
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    let others = [
        "report",
        "clean",
        "render",
        "check-loss",
        "schema",
        "completions",
        "help",
    ];
    let (before, after) = commands.split_at(2);
    let expected = [&["init"], before, &["plan"], after, &others].concat();
    assert_eq!(names, expected);
}
