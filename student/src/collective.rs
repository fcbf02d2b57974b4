//! What the replicas of a training say to one another. Each rank runs the same program on its share of the micro-batches.

use std::ops::Range;

use crate::error::Error;

/// The group of replicas that train one model, as one of them sees it. All ranks call the same functions in the same
/// order with slices of the same length.
pub trait Collective: Send {
    /// Number of this replica, from 0.
    fn rank(&self) -> usize;

    /// Number of replicas.
    fn size(&self) -> usize;

    /// Replaces `values` by their sums over all ranks. The sums are added in the order of the ranks, so all ranks get the
    /// same bits, and the same as in any other run of this size.
    ///
    /// # Errors
    /// [`Error::LostRank`] if a rank does not answer.
    fn sum(&mut self, values: &mut [f32]) -> Result<(), Error>;

    /// [`Self::sum`] in f64, for the sums of metrics.
    ///
    /// # Errors
    /// As [`Self::sum`].
    fn sum_f64(&mut self, values: &mut [f64]) -> Result<(), Error>;

    /// Sends `values[ranges[rank]]` of each rank to all others. `ranges` has one range for each rank.
    ///
    /// # Errors
    /// As [`Self::sum`].
    fn gather(&mut self, values: &mut [f32], ranges: &[Range<usize>]) -> Result<(), Error>;
}

/// A training with a single replica.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&mut self, _values: &mut [f32]) -> Result<(), Error> {
        Ok(())
    }

    fn sum_f64(&mut self, _values: &mut [f64]) -> Result<(), Error> {
        Ok(())
    }

    fn gather(&mut self, _values: &mut [f32], _ranges: &[Range<usize>]) -> Result<(), Error> {
        Ok(())
    }
}
