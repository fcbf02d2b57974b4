//! Packing: several sequences in the place of one, so that little of a batch is padding.

/// Which sequences share a place of `room` tokens: by first fit, each in order goes to the first place that has room
/// for it. Each inner list is a place with its sequences in order. Every index of `lengths` is in exactly one list, and
/// the lengths of a list sum to at most `room`, except that a sequence longer than `room` has a place to itself. First
/// fit takes at most 1.7 times the places of the best packing (Dósa and Sgall, STACS 2013). Time is O(n log n).
pub fn pack(lengths: &[usize], room: usize) -> Vec<Vec<usize>> {
    let room = room.min(usize::MAX - 1);
    let mut space = Space::new(lengths.len(), room);
    let mut places: Vec<Vec<usize>> = Vec::new();
    for (index, &length) in lengths.iter().enumerate() {
        // Places that nothing is in yet have all the room, so the first of them is as far as first fit goes.
        let place = match length > room {
            true => places.len(),
            false => space.first(length),
        };
        match places.get_mut(place) {
            Some(members) => members.push(index),
            None => places.push(vec![index]),
        }
        space.take(place, length);
    }
    places
}

/// What is left in each place, as a binary tree of maxima: node i is over 2i and 2i + 1, and the places are the last
/// half. A place has one more than its free tokens, and 0 once a sequence too long for it closed it.
struct Space {
    most: Vec<usize>,
    leaves: usize,
}

impl Space {
    fn new(places: usize, room: usize) -> Space {
        let leaves = places.next_power_of_two();
        Space {
            most: vec![room + 1; 2 * leaves],
            leaves,
        }
    }

    /// The first place with so many free tokens; there is one as long as a place is empty.
    fn first(&self, length: usize) -> usize {
        let mut node = 1;
        while node < self.leaves {
            let left = self.most.get(2 * node).copied().unwrap_or_default();
            node = 2 * node + usize::from(left <= length);
        }
        node - self.leaves
    }

    fn take(&mut self, place: usize, length: usize) {
        let mut node = self.leaves + place;
        if let Some(free) = self.most.get_mut(node) {
            *free = free.saturating_sub(length);
        }
        while node > 1 {
            node /= 2;
            let most = match self.most.get(2 * node..2 * node + 2) {
                Some([left, right]) => *left.max(right),
                _ => 0,
            };
            if let Some(parent) = self.most.get_mut(node) {
                *parent = most;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// First fit as it is told, in quadratic time.
    fn slow(lengths: &[usize], room: usize) -> Vec<Vec<usize>> {
        let mut places: Vec<(usize, Vec<usize>)> = Vec::new();
        for (index, &length) in lengths.iter().enumerate() {
            let fits = |(used, _): &&mut (usize, Vec<usize>)| {
                *used <= room && used.saturating_add(length) <= room
            };
            match places.iter_mut().find(fits) {
                Some((used, members)) => {
                    *used += length;
                    members.push(index);
                }
                None => places.push((length, vec![index])),
            }
        }
        places.into_iter().map(|(_, members)| members).collect()
    }

    #[test]
    fn the_first_place_with_room_is_taken() {
        assert_eq!(pack(&[6, 5, 4, 3, 2], 10), [vec![0, 2], vec![1, 3, 4]]);
        assert_eq!(pack(&[3, 11, 7, 1], 10), [vec![0, 2], vec![1], vec![3]]);
        assert_eq!(pack(&[11, 0, 12], 10), [vec![0], vec![1], vec![2]]);
        assert_eq!(pack(&[0, 0, 1], 0), [vec![0, 1], vec![2]]);
        assert_eq!(
            pack(&[usize::MAX, 1, usize::MAX], usize::MAX),
            [vec![0], vec![1], vec![2]]
        );
        assert_eq!(pack(&[], 10), [[0; 0]; 0]);
    }

    proptest! {
        #[test]
        fn every_sequence_has_one_place_that_holds_it(lengths in vec(0..40_usize, 0..200), room in 0..60_usize) {
            let places = pack(&lengths, room);
            prop_assert_eq!(&places, &pack(&lengths, room));
            prop_assert_eq!(&places, &slow(&lengths, room));
            for place in &places {
                let used: usize = place.iter().map(|index| lengths[*index]).sum();
                prop_assert!(used <= room || place.len() == 1, "{:?} has {} of {}", place, used, room);
                prop_assert!(place.is_sorted_by(|a, b| a < b) && !place.is_empty());
            }
            let mut all = places.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
        }
    }
}
