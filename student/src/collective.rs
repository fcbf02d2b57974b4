//! The messages between the replicas of a training. Each rank runs the same program on its share of the micro-batches.

#[cfg(feature = "mpi")]
mod mpi;
mod threads;
#[cfg(not(feature = "mpi"))]
mod without_mpi;

use std::ops::Range;

use crate::error::Error;

#[cfg(feature = "mpi")]
pub use self::mpi::{MpiProcesses, MpiRank};
pub(crate) use threads::thread_ranks;
#[cfg(not(feature = "mpi"))]
pub use without_mpi::{NoProcesses as MpiProcesses, NoRank as MpiRank};

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

    /// Sends the bytes of each rank, as many as it has, to rank 0, which gets those of all ranks in order; the others get
    /// nothing.
    ///
    /// # Errors
    /// As [`Self::sum`].
    fn gather_bytes(&mut self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, Error>;
}

/// The part of `len` numbers that a rank adds up: the parts are consecutive and of about the same length.
fn piece(len: usize, rank: usize, size: usize) -> Range<usize> {
    let end = |rank: usize| (len as u128 * rank as u128 / size.max(1) as u128) as usize;
    end(rank)..end(rank + 1)
}

/// Adds `values` to `sums`, number by number.
fn add<T: Copy + std::ops::AddAssign>(sums: &mut [T], values: &[T]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += *value;
    }
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

    fn gather_bytes(&mut self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, Error> {
        Ok(vec![bytes])
    }
}
