//! The gradient of an embedding: each row of ∂L/∂y is added to the row of the table with its token id.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use crate::flex::{compact, elements, is_cpu_float, shape2};
use crate::float::{StoredFloat, with_stored_type};

/// Adds row i of `rows_nd` to row `ids[i]` of `sum_vd`, for all i in order: `[v, d]`, n ids and `[n, d]` →
/// `[v, d]`. Not differentiable.
///
/// On the CPU, `sum_vd` is updated in place if its storage is not shared, and only the rows that `ids` names are read;
/// f16 and bf16 are rounded after each addition.
///
/// # Panics
/// Panics on shapes that do not fit, and on an id that is v or larger.
#[must_use]
pub fn add_rows(sum_vd: Tensor<2>, ids: &[usize], rows_nd: Tensor<2>) -> Tensor<2> {
    let ([v, d], rows) = (sum_vd.dims(), rows_nd.dims());
    assert_eq!(rows, [ids.len(), d], "add_rows: shape of the rows");
    assert!(
        ids.iter().all(|id| *id < v),
        "add_rows: an id is outside the table of {v} rows"
    );
    if is_cpu_float(&sum_vd) && rows_nd.dtype() == sum_vd.dtype() {
        let (sum, rows) = (sum_vd.into_dispatch(), rows_nd.into_dispatch());
        let sum = <Dispatch as EmbeddingOps>::add_rows(sum, ids.to_vec(), rows);
        return Tensor::from_dispatch(sum);
    }
    let ids: Vec<i64> = ids.iter().map(|id| *id as i64).collect();
    let count = ids.len();
    let ids_n = Tensor::<1, Int>::from_data(TensorData::new(ids, [count]), &sum_vd.device());
    sum_vd.select_assign(0, ids_n, rows_nd, IndexingUpdateOp::Add)
}

/// The CPU form of the accumulation, for f32, f16 and bf16.
#[backend_extension(Flex)]
pub(crate) trait EmbeddingOps: Backend {
    /// `[v, d]`, n ids, `[n, d]` → `[v, d]`.
    fn add_rows(
        sum: FloatTensor<Self>,
        ids: Vec<usize>,
        rows: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

impl EmbeddingOps for Flex {
    fn add_rows(
        sum: FloatTensor<Self>,
        ids: Vec<usize>,
        rows: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (mut sum, rows) = (compact(sum), rows.to_contiguous());
        let [_, d] = shape2(&sum);
        with_stored_type!(sum.dtype(), E => {
            add_to_table(sum.storage_mut::<E>(), &ids, elements::<E>(&rows), d);
        });
        sum
    }
}

fn add_to_table<E: StoredFloat<f32>>(table: &mut [E], ids: &[usize], rows: &[E], d: usize) {
    for (id, row) in ids.iter().zip(rows.chunks(d.max(1))) {
        let sum = &mut table[id * d..(id + 1) * d];
        for (sum, x) in sum.iter_mut().zip(row) {
            *sum = E::narrow(sum.widen() + x.widen());
        }
    }
}
