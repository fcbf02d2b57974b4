//! Safetensors files that are written and read one tensor at a time, so that a large file needs little memory.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use burn::backend::ExecutionError;
use burn::tensor::{DType, Int, Tensor, TensorData};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::Error;
use crate::dtype::to_safetensors;
use crate::files::write_whole;
use crate::parameters::{Parameter, TensorOperation};
use crate::safetensors_files::OpenFile;

/// Numbers that are copied from a tensor at a time: 16 MiB of f32.
const PIECE: usize = 1 << 22;

/// A tensor that is to be written to a file. Its numbers stay where they are until they are written.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Name in the file.
    pub name: String,
    /// The numbers.
    pub values: StoredValues,
    /// Type in the file.
    dtype: DType,
    stored: Dtype,
    shape: Vec<usize>,
}

/// The numbers of a [`StoredTensor`].
#[derive(Debug, Clone)]
pub enum StoredValues {
    /// A tensor of a float type, which is cast to the type of the file.
    Float(Parameter),
    /// Codes of 8 bits, of type [`DType::U8`].
    Codes(Tensor<1, Int>),
    /// Numbers on the host, in the type of the file.
    Host(TensorData),
}

impl StoredTensor {
    /// Describes a tensor that is written in the type that it has.
    ///
    /// # Errors
    /// Returns [`Error::FloatType`] for a type that is not stored.
    pub fn new(name: String, values: StoredValues) -> Result<Self, Error> {
        let dtype = match &values {
            StoredValues::Float(parameter) => parameter.clone().apply(TypeOf),
            StoredValues::Codes(codes) => codes.dtype(),
            StoredValues::Host(data) => data.dtype(),
        };
        Self::cast(name, values, dtype)
    }

    /// Describes a tensor that is written as `dtype`.
    pub(crate) fn cast(name: String, values: StoredValues, dtype: DType) -> Result<Self, Error> {
        let shape = match &values {
            StoredValues::Float(parameter) => parameter.shape(),
            StoredValues::Codes(codes) => codes.dims().to_vec(),
            StoredValues::Host(data) => data.shape().to_vec(),
        };
        let stored = match dtype {
            DType::U8 => Dtype::U8,
            float => to_safetensors(float)?,
        };
        Ok(Self {
            name,
            values,
            dtype,
            stored,
            shape,
        })
    }

    /// Type in the file.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of bytes in the file.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.stored.bitsize() / 8
    }

    /// Copies all numbers to the host.
    ///
    /// # Errors
    /// Returns the error of a device that cannot be read.
    pub fn data(&self) -> Result<TensorData, Error> {
        let data = match self.values.clone() {
            StoredValues::Float(parameter) => parameter.try_into_data(),
            StoredValues::Codes(codes) => codes.try_into_data(),
            StoredValues::Host(data) => Ok(data),
        };
        self.converted(data)
    }

    fn converted(&self, data: Result<TensorData, ExecutionError>) -> Result<TensorData, Error> {
        let read_error = |why: String| Error::Device {
            what: "a tensor",
            why: format!("`{}`: {why}", self.name),
        };
        data.map_err(|error| read_error(error.to_string()))?
            .try_cast(self.dtype)
            .map_err(|error| read_error(error.to_string()))
    }

    /// Passes all bytes in order, some of the numbers at a time.
    fn write(&self, write: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
        let numbers: usize = self.shape.iter().product();
        if numbers <= PIECE || matches!(self.values, StoredValues::Host(_)) {
            return write(self.data()?.as_bytes());
        }
        for start in (0..numbers).step_by(PIECE) {
            let range = start..numbers.min(start + PIECE);
            let piece = match self.values.clone() {
                StoredValues::Float(parameter) => parameter.apply(Slice(range)).try_into_data(),
                StoredValues::Codes(codes) => codes.slice(range).try_into_data(),
                StoredValues::Host(data) => Ok(data),
            };
            write(self.converted(piece)?.as_bytes())?;
        }
        Ok(())
    }
}

struct TypeOf;

impl TensorOperation for TypeOf {
    type Output = DType;
    fn apply<const D: usize>(self, tensor: Tensor<D>) -> DType {
        tensor.dtype()
    }
}

/// A range of the numbers of a tensor in order.
struct Slice(std::ops::Range<usize>);

impl TensorOperation for Slice {
    type Output = Tensor<1>;
    fn apply<const D: usize>(self, tensor: Tensor<D>) -> Tensor<1> {
        let numbers = tensor.shape().num_elements();
        let flat_n: Tensor<1> = tensor.without_autodiff().reshape([numbers]);
        flat_n.slice(self.0)
    }
}

