//! The metrics of `metrics.jsonl` as TensorBoard reads them: `tensorboard/events.out.tfevents.potstill`.
//!
//! The file is a sequence of TFRecords: length (u64), checksum of the length, the bytes, checksum of the
//! bytes, all little-endian. A checksum is the CRC-32C, rotated and with a constant added. The bytes are a
//! protocol buffer, `tensorflow.Event`, with the time (field 1), the step (2) and a file version (3) or a
//! summary (5), which is a list of values (1) of tag (1) and number in f32 (2). Format: tensorflow/core/lib/io/record_writer.h, util/event.proto,
//! framework/summary.proto.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use potstill_datasets::private_file;

use crate::error::Error;
use crate::metrics::StepMetrics;

/// Path of the event file. The name is the same for every run of a student: TensorBoard reads every file with
/// `tfevents` in its name, so a second name would show steps twice.
const FILE: &str = "tensorboard/events.out.tfevents.potstill";

/// The event file of one student, open for the steps to come.
pub(crate) struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// Opens the file and truncates it to the length that the checkpoint names, so that no step is in it
    /// twice. Begins a new file if the file is shorter. Also returns the length in bytes.
    pub(crate) fn open(dir: &Path, bytes: u64) -> Result<(Self, u64), Error> {
        let path = dir.join(FILE);
        let folder = path.parent().unwrap_or(dir);
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let open = || {
            let mut file = private_file().create(true).append(true).open(&path)?;
            let found = file.metadata()?.len();
            let kept = if found < bytes { 0 } else { bytes };
            file.set_len(kept)?;
            if kept > 0 {
                return Ok((file, kept));
            }
            let first = record(&version(wall_seconds()));
            file.write_all(&first)?;
            Ok((file, first.len() as u64))
        };
        let (file, bytes) = open().map_err(Error::io(&path))?;
        Ok((Self { file, path }, bytes))
    }

    /// Appends the event of a step; returns its length in bytes.
    pub(crate) fn write(&mut self, metrics: &StepMetrics) -> Result<u64, Error> {
        let bytes = record(&event(wall_seconds(), metrics.step, &scalars(metrics)));
        self.file.write_all(&bytes).map_err(Error::io(&self.path))?;
        Ok(bytes.len() as u64)
    }

    pub(crate) fn sync(&self) -> Result<(), Error> {
        self.file.sync_all().map_err(Error::io(&self.path))
    }
}

/// Returns every metric of a step with its tag in TensorBoard.
fn scalars(metrics: &StepMetrics) -> Vec<(String, f64)> {
    let StepMetrics {
        step: _,
        loss,
        forward_kl,
        cross_entropy,
        ref divergences,
        teacher_nll,
        gradient_norm,
        ref term_gradient_norms,
        learning_rate,
        loss_tokens,
        tokens,
        tokens_per_second,
        mfu,
        stall_seconds,
        peak_bytes,
        skipped: _,
    } = *metrics;
    let fixed = [
        ("loss/total", loss),
        ("loss/forward_kl", forward_kl),
        ("loss/cross_entropy", cross_entropy),
        ("loss/teacher_nll", teacher_nll),
        ("train/gradient_norm", gradient_norm),
        ("train/learning_rate", learning_rate),
        ("train/loss_tokens", loss_tokens as f64),
        ("train/tokens", tokens as f64),
        ("train/tokens_per_second", tokens_per_second),
        ("train/stall_seconds", stall_seconds),
    ];
    let fixed = fixed.map(|(tag, value)| (tag.to_owned(), value));
    let named = divergences.iter();
    let named = named.map(|(name, value)| (format!("loss/{name}"), *value));
    let norms = term_gradient_norms.iter();
    let norms = norms.map(|(name, norm)| (format!("gradient_norm/{name}"), *norm));
    let utilisation = mfu.map(|share| ("train/mfu".to_owned(), share));
    let memory = peak_bytes.map(|bytes| ("train/peak_bytes".to_owned(), bytes as f64));
    (fixed.into_iter().chain(named).chain(norms))
        .chain(utilisation)
        .chain(memory)
        .collect()
}

fn wall_seconds() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

/// Encodes the event that a file begins with.
fn version(wall_seconds: f64) -> Vec<u8> {
    let mut event = double(1, wall_seconds);
    event.extend(bytes(3, b"brain.Event:2"));
    event
}

/// Encodes the event of one step.
fn event(wall_seconds: f64, step: u64, scalars: &[(String, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, number) in scalars {
        let mut value = bytes(1, tag.as_bytes());
        value.extend(float(2, *number as f32));
        summary.extend(bytes(1, &value));
    }
    let mut event = double(1, wall_seconds);
    event.extend(varint(key(2, 0)));
    event.extend(varint(step));
    event.extend(bytes(5, &summary));
    event
}

/// Frames a message as a TFRecord.
fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(message);
    record.extend(masked_crc(message).to_le_bytes());
    record
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// Encodes a field's number and wire type: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
fn key(field: u64, wire_type: u64) -> u64 {
    field << 3 | wire_type
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

fn double(field: u64, number: f64) -> Vec<u8> {
    let mut encoded = varint(key(field, 1));
    encoded.extend(number.to_le_bytes());
    encoded
}

fn float(field: u64, number: f32) -> Vec<u8> {
    let mut encoded = varint(key(field, 5));
    encoded.extend(number.to_le_bytes());
    encoded
}

fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
    let mut encoded = varint(key(field, 2));
    encoded.extend(varint(content.len() as u64));
    encoded.extend(content);
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected bytes, in hex, are the output of TensorBoard's own writer:
    ///
    /// ```python
    /// from tensorboard.compat.proto import event_pb2, summary_pb2
    /// from tensorboard.summary.writer.record_writer import RecordWriter
    /// writer = RecordWriter(open("events", "wb"))
    /// writer.write(event_pb2.Event(wall_time=1.5, file_version="brain.Event:2").SerializeToString())
    /// values = [summary_pb2.Summary.Value(tag=tag, simple_value=number)
    ///           for tag, number in [("loss/total", 0.75), ("train/tokens", 300.0)]]
    /// summary = summary_pb2.Summary(value=values)
    /// writer.write(event_pb2.Event(wall_time=2.25, step=300, summary=summary).SerializeToString())
    /// ```
    #[test]
    fn bytes_are_those_of_tensorboards_own_writer() {
        let mut written = record(&version(1.5));
        let scalars = [("loss/total", 0.75), ("train/tokens", 300.0)];
        let scalars = scalars.map(|(tag, value)| (tag.to_owned(), value));
        written.extend(record(&event(2.25, 300, &scalars)));
        let hex: String = written.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c\
             36000000000000004f578cef09000000000000024010ac022a280a110a0a6c6f73732f746f74616c\
             150000403f0a130a0c747261696e2f746f6b656e73150000964352eca781"
        );
    }

    #[test]
    fn a_file_shorter_than_in_the_checkpoint_is_begun_again() {
        let dir = tempfile::tempdir().unwrap();
        let (_, fresh) = EventFile::open(dir.path(), 0).unwrap();
        assert_eq!(EventFile::open(dir.path(), fresh).unwrap().1, fresh);
        assert_eq!(EventFile::open(dir.path(), fresh + 1).unwrap().1, fresh);
        assert_eq!(fs::metadata(dir.path().join(FILE)).unwrap().len(), fresh);
    }
}
