//! The PyTorch side: a script that is built in, and a Python that can run it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::bail;

/// Reads a request on stdin, prints a reply.
pub(crate) const SCRIPT: &str = include_str!("../../benches/peer.py");

/// The Python to run the peer with: the one that is named, else that of the virtual environment,
/// else `python3`. `None` where none of these has torch and transformers.
///
/// # Errors
/// When the one that is named does not have them.
pub(crate) fn python(named: Option<&Path>) -> anyhow::Result<Option<PathBuf>> {
    if let Some(path) = named {
        return match lacks(path) {
            None => Ok(Some(path.to_owned())),
            Some(why) => bail!(
                "{} cannot run the PyTorch side: {why}; `pip install torch transformers` gives it what it needs",
                path.display()
            ),
        };
    }
    let environment =
        std::env::var_os("VIRTUAL_ENV").map(|dir| PathBuf::from(dir).join("bin/python"));
    let mut candidates = environment
        .into_iter()
        .chain([PathBuf::from("python3"), PathBuf::from("python")]);
    Ok(candidates.find(|path| lacks(path).is_none()))
}

/// Why a Python cannot run the peer.
fn lacks(python: &Path) -> Option<String> {
    let find = "import importlib.util as u, sys; \
        missing = [m for m in ('torch', 'transformers') if u.find_spec(m) is None]; \
        sys.exit('it has no ' + ' and no '.join(missing) if missing else 0)";
    match Command::new(python).args(["-c", find]).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(last_line(&output.stderr)),
        Err(error) => Some(error.to_string()),
    }
}

/// The last line that says something: of a traceback, the exception.
pub(crate) fn last_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let line = text.lines().rev().map(str::trim).find(|l| !l.is_empty());
    line.unwrap_or("it says nothing").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_python_that_is_not_there_is_an_error_when_it_was_named() {
        let error = python(Some(Path::new("/nowhere/python"))).unwrap_err();
        let said = error.to_string();
        assert!(said.starts_with("/nowhere/python cannot run"), "{said}");
        assert!(said.contains("pip install torch transformers"), "{said}");
    }

    #[test]
    fn an_exception_is_the_last_line() {
        let said = last_line(b"Traceback\n  File x\nValueError: no\n\n");
        assert_eq!(said, "ValueError: no");
    }
}
