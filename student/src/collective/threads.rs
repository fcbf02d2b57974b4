//! Replicas in threads of this process, which exchange numbers through shared memory.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use super::{Collective, add, piece};
use crate::error::Error;

/// The memory that all threads share. Each rank writes its own entry of a list, and reads those of all ranks after a meeting.
struct Shared {
    meeting: Mutex<Meeting>,
    changed: Condvar,
    floats: Slots<f32>,
    sums: Slots<f32>,
    doubles: Slots<f64>,
    bytes: Slots<u8>,
}

/// Values by rank.
type Slots<T> = Vec<RwLock<Vec<T>>>;

/// A point that all ranks have to reach before one goes on.
#[derive(Default)]
struct Meeting {
    arrived: usize,
    /// Number of meetings that have taken place.
    round: u64,
    /// The first rank that ended.
    ended: Option<usize>,
}

/// One of the replicas. When it is dropped, the others are told so the next time they wait for it.
pub(crate) struct ThreadRank {
    rank: usize,
    shared: Arc<Shared>,
}

/// Creates the replicas of a group.
pub(crate) fn thread_ranks(size: usize) -> Vec<ThreadRank> {
    fn slots<T>(size: usize) -> Slots<T> {
        (0..size).map(|_| RwLock::default()).collect()
    }
    let shared = Arc::new(Shared {
        meeting: Mutex::default(),
        changed: Condvar::new(),
        floats: slots(size),
        sums: slots(size),
        doubles: slots(size),
        bytes: slots(size),
    });
    (0..size)
        .map(|rank| ThreadRank {
            rank,
            shared: shared.clone(),
        })
        .collect()
}

impl ThreadRank {
    /// Waits until all ranks are here.
    fn meet(&self) -> Result<(), Error> {
        let mut meeting = self.lock();
        self.check(&meeting)?;
        meeting.arrived += 1;
        let round = meeting.round;
        if meeting.arrived == self.size() {
            meeting.arrived = 0;
            meeting.round += 1;
            self.shared.changed.notify_all();
            return Ok(());
        }
        loop {
            let changed = self.shared.changed.wait(meeting);
            meeting = changed.unwrap_or_else(PoisonError::into_inner);
            // A rank may end after a meeting that this one has not noticed yet.
            if meeting.round != round {
                return Ok(());
            }
            self.check(&meeting)?;
        }
    }

