//! Limits of the system that stop a run: a full disk, too many open files, no memory.

use std::io::{Error, ErrorKind};

/// A resource that the system ran out of.
struct Exhausted {
    /// Kinds of errors that say so.
    kinds: &'static [ErrorKind],
    /// Text that says so, for libraries that keep the system's error only as text.
    text: &'static str,
    /// The advice of the hint.
    remedy: &'static str,
}

const ALL: [Exhausted; 6] = [
    Exhausted {
        kinds: &[ErrorKind::StorageFull],
        text: "No space left on device",
        remedy: "the disk is full: free some space",
    },
    Exhausted {
        kinds: &[ErrorKind::QuotaExceeded],
        text: "Disk quota exceeded",
        remedy: "the quota of this user on that disk is used up: free some space",
    },
    Exhausted {
        kinds: &[ErrorKind::FileTooLarge],
        text: "File too large",
        remedy: "the file would pass the limit of this shell (`ulimit -f`) or of the file system: raise the limit",
    },
    Exhausted {
        kinds: &[ErrorKind::ReadOnlyFilesystem],
        text: "Read-only file system",
        remedy: "that folder cannot be written: make it writable, or name another one with `--run-dir DIR`",
    },
    Exhausted {
        kinds: &[],
        text: "Too many open files",
        remedy: "too many files are open: raise the limit (`ulimit -n 1024`)",
    },
    Exhausted {
        kinds: &[ErrorKind::OutOfMemory],
        text: "Cannot allocate memory",
        remedy: "there is not enough memory: raise its limit (`ulimit -v`) or stop other programs",
    },
];

/// Says what to do about a limit of the system that caused an error; `None` for other errors.
pub(crate) fn remedy(error: &anyhow::Error) -> Option<&'static str> {
    let caused_by = |limit: &&Exhausted| {
        error.chain().any(|cause| {
            let kind = cause.downcast_ref::<Error>().map(Error::kind);
            kind.is_some_and(|kind| limit.kinds.contains(&kind))
                || cause.to_string().contains(limit.text)
        })
    };
    ALL.iter().find(caused_by).map(|limit| limit.remedy)
}

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use anyhow::Context as _;

    use super::remedy;

    #[test]
    fn limits_of_the_system_are_recognised() {
        // ENOMEM, EMFILE, EFBIG, ENOSPC, EROFS, EDQUOT of Linux.
        let codes = [12, 24, 27, 28, 30, 122];
        let words = [
            "memory",
            "ulimit -n",
            "ulimit -f",
            "disk is full",
            "cannot be written",
            "quota",
        ];
        for (code, word) in codes.into_iter().zip(words) {
            let cause = || Error::from_raw_os_error(code);
            let direct = Err::<(), _>(cause()).context("cannot write x").unwrap_err();
            let as_text = anyhow::anyhow!("cannot write x: {}", cause());
            for error in [direct, as_text] {
                let found = remedy(&error);
                assert!(
                    found.is_some_and(|text| text.contains(word)),
                    "{code}: {found:?}"
                );
            }
        }
        assert_eq!(remedy(&Error::from(ErrorKind::NotFound).into()), None);
    }
}
