//! The header of a GGUF file, version 2 and 3, little endian: metadata, and the names and places of the tensors.
//!
//! Everything in a file is untrusted: each count and length is compared with the bytes that are left before anything is
//! allocated, and arrays of metadata stay encoded until they are asked for.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crate::Error;
use crate::limits::GGUF_ALIGNMENT;
use potstill_kernels::BlockType;

/// The first four bytes of a file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// The key of the alignment of tensor data, and its default in bytes.
const ALIGNMENT_KEY: &str = "general.alignment";
pub(super) const ALIGNMENT: usize = 32;
/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Field {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Array),
}

/// An array of the metadata, which is decoded when it is read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Array {
    pub(super) element: Element,
    pub(super) count: usize,
    pub(super) range: Range<usize>,
}

/// The type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    Unsigned(usize),
    Signed(usize),
    Float(usize),
    Bool,
    Text,
    Array,
}

/// The place of a tensor in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorPlace {
    pub(super) kind: BlockType,
    /// Shape with the innermost dimension last, as in Hugging Face files.
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

impl Element {
    fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::Unsigned(1),
            1 => Self::Signed(1),
            2 => Self::Unsigned(2),
            3 => Self::Signed(2),
            4 => Self::Unsigned(4),
            5 => Self::Signed(4),
            6 => Self::Float(4),
            7 => Self::Bool,
            8 => Self::Text,
            9 => Self::Array,
            10 => Self::Unsigned(8),
            11 => Self::Signed(8),
            12 => Self::Float(8),
            _ => return None,
        })
    }

    /// The bytes of a value, or for texts the fewest bytes that one may have.
    fn width(self) -> usize {
        match self {
            Self::Unsigned(width) | Self::Signed(width) | Self::Float(width) => width,
            Self::Bool => 1,
            Self::Text => 8,
            Self::Array => 12,
        }
    }
}

pub(super) const DOWNLOAD: &str = "the file may be damaged; download it again";
pub(super) const ANOTHER: &str =
    "use another file of the same model, or its folder with safetensors files";

pub(super) fn broken(path: &Path, what: String, hint: &'static str) -> Error {
    Error::Gguf {
        path: path.to_path_buf(),
        what,
        hint,
    }
}

pub(super) type Header = (
    HashMap<String, Field>,
    HashMap<String, TensorPlace>,
    Vec<String>,
);

/// Reads a header from its bytes.
pub(super) struct HeaderReader<'a> {
    pub(super) path: &'a Path,
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
}

impl<'a> HeaderReader<'a> {
    pub(super) fn header(&mut self) -> Result<Header, Error> {
        if self.take(4, || "the header".to_owned())? != MAGIC {
            let what = "it does not begin with the letters GGUF, so it is not a GGUF file";
            return Err(broken(self.path, what.to_owned(), "check the path"));
        }
        let version = self.unsigned(4, || "the header".to_owned())?;
        if !(2..=3).contains(&version) {
            let what = format!("it has version {version} of GGUF, and only 2 and 3 are supported");
            let hint =
                "convert the model again with a current llama.cpp, or use its safetensors files";
            return Err(broken(self.path, what, hint));
        }
        let tensors = self.unsigned(8, || "the header".to_owned())?;
        let keys = self.unsigned(8, || "the header".to_owned())?;
        // A key has at least 8 + 4 + 1 bytes, a tensor 8 + 4 + 4 + 8.
        self.check_count(keys, 13, "keys")?;
        let mut metadata = HashMap::new();
        for number in 0..keys {
            let name = || format!("key {} of {keys}", number + 1);
            let key = self.text(name)?.to_owned();
            let element = self.element(&key)?;
            let field = self.field(element, &key)?;
            if metadata.insert(key.clone(), field).is_some() {
                return Err(self.broken(format!("the key `{key}` exists twice")));
            }
        }
        self.check_count(tensors, 24, "tensors")?;
        let mut places = HashMap::new();
        let mut order = Vec::new();
        for number in 0..tensors {
            let name = || format!("the entry of tensor {} of {tensors}", number + 1);
            let name = self.text(name)?.to_owned();
            let place = self.tensor(&name)?;
            if places.insert(name.clone(), place).is_some() {
                return Err(self.broken(format!("the tensor `{name}` exists twice")));
            }
            order.push(name);
        }
        Ok((metadata, places, order))
    }

