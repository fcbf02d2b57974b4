//! The distributions of one sequence as flat columns, and views of their rows.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The distribution at one position: exact on the support S, and one number for the tail. This is a view of
/// [`Distributions`] or of a [`SignalRow`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DistributionRow<'a> {
    /// The support S: distinct ids, the most probable first, and the lower id first among equals. The target token is in S.
    pub ids: &'a [u32],
    /// Log-probabilities of `ids` at T = 1, in nats.
    pub logprobs: &'a [f32],
    /// Log of the exact tail mass, in nats; -inf if S is the whole vocabulary.
    pub tail_logprob: f32,
    /// Entropy of the full distribution, in nats.
    pub entropy: f32,
    /// For each T of [`Provenance::temperatures`](crate::Provenance::temperatures), log Σ_v exp(logprob_v / T) over the
    /// whole vocabulary, in nats, so that log p_T(i) = logprob_i / T − log_z. `None` if the teacher does not provide it.
    pub log_z_at: &'a [Option<f32>],
    /// Distinct tokens drawn from the tail with probability p(id) / p(tail), ascending. Empty if no draws were taken or
    /// the tail has no mass.
    pub draw_ids: &'a [u32],
    /// Number of times that each of `draw_ids` was drawn. The counts sum to m, the number of draws.
    pub draw_counts: &'a [u32],
}

/// One distribution that owns its numbers. A teacher makes these one at a time, in an order that need not be that of the
/// positions, and a control or a test changes one. A [`Signal`](crate::Signal) holds [`Distributions`] instead.
#[derive(Debug, Clone, PartialEq)]
pub struct SignalRow {
    /// As [`DistributionRow::ids`].
    pub ids: Vec<u32>,
    /// As [`DistributionRow::logprobs`].
    pub logprobs: Vec<f32>,
    /// As [`DistributionRow::tail_logprob`].
    pub tail_logprob: f32,
    /// As [`DistributionRow::entropy`].
    pub entropy: f32,
    /// As [`DistributionRow::log_z_at`].
    pub log_z_at: Vec<Option<f32>>,
    /// As [`DistributionRow::draw_ids`].
    pub draw_ids: Vec<u32>,
    /// As [`DistributionRow::draw_counts`].
    pub draw_counts: Vec<u32>,
}

impl SignalRow {
    /// Returns a view of the row.
    #[must_use]
    pub fn view(&self) -> DistributionRow<'_> {
        DistributionRow {
            ids: &self.ids,
            logprobs: &self.logprobs,
            tail_logprob: self.tail_logprob,
            entropy: self.entropy,
            log_z_at: &self.log_z_at,
            draw_ids: &self.draw_ids,
            draw_counts: &self.draw_counts,
        }
    }
}

impl DistributionRow<'_> {
    /// Copies the row.
    #[must_use]
    pub fn to_row(&self) -> SignalRow {
        SignalRow {
            ids: self.ids.to_vec(),
            logprobs: self.logprobs.to_vec(),
            tail_logprob: self.tail_logprob,
            entropy: self.entropy,
            log_z_at: self.log_z_at.to_vec(),
            draw_ids: self.draw_ids.to_vec(),
            draw_counts: self.draw_counts.to_vec(),
        }
    }
}

/// A column of lists: list i is `values[offsets[i]..offsets[i + 1]]`, as in Arrow. The first offset is 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ListColumn<T> {
    offsets: Vec<u32>,
    values: Vec<T>,
}

impl<T> Default for ListColumn<T> {
    fn default() -> Self {
        ListColumn {
            offsets: vec![0],
            values: Vec::new(),
        }
    }
}

impl<T: Clone> ListColumn<T> {
    /// Creates a column from its values, and the offsets of its lists in a column that begins `first` values earlier.
    pub(crate) fn new(first: u32, offsets: impl Iterator<Item = u32>, values: Vec<T>) -> Self {
        ListColumn {
            offsets: offsets.map(|end| end.wrapping_sub(first)).collect(),
            values,
        }
    }

    /// Creates a column of lists without values.
    pub(crate) fn empty_lists(len: usize) -> Self {
        ListColumn {
            offsets: vec![0; len + 1],
            values: Vec::new(),
        }
    }

    fn push(&mut self, list: &[T]) {
        self.values.extend_from_slice(list);
        // The end of a longer column does not fit, and `is_sound` refuses the column.
        let end = u32::try_from(self.values.len()).unwrap_or(u32::MAX);
        self.offsets.push(end);
    }

    /// Number of lists.
    pub(crate) fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Returns list i, which is empty if there is none.
    fn list(&self, i: usize) -> &[T] {
        let ends = (self.offsets.get(i), self.offsets.get(i + 1));
        let (Some(&start), Some(&end)) = ends else {
            return &[];
        };
        let list = self.values.get(start as usize..end as usize);
        list.unwrap_or_default()
    }

    /// The values of all lists.
    pub(crate) fn values(&self) -> &[T] {
        &self.values
    }