/// Writes a safetensors file, which is complete on the disk when it has its name. `metadata` are texts by name.
///
/// # Errors
/// Returns the error of a device that cannot be read, and of the file system.
pub fn write_tensors(
    path: &Path,
    tensors: &[StoredTensor],
    metadata: Option<HashMap<String, String>>,
) -> Result<(), Error> {
    let mut offset = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = offset;
        offset += tensor.bytes();
        let info = TensorInfo {
            dtype: tensor.stored,
            shape: tensor.shape.clone(),
            data_offsets: (start, offset),
        };
        (tensor.name.clone(), info)
    });
    let infos = infos.collect();
    let metadata = Metadata::new(metadata, infos).map_err(|source| Error::Safetensors {
        path: path.to_path_buf(),
        source,
    })?;
    let mut header = serde_json::to_vec(&metadata).map_err(|source| Error::Json {
        path: path.to_path_buf(),
        what: "safetensors header",
        source,
    })?;
    header.resize(header.len().next_multiple_of(8), b' ');
    write_whole(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| file.write_all(&header))
            .map_err(Error::io("write", path))?;
        for tensor in tensors {
            tensor.write(&mut |bytes| file.write_all(bytes).map_err(Error::io("write", path)))?;
        }
        Ok(())
    })
}

/// Reads the tensors of a safetensors file, each in its stored type, and passes them to `each` with their names.
///
/// # Errors
/// Returns an error for a file that is no safetensors file or is truncated, and for a type that is not read, and passes on
/// an error of `each`.
pub fn read_tensors<E: From<Error>>(
    path: &Path,
    each: &mut dyn FnMut(String, TensorData) -> Result<(), E>,
) -> Result<(), E> {
    let file = OpenFile::open(path.to_path_buf())?;
    for name in file.names() {
        let data = file.read(&name)?;
        each(name, data)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use safetensors::tensor::TensorView;

    use super::*;

    fn tensors() -> Vec<StoredTensor> {
        let device = Device::flex();
        // One number more than two pieces have.
        let numbers = 2 * PIECE + 1;
        let long: Vec<f32> = (0..numbers).map(|i| i as f32 * 0.37 - 9.0).collect();
        let long = TensorData::new(long, [numbers, 1]);
        let codes: Vec<u8> = (0..PIECE + 3).map(|i| (i * 7 % 251) as u8).collect();
        let codes = TensorData::new(codes, [PIECE + 3]);
        let long = Tensor::<2>::from_data(long, (&device, DType::F32));
        let float = |tensor| StoredValues::Float(Parameter::Matrix(tensor));
        let tensor = |name: &str, values| StoredTensor::new(name.to_owned(), values).unwrap();
        vec![
            tensor(
                "step",
                StoredValues::Host(TensorData::new(vec![7.0f64], [1])),
            ),
            tensor("a", float(long.clone())),
            // A view whose numbers are not in order in memory.
            tensor(
                "b",
                float(long.clone().slice(0..6).reshape([3, 2]).transpose()),
            ),
            StoredTensor::cast("c".to_owned(), float(long), DType::BF16).unwrap(),
            tensor(
                "d",
                StoredValues::Codes(Tensor::from_data(codes, (&device, DType::U8))),
            ),
        ]
    }

    #[test]
    fn bytes_are_those_of_the_crate_and_are_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tensors.safetensors");
        let tensors = tensors();
        write_tensors(&path, &tensors, None).unwrap();
        let written = std::fs::read(&path).unwrap();
        let data: Vec<TensorData> = tensors.iter().map(|t| t.data().unwrap()).collect();
        let views = tensors.iter().zip(&data).map(|(tensor, data)| {
            let view = TensorView::new(tensor.stored, tensor.shape.clone(), data.as_bytes());
            (tensor.name.as_str(), view.unwrap())
        });
        assert!(written == safetensors::serialize(views, None).unwrap());
        let mut read = Vec::new();
        let mut each = |name: String, data: TensorData| {
            read.push((name, data));
            Ok::<(), Error>(())
        };
        read_tensors(&path, &mut each).unwrap();
        for ((name, found), (tensor, data)) in read.iter().zip(tensors.iter().zip(&data)) {
            assert_eq!(name, &tensor.name);
            assert_eq!((found.dtype(), found.shape()), (data.dtype(), data.shape()));
            assert!(found.as_bytes() == data.as_bytes(), "{name}");
        }
        assert_eq!(read.len(), tensors.len());
    }

    #[test]
    fn a_truncated_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tensors.safetensors");
        write_tensors(&path, &tensors()[..1], None).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let read = read_tensors(&path, &mut |_, _| Ok::<(), Error>(()));
        assert!(matches!(read, Err(Error::Safetensors { .. })));
    }
}
