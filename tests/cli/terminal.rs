//! What reaches a terminal, and what happens when the system refuses something: hostile text, permissions, narrow
//! terminals, limits of the shell, closed streams and read-only folders.

#![cfg(unix)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use potstill::datasets::visible;
use serde_json::json;

use crate::fixture::{CommandOutput, Run};

/// Clears the screen, rings, sets the title, moves back, and reorders the rest of a line.
const HOSTILE: &str =
    "\u{1b}[2J\u{7}\u{1b}]0;t\u{7}\u{9b}31m\r\u{8}\u{202e}x\u{2066}\u{200f}\u{e0041}\u{7f}";

/// The first hidden character of a text, with the text around it.
fn hidden(text: &str) -> Option<String> {
    let (at, c) = text
        .char_indices()
        .find(|(_, c)| visible(&c.to_string()).len() > 4)?;
    let from = text[..at]
        .char_indices()
        .rev()
        .nth(60)
        .map_or(0, |(i, _)| i);
    Some(format!("{c:?} after {:?}", &text[from..at]))
}

#[track_caller]
fn assert_visible(what: &str, output: &CommandOutput) {
    assert_eq!(hidden(&output.stdout), None, "stdout of {what}");
    assert_eq!(hidden(&output.stderr), None, "stderr of {what}");
}