    /// Reads the entry of a tensor. Its range is relative to the tensor data until the end of the header is known.
    fn tensor(&mut self, name: &str) -> Result<TensorPlace, Error> {
        let what = || format!("the entry of tensor `{name}`");
        let rank = self.unsigned(4, what)?;
        if !(1..=4).contains(&rank) {
            let what = format!("the tensor `{name}` has {rank} dimensions, but may have 1 to 4");
            return Err(self.broken(what));
        }
        let mut shape = Vec::new();
        let mut count = 1u64;
        for _ in 0..rank {
            let size = self.unsigned(8, what)?;
            count = count
                .checked_mul(size)
                .filter(|count| *count > 0 && *count < 1 << 60)
                .ok_or_else(|| {
                    self.broken(format!("the tensor `{name}` has an impossible size"))
                })?;
            shape.insert(0, size as usize);
        }
        let code = self.unsigned(4, what)? as u32;
        let Some(kind) = BlockType::from_code(code) else {
            let what = format!(
                "the tensor `{name}` is stored in type {code} of ggml, and only {} are supported",
                BlockType::names()
            );
            return Err(broken(self.path, what, ANOTHER));
        };
        let row = shape.last().copied().unwrap_or_default();
        if !row.is_multiple_of(kind.block_len()) {
            return Err(self.broken(format!(
                "the rows of the tensor `{name}` have {row} numbers, which are not whole blocks of {} ({})",
                kind.block_len(),
                kind.name()
            )));
        }
        let offset = self.unsigned(8, what)?;
        let length = kind.bytes(count as usize) as u64;
        let end = offset.checked_add(length).filter(|end| *end < 1 << 62);
        let end = end.ok_or_else(|| self.outside(name, offset))?;
        Ok(TensorPlace {
            kind,
            shape,
            range: offset as usize..end as usize,
        })
    }

    fn element(&mut self, key: &str) -> Result<Element, Error> {
        let code = self.unsigned(4, || format!("the key `{key}`"))?;
        Element::from_code(code as u32).ok_or_else(|| {
            self.broken(format!(
                "the key `{key}` has type {code}, which GGUF does not have"
            ))
        })
    }

    pub(super) fn field(&mut self, element: Element, key: &str) -> Result<Field, Error> {
        let what = || format!("the key `{key}`");
        Ok(match element {
            Element::Unsigned(width) => Field::Integer(self.unsigned(width, what)?.into()),
            Element::Signed(width) => {
                let bits = self.unsigned(width, what)?;
                let unused = 64 - 8 * width as u32;
                Field::Integer((((bits << unused) as i64) >> unused).into())
            }
            Element::Float(4) => {
                let number = f32::from_bits(self.unsigned(4, what)? as u32);
                Field::Float(shortest(number))
            }
            Element::Float(_) => Field::Float(f64::from_bits(self.unsigned(8, what)?)),
            Element::Bool => match self.unsigned(1, what)? {
                0 => Field::Bool(false),
                1 => Field::Bool(true),
                other => {
                    let what = format!("the key `{key}` is a flag of value {other}");
                    return Err(self.broken(what));
                }
            },
            Element::Text => Field::Text(self.text(what)?.to_owned()),
            Element::Array => Field::Array(self.array(key)?),
        })
    }

    fn array(&mut self, key: &str) -> Result<Array, Error> {
        let element = self.element(key)?;
        if element == Element::Array {
            let what = format!("the key `{key}` is an array of arrays, which is not supported");
            return Err(broken(self.path, what, ANOTHER));
        }
        let count = self.unsigned(8, || format!("the key `{key}`"))?;
        self.check_count(
            count,
            element.width(),
            &format!("values in the key `{key}`"),
        )?;
        let count = count as usize;
        let start = self.at;
        if element == Element::Text {
            for _ in 0..count {
                self.text(|| format!("the key `{key}`"))?;
            }
        } else {
            self.take(count * element.width(), || format!("the key `{key}`"))?;
        }
        Ok(Array {
            element,
            count,
            range: start..self.at,
        })
    }

