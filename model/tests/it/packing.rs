//! Packed rows: each document has the states that it has on its own.

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_model::Decoder;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{host, ids, lively, real};

/// Makes documents of these lengths, by row.
fn random_documents(lengths: &[Vec<usize>], vocab: u32, seed: u64) -> Vec<Vec<Vec<u32>>> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut document = |length: &usize| {
        (0..*length)
            .map(|_| generator.random_range(0..vocab))
            .collect()
    };
    let row = |lengths: &Vec<usize>| lengths.iter().map(&mut document).collect();
    lengths.iter().map(row).collect()
}

/// Packs the documents of each row, padded with id 0.
fn packed(rows: &[Vec<Vec<u32>>], device: &Device) -> Tensor<2, Int> {
    let rows: Vec<Vec<i32>> = rows
        .iter()
        .map(|row| row.iter().flatten().map(|id| *id as i32).collect())
        .collect();
    let t = rows.iter().map(Vec::len).max().unwrap();
    let flat: Vec<i32> = rows
        .iter()
        .flat_map(|row| row.iter().copied().chain(vec![0; t - row.len()]))
        .collect();
    Tensor::from_data(TensorData::new(flat, [rows.len(), t]), device)
}

/// Computes the states of each document within the packed rows, `[length · d]`.
fn states(model: &Decoder, rows: &[Vec<Vec<u32>>]) -> Vec<Vec<f64>> {
    let lengths: Vec<Vec<usize>> = rows
        .iter()
        .map(|row| row.iter().map(Vec::len).collect())
        .collect();
    let hidden = model.hidden_packed(packed(rows, &model.device()), &lengths);
    let [_, t, d] = hidden.dims();
    let all = host(hidden);
    let mut states = Vec::new();
    for (row, lengths) in lengths.iter().enumerate() {
        let mut start = row * t;
        for length in lengths {
            states.push(all[start * d..(start + length) * d].to_vec());
            start += length;
        }
    }
    states
}

fn check(load: impl Fn(DType) -> Decoder, lengths: &[Vec<usize>]) {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
        let model = load(dtype);
        let vocab = model.config().vocab_size as u32;
        let rows = random_documents(lengths, vocab, 3);
        for model in [model.clone(), model.train()] {
            let together = states(&model, &rows);
            for (document, found) in rows.iter().flatten().zip(&together) {
                let alone = host(model.hidden(ids(&[document], &model.device())));
                let largest = alone.iter().fold(0f64, |max, x| max.max(x.abs()));
                for (a, b) in alone.iter().zip(found) {
                    assert!((a - b).abs() <= tolerance * largest, "{dtype:?}: {a} {b}");
                }
            }
            // A different first document in each row does not change a bit in the later documents.
            let mut other = rows.clone();
            for row in &mut other {
                row[0].iter_mut().for_each(|id| *id = (*id + 1) % vocab);
            }
            let changed = states(&model, &other);
            let mut at = 0;
            for row in &rows {
                assert_ne!(changed[at], together[at]);
                assert_eq!(
                    changed[at + 1..at + row.len()],
                    together[at + 1..at + row.len()]
                );
                at += row.len();
            }
        }
    }
}

#[test]
fn a_packed_document_has_the_states_that_it_has_alone() {
    check(lively, &[vec![3, 1, 7], vec![9], vec![2, 4]]);
    check(lively, &[vec![5, 2], vec![5, 2]]);
    // A row may be longer than the context of 64, if its documents are not.
    check(lively, &[vec![40, 50], vec![1, 63, 2]]);
}

#[test]
fn a_packed_document_of_stories260k_has_the_states_that_it_has_alone() {
    let Some(dir) = real("models/stories260K") else {
        return;
    };
    let load = |dtype| potstill_model::load(&dir, dtype, &Device::flex()).unwrap();
    check(load, &[vec![100, 30, 126], vec![250]]);
}

#[test]
fn the_rest_of_a_row_is_a_document() {
    let model = lively(DType::F64);
    let row: Vec<u32> = vec![4, 9, 1, 7, 7, 2];
    let ids_bt = || ids(&[&row], &model.device());
    let one = host(model.hidden(ids_bt()));
    for lengths in [vec![], vec![vec![]], vec![vec![6]], vec![vec![9]]] {
        assert_eq!(host(model.hidden_packed(ids_bt(), &lengths)), one);
    }
    assert_eq!(
        host(model.hidden_packed(ids_bt(), &[vec![2]])),
        host(model.hidden_packed(ids_bt(), &[vec![2, 4]]))
    );
}
