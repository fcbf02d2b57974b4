//! Packing of sequences into rows of tokens.

/// Packs sequences into rows of at most `room` tokens by first fit: each sequence goes into the first row that has
/// room for it, or begins a new row. `lengths` are in tokens. A row is an ascending list of indices into `lengths`;
/// every index occurs once.
///
/// A sequence longer than `room` gets a row that holds no other sequence.
#[must_use]
pub fn pack(lengths: &[usize], room: usize) -> Vec<Vec<usize>> {
    let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
    for (index, &length) in lengths.iter().enumerate() {
        let free = rows
            .iter_mut()
            .find(|(used, _)| used.saturating_add(length) <= room);
        match free {
            Some((used, row)) => {
                *used += length;
                row.push(index);
            }
            None => rows.push((length, vec![index])),
        }
    }
    rows.into_iter().map(|(_, row)| row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sequence_joins_the_first_row_with_room() {
        assert_eq!(
            pack(&[5, 7, 4, 2, 1, 3], 10),
            [vec![0, 2, 4], vec![1, 3], vec![5]]
        );
        assert_eq!(pack(&[10, 11, 0, 10], 10), [vec![0, 2], vec![1], vec![3]]);
        assert_eq!(pack(&[], 10), Vec::<Vec<usize>>::new());
        assert_eq!(pack(&[3, 3], 0), [vec![0], vec![1]]);
        assert_eq!(pack(&[usize::MAX, usize::MAX], 9), [vec![0], vec![1]]);
    }

    #[test]
    fn every_sequence_is_in_one_row_and_no_two_rows_fit_together() {
        let lengths: Vec<usize> = (0..500).map(|i| 1 + i * 7919 % 97).collect();
        let rows = pack(&lengths, 128);
        let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..500).collect::<Vec<_>>());
        let tokens = |row: &Vec<usize>| row.iter().map(|&i| lengths[i]).sum::<usize>();
        assert!(rows.iter().all(|row| tokens(row) <= 128));
        // The first sequence of a row did not fit into any earlier row.
        for (later, row) in rows.iter().enumerate() {
            assert!(row.is_sorted());
            for earlier in &rows[..later] {
                assert!(tokens(earlier) + lengths[row[0]] > 128);
            }
        }
    }
}