    /// The lengths of the lists.
    pub(crate) fn lengths(&self) -> impl Iterator<Item = usize> + Clone {
        let ends = self.offsets.iter().skip(1);
        let pairs = self.offsets.iter().zip(ends);
        pairs.map(|(start, end)| end.saturating_sub(*start) as usize)
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        self.offsets.truncate(len + 1);
        let end = self.offsets.last().copied().unwrap_or(0);
        self.values.truncate(end as usize);
    }

    /// Whether the column has `len` lists whose offsets ascend from 0 to the number of values.
    fn is_sound(&self, len: usize) -> bool {
        let end = self.offsets.last().map(|end| *end as usize);
        self.len() == len
            && self.offsets.first() == Some(&0)
            && self.offsets.is_sorted()
            && end == Some(self.values.len())
    }
}

/// The distributions of one sequence, in order, as columns, so that no position has an allocation of its own.
/// [`DistributionRow`] describes the fields of a row.
///
/// Each list column has its own offsets, as in the file. A malformed sequence can therefore be held, and
/// [`Signal::validate`](crate::Signal::validate) names the position and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Distributions {
    pub(crate) ids: ListColumn<u32>,
    pub(crate) logprobs: ListColumn<f32>,
    pub(crate) tail_logprob: Vec<f32>,
    pub(crate) entropy: Vec<f32>,
    pub(crate) log_z_at: ListColumn<Option<f32>>,
    pub(crate) draw_ids: ListColumn<u32>,
    pub(crate) draw_counts: ListColumn<u32>,
}

impl Distributions {
    /// Number of distributions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are no distributions.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the distribution at an index, which is empty, with numbers that are NaN, if there is none.
    #[must_use]
    pub fn row(&self, index: usize) -> DistributionRow<'_> {
        let number = |column: &[f32]| column.get(index).copied().unwrap_or(f32::NAN);
        DistributionRow {
            ids: self.ids.list(index),
            logprobs: self.logprobs.list(index),
            tail_logprob: number(&self.tail_logprob),
            entropy: number(&self.entropy),
            log_z_at: self.log_z_at.list(index),
            draw_ids: self.draw_ids.list(index),
            draw_counts: self.draw_counts.list(index),
        }
    }

    /// Returns the distributions in order.
    #[must_use]
    pub fn rows(&self) -> DistributionRows<'_> {
        self.into_iter()
    }

    /// Appends a distribution.
    pub fn push_row(&mut self, row: DistributionRow<'_>) {
        self.ids.push(row.ids);
        self.logprobs.push(row.logprobs);
        self.tail_logprob.push(row.tail_logprob);
        self.entropy.push(row.entropy);
        self.log_z_at.push(row.log_z_at);
        self.draw_ids.push(row.draw_ids);
        self.draw_counts.push(row.draw_counts);
    }

    /// Keeps the first `len` distributions.
    pub fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        self.logprobs.truncate(len);
        self.tail_logprob.truncate(len);
        self.entropy.truncate(len);
        self.log_z_at.truncate(len);
        self.draw_ids.truncate(len);
        self.draw_counts.truncate(len);
    }

    /// Copies each distribution, calls `change` with its index and the copy, and keeps the changed copies instead.
    pub fn change_rows(&mut self, mut change: impl FnMut(usize, &mut SignalRow)) {
        let changed = self.rows().enumerate().map(|(index, row)| {
            let mut row = row.to_row();
            change(index, &mut row);
            row
        });
        *self = changed.collect();
    }

    /// Keeps the normaliser of one temperature of each row, or none if no temperature has this index.
    pub fn keep_temperature(&mut self, index: usize) {
        let mut kept = ListColumn::default();
        for row in self.rows() {
            let log_z = row.log_z_at.get(index);
            kept.push(log_z.map(std::slice::from_ref).unwrap_or_default());
        }
        self.log_z_at = kept;
    }

    /// Whether all columns have as many rows, and all offsets are within the values.
    pub(crate) fn is_sound(&self) -> bool {
        let len = self.len();
        self.ids.is_sound(len)
            && self.logprobs.is_sound(len)
            && self.tail_logprob.len() == len
            && self.entropy.len() == len
            && self.log_z_at.is_sound(len)
            && self.draw_ids.is_sound(len)
            && self.draw_counts.is_sound(len)
    }
}

impl FromIterator<SignalRow> for Distributions {
    fn from_iter<I: IntoIterator<Item = SignalRow>>(rows: I) -> Self {
        let mut distributions = Distributions::default();
        for row in rows {
            distributions.push_row(row.view());
        }
        distributions
    }
}

/// The distributions of a sequence in order, from [`Distributions::rows`].
#[derive(Debug, Clone)]
pub struct DistributionRows<'a> {
    distributions: &'a Distributions,
    indices: Range<usize>,
}

impl<'a> Iterator for DistributionRows<'a> {
    type Item = DistributionRow<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let index = self.indices.next()?;
        Some(self.distributions.row(index))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.indices.size_hint()
    }
}

impl ExactSizeIterator for DistributionRows<'_> {}

impl<'a> IntoIterator for &'a Distributions {
    type Item = DistributionRow<'a>;
    type IntoIter = DistributionRows<'a>;

    fn into_iter(self) -> DistributionRows<'a> {
        DistributionRows {
            distributions: self,
            indices: 0..self.len(),
        }
    }
}
