//! Shards: Parquet files of records. Equal rows give equal bytes: a file holds no time, host or library version.
//!
//! A shard is written beside its final path and renamed when it is complete, so a `.parquet` file is always whole.
//! Readers hold one batch at a time.

use std::fs::{self, File};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use ::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use ::parquet::arrow::arrow_writer::{ArrowWriter, ArrowWriterOptions};
use ::parquet::basic::{Compression, Encoding, ZstdLevel};
use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::KeyValue;
use ::parquet::file::properties::{EnabledStatistics, WriterProperties, WriterPropertiesBuilder};
use ::parquet::schema::types::ColumnPath;
use arrow_array::RecordBatch;
use arrow_array::cast::AsArray;
use arrow_array::types::UInt32Type;
use arrow_schema::{DataType, Field, SchemaRef};

use crate::error::Error;
use crate::files::{publish_file, temporary_path};
use crate::manifest::schema_version;
use crate::private::create_private;
use crate::records::Provenance;
use crate::schema::{PROVENANCE_KEY, Record, SCHEMA_KEY, SCHEMA_VERSION, file_schema};

/// A shard holds the rows of this many consecutive prompts.
pub const PROMPTS_PER_SHARD: usize = 1024;

/// Number of rows that are converted at a time. This bounds memory, and is a constant because the bytes of a file depend
/// on it.
pub(crate) const BATCH_ROWS: usize = 32;

/// A row group ends early if it would need more memory than this, bytes. The bytes of a file depend on it.
const GROUP_BYTES: usize = 256 * 1024 * 1024;

/// The name of a shard in its folder: `shard-00000.parquet`.
pub fn shard_name(index: usize) -> String {
    format!("shard-{index:05}.parquet")
}

/// Lists the shards of a folder in order. Files that are not Parquet are ignored.
///
/// # Errors
/// [`Error::Io`], and [`Error::Invalid`] if a number is missing or a Parquet file has another name.
pub fn shards(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut count = 0;
    let mut highest = 0;
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        if path
            .extension()
            .is_none_or(|extension| extension != "parquet")
        {
            continue;
        }
        let number = path
            .file_stem()
            .and_then(|stem| stem.to_str()?.strip_prefix("shard-")?.parse::<usize>().ok());
        match number.filter(|number| {
            path.file_name()
                .is_some_and(|name| *name == *shard_name(*number))
        }) {
            Some(number) => highest = highest.max(number),
            None => {
                return Err(Error::invalid(
                    format!(
                        "{} does not have the name of a shard (shard-00000.parquet)",
                        path.display()
                    ),
                    "move it out of the folder",
                ));
            }
        }
        count += 1;
    }
    let paths: Vec<PathBuf> = (0..count)
        .map(|index| dir.join(shard_name(index)))
        .collect();
    if count > 0 && highest >= count {
        let missing = paths
            .into_iter()
            .find(|path| !path.exists())
            .unwrap_or_else(|| dir.join(shard_name(count)));
        return Err(Error::invalid(
            format!("{} is absent, but later shards exist", missing.display()),
            "restore it, or delete the folder and run the stage again",
        ));
    }
    Ok(paths)
}

/// Writes rows as one shard, with the optional columns if a row fills them.
///
/// # Errors
/// As [`ShardWriter`].
pub fn write_shard<R: Record>(
    path: &Path,
    rows: &[R],
    provenance: &[Provenance],
) -> Result<(), Error> {
    let optional = rows.iter().any(R::fills_optional);
    let mut writer = ShardWriter::<R>::begin(path, provenance, optional)?;
    rows.chunks(BATCH_ROWS)
        .try_for_each(|rows| writer.write(rows))?;
    writer.finish()
}

/// Writes the rows that it is given as one shard; at most 32 rows wait in memory. The file has its final path after
/// [`finish`](ShardWriter::finish), and until then the path with `.tmp` added.
pub struct ShardWriter<R: Record> {
    path: PathBuf,
    temporary: PathBuf,
    writer: ArrowWriter<File>,
    /// The file's columns.
    columns: SchemaRef,
    provenances: usize,
    waiting: Vec<R>,
}

impl<R: Record> ShardWriter<R> {
    /// Begins a shard. A row's `provenance` is an index into the given list; tables without that column take an empty
    /// list. The shard has none of the table's optional columns.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::WriteShard`].
    pub fn new(path: &Path, provenance: &[Provenance]) -> Result<ShardWriter<R>, Error> {
        Self::begin(path, provenance, false)
    }