/// A string of TOML.
fn quoted(text: &str) -> String {
    let escaped = text.chars().map(|c| match c.is_ascii_graphic() {
        true => c.to_string(),
        false => format!("\\U{:08x}", u32::from(c)),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

#[test]
fn prompts_and_answers_reach_no_page_and_no_terminal_unescaped() {
    let run = Run::new();
    // The context of the model is short, so that each prompt has a part of the text.
    let parts = [
        "\u{1b}[2J\u{7}\u{202e}",
        "\u{9b}31m\r\u{8}\u{202e}",
        "\u{202e}\u{2066}\u{200f}\u{7f}",
    ];
    let line = |i: usize| {
        let text = format!("{i} {}|`![a](b)", parts[i % parts.len()]);
        format!("{}\n", json!({ "text": text }))
    };
    run.write("prompts.jsonl", &(0..12).map(line).collect::<String>());
    for arguments in [
        &["run", "run.toml", "--json", "--verbose"][..],
        &["report", "run.toml"],
        &["render", "run.toml"],
        &["check", "run.toml"],
        &["run", "run.toml", "--dry-run"],
    ] {
        let output = run.potstill(arguments);
        assert_eq!(output.code, 0, "{arguments:?}: {}", output.stderr);
        assert_visible(&format!("{arguments:?}"), &output);
    }
    for page in [
        "report.md",
        "report.html",
        "report.json",
        "students/student/export/README.md",
    ] {
        let text = fs::read_to_string(run.path("runs/tiny").join(page)).unwrap();
        assert_eq!(hidden(&text), None, "{page}");
        if page.starts_with("report") {
            assert!(text.contains("202e"), "{page} has no sample");
        }
    }
    let events =
        fs::read(run.path("runs/tiny/students/student/tensorboard/events.out.tfevents.potstill"));
    assert!(
        !events
            .unwrap()
            .windows(3)
            .any(|bytes| bytes == "\u{202e}".as_bytes())
    );
}

/// Each command line and run file has hostile text in a place that a message repeats.
#[test]
fn messages_repeat_hostile_text_escaped() {
    let run = Run::new();
    let mut seen = 0;
    let mut check = |what: &str, run: &Run, arguments: &[&str]| {
        let output = run.potstill(arguments);
        assert_visible(what, &output);
        assert_ne!(output.code, 0, "{what}");
        let shown = output.stderr.contains("202e") || output.stderr.contains("202E");
        seen += usize::from(shown);
    };
    check("an unknown command", &run, &[HOSTILE]);
    check(
        "an unknown flag",
        &run,
        &["run", &format!("--{HOSTILE}"), "run.toml"],
    );
    check(
        "a bad number",
        &run,
        &["run", "run.toml", "--limit", HOSTILE],
    );
    check(
        "an unknown device",
        &run,
        &["run", "run.toml", "--device", HOSTILE],
    );
    check("an absent file", &run, &["run", &format!("{HOSTILE}.toml")]);
    check(
        "absent data",
        &run,
        &["init", "x.toml", "--data", HOSTILE, "--teacher", "model"],
    );
    let text = fs::read_to_string(run.path("run.toml")).unwrap();
    let name = quoted(HOSTILE);
    for (from, to) in [
        ("steps = 6", format!("{name} = 6")),
        ("[eval]", format!("[{name}]")),
        ("name = \"tiny\"", format!("name = {name}")),
        ("path = \"prompts.jsonl\"", format!("path = {name}")),
        ("path = \"model\"", format!("path = {name}")),
        ("text = \"text\"", format!("text = {name}")),
        ("template = \"plain\"", format!("template = {name}")),
        ("keep = \"all\"", format!("keep = {name}")),
        ("steps = 6", "steps = \u{1b}[2J\u{202e}".to_owned()),
    ] {
        run.write("bad.toml", &text.replacen(from, &to, 1));
        for command in ["check", "run", "render"] {
            check(
                &format!("{command} with {to:?}"),
                &run,
                &[command, "bad.toml"],
            );
        }
    }
    assert!(seen > 20, "only {seen} messages repeat the text");
}

#[test]
fn exceptions_of_a_template_and_names_of_tensors_are_escaped() {
    let run = Run::new();
    let script = HOSTILE.replace('\\', "\\\\");
    run.write(
        "evil.jinja",
        &format!("{{{{ raise_exception('no: {script}') }}}}"),
    );
    run.edit("template = \"plain\"", "template = \"evil.jinja\"");
    for command in ["check", "render", "run"] {
        let output = run.potstill(&[command, "run.toml"]);
        assert_ne!(output.code, 0, "{command}");
        assert_visible(command, &output);
        assert!(output.stderr.contains("202e"), "{}", output.stderr);
    }
    let run = Run::new();
    let weights = run.path("model/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    let evil = serde_json::to_string(&format!("model.norm{HOSTILE}.weight")).unwrap();
    let header = header.replace("\"model.norm.weight\"", &evil);
    let mut changed = (header.len() as u64).to_le_bytes().to_vec();
    changed.extend(header.as_bytes());
    changed.extend(&bytes[8 + length..]);
    fs::write(&weights, changed).unwrap();
    let output = run.potstill(&["run", "run.toml"]);
    assert_ne!(output.code, 0);
    assert_visible("run", &output);
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Lists all files and folders below a folder.
fn all_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(all_below(&path));
        }
        found.push(path);
    }
    found
}

/// Runs a command line of the shell, in which `POTSTILL` stands for the program.
fn shell(run: &Run, line: &str) -> CommandOutput {
    let mut command = run.command(&[]);
    let program = command.get_program().to_owned();
    let mut shell = Command::new("bash");
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(key, value),
            None => shell.env_remove(key),
        };
    }
    let line = line.replace("POTSTILL", &format!("'{}'", program.display()));
    shell.current_dir(command.current_dir(run.path("")).get_current_dir().unwrap());
    run.output(shell.args(["-c", &line]).env_remove("RUST_BACKTRACE"))
}

#[test]
fn the_run_directory_is_private_whatever_the_umask_is() {
    for umask in ["022", "000"] {
        let run = Run::new();
        let output = shell(&run, &format!("umask {umask}; POTSTILL run run.toml"));
        assert_eq!(output.code, 0, "{}", output.stderr);
        let root = run.path("runs/tiny");
        assert_eq!(mode(&root), 0o700, "umask {umask}");
        let mut exported = 0;
        for path in all_below(&root).into_iter().filter(|path| path.is_file()) {
            let name = path.strip_prefix(&root).unwrap().display().to_string();
            if name.contains("/export/") {
                exported += 1;
                let expected = if umask == "022" { 0o644 } else { 0o666 };
                assert_eq!(mode(&path), expected, "{name} with umask {umask}");
            } else if !name.contains("/checkpoints/") {
                assert_eq!(mode(&path), 0o600, "{name} with umask {umask}");
            }
        }
        assert!(exported >= 8, "{exported} exported files");
    }
}

