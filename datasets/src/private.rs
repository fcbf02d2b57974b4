//! Files and folders that only their owner can read, because prompts and answers may be private.
//!
//! On Unix the permissions are 0600 and 0700, whatever the umask is. Other systems have no such permissions, and their
//! defaults apply.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::Path;

/// Options that create a file for its owner alone. The permissions of an existing file stay as they are.
pub fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// Creates an empty file for its owner alone at a temporary path. What is there from an earlier process is removed and
/// never written to, so that a symbolic link cannot lead the writer to another file.
///
/// # Errors
/// Errors of the file system.
pub fn create_private(path: &Path) -> io::Result<File> {
    create_new(path, private_file())
}

/// As [`create_private`], with other options.
pub(crate) fn create_new(path: &Path, mut options: OpenOptions) -> io::Result<File> {
    options.write(true).create_new(true);
    match options.open(path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            fs::remove_file(path)?;
            options.open(path)
        }
        opened => opened,
    }
}

/// Creates a folder for its owner alone, if it does not exist, and its parents with the usual permissions. An existing
/// folder stays as it is.
///
/// # Errors
/// Errors of the file system.
pub fn create_private_folder(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut builder = DirBuilder::new();
    // An existing folder is no error to a recursive builder.
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn only_the_owner_has_access() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("runs/a");
        create_private_folder(&folder).unwrap();
        assert_eq!(mode(&folder), 0o700);
        assert_ne!(
            mode(&dir.path().join("runs")),
            0o700,
            "needs a umask of 022"
        );
        let file = folder.join("file");
        create_private(&file).unwrap();
        assert_eq!(mode(&file), 0o600);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        create_private_folder(&folder).unwrap();
        assert_eq!(mode(&folder), 0o755, "an existing folder stays as it is");
    }

    #[test]
    fn a_link_at_a_temporary_path_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("x.tmp"));
        fs::write(&target, "kept").unwrap();
        symlink(&target, &link).unwrap();
        create_private(&link).unwrap().write_all(b"new").unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "kept");
        assert_eq!(fs::read_to_string(&link).unwrap(), "new");
        assert!(!fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(mode(&link), 0o600);
    }
}
