//! Replicas in processes that `mpirun` started, on one machine or several.
//!
//! The sums are added in the order of the ranks by this program, not by MPI, whose order may depend on the number of
//! machines and on the network. So they have the same bits as those of as many threads.

use std::ops::Range;
use std::thread::sleep;
use std::time::Duration;

use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::{Universe, initialize_with_threading};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Destination, Source};

use super::{Collective, add, piece};
use crate::error::Error;

/// Time between two looks for a message of rank 0. A process that waits within MPI takes a whole core.
const LOOK: Duration = Duration::from_millis(10);
/// Largest number of bytes of one message: MPI counts in 32 bits.
const MESSAGE_BYTES: usize = 1 << 30;

/// The processes that `mpirun` started. MPI ends when this is dropped.
pub struct MpiProcesses {
    _universe: Universe,
}

impl MpiProcesses {
    /// Begins MPI.
    ///
    /// # Errors
    /// When MPI has begun before, or cannot be called from several threads in turn.
    pub fn join() -> Result<Self, Error> {
        match initialize_with_threading(Threading::Serialized) {
            Some((universe, threading)) if threading >= Threading::Serialized => Ok(Self {
                _universe: universe,
            }),
            Some(_) => Err(Error::Replicas(
                "this MPI cannot be called from several threads in turn\nhint: use an MPI that was built with threads"
                    .to_owned(),
            )),
            None => Err(Error::Replicas("MPI has begun before".to_owned())),
        }
    }

    /// This process, as one of the replicas.
    #[must_use]
    pub fn rank(&self) -> MpiRank {
        let world = SimpleCommunicator::world();
        MpiRank {
            rank: world.rank() as usize,
            size: world.size() as usize,
        }
    }

    /// Ends all processes with an exit code.
    pub fn abort(&self, exit_code: u8) -> ! {
        SimpleCommunicator::world().abort(i32::from(exit_code))
    }
}

/// A process as one of the replicas. MPI ends all processes if one is lost.
#[derive(Debug, Clone, Copy)]
pub struct MpiRank {
    rank: usize,
    size: usize,
}

impl MpiRank {
    /// Sends a message to another rank.
    pub fn send(&self, to: usize, bytes: &[u8]) {
        let world = SimpleCommunicator::world();
        let process = world.process_at_rank(to as i32);
        process.send(&(bytes.len() as u64));
        for part in bytes.chunks(MESSAGE_BYTES) {
            process.send(part);
        }
    }

    /// Waits for a message of another rank.
    #[must_use]
    pub fn receive(&self, from: usize) -> Vec<u8> {
        let world = SimpleCommunicator::world();
        let process = world.process_at_rank(from as i32);
        while process.immediate_probe().is_none() {
            sleep(LOOK);
        }
        let (len, _) = process.receive::<u64>();
        let mut bytes = Vec::new();
        while bytes.len() < len as usize {
            bytes.extend(process.receive_vec::<u8>().0);
        }
        bytes
    }

    /// Lengths and beginnings of ranges, as MPI counts.
    fn counts(&self, ranges: &[Range<usize>]) -> Result<(Vec<i32>, Vec<i32>), Error> {
        let count = |number: usize| {
            i32::try_from(number).map_err(|_| {
                Error::Replicas(format!(
                    "{number} numbers are more than MPI can exchange at once"
                ))
            })
        };
        let lengths = ranges.iter().map(|range| count(range.len()));
        let starts = ranges.iter().map(|range| count(range.start));
        Ok((
            lengths.collect::<Result<_, _>>()?,
            starts.collect::<Result<_, _>>()?,
        ))
    }
}

impl Collective for MpiRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    /// Each rank gets the same piece of all ranks, adds the pieces up in order, and sends the sum to the others.
    fn sum(&mut self, values: &mut [f32]) -> Result<(), Error> {
        let world = SimpleCommunicator::world();
        let pieces: Vec<_> = (0..self.size)
            .map(|rank| piece(values.len(), rank, self.size))
            .collect();
        let own = pieces[self.rank].clone();
        let places: Vec<_> = (0..self.size)
            .map(|rank| rank * own.len()..(rank + 1) * own.len())
            .collect();
        let (lengths, starts) = self.counts(&pieces)?;
        let (own_lengths, own_starts) = self.counts(&places)?;
        let mut received = vec![0.0_f32; self.size * own.len()];
        {
            let sent = Partition::new(&*values, lengths.clone(), &starts[..]);
            let mut parts = PartitionMut::new(&mut received[..], own_lengths, &own_starts[..]);
            world.all_to_all_varcount_into(&sent, &mut parts);
        }
        let (sums, others) = received.split_at_mut(own.len());
        for part in others.chunks(own.len().max(1)) {
            add(sums, part);
        }
        let mut all = PartitionMut::new(values, lengths, &starts[..]);
        world.all_gather_varcount_into(&*sums, &mut all);
        Ok(())
    }

    fn sum_f64(&mut self, values: &mut [f64]) -> Result<(), Error> {
        let world = SimpleCommunicator::world();
        if values.is_empty() {
            world.barrier();
            return Ok(());
        }
        let mut all = vec![0.0_f64; self.size * values.len()];
        world.all_gather_into(&*values, &mut all[..]);
        for (rank, part) in all.chunks(values.len()).enumerate() {
            match rank {
                0 => values.copy_from_slice(part),
                _ => add(values, part),
            }
        }
        Ok(())
    }

    fn gather(&mut self, values: &mut [f32], ranges: &[Range<usize>]) -> Result<(), Error> {
        let (lengths, starts) = self.counts(ranges)?;
        let own = values[ranges[self.rank].clone()].to_vec();
        let mut all = PartitionMut::new(values, lengths, &starts[..]);
        SimpleCommunicator::world().all_gather_varcount_into(&own[..], &mut all);
        Ok(())
    }

    fn gather_bytes(&mut self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, Error> {
        if self.rank > 0 {
            self.send(0, &bytes);
            return Ok(Vec::new());
        }
        let mut all = vec![bytes];
        all.extend((1..self.size).map(|rank| self.receive(rank)));
        Ok(all)
    }
}