#[test]
fn an_existing_run_directory_keeps_its_permissions_and_links_are_not_followed() {
    let run = Run::new();
    let root = run.path("runs/tiny");
    fs::create_dir_all(&root).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o750)).unwrap();
    let import = || {
        let imported = run.potstill(&["import", "run.toml"]);
        assert_eq!(imported.code, 0, "{}", imported.stderr);
    };
    import();
    run.write("victim", "untouched");
    symlink(run.path("victim"), root.join("run.toml.tmp")).unwrap();
    run.edit("steps = 6", "steps = 7");
    import();
    let copy = fs::read_to_string(root.join("run.toml")).unwrap();
    assert!(copy.contains("steps = 7"));
    assert_eq!(mode(&root), 0o750);
    assert_eq!(fs::read_to_string(run.path("victim")).unwrap(), "untouched");
}

/// The parts of a terminal's output that were on a line of their own, without escape sequences.
fn terminal_lines(output: &str) -> Vec<String> {
    let mut plain = String::new();
    let mut rest = output.chars();
    while let Some(c) = rest.next() {
        match c {
            '\u{1b}' => {
                // A sequence ends with a letter. Those that move the cursor begin another line.
                let end = rest.by_ref().skip(1).find(char::is_ascii_alphabetic);
                if end != Some('m') {
                    plain.push('\n');
                }
            }
            '\r' => plain.push('\n'),
            c => plain.push(c),
        }
    }
    plain.lines().map(str::to_owned).collect()
}

/// The program `script` of util-linux gives the command a terminal.
#[cfg(target_os = "linux")]
#[test]
fn progress_fits_the_width_of_the_terminal() {
    if Command::new("script").arg("--version").output().is_err() {
        println!("skipped: the program `script` is absent");
        return;
    }
    for columns in [20, 40, 80, 300] {
        let run = Run::new();
        run.edit("steps = 6", "steps = 150");
        let line = format!(
            "script -qec \"stty rows 24 cols {columns}; POTSTILL run run.toml\" /dev/null </dev/null"
        );
        let output = shell(&run, &line);
        assert_eq!(output.code, 0, "{}", output.stdout);
        let lines = terminal_lines(&output.stdout);
        let stages = ["   collect ", "train student "];
        let bars: Vec<&String> = (lines.iter())
            .filter(|line| line.contains(" % ") && stages.iter().any(|s| line.starts_with(s)))
            .collect();
        assert!(!bars.is_empty(), "{columns} columns: {lines:#?}");
        for line in bars {
            assert!(
                line.chars().count() <= columns,
                "{columns} columns: {line:?}"
            );
        }
    }
}

/// Each limit ends the command with a message, and the same command completes the work afterwards.
#[test]
fn limits_of_the_shell_end_in_a_message_and_resume() {
    for (limit, words) in [
        (
            "ulimit -f 12",
            &["File too large", "ulimit -f", "then resumes"][..],
        ),
        (
            "ulimit -n 9",
            &["Too many open files", "ulimit -n", "then resumes"],
        ),
        ("ulimit -v 60000", &["refuse", "ulimit -v"]),
    ] {
        let run = Run::new();
        let stopped = shell(&run, &format!("{limit}; POTSTILL run run.toml"));
        assert_eq!(stopped.code, 1, "{limit}: {}", stopped.stderr);
        for word in words {
            assert!(stopped.stderr.contains(word), "{limit}: {}", stopped.stderr);
        }
        let resumed = run.potstill(&["run", "run.toml"]);
        assert_eq!(resumed.code, 0, "{limit}: {}", resumed.stderr);
    }
}