    /// As [`new`](ShardWriter::new), with or without the table's optional columns.
    ///
    /// # Errors
    /// As there.
    pub fn begin(
        path: &Path,
        provenance: &[Provenance],
        optional: bool,
    ) -> Result<ShardWriter<R>, Error> {
        let temporary = temporary_path(path);
        let file = create_private(&temporary).map_err(Error::io("create", &temporary))?;
        let list = serde_json::to_string(provenance)
            .map_err(|error| bad_footer(path, PROVENANCE_KEY, &error.to_string()))?;
        let options = ArrowWriterOptions::new()
            .with_properties(properties::<R>(list))
            .with_skip_arrow_metadata(true);
        let columns = SchemaRef::new(file_schema::<R>(optional));
        let writer = ArrowWriter::try_new_with_options(file, columns.clone(), options)
            .map_err(unwritable(path))?;
        let provenances = provenance.len();
        Ok(ShardWriter {
            path: path.to_path_buf(),
            temporary,
            writer,
            columns,
            provenances,
            waiting: Vec::new(),
        })
    }

    /// Adds a row.
    ///
    /// # Errors
    /// [`Error::InFile`] for a row that may not be stored; [`Error::WriteShard`], for example because the disk is full.
    pub fn push(&mut self, row: R) -> Result<(), Error> {
        self.waiting.push(row);
        if self.waiting.len() == BATCH_ROWS {
            self.write_waiting()
        } else {
            Ok(())
        }
    }

    /// Writes the remaining rows, syncs the file and renames it to its final path.
    ///
    /// # Errors
    /// As [`push`](ShardWriter::push), and [`Error::Io`].
    pub fn finish(mut self) -> Result<(), Error> {
        self.write_waiting()?;
        let file = self.writer.into_inner().map_err(unwritable(&self.path))?;
        publish_file(&file, &self.temporary, &self.path)
    }

    fn write_waiting(&mut self) -> Result<(), Error> {
        let rows = std::mem::take(&mut self.waiting);
        if rows.is_empty() {
            Ok(())
        } else {
            self.write(&rows)
        }
    }

    fn write(&mut self, rows: &[R]) -> Result<(), Error> {
        let batch = R::to_batch(rows)
            .and_then(|batch| check_provenance(&batch, self.provenances).map(|()| batch))
            .and_then(|batch| self.fitted(rows, batch))
            .map_err(|error| error.in_file(&self.path))?;
        let written = self.writer.write(&batch);
        written
            .and_then(|()| match self.writer.memory_size() > GROUP_BYTES {
                true => self.writer.flush(),
                false => Ok(()),
            })
            .map_err(unwritable(&self.path))
    }

    /// Reduces a batch to the columns of the file.
    fn fitted(&self, rows: &[R], batch: RecordBatch) -> Result<RecordBatch, Error> {
        if batch.num_columns() == self.columns.fields().len() {
            return Ok(batch);
        }
        if let Some(row) = rows.iter().position(R::fills_optional) {
            return Err(Error::Cell {
                row,
                column: R::OPTIONAL.join(", "),
                why: "the file was begun without these columns".into(),
            });
        }
        let columns = self.columns.fields().iter();
        let kept = columns.filter_map(|field| batch.column_by_name(field.name()).cloned());
        RecordBatch::try_new(self.columns.clone(), kept.collect()).map_err(|source| Error::Arrow {
            what: R::TABLE.into(),
            source,
        })
    }
}

fn properties<R: Record>(provenance: String) -> WriterProperties {
    let footer = vec![
        KeyValue::new(SCHEMA_KEY.into(), SCHEMA_VERSION.to_string()),
        KeyValue::new(PROVENANCE_KEY.into(), provenance),
    ];
    let properties = WriterProperties::builder()
        // The default value contains the library's version.
        .set_created_by("potstill".into())
        .set_key_value_metadata(Some(footer))
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(R::GROUP_ROWS))
        .set_statistics_enabled(EnabledStatistics::Chunk);
    // Floats hardly ever repeat, so a dictionary wastes space, and their bytes compress better when they are grouped by
    // significance: signals become a third smaller and are written in less than half the time.
    let mut floats = Vec::new();
    R::schema()
        .fields()
        .iter()
        .for_each(|field| float_paths(&[], field, &mut floats));
    let split = |properties: WriterPropertiesBuilder, path: ColumnPath| {
        let properties = properties.set_column_dictionary_enabled(path.clone(), false);
        properties.set_column_encoding(path, Encoding::BYTE_STREAM_SPLIT)
    };
    floats.into_iter().fold(properties, split).build()
}

