//! The types of MPI in a build without the feature `mpi`. They have no values; the fields hide that from the code
//! that uses them, which the compiler would call unreachable.

use std::convert::Infallible;
use std::ops::Range;

use super::Collective;
use crate::error::Error;

/// The processes that `mpirun` started, which only a build with the feature `mpi` can join.
pub struct NoProcesses(Infallible);

impl NoProcesses {
    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn join() -> Result<Self, Error> {
        Err(Error::Replicas(
            "this build cannot train in several processes\nhint: build it with `--features mpi`, or start `potstill` without `mpirun` and train with threads (`replicas` in [train])"
                .to_owned(),
        ))
    }

    /// This process, as one of the replicas.
    #[must_use]
    pub fn rank(&self) -> NoRank {
        match self.0 {}
    }

    /// Ends all processes with an exit code.
    pub fn abort(&self, _exit_code: u8) -> ! {
        match self.0 {}
    }
}

/// A process as one of the replicas.
#[derive(Debug, Clone, Copy)]
pub struct NoRank(Infallible);

impl NoRank {
    /// Sends a message to another rank.
    pub fn send(&self, _to: usize, _bytes: &[u8]) {
        match self.0 {}
    }

    /// Waits for a message of another rank.
    #[must_use]
    pub fn receive(&self, _from: usize) -> Vec<u8> {
        match self.0 {}
    }
}

impl Collective for NoRank {
    fn rank(&self) -> usize {
        match self.0 {}
    }

    fn size(&self) -> usize {
        match self.0 {}
    }

    fn sum(&mut self, _values: &mut [f32]) -> Result<(), Error> {
        match self.0 {}
    }

    fn sum_f64(&mut self, _values: &mut [f64]) -> Result<(), Error> {
        match self.0 {}
    }

    fn gather(&mut self, _values: &mut [f32], _ranges: &[Range<usize>]) -> Result<(), Error> {
        match self.0 {}
    }

    fn gather_bytes(&mut self, _bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, Error> {
        match self.0 {}
    }
}

#[cfg(test)]
mod tests {
    use super::NoProcesses;

    #[test]
    fn a_build_without_mpi_names_the_one_that_has_it() {
        let refused = NoProcesses::join().map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains("`--features mpi`"), "{refused}");
    }
}
