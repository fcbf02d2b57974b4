//! The stored weights of a checkpoint, whatever the format of their files.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use potstill_kernels::BlockMatrix;

use crate::Error;

/// Stored weights by their Hugging Face names, in Hugging Face layout.
pub(crate) trait Weights {
    /// Returns the names of all stored tensors that can be read.
    fn names(&self) -> Vec<String>;

    /// Returns the shape of a tensor, or `None` if there is none of this name.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// Reads a tensor and converts it to a float type. At no time are its values in memory twice.
    ///
    /// # Errors
    /// Returns an error for a tensor that is absent or of a type that is not read, and for a failure of the file system.
    fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error>;

    /// Reads a matrix in the blocks in which it is stored; `None` if it is stored otherwise.
    ///
    /// # Errors
    /// Returns an error for a failure of the file system.
    fn blocks(&self, _name: &str) -> Result<Option<BlockMatrix>, Error> {
        Ok(None)
    }

    /// Returns the file that holds a tensor; for an absent tensor, the file that should name it.
    fn file(&self, name: &str) -> PathBuf;
}

/// Returns where a projection of an expert is if the experts are stacked, or `None` if `name` is no such projection.
///
/// Some checkpoints store `experts.gate_up_proj` `[E, 2·w, d]` and `experts.down_proj` `[E, d, w]` instead of a matrix for
/// each expert.
pub(crate) fn in_stack(name: &str) -> Option<InStack> {
    let (prefix, rest) = name.split_once(".experts.")?;
    let mut parts = rest.split('.');
    let expert = parts.next()?.parse().ok()?;
    let (stack, part, parts_joined) = match parts.next()? {
        "gate_proj" => ("gate_up_proj", 0, 2),
        "up_proj" => ("gate_up_proj", 1, 2),
        "down_proj" => ("down_proj", 0, 1),
        _ => return None,
    };
    Some(InStack {
        stack: format!("{prefix}.experts.{stack}"),
        expert,
        part,
        parts: parts_joined,
    })
}

/// A projection of an expert within stacked projections.
#[derive(Debug, PartialEq)]
pub(crate) struct InStack {
    pub(crate) stack: String,
    pub(crate) expert: usize,
    /// Index of the projection among `parts` that are joined.
    pub(crate) part: usize,
    pub(crate) parts: usize,
}

/// Checks that a path that a file of the checkpoint names is a plain file name, so that no file outside of the folder is
/// read.
pub(crate) fn inside(dir: &Path, index: &Path, file: &str) -> Result<PathBuf, Error> {
    let plain = Path::new(file).file_name().is_some_and(|name| name == file);
    match plain {
        true => Ok(dir.join(file)),
        false => Err(Error::OutsideFolder {
            index: index.to_path_buf(),
            file: file.to_owned(),
        }),
    }
}
