//! Opens a Parquet file of a stranger: what its footer and the heads of its pages promise is checked before the Parquet
//! reader allocates it.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use ::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use ::parquet::basic::{Compression, LogicalType, Type as PhysicalType};
use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::{FileMetaData, ParquetMetaData};
use ::parquet::schema::types::{SchemaDescriptor, Type};
use arrow_schema::{DataType, Field, FieldRef, Fields, Schema, SchemaRef};

use super::file::open_regular;
use super::thrift::{footer_depth, page_head};
use crate::error::Error;
use crate::limits::{
    IMPORT_COLUMNS, PARQUET_DEPTH, PARQUET_FOOTER_BYTES, PARQUET_LIST_VALUES, PARQUET_PAGE_BYTES,
};
use crate::parquet::{decode, reader_options};

/// An open file.
pub(super) struct OpenParquet {
    pub(super) file: File,
    /// Metadata by which text is read as bytes, so that bytes that are not UTF-8 can be reported with their row.
    pub(super) metadata: ArrowReaderMetadata,
    /// The columns with their own types.
    pub(super) schema: SchemaRef,
}

pub(super) fn open(path: &Path) -> Result<OpenParquet, Error> {
    let mut file = open_regular(path)?;
    check_footer(path, &mut file)?;
    let own =
        decode(path, || ArrowReaderMetadata::load(&file, reader_options())).map_err(not_a_shard)?;
    let columns = own.parquet_schema().num_columns();
    if columns > IMPORT_COLUMNS {
        return Err(Error::invalid(
            format!(
                "{} has {columns} columns, more than {IMPORT_COLUMNS}",
                path.display()
            ),
            "write a file with the needed columns only",
        ));
    }
    let mut names: Vec<&String> = own
        .schema()
        .fields()
        .iter()
        .map(|field| field.name())
        .collect();
    names.sort();
    if let Some([name, _]) = names.array_windows().find(|[name, next]| name == next) {
        return Err(Error::invalid(
            format!("{} has the column `{name}` twice", path.display()),
            "rename one of them",
        ));
    }
    let metadata = decode(path, || text_as_bytes(own.metadata())).map_err(not_a_shard)?;
    Ok(OpenParquet {
        schema: own.schema().clone(),
        metadata,
        file,
    })
}

/// Turns an error about a shard into one about a file of the user.
pub(super) fn not_a_shard(error: Error) -> Error {
    match error {
        Error::DamagedShard { path, source } => Error::UnreadableParquet { path, source },
        other => other,
    }
}

fn damaged(path: &Path, why: &str) -> Error {
    Error::UnreadableParquet {
        path: path.to_path_buf(),
        source: ParquetError::General(why.to_owned()),
    }
}

/// Checks the footer's size and what it promises.
fn check_footer(path: &Path, file: &mut File) -> Result<(), Error> {
    let io = |error| Error::io("read", path)(error);
    let length = file.metadata().map_err(io)?.len();
    let mut end = [0; 8];
    if length < 12 {
        return Err(damaged(path, "the file is too short"));
    }
    file.seek(SeekFrom::Start(length - 8)).map_err(io)?;
    file.read_exact(&mut end).map_err(io)?;
    let [a, b, c, d, magic @ ..] = end;
    if &magic != b"PAR1" {
        return Err(damaged(
            path,
            "the file does not end with a footer of Parquet",
        ));
    }
    let footer = u32::from_le_bytes([a, b, c, d]) as usize;
    if footer > PARQUET_FOOTER_BYTES {
        return Err(Error::invalid(
            format!(
                "{} has a footer of {footer} bytes, more than {PARQUET_FOOTER_BYTES}",
                path.display()
            ),
            "write the file again with larger row groups",
        ));
    }
    let start = (length - 8).checked_sub(footer as u64);
    let start = start.ok_or_else(|| damaged(path, "the footer is longer than the file"))?;
    let mut bytes = vec![0; footer];
    file.seek(SeekFrom::Start(start)).map_err(io)?;
    file.read_exact(&mut bytes).map_err(io)?;
    match footer_depth(&bytes) {
        Err(_) => Err(damaged(path, "the footer is damaged")),
        Ok(depth) if depth > PARQUET_DEPTH => Err(Error::invalid(
            format!(
                "{} has columns that are nested deeper than {PARQUET_DEPTH}",
                path.display()
            ),
            "write a file with the needed columns only",
        )),
        Ok(_) => Ok(()),
    }
}

/// Makes metadata by which all text is read as bytes that are not copied out of their page.
fn text_as_bytes(own: &ParquetMetaData) -> Result<ArrowReaderMetadata, ParquetError> {
    let file = own.file_metadata();
    let root = bytes_type(file.schema_descr().root_schema())?;
    let file = FileMetaData::new(
        file.version(),
        file.num_rows(),
        None,
        None,
        Arc::new(SchemaDescriptor::new(Arc::new(root))),
        None,
    );
    let metadata = Arc::new(ParquetMetaData::new(file, own.row_groups().to_vec()));
    let plain = ArrowReaderMetadata::try_new(metadata.clone(), reader_options())?;
    let viewed: Vec<Field> = plain.schema().fields().iter().map(viewed).collect();
    let options = ArrowReaderOptions::new().with_schema(Arc::new(Schema::new(viewed)));
    ArrowReaderMetadata::try_new(metadata, options)
}

