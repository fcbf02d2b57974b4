//! An open GGUF file: its metadata by key and its tensors by name.
//!
//! The header is kept in memory. Tensors are read at offsets and not mapped: a mapped file would count a second time in
//! the memory of the process, and a file that shrinks would end it.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::header::{
    ANOTHER, Array, DOWNLOAD, Element, Field, HeaderReader, TensorPlace, broken, place_tensors,
};
use crate::Error;
use crate::files::map_file;

/// A GGUF file whose header was checked.
pub(crate) struct GgufFile {
    path: PathBuf,
    file: File,
    /// The bytes of the header, which hold the arrays of the metadata.
    header: Vec<u8>,
    metadata: HashMap<String, Field>,
    tensors: HashMap<String, TensorPlace>,
    /// The names of the tensors in the order of the file.
    order: Vec<String>,
}

impl GgufFile {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// Returns an error that names the file, and the key or the tensor, for a file that cannot be read, that is not
    /// GGUF, that is truncated, or that holds a type, an alignment or a place that is not possible.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        // A pipe would be waited for when it is opened.
        let metadata = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if !metadata.is_file() {
            return Err(broken(
                path,
                "it is not a regular file".to_owned(),
                DOWNLOAD,
            ));
        }
        let length = metadata.len();
        let file = File::open(path).map_err(Error::io("open", path))?;
        if length == 0 {
            let what = "the file is empty".to_owned();
            return Err(broken(path, what, DOWNLOAD));
        }
        // The map is dropped when the header was read.
        let bytes = map_file(path)?;
        let mut reader = HeaderReader {
            path,
            bytes: &bytes,
            at: 0,
        };
        let (metadata, mut tensors, order) = reader.header()?;
        let header = bytes[..reader.at].to_vec();
        place_tensors(path, &bytes, &metadata, &mut tensors, &order, header.len())?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            header,
            metadata,
            tensors,
            order,
        })
    }

    /// The path of the file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of the tensors in the order of the file.
    pub(crate) fn tensor_names(&self) -> &[String] {
        &self.order
    }

    /// The type and shape of a tensor.
    pub(super) fn tensor(&self, name: &str) -> Option<&TensorPlace> {
        self.tensors.get(name)
    }

    /// Reads stored bytes of a tensor from an offset within it on.
    pub(super) fn read_tensor(
        &self,
        place: &TensorPlace,
        offset: usize,
        bytes: &mut [u8],
    ) -> Result<(), Error> {
        let at = (place.range.start + offset) as u64;
        self.file
            .read_exact_at(bytes, at)
            .map_err(Error::io("read", &self.path))
    }

    /// Whether a key exists.
    pub(super) fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// Reads a text.
    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Field::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a text")),
        }
    }

    /// Reads a whole number from 0 to 2^32 − 1.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Field::Integer(number)) => match u32::try_from(*number) {
                Ok(number) => Ok(Some(number as usize)),
                Err(_) => Err(self.wrong(key, "a whole number from 0 to 4294967295")),
            },
            Some(_) => Err(self.wrong(key, "a whole number from 0 to 4294967295")),
        }
    }

    /// Reads a number. An f32 becomes the shortest decimal number that rounds to it, such as 1e-6.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Field::Float(number)) if number.is_finite() => Ok(Some(*number)),
            Some(Field::Integer(number)) => Ok(Some(*number as f64)),
            Some(_) => Err(self.wrong(key, "a number")),
        }
    }

    /// Reads a flag.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Field::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// Reads an array of texts.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, Error> {
        let Some(array) = self.array(key, "an array of texts", Element::Text)? else {
            return Ok(None);
        };
        let mut reader = self.reader(array);
        let mut texts = Vec::with_capacity(array.count);
        for _ in 0..array.count {
            texts.push(reader.text(|| format!("key `{key}`"))?);
        }
        Ok(Some(texts))
    }

    /// Reads an array of numbers or flags.
    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        let Some(Field::Array(array)) = self.metadata.get(key) else {
            return match self.has(key) {
                false => Ok(None),
                true => Err(self.wrong(key, "an array of numbers")),
            };
        };
        if matches!(array.element, Element::Text | Element::Array) {
            return Err(self.wrong(key, "an array of numbers"));
        }
        let mut reader = self.reader(array);
        let mut numbers = Vec::with_capacity(array.count);
        for _ in 0..array.count {
            numbers.push(match reader.field(array.element, key)? {
                Field::Integer(number) => number as f64,
                Field::Float(number) => number,
                Field::Bool(flag) => f64::from(u8::from(flag)),
                Field::Text(_) | Field::Array(_) => f64::NAN,
            });
        }
        Ok(Some(numbers))
    }

    fn array(&self, key: &str, what: &str, element: Element) -> Result<Option<&Array>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Field::Array(array)) if array.element == element => Ok(Some(array)),
            Some(_) => Err(self.wrong(key, what)),
        }
    }

    fn reader(&self, array: &Array) -> HeaderReader<'_> {
        HeaderReader {
            path: &self.path,
            bytes: &self.header[..array.range.end],
            at: array.range.start,
        }
    }

    /// Makes the error about a key that has another type than its meaning requires.
    pub(super) fn wrong(&self, key: &str, what: &str) -> Error {
        self.broken(format!("the key `{key}` is not {what}"))
    }

    /// Makes the error about contents that cannot be used.
    pub(super) fn broken(&self, what: String) -> Error {
        broken(&self.path, what, ANOTHER)
    }
}