    fn check(&self, meeting: &Meeting) -> Result<(), Error> {
        match meeting.ended {
            None => Ok(()),
            Some(rank) => Err(Error::LostRank {
                rank,
                size: self.size(),
                reason: "its thread ended".to_owned(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Meeting> {
        let meeting = self.shared.meeting.lock();
        meeting.unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the entry of this rank by `values`.
    fn put<T: Copy>(&self, slots: &Slots<T>, values: &[T]) {
        let slot = slots[self.rank].write();
        let mut slot = slot.unwrap_or_else(PoisonError::into_inner);
        slot.clear();
        slot.extend_from_slice(values);
    }
}

/// The entries of all ranks, in order.
fn entries<T>(slots: &Slots<T>) -> impl Iterator<Item = RwLockReadGuard<'_, Vec<T>>> {
    (slots.iter()).map(|slot| slot.read().unwrap_or_else(PoisonError::into_inner))
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.floats.len()
    }

    /// Each rank adds up one piece, and copies the others.
    fn sum(&mut self, values: &mut [f32]) -> Result<(), Error> {
        let shared = &self.shared;
        self.put(&shared.floats, values);
        self.meet()?;
        let range = piece(values.len(), self.rank, self.size());
        let mut sums = vec![0.0; range.len()];
        for (rank, slot) in entries(&shared.floats).enumerate() {
            let part = slot.get(range.clone()).unwrap_or_default();
            match rank {
                0 => sums.copy_from_slice(part),
                _ => add(&mut sums, part),
            }
        }
        self.put(&shared.sums, &sums);
        self.meet()?;
        let len = values.len();
        for (rank, sums) in entries(&shared.sums).enumerate() {
            values[piece(len, rank, self.size())].copy_from_slice(&sums);
        }
        Ok(())
    }

    fn sum_f64(&mut self, values: &mut [f64]) -> Result<(), Error> {
        self.put(&self.shared.doubles, values);
        self.meet()?;
        for (rank, slot) in entries(&self.shared.doubles).enumerate() {
            match rank {
                0 => values.copy_from_slice(&slot),
                _ => add(values, &slot),
            }
        }
        self.meet()
    }

    fn gather(&mut self, values: &mut [f32], ranges: &[Range<usize>]) -> Result<(), Error> {
        self.put(&self.shared.floats, &values[ranges[self.rank].clone()]);
        self.meet()?;
        for (range, slot) in ranges.iter().zip(entries(&self.shared.floats)) {
            values[range.clone()].copy_from_slice(&slot);
        }
        self.meet()
    }

    fn gather_bytes(&mut self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, Error> {
        self.put(&self.shared.bytes, &bytes);
        self.meet()?;
        let all = match self.rank {
            0 => entries(&self.shared.bytes)
                .map(|slot| slot.clone())
                .collect(),
            _ => Vec::new(),
        };
        self.meet()?;
        self.put(&self.shared.bytes, &[]);
        Ok(all)
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        let mut meeting = self.lock();
        meeting.ended.get_or_insert(self.rank);
        drop(meeting);
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a function on each rank, in a thread each, and returns what it returned, by rank.
    fn on_ranks<T: Send>(size: usize, run: impl Fn(&mut ThreadRank) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = thread_ranks(size)
                .into_iter()
                .map(|rank| scope.spawn(|| run(&mut { rank })))
                .collect();
            let results = threads.into_iter().map(|thread| thread.join());
            results.map(Result::unwrap).collect()
        })
    }

    #[test]
    fn sums_are_in_the_order_of_the_ranks() {
        for (size, len) in [(1, 5), (2, 7), (3, 2), (4, 1000)] {
            let value = |rank: usize, i: usize| ((rank * 7919 + i * 104_729) % 997) as f32 * 1e-3;
            let sums = on_ranks(size, |rank| {
                let mut all = Vec::new();
                for round in 0..3 {
                    let mine = (0..len).map(|i| value(rank.rank(), i + round));
                    let mut values: Vec<f32> = mine.collect();
                    rank.sum(&mut values).unwrap();
                    all.push(values);
                }
                all
            });
            for of_rank in sums {
                for (round, values) in of_rank.iter().enumerate() {
                    for (i, found) in values.iter().enumerate() {
                        let all = (1..size).map(|rank| value(rank, i + round));
                        let expected = all.fold(value(0, i + round), |sum, value| sum + value);
                        assert_eq!(found.to_bits(), expected.to_bits());
                    }
                }
            }
        }
    }

    #[test]
    fn what_each_rank_has_reaches_the_others() {
        let ranges = [0..3, 3..3, 3..7];
        let gathered = on_ranks(3, |rank| {
            let mut values = vec![rank.rank() as f32; 7];
            rank.gather(&mut values, &ranges).unwrap();
            let mut counts = [1.0, rank.rank() as f64];
            rank.sum_f64(&mut counts).unwrap();
            assert_eq!(counts, [3.0, 3.0]);
            let bytes = rank.gather_bytes(vec![9; rank.rank()]).unwrap();
            (values, bytes)
        });
        for (rank, (values, bytes)) in gathered.into_iter().enumerate() {
            assert_eq!(values, [0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]);
            match rank {
                0 => assert_eq!(bytes, [vec![], vec![9], vec![9, 9]]),
                _ => assert!(bytes.is_empty()),
            }
        }
    }

    #[test]
    fn a_rank_that_ends_is_named_to_the_others() {
        let found = on_ranks(3, |rank| match rank.rank() {
            1 => None,
            _ => Some(rank.sum(&mut [1.0; 4]).unwrap_err().to_string()),
        });
        assert!(found[0].as_ref().unwrap().contains("replica 1 of 3"));
        assert!(found[2].is_some());
    }
}