/// Collects the Parquet paths of all floats in a column, at any depth.
fn float_paths(parents: &[String], field: &Field, found: &mut Vec<ColumnPath>) {
    let mut path = [parents, std::slice::from_ref(field.name())].concat();
    match field.data_type() {
        DataType::Float32 | DataType::Float64 => found.push(ColumnPath::new(path)),
        DataType::List(element) => {
            path.push("list".into());
            float_paths(&path, element, found);
        }
        DataType::Struct(fields) => fields
            .iter()
            .for_each(|field| float_paths(&path, field, found)),
        _ => {}
    }
}

/// Options that ignore a schema in Arrow's own form: the Parquet schema alone describes the columns, and a second schema
/// could only be damaged.
pub(crate) fn reader_options() -> ArrowReaderOptions {
    ArrowReaderOptions::new().with_skip_arrow_metadata(true)
}

/// Metadata in the footer of a shard.
#[derive(Debug, Clone, PartialEq)]
pub struct Footer {
    /// Version of the schema.
    pub schema: u32,
    /// List of provenances, into which the rows' `provenance` is an index.
    pub provenance: Vec<Provenance>,
    /// Number of rows.
    pub rows: usize,
}

/// Reads the footer of a shard of any table.
///
/// # Errors
/// [`Error::Io`], [`Error::DamagedShard`], and [`Error::Invalid`] if the footer is not one of this version of Potstill.
pub fn read_footer(path: &Path) -> Result<Footer, Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let metadata = decode(path, || ArrowReaderMetadata::load(&file, reader_options()))?;
    footer(path, &metadata)
}

pub(crate) fn footer(path: &Path, metadata: &ArrowReaderMetadata) -> Result<Footer, Error> {
    let file = metadata.metadata().file_metadata();
    let value = |key: &'static str| {
        let pairs = file
            .key_value_metadata()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let value = pairs
            .iter()
            .find(|pair| pair.key == key)
            .and_then(|pair| pair.value.as_deref());
        value.ok_or_else(|| {
            let path = path.display();
            let problem =
                format!("{path} has no `{key}` in its footer, so Potstill did not write it");
            Error::invalid(problem, "move it out of the folder")
        })
    };
    let schema: u32 = value(SCHEMA_KEY)?
        .parse()
        .map_err(|_| bad_footer(path, SCHEMA_KEY, "it is not a number"))?;
    schema_version(path, u64::from(schema))?;
    let provenance = serde_json::from_str(value(PROVENANCE_KEY)?)
        .map_err(|error| bad_footer(path, PROVENANCE_KEY, &error.to_string()))?;
    Ok(Footer {
        schema,
        provenance,
        rows: usize::try_from(file.num_rows()).unwrap_or_default(),
    })
}

fn bad_footer(path: &Path, key: &str, why: &str) -> Error {
    let path = path.display();
    Error::invalid(
        format!("`{key}` in the footer of {path} cannot be read: {why}"),
        "",
    )
}

/// Checks that the column `provenance`, if there is one, holds indices into a list of `known` entries.
pub(crate) fn check_provenance(batch: &RecordBatch, known: usize) -> Result<(), Error> {
    let Some(column) = batch
        .column_by_name("provenance")
        .and_then(|column| column.as_primitive_opt::<UInt32Type>())
    else {
        return Ok(());
    };
    match column
        .values()
        .iter()
        .position(|index| *index as usize >= known)
    {
        None => Ok(()),
        Some(row) => Err(Error::Cell {
            row,
            column: "provenance".into(),
            why: format!(
                "{} is not an index into the {known} entries of the footer",
                column.value(row)
            ),
        }),
    }
}

/// Runs the Parquet decoder. Some damaged files make it panic instead of giving an error, and a damaged file must not end
/// a run. The decoder's state is dropped after a panic.
pub(crate) fn decode<T, E: Into<ParquetError>>(
    path: &Path,
    decoder: impl FnOnce() -> Result<T, E>,
) -> Result<T, Error> {
    let source = match catch_unwind(AssertUnwindSafe(decoder)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.into(),
        Err(_) => ParquetError::General("the decoder gave up".into()),
    };
    if let Some(code) = system_error(&source) {
        return Err(Error::io("read", path)(io::Error::from_raw_os_error(code)));
    }
    Err(Error::DamagedShard {
        path: path.to_path_buf(),
        source,
    })
}

/// Returns the number of the system's error that caused an error of the decoder, such as too many open files. The file
/// itself may be whole then. The decoder keeps some of these errors only as text.
fn system_error(error: &ParquetError) -> Option<i32> {
    let text = error.to_string();
    let (_, code) = text.split_once("(os error ")?;
    code.split(')').next()?.parse().ok()
}

fn unwritable(path: &Path) -> impl FnOnce(ParquetError) -> Error {
    move |source| Error::WriteShard {
        path: path.to_path_buf(),
        source,
    }
}