#[test]
fn a_limit_of_processor_time_stops_as_ctrl_c_does() {
    let run = Run::new();
    run.edit("steps = 6", "steps = 20000");
    let stopped = shell(&run, "ulimit -S -t 1; POTSTILL run run.toml");
    assert_eq!(stopped.code, 1, "{}", stopped.stderr);
    assert!(
        stopped.stderr.contains("stopped; finished work is kept"),
        "{}",
        stopped.stderr
    );
}

#[test]
fn closed_and_full_streams_do_not_kill_the_run() {
    for (streams, code) in [
        ("<&- >&- 2>&-", 0),
        (">&-", 0),
        ("2>&-", 0),
        ("2>/dev/full", 0),
        (">/dev/full", 1),
        ("2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}", 0),
        ("| true; exit ${PIPESTATUS[0]}", 0),
    ] {
        // Other systems have no /dev/full.
        if streams.contains("full") && !Path::new("/dev/full").exists() {
            continue;
        }
        let run = Run::new();
        let output = shell(&run, &format!("POTSTILL run run.toml {streams}"));
        assert_eq!(output.code, code, "{streams}: {}", output.stderr);
        assert!(run.path("runs/tiny/report.html").exists(), "{streams}");
        if code == 1 {
            assert!(
                output.stderr.contains("cannot write to stdout"),
                "{}",
                output.stderr
            );
        }
    }
}

#[test]
fn variables_of_the_environment_may_be_absent() {
    let run = Run::new();
    let output = shell(&run, "env -i POTSTILL run run.toml");
    assert_eq!(output.code, 0, "{}", output.stderr);
}

#[test]
fn a_second_interrupt_exits_with_a_message() {
    let run = Run::new();
    run.edit("steps = 6", "steps = 200000");
    let mut command = run.command(&["run", "run.toml"]);
    let child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let state = run.path("runs/tiny/.work");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !state.exists() {
        assert!(
            std::time::Instant::now() < deadline,
            "the run did not start"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    let pid = child.id().to_string();
    let kill = || Command::new("kill").args(["-TERM", &pid]).status();
    assert!(kill().unwrap().success());
    std::thread::sleep(std::time::Duration::from_millis(5));
    // The first signal may have ended the process already.
    let _ = kill();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("finished work is kept"), "{stderr}");
    assert!(stderr.contains("potstill run run.toml"), "{stderr}");
}

/// Root may write everywhere, so as root the command runs as another user.
#[test]
fn a_finished_run_directory_may_be_read_only() {
    let run = Run::new();
    run.run();
    let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let as_user = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    if is_root && Command::new("setpriv").arg("--version").output().is_err() {
        println!("skipped: this is root, and the program `setpriv` is absent");
        return;
    }
    let user = if is_root { as_user } else { "" };
    let prepared = shell(
        &run,
        &format!(
            "cp POTSTILL ./potstill && chmod -R a-w runs && chmod a+rx . && {{ [ -z '{user}' ] || chown -R 65534 .; }}"
        ),
    );
    assert_eq!(prepared.code, 0, "{}", prepared.stderr);
    for command in [
        "run run.toml",
        "report run.toml",
        "run run.toml --dry-run",
        "check run.toml",
    ] {
        let output = shell(&run, &format!("{user} ./potstill {command}"));
        assert_eq!(output.code, 0, "{command}: {}", output.stderr);
    }
    run.edit("resamples = 100", "resamples = 101");
    let refused = shell(&run, &format!("{user} ./potstill run run.toml"));
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    for word in ["runs/tiny", "cannot be written", "--run-dir"] {
        assert!(refused.stderr.contains(word), "{}", refused.stderr);
    }
    let opened = shell(&run, &format!("{user} chmod -R u+w runs"));
    assert_eq!(opened.code, 0, "{}", opened.stderr);
}
