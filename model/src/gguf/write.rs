//! Writes GGUF files, version 3, little endian: metadata and the names of the tensors first, then one tensor at a time.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::header::{ALIGNMENT, MAGIC};
use crate::Error;
use crate::files::write_whole;
use potstill_kernels::BlockType;

/// The version that is written.
const VERSION: u32 = 3;

/// A value of the metadata that is written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Count(u32),
    Number(f32),
    Flag(bool),
    Text(String),
    Texts(Vec<String>),
    Counts(Vec<i32>),
    Numbers(Vec<f32>),
    Flags(Vec<bool>),
}

/// The metadata in the order in which they are written.
pub(super) type Metadata = Vec<(String, Value)>;

/// Name, type and shape of a tensor that is written. The innermost dimension is last.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorEntry {
    pub(super) name: String,
    pub(super) kind: BlockType,
    pub(super) shape: Vec<usize>,
}

impl TensorEntry {
    fn bytes(&self) -> usize {
        self.kind.bytes(self.shape.iter().product())
    }
}

/// Writes a file. `data` returns the bytes of the tensor with a number; it is called once for each, in order.
///
/// # Errors
/// Returns the errors of `data`, and an error for a failure of the file system.
pub(super) fn write_gguf(
    path: &Path,
    metadata: &Metadata,
    tensors: &[TensorEntry],
    mut data: impl FnMut(usize) -> Result<Vec<u8>, Error>,
) -> Result<(), Error> {
    let header = header(metadata, tensors);
    write_whole(path, |file| {
        let put = |file: &mut BufWriter<File>, bytes: &[u8]| {
            let padding = [0; ALIGNMENT];
            let rest = bytes.len().next_multiple_of(ALIGNMENT) - bytes.len();
            file.write_all(bytes)
                .and_then(|()| file.write_all(&padding[..rest]))
                .map_err(Error::io("write", path))
        };
        put(file, &header)?;
        for number in 0..tensors.len() {
            put(file, &data(number)?)?;
        }
        Ok(())
    })
}

fn header(metadata: &Metadata, tensors: &[TensorEntry]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut out, key);
        put_value(&mut out, value);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        put_text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for size in tensor.shape.iter().rev() {
            out.extend((*size as u64).to_le_bytes());
        }
        out.extend(tensor.kind.code().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += tensor.bytes().next_multiple_of(ALIGNMENT) as u64;
    }
    out
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Writes the code of a value's type and the value.
fn put_value(out: &mut Vec<u8>, value: &Value) {
    let array = |out: &mut Vec<u8>, element: u32, count: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(element.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
    };
    match value {
        Value::Count(number) => {
            out.extend(4u32.to_le_bytes());
            out.extend(number.to_le_bytes());
        }
        Value::Number(number) => {
            out.extend(6u32.to_le_bytes());
            out.extend(number.to_le_bytes());
        }
        Value::Flag(flag) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*flag));
        }
        Value::Text(text) => {
            out.extend(8u32.to_le_bytes());
            put_text(out, text);
        }
        Value::Texts(texts) => {
            array(out, 8, texts.len());
            texts.iter().for_each(|text| put_text(out, text));
        }
        Value::Counts(numbers) => {
            array(out, 5, numbers.len());
            numbers
                .iter()
                .for_each(|number| out.extend(number.to_le_bytes()));
        }
        Value::Numbers(numbers) => {
            array(out, 6, numbers.len());
            numbers
                .iter()
                .for_each(|number| out.extend(number.to_le_bytes()));
        }
        Value::Flags(flags) => {
            array(out, 7, flags.len());
            out.extend(flags.iter().map(|flag| u8::from(*flag)));
        }
    }
}