/// Returns a column without the mark that its bytes are text.
fn bytes_type(own: &Type) -> Result<Type, ParquetError> {
    let info = own.get_basic_info();
    match own {
        Type::PrimitiveType {
            physical_type: PhysicalType::BYTE_ARRAY,
            ..
        } => {
            let is_text = match info.logical_type_ref() {
                Some(LogicalType::Decimal { .. }) => false,
                Some(_) => true,
                None => own.get_precision() <= 0,
            };
            if !is_text {
                return Ok(own.clone());
            }
            Type::primitive_type_builder(own.name(), PhysicalType::BYTE_ARRAY)
                .with_repetition(info.repetition())
                .build()
        }
        Type::PrimitiveType { .. } => Ok(own.clone()),
        Type::GroupType { fields, .. } => {
            let fields = fields.iter().map(|field| bytes_type(field).map(Arc::new));
            let builder = Type::group_type_builder(own.name())
                .with_converted_type(info.converted_type())
                .with_logical_type(info.logical_type_ref().cloned())
                .with_fields(fields.collect::<Result<_, _>>()?);
            match info.has_repetition() {
                true => builder.with_repetition(info.repetition()).build(),
                false => builder.build(),
            }
        }
    }
}

/// Returns a field whose bytes are views of their page.
fn viewed(field: &FieldRef) -> Field {
    let of = |field: &FieldRef| Arc::new(viewed(field));
    let kind = match field.data_type() {
        DataType::Binary => DataType::BinaryView,
        DataType::List(element) => DataType::List(of(element)),
        DataType::Map(entries, is_sorted) => DataType::Map(of(entries), *is_sorted),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(of).collect::<Fields>()),
        other => other.clone(),
    };
    Field::new(field.name(), kind, field.is_nullable()).with_metadata(field.metadata().clone())
}

/// Checks the compression and the pages of the needed columns, and returns the size of the largest pages together.
pub(super) fn check_pages(
    path: &Path,
    opened: &mut OpenParquet,
    leaves: &[usize],
) -> Result<u64, Error> {
    let metadata = opened.metadata.metadata().clone();
    let mut total = 0;
    for leaf in leaves {
        let (mut dictionary, mut data) = (0, 0);
        for group in metadata.row_groups() {
            let Some(chunk) = group.columns().get(*leaf) else {
                continue;
            };
            let name = chunk.column_path().string();
            check_codec(path, &name, chunk.compression())?;
            let (start, length) =
                decode(path, || Ok::<_, ParquetError>(chunk.byte_range())).map_err(not_a_shard)?;
            let pages = page_sizes(path, &mut opened.file, start, start.saturating_add(length))?;
            if chunk.column_descr().max_rep_level() > 0 && pages.values > PARQUET_LIST_VALUES {
                return Err(Error::invalid(
                    format!(
                        "{}: column `{name}` has {} list elements in a row group, more than {PARQUET_LIST_VALUES}",
                        path.display(),
                        pages.values
                    ),
                    "write the file again with smaller row groups",
                ));
            }
            dictionary = dictionary.max(pages.dictionary);
            data = data.max(pages.data);
        }
        total += dictionary + data;
        if total > PARQUET_PAGE_BYTES {
            return Err(Error::invalid(
                format!(
                    "{}: the needed columns have pages of {total} bytes, more than {PARQUET_PAGE_BYTES} together",
                    path.display()
                ),
                "write the file again with smaller row groups or pages",
            ));
        }
    }
    Ok(total)
}

fn check_codec(path: &Path, column: &str, compression: Compression) -> Result<(), Error> {
    let codec = match compression {
        Compression::GZIP(_) => "gzip",
        Compression::LZO => "LZO",
        _ => return Ok(()),
    };
    Err(Error::invalid(
        format!(
            "{}: column `{column}` is compressed with {codec}, which Potstill does not read",
            path.display()
        ),
        "write the file again with zstd, snappy, brotli or lz4, for example with `duckdb -c \"COPY (FROM 'OLD.parquet') TO 'NEW.parquet' (COMPRESSION zstd)\"`",
    ))
}

/// Sizes of the pages of a column in a row group.
#[derive(Default)]
struct PageSizes {
    /// The dictionary, bytes.
    dictionary: u64,
    /// The largest page of data, bytes.
    data: u64,
    /// Number of values of all pages.
    values: u64,
}

/// Reads the heads of the pages between two places of a file.
fn page_sizes(path: &Path, file: &mut File, start: u64, end: u64) -> Result<PageSizes, Error> {
    // Heads have some dozen bytes, and more with long statistics.
    const HEAD_BYTES: [usize; 2] = [256, 1 << 20];
    let mut found = PageSizes::default();
    let mut position = start;
    let mut bytes = Vec::new();
    while position < end {
        let mut head = None;
        for length in HEAD_BYTES {
            bytes.clear();
            file.seek(SeekFrom::Start(position))
                .map_err(Error::io("read", path))?;
            let mut part = file.take((length as u64).min(end - position));
            part.read_to_end(&mut bytes)
                .map_err(Error::io("read", path))?;
            head = page_head(&bytes).ok();
            if head.is_some() {
                break;
            }
        }
        let Some((page, length)) = head else {
            return Err(damaged(path, "the head of a page is damaged"));
        };
        match page.is_dictionary {
            true => found.dictionary = found.dictionary.max(page.unpacked),
            false => {
                found.data = found.data.max(page.unpacked);
                found.values += page.values;
            }
        }
        position = position
            .saturating_add(length as u64)
            .saturating_add(page.packed);
    }
    Ok(found)
}
