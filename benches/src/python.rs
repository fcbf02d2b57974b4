//! The PyTorch side: its script, which is built in, and a Python that can run it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::bail;

/// Script that reads a request on stdin and prints a reply.
pub(crate) const SCRIPT: &str = include_str!("../peer.py");

/// Finds the Python to run the script with: the named one, else that of the virtual environment, else
/// `python3` or `python`. `None` if none of these has torch and transformers.
///
/// # Errors
/// When the named one does not have them.
pub(crate) fn find(named: Option<&Path>) -> anyhow::Result<Option<PathBuf>> {
    if let Some(path) = named {
        return match why_unusable(path) {
            None => Ok(Some(path.to_owned())),
            Some(why) => bail!(
                "{} cannot run the PyTorch side: {why}\nhint: `pip install torch transformers` installs what it needs",
                path.display()
            ),
        };
    }
    let environment =
        std::env::var_os("VIRTUAL_ENV").map(|dir| PathBuf::from(dir).join("bin/python"));
    let mut candidates = environment
        .into_iter()
        .chain([PathBuf::from("python3"), PathBuf::from("python")]);
    Ok(candidates.find(|path| why_unusable(path).is_none()))
}

/// Says why a Python cannot run the script; `None` if it can.
fn why_unusable(python: &Path) -> Option<String> {
    let find = "import importlib.util as u, sys; \
        missing = [m for m in ('torch', 'transformers') if u.find_spec(m) is None]; \
        sys.exit('it has no ' + ' and no '.join(missing) if missing else 0)";
    match Command::new(python).args(["-c", find]).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(last_line(&output.stderr)),
        Err(error) => Some(error.to_string()),
    }
}

/// The last line that is not blank; in a traceback that is the exception.
pub(crate) fn last_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let line = text.lines().rev().map(str::trim).find(|l| !l.is_empty());
    line.unwrap_or("it printed nothing").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_python_that_does_not_exist_is_an_error() {
        let message = find(Some(Path::new("/nowhere/python")))
            .unwrap_err()
            .to_string();
        assert!(
            message.starts_with("/nowhere/python cannot run"),
            "{message}"
        );
        assert!(
            message.contains("\nhint: `pip install torch transformers`"),
            "{message}"
        );
    }

    #[test]
    fn the_last_line_of_a_traceback_is_the_exception() {
        let line = last_line(b"Traceback\n  File x\nValueError: no\n\n");
        assert_eq!(line, "ValueError: no");
    }
}