    /// Checks that the rest of the file can hold `count` items of at least `width` bytes.
    fn check_count(&self, count: u64, width: usize, what: &str) -> Result<(), Error> {
        let left = self.bytes.len() - self.at;
        if count > (left / width) as u64 {
            let what = format!("it announces {count} {what}, but only {left} bytes follow");
            return Err(broken(self.path, what, DOWNLOAD));
        }
        Ok(())
    }

    pub(super) fn text(&mut self, what: impl Fn() -> String) -> Result<&'a str, Error> {
        let length = self.unsigned(8, &what)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let bytes = self.take(length, &what)?;
        std::str::from_utf8(bytes)
            .map_err(|_| self.broken(format!("a text in {} is not UTF-8", what())))
    }

    fn unsigned(&mut self, width: usize, what: impl Fn() -> String) -> Result<u64, Error> {
        let bytes = self.take(width, what)?;
        let mut whole = [0; 8];
        whole[..width].copy_from_slice(bytes);
        Ok(u64::from_le_bytes(whole))
    }

    fn take(&mut self, length: usize, what: impl Fn() -> String) -> Result<&'a [u8], Error> {
        let left = &self.bytes[self.at..];
        let Some(taken) = left.get(..length) else {
            let what = format!(
                "it ends within {}: {length} bytes are needed at byte {}, and {} are left",
                what(),
                self.at,
                left.len()
            );
            return Err(broken(self.path, what, DOWNLOAD));
        };
        self.at += length;
        Ok(taken)
    }

    fn outside(&self, name: &str, offset: u64) -> Error {
        let what = format!("the tensor `{name}` at offset {offset} lies outside the file");
        broken(self.path, what, DOWNLOAD)
    }

    fn broken(&self, what: String) -> Error {
        broken(self.path, what, DOWNLOAD)
    }
}

/// Returns the number whose shortest decimal form is that of an f32.
fn shortest(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// Makes the ranges of the tensors absolute, and checks that they are aligned, within the file, and apart.
pub(super) fn place_tensors(
    path: &Path,
    bytes: &[u8],
    metadata: &HashMap<String, Field>,
    tensors: &mut HashMap<String, TensorPlace>,
    order: &[String],
    header_end: usize,
) -> Result<(), Error> {
    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => ALIGNMENT as u64,
        Some(Field::Integer(number)) => u64::try_from(*number).unwrap_or_default(),
        Some(_) => 0,
    };
    if !alignment.is_power_of_two() || alignment > GGUF_ALIGNMENT {
        let what = format!(
            "the key `{ALIGNMENT_KEY}` is {alignment}, but must be a power of two up to {GGUF_ALIGNMENT}"
        );
        return Err(broken(path, what, DOWNLOAD));
    }
    let alignment = alignment as usize;
    let start = header_end.next_multiple_of(alignment);
    let mut ends: Vec<(usize, usize, &str)> = Vec::with_capacity(order.len());
    for name in order {
        let Some(place) = tensors.get_mut(name) else {
            continue;
        };
        let offset = place.range.start;
        if !offset.is_multiple_of(alignment) {
            let what = format!(
                "the tensor `{name}` has the offset {offset}, which is not a multiple of {alignment}"
            );
            return Err(broken(path, what, DOWNLOAD));
        }
        place.range = start + place.range.start..start + place.range.end;
        if place.range.end > bytes.len() {
            let what = format!(
                "the tensor `{name}` needs the bytes {} to {}, but the file has {}",
                place.range.start,
                place.range.end,
                bytes.len()
            );
            return Err(broken(path, what, DOWNLOAD));
        }
        ends.push((place.range.start, place.range.end, name));
    }
    ends.sort_unstable();
    for pair in ends.windows(2) {
        if pair[1].0 < pair[0].1 {
            let what = format!("the tensors `{}` and `{}` overlap", pair[0].2, pair[1].2);
            return Err(broken(path, what, DOWNLOAD));
        }
    }
    Ok(())
}
