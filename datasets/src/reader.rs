//! Reading shards: each is checked when it is opened, and then one batch at a time is in memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use ::parquet::arrow::ProjectionMask;
use ::parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use ::parquet::errors::ParquetError;
use arrow_array::RecordBatch;

use crate::error::Error;
use crate::parquet::{
    BATCH_ROWS, Footer, check_provenance, decode, footer, read_footer, reader_options, shards,
};
use crate::schema::{Record, check_columns};

/// A shard whose footer and columns have been checked.
pub(crate) struct OpenShard {
    pub(crate) path: PathBuf,
    pub(crate) metadata: ArrowReaderMetadata,
    pub(crate) footer: Footer,
}

impl OpenShard {
    pub(crate) fn open<R: Record>(path: &Path) -> Result<OpenShard, Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let metadata = decode(path, || ArrowReaderMetadata::load(&file, reader_options()))?;
        let footer = footer(path, &metadata)?;
        check_columns::<R>(metadata.schema()).map_err(|error| error.in_file(path))?;
        Ok(OpenShard {
            path: path.to_path_buf(),
            metadata,
            footer,
        })
    }

    /// Decodes the whole shard or one row group, `rows` rows at a time.
    pub(crate) fn batches(
        &self,
        group: Option<usize>,
        rows: usize,
    ) -> Result<ParquetRecordBatchReader, Error> {
        let file = File::open(&self.path).map_err(Error::io("open", &self.path))?;
        let builder =
            ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone());
        let builder = match group {
            Some(group) => builder.with_row_groups(vec![group]),
            None => builder,
        };
        decode(&self.path, || builder.with_batch_size(rows).build())
    }

    /// Decodes some columns of the whole shard, `rows` rows at a time.
    pub(crate) fn columns(
        &self,
        names: &[&str],
        rows: usize,
    ) -> Result<ParquetRecordBatchReader, Error> {
        let file = File::open(&self.path).map_err(Error::io("open", &self.path))?;
        let builder =
            ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone());
        let wanted = ProjectionMask::columns(builder.parquet_schema(), names.iter().copied());
        decode(&self.path, || {
            builder
                .with_projection(wanted)
                .with_batch_size(rows)
                .build()
        })
    }

    /// The error that the pages hold fewer rows than the footer says.
    pub(crate) fn ends_early(&self, found: usize, expected: usize) -> Error {
        let source = ParquetError::EOF(format!("{found} of {expected} rows"));
        Error::DamagedShard {
            path: self.path.clone(),
            source,
        }
    }
}

/// Reads the rows of a shard in order, a batch of 32 in memory at a time.
///
/// # Errors
/// As [`read_footer`], and [`Error::InFile`] if the columns are not those of `R`. An item is an error if a page is
/// damaged or the content of a row is not valid; that item is the last.
pub fn read_shard<R: Record>(path: &Path) -> Result<ShardRows<R>, Error> {
    let shard = OpenShard::open::<R>(path)?;
    let batches = shard.batches(None, BATCH_ROWS)?;
    Ok(ShardRows {
        shard,
        batches: Some(batches),
        first_row: 0,
        rows: Vec::new().into_iter(),
    })
}

/// The rows of a shard, from [`read_shard`].
pub struct ShardRows<R> {
    shard: OpenShard,
    /// The remaining batches; `None` after the end or an error.
    batches: Option<ParquetRecordBatchReader>,
    /// Row in the file of the first row of the next batch.
    first_row: usize,
    rows: std::vec::IntoIter<R>,
}

impl<R> ShardRows<R> {
    /// The shard's footer.
    pub fn footer(&self) -> &Footer {
        &self.shard.footer
    }
}

impl<R: Record> Iterator for ShardRows<R> {
    type Item = Result<R, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.rows.next() {
                return Some(Ok(row));
            }
            let batches = self.batches.as_mut()?;
            let batch = decode(&self.shard.path, || batches.next().transpose());
            let rows = match batch {
                Ok(None) if self.first_row == self.shard.footer.rows => {
                    self.batches = None;
                    return None;
                }
                Ok(None) => Err(self
                    .shard
                    .ends_early(self.first_row, self.shard.footer.rows)),
                Ok(Some(batch)) => rows_of(&self.shard, &batch, self.first_row),
                Err(error) => Err(error),
            };
            match rows {
                Ok(rows) => {
                    self.first_row += rows.len();
                    self.rows = rows.into_iter();
                }
                Err(error) => {
                    self.batches = None;
                    return Some(Err(error));
                }
            }
        }
    }
}

/// The rows of all shards of a folder in order, 32 in memory at a time.
pub struct FolderRows<R> {
    shards: std::vec::IntoIter<PathBuf>,
    rows: Option<ShardRows<R>>,
}

impl<R: Record> FolderRows<R> {
    /// Lists the shards of a folder; each is opened when its turn comes.
    ///
    /// # Errors
    /// As [`shards`]. An item is an error as in [`read_shard`].
    pub fn open(dir: &Path) -> Result<FolderRows<R>, Error> {
        Ok(FolderRows {
            shards: shards(dir)?.into_iter(),
            rows: None,
        })
    }

    /// The footer of the shard that the last row came from.
    pub fn footer(&self) -> Option<&Footer> {
        self.rows.as_ref().map(ShardRows::footer)
    }
}

impl<R: Record> Iterator for FolderRows<R> {
    type Item = Result<R, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.rows.as_mut().and_then(Iterator::next) {
                return Some(row);
            }
            match read_shard::<R>(&self.shards.next()?) {
                Ok(rows) => self.rows = Some(rows),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Number of rows of all shards of a folder, by their footers.
///
/// # Errors
/// As [`shards`] and [`read_footer`].
pub fn row_count(dir: &Path) -> Result<usize, Error> {
    let mut count = 0;
    for shard in shards(dir)? {
        count += read_footer(&shard)?.rows;
    }
    Ok(count)
}

/// Converts a batch whose first row is row `first_row` of the shard.
pub(crate) fn rows_of<R: Record>(
    shard: &OpenShard,
    batch: &RecordBatch,
    first_row: usize,
) -> Result<Vec<R>, Error> {
    let rows =
        check_provenance(batch, shard.footer.provenance.len()).and_then(|()| R::from_batch(batch));
    rows.map_err(|error| match error {
        Error::Cell { row, column, why } => Error::Cell {
            row: first_row + row,
            column,
            why,
        },
        other => other,
    })
    .map_err(|error| error.in_file(&shard.path))
}
